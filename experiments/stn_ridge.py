"""Each change of Delta-STN by itself, on ridge regression with its closed form.

The decay e^λ of ridge regression on scikit-learn's diabetes set is tuned by STN,
Delta-STN and what lies between: five training steps on 16 draws of σ = .5, then one
step of RMSprop. Tables: where λ ends, from two starts at two inner rates; the learned
response against dw*/dλ; the rest point of σ; condition numbers; the largest stable
inner rate; update intervals; smaller outer rates; and hypergradients of the implicit
and the unrolled method. Full batches, as 11 rows of the same second moments. The runs
are in float32, λ and its response of order 1; closed forms are in float64.

    python -m experiments.stn_ridge                   2 minutes on 2 cores
    python -m experiments.stn_ridge --preset paper    3 minutes

Expect λ* = -1.06; the split objective to end within .02 of it and the joint one .06
beyond; STN to diverge from -6 at the inner rate .05; centring to allow a rate 37 times
larger at -6; and Delta-STN from -6 at .004 to go the wrong way first in some seeds.
"""

import dataclasses
import itertools
import time
from typing import Any

import jax
import numpy as np
import optax

from experiments import stn_ridge_tables as tables
from experiments.stn_ridge_loops import (
    PER_STEP,
    VARIANTS,
    cells,
    frozen,
    jacobians,
    rest_points,
    run,
    toy,
    tuned,
)
from metax.harness import create_run, parse, plot_panels, write_summary
from metax.harness.processes import all_on_host
from metax.tasks import RidgeData, diabetes_ridge


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 1200
    num_seeds: int = 2
    draws: int = 16
    sigma: float = 0.5
    calls: int = 50
    seed: int = 0


PRESETS = {"paper": Config(steps=4000, num_seeds=5, calls=200)}
ABLATION = tuple(VARIANTS)
ENDS, MEASURED = ("STN", "Delta-STN"), ("STN", "centred, joint", "Delta-STN")
STARTS, RATES, SIGMAS = (-6.0, 2.0), (0.004, 0.05), (1e-3, 0.05, 0.1, 0.5, 1.0)
WEIGHTS, INTERVALS, SHARES = (1e-4, 1e-3, 1e-2), (1, 2, 5, 10, 20), (1.0, 0.3, 0.1)
LAMBDAS = (-6.0, -3.0, -1.0, 2.0)
SHARES_OF_BOUND = np.arange(0.5, 1.25, 0.05)  # inner rates as shares of the bound
LEARNED, CORRECTIONS = ("centred, joint", "Delta-STN"), (False, True)
FROZEN_STEPS, ORACLE_LAMBDAS = 300, (-3.0, 0.0)


def largest_rates(config: Config, data: RidgeData, mesh: Any) -> list[dict]:
    """The bound of a quadratic, and between which rates the runs begin to diverge."""
    gram, rows = data.train.x.T @ data.train.x / len(data.train.y), []
    for variant in MEASURED:
        centered = VARIANTS[variant].get("centered", True)
        bounds = [tables.largest_rate(gram, x, config.sigma, centered) for x in LAMBDAS]
        settings = [
            {"start": lam, "rate": bound * share}
            for lam, bound in zip(LAMBDAS, bounds, strict=True)
            for share in SHARES_OF_BOUND
        ]
        build = lambda v=variant, **s: toy(config, v, **s, warmup_steps=10**9)
        _, infos = run(config, data, build, settings, FROZEN_STEPS, mesh)
        ends = infos.train_loss[:, -1].reshape(-1, len(LAMBDAS), len(SHARES_OF_BOUND))
        for at, (lam, bound) in enumerate(zip(LAMBDAS, bounds, strict=True)):
            row = {"variant": variant, "lambda": lam, "bound": bound}
            rows.append(row | tables.bracket(bound * SHARES_OF_BOUND, ends[:, at]))
    return rows


def hypergradients(
    config: Config, data: RidgeData, small: RidgeData, mesh: Any
) -> list[dict]:
    """Those of Delta-STN, with Φ as learned, beside the implicit and the unrolled."""
    settings, rows = cells(lam=ORACLE_LAMBDAS, sigma=(0.05, config.sigma)), []
    build = lambda **setting: frozen(config, "Delta-STN", **setting)
    states, _ = run(config, small, build, settings, config.steps, mesh)
    states = all_on_host(states)
    step = toy(config, "Delta-STN", 0.0).valid_step
    for lam in ORACLE_LAMBDAS:
        learned = {
            f"Delta-STN, σ = {s['sigma']:g}": jax.tree.map(
                lambda x, c=c: x[0, c], states
            )
            for c, s in enumerate(settings)
            if s["lam"] == lam
        }
        rows += tables.oracles(data, lam, step, learned, config.calls)
    return rows


