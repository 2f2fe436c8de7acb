"""What a checkpoint must hold, written beside it: the manifest.

    manifest.json   schema, version, step, config_hash, versions
                    leaves   path in the state: shape, dtype, sha256 of the bytes
                    files    path in the folder: size, sha256
                    sha256   of all the above

The hashes of the files tell that the disk gave back what was written, those of the
leaves that the whole way from array to array did. The manifest stands in one form only,
byte for byte, so a flip within it is seen as well.
"""

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from metax.harness.files import sync_folder
from metax.harness.records import versions

__all__ = [
    "MANIFEST",
    "CheckpointCorruptError",
    "CheckpointMismatchError",
    "check_files",
    "check_values",
    "check_wanted",
    "describe_leaf",
    "read_manifest",
    "write_manifest",
]

MANIFEST = "manifest.json"
SCHEMA, VERSION = "metax.checkpoint", 1


class CheckpointCorruptError(ValueError):
    """A checkpoint does not hold what was saved: a disk, a copy or a hand changed it.

    Attributes:
      path: the damaged file, or the folder where it is not known which.
      leaf: the path of the damaged leaf in the state, None where a file tells.
      wanted: what was saved.
      got: what is there now.
    """

    def __init__(self, path: Path, leaf: str | None, wanted: str, got: str):
        self.path, self.leaf, self.wanted, self.got = path, leaf, wanted, got
        # all of them: an exception crosses processes by its args
        super().__init__(path, leaf, wanted, got)

    def __str__(self) -> str:
        where = self.path if self.leaf is None else f"{self.leaf} in {self.path}"
        return (
            f"{where} is damaged: saved was {self.wanted}, found is {self.got}. Go on "
            "from the step before it (fallback=True, or step=...), or bring the folder "
            "back from a copy."
        )


class CheckpointMismatchError(ValueError):
    """A sound checkpoint is not that of the state or the run it is wanted for.

    Attributes:
      path: the folder of the checkpoint.
      leaf: the path of the first leaf that differs, None where no leaf does.
      wanted: what the caller asked for.
      got: what the checkpoint holds.
    """

    def __init__(self, path: Path, leaf: str | None, wanted: str, got: str):
        self.path, self.leaf, self.wanted, self.got = path, leaf, wanted, got
        super().__init__(path, leaf, wanted, got)

    def __str__(self) -> str:
        if self.leaf is None:
            return (
                f"{self.path} is not of this run: wanted was {self.wanted}, and it "
                f"holds {self.got}. Go on with what it was saved by, or choose another "
                "folder (--out)."
            )
        return (
            "`restore_checkpoint(like=...)` must have the leaves that were saved; at "
            f"{self.leaf} it wants {self.wanted} and {self.path} holds {self.got}. "
            "Give the loop and settings it was saved by, or choose another folder."
        )


def describe_leaf(value: np.ndarray) -> dict[str, Any]:
    """What the manifest says of an array.

    Args:
      value: the array, of any shape and dtype.

    Returns:
      Its shape, dtype, and the sha256 of its bytes in row-major order.
    """
    flat = np.ascontiguousarray(value).reshape(-1)
    return {
        "shape": list(value.shape),
        "dtype": str(value.dtype),
        "sha256": hashlib.sha256(flat.view(np.uint8)).hexdigest(),
    }


