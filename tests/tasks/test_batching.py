from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax import Loop, Task, inner_loop, unroll
from metax.tasks import Dataset, Split, epochs, minibatch

KEY = jax.random.key(0)


class SeenInfo(NamedTuple):
    label: jax.Array
    key: jax.Array
    is_finite: jax.Array


def counting_loop(num, traces=None):
    """Counts how often each of `num` labels was seen."""

    def step(state, key, batch):
        if traces is not None:
            traces.append(batch.label.shape)
        np.testing.assert_equal(batch.image.shape[0], batch.label.shape[0])
        info = SeenInfo(batch.label[0], jax.random.key_data(key), batch.label[0] != 3)
        return state.at[batch.label].add(1), info

    return Loop(init=lambda key: jnp.zeros(num, int), step=step)


def numbered(num):
    label = jnp.arange(num)
    split = Split(image=label[:, None, None, None] * jnp.ones((2, 2, 1)), label=label)
    return Dataset(train=split, test=split)


def linear_task():
    """Least squares on whatever batch is handed in."""
    return Task(
        init=lambda key: jnp.zeros(3),
        loss=lambda w, batch, key: jnp.mean((batch.image @ w - batch.label) ** 2),
        sample=lambda data, key: data,
        evaluate=lambda w, data: {"error": jnp.abs(data.image @ w - data.label).max()},
    )


def linear_data(num):
    x = jax.random.normal(jax.random.key(5), (num, 3))
    split = Split(image=x, label=x @ jnp.array([1.0, -2.0, 0.5]))
    return Dataset(train=split, test=split)


# --- minibatch -------------------------------------------------------------------


def test_minibatch_keeps_the_rows_of_all_leaves_together():
    data = {"a": jnp.arange(10), "b": (jnp.arange(10.0)[:, None] * jnp.ones(4),)}
    batch = jax.jit(minibatch, static_argnums=2)(data, KEY, 6)
    assert batch["b"][0].shape == (6, 4)
    np.testing.assert_array_equal(batch["a"], batch["b"][0][:, 0])


def test_minibatch_draws_every_example_alike():
    draws = minibatch(jnp.arange(5), KEY, 50_000)
    # five standard deviations of a binomial frequency
    tolerance = 5 * (0.2 * 0.8 / 50_000) ** 0.5
    np.testing.assert_allclose(np.bincount(draws) / 50_000, 0.2, atol=tolerance)


def test_minibatch_follows_its_key():
    draw = lambda key: minibatch(jnp.arange(1000), key, 8)
    np.testing.assert_array_equal(draw(KEY), draw(KEY))
    assert not np.array_equal(draw(KEY), draw(jax.random.key(1)))


@pytest.mark.parametrize(
    ("data", "key", "size", "message"),
    [
        (jnp.arange(4), KEY, 0, r"minibatch\(size=...\)` must be at least 1; got 0"),
        (jnp.arange(4), jax.random.PRNGKey(0), 2, r"minibatch\(key=...\)`"),
        (
            (jnp.arange(4), jnp.arange(5)),
            KEY,
            2,
            r"got leading axes \[\(4,\), \(5,\)\]",
        ),
        (jnp.array(1.0), KEY, 2, "share a leading axis"),
        (jnp.zeros((0, 3)), KEY, 2, "share a leading axis of at least 1"),
        ((), KEY, 2, "share a leading axis"),
    ],
)
def test_minibatch_refuses_what_it_cannot_draw(data, key, size, message):
    with pytest.raises(ValueError, match=message):
        minibatch(data, key, size)


# --- epochs ----------------------------------------------------------------------


