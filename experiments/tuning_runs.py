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
    long_rows,
    plot_panels,
    read_metrics,
    train,
    write_summary,
)
from metax.stn import DeltaSTN, best_response, delta_stn, silent_hparams

NEVER = 2**30  # training steps


def fixed(problem: BilevelProblem, **options: Any) -> DeltaSTN:
    """Plain training where tuning starts: no response, a warm-up without end."""
    none = best_response(len(problem.hparams), structure="none")
    return delta_stn(problem, **{**options, "response": none, "warmup_steps": NEVER})


def run_missing(
    run: Path, config: Any, build: Callable[[Any, str, Any], Loop], data: Any
) -> None:
    """Runs each method from each seed that `metrics.jsonl` does not hold yet.

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
        clock = [time.perf_counter()]  # the first epoch has the compilation in it
        _, infos = train(
            build(config, method, data),
            data,
            jax.random.key(config.seed + seed),
            config.epochs,
            chunk=1,
            on_chunk=lambda *_, clock=clock: clock.append(time.perf_counter()),
            check_finite=False,
            progress=f"{method} {seed}",
        )
        last = {f"hparams.{n}": x[:, -1] for n, x in infos.steps.hparams.items()}
        measured = {**infos.metrics, "seconds": np.diff(clock), **last}
        constant = {"silent": ", ".join(silent_hparams(infos.steps))}
        axes = {"epoch": range(1, config.epochs + 1)}
        rows = long_rows(measured, axes, method=method, seed=seed, **constant)
        append_metrics(run, rows)


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
