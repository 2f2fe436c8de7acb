import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from metax.harness import write_json
from metax.harness.files import make_folder, replacing


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
