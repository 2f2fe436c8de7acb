"""Writes RESULTS.md from the committed `results/*.json`.

    python -m experiments.report              seconds
    python -m experiments.report --check      says whether RESULTS.md is what it writes

A result is the `summary.json` of a run, committed as `results/NAME.json` with the names
in SECTIONS. Figures marked "authors" are those of the CSV files published beside the
paper.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import (
    sections_amalgamation,
    sections_autoloss,
    sections_cost,
    sections_harness,
    sections_images,
    sections_large,
    sections_optimizers,
    sections_reviews,
    sections_ridge,
)
from metax.harness import mean_interval

TIME_GOALS = {"sgd_hd": 2.2, "adam_hd": 1.7}  # of the time of the plain rule
ADVISED = ("adam_hd multiplicative .02", 1e-3)  # as the docstring of adam_hd has it
ROOT = Path(__file__).parents[1]
METHODS = ("sgd", "sgd_hd", "sgdn", "sgdn_hd", "adam", "adam_hd")
HEAD = """# Results

Written by `python -m experiments.report` from `results/*.json`; not edited by hand. A
figure with brackets is the mean over seeds with its 95 % Student interval.
"""
# Training loss by the authors, by (model, epoch); of adam_hd on the MLP none exists.
AUTHORS = {
    ("logistic", 1): (1.2041, 0.4170, 0.5677, 0.3608, 0.4312, 0.4207),
    ("logistic", 10): (0.3957, 0.2934, 0.2893, 0.2612, 0.2590, 0.2583),
    ("mlp", 1): (2.1584, 0.6336, 1.0158, 0.3414, 0.1974, None),
    ("mlp", 10): (0.4373, 0.2551, 0.1530, 0.0708, 0.0236, None),
}
# Where the mean of three seeds is to lie, from the authors' runs and two reproductions.
BANDS = {
    ("logistic", 10, "sgd_hd"): (0.28, 0.31),
    ("logistic", 10, "sgdn"): (0.2883, 0.2903),
    ("logistic", 10, "sgdn_hd"): (0.258, 0.270),
    ("logistic", 10, "adam"): (0.2575, 0.2595),
    ("logistic", 10, "adam_hd"): (0.2555, 0.2595),
    ("mlp", 1, "sgd_hd"): (0.61, 0.65),
    ("mlp", 1, "sgdn_hd"): (0.31, 0.345),
    ("mlp", 1, "adam_hd"): (0.183, 0.203),
}
PEAKS = {
    ("logistic", "sgd_hd"): "authors .0471 @14; band .040 to .052 by step 20",
    ("logistic", "sgdn_hd"): "authors .0487 @4",
    ("logistic", "adam_hd"): "authors .001161 @270; band .00114 to .00118 @250 to 320",
    ("mlp", "sgd_hd"): "authors .0495 @80; band .047 to .052 @70 to 85",
    ("mlp", "sgdn_hd"): "authors .0520 @19",
    ("mlp", "adam_hd"): "paper .001083",
}


def tuning(record: dict) -> list[str]:
    """Measured beside the authors' figures, and the course of the learning rate."""
    model, seeds = record["config"]["model"], record["config"]["num_seeds"]
    losses, rates = [], []
    for index, name in enumerate(METHODS):
        rows = [row for row in record["rows"] if row["method"] == name]
        for epoch in (1, 10):
            at = [row for row in rows if row["epoch"] == epoch]
            train = [row["train_loss"] for row in at]
            band = BANDS.get((model, epoch, name))
            inside = "" if band is None else _inside(np.mean(train), band)
            valid = _interval([row["valid_loss"] for row in at])
            accuracy = _interval([row["valid_accuracy"] for row in at])
            authors = _number(AUTHORS[model, epoch][index])
            losses.append(
                (name, epoch, _interval(train), authors, inside, valid, accuracy)
            )
        if name.endswith("_hd"):
            rates.append((name, *_peaks(rows, seeds), PEAKS[model, name]))
    heads = (
        "method",
        "epoch",
        "train loss",
        "authors",
        "band",
        "valid loss",
        "accuracy",
    )
    peak_heads = ("method", "largest rate @step, a seed each", "at the end", "expected")
    return [*_table(heads, losses), "", *_table(peak_heads, rates)]


