import dataclasses
import json
import math
import sys
from typing import NamedTuple

import jax
import numpy as np
import pytest

from metax.harness import (
    append_metrics,
    create_run,
    long_rows,
    read_config,
    read_metrics,
    trim_metrics,
    write_summary,
)


@dataclasses.dataclass(frozen=True)
class Config:
    learning_rate: float = 0.1
    widths: tuple[int, ...] = (3, 4)
    clip: float | None = None


class Named(NamedTuple):
    learning_rate: float = 0.1


def test_run_holds_its_config(tmp_path):
    run = create_run(tmp_path / "a" / "b", Config())
    assert run == tmp_path / "a" / "b"
    assert read_config(run) == {"learning_rate": 0.1, "widths": [3, 4], "clip": None}


@pytest.mark.parametrize("config", [Named(), {"learning_rate": 0.1}])
def test_named_tuples_and_mappings_are_configs(tmp_path, config):
    assert read_config(create_run(tmp_path, config)) == {"learning_rate": 0.1}


def test_folder_is_opened_again_with_the_same_config_only(tmp_path):
    create_run(tmp_path, Config())
    written = (tmp_path / "config.json").stat().st_mtime_ns
    create_run(tmp_path, Config())
    assert (tmp_path / "config.json").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match=r"learning_rate.*0\.1, 0\.2.*--out"):
        create_run(tmp_path, Config(learning_rate=0.2))
    with pytest.raises(ValueError, match="clip"):
        create_run(tmp_path, {"learning_rate": 0.1, "widths": (3, 4)})
    assert read_config(tmp_path)["learning_rate"] == 0.1


def test_folder_that_cannot_be_written_is_refused_before_anything(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"create_run\(directory=...\)` .*file/run.*"):
        create_run(tmp_path / "file" / "run", Config())


@pytest.mark.parametrize(
    "config",
    [{"a": np.ones(2)}, {"a": math.inf}, {"a": (1.0, math.nan)}, {"a": {"b": 1}}],
)
def test_config_of_more_than_plain_finite_scalars_is_refused(tmp_path, config):
    with pytest.raises(ValueError, match=r"create_run\(config=...\)` must hold .*a="):
        create_run(tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def test_config_must_have_names(tmp_path):
    with pytest.raises(ValueError, match="must be a dataclass, NamedTuple or mapping"):
        create_run(tmp_path, 3)


def test_missing_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="must hold JSON"):
        read_config(tmp_path)


def test_rows_come_back_with_nan_for_what_is_not_finite(tmp_path):
    rows = [{"step": 1, "loss": np.float32(0.5)}, {"step": 2, "loss": math.inf}]
    append_metrics(tmp_path, rows[:1])
    append_metrics(tmp_path, rows[1:])
    first, second = read_metrics(tmp_path)
    assert first == {"step": 1, "loss": 0.5}
    assert second["step"] == 2
    assert math.isnan(second["loss"])
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": null}\n'


def test_no_file_is_no_rows(tmp_path):
    assert read_metrics(tmp_path) == []
    trim_metrics(tmp_path, 0)
    assert not list(tmp_path.iterdir())


def test_half_written_last_line_is_not_counted(tmp_path):
    append_metrics(tmp_path, [{"step": 1}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1}]
    trim_metrics(tmp_path, 1)
    append_metrics(tmp_path, [{"step": 2}])
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]


def test_broken_line_in_the_middle_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(tmp_path)


def test_trim_keeps_the_bytes_of_the_rows_up_to_its_step(tmp_path):
    rows = [{"note": "x"}, *({"step": i, "loss": 1 / i} for i in range(1, 6))]
    append_metrics(tmp_path, rows[:4])
    kept = (tmp_path / "metrics.jsonl").read_bytes()
    append_metrics(tmp_path, rows[4:])
    trim_metrics(tmp_path, 3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == kept


def test_summary_says_what_it_takes_to_trust_it(tmp_path):
    write_summary(tmp_path, {"loss": np.float64(0.25)}, wall_time=1.5)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["loss"] == 0.25
    assert summary["wall_time"] == 1.5
    assert summary["versions"]["jax"] == jax.__version__
    names = {"python", "metax", "jax", "jaxlib", "flax", "optax", "numpy"}
    assert set(summary["versions"]) == names
    assert summary["device"]["count"] == jax.device_count()
    assert "git_commit" in summary


def test_summary_outside_of_a_repository_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    write_summary(tmp_path, {}, wall_time=0.0)
    assert json.loads((tmp_path / "summary.json").read_text())["git_commit"] is None


def test_summary_names_are_not_overwritten(tmp_path):
    with pytest.raises(ValueError, match="wall_time"):
        write_summary(tmp_path, {"wall_time": 3.0}, wall_time=1.0)


def test_long_rows_have_a_column_for_each_axis_and_constant():
    axes = {"seed": [3, 5], "epoch": [1, 2, 3]}
    measured = {"loss": np.arange(6.0).reshape(2, 3), "good": np.ones((2, 3), bool)}
    rows = long_rows(measured, axes, method="sgd")
    assert len(rows) == 6
    assert rows[4] == {
        "method": "sgd", "seed": 5, "epoch": 2, "loss": 4.0, "good": True,
    }  # fmt: skip
    assert type(rows[0]["loss"]) is float


def test_long_rows_refuse_arrays_of_another_shape():
    with pytest.raises(ValueError, match=r"shape \(2,\).*'loss': \(3,\)"):
        long_rows({"loss": np.ones(3)}, {"seed": [0, 1]})


def test_command_is_as_typed_but_names_no_folder(monkeypatch, tmp_path):
    argv = ["script.py", "--epochs", "2", "--out", "here", "--resume=there"]
    monkeypatch.setattr("sys.argv", argv)
    monkeypatch.setattr("sys.modules", {**sys.modules, "__main__": None})
    write_summary(tmp_path, {}, wall_time=1.0)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["command"] == "python script.py --epochs 2"
