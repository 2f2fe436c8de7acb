import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.tasks.dropout import dropout

KEY = jax.random.key(0)
SHAPES = ["element", "channel", "sequence"]


def is_kept(rate, *, shape, size=(2, 6, 5)):
    return np.asarray(dropout(jnp.ones(size), rate, KEY, shape=shape)) != 0


def test_what_is_kept_is_divided_by_the_chance_of_being_kept():
    x = jax.random.normal(KEY, (4, 50))
    rate = jnp.array([0.0, 0.25, 0.5, 0.9])
    y = dropout(x, rate, KEY)
    scaled = x / (1 - rate[:, None])
    np.testing.assert_allclose(y, jnp.where(y == 0, 0, scaled), rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rate", [0.0, jnp.zeros(3)])
def test_rate_zero_is_the_identity(shape, rate):
    x = jax.random.normal(KEY, (3, 4, 5))
    assert jnp.array_equal(dropout(x, rate, KEY, shape=shape), x)


@pytest.mark.parametrize("shape", SHAPES)
def test_rate_one_drops_everything_and_its_gradient_is_zero(shape):
    x = jax.random.normal(KEY, (3, 4, 5))
    loss = lambda x: jnp.sum(dropout(x, 1.0, KEY, shape=shape) ** 2)
    value, grad = jax.value_and_grad(loss)(x)
    assert value == 0
    assert jnp.array_equal(grad, jnp.zeros_like(x))


@pytest.mark.parametrize("shape", SHAPES)
def test_each_example_is_dropped_at_its_own_rate(shape):
    rate = jnp.array([0.0, 0.2, 0.7, 0.95])
    y = dropout(jnp.ones((4, 2, 20_000)), rate, KEY, shape=shape)
    # 20000 draws at least: a standard deviation of at most .0035
    np.testing.assert_allclose((y == 0).mean((1, 2)), rate, atol=0.015)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_mean_over_draws_is_the_input(shape):
    x = jnp.array([[[1.0, -2.0]], [[3.0, 0.5]]])
    keys = jax.random.split(KEY, 20_000)
    rate = jnp.array([0.1, 0.6])
    draw = lambda key: dropout(x, rate, key, shape=shape)
    mean = jax.vmap(draw)(keys).mean(0)
    # a standard deviation of |x| √(p / (1 - p) / 20000) = .026 at most; four of them
    np.testing.assert_allclose(mean, x, atol=0.1)


def test_elements_are_drawn_apart():
    kept = is_kept(0.5, shape="element", size=(2, 40, 40))
    assert 0 < kept[:, :, 0].mean() < 1
    assert not np.array_equal(kept[0], kept[1])


@pytest.mark.parametrize("size", [(3, 7, 40), (3, 4, 5, 40)])
def test_a_channel_is_kept_or_dropped_in_all_its_places(size):
    kept = is_kept(0.5, shape="channel", size=size).reshape(3, -1, 40)
    assert np.array_equal(kept, np.broadcast_to(kept[:, :1], kept.shape))
    assert 0 < kept[:, 0].mean() < 1
    assert not np.array_equal(kept[0], kept[1])


def test_a_feature_is_kept_or_dropped_at_all_times():
    kept = is_kept(0.5, shape="sequence", size=(3, 7, 40))
    assert np.array_equal(kept, np.broadcast_to(kept[:, :1], kept.shape))
    assert 0 < kept[:, 0].mean() < 1


def test_two_rates_under_one_key_drop_nested_sets():
    low, high = (is_kept(rate, shape="element", size=(2, 500)) for rate in (0.2, 0.6))
    assert np.all(low | ~high)


def test_no_gradient_reaches_the_rate():
    loss = lambda rate: dropout(jnp.ones((2, 30)), rate, KEY).sum()
    assert jnp.array_equal(jax.grad(loss)(jnp.array([0.3, 0.5])), jnp.zeros(2))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("rate_dtype", [jnp.float32, jnp.float64])
def test_the_dtype_of_the_input_is_kept(dtype, rate_dtype):
    rate = jnp.full(2, 0.3, rate_dtype)
    assert dropout(jnp.ones((2, 3), dtype), rate, KEY).dtype == dtype


def test_the_mask_is_the_same_in_every_precision():
    draws = [
        dropout(jnp.ones((2, 300), dtype), 0.3, KEY) != 0
        for dtype in (jnp.bfloat16, jnp.float32, jnp.float64)
    ]
    assert all(jnp.array_equal(draw, draws[0]) for draw in draws)


@pytest.mark.parametrize(
    ("x", "rate", "shape", "message"),
    [
        (jnp.ones((2, 3), int), 0.5, "element", "must be floating"),
        (jnp.ones(3), 0.5, "element", "at least 2 axes"),
        (jnp.ones((2, 3)), 0.5, "sequence", "at least 3 axes"),
        (jnp.ones((2, 3)), jnp.ones(3), "element", r"rate=.*got shape \[3\]"),
        (jnp.ones((2, 3)), 0.5, "row", "shape=.*got 'row'"),
    ],
)
def test_bad_arguments_are_named(x, rate, shape, message):
    with pytest.raises(ValueError, match=message):
        dropout(x, rate, KEY, shape=shape)


def test_raw_keys_are_refused():
    with pytest.raises(ValueError, match=r"dropout\(key=...\)"):
        dropout(jnp.ones((2, 3)), 0.5, jax.random.PRNGKey(0))
