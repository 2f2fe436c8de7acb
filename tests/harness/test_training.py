import pickle
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax import Loop, Task, inner_loop, unroll
from metax.harness import NonFiniteError, train
from metax.harness.training import _default_chunk

KEY = jax.random.key(3)
DATA = jnp.arange(6.0)


def noisy_loop(rate=0.1):
    """SGD with momentum on a quadratic whose target is a data row plus noise."""

    def sample(data, key):
        key_row, key_noise = jax.random.split(key)
        row = data[jax.random.randint(key_row, (), 0, len(data))]
        return row + jax.random.normal(key_noise, (2,))

    task = Task(
        init=lambda key: {"w": jax.random.normal(key, (2,))},
        loss=lambda params, batch, key: jnp.sum((params["w"] - batch) ** 2),
        sample=sample,
        evaluate=lambda params, data: {},
    )
    return inner_loop(task, optax.sgd(rate, momentum=0.9))


def assert_same_bits(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


class CountInfo(NamedTuple):
    count: jax.Array
    is_finite: jax.Array


def bad_at(step, value=jnp.nan):
    """Counts steps; from `step` on one leaf is `value`."""

    def advance(state, key, data):
        is_bad = state["count"] >= step
        leaf = jnp.where(is_bad, value, state["leaf"])
        info = CountInfo(state["count"], ~is_bad)
        return {**state, "count": state["count"] + 1, "leaf": leaf}, info

    def init(key):
        return {"count": jnp.array(0), "best": jnp.inf * jnp.ones(2), "leaf": 1.0}

    return Loop(init, advance)


def test_train_is_the_unroll_over_folded_keys():
    loop = noisy_loop()
    key_init, key_run = jax.random.split(KEY)
    keys = jnp.stack([jax.random.fold_in(key_run, i) for i in range(6)])
    state, infos = unroll(loop, loop.init(key_init), keys, DATA)
    got_state, got_infos = train(loop, DATA, KEY, 6, chunk=3)
    # the eager init and the compiled one may round differently
    np.testing.assert_allclose(
        got_state.params["w"], state.params["w"], rtol=0, atol=1e-12
    )
    np.testing.assert_allclose(got_infos.loss, infos.loss, rtol=1e-12)


@pytest.mark.parametrize("chunk", [1, 2, 3, 6, 12])
def test_chunks_change_no_bit(chunk):
    wanted = train(noisy_loop(), DATA, KEY, 12, chunk=12)
    assert_same_bits(train(noisy_loop(), DATA, KEY, 12, chunk=chunk), wanted)


@pytest.mark.parametrize(("stop", "before", "after"), [(4, 2, 8), (8, 8, 1), (3, 1, 3)])
def test_resumed_run_repeats_the_uninterrupted_one(stop, before, after):
    wanted_state, wanted_infos = train(noisy_loop(), DATA, KEY, 12, chunk=4)
    state, first = train(noisy_loop(), DATA, KEY, stop, chunk=before)
    state, second = train(
        noisy_loop(), DATA, KEY, 12, chunk=after, state=state, start=stop
    )
    infos = jax.tree.map(lambda *parts: np.concatenate(parts), first, second)
    assert_same_bits((state, infos), (wanted_state, wanted_infos))


def test_step_is_traced_once_over_all_chunks():
    traces = []
    loop = noisy_loop()

    def step(state, key, data):
        traces.append(None)
        return loop.step(state, key, data)

    train(Loop(loop.init, step), DATA, KEY, 12, chunk=2)
    assert len(traces) == 1


def test_weakly_typed_states_compile_once():
    traces = []

    def step(state, key, data):
        traces.append(None)
        return state * 0.5, state

    train(Loop(lambda key: 1.0, step), None, KEY, 6, chunk=2)
    assert len(traces) == 1


def test_callers_state_survives_donation():
    loop = noisy_loop()
    state = loop.init(KEY)
    before = jax.tree.map(np.array, state)
    train(loop, DATA, KEY, 4, chunk=2, state=state)
    assert_same_bits(state, before)


def test_state_with_one_array_twice_can_be_donated():
    array = jnp.ones(3)
    loop = Loop(lambda key: None, lambda s, key, data: ((s[0] + 1, s[1] + 2), ()))
    state, _ = train(loop, None, KEY, 4, chunk=2, state=(array, array))
    np.testing.assert_array_equal(state[0], 5.0)
    np.testing.assert_array_equal(state[1], 9.0)


def test_data_is_an_argument_of_the_program():
    big = np.zeros((1000, 1000))
    texts = []

    def step(state, key, data):
        texts.append(isinstance(data, jax.core.Tracer))
        return state + data[0, 0], ()

    train(Loop(lambda key: jnp.zeros(()), step), big, KEY, 2)
    assert texts == [True]


def test_infos_are_numpy_over_all_steps():
    _, infos = train(bad_at(100), None, KEY, 6, chunk=2)
    assert isinstance(infos.count, np.ndarray)
    assert infos.count.tolist() == [0, 1, 2, 3, 4, 5]


def test_on_chunk_sees_the_steps_done_and_the_state_after_them():
    seen = []

    def on_chunk(step, state, infos):
        seen.append((step, int(state["count"]), infos.count.tolist()))

    train(bad_at(100), None, KEY, 6, chunk=3, on_chunk=on_chunk)
    assert seen == [(3, 3, [0, 1, 2]), (6, 6, [3, 4, 5])]


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_non_finite_step_stops_the_run_and_is_named(value):
    loop = bad_at(5, value) if value is jnp.nan else infinite_leaf_at(5)
    seen = []

    def on_chunk(step, state, infos):
        seen.append(step)
        return f"saved-{step}" if step == 2 else None

    with pytest.raises(NonFiniteError) as caught:
        train(loop, None, KEY, 8, chunk=2, on_chunk=on_chunk)
    error = caught.value
    assert (error.step, error.leaf, error.checkpoint) == (5, "['leaf']", "saved-2")
    for word in ("step 5", "['leaf']", "saved-2"):
        assert word in str(error)
    assert seen == [2, 4]


def infinite_leaf_at(step):
    loop = bad_at(step, jnp.inf)
    return Loop(lambda key: {**loop.init(key), "best": jnp.zeros(2)}, loop.step)


def test_non_finite_info_with_finite_state_has_no_leaf():
    def step(state, key, data):
        return state + 1, CountInfo(state, jnp.array([True, False]))

    with pytest.raises(NonFiniteError) as caught:
        train(Loop(lambda key: jnp.array(0), step), None, KEY, 2)
    assert (caught.value.step, caught.value.leaf, caught.value.checkpoint) == (
        0,
        None,
        None,
    )


def test_non_finite_error_crosses_processes():
    error = NonFiniteError(3, "['w']", "checkpoints/2", (".loss",))
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.step, str(again)) == (NonFiniteError, 3, str(error))