def write_manifest(
    folder: Path, step: int, leaves: Mapping[str, Any], config_hash: str | None
) -> None:
    """Writes the manifest of a checkpoint, and has all of the folder on disk.

    Args:
      folder: the checkpoint, with every file but the manifest.
      step: the number of steps done.
      leaves: names to what `describe_leaf` says.
      config_hash: of the config of the run, if it has one.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    content = {
        "schema": SCHEMA,
        "version": VERSION,
        "step": step,
        "config_hash": config_hash,
        "versions": _versions(),
        "leaves": dict(leaves),
        "files": {
            path.relative_to(folder).as_posix(): _describe_file(path, sync=True)
            for path in paths
        },
    }
    with (folder / MANIFEST).open("wb") as file:
        file.write(_sealed(content))
        file.flush()
        os.fsync(file.fileno())
    for inner in [path for path in folder.rglob("*") if path.is_dir()]:
        sync_folder(inner)
    sync_folder(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a checkpoint.

    Args:
      folder: the checkpoint, named after its step.

    Returns:
      What `write_manifest` wrote.

    Raises:
      CheckpointCorruptError: it is missing, is not what was written, or is that of
        another step.
      CheckpointMismatchError: another version of metax wrote it, in another form.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointCorruptError(path, None, "a manifest", "no such file")
    text = path.read_bytes()
    try:
        content = json.loads(text)
        del content["sha256"]
        is_whole = text == _sealed(content)
    except (ValueError, KeyError, TypeError):
        is_whole, content = False, {}
    if not is_whole:
        raise CheckpointCorruptError(path, None, "a manifest", "another content")
    form = f"{content['schema']} {content['version']}"
    if form != f"{SCHEMA} {VERSION}":
        raise CheckpointMismatchError(folder, None, f"{SCHEMA} {VERSION}", form)
    if str(content["step"]) != folder.name:
        raise CheckpointCorruptError(
            path, None, f"step {content['step']}", f"the folder of step {folder.name}"
        )
    return content


def check_wanted(
    folder: Path,
    manifest: Mapping[str, Any],
    wanted: Mapping[str, Any],
    config_hash: str | None,
) -> None:
    """Compares a checkpoint with what it is wanted for, before an array is read.

    Args:
      folder: the checkpoint.
      manifest: what `read_manifest` gave.
      wanted: names to anything with a shape and a dtype.
      config_hash: of the config of the run; None to not compare it.

    Raises:
      CheckpointMismatchError: config or leaves differ.
    """
    of_config = manifest["config_hash"]
    if config_hash not in (None, of_config):
        raise CheckpointMismatchError(
            folder, None, f"a config of sha256 {config_hash}", f"one of {of_config}"
        )
    saved = {
        name: f"{leaf['dtype']}{leaf['shape']}"
        for name, leaf in manifest["leaves"].items()
    }
    asked = {name: f"{x.dtype}{list(x.shape)}" for name, x in wanted.items()}
    for name in [*asked, *(name for name in saved if name not in asked)]:
        want, got = asked.get(name, "no leaf"), saved.get(name, "no leaf")
        if want != got:
            raise CheckpointMismatchError(folder, name, want, got)


def check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compares every file of a checkpoint with the manifest, sizes first.

    Args:
      folder: the checkpoint.
      manifest: what `read_manifest` gave.

    Raises:
      CheckpointCorruptError: a file is missing or another; it names the file.
    """
    for name, saved in manifest["files"].items():
        path = folder / name
        got = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
        if got != f"{saved['size']} bytes":
            raise CheckpointCorruptError(path, None, f"{saved['size']} bytes", got)
    for name, saved in manifest["files"].items():
        wanted, got = saved["sha256"], _describe_file(folder / name)["sha256"]
        if got != wanted:
            raise CheckpointCorruptError(
                folder / name, None, f"sha256 {wanted}", f"sha256 {got}"
            )


def check_values(
    folder: Path, manifest: Mapping[str, Any], values: Mapping[str, np.ndarray]
) -> None:
    """Compares the arrays that were read with those that were saved.

    Args:
      folder: the checkpoint.
      manifest: what `read_manifest` gave.
      values: names to arrays.

    Raises:
      CheckpointCorruptError: an array is another; it names the leaf.
    """
    for name, value in values.items():
        wanted, got = manifest["leaves"][name], describe_leaf(value)
        if got != wanted:
            raise CheckpointCorruptError(folder, name, str(wanted), str(got))


def _sealed(content: Mapping[str, Any]) -> bytes:
    """The one form in which a manifest stands, with its own hash."""
    plain = _canonical(content)
    return _canonical({**content, "sha256": hashlib.sha256(plain).hexdigest()})


def _canonical(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _describe_file(path: Path, *, sync: bool = False) -> dict[str, Any]:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


@functools.cache
def _versions() -> dict[str, str | None]:
    return {**versions(), "orbax": metadata.version("orbax-checkpoint")}