def _peaks(rows: list[dict], seeds: int) -> tuple[str, str]:
    peaks, ends = [], []
    for seed in range(seeds):
        mine = [row for row in rows if row["seed"] == seed]
        top = max(mine, key=lambda row: row["max_learning_rate"])
        peaks.append(f"{top['max_learning_rate']:.4g} @{top['max_at_step']}")
        ends.append(f"{mine[-1]['learning_rate']:.3g}")
    return ", ".join(peaks), ", ".join(ends)


def stability(record: dict) -> list[str]:
    """Where Adam-HD diverges, and the law of the largest stable β."""
    failures = [
        (
            name,
            ", ".join(
                "no" if s is None else f"step {s}" for s in row["diverged_at_step"]
            ),
            " ".join(_number(rate, ".2g") for rate in row["learning_rate"][0][:7]),
            ", ".join(_number(loss, ".3f") for loss in row["mean_train_loss"]),
        )
        for name, row in record["failure"].items()
    ]
    heads = ("Adam-HD", "diverged", "rate after each step", "mean loss of the epoch")
    sizes = [str(n) for n in record["config"]["sizes"]]
    laws = [
        (name, *(_law(row[n]) for n in sizes)) for name, row in record["law"].items()
    ]
    return [
        *_table(heads, failures),
        "",
        "Largest stable β·n around Adam on noisy quadratics of n parameters; for the",
        "normalised rules whether each β is stable:",
        "",
        *_table(("rule", *(f"n = {n}" for n in sizes)), laws),
    ]


def recovery(record: dict) -> list[str]:
    """Final training loss from each α_0; who recovers, and whom HD loses to."""
    table: dict[str, dict[float, list[float]]] = {}
    for row in record["rows"]:
        cell = table.setdefault(row["method"], {})
        loss = np.inf if row["train_loss"] is None else row["train_loss"]
        cell.setdefault(row["learning_rate"], []).append(loss)
    tuned = {n: min(table[n].values(), key=np.mean) for n in ("sgd", "adam")}
    best = float(min(np.mean(losses) for losses in tuned.values()))
    learned = [name for name in table if "_hd " in name]
    rates = sorted(table[learned[0]])
    lines = [(name, *(_cell(table[name][a], best) for a in rates)) for name in learned]
    top = min((cell for n in learned for cell in table[n].values()), key=np.mean)
    advised = table[ADVISED[0]][ADVISED[1]]
    others = {f"{name}, tuned": losses for name, losses in tuned.items()}
    others |= {n: v[0.0] for n, v in table.items() if 0.0 in v}
    rest = [
        (
            name,
            _interval(losses),
            *(_interval(np.subtract(losses, x), signed=True) for x in (advised, top)),
        )
        for name, losses in sorted(others.items(), key=lambda item: np.mean(item[1]))
    ]
    lower = [row[0] for row in rest if np.mean(others[row[0]]) < np.mean(advised)]
    return [
        f"Best tuned plain optimizer: {_number(best)}. `*`: within 5 % of it.",
        "",
        *_table(("from α_0 =", *(f"{a:.0e}" for a in rates)), lines),
        "",
        f"Beside the advised setting, {ADVISED[0]} from {ADVISED[1]:.0e}:",
        f"{_interval(advised)}; and the best cell of the table, chosen afterwards:",
        f"{_interval(top)}. Differences are paired over seeds, below 0 where HD loses.",
        f"The advised setting loses to: {', '.join(lower) or 'none of these'}.",
        "",
        *_table(("optimizer", "train loss", "less advised", "less best cell"), rest),
    ]


def rate_grid(record: dict) -> list[str]:
    """Of the 36 cells α_0 × β, how many beat the base at the same α_0."""
    last, lines = record["config"]["epochs"], []
    rows = [row for row in record["rows"] if row["epoch"] == last]
    for base in ("sgd", "sgdn", "adam"):
        plain, learned = (_means(rows, name) for name in (base, f"{base}_hd"))
        alphas = {s: record["settings"][base].index(pair[0]) for s, pair in
                  enumerate(record["settings"][f"{base}_hd"])}  # fmt: skip
        wins = sum(loss < plain[alphas[s]] for s, loss in learned.items())
        broken = sum(not np.isfinite(loss) for loss in learned.values())
        top = min(learned, key=lambda s: learned[s])
        alpha, beta = record["settings"][f"{base}_hd"][top]
        where = f"{learned[top]:.4f} at α_0 = {alpha:.0e}, β = {beta:.0e}"
        spread = [_number(f(list(x.values()))) for x in (plain, learned) for f in
                  (np.min, np.median)]  # fmt: skip
        lines.append(
            (f"{base}_hd", f"{wins} of {len(learned)}", broken, where, *spread)
        )
    heads = ("method", "cells below the base", "not finite", "best cell", "base: best",
             "median over α_0", "HD: best", "median over cells")  # fmt: skip
    return [
        "HD has 36 cells to be best in and its base 6, so the two best say little;",
        "the count is against the base at the same α_0.",
        "",
        *_table(heads, lines),
    ]


