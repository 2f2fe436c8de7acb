"""The directory of a run: plain files that survive a kill at any moment.

    config.json     what was asked for, written before anything is computed
    metrics.jsonl   one JSON object a row, appended while the run goes
    summary.json    the outcome, with versions, device, wall time and git commit

JSON has neither NaN nor infinity: both are written as null, and `read_metrics` reads
null as NaN. Whole files are replaced in one act, so a reader never meets a half of one.
Of several processes that run one program all call these functions: the first alone
writes, and the others go on when it has; `trim_metrics` waits for nobody.
"""

import hashlib
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from platform import python_version
from typing import Any

import jax
import numpy as np

from metax.arguments import check_count, refuse
from metax.harness.files import (
    dump_json,
    make_folder,
    named_parts,
    together,
    write_json,
    write_text,
)
from metax.harness.processes import is_first

__all__ = [
    "append_metrics",
    "create_run",
    "hash_config",
    "long_rows",
    "read_config",
    "read_metrics",
    "trim_metrics",
    "versions",
    "write_summary",
]

PACKAGES = ("metax", "jax", "jaxlib", "flax", "optax", "numpy")


def create_run(directory: str | os.PathLike, config: Any) -> Path:
    """Makes the directory of a run, or opens that of an earlier one with this config.

    Call it before anything is computed: it tries to write, so a folder that cannot be
    written is found out now and not after an hour.

    Args:
      directory: the folder to make, with its parents.
      config: a dataclass, NamedTuple or mapping of plain scalars (or tuples of them).

    Returns:
      The folder, which now holds `config.json`.

    Raises:
      ValueError: the folder cannot be written, it holds the run of another config, or
        the config holds something that JSON does not.
      StorageError: the disk is full.
    """
    config = _plain_config(config)
    folder = make_folder(directory, "create_run(directory=...)")
    path = folder / "config.json"
    with together(path):
        if is_first() and not path.exists():
            write_text(path, dump_json(config, indent=2) + "\n")
    stored = read_config(folder)
    differing = {
        name: (stored.get(name), config.get(name))
        for name in sorted(stored.keys() | config.keys())
        if name not in stored or name not in config or stored[name] != config[name]
    }
    if differing:
        raise ValueError(
            f"`create_run(directory={str(folder)!r})` holds the run of another config: "
            f"(stored, given) differ in {differing}. Choose another folder (--out), or "
            "give the stored config."
        )
    return folder


