"""The sections of RESULTS.md on learned optimizers and what they are distilled from."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metax.harness import mean_interval

RESULTS = Path(__file__).parents[1] / "results"
# What min-max is compared with, where it was run.
OTHERS = {
    "meta only": "amalgamation_digits_none",
    "choice": "amalgamation_digits_choice",
}
# All students at the budget of `--preset short`, where they were run.
OURS = "RNNProp, "
STUDENTS = {
    f"{OURS}min-max": "amalgamation_short_minmax",
    f"{OURS}meta only": "amalgamation_short_none",
    "RNNProp of Lv et al.": "amalgamation_short_rnnprop_lv",
    "the same, and imitation": "amalgamation_short_stronger",
    "L2L": "amalgamation_short_l2l",
    "Scale": "amalgamation_short_scale",
}
# What a prototype reached by the same recipe on another machine, seeds 0 to 2: ln train
# and best ln test by 275 steps after the warm-up, last ln train of 2,000 clipped steps.
PROTOTYPE = {
    "minmax": ((-4.24, -3.05, -8.5), (-4.14, -3.00, -8.3), (-3.88, -3.06, -8.4)),
    "meta only": ((-5.38, -3.17, -9.2), (-4.24, -3.02, -8.5), (-4.56, -3.10, -8.3)),
}
# Analytical rules at their best rates there, the oracle first: ln train, best ln test.
RULES = (
    ("Adam .05, the oracle", -5.38, -3.45),
    ("RMSProp .02", -3.37, -3.38),
    ("SGD 1.0, the edge of the grid", -3.07, -2.88),
)
QUANTITIES = ("train", "best", "long")
GOALS = {
    "best ln test of each replicate": ("best", -2.95),
    "ln train of each replicate": ("train", -2.0),
    "last ln train of each replicate over the long horizon": ("long", -2.0),
    "CPU-s of training of each": ("training_cpu_seconds", 300),
    "CPU-s of selection of each": ("selection_cpu_seconds", 60),
}


def digits(record: dict, folder: Path = RESULTS) -> list[str]:
    """Each way of training with its replicates, their difference, and the goals."""
    files = {name: folder / f"{file}.json" for name, file in OTHERS.items()}
    others = [name for name, file in files.items() if file.is_file()]
    runs = {"minmax": record}
    runs |= {name: json.loads(files[name].read_text()) for name in others}
    measured = {name: _replicates(run) for name, run in runs.items()}
    return [
        *_legend(record["config"]),
        *(f"{name}: `{runs[name]['command']}`." for name in others),
        "",
        *_outcomes("teachers", measured),
        "",
        *_differences(measured),
        "",
        *_goals(measured),
        "",
        *_reference(measured),
    ]


def students(record: dict, folder: Path = RESULTS) -> list[str]:
    """Students of all kinds, trained for equally long and chosen in the same way."""
    files = {name: folder / f"{file}.json" for name, file in STUDENTS.items()}
    runs = {
        name: json.loads(file.read_text())
        for name, file in files.items()
        if file.is_file()
    }
    measured = {name: _replicates(run) for name, run in runs.items()}
    heads = ("student", "trainings", "ln train", "best ln test", "long: last ln train")
    means = [
        (name, len(rows), *(_interval_of([row[q] for row in rows]) for q in QUANTITIES))
        for name, rows in measured.items()
    ]
    missing = [name for name in STUDENTS if name not in runs]
    ours = {
        name.removeprefix(OURS): rows
        for name, rows in measured.items()
        if name.startswith(OURS)
    }
    single = [name for name, rows in measured.items() if len(rows) < 2]
    return [
        "A third of the budget of the section above, the same for all students: stages",
        "of 1, 2 and 5 truncations, validation, at most one repeat of a period, the",
        "gate and the selection. L2L and Scale without random scaling, as published;",
        "loss, second order and meta-optimizer are those of amalgamation, so these are",
        "the baselines of its paper and not those of their authors.",
        "",
        *_legend(record["config"]),
        *(f"{name}: `{run['command']}`." for name, run in runs.items()),
        "",
        *_outcomes("student", measured),
        "",
        "Means over trainings, with the interval between them:",
        "",
        *table(heads, means),
        "",
        *_differences(ours),
        "",
        *_goals(ours),
        "",
        f"Trained once, so not compared: {'; '.join(single) or 'none'}.",
        f"Not run: {'; '.join(missing) or 'none'}.",
    ]


def _legend(config: dict) -> list[str]:
    return [
        f"Means of {config['num_evaluations']} runs of {config['num_steps']} steps, "
        f"warm-up included; `long`: {config['gate_steps']} steps,",
        "gradients clipped to norm 1, the last 100 averaged. `refused`: by the gate,",
        "of the candidates that it saw. Truncations: repeats included.",
        "CPU-s: of the process, compilation included.",
    ]


def _outcomes(first: str, measured: dict[str, list[dict]]) -> list[str]:
    """A table of replicates; `first` is the title of what sets them apart."""
    heads = (
        first, "replicate", "ln train", "best ln test", "long: last ln train",
        "long: best ln test", "gate passed", "refused", "truncations", "repeats",
        "CPU-s training", "validation", "selection",
    )  # fmt: skip
    lines = [
        (
            name,
            row["replicate"],
            *(text(row[q]) for q in ("train", "best", "long", "long_best")),
            {True: "yes", False: "**no**", None: "–"}[row["gate_passed"]],
            _of(row.get("refused"), row.get("candidates")),
            row["truncations"],
            row["repeats"],
            *(text(row.get(f"{q}_cpu_seconds"), ".0f") for q in
              ("training", "validation", "selection")),
        )
        for name, rows in measured.items()
        for row in rows
    ]  # fmt: skip
    return table(heads, lines)


def _replicates(record: dict) -> list[dict[str, Any]]:
    """The row of each replicate, with the means of its runs."""
    found = []
    for i, row in enumerate(record["replicates"]):
        short, long = record["short"], record["long"]
        found.append({
            **row,
            "train": _mean(short["train"], i),
            "best": _mean(short["best_valid"], i),
            "long": _mean(long["train"], i),
            "long_best": _mean(long["best_valid"], i),
        })  # fmt: skip
    return found


def _mean(runs: list[list[float | None]], number: int) -> float:
    """Of the runs of one replicate; +∞ where one diverged."""
    values = [run[number] for run in runs]
    return float(np.mean([np.inf if v is None else v for v in values]))


def _differences(measured: dict[str, list[dict]]) -> list[str]:
    """Of each way less meta-only; replicates are not paired."""
    found = []
    for name, rows in measured.items():
        if name == "meta only" or "meta only" not in measured:
            continue
        for quantity, title in (("train", "ln train"), ("best", "best ln test")):
            a, b = ([row[quantity] for row in x] for x in (rows, measured["meta only"]))
            found.append(f"* {name} less meta only, {title}: {_welch(a, b)}.")
    return found and [
        "Differences of means with Welch's 95 % interval, replicates not being paired;",
        "below 0 where the teachers help:",
        "",
        *found,
    ]


def _welch(a: list[float], b: list[float]) -> str:
    """The difference of two means with the t interval of unequal variances."""
    from scipy.special import stdtrit

    diverged = sum(not np.isfinite(x) for x in (*a, *b))
    if diverged or min(len(a), len(b)) < 2:
        return f"no interval: {diverged} diverged, {len(a)} and {len(b)} replicates"
    parts = np.array([np.var(x, ddof=1) / len(x) for x in (a, b)])
    counts = np.array([len(a), len(b)]) - 1
    freedom = parts.sum() ** 2 / max((parts**2 / counts).sum(), 1e-300)
    half = stdtrit(max(freedom, 1.0), 0.975) * np.sqrt(parts.sum())
    mean = np.mean(a) - np.mean(b)
    low, high = mean - half, mean + half
    verdict = "no difference is shown" if low <= 0 <= high else "a difference"
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}], {verdict}"


def _goals(measured: dict[str, list[dict]]) -> list[str]:
    found = []
    for name, rows in measured.items():
        for title, (quantity, goal) in GOALS.items():
            worst = max(row[quantity] for row in rows)
            verdict = "reached" if worst <= goal else "**not reached**"
            found.append(
                f"* {name}, {title}: at most {text(worst)}, goal {goal:g}: {verdict}."
            )
    return found


def _reference(measured: dict[str, list[dict]]) -> list[str]:
    """Means beside those of the prototype and of analytical rules."""
    rows: list[tuple] = []
    for name, own in measured.items():
        means = [_interval_of([row[q] for row in own]) for q in QUANTITIES]
        rows.append((name, "here", *means))
        if name in PROTOTYPE:
            columns = zip(*PROTOTYPE[name], strict=True)
            rows.append((name, "prototype", *(_interval_of(x) for x in columns)))
    rows += [(n, "prototype", text(a), text(b), "–") for n, a, b in RULES]
    heads = ("", "", "ln train", "best ln test", "long: last ln train")
    return [
        "Means over replicates beside a prototype of this recipe on another machine,",
        "and analytical rules there, at the best of their rates by test loss:",
        "",
        *table(heads, rows),
    ]


def _interval_of(values: Iterable[float]) -> str:
    values = list(values)
    diverged = sum(not np.isfinite(x) for x in values)
    if diverged:
        return f"{diverged} of {len(values)} diverged"
    if len(values) < 2:
        return text(values[0])
    return interval(mean_interval(values)._asdict())


def interval(value: Any) -> str:
    """An `Interval` as JSON has it, a number, or nothing."""
    if isinstance(value, dict):
        low, high = value["low"], value["high"]
        return f"{value['estimate']:.3f} [{low:.3f}, {high:.3f}]"
    return text(value, ".3f")


def level(value: Any) -> float:
    value = value["estimate"] if isinstance(value, dict) else value
    return np.inf if value is None else value


def _of(part: Any, whole: Any) -> str:
    return "–" if part is None else f"{part} of {whole}"


def text(value: Any, form: str = ".2f") -> str:
    if value is None:
        return "–"
    return format(value, form) if np.isfinite(value) else "diverged"


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]
