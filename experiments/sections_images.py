"""The sections of RESULTS.md on tuned image classifiers and on searches beside them."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from metax.harness import mean_interval

# Validation loss of the authors' Delta-STN on corrupted digits: two seeds, and its s.e.
PEER, PEER_ERROR = (0.599, 0.725), 0.063
MARGIN = 0.2  # that tuning is to gain over dropout .05 there
TRIALS = (1, 5, 10, 20)
QUANTITIES = ("valid_loss", "valid_accuracy", "test_loss", "test_accuracy")
HEADS = tuple(q.replace("_", " ") for q in QUANTITIES)


def images(record: dict) -> list[str]:
    """Each method at its best rates; Delta-STN less the others; where rates ended."""
    config, methods = record["config"], record["methods"]
    rows = [
        (
            f"`{name}`",
            when,
            " / ".join(f"{x:g}" for x in outcome[when]["rates"] if x),
            *(_interval(outcome[when][q]) for q in QUANTITIES),
            f"{outcome['gradients']:.0f}",
            f"{outcome['seconds']:.1f}",
        )
        for name, outcome in methods.items()
        for when in ("final", "best")
    ]
    heads = ("method", "epoch", "rates", *HEADS, "gradients", "s")
    return [
        *_setting(config),
        "`final`: after the last step; `best`: at the least validation loss of the",
        "seed. Rates: of weights and of hyperparameters, chosen by validation for",
        "either row. Gradients: of the plain network, by floating point operations.",
        "Seconds: of a run on a busy machine, runs side by side.",
        "",
        *_table(heads, rows),
        "",
        *_differences(record),
        "",
        *_by_rates(methods),
        "",
        *_endings(record),
        *_verdicts(config, methods),
    ]


def baselines(record: dict) -> list[str]:
    """What each search found, and what it cost."""
    rows = [
        (
            f"`{name}`",
            f"{outcome['trials']} × {outcome['steps']}",
            f"{outcome['gradients']:.0f}",
            f"{outcome['seconds']:.1f}",
            *(_interval(outcome[when][q]) for when in ("final", "best") for q in
              ("valid_loss", "test_loss", "test_accuracy")),
        )
        for name, outcome in record["methods"].items()
    ]  # fmt: skip
    parts = ("valid loss", "test loss", "test accuracy")
    found = (f"{when}: {part}" for when in ("final", "best") for part in parts)
    return [
        *_setting(record["config"]),
        "`final`: the trial of least last validation loss; `best`: the trial and epoch",
        "of least validation loss, so early stopping is included. `equal`: all trials",
        "cost as much together as one run of Delta-STN; `full`: each has its steps.",
        "`decay`: the weight decay alone, no dropout. Seconds: of all trials, on a",
        "busy machine, runs side by side.",
        "",
        *_table(("method", "trials × steps", "gradients", "s", *found), rows),
        "",
        *_after_trials(record["methods"]),
        *_differences(record),
    ]


def _after_trials(methods: dict) -> list[str]:
    """The least validation loss after some trials, beside Delta-STN's."""
    rows = []
    for name, outcome in methods.items():
        best, trials = np.array(outcome["best_so_far"]), outcome["trials"]
        num = best.shape[1] // trials
        cells = [
            f"{best[:, k * num - 1].mean():.3f}" if k <= trials else "–" for k in TRIALS
        ]
        if trials > 1:
            rows.append((f"`{name}`", *cells))
    if not rows:
        return []
    heads = ("least validation loss after trials", *map(str, TRIALS))
    return [*_table(heads, rows), ""]


def _setting(config: dict) -> list[str]:
    widths = "-".join(map(str, config["widths"]))
    model = "SimpleCNN" if config.get("model") == "cnn" else f"MLP of {widths}"
    first = f", first {config['num_train']} images" if config.get("num_train") else ""
    share = f"{config['corrupted']:.0%}"
    steps = f"{config['num_steps']} steps of batches of {config['batch_size']}"
    return [
        f"{config['dataset']}{first}, {model}, {share} of the training labels",
        f"corrupted, those of validation clean; {steps},",
        f"of which {config['warmup_steps']} before tuning begins.",
        "",
    ]


