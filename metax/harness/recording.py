"""`train`, with everything a person wants to find afterwards.

The order within a chunk is what makes a kill harmless: the rows are on disk before the
checkpoint is. A run that goes on from the last complete checkpoint drops the rows
measured after it and writes them again.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metax.base import LoopLike, check_key
from metax.harness.checkpoint import latest_step, restore_checkpoint, save_checkpoint
from metax.harness.files import make_folder
from metax.harness.records import append_metrics, trim_metrics
from metax.harness.training import NonFiniteError, train

__all__ = ["mean_rows", "record_run"]

Rows = Iterable[Mapping[str, Any]]


def record_run(
    directory: str | os.PathLike,
    loop: LoopLike,
    data: Any,
    key: jax.Array,
    num_steps: int,
    *,
    chunk: int | None = None,
    rows: Callable[[int, Any, Any], Rows] | None = None,
    resume: bool = False,
    check_finite: bool = True,
    progress: str | None = None,
) -> tuple[Any, Any]:
    """Trains, and after each chunk appends to `metrics.jsonl` and saves a checkpoint.

    A resumed run, given the same loop, data, key and chunk, ends in the same state and
    with the same `metrics.jsonl` as one that was never stopped, bit for bit.

    Args:
      directory: the folder of the run; made if it is not there.
      loop: what to run.
      data: handed to every step.
      key: one typed key for the whole run.
      num_steps: where to stop, counted from step 0; at least 1.
      chunk: as in `train`; also the steps between two checkpoints.
      rows: `rows(step, state, infos) -> list of dicts`, what to record of a chunk: each
        has `step`, the number of steps done when it was measured, so that of the first
        step of a run is 1. By default `mean_rows`.
      resume: go on from the last complete checkpoint; from the start if there is none.
      check_finite: as in `train`.
      progress: as in `train`.

    Returns:
      The last state, and the infos of the steps done in this call: after a resume not
      those of the steps before it.

    Raises:
      ValueError: as in `train`; the folder cannot be written, it holds a run and
        `resume` is false, its checkpoint is beyond `num_steps` or of another state, or
        a row has a `step` outside its chunk.
      NonFiniteError: as in `train`; it names the last checkpoint.
    """
    check_key(key, "record_run(key=...)")
    run = make_folder(directory, "record_run(directory=...)")
    checkpoints = run / "checkpoints"
    start, state = _find_start(run, loop, key, num_steps, resume)
    trim_metrics(run, start)
    if start == num_steps:
        _, info = jax.eval_shape(loop.step, state, key, data)
        none = jax.tree.map(lambda leaf: np.zeros((0, *leaf.shape), leaf.dtype), info)
        return state, none

    def on_chunk(step: int, state: Any, infos: Any) -> Path:
        done = latest_step(checkpoints) or 0
        new = list((rows or mean_rows)(step, state, infos))
        _check_rows(new, done, step)
        append_metrics(run, new)
        return save_checkpoint(checkpoints, step, state)

    try:
        return train(
            loop,
            data,
            key,
            num_steps,
            chunk=chunk,
            state=state,
            start=start,
            on_chunk=on_chunk,
            check_finite=check_finite,
            progress=progress,
        )
    except NonFiniteError as error:
        if error.checkpoint is not None or start == 0:
            raise
        # nothing was saved since the resume, but what it began with is still good
        raise NonFiniteError(
            error.step, error.leaf, checkpoints / str(start)
        ) from error


def mean_rows(step: int, state: Any, infos: Any) -> list[dict[str, Any]]:
    """One row a chunk: the mean over its steps of each floating scalar of the infos.

    Args:
      step: the number of steps done.
      state: not looked at.
      infos: the infos of the chunk; leaves that are no scalars, or no floating-point
        numbers, are left out.

    Returns:
      A list of one dict, of `step` and the means by their names in the infos.
    """
    row: dict[str, Any] = {"step": step}
    for path, leaf in jax.tree_util.tree_leaves_with_path(infos):
        if leaf.ndim == 1 and jnp.issubdtype(leaf.dtype, jnp.floating):
            name = jax.tree_util.keystr(path, simple=True, separator=".") or "info"
            row[name] = float(leaf.astype(np.float64).mean())
    return [row]


def _find_start(
    run: Path, loop: LoopLike, key: jax.Array, num_steps: int, resume: bool
) -> tuple[int, Any]:
    step = latest_step(run / "checkpoints")
    if not resume and (step is not None or (run / "metrics.jsonl").exists()):
        raise ValueError(
            f"`record_run(directory={str(run)!r})` must hold no earlier run; it holds "
            f"{step or 0} steps. Pass resume=True (--resume), or choose another folder."
        )
    if step is None:
        return 0, None
    if step > num_steps:
        raise ValueError(
            f"`record_run(num_steps=...)` must be at least the {step} steps that "
            f"{str(run)!r} has done; got num_steps={num_steps}."
        )
    return restore_checkpoint(run / "checkpoints", jax.eval_shape(loop.init, key), step)


def _check_rows(rows: list, done: int, step: int) -> None:
    """A row outside of its chunk would be lost, or doubled, by a resume."""
    for row in rows:
        if not done < row.get("step", done) <= step:
            raise ValueError(
                "`record_run(rows=...)` must return rows whose step, the number of "
                f"steps done, is in ({done}, {step}]; got {dict(row)}."
            )
