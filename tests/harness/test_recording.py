import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax import Loop
from metax.harness import (
    NonFiniteError,
    append_metrics,
    latest_step,
    mean_rows,
    read_metrics,
    record_run,
    restore_checkpoint,
)

KEY = jax.random.key(0)

# what a new process runs: SGD on a quadratic whose targets are noisy
SCRIPT = """
import sys
import jax, jax.numpy as jnp, numpy as np, optax
from metax import Task, inner_loop
from metax.harness import record_run

jax.config.update("jax_enable_x64", True)
directory, num_steps, resume = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "resume"
task = Task(
    init=lambda key: {"w": jax.random.normal(key, (2,))},
    loss=lambda params, batch, key: jnp.sum((params["w"] - batch) ** 2),
    sample=lambda data, key: data + jax.random.normal(key, (2,)),
    evaluate=lambda params, data: {},
)
loop = inner_loop(task, optax.adam(0.1))
key, data = jax.random.key(7), jnp.array(1.0)
state, infos = record_run(
    directory, loop, data, key, num_steps, chunk=2, resume=resume
)
np.save(directory + "/losses.npy", infos.loss)
leaves = [np.asarray(leaf).tobytes().hex() for leaf in jax.tree.leaves(state)]
print(*leaves, sep="\\n")
"""


def run_script(directory: Path, num_steps: int, mode: str) -> str:
    command = [sys.executable, "-c", SCRIPT, str(directory), str(num_steps), mode]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_run_resumed_in_a_new_process_equals_the_uninterrupted_one(tmp_path):
    wanted = run_script(tmp_path / "whole", 8, "new")
    whole = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    losses = np.load(tmp_path / "whole" / "losses.npy")
    run_script(tmp_path / "parts", 4, "new")
    # as if the first process had been killed while it wrote the next rows
    append_metrics(tmp_path / "parts", [{"step": 6, "loss": 1.0}])
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    assert run_script(tmp_path / "parts", 8, "resume") == wanted
    assert (tmp_path / "parts" / "metrics.jsonl").read_bytes() == whole
    np.testing.assert_array_equal(np.load(tmp_path / "parts/losses.npy"), losses[4:])


class Info(NamedTuple):
    count: jax.Array
    value: jax.Array
    is_finite: jax.Array


def counter(bad_step=10**6):
    def step(state, key, data):
        is_finite = state < bad_step
        value = jnp.where(is_finite, 2.0 * state, jnp.nan)
        return state + 1, Info(state, value, is_finite)

    return Loop(lambda key: jnp.array(0), step)


def test_run_leaves_rows_and_checkpoints(tmp_path):
    state, infos = record_run(tmp_path / "run", counter(), None, KEY, 6, chunk=3)
    assert int(state) == 6
    assert infos.count.tolist() == [0, 1, 2, 3, 4, 5]
    rows = [{"step": 3, "value": 2.0}, {"step": 6, "value": 8.0}]
    assert read_metrics(tmp_path / "run") == rows
    assert restore_checkpoint(tmp_path / "run" / "checkpoints", state, 3) == (3, 3)
    assert latest_step(tmp_path / "run" / "checkpoints") == 6


