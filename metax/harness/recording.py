"""`train`, with everything a person wants to find afterwards.

The order within a chunk is what makes a kill harmless: the rows are on disk before the
checkpoint is. A run that goes on from the last complete checkpoint drops the rows
measured after it and writes them again. Both are written beside the next chunk, by one
thread, from a copy of the state: the state itself is donated.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metax.arguments import refuse
from metax.base import LoopLike, check_key
from metax.harness.checkpoint import begin_save, restore_checkpoint
from metax.harness.files import make_folder
from metax.harness.processes import is_first, wait_for_all
from metax.harness.records import (
    append_metrics,
    hash_config,
    read_config,
    trim_metrics,
)
from metax.harness.retention import latest_step, set_aside
from metax.harness.saving import Saver
from metax.harness.signals import stop_request
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
    keep: int | None = 3,
    fallback: bool = False,
) -> tuple[Any, Any]:
    """Trains, and after each chunk appends to `metrics.jsonl` and saves a checkpoint.

    A resumed run, given the same loop, data, key and chunk, ends in the same state and
    with the same `metrics.jsonl` as one that was never stopped, bit for bit.

    Rows and checkpoint are written while the next chunk runs, one chunk's at a time,
    and all of it when this returns or raises. It costs a copy of the state on the host.
    SIGTERM and Ctrl-C end the program after the chunk they came in, when everything is
    written, with exit codes 143 and 130; a second one ends it at once. With several
    processes all of them call it, on a folder that all see; the first writes.

    Args:
      directory: the folder of the run; made if it is not there. If it holds a
        `config.json` (`create_run`), its checkpoints are bound to that config.
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
      keep: how many checkpoints to leave, as in `save_checkpoint`.
      fallback: where the last checkpoint is damaged go on from the one before it, with
        a warning; the damaged one is renamed to `STEP.corrupt`.

    Returns:
      The last state, and the infos of the steps done in this call: after a resume not
      those of the steps before it.

    Raises:
      ValueError: as in `train`; the folder cannot be written, it holds a run and
        `resume` is false, its checkpoint is beyond `num_steps`, or a row has a `step`
        outside its chunk.
      CheckpointMismatchError: the checkpoint is of another state or another config.
      CheckpointCorruptError: the checkpoint is damaged, or with `fallback` all are.
      StorageError: the disk is full, or the folder can no longer be written. Make room
        and resume: the last good checkpoint is intact.
      NonFiniteError: as in `train`; it names the last checkpoint.
      SystemExit: after a signal, as above.
    """
    check_key(key, "record_run(key=...)")
    _check_keep(keep)
    run = make_folder(directory, "record_run(directory=...)")
    has_config = (run / "config.json").exists()
    config_hash = hash_config(read_config(run)) if has_config else None
    like = jax.eval_shape(loop.init, key)
    start, state = _find_start(run, like, num_steps, resume, fallback, config_hash)
    if start == num_steps:
        return state, _no_infos(loop, state, key, data)
    done = start

    def on_chunk(step: int, state: Any, infos: Any) -> None:
        nonlocal done
        new = list((rows or mean_rows)(step, state, infos))
        _check_rows(new, done, step)
        saver.wait()  # before the state is copied: one copy at a time
        save = begin_save(
            run / "checkpoints", step, state, keep=keep, config_hash=config_hash
        )
        saver.submit(lambda: (append_metrics(run, new), save()))
        done = step
        stop.exit_if_asked()

    with stop_request() as stop:
        try:
            with Saver() as saver:
                result = train(
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
            raise _naming_the_last(error, run / "checkpoints") from error
        stop.exit_if_asked()
    return result


def mean_rows(step: int, state: Any, infos: Any) -> list[dict[str, Any]]:
    """One row a chunk: the mean over its steps of each floating scalar of the infos.

    Args:
      step: the number of steps done.
      state: not looked at.
      infos: the infos of the chunk; leaves that are no scalars, or no floating-point
        numbers, are left out.

    Returns:
      A list of one dict, of `step` and the means by their names in the infos; of
      replicates, whose infos are [steps, replicates], `step` alone.

    Raises:
      ValueError: the infos hold nothing at all.
    """
    row: dict[str, Any] = {"step": step}
    leaves = jax.tree_util.tree_leaves_with_path(infos)
    if not leaves:
        refuse("mean_rows", "infos", "must have a leaf", infos)
    for path, leaf in leaves:
        if leaf.ndim == 1 and jnp.issubdtype(leaf.dtype, jnp.floating):
            name = jax.tree_util.keystr(path, simple=True, separator=".") or "info"
            row[name] = float(leaf.astype(np.float64).mean())
    return [row]


def _find_start(
    run: Path,
    like: Any,
    num_steps: int,
    resume: bool,
    fallback: bool,
    config_hash: str | None,
) -> tuple[int, Any]:
    """The steps done and the state after them; the files are made to agree with it."""
    checkpoints = run / "checkpoints"
    step = latest_step(checkpoints) or 0
    has_run = (run / "metrics.jsonl").exists() or any(checkpoints.glob("*"))
    if has_run and not resume:
        raise ValueError(
            f"`record_run(directory={str(run)!r})` must hold no earlier run; it holds "
            f"{step} steps. Pass resume=True (--resume), or choose another folder."
        )
    if step > num_steps:
        raise ValueError(
            f"`record_run(num_steps=...)` must be at least the {step} steps that "
            f"{str(run)!r} has done; got num_steps={num_steps}."
        )
    try:
        start, state = restore_checkpoint(
            checkpoints, like, fallback=fallback, config_hash=config_hash
        )
    except FileNotFoundError:
        start, state = 0, None
    # no process may change the folder while another one still looks at it
    wait_for_all("metax: start of a run")
    if is_first():
        set_aside(checkpoints, start)
        trim_metrics(run, start)
    return start, state


def _no_infos(loop: LoopLike, state: Any, key: jax.Array, data: Any) -> Any:
    """The infos of no steps."""
    _, info = jax.eval_shape(loop.step, state, key, data)
    return jax.tree.map(lambda leaf: np.zeros((0, *leaf.shape), leaf.dtype), info)


def _naming_the_last(error: NonFiniteError, checkpoints: Path) -> NonFiniteError:
    """The error with the last good checkpoint: all saves are done, the disk tells."""
    step = latest_step(checkpoints)
    last = None if step is None else checkpoints / str(step)
    return NonFiniteError(error.step, error.leaf, last, error.infos)


def _check_keep(keep: int | None) -> None:
    if keep is not None and keep < 1:
        raise ValueError(
            f"`record_run(keep=...)` must be at least 1, or None; got keep={keep}."
        )


def _check_rows(rows: list, done: int, step: int) -> None:
    """A row outside of its chunk would be lost, or doubled, by a resume."""
    for row in rows:
        if not done < row.get("step", done) <= step:
            raise ValueError(
                "`record_run(rows=...)` must return rows whose step, the number of "
                f"steps done, is in ({done}, {step}]; got {dict(row)}."
            )
