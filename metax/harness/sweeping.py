"""Many runs that share nothing: one call each, on whatever runs calls for you.

A cell is the small set of values that makes one run, its config. It has a folder named
by a hash of them, and the worker that runs it writes the result there, in one act: what
is done stays done, whoever is killed afterwards, and the next call runs the rest.
"""

import contextlib
import dataclasses
import json
import math
import traceback
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import BrokenExecutor, CancelledError, Executor
from pathlib import Path
from typing import Any

from metax.harness.files import make_folder, named_parts, write_json
from metax.harness.records import hash_config

__all__ = ["SweepError", "sweep"]

Fn = Callable[[Any], Any]


class SweepError(RuntimeError):
    """Some cells have no result; those that have one will not be run again.

    Attributes:
      folders: of the cells without a result.
      results: what `sweep` would have returned, None for those cells.
    """

    def __init__(self, folders: tuple[Path, ...], results: list[Any]):
        super().__init__(folders, results)
        self.folders = folders
        self.results = results

    def __str__(self) -> str:
        lines = [f"  {folder}: {_what_happened(folder)}" for folder in self.folders[:5]]
        more = len(self.folders) - len(lines)
        return "\n".join(
            [
                f"{len(self.folders)} of {len(self.results)} cells have no result; "
                "calling `sweep` again runs them alone.",
                *lines,
                *([f"  and {more} more"] if more else []),
            ]
        )


def sweep(
    cells: Iterable[Any],
    fn: Fn,
    executor: Executor | Callable[[], Executor] | None = None,
    *,
    directory: Any,
) -> list[Any]:
    """Calls `fn(cell)` for each cell that has no result yet.

    Each cell has a folder in `directory` named by its `hash_config`, with `cell.json`
    once it was begun, `result.json` when it is done, or `error.json` (type, message,
    traceback) where it failed. A failed cell holds up no other, and is run again by the
    next call. A result stands for its cell alone: whoever changes `fn` should take
    another directory.

    Where a worker dies, a pool of processes is lost with all that it ran. Given a
    function that makes pools, `sweep` goes on with a new one, and runs each cell that
    was under way by itself: the one that kills its worker is recorded, the others are
    done. A pool that was made by the caller is left broken, and the next call goes on.

    Args:
      cells: mappings or dataclasses of plain values: strings, booleans, None, numbers
        that are finite, and tuples of these. All different.
      fn: what to run. It returns what `write_json` takes, and for other processes is a
        function of a module, not a lambda.
      executor: has `submit(fn, *args)` that returns a future: a
        `concurrent.futures.Executor`, that of a Dask client, one of submitit; or a
        function without arguments that makes one; None for calls in this process.
      directory: a folder that this process and all workers see.

    Returns:
      The results in the order of the cells, as JSON gives them back: lists for tuples
      and arrays, None for numbers that are not finite.

    Raises:
      ValueError: a cell has other values, two are equal, a `result.json` cannot be
        read, or the folder cannot be written.
      SweepError: some cells have no result, after all others were run.

    Example:
      >>> import tempfile
      >>> from metax.harness import sweep
      >>> cells = [{"rate": 0.1, "seed": seed} for seed in range(3)]
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     sweep(cells, lambda cell: 10 * cell["seed"], directory=directory)
      [0, 10, 20]
    """
    root = make_folder(directory, "sweep(directory=...)")
    named = _named_cells(cells)
    folders = [root / name for name in named]
    todo = [
        (folder, cell)
        for folder, cell in zip(folders, named.values(), strict=True)
        if not (folder / "result.json").exists()
    ]
    for folder, _ in todo:
        for name in ("cell.json", "error.json"):
            (folder / name).unlink(missing_ok=True)
    if executor is None:
        for folder, cell in todo:
            _run_cell(fn, cell, folder)
    elif callable(executor):
        _run_in_pools(executor, fn, todo)
    else:
        _run_all(executor, fn, todo)
    results = [_read(folder) for folder in folders]
    failed = tuple(f for f in folders if not (f / "result.json").exists())
    if failed:
        raise SweepError(failed, results)
    return results