def test_missing_last_checkpoint_repeats_its_chunk_and_no_row(tmp_path):
    record_run(tmp_path, counter(), None, KEY, 6, chunk=2)
    rows = read_metrics(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    state, infos = record_run(tmp_path, counter(), None, KEY, 6, chunk=2, resume=True)
    assert (int(state), infos.count.tolist()) == (6, [4, 5])
    assert read_metrics(tmp_path) == rows


def test_resume_without_a_checkpoint_starts_anew(tmp_path):
    append_metrics(tmp_path, [{"step": 2, "value": -1.0}])
    record_run(tmp_path, counter(), None, KEY, 2, chunk=2, resume=True)
    assert read_metrics(tmp_path) == [{"step": 2, "value": 1.0}]


def test_resume_of_a_finished_run_returns_its_state_and_no_infos(tmp_path):
    record_run(tmp_path, counter(), None, KEY, 4, chunk=2)
    state, infos = record_run(tmp_path, counter(), None, KEY, 4, resume=True)
    assert int(state) == 4
    assert infos.value.shape == (0,)
    assert infos.is_finite.dtype == bool
    assert len(read_metrics(tmp_path)) == 2


def test_rows_are_the_callers_choice(tmp_path):
    def rows(step, state, infos):
        first = step - len(infos.count) + 1
        return [
            {"step": first + i, "value": value} for i, value in enumerate(infos.value)
        ]

    record_run(tmp_path, counter(), None, KEY, 4, chunk=2, rows=rows)
    assert [(row["step"], row["value"]) for row in read_metrics(tmp_path)] == [
        (1, 0.0),
        (2, 2.0),
        (3, 4.0),
        (4, 6.0),
    ]


@pytest.mark.parametrize("row", [{"step": 0}, {"step": 3}, {"value": 1.0}])
def test_rows_outside_of_their_chunk_are_refused(tmp_path, row):
    with pytest.raises(ValueError, match=r"record_run\(rows=...\)` .*\(0, 2\]"):
        record_run(tmp_path, counter(), None, KEY, 4, chunk=2, rows=lambda *_: [row])
    assert read_metrics(tmp_path) == []


def test_non_finite_run_names_the_last_checkpoint_and_records_no_bad_row(tmp_path):
    with pytest.raises(NonFiniteError, match="step 5") as caught:
        record_run(tmp_path, counter(5), None, KEY, 8, chunk=2)
    assert caught.value.checkpoint == tmp_path / "checkpoints" / "4"
    assert [row["step"] for row in read_metrics(tmp_path)] == [2, 4]
    assert latest_step(tmp_path / "checkpoints") == 4


def test_non_finite_first_chunk_of_a_resume_names_the_checkpoint_it_began_with(
    tmp_path,
):
    record_run(tmp_path, counter(), None, KEY, 4, chunk=2)
    with pytest.raises(NonFiniteError) as caught:
        record_run(tmp_path, counter(5), None, KEY, 8, chunk=2, resume=True)
    assert caught.value.step == 5
    assert Path(caught.value.checkpoint) == tmp_path / "checkpoints" / "4"


def test_default_rows_take_floating_scalars_only():
    infos = {
        "a": np.array([1.0, 2.0], np.float32),
        "half": np.asarray(jnp.array([1.0, 2.0], jnp.bfloat16)),
        "int": np.array([1, 2]),
        "nested": {"b": np.array([0.0, 1.0])},
        "seeds": np.ones((2, 3)),
    }
    wanted = {"step": 2, "a": 1.5, "half": 1.5, "nested.b": 0.5}
    assert mean_rows(2, None, infos) == [wanted]
    assert mean_rows(2, None, np.array([1.0, 3.0])) == [{"step": 2, "info": 2.0}]


def test_earlier_run_is_not_written_over(tmp_path):
    record_run(tmp_path, counter(), None, KEY, 2)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"holds 2 steps.*resume=True"):
        record_run(tmp_path, counter(), None, KEY, 4)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_resume_beyond_the_end_or_of_another_state_is_refused(tmp_path):
    record_run(tmp_path, counter(), None, KEY, 4)
    with pytest.raises(
        ValueError, match=r"record_run\(num_steps=...\).*got num_steps=2"
    ):
        record_run(tmp_path, counter(), None, KEY, 2, resume=True)
    other = Loop(lambda key: jnp.zeros(3), counter().step)
    with pytest.raises(ValueError, match=r"restore_checkpoint\(like=...\)"):
        record_run(tmp_path, other, None, KEY, 8, resume=True)


def test_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"record_run\(directory=...\)"):
        record_run(tmp_path / "file" / "run", counter(), None, KEY, 2)
