"""What the large tuning experiments share: a run per method and seed, and its report.

No script, and not to be run. A config is a dataclass with the fields `methods`,
`num_seeds`, `seed` and `epochs`.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from metax import BilevelProblem, Loop
from metax.harness import (
    append_metrics,
    plot_panels,
    read_metrics,
    record_run,
    write_summary,
)
from metax.stn import DeltaSTN, best_response, delta_stn

NEVER = 2**30  # training steps
GREATEST = "greatest_hypergradient."  # of an epoch


def fixed(problem: BilevelProblem, **options: Any) -> DeltaSTN:
    """Plain training where tuning starts: no response, a warm-up without end."""
    none = best_response(len(problem.hparams), structure="none")
    return delta_stn(problem, **{**options, "response": none, "warmup_steps": NEVER})


def run_missing(
    run: Path, config: Any, build: Callable[[Any, str, Any], Loop], data: Any
) -> None:
    """Runs each method from each seed that `metrics.jsonl` does not hold yet.

    One that was broken off goes on from the last epoch it has saved.

    Args:
      run: the folder of the run.
      config: the config; seed s of a run is that of all methods.
      build: `build(config, method, data) -> Loop` of epochs, whose infos are
        `EpochInfo` with the infos of the tuner as `steps`.
      data: handed to every step.
    """
    done = {(row["method"], row["seed"]) for row in read_metrics(run)}
    for method, seed in itertools.product(config.methods, range(config.num_seeds)):
        if (method, seed) in done:
            continue
        part = run / "parts" / f"{method}_{seed}"
        record_run(
            part,
            build(config, method, data),
            data,
            jax.random.key(config.seed + seed),
            config.epochs,
            chunk=1,
            rows=epoch_rows(),
            resume=True,
            check_finite=False,
            progress=f"{method} {seed}",
            keep=1,
        )
        rows = whole_rows(read_metrics(part))
        append_metrics(run, [{"method": method, "seed": seed, **row} for row in rows])


def epoch_rows() -> Callable[[int, Any, Any], list[dict[str, Any]]]:
    """For `record_run`: a row an epoch, with its seconds.

    And of each hyperparameter the greatest hypergradient, NaN where there was none.
    """
    clock = [time.perf_counter()]  # the first epoch has the compilation in it

    def rows(epoch: int, state: Any, infos: Any) -> list[dict[str, Any]]:
        clock.append(time.perf_counter())
        steps, metrics = infos.steps, infos.metrics.items()
        greatest = lambda x: np.fmax.reduce(np.abs(x), axis=None)
        return [{
            "step": epoch,
            **{name: x[0] for name, x in metrics},
            "seconds": clock[-1] - clock[-2],
            **{f"hparams.{n}": x[0, -1] for n, x in steps.hparams.items()},
            **{GREATEST + n: greatest(x) for n, x in steps.hypergradient.items()},
        }]  # fmt: skip

    return rows


def whole_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a finished run; "silent" are hyperparameters that nothing moved."""
    names = [name for name in rows[0] if name.startswith(GREATEST)]
    greatest = {n: np.fmax.reduce([row.pop(n) for row in rows]) for n in names}
    silent = sorted(n.removeprefix(GREATEST) for n in names if greatest[n] == 0)
    return [
        {"silent": ", ".join(silent), "epoch": row.pop("step"), **row} for row in rows
    ]


def report(run: Path, config: Any, judged: Sequence[str], seconds: float) -> None:
    """Prints last and best epochs; writes the summary and the figure of schedules.

    Args:
      run: the folder of the run.
      config: the config.
      judged: columns to print and to draw; the best epoch has the least of the first.
      seconds: the run took.
    """
    rows = read_metrics(run)
    panels: dict[str, dict[str, np.ndarray]] = {}
    for method in config.methods:
        mine = [row for row in rows if row["method"] == method]
        schedules = [name for name in mine[0] if name.startswith("hparams.")]
        for name in (*judged, *schedules):
            values = np.reshape([row[name] for row in mine], (-1, config.epochs))
            panels.setdefault(name.removeprefix("hparams."), {})[method] = values
        for seed in range(config.num_seeds):
            run_rows = [row for row in mine if row["seed"] == seed]
            best = min(run_rows, key=lambda row: np.nan_to_num(row[judged[0]], nan=9e9))
            for row in (run_rows[-1], best):
                shown = "  ".join(f"{name} {row[name]:.4g}" for name in judged)
                print(f"{method:12} seed {seed}, epoch {row['epoch']:3}:  {shown}")
            print(f"{method:12} seed {seed}, silent: {best['silent'] or 'none'}")
    write_summary(run, {"config": config, "rows": rows}, wall_time=seconds)
    plot_panels(run / "figure.png", panels, xlabel="epoch", ylabel="", num_columns=6)