def read_config(run: str | os.PathLike) -> dict[str, Any]:
    """Reads `config.json` of a run.

    Args:
      run: the folder of the run.

    Returns:
      The config as a dict; tuples come back as lists.

    Raises:
      FileNotFoundError: the folder holds no `config.json`.
      ValueError: the file is no JSON object.
    """
    path = Path(run) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"`read_config(run={str(run)!r})` must be the folder of a run; it holds no "
            "config.json."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must hold JSON; {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object; got {config!r}.")
    return config


def hash_config(config: Any) -> str:
    """Names a config by what it says: equal configs, and only they, have equal hashes.

    Args:
      config: a dataclass, NamedTuple or mapping of JSON values, `read_config`'s too.

    Returns:
      The sha256, in hexadecimal digits, of its JSON with sorted names.

    Raises:
      ValueError: it is none of these, or holds a number that is not finite, which JSON
        has not.

    Example:
      >>> from metax.harness import hash_config
      >>> hash_config({"rate": 0.1, "widths": (4, 2)})[:8]
      '643b2437'
      >>> hash_config({"widths": [4, 2], "rate": 0.1})[:8]
      '643b2437'
    """
    plain = _strict_json(config)
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def long_rows(
    measured: Mapping[str, Any], axes: Mapping[str, Iterable[Any]], **constant: Any
) -> list[dict[str, Any]]:
    """Turns named arrays that share their axes into rows, one an index.

    Args:
      measured: names to arrays, all of one shape, with an axis for each of `axes`.
      axes: names to coordinates, in the order of the axes.
      **constant: columns that are the same in every row.

    Returns:
      The rows, the last axis running fastest.

    Raises:
      ValueError: an array has not the shape that the coordinates give.

    Example:
      >>> from metax.harness import long_rows
      >>> axes = {"seed": [0], "epoch": [1, 2]}
      >>> long_rows({"loss": [[3.0, 2.0]]}, axes, method="sgd")[1]
      {'method': 'sgd', 'seed': 0, 'epoch': 2, 'loss': 2.0}
    """
    arrays = {name: np.asarray(values) for name, values in measured.items()}
    coordinates = [list(values) for values in axes.values()]
    wanted = tuple(len(values) for values in coordinates)
    wrong = {name: x.shape for name, x in arrays.items() if x.shape != wanted}
    if wrong:
        raise ValueError(
            f"`long_rows(measured=...)` must have the shape {wanted} of its axes "
            f"{tuple(axes)}; got {wrong}."
        )
    return [
        {
            **constant,
            **{name: c[i] for name, c, i in zip(axes, coordinates, index, strict=True)},
            **{name: values[index].item() for name, values in arrays.items()},
        }
        for index in np.ndindex(wanted)
    ]


def append_metrics(run: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends rows to `metrics.jsonl` and has them on disk when it returns.

    Args:
      run: the folder of the run.
      rows: flat mappings of names to scalars, numpy's included; by convention `step` is
        the number of steps done when the row was measured.

    Raises:
      StorageError: the disk is full, or the file cannot be written.
    """
    text = "".join(dump_json(row) + "\n" for row in rows)
    path = Path(run) / "metrics.jsonl"
    with together(path):
        if is_first():
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())


def read_metrics(run: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads the rows of `metrics.jsonl`; null becomes NaN.

    Args:
      run: the folder of the run.

    Returns:
      One dict a row, none where there is no file. A last line that a kill left half
      written is not counted.

    Raises:
      ValueError: another line is no JSON.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    # a whole row ends in a newline: what stands after the last one is half a row
    return [_read_row(path, number, line) for number, line in enumerate(lines[:-1], 1)]


def trim_metrics(run: str | os.PathLike, step: int) -> None:
    """Drops the rows of `metrics.jsonl` that were measured after `step` steps.

    A run that goes on from a checkpoint at `step` writes these rows again; rows without
    a `step` stay. A half-written last line goes as well.

    Args:
      run: the folder of the run.
      step: the number of steps done, that of the checkpoint.

    Raises:
      ValueError: `step` is negative, or a line but the last is no JSON.
      StorageError: the disk is full, or the file cannot be written.
    """
    check_count("trim_metrics", 0, step=step)
    kept = [row for row in read_metrics(run) if row.get("step", step) <= step]
    path = Path(run) / "metrics.jsonl"
    if is_first() and path.exists():
        write_text(path, "".join(dump_json(row) + "\n" for row in kept))


def write_summary(
    run: str | os.PathLike, summary: Mapping[str, Any], *, wall_time: float
) -> None:
    """Writes `summary.json`: the outcome, and what it takes to trust it later.

    Added to `summary` are `command` (without `--out` and `--resume`, which name folders
    of one machine), `wall_time`, `versions` (python, metax, jax, jaxlib, flax, optax,
    numpy), `device` (`kind` and `count`) and `git_commit`.

    Args:
      run: the folder of the run.
      summary: names to JSON values or arrays.
      wall_time: seconds the run took, by the caller's clock.

    Raises:
      ValueError: `summary` has one of the added names.
      StorageError: the disk is full, or the folder cannot be written.
    """
    devices = jax.devices()
    added = {
        "command": _command(sys.argv),
        "wall_time": wall_time,
        "versions": versions(),
        "device": {"kind": devices[0].device_kind, "count": len(devices)},
        "git_commit": _git_commit(),
    }
    taken = sorted(added.keys() & summary.keys())
    if taken:
        raise ValueError(
            f"`write_summary(summary=...)` must not have the names {taken}, which are "
            "added here; rename them."
        )
    write_json(Path(run) / "summary.json", {**summary, **added})


def versions() -> dict[str, str | None]:
    """Reads the versions of what a result depends on.

    Returns:
      Names to versions: python, metax, jax, jaxlib, flax, optax, numpy; None where a
      package is not installed as one.
    """
    found: dict[str, str | None] = {"python": python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _command(argv: Sequence[str]) -> str:
    """The command line as one types it: `python -m package.script --flag value`."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    script = f"-m {spec.name}" if spec is not None else Path(argv[0]).name
    flags = list(argv[1:])
    for folder in ("--out", "--resume"):
        if folder in flags:
            at = flags.index(folder)
            del flags[at : at + 2]
        flags = [flag for flag in flags if not flag.startswith(f"{folder}=")]
    return shlex.join(["python", *script.split(), *flags])


def _read_row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}, must hold JSON; {error}.") from error
    return {name: math.nan if value is None else value for name, value in row.items()}


def _plain_config(config: Any) -> dict[str, Any]:
    named = named_parts(config)
    if named is None:
        raise ValueError(
            "`create_run(config=...)` must be a dataclass, NamedTuple or mapping; got "
            f"{type(config).__name__}."
        )
    for name, value in named.items():
        items = value if isinstance(value, list | tuple) else [value]
        if not all(_is_plain(item) for item in items):
            raise ValueError(
                "`create_run(config=...)` must hold plain finite scalars or tuples of "
                f"them (None for no limit); got {name}={value!r}."
            )
    return json.loads(dump_json(named))


def _strict_json(config: Any) -> Any:
    """The JSON of a config, where no number was turned into a null."""
    what = "a dataclass, NamedTuple or mapping of finite JSON values"
    if named_parts(config) is None:
        refuse("hash_config", "config", f"must be {what}", type(config).__name__)
    try:
        return json.loads(dump_json(config, strict=True))
    except (TypeError, ValueError) as error:
        refuse("hash_config", "config", f"must be {what}", f"{config!r}: {error}")


def _is_plain(value: Any) -> bool:
    is_finite = not isinstance(value, float) or math.isfinite(value)
    return isinstance(value, bool | int | float | str | None) and is_finite


def _git_commit() -> str | None:
    """The commit of the folder the command runs in, with -dirty if it was edited."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
