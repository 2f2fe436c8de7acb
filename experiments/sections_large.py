"""The sections of RESULTS.md on CIFAR-10 and on the Penn Treebank."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from metax.harness import mean_interval

# floating point operations of a training and a validation step, in plain training steps
COSTS = {
    "delta_stn": "8/3, 4/3",
    "centered_stn": "7/3, 4/3",
    "stn": "2, 4/3",
    "fixed": "1, 0",
}
PAPER_IMAGES, PAPER_WIDTH = 50_000, 650
NOTE = (
    "**A smoke run on a CPU:** {what}. It shows that every part runs and that no",
    "hyperparameter is cut off. No figure here says which method is better, and none",
    "is comparable with a published one.",
)


def cifar(record: dict) -> list[str]:
    """Losses and accuracies of each method at its last and best epoch."""
    config = record["config"]
    is_small = config["num_images"] < PAPER_IMAGES or config["scale"] < 1
    norm = f" with {config['norm']} norm" if config["model"] == "resnet18" else ""
    what = (
        f"{config['model']}{norm} at {config['scale']:.3g} of its widths, "
        f"{config['num_images']} images, {config['epochs']} epochs"
    )
    judged = ("valid_loss", "test_loss", "valid_accuracy", "test_accuracy")
    return [*_note(is_small, what), *_judged(record, judged), "", *_moved(record)]


def text(record: dict) -> list[str]:
    """Perplexities of each method at its last and best epoch."""
    config = record["config"]
    is_small = bool(config["num_tokens"]) or config["width"] < PAPER_WIDTH
    what = (
        f"two layers of {config['width']}, the {config['vocab']} most frequent words, "
        f"the first {config['num_tokens']} tokens, {config['epochs']} epochs"
    )
    judged = ("valid_perplexity", "test_perplexity")
    return [*_note(is_small, what), *_judged(record, judged), "", *_moved(record)]


def _note(is_small: bool, what: str) -> list[str]:
    return [*(line.format(what=what) for line in NOTE), ""] if is_small else []


def _judged(record: dict, judged: Sequence[str]) -> list[str]:
    """The best epoch is that of the least validation loss, the first of `judged`."""
    lines = []
    for method in record["config"]["methods"]:
        runs = _runs(record, method)
        seconds = [row["seconds"] for run in runs for row in run[1:]]
        cost = f"{np.median(seconds):.2f}" if seconds else "–"
        ends = {
            "last": [run[-1] for run in runs],
            "best": [min(run, key=lambda row: _known(row[judged[0]])) for run in runs],
        }
        for which, rows in ends.items():
            cells = [_interval([_known(row[name]) for row in rows]) for name in judged]
            lines.append((method, which, *cells, COSTS[method], cost))
    heads = (
        "method",
        "epoch",
        *(name.replace("_", " ") for name in judged),
        "operations, plain steps",
        "s an epoch",
    )
    return [
        "`operations`: of a training and a validation step. `best`: by validation.",
        "",
        *_table(heads, lines),
    ]


def _moved(record: dict) -> list[str]:
    """Where each hyperparameter ends, the mean over seeds, in its own units."""
    methods = record["config"]["methods"]
    ends = {method: [run[-1] for run in _runs(record, method)] for method in methods}
    names = [name for name in record["rows"][0] if name.startswith("hparams.")]
    lines = [
        (
            name.removeprefix("hparams."),
            *(f"{np.mean([_known(r[name]) for r in ends[m]]):.4g}" for m in methods),
        )
        for name in names
    ]
    silent = [f"{m}: {', '.join(sorted({r['silent'] for r in ends[m]})) or 'none'}"
              for m in methods if m != "fixed"]  # fmt: skip
    return [
        f"Without any hypergradient (silent): {'; '.join(silent)}.",
        "",
        *_table(("hyperparameter at the end", *methods), lines),
    ]


def _runs(record: dict, method: str) -> list[list[dict]]:
    rows = [row for row in record["rows"] if row["method"] == method]
    seeds = sorted({row["seed"] for row in rows})
    return [[row for row in rows if row["seed"] == seed] for seed in seeds]


def _known(value: float | None) -> float:
    return np.inf if value is None else value


def _interval(values: list[float]) -> str:
    if not np.all(np.isfinite(values)):
        return f"{np.sum(~np.isfinite(values))} of {len(values)} diverged"
    if len(values) < 2:
        return f"{values[0]:.4g}"
    mean, low, high = mean_interval(values)
    return f"{mean:.4g} [{low:.4g}, {high:.4g}]"


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]
