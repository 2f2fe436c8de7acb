import signal
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax.harness import latest_step, restore_checkpoint, save_checkpoint


class State(NamedTuple):
    params: dict
    opt_state: tuple
    nothing: None


def make_state():
    params = {
        "f64": jax.random.normal(jax.random.key(0), (3, 2), jnp.float64),
        "f32": jnp.array([1e-45, -0.0, jnp.nan, jnp.inf], jnp.float32),
        "bf16": jnp.array([1.0, 3.14159], jnp.bfloat16),
        "a/b.c~['d']": jnp.arange(3, dtype=jnp.uint8),
        "bool": jnp.array([True, False]),
        "scalar": jnp.array(7),
        "empty": jnp.zeros((0, 3)),
    }
    opt_state = (optax.EmptyState(), (), [jnp.ones(2), None], optax.adam(1.0).init({}))
    return State(params, opt_state, None)


def assert_same_bits(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert isinstance(a, jax.Array)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("abstract", [True, False])
def test_every_leaf_comes_back_bit_for_bit(tmp_path, abstract):
    state = make_state()
    path = save_checkpoint(tmp_path / "checkpoints", 3, state)
    assert path == tmp_path / "checkpoints" / "3"
    like = jax.eval_shape(make_state) if abstract else make_state()
    step, got = restore_checkpoint(tmp_path / "checkpoints", like)
    assert step == 3
    assert_same_bits(got, state)


@pytest.mark.parametrize("state", [(), {"a": None}, jnp.ones(3), [np.float32(2.0)]])
def test_small_states_come_back(tmp_path, state):
    save_checkpoint(tmp_path, 0, state)
    step, got = restore_checkpoint(tmp_path, state)
    assert step == 0
    assert_same_bits(got, jax.tree.map(jnp.asarray, state))


def test_latest_and_earlier_steps_are_found(tmp_path):
    for step in (2, 10, 9):
        save_checkpoint(tmp_path, step, jnp.array(step))
    assert latest_step(tmp_path) == 10
    assert restore_checkpoint(tmp_path, jnp.array(0)) == (10, 10)
    assert restore_checkpoint(tmp_path, jnp.array(0), step=9) == (9, 9)


def test_no_checkpoint_is_no_step(tmp_path):
    assert latest_step(tmp_path / "nowhere") is None
    assert latest_step(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="any step; got steps"):
        restore_checkpoint(tmp_path, ())
    save_checkpoint(tmp_path, 4, ())
    with pytest.raises(FileNotFoundError, match=r"of step 3; got steps \[4\]"):
        restore_checkpoint(tmp_path, (), step=3)


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"a": jnp.ones(3), "b": jnp.ones(3)}, r"state\['a'\] it wants float64\[3\] "),
        ({"a": jnp.ones(2, jnp.float32), "b": jnp.ones(3)}, r"float32\[2\] .*64\[2\]"),
        ({"a": jnp.ones(2)}, r"state\['b'\] it wants no leaf .* float64\[3\]"),
        (
            {"a": jnp.ones(2), "b": jnp.ones(3), "c": jnp.ones(1)},
            r"state\['c'\] it wants float64\[1\] and .* holds no leaf",
        ),
        ([jnp.ones(2), jnp.ones(3)], r"state\[0\] it wants float64\[2\]"),
    ],
)
def test_another_tree_is_refused_and_the_leaf_named(tmp_path, like, message):
    save_checkpoint(tmp_path, 1, {"a": jnp.ones(2), "b": jnp.ones(3)})
    with pytest.raises(ValueError, match=message):
        restore_checkpoint(tmp_path, like)


def test_typed_keys_are_refused(tmp_path):
    state = {"key": jax.random.key(0)}
    with pytest.raises(ValueError, match=r"typed keys; got one at state\['key'\]"):
        save_checkpoint(tmp_path, 1, state)
    assert latest_step(tmp_path) is None


def test_steps_are_saved_once_and_not_negative(tmp_path):
    save_checkpoint(tmp_path, 1, jnp.ones(2))
    with pytest.raises(ValueError, match=r"step=1\)` must be a step not saved before"):
        save_checkpoint(tmp_path, 1, jnp.zeros(2))
    with pytest.raises(ValueError, match="at least 0; got step=-1"):
        save_checkpoint(tmp_path, -1, jnp.zeros(2))
    assert restore_checkpoint(tmp_path, jnp.zeros(2))[1].tolist() == [1.0, 1.0]


def test_sharding_of_the_wanted_state_is_kept(tmp_path):
    save_checkpoint(tmp_path, 1, jnp.arange(4.0))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    like = jax.ShapeDtypeStruct((4,), jnp.float64, sharding=sharding)
    assert restore_checkpoint(tmp_path, like)[1].sharding == sharding


KILLED = """
import os, pathlib, signal, sys
import jax.numpy as jnp
from metax.harness import save_checkpoint

def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

save_checkpoint(sys.argv[1], 1, jnp.ones(3))
pathlib.Path.rename = os.rename = os.replace = kill
save_checkpoint(sys.argv[1], 2, 2 * jnp.ones(3))
"""


def test_killed_writer_leaves_the_last_complete_step(tmp_path):
    result = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert result.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] != ["1"], "no trace of step 2"
    assert latest_step(tmp_path) == 1
    like = jax.ShapeDtypeStruct((3,), jnp.float32)
    assert restore_checkpoint(tmp_path, like)[1].tolist() == [1.0, 1.0, 1.0]
    save_checkpoint(tmp_path, 2, 3 * jnp.ones(3, jnp.float32))
    assert restore_checkpoint(tmp_path, like)[1].tolist() == [3.0, 3.0, 3.0]
