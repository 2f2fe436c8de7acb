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
        f"Seconds: of a run on a busy machine, runs {_how(config)}.",
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
        "cost as much together as one run of Delta-STN; `full`: each has its steps;",
        "`rate`: so too, the learning rate being searched as well. `decay`: the weight",
        "decay alone, no dropout. Seconds: of all trials, on a busy machine, runs",
        f"{_how(record['config'])}.",
        "",
        *_table(("method", "trials × steps", "gradients", "s", *found), rows),
        "",
        *_after_trials(record["methods"]),
        *_differences(record),
    ]


def starts(record: dict) -> list[str]:
    """Where tuned dropout ends from each start, and what it is worth beside fixed."""
    config, ours = record["config"], record["methods"]["delta_stn"]
    judged = ("valid_loss", "test_loss", "test_accuracy")
    names = [n for n in ours if "dropout" in n]
    rows = [
        (
            f"{start:g}",
            *(f"{np.mean(x):.3f} ± {np.std(x, ddof=1):.3f}" for x in
              (np.array(ours[n])[:, i] for n in names)),
            *(_interval(np.array(ours[q])[:, i]) for q in judged),
            *(_signed(record["differences"][q][i]) for q in judged),
        )
        for i, start in enumerate(config["starts"])
    ]  # fmt: skip
    heads = [*judged, *(f"{q} less fixed" for q in judged)]
    return [
        *_setting(config),
        "All dropout rates start at the same value. After the last step: the rates",
        "that Delta-STN came to, ± standard deviation over seeds, its losses and",
        "accuracy, and these less those of training with dropout kept at the start, by",
        "seed.",
        "",
        *_table(("start", *names, *(h.replace("_", " ") for h in heads)), rows),
        "",
        *_spread_of_starts(config, record["methods"]),
    ]


def _spread_of_starts(config: dict, methods: dict) -> list[str]:
    """How far apart the starts end, in rate and in loss, tuned and fixed."""
    lines = []
    for name, ends in methods.items():
        loss = np.mean(ends["valid_loss"], axis=0)
        best, worst = (config["starts"][f(loss)] for f in (np.argmin, np.argmax))
        lines.append(
            f"* `{name}`: last validation loss, mean over seeds, from {loss.min():.3f} "
            f"(start {best:g}) to {loss.max():.3f} (start {worst:g})."
        )
    return lines


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


def _how(config: dict) -> str:
    return "one after another" if config.get("by_step") else "side by side"


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
    title = "Delta-STN less the others, by seed:"
    return [title, "", *_table(heads, rows), *_standing(record)]


def _standing(record: dict) -> list[str]:
    """Whom Delta-STN beats, and who beats it, where 0 lies outside of the interval."""
    lines = []
    for when, by_method in record["differences"].items():
        for q in ("valid_loss", "test_loss"):
            found: dict[str, list[str]] = {
                "below": [],
                "above": [],
                "not told from": [],
            }
            for name, by_name in by_method.items():
                below, above = by_name[q]["high"] < 0, by_name[q]["low"] > 0
                where = "below" if below else "above" if above else "not told from"
                found[where].append(f"`{name}` {_signed(by_name[q])}")
            parts = [f"{where} {', '.join(x)}" for where, x in found.items() if x]
            lines.append(f"* {when} {q.replace('_', ' ')}: {'; '.join(parts)}.")
    return ["", "Delta-STN is, by these intervals,", "", *lines] if lines else []


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
    return [
        title,
        "coordinate, of `cutout_holes` of the count):",
        "",
        *_table(("method", *names), rows),
    ]


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
