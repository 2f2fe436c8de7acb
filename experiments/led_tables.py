"""What the experiments on GANs and translation report of runs that were led.

No script, and not to be run. Cells and controllers are those of `led_runs`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.schedule_runs import paired
from metax.autoloss import SavedController
from metax.harness import mean_interval, plot_panels


def summarise(
    found: Mapping[str, Sequence[Any]], main: str, maximize: bool
) -> dict[str, Any]:
    """Each method over seeds: scores, intervals, shares and costs; and the pairs.

    Args:
      found: methods to cells, one a seed, the same seeds for all.
      main: the score that pairs compare.
      maximize: whether more of it is better.
    """
    rows = {}
    for name, runs in found.items():
        scores = {k: [_float(c["scores"][k]) for c in runs] for k in runs[0]["scores"]}
        rows[name] = {
            "scores": scores,
            "intervals": {k: _interval(values) for k, values in scores.items()},
            "last": {k: [_float(c["last"][k]) for c in runs] for k in scores},
            "shares": np.mean([c["shares"] for c in runs], axis=0),
            "steps": np.mean([c["steps"] for c in runs], axis=0),
            "seconds": float(np.mean([c["seconds"] for c in runs])),
            "finite": [sum(bool(c["is_finite"]) for c in runs), len(runs)],
        }
    pairs = {}
    for name in rows:
        if "AutoLoss" not in rows or name == "AutoLoss":
            continue
        a, b = (np.array(rows[n]["scores"][main]) for n in ("AutoLoss", name))
        if np.isfinite(a).all() and np.isfinite(b).all():
            wins = int(np.sum(a > b if maximize else a < b))
            pairs[f"AutoLoss − {name}"] = {**paired(a, b), "wins": wins}
    return {"rows": rows, "pairs": pairs}


def controllers_row(saved: Sequence[SavedController]) -> dict[str, Any]:
    """What the controllers of one kind cost, and how they fared while they learned."""
    cards = [one.metadata for one in saved]
    return {
        "steps": float(np.mean([card["steps"] for card in cards])),
        "seconds": float(np.mean([card["seconds"] for card in cards])),
        "restarts": sum(card["restarts"] for card in cards),
        "curves": [card["curve"] for card in cards],
        "shares": [card["shares"] for card in cards],
    }


def draw(path: Path, scenes: Mapping[str, Mapping[str, Any]], ylabel: str) -> None:
    """The metric of each method against optimizer steps, a panel for each scene."""
    panels = {}
    for title, found in scenes.items():
        curves = {}
        for name, runs in found.items():
            length = min(len(c["curve"]) for c in runs)
            values = np.array([c["curve"][:length] for c in runs], float)
            updates = np.mean([c["updates"][:length] for c in runs], axis=0)
            curves[name] = (updates, values)
        panels[title] = curves
    plot_panels(path, panels, xlabel="optimizer steps", ylabel=ylabel)


def show(rows: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> None:
    """Prints scores, and the actions' shares in the first and the last fifth."""
    print("shares of", ", ".join(names))
    for method, row in rows.items():
        scores = "  ".join(
            f"{k} {np.mean(values):.3f}" for k, values in row["scores"].items()
        )
        shares = [" ".join(f"{x:.2f}" for x in row["shares"][i]) for i in (0, -1)]
        print(f"{method:14} {scores}  shares {shares[0]} -> {shares[1]}")


def _float(value: float | None) -> float:
    return np.nan if value is None else float(value)


def _interval(values: Sequence[float]) -> list[float] | None:
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    return list(mean_interval(values))
