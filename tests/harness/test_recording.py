import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax import Loop
from metax.harness import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    NonFiniteError,
    StorageError,
    append_metrics,
    create_run,
    latest_step,
    mean_rows,
    read_metrics,
    record_run,
    restore_checkpoint,
)
from metax.harness.manifest import write_manifest

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


def steps_in(folder):
    names = [path.name for path in (folder / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdecimal())


@pytest.mark.parametrize(("keep", "left"), [(3, [4, 5, 6]), (1, [6]), (None, None)])
def test_last_checkpoints_are_kept(tmp_path, keep, left):
    record_run(tmp_path, counter(), None, KEY, 6, chunk=1, keep=keep)
    assert steps_in(tmp_path) == (left or [1, 2, 3, 4, 5, 6])


def test_non_finite_run_names_a_checkpoint_that_is_kept_and_loads(tmp_path):
    with pytest.raises(NonFiniteError) as caught:
        record_run(tmp_path, counter(5), None, KEY, 8, chunk=1, keep=1)
    path = Path(caught.value.checkpoint)
    assert path == tmp_path / "checkpoints" / "5"
    assert restore_checkpoint(path.parent, jnp.array(0)) == (5, 5)


def test_checkpoints_are_written_beside_the_run_after_their_rows(tmp_path, monkeypatch):
    seen = []

    def write(folder, step, *rest):
        rows = [row["step"] for row in read_metrics(tmp_path)]
        seen.append((threading.current_thread().name, step, rows))
        return write_manifest(folder, step, *rest)

    monkeypatch.setattr("metax.harness.checkpoint.write_manifest", write)
    record_run(tmp_path, counter(), None, KEY, 4, chunk=2)
    assert seen == [("metax-saver_0", 2, [2]), ("metax-saver_0", 4, [2, 4])]


def test_what_is_saved_is_the_state_before_its_memory_is_used_again(tmp_path):
    """The next chunk, which is donated the state, is done before the save begins."""
    saved, states = threading.Event(), {}

    def rows(step, state, infos):
        states[step] = np.array(state)
        if step == 3:
            saved.set()
        return []

    def step(state, key, data):
        return state * 1.5 + 1, ()

    def wait(run, rows):
        saved.wait(10)

    loop = Loop(lambda key: jnp.arange(1000.0), step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metax.harness.recording.append_metrics", wait)
        # the third chunk's rows are made while the save of the second waits
        patch.setattr("metax.harness.recording.Saver.wait", lambda self: None)
        record_run(tmp_path, loop, None, KEY, 3, chunk=1, rows=rows)
    for at in (1, 2, 3):
        _, state = restore_checkpoint(tmp_path / "checkpoints", states[3], at)
        np.testing.assert_array_equal(state, states[at])


def test_run_killed_between_rows_and_checkpoint_repeats_no_row(tmp_path, monkeypatch):
    class KilledError(BaseException):
        pass

    def die(*_):
        raise KilledError

    wanted = tmp_path / "wanted"
    record_run(wanted, counter(), None, KEY, 6, chunk=2)
    record_run(tmp_path, counter(), None, KEY, 2, chunk=2)
    with monkeypatch.context() as patch:
        patch.setattr("metax.harness.checkpoint._write", die)
        with pytest.raises(KilledError):
            record_run(tmp_path, counter(), None, KEY, 6, chunk=2, resume=True)
    assert [row["step"] for row in read_metrics(tmp_path)] == [2, 4]
    assert latest_step(tmp_path / "checkpoints") == 2
    record_run(tmp_path, counter(), None, KEY, 6, chunk=2, resume=True)
    assert read_metrics(tmp_path) == read_metrics(wanted)


def test_damaged_checkpoint_stops_the_resume_or_is_set_aside(tmp_path):
    record_run(tmp_path, counter(), None, KEY, 6, chunk=2)
    rows = read_metrics(tmp_path)
    (tmp_path / "checkpoints" / "6" / "manifest.json").unlink()
    with pytest.raises(CheckpointCorruptError, match="6/manifest.json is damaged"):
        record_run(tmp_path, counter(), None, KEY, 8, chunk=2, resume=True)
    with pytest.warns(UserWarning, match="step 6 is damaged, step 4 is taken"):
        state, _ = record_run(
            tmp_path, counter(), None, KEY, 8, chunk=2, resume=True, fallback=True
        )
    assert int(state) == 8
    assert read_metrics(tmp_path)[:3] == rows
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["4", "6", "6.corrupt", "8"]


def test_another_config_is_not_resumed(tmp_path):
    create_run(tmp_path, {"rate": 0.1})
    record_run(tmp_path, counter(), None, KEY, 2)
    state, _ = record_run(tmp_path, counter(), None, KEY, 2, resume=True)
    assert int(state) == 2
    (tmp_path / "config.json").write_text('{"rate": 0.2}')
    with pytest.raises(CheckpointMismatchError, match="a config of sha256"):
        record_run(tmp_path, counter(), None, KEY, 4, resume=True)


def large_loop():
    """A state that compression makes no smaller."""

    def step(state, key, data):
        return state + jax.random.normal(key, (100_000,)), jnp.sum(state)

    return Loop(lambda key: jnp.zeros(100_000), step)


# where one of its writes fails, Orbax closes the event loop that others report to
orbax_fails = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


def check_that_the_run_goes_on(tmp_path):
    """After a save of step 2 that failed, where the disk is writable again."""
    assert steps_in(tmp_path) == [1]
    like = jnp.zeros(100_000)
    assert restore_checkpoint(tmp_path / "checkpoints", like)[0] == 1
    record_run(tmp_path, large_loop(), None, KEY, 3, chunk=1, resume=True)
    assert steps_in(tmp_path) == [1, 2, 3]
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


@orbax_fails
def test_file_too_large_for_the_disk_stops_the_run_with_the_last_step_intact(tmp_path):
    record_run(tmp_path, large_loop(), None, KEY, 1, chunk=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(StorageError, match=r"checkpoints/2 could not.*too large"):
            record_run(tmp_path, large_loop(), None, KEY, 3, chunk=1, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check_that_the_run_goes_on(tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A folder that holds 1.5 MB, and a function that mounts it otherwise."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True, check=False).returncode

    if shutil.which("mount") is None or mount("size=1500k"):
        pytest.skip("a file system can only be mounted by root")
    yield folder, mount
    subprocess.run(["umount", "-l", str(folder)], check=True)


@orbax_fails
def test_full_disk_stops_the_run_with_the_last_step_intact(small_disk):
    disk, mount = small_disk
    with pytest.raises(StorageError, match=r"checkpoints/2 could.*No space left"):
        record_run(disk, large_loop(), None, KEY, 3, chunk=1)
    mount("remount,size=9m")
    check_that_the_run_goes_on(disk)


def test_disk_that_becomes_read_only_stops_the_run(small_disk):
    disk, mount = small_disk

    def rows(step, state, infos):
        if step == 2:
            while latest_step(disk / "checkpoints") is None:
                time.sleep(0.01)
            mount("remount,ro")
        return [{"step": step}]

    with pytest.raises(StorageError, match=r"metrics.jsonl could.*Read-only") as caught:
        record_run(disk, large_loop(), None, KEY, 3, chunk=1, rows=rows)
    assert caught.value.filename == str(disk / "metrics.jsonl")
    with pytest.raises(ValueError, match=r"record_run\(directory=...\).*Read-only"):
        record_run(disk, large_loop(), None, KEY, 3, chunk=1, resume=True)
    mount("remount,rw,size=9m")
    check_that_the_run_goes_on(disk)


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
    # of replicates, of which the default rows of a run say nothing more
    assert mean_rows(2, None, {"loss": np.ones((2, 3))}) == [{"step": 2}]


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