def intervals(config: Config, data: RidgeData, mesh: Any) -> list[dict]:
    """Training steps a validation step, at the same number of training steps."""
    rows = []
    for variant, count in itertools.product(ENDS, INTERVALS):
        steps = PER_STEP * config.steps // count
        settings = cells(start=STARTS)
        how: dict[str, Any] = {"train_steps": count}
        found, _ = tuned(config, data, variant, settings, steps, mesh, **how)
        rows += [{"train_steps": count, "outer_steps": steps, **row} for row in found]
    return rows


def outer_rates(config: Config, data: RidgeData, mesh: Any) -> list[dict]:
    """α3 × 1, .3, .1, with RMSprop as published and with its bias corrected."""
    rows = []
    for variant, corrected in itertools.product(ENDS, CORRECTIONS):
        settings = cells(start=STARTS, outer=[0.02 * share for share in SHARES])
        how: dict[str, Any] = {"corrected": corrected}
        found, _ = tuned(config, data, variant, settings, config.steps, mesh, **how)
        rows += [{"corrected": corrected, **row} for row in found]
    return rows


def entropy_weights(config: Config, data: RidgeData, mesh: Any) -> list[dict]:
    """λ and σ tuned together, the same τ for both ends of the ablation."""
    rows, settings = [], cells(start=STARTS, entropy_weight=WEIGHTS)
    for variant in ENDS:
        how: dict[str, Any] = {"scale_optimizer": optax.adam(0.01)}
        found, _ = tuned(config, data, variant, settings, config.steps, mesh, **how)
        rows += found
    return rows


def main(argv: list[str] | None = None) -> None:
    config, options = parse(
        Config, presets=PRESETS, argv=argv, description=__doc__, several_devices=True
    )
    folder, begin = create_run(options.out, config), time.perf_counter()
    data, mesh = diabetes_ridge(), options.mesh
    small, settings = tables.moments(data), cells(start=STARTS, rate=RATES)
    ablation: list[dict] = []
    courses: dict[str, dict] = {
        f"from {s['start']:g}, inner rate {s['rate']:g}": {} for s in settings
    }
    for variant in ABLATION:
        rows, lam = tuned(config, small, variant, settings, config.steps, mesh)
        ablation += rows
        for at, curves in enumerate(courses.values()):
            curves[variant] = lam[:, :, at]
        show(rows)
    summary: dict[str, Any] = {"config": config, "ablation": ablation}
    summary["optimum"] = tables.closed_form("optimum", data)
    gram = data.train.x.T @ data.train.x / len(data.train.y)
    for name, table in {
        "jacobians": lambda: jacobians(config, small, LEARNED, SIGMAS, mesh),
        "rest_points": lambda: rest_points(config, small, WEIGHTS, mesh),
        "entropy_weights": lambda: entropy_weights(config, small, mesh),
        "condition_numbers": lambda: tables.condition_numbers(gram),
        "largest_rates": lambda: largest_rates(config, small, mesh),
        "intervals": lambda: intervals(config, small, mesh),
        "outer_rates": lambda: outer_rates(config, small, mesh),
        "hypergradients": lambda: hypergradients(config, data, small, mesh),
    }.items():
        summary[name] = table()
        print(f"{name}, {time.perf_counter() - begin:.0f} s")
    write_summary(folder, summary, wall_time=time.perf_counter() - begin)
    labels: dict[str, Any] = {"xlabel": "outer step", "ylabel": "λ"}
    plot_panels(folder / "figure.png", courses, num_columns=2, **labels)


def show(rows: list[dict]) -> None:
    """One line a start and inner rate."""
    for start, rate in itertools.product(STARTS, RATES):
        mine = [r for r in rows if (r["start"], r["rate"]) == (start, rate)]
        ends = [row["final"] for row in mine if not row["diverged"]]
        end = f"{np.mean(ends):.4f} ± {np.std(ends):.4f}" if ends else "none"
        print(f"{mine[0]['variant']:27} from {start:4} at {rate:5}: λ {end}, "
              f"{len(mine) - len(ends)} of {len(mine)} diverged")  # fmt: skip


if __name__ == "__main__":
    main()