def _run_in_pools(
    make: Callable[[], Executor], fn: Fn, todo: list[tuple[Path, Any]]
) -> None:
    while todo:
        with make() as pool:
            lost = _run_all(pool, fn, todo)
        lost = [(folder, cell) for folder, cell in lost if not _is_over(folder)]
        begun = [pair for pair in lost if (pair[0] / "cell.json").exists()]
        for folder, cell in begun:
            with make() as pool:
                lost_again = _run_all(pool, fn, [(folder, cell)])
            if lost_again and not _is_over(folder):
                _write_error(folder, RuntimeError("this cell ends its worker"))
        if lost == todo and not begun:
            return  # such pools do not work at all
        todo = [pair for pair in lost if pair not in begun]


def _run_all(executor: Any, fn: Fn, todo: list[tuple[Path, Any]]) -> list[Any]:
    """Waits for all; returns the cells that went down with the executor."""
    lost, futures = [], []
    try:
        for folder, cell in todo:
            with contextlib.suppress(BrokenExecutor):  # the rest is found lost below
                futures.append(executor.submit(_run_cell, fn, cell, folder))
        for (folder, cell), future in zip(todo, futures, strict=False):
            try:
                future.result()
            except (BrokenExecutor, CancelledError):
                lost.append((folder, cell))
            except Exception as error:  # of the executor: `fn` has its own recorded
                if not _is_over(folder):
                    _write_error(folder, error)
    except BaseException:
        for future in futures:
            future.cancel()
        raise
    return lost + todo[len(futures) :]


def _run_cell(fn: Fn, cell: Any, folder: Path) -> None:
    """What a worker does."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "cell.json", cell)
    try:
        result = fn(cell)
        try:
            write_json(folder / "result.json", result)
        except (TypeError, ValueError) as error:
            raise TypeError(
                "`sweep(fn=...)` must return JSON values, or arrays; got "
                f"{type(result).__name__}: {error}"
            ) from error
    except Exception as error:
        _write_error(folder, error)


def _write_error(folder: Path, error: BaseException) -> None:
    folder.mkdir(exist_ok=True)
    text = "".join(traceback.format_exception(error))
    what = {"type": type(error).__name__, "message": str(error), "traceback": text}
    write_json(folder / "error.json", what)


def _is_over(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("result.json", "error.json"))


def _what_happened(folder: Path) -> str:
    try:
        error = json.loads((folder / "error.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        begun = (folder / "cell.json").exists()
        return "its worker ended" if begun else "not begun"
    return f"{error['type']}: {error['message']}"


def _read(folder: Path) -> Any:
    path = folder / "result.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"`sweep(directory=...)` must hold results that can be read; {path} "
            f"cannot: {error}. Remove it, and its cell is run again."
        ) from error


def _named_cells(cells: Iterable[Any]) -> dict[str, Any]:
    """The cells by the names of their folders."""
    named: dict[str, Any] = {}
    for cell in cells:
        parts = named_parts(cell) if _is_cell(cell) else None
        if parts is None or not all(map(_is_plain, parts.values())):
            raise ValueError(
                "`sweep(cells=...)` must be mappings or dataclasses of strings, "
                f"booleans, None, finite numbers and tuples of these; got {cell!r}."
            )
        name = hash_config(cell)[:16]
        if name in named:
            raise ValueError(
                f"`sweep(cells=...)` must all be different; got {cell!r} twice."
            )
        named[name] = cell
    return named


def _is_cell(cell: Any) -> bool:
    is_mapping = isinstance(cell, Mapping) and all(isinstance(k, str) for k in cell)
    return is_mapping or dataclasses.is_dataclass(cell)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | bool | int)