def hdm(record: dict) -> list[str]:
    """Gradients until solved, as distributions over starts."""
    heads = ("rule", "solved", "least", "quartile", "median", "quartile", "most")
    budget, lines = record["config"]["steps"], []
    for name, row in record["table"].items():
        counts = [np.inf if count is None else count for count in row["counts"]]
        levels = np.percentile(counts, [0, 25, 50, 75, 100], method="nearest")
        cells = [f"{x:.0f}" if np.isfinite(x) else f"> {budget}" for x in levels]
        lines.append((name, f"{row['solved']} of {len(counts)}", *cells))
    return _table(heads, lines)


def benchmark(record: dict) -> list[str]:
    """Measured time over plain time, beside what the bytes predict."""
    heads = ("parameters", "leaves", "rule", "ms", "ratio", "limit", "stream", "temp")
    lines = [tuple(row[head] for head in heads) for row in record["rows"]]
    verdicts = [
        f"* {row['rule']}, {row['parameters']} parameters, {row['leaves']} leaves: "
        f"{row['ratio']}, {'reached' if float(row['ratio']) <= goal else 'not reached'}"
        for row in record["rows"]
        for goal in [TIME_GOALS.get(row["rule"])]
        if goal is not None and row["parameters"] != "1e+05"
    ]
    return [
        "Times over the plain rule of the family. `limit`: words that must move;",
        "`stream`: words that one loop an array moves where no cache holds the arrays,",
        "which for SGD is above the goal already. `temp`: temporaries, in copies of",
        "the parameters.",
        f"Goals on a CPU, {TIME_GOALS}:",
        "",
        *verdicts,
        "",
        *_table(heads, lines),
    ]


SECTIONS = {
    "hypergradient_logistic": ("Hypergradient descent: softmax regression", tuning),
    "hypergradient_mlp": ("Hypergradient descent: MLP 784-1000-1000-10", tuning),
    "hypergradient_grid": ("Hypergradient descent: the grid of α_0 and β", rate_grid),
    "hypergradient_recovery": ("Hypergradient descent: from a wrong rate", recovery),
    "hypergradient_stability": ("Hypergradient descent: when Adam-HD fails", stability),
    "hypergradient_hdm": ("HDM-HB: gradients to solve a badly conditioned SVM", hdm),
    "hypergradient_benchmark": ("Hypergradient descent: time and memory", benchmark),
    "stn_ridge": ("Delta-STN: ridge regression", sections_ridge.ridge),
    "stn_digits_corrupted": (
        "Delta-STN: digits, 40 % of the labels wrong",
        sections_images.images,
    ),
    "stn_digits_warmup_200": (
        "Delta-STN: digits, a warm-up of 200 steps",
        sections_images.images,
    ),
    "stn_digits_warmup_500": (
        "Delta-STN: digits, a warm-up of 500 steps",
        sections_images.images,
    ),
    "stn_mnist_corrupted": (
        "Delta-STN: MNIST, 40 % of the labels wrong",
        sections_images.images,
    ),
    "stn_mnist": ("Delta-STN: MNIST", sections_images.images),
    "stn_fashion_cnn": (
        "Delta-STN: Fashion-MNIST, SimpleCNN",
        sections_images.images,
    ),
    "stn_baselines": (
        "Delta-STN beside searches over whole runs",
        sections_images.baselines,
    ),
    "stn_fashion_search": (
        "Delta-STN beside a random search: Fashion-MNIST, SimpleCNN",
        sections_images.baselines,
    ),
    "stn_starts": ("Delta-STN: dropout from several starts", sections_images.starts),
    "stn_benchmark": ("Delta-STN: time and memory", sections_cost.cost),
    "stn_cifar": ("Delta-STN: CIFAR-10", sections_large.cifar),
    "stn_cifar_batch": ("Delta-STN: CIFAR-10, batch norm", sections_large.cifar),
    "stn_ptb": ("Delta-STN: Penn Treebank", sections_large.text),
    "amalgamation_digits_minmax": (
        "Optimizer amalgamation: digits",
        sections_amalgamation.digits,
    ),
    "amalgamation_short_minmax": (
        "Optimizer amalgamation: other learned optimizers, trained alike",
        sections_amalgamation.students,
    ),
    "amalgamation_evaluate": (
        "Optimizer amalgamation: problems and optimizers",
        sections_optimizers.evaluations,
    ),
    "amalgamation_transfer": (
        "Optimizer amalgamation: an MLP on MNIST",
        sections_optimizers.evaluations,
    ),
    "amalgamation_transfer_train": (
        "Optimizer amalgamation: the paper's CNN on MNIST",
        sections_optimizers.evaluations,
    ),
    "amalgamation_stability": (
        "Optimizer amalgamation: replicates and perturbations",
        sections_optimizers.stability,
    ),
    "amalgamation_benchmark": (
        "Optimizer amalgamation: time and memory",
        sections_optimizers.benchmark,
    ),
    "amalgamation_peer": (
        "Optimizer amalgamation: beside learned_optimization",
        sections_optimizers.peer,
    ),
    **sections_autoloss.SECTIONS,
    **sections_harness.SECTIONS,
}


