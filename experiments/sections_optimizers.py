"""The sections of RESULTS.md that judge learned optimizers: quality, scatter, cost."""

from typing import Any

import numpy as np

from experiments.sections_amalgamation import interval, level, table, text

# The problems of the paper, and the steps of a run there.
PAPER_PROBLEMS = (
    "Train", "MLP", "Wider", "Deeper", "FMNIST", "SVHN", "CIFAR", "ResNet",
    "SmallBatch", "MNIST-DP", "ResNet-52",
)  # fmt: skip
PAPER_STEPS = 11_700
# Meta-stability by input noise in Table 6 of the paper: choice, small pool, MNIST CNN.
# The levels are inferred: its columns do not say them.
TABLE_6 = {"input noise 0": 0.104, "input noise 0.01": 0.485, "input noise 0.1": 1.637}
BENCHMARK_GOALS = (
    ("compile", "s of compilation, at most", 20.0),
    ("second", "second over first order, at most", 1.4),
    ("shipped", "less CPU than the peer as shipped, at least", 8.0),
    ("equal", "less CPU than the peer with the same convolution, at least", 1.2),
)


def evaluations(record: dict) -> list[str]:
    """Problems × optimizers, the oracle marked, and what each learned one loses."""
    config, lines = record["config"], record["table"]
    heads = (
        "problem", "scale", "optimizer", "rate", "trainings", "ln train",
        "best ln test", "last ln test", "best accuracy", "optimization stability",
        "finite",
    )  # fmt: skip
    rows = [
        (
            line["problem"],
            _scale(line["problem"], config),
            f"`{line['optimizer']}`{' **(oracle)**' if line['oracle'] else ''}",
            f"{line['setting']:g}" if line["kind"] == "analytical" else "none",
            line.get("replicates", 1) if line["kind"] == "learned" else "–",
            *(interval(line[q]) for q in ("train", "best_valid", "last_valid")),
            interval(line["accuracy"]),
            interval(line["optimization_stability"]),
            f"{line['finite']:.0%}",
        )
        for line in sorted(
            lines,
            key=lambda x: (config["problems"].index(x["problem"]),
                           level(x["best_valid"])),
        )
    ]  # fmt: skip
    left = [name for name in PAPER_PROBLEMS if name not in config["problems"]]
    return [
        f"{config['num_evaluations']} runs of {config['num_steps']} steps, warm-up "
        f"included; ln train: of the last {config['steps_per_epoch']} steps. A rule",
        "stands at its best rate of the grid. The oracle is that of all rules with the",
        "least mean best ln test, chosen by what it is judged by: a bound, not a",
        "competitor. Intervals are those between trainings where there are several,",
        "else between runs of one. Scale: `digits` is a small network on small images",
        "in place of the problem of its name; `CPU` the problem itself, over fewer",
        f"steps than the {PAPER_STEPS:,} of the paper. What is called -small comes",
        "with the package and was trained for longer than the other learned",
        "optimizers, which are those of the section above.",
        "",
        *table(heads, rows),
        "",
        *_verdicts(config["problems"], lines),
        "",
        f"Problems of the paper not run at their size: {', '.join(left) or 'none'}.",
    ]


def _scale(problem: str, config: dict) -> str:
    if problem not in PAPER_PROBLEMS:
        return "digits"
    return "CPU" if config["num_steps"] < PAPER_STEPS else "paper"


def stability(record: dict) -> list[str]:
    """Replicates by what perturbs their training, beside the paper's figures."""
    rows = []
    for name, cell in record["rows"].items():
        found = cell.get("statistics", {})
        cells = [_spread(found.get(q)) for q in ("best_valid", "train")]
        wobble = found.get("optimization_stability")
        wobble = "–" if wobble is None else _ends(wobble)
        paper = TABLE_6.get(name if name != "gaussian 0" else "input noise 0")
        finite = f"{cell['finite']} of {cell['replicates']}"
        rows.append((name, finite, *cells[0], *cells[1], wobble, text(paper, ".3f")))
    heads = (
        "perturbation", "finite", "best ln test", "meta", "evaluation", "ln train",
        "meta", "evaluation", "optimization stability", "paper: meta",
    )  # fmt: skip
    config = record["config"]
    plan = zip(config["trajectories"], config["depths"], strict=True)
    truncations = sum(num * depth for num, depth in plan)
    return [
        f"{config['num_replicates']} replicates of {config['num_evaluations']} runs of "
        f"{config['num_steps']} steps on {config['optimizee']}. Each was trained for",
        f"{truncations} truncations, without selection, which is little: the published",
        "schedule has 1,080 at least, and takes the best-validated period.",
        "`meta` and `evaluation`: standard deviations between replicates and between",
        "runs of one (Eq. 9), among the replicates of which every run was finite; in",
        "brackets 95 % by Williams and Tukey, where there is one.",
        "Optimization stability: Eq. 10. `paper`: Table 6, choice on the small pool,",
        "six replicates on an MNIST CNN; it does not say its levels of input noise.",
        "",
        *table(heads, rows),
        "",
        _apart(record["rows"]),
    ]


def _apart(cells: dict[str, dict]) -> str:
    """Which rows have meta-stabilities whose intervals do not overlap."""
    found = {n: c.get("statistics", {}).get("best_valid", {}) for n, c in cells.items()}
    ends = {n: x["meta_interval"] for n, x in found.items() if "meta_interval" in x}
    pairs = [
        f"{low} below {high}"
        for low, (_, top) in ends.items()
        for high, (bottom, _) in ends.items()
        if top < bottom
    ]
    apart = "; ".join(pairs) or "no two rows are told apart"
    return f"Meta-stability of best ln test, by its intervals: {apart}."