def _differences(record: dict) -> list[str]:
    """Delta-STN less the others, seed by seed."""
    rows = [
        (f"`{name}`", when, *(_signed(by_name[q]) for q in QUANTITIES))
        for when, by_method in record["differences"].items()
        for name, by_name in by_method.items()
    ]
    if not rows:
        return ["No differences: one method, one seed, or nothing finite."]
    heads = ("less", "epoch", *HEADS)
    return ["Delta-STN less the others, by seed:", "", *_table(heads, rows)]


def _endings(record: dict) -> list[str]:
    """Natural values at the end, and their raw spread over seeds."""
    tuned = {n: x for n, x in record["methods"].items() if "raw_spread" in x}
    names = list(next(iter(tuned.values()))["raw_spread"]) if tuned else []
    rows = [
        (
            f"`{method}`",
            *(
                f"{x['curves'][n][-1]:.3f} ({x['raw_spread'][n]:.2f})"
                for n in names
            ),
        )
        for method, x in tuned.items()
    ]  # fmt: skip
    if not rows:
        return []
    title = "Hyperparameters at the end, mean over seeds (standard deviation of the raw"
    return [title, "coordinate):", "", *_table(("method", *names), rows)]


def _by_rates(methods: dict) -> list[str]:
    """Last validation loss at every pair of rates, mean over seeds."""
    rows = []
    for name, outcome in methods.items():
        cells = [
            f"{'/'.join(f'{rate:g}' for rate in rates if rate)}: {_number(loss)}"
            for *rates, loss in outcome["final"]["valid_loss_by_rates"]
        ]
        rows.append((f"`{name}`", ", ".join(cells)))
    return _table(("method", "rates: last validation loss, mean over seeds"), rows)


def _verdicts(config: dict, methods: dict) -> list[str]:
    """The goals that were set for digits with 40 % of the labels corrupted."""
    is_it = config["dataset"] == "digits" and config["corrupted"] == 0.4
    if not is_it or not {"delta_stn", "fixed_start"} <= methods.keys():
        return []
    loss = lambda name, rate=None: min(
        loss
        for inner, _, loss in methods[name]["final"]["valid_loss_by_rates"]
        if loss is not None and rate in (None, inner)
    )
    said = lambda held: "reached" if held else "**not reached**"
    lines, bound = ["", "Goals, in last validation loss:", ""], np.mean(PEER)
    rates = {f"at the rate {r:g}": r for r in config["inner_rates"]}
    for where, rate in {**rates, "each at its best rates": None}.items():
        gain = loss("fixed_start", rate) - loss("delta_stn", rate)
        lines.append(
            f"* {MARGIN} below dropout .05, {where}: {gain:+.3f} below, "
            f"{said(gain >= MARGIN)}."
        )
    held = said(loss("delta_stn") <= bound + PEER_ERROR)
    return [
        *lines,
        f"* At most {bound:.3f} + {PEER_ERROR:.3f}, of two seeds of the authors' code",
        f"  on a split of its own: {loss('delta_stn'):.3f}, {held}.",
    ]


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def _interval(values: Any) -> str:
    values = np.asarray(values, float)
    if not np.all(np.isfinite(values)):
        return f"{np.sum(~np.isfinite(values))} of {len(values)} diverged"
    if len(values) < 2:
        return f"{values[0]:.4f}"
    mean, low, high = mean_interval(values)
    return f"{mean:.4f} [{low:.4f}, {high:.4f}]"


def _number(value: Any) -> str:
    return "diverged" if value is None else f"{value:.3f}"


def _signed(interval: dict) -> str:
    low, high = interval["low"], interval["high"]
    return f"{interval['estimate']:+.4f} [{low:+.4f}, {high:+.4f}]"