def compose(folder: Path) -> str:
    parts = [HEAD]
    for name, (title, write) in SECTIONS.items():
        path = folder / f"{name}.json"
        if not path.is_file():
            parts.append(f"## {title}\n\nNot run yet: no `results/{name}.json`.\n")
            continue
        record = json.loads(path.read_text())
        notes = "".join(f"\n{note}\n" for note in record.get("notes", []))
        parts.append(
            "\n".join([f"## {title}", "", _origin(record), notes, *write(record), ""])
        )
    reviews = _table(("asked for", "where it is"), sections_reviews.REQUESTS)
    title = "## Delta-STN: what its reviewers asked for"
    parts.append("\n".join([title, "", *reviews, ""]))
    return "\n".join(parts)


def _origin(record: dict) -> str:
    versions, device = record["versions"], record["device"]
    config = record["config"]
    seeds = f"{config['num_seeds']} seeds, " if "num_seeds" in config else ""
    return (
        f"`{record['command']}`: {seeds}jax {versions['jax']}, optax "
        f"{versions['optax']}, Python {versions['python']}, {device['count']} × "
        f"{device['kind']}, {record['wall_time']:.0f} s, {_tree(record['git_commit'])}."
    )


def _tree(commit: str | None) -> str:
    """The commit a record was made at, and whether files had been edited since."""
    if commit is None:
        return "commit not recorded"
    edited = " with edits" if commit.endswith("-dirty") else ""
    return f"commit {commit[:12]}{edited}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def _number(value: Any, form: str = ".4f") -> str:
    return "–" if value is None else format(value, form)


def _interval(values: Any, signed: bool = False) -> str:
    form = "+.4f" if signed else ".4f"
    values = np.asarray(values, float)
    if not np.all(np.isfinite(values)):
        return f"{np.sum(~np.isfinite(values))} of {len(values)} diverged"
    if len(values) < 2:
        return format(values[0], form)
    mean, low, high = mean_interval(values)
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def _inside(value: Any, band: tuple[float, float]) -> str:
    verdict = "inside" if band[0] <= value <= band[1] else "**outside**"
    return f"{verdict} {band[0]:g} to {band[1]:g}"


def _cell(losses: list[float], best: float) -> str:
    mean = np.mean(losses)
    return f"{mean:.3f}{'*' if mean <= 1.05 * best else ''}"


def _law(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join("yes" if held else "no" for held in value)
    return f"{value:.3g}"


def _means(rows: list[dict], name: str) -> dict[int, float]:
    losses: dict[int, list[float]] = {}
    for row in rows:
        if row["method"] == name:
            loss = np.inf if row["train_loss"] is None else row["train_loss"]
            losses.setdefault(row["setting"], []).append(loss)
    return {setting: float(np.mean(values)) for setting, values in losses.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Writes RESULTS.md.")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args(argv).check
    text, path = compose(ROOT / "results"), ROOT / "RESULTS.md"
    if check:
        sys.exit(0 if path.is_file() and path.read_text() == text else 1)
    path.write_text(text)


if __name__ == "__main__":
    main()