def benchmark(record: dict) -> list[str]:
    """Truncations with the goals reached or not, peers, and the exported rule."""
    rows = record["rows"]
    cases = [
        (
            row["case"],
            row["K"],
            *(text(row[q], form) for q, form in
              (("cpu", ".3f"), ("ms", ".0f"), ("MB", ".0f"), ("s", ".1f"))),
        )
        for row in rows
    ]  # fmt: skip
    heads = ("truncation", "K", "CPU-s a step", "ms a step", "MB", "s to compile")
    rules = [
        (
            row["rule"],
            f"{row['parameters']:,}",
            f"{row['ms']:.2f}",
            f"{row['bytes']:.0f}",
        )
        for row in record["rules"]
    ]
    return [
        "The CNN of the paper, 18,122 parameters, batch 128; least CPU seconds of the",
        "process, and least wall time, of an inner step in a truncation of K steps.",
        "MB: temporaries by XLA's plan.",
        "",
        *table(heads, cases),
        "",
        *_benchmark_goals(record),
        "",
        "The exported rule, one update:",
        "",
        *table(("rule", "parameters", "ms", "bytes of state each"), rules),
    ]


def peer(record: dict) -> list[str]:
    """A truncated gradient here and by google/learned_optimization, in one process."""
    heads = ("truncated gradient", "CPU-s a step", "ms a step", "MB", "s to compile",
             "CPU, over ours")  # fmt: skip
    rows = {row["case"]: row for row in record["rows"]}
    forms = (("cpu", ".3f"), ("ms", ".0f"), ("MB", ".0f"), ("s", ".1f"))
    cells = [
        (name, *(text(row[q], form) for q, form in forms), text(row["ratio"], ".2f"))
        for name, row in rows.items()
    ]
    (_, as_shipped, goal), (_, same, goal_same) = BENCHMARK_GOALS[2:]
    return [
        "The CNN of the paper, batch 128, K = 20, second order, no teachers; in turn,",
        "round after round. As shipped: its RNN-MLP on Haiku's convolutions. RNNProp:",
        "that of metax as one of its learned optimizers, with those, and with the",
        "optimizee of metax and so the same convolutions.",
        "",
        *table(heads, cells),
        "",
        _reached(as_shipped, rows["as shipped"]["ratio"], "shipped", goal),
        _reached(same, rows["RNNProp, optimizee"]["ratio"], "equal", goal_same),
    ]


def _verdicts(problems: list[str], lines: list[dict]) -> list[str]:
    """How far each learned optimizer is from the oracle, and which rules it beats."""
    cells: dict[str, dict[str, str]] = {}
    for line in lines:
        if line["kind"] != "learned":
            continue
        rules = [
            other
            for other in lines
            if other["problem"] == line["problem"] and other["kind"] == "analytical"
        ]
        own = level(line["best_valid"])
        wins = [x["optimizer"] for x in rules if own < level(x["best_valid"])]
        oracle = [x for x in rules if x["oracle"]]
        gap = own - level(oracle[0]["best_valid"]) if oracle else np.nan
        beaten = f" ({', '.join(wins)})" if wins else ""
        shown = f"{gap:+.2f}{beaten}" if np.isfinite(gap) else "–"
        cells.setdefault(line["optimizer"], {})[line["problem"]] = shown
    rows = [
        (f"`{name}`", *(own.get(problem, "–") for problem in problems))
        for name, own in cells.items()
    ]
    if not rows:
        return []
    return [
        "Mean best ln test less the oracle's, and in brackets the rules that a learned",
        "optimizer beats at their best rates; by the means alone, of few runs:",
        "",
        *table(("", *problems), rows),
    ]


def _benchmark_goals(record: dict) -> list[str]:
    rows = {row["case"]: row for row in record["rows"]}
    found = [
        _reached(f"{name}, {quantity}, at most", row[quantity], quantity, goal)
        for name, row in rows.items()
        if row["goal"] is not None
        for quantity, goal in [row["goal"]]
    ]
    cpu = {name: row["cpu"] for name, row in rows.items()}
    peer = list(record["peer"].values())
    values = {
        "compile": max(row["s"] for row in rows.values()),
        "second": _ratio(cpu, "no teachers", "no teachers, first order"),
        "shipped": peer[0] / cpu["no teachers"],
        "equal": peer[1] / cpu["no teachers"],
    }
    for name, title, goal in BENCHMARK_GOALS:
        if values[name] is not None:
            found.append(_reached(title, values[name], name, goal))
    return [
        *found,
        "",
        "The peer is google/learned_optimization's own truncated step over the same",
        f"problem at K = 20: {peer[0]} CPU-s a step as shipped, {peer[1]} with this",
        "convolution, measured on another machine of 2 cores.",
    ]


def _reached(title: str, value: float, quantity: str, goal: float) -> str:
    above = quantity in ("shipped", "equal")
    held = value >= goal if above else value <= goal
    verdict = "reached" if held else "**not reached**"
    return f"* {title} {goal:g}: {value:.3g}, {verdict}."


def _ratio(values: dict[str, Any], above: str, below: str) -> float | None:
    return values[above] / values[below] if below in values else None


def _spread(found: dict | None) -> tuple[str, str, str]:
    if found is None:
        return "–", "–", "–"
    meta, evaluation = found["meta_stability"], found["evaluation_stability"]
    low, high = found.get("meta_interval", (None, None))
    bracket = "" if low is None else f" [{low:.3f}, {high:.3f}]"
    return _ends(found), f"{meta:.3f}{bracket}", f"{evaluation:.3f}"


def _ends(found: dict) -> str:
    return f"{found['mean']:.2f} [{found['ci_low']:.2f}, {found['ci_high']:.2f}]"
