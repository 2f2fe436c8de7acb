import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.tasks.masked import MaskedDense, MaskedEmbed, dropconnect_mask, word_mask


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


@pytest.fixture
def dense():
    """A layer with its parameters, an input in float32, and a mask."""
    layer, x = MaskedDense(5, bias_init=nn.initializers.normal(1.0)), normal(0, 2, 3, 4)
    return layer, layer.init(jax.random.key(1), x), x, normal(2, 4, 5)


@pytest.fixture
def embed():
    layer, ids = MaskedEmbed(6, 4), jnp.array([[0, 5, 2], [2, 2, 1]])
    return layer, layer.init(jax.random.key(1), ids), ids


def test_dense_multiplies_the_masked_kernel(dense):
    layer, params, x, mask = dense
    kernel, bias = params["params"]["kernel"], params["params"]["bias"]
    wanted = np.einsum("bti,io->bto", *map(np.float64, (x, kernel * mask))) + bias
    y = layer.apply(params, x, mask)
    np.testing.assert_allclose(y, wanted, atol=1e-5)  # float32 sums
    assert y.dtype == kernel.dtype == jnp.float32


def test_dense_without_mask_is_that_of_flax(dense):
    layer, params, x, _ = dense
    np.testing.assert_allclose(
        layer.apply(params, x), nn.Dense(5).apply(params, x), atol=1e-6
    )
    ones = jnp.ones((4, 5), jnp.float32)
    np.testing.assert_array_equal(layer.apply(params, x, ones), layer.apply(params, x))


def test_dense_can_do_without_bias(dense):
    _, _, x, _ = dense
    params = MaskedDense(5, use_bias=False).init(jax.random.key(0), x)
    assert set(params["params"]) == {"kernel"}


def test_embed_and_attend_are_those_of_flax_on_the_same_table(embed):
    layer, params, ids = embed
    flax = nn.Embed(6, 4)
    np.testing.assert_array_equal(layer.apply(params, ids), flax.apply(params, ids))
    query = normal(3, 2, 3, 4)
    np.testing.assert_allclose(
        layer.apply(params, query, method="attend"),
        flax.apply(params, query, method="attend"),
        atol=1e-6,
    )


def test_a_masked_word_is_dropped_wherever_it_occurs_but_not_in_the_decoder(embed):
    layer, params, ids = embed
    mask = jnp.ones(6, jnp.float32).at[2].set(0).at[5].set(3)
    rows, plain = layer.apply(params, ids, mask), layer.apply(params, ids)
    assert jnp.all(rows[ids == 2] == 0)
    np.testing.assert_allclose(rows[0, 1], 3 * plain[0, 1], rtol=1e-6)
    np.testing.assert_array_equal(rows[0, 0], plain[0, 0])
    query = jnp.eye(4, dtype=jnp.float32)
    table = params["params"]["embedding"]
    got = layer.apply(params, query, method="attend")
    np.testing.assert_array_equal(got, table.T)


def test_layers_are_affine_in_each_parameter_slice_by_slice(dense, embed):
    """What a response that rescales the last axis of each parameter relies on."""
    for layer, params, *args in (dense, (*embed, jnp.arange(6.0))):
        y = layer.apply(params, *args)
        for name, leaf in params["params"].items():
            scale = normal(4, leaf.shape[-1])
            change = normal(5, *leaf.shape)
            call = lambda leaf, layer=layer, args=args, name=name, params=params: (
                layer.apply({"params": {**params["params"], name: leaf}}, *args)
            )
            step = call(leaf + change) - y
            moved = call(leaf + change * scale) - y
            np.testing.assert_allclose(moved, scale * step, atol=1e-5)  # float32


@pytest.mark.parametrize(
    "draw",
    [
        lambda key, rate: dropconnect_mask(key, (200, 300), rate),
        lambda key, rate: word_mask(key, 60_000, rate),
    ],
)
def test_masks_drop_by_the_rate_and_keep_the_mean(draw):
    mask = draw(jax.random.key(0), jnp.float32(0.3))
    assert mask.size == 60_000
    assert mask.dtype == jnp.float32
    kept = mask > 0
    # four standard deviations of 60 000 draws
    np.testing.assert_allclose(1 - kept.mean(), 0.3, atol=4 * (0.21 / 60_000) ** 0.5)
    np.testing.assert_allclose(mask[kept], 1 / 0.7, rtol=1e-6)
    np.testing.assert_array_equal(mask, draw(jax.random.key(0), jnp.float32(0.3)))
    assert jnp.any(mask != draw(jax.random.key(1), jnp.float32(0.3)))
    assert jnp.all(draw(jax.random.key(0), 0.0) == 1)


def test_no_gradient_goes_through_a_rate():
    total = lambda rate: (
        dropconnect_mask(jax.random.key(0), (3, 4), rate).sum()
        + word_mask(jax.random.key(0), 5, rate).sum()
    )
    assert jax.grad(total)(0.5) == 0


def test_bad_input_is_named(dense, embed):
    rates = jnp.full(3, 0.1)
    with pytest.raises(ValueError, match=r"dropconnect_mask\(rate=.*shared=True"):
        dropconnect_mask(jax.random.key(0), (2, 2), rates)
    with pytest.raises(ValueError, match=r"word_mask\(rate=.*\(3,\)"):
        word_mask(jax.random.key(0), 2, rates)
    layer, params, x, _ = dense
    with pytest.raises(ValueError, match=r"MaskedDense.*mask=.*\(4, 5\).*\(4, 1\)"):
        layer.apply(params, x, jnp.ones((4, 1)))
    layer, params, ids = embed
    with pytest.raises(ValueError, match=r"MaskedEmbed.*mask=.*\(6,\)"):
        layer.apply(params, ids, jnp.ones((6, 4)))
