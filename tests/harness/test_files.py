import dataclasses
import errno
import json
import pickle
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from metax.harness import StorageError, write_json
from metax.harness.files import make_folder, replacing, storing


class Pair(NamedTuple):
    first: float
    second: float


@dataclasses.dataclass
class Point:
    x: float


def test_arrays_and_records_become_plain_json(tmp_path):
    value = {
        "scalar": np.float32(0.5),
        "int": np.int64(3),
        "flag": np.bool_(True),
        "matrix": np.array([[1.0, np.nan], [np.inf, 2.0]]),
        "jax": jnp.arange(2),
        "pair": Pair(1.0, float("nan")),
        "point": Point(x=2.0),
        "path": Path("a/b"),
        "list": [1, "two", None, True],
        3: (),
    }
    write_json(tmp_path / "value.json", value)
    assert json.loads((tmp_path / "value.json").read_text()) == {
        "scalar": 0.5,
        "int": 3,
        "flag": True,
        "matrix": [[1.0, None], [None, 2.0]],
        "jax": [0, 1],
        "pair": {"first": 1.0, "second": None},
        "point": {"x": 2.0},
        "path": "a/b",
        "list": [1, "two", None, True],
        "3": [],
    }


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, 1)
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == "1\n"
    assert list(tmp_path.iterdir()) == [path]


def fail_halfway(path):
    with replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt


def test_interrupted_replacing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "figure.png"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        fail_halfway(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"f\(x=...\)` must be a folder .*--out"):
        make_folder(tmp_path / "file" / "run", "f(x=...)")


def store(path, error):
    with storing(path):
        raise error


def test_trouble_of_a_disk_names_the_file_and_crosses_processes(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(StorageError, match=r"value.json could.*No space.*--resume"):
        store(tmp_path / "value.json", full)
    with pytest.raises(StorageError) as caught:
        write_json(tmp_path / "nowhere" / "value.json", 1)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), again.errno) == (StorageError, errno.ENOENT)
    assert again.filename == str(tmp_path / "nowhere" / "value.json")
    with pytest.raises(StorageError, match="Input/output error|a library's words"):
        store(tmp_path, OSError("a library's words"))
    with pytest.raises(TypeError):
        store(tmp_path, TypeError("not of a disk"))
