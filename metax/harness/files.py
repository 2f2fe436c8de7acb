"""Writing files so that a reader never meets the half of one."""

import contextlib
import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

__all__ = ["dump_json", "make_folder", "named_parts", "replacing", "write_json"]


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as JSON in one act: the file is the old one or the new one.

    Args:
      path: the file.
      value: JSON values, numpy or jax arrays and scalars, dataclasses, NamedTuples (as
        objects) and paths; numbers that are not finite become null.
    """
    with replacing(path) as temporary:
        temporary.write_text(dump_json(value, indent=2) + "\n", encoding="utf-8")


def dump_json(value: Any, indent: int | None = None) -> str:
    """Writes out `value`, whatever a run may want to record, as JSON.

    Args:
      value: as in `write_json`.
      indent: spaces a level; None for a single line.

    Returns:
      The text, without a newline at its end.
    """
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def make_folder(directory: str | os.PathLike, argument: str) -> Path:
    """Makes a folder, and finds out whether it can be written.

    Args:
      directory: the folder, made with its parents if it is not there.
      argument: how the error names it, e.g. `"create_run(directory=...)"`.

    Returns:
      The folder.

    Raises:
      ValueError: the folder cannot be made or written.
    """
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"`{argument}` must be a folder that can be written; got "
            f"{str(folder)!r} ({error.strerror}). Choose another one (--out)."
        ) from error
    return folder


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Lends a temporary file beside `path` that takes its place when all went well.

    Args:
      path: the file to be written.

    Yields:
      The temporary file, of the same suffix; it is gone if the block raises.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def named_parts(value: Any) -> dict[Any, Any] | None:
    """Takes apart a dataclass, NamedTuple or mapping.

    Args:
      value: anything.

    Returns:
      The parts under their names; None where `value` is none of the three.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    names = getattr(value, "_fields", None)
    if isinstance(value, tuple) and names is not None:
        return dict(zip(names, value, strict=True))
    return dict(value) if isinstance(value, Mapping) else None


def _plain(value: Any) -> Any:
    """The JSON value of what a run may want to record."""
    named = named_parts(value)
    if named is not None:
        return {str(name): _plain(item) for name, item in named.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