def test_check_finite_can_be_switched_off():
    _, infos = train(bad_at(5), None, KEY, 8, check_finite=False)
    assert infos.is_finite.sum() == 5


def test_inner_loop_that_diverges_names_the_parameters():
    def loss(params, batch, key):
        return jnp.sum((params["w"] ** 2 - batch) ** 2)

    task = Task(lambda key: {"w": jnp.ones(2)}, loss, lambda d, k: d, lambda p, d: {})
    with pytest.raises(NonFiniteError, match=r"state\.params\['w'\]") as caught:
        train(inner_loop(task, optax.sgd(10.0)), jnp.array(3.0), KEY, 40, chunk=20)
    assert caught.value.leaf == ".params['w']"


def test_progress_bar_says_compiling_first_and_goes_to_stderr(capsys):
    train(noisy_loop(), DATA, KEY, 4, chunk=2, progress="quadratic")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip().startswith("quadratic (compiling):   0%")
    assert "quadratic: 100%" in captured.err
    assert "4/4" in captured.err


def test_no_progress_writes_nothing(capsys):
    train(noisy_loop(), DATA, KEY, 4)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("num_steps", "chunk"), [(1, 1), (8, 1), (100, 5), (10_000, 500), (9973, 9973)]
)
def test_default_chunk_is_the_divisor_nearest_a_twentieth(num_steps, chunk):
    assert _default_chunk(num_steps) == chunk


def test_default_chunk_stays_near_a_thousand():
    assert _default_chunk(10**6) == 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, r"train\(num_steps=...\)` must be at least 1; .*=0"),
        ({"chunk": 3}, r"train\(chunk=...\)` must divide .* chunk=3, num_steps=4"),
        ({"chunk": 0}, r"train\(chunk=...\)"),
        ({"start": 4}, r"train\(start=...\)"),
        ({"start": -1}, r"train\(start=...\)"),
        ({"start": 2}, r"train\(state=...\)` must be given"),
        ({"key": jax.random.PRNGKey(0)}, r"train\(key=...\)"),
        ({"key": jax.random.split(KEY)}, r"train\(key=...\)"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    arguments = {"num_steps": 4, "key": KEY, **arguments}
    with pytest.raises(ValueError, match=message):
        train(noisy_loop(), DATA, **arguments)
