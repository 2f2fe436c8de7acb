"""What the table of problems and optimizers makes of the runs that were measured.

No script, and not to be run. A row is one run, a line of the table an optimizer.
"""

from typing import Any

import numpy as np

from experiments.optimizer_runs import Race
from metax.harness import (
    Interval,
    mean_interval,
    mixed_effects,
    optimization_stability,
)

QUANTITIES = ("train", "best_valid", "last_valid", "accuracy")
SHOWN = (*QUANTITIES, "optimization_stability")


def wobble(outcome: Race, per_epoch: int) -> np.ndarray:
    """Optimization stability of each run; NaN where it diverged. Over whole epochs."""
    curves = np.exp(outcome.curves)
    per_epoch = max(per_epoch, 1)
    num = curves.shape[-1] // per_epoch
    shape = (*curves.shape[:-1], num, per_epoch)
    epochs = curves[..., : num * per_epoch].reshape(shape).mean(-1)
    found = np.full(epochs.shape[:-1], np.nan)
    sound = (np.isfinite(epochs) & (epochs > 0)).all(-1)
    if num > 1 and sound.any():
        found[sound] = optimization_stability(epochs[sound])
    return found


def table(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """A line an optimizer: a rule at its best rate, the replicates of a folder as one.

    The oracle is marked. `replicates` says how often an optimizer was trained.
    """
    mine = [row for row in rows if row["problem"] == name]
    lines = []
    for optimizer in dict.fromkeys(method(row) for row in mine):
        own = [row for row in mine if method(row) == optimizer]
        by_rate: dict[float, list] = {}
        for row in own:
            by_rate.setdefault(row["setting"], []).append(row)
        setting, best = min(by_rate.items(), key=lambda pair: level(pair[1]))
        runs: dict[str, list] = {}
        for row in best:
            runs.setdefault(row["optimizer"], []).append(row)
        lines.append({
            "problem": name,
            "optimizer": optimizer,
            "kind": own[0]["kind"],
            "setting": setting,
            "replicates": len(runs),
            "finite": float(np.mean([row["finite"] for row in best])),
            **{
                q: spread([[row[q] for row in own] for own in runs.values()])
                for q in SHOWN
            },
        })  # fmt: skip
    rules = [line for line in lines if line["kind"] == "analytical"]
    oracle = min(rules, key=lambda line: _finite(line["best_valid"]), default=None)
    return [{**line, "oracle": line is oracle} for line in lines]


def method(row: dict[str, Any]) -> str:
    """What a row is one of: a rule, a trained file, or the folder of a replicate."""
    folder, _, name = row["optimizer"].rpartition("/")
    return folder if name.startswith("replicate_") else row["optimizer"]


def spread(runs: list[list[float]]) -> Any:
    """The mean of replicates by runs, and its interval, between replicates if any."""
    sound = np.isfinite(runs).all() and len(runs[0]) > 1
    if not sound:
        return float(np.mean(runs))
    if len(runs) == 1:
        return mean_interval(runs[0])
    mean, low, high, *_ = mixed_effects(runs)
    return Interval(mean, low, high)


def level(rows: list[dict[str, Any]]) -> float:
    """The mean best test loss; a run that never had one is worse than any."""
    return _finite(np.mean([row["best_valid"] for row in rows]))


def across(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Eq. 9 over the replicates of each folder, by problem."""
    runs: dict[str, Any] = {}
    for row in rows:
        if method(row) != row["optimizer"]:
            own = runs.setdefault(f"{row['problem']}: {method(row)}", {})
            own.setdefault(row["optimizer"], []).append(row["best_valid"])
    values = {name: list(x.values()) for name, x in runs.items()}
    return {
        name: mixed_effects(x)._asdict()
        for name, x in values.items()
        if len(x) > 1 and len(x[0]) > 1 and np.isfinite(x).all()
    }


def meta_interval(values: Any, level: float = 0.95) -> tuple[float, float]:
    """An interval of the meta-stability of Eq. 9, by Williams and Tukey.

        F = MSB / MSW,   sd(a)² in (R - 1) MSB (1 - F_q / F) / (n χ²_q)

    with F_q and χ²_q the quantiles at (1 ± level) / 2 of F(R - 1, R (n - 1)) and of
    χ²(R - 1); what is negative is 0. It covers somewhat more than `level`.

    Args:
      values: [R, n], replicates by evaluations.
      level: coverage.

    Returns:
      The ends, standard deviations.
    """
    from scipy.special import chdtri, fdtri

    found = mixed_effects(values)
    replicates, evaluations = np.shape(values)
    within = found.evaluation_stability**2
    between = evaluations * np.var(np.mean(values, 1), ddof=1)
    free, rest = replicates - 1, replicates * (evaluations - 1)
    ends = []
    for q in ((1 + level) / 2, (1 - level) / 2):
        excess = between - fdtri(free, rest, q) * within
        variance = free * excess / (evaluations * chdtri(free, 1 - q))
        ends.append(float(np.sqrt(max(variance, 0.0))))
    return ends[0], ends[1]


def _finite(value: Any) -> float:
    mean = np.ravel(value)[0]
    return float(mean) if np.isfinite(mean) else np.inf