@pytest.mark.parametrize("num", [12, 13, 4])
def test_epoch_uses_each_example_once(num):
    loop = epochs(counting_loop(num), 4)
    seen, info = jax.jit(loop.step)(loop.init(KEY), KEY, numbered(num))
    np.testing.assert_array_equal(seen, np.ones(num))
    assert info.steps.label.shape == (-(-num // 4),)


def test_order_changes_from_epoch_to_epoch():
    loop = epochs(counting_loop(20), 4)
    seen, infos = unroll(loop, loop.init(KEY), jax.random.split(KEY, 3), numbered(20))
    np.testing.assert_array_equal(seen, 3 * np.ones(20))
    assert len({tuple(row) for row in infos.steps.label.tolist()}) == 3


def test_epoch_equals_its_steps_by_hand():
    data, rule = linear_data(11), optax.sgd(0.1)
    inner = inner_loop(linear_task(), rule)
    state, info = jax.jit(epochs(inner, 4).step)(inner.init(KEY), KEY, data)

    key_order, key_steps = jax.random.split(KEY)
    order = jax.random.permutation(key_order, 11)
    expected, losses, step = inner.init(KEY), [], jax.jit(inner.step)
    for i, rows in enumerate([order[:4], order[4:8], order[8:]]):
        batch = Split(*(leaf[rows] for leaf in data.train))
        expected, step_info = step(expected, jax.random.fold_in(key_steps, i), batch)
        losses.append(step_info.loss)
    np.testing.assert_allclose(state.params, expected.params, rtol=1e-12)
    np.testing.assert_allclose(info.steps.loss, jnp.stack(losses), rtol=1e-12)


@pytest.mark.parametrize(("num", "shapes"), [(12, {(4,)}), (14, {(4,), (2,)})])
def test_there_is_one_trace_a_batch_shape(num, shapes):
    traces = []
    loop = epochs(counting_loop(num, traces), 4)
    step = jax.jit(loop.step)
    for seed in range(3):
        step(loop.init(KEY), jax.random.key(seed), numbered(num))
    assert set(traces) == shapes
    assert len(traces) == len(shapes)


def test_steps_of_an_epoch_have_keys_of_their_own():
    loop = epochs(counting_loop(10), 3)
    _, info = loop.step(loop.init(KEY), KEY, numbered(10))
    assert len({tuple(key) for key in info.steps.key.tolist()}) == 4


def test_vmap_over_seeds_equals_each_seed_alone():
    loop, data = epochs(inner_loop(linear_task(), optax.sgd(0.1)), 4), linear_data(10)
    keys = jax.random.split(KEY, 3)
    states = jax.vmap(loop.init)(keys)
    together, infos = jax.jit(jax.vmap(loop.step, (0, 0, None)))(states, keys, data)
    step = jax.jit(loop.step)
    for i, key in enumerate(keys):
        alone, info = step(loop.init(key), key, data)
        np.testing.assert_allclose(together.params[i], alone.params, rtol=1e-12)
        np.testing.assert_allclose(infos.steps.loss[i], info.steps.loss, rtol=1e-12)


def test_metrics_are_those_of_the_state_after_the_epoch():
    task, data = linear_task(), linear_data(10)
    loop = epochs(
        inner_loop(task, optax.sgd(0.1)),
        4,
        evaluate=lambda state, test: task.evaluate(state.params, test),
    )
    state, info = loop.step(loop.init(KEY), KEY, data)
    expected = task.evaluate(state.params, data.test)
    np.testing.assert_array_equal(info.metrics["error"], expected["error"])


def test_one_step_that_is_not_finite_shows_in_the_epoch():
    loop, data = epochs(inner_loop(linear_task(), optax.sgd(0.1)), 4), linear_data(10)
    _, info = loop.step(loop.init(KEY), KEY, data)
    assert info.is_finite
    bad = data._replace(train=data.train._replace(label=data.train.label * jnp.inf))
    _, info = loop.step(loop.init(KEY), KEY, bad)
    assert not info.is_finite


def test_loop_without_a_finite_flag_counts_as_finite():
    inner = Loop(init=lambda key: jnp.zeros(()), step=lambda s, key, batch: (s, ()))
    loop = epochs(inner, 4)
    assert loop.step(loop.init(KEY), KEY, numbered(8))[1].is_finite


def test_data_are_gathered_by_batch_and_never_copied_whole():
    num, size = 4096, 64
    x = jax.ShapeDtypeStruct((num, 3), jnp.float32)
    split = Split(image=x, label=jax.ShapeDtypeStruct((num,), jnp.float32))
    loop = epochs(inner_loop(linear_task(), optax.sgd(0.1)), size)
    state = jax.eval_shape(loop.init, KEY)
    step = jax.jit(loop.step).lower(state, KEY, Dataset(split, split)).compile()
    memory = step.memory_analysis()
    image_bytes = num * 3 * 4
    # what remains is the permutation with its sort buffers
    assert memory.temp_size_in_bytes < image_bytes + 8 * num * 4
    assert f"f32[{num // size},{size},3]" not in step.as_text()


class TrainOnly(NamedTuple):
    train: Split


@pytest.mark.parametrize(
    ("data", "key", "message"),
    [
        (numbered(3), KEY, "got size=4, 3 examples"),
        (numbered(8).train, KEY, "must have a field `train`.*got Split"),
        (TrainOnly(numbered(8).train), KEY, "must have a field `test`"),
        (numbered(8), jax.random.PRNGKey(0), r"epochs\(...\).step\(key=...\)"),
        (TrainOnly(Split(jnp.zeros(8), jnp.zeros(9))), KEY, r"step\(data=...\).train"),
    ],
)
def test_epochs_refuse_what_they_cannot_run(data, key, message):
    loop = epochs(counting_loop(8), 4, evaluate=lambda state, test: {})
    with pytest.raises(ValueError, match=message):
        loop.step(loop.init(KEY), key, data)


def test_epochs_refuse_an_empty_batch():
    with pytest.raises(ValueError, match=r"`epochs\(size=...\)` must be at least 1"):
        epochs(counting_loop(8), 0)
