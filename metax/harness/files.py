"""Writing files so that a reader never meets the half of one.

Of several processes that run one program all call what writes, the first alone does,
and each goes on when the file is there to be read.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from metax.harness.processes import agree, is_first

__all__ = [
    "StorageError",
    "dump_json",
    "make_folder",
    "named_parts",
    "replacing",
    "storing",
    "sync_folder",
    "together",
    "write_json",
    "write_text",
]


class StorageError(OSError):
    """A file of a run could not be written: the disk is full, or the folder closed.

    What was complete before is as it was. `errno`, `strerror` and `filename` are those
    of every OSError; an errno of EIO stands for what a library did not tell.
    """

    def __str__(self) -> str:
        return (
            f"{self.filename} could not be written: {self.strerror}. What was complete "
            "before is untouched: make room or set the permissions right, then go on "
            "with resume=True (--resume); or choose another folder (--out)."
        )


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as JSON in one act: the file is the old one or the new one.

    With several processes all of them call it; the first writes, and when it returns
    all can read.

    Args:
      path: the file.
      value: JSON values, numpy or jax arrays and scalars, dataclasses, NamedTuples (as
        objects) and paths; numbers that are not finite become null.

    Raises:
      StorageError: the disk is full, or the folder cannot be written.
    """
    text = dump_json(value, indent=2) + "\n"
    with together(path):
        if is_first():
            write_text(path, text)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file in one act, whichever process this is.

    Args:
      path: the file.
      text: what it shall hold.

    Raises:
      StorageError: the disk is full, or the folder cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def dump_json(value: Any, indent: int | None = None, *, strict: bool = False) -> str:
    """Writes out `value`, whatever a run may want to record, as JSON.

    Args:
      value: as in `write_json`.
      indent: spaces a level; None for a single line.
      strict: refuse numbers that are not finite, instead of making them null.

    Returns:
      The text, without a newline at its end.

    Raises:
      TypeError: it holds something else.
      ValueError: it is `strict`, and met such a number.
    """
    return json.dumps(_plain(value, strict), indent=indent, allow_nan=False)


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
def storing(path: str | os.PathLike) -> Iterator[None]:
    """Turns the trouble of a disk into a `StorageError` that names the file.

    Args:
      path: what is written.

    Raises:
      StorageError: in the place of any other OSError of the block.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        number = error.errno or errno.EIO
        reason = error.strerror or str(error)
        raise StorageError(number, reason, os.fspath(path)) from error


@contextlib.contextmanager
def together(path: str | os.PathLike) -> Iterator[None]:
    """What one process cannot write fails in all; they leave the block as one.

    Args:
      path: what is written, the same in every process.

    Raises:
      StorageError: here or in another process.
    """
    failure: StorageError | None = None
    try:
        with storing(path):
            yield
    except StorageError as error:
        failure = error
    if agree(failure is not None):
        reason = "another process could not write its part"
        raise failure or StorageError(errno.EIO, reason, os.fspath(path))


def sync_folder(folder: str | os.PathLike) -> None:
    """Has the names within a folder on disk when it returns.

    Args:
      folder: an existing folder.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Lends a temporary file beside `path` that takes its place when all went well.

    Args:
      path: the file to be written.

    Yields:
      The temporary file, of the same suffix; it is gone if the block raises.

    Raises:
      StorageError: the disk is full, or the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    with storing(path):
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
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


def _plain(value: Any, strict: bool) -> Any:
    """The JSON value of what a run may want to record."""
    named = named_parts(value)
    if named is not None:
        return {str(name): _plain(item, strict) for name, item in named.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, strict) for item in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _plain(np.asarray(value).tolist(), strict)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, float) and not strict:
        return value if math.isfinite(value) else None
    return value
