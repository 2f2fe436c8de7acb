import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.tasks.convolution import convolve

NAMES = ("NHWC", "HWIO", "NHWC")
WINDOWS = [
    ((5, 5), (1, 1), ((2, 2), (2, 2))),
    ((3, 2), (2, 1), ((0, 1), (2, 0))),
    ((1, 1), (2, 2), ((0, 0), (0, 0))),
    ((3, 2), (1, 1), ((0, 0), (0, 0))),
    ((1, 1), (1, 1), ((0, 0), (0, 0))),
]


def operands(size):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    return [(draw(2, 9, 8, 3), draw(*size, 3, 4)) for _ in range(2)]


def derivatives(conv, size):
    """First and second ones, by every order of forward and reverse, and batched."""
    (x, kernel), (dx, dk) = operands(size)
    loss = lambda x, k: jnp.sum(jnp.sin(conv(x, k)))
    gradient = jax.grad(loss, (0, 1))
    along = lambda x, k: jnp.sin(jax.jvp(loss, (x, k), (dx, dk))[1])
    curved = lambda x, k: sum(jnp.sin(g).sum() for g in gradient(x, k))
    pairs = jnp.stack([x, dx]), jnp.stack([kernel, dk])
    return (
        conv(x, kernel),
        gradient(x, kernel),
        jax.jvp(gradient, (x, kernel), (dx, dk)),
        jax.grad(along, (0, 1))(x, kernel),
        jax.grad(curved, (0, 1))(x, kernel),
        jax.vmap(gradient)(*pairs),
        jax.vmap(gradient, (0, None))(pairs[0], kernel),
        jax.grad(lambda k: jax.vmap(loss, (0, None))(pairs[0], k).sum())(kernel),
    )


@pytest.mark.parametrize(("size", "strides", "padding"), WINDOWS)
def test_all_derivatives_are_those_of_jax(size, strides, padding):
    ours = lambda x, k: convolve(x, k, strides, padding)
    jaxs = lambda x, k: jax.lax.conv_general_dilated(
        x, k, strides, padding, dimension_numbers=NAMES
    )

    @jax.jit
    def differences():
        found = derivatives(ours, size), derivatives(jaxs, size)
        return jax.tree.map(lambda a, b: jnp.abs(a - b).max(), *found)

    for difference in jax.tree.leaves(differences()):
        assert difference < 1e-12


def test_every_convolution_in_a_loop_is_of_the_form_that_is_fast_there():
    (x, kernel), _ = operands((3, 3))

    def train(conv):
        def step(at, _):
            loss = lambda at: jnp.sum(jnp.sin(conv(conv(*at), at[1][..., :3, :3])))
            change = jax.grad(lambda at: jax.jvp(loss, (at,), (at,))[1])(at)
            return jax.tree.map(jnp.subtract, at, change), None

        return lambda at: jax.lax.scan(step, at, length=2)[0]

    def forms(conv):
        text = jax.jit(train(conv)).lower((x, kernel[..., :3])).as_text()
        return set(re.findall(r"dim_numbers = (.*?), window", text))

    pads = ((1, 1), (1, 1))
    ours = forms(lambda x, k: convolve(x, k, (1, 1), pads))
    jaxs = forms(
        lambda x, k: jax.lax.conv_general_dilated(
            x, k, (1, 1), pads, dimension_numbers=NAMES
        )
    )
    assert ours == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}
    assert len(jaxs) > 1


def test_without_padding_an_image_gradient_does_not_run_over_padded_rows():
    x, kernel = jnp.ones((2, 12, 12, 16)), jnp.ones((5, 5, 16, 32))
    loss = lambda x: jnp.sum(jnp.sin(convolve(x, kernel, (1, 1), "VALID")))
    text = jax.jit(jax.grad(loss)).lower(x).as_text()
    pads = re.findall(r"pad = (\[\[.*?\]\])", text)
    assert sorted(pads) == ["[[0, 0], [0, 0]]", "[[0, 0], [4, 4]]"]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_bias_is_added(channels):
    (x, kernel), _ = operands((3, 2))
    x, kernel, bias = x[..., :channels], kernel[:, :, :channels], jnp.arange(4.0)

    def derivatives(conv):
        loss = lambda *at: jnp.sum(jnp.sin(conv(*at)))
        gradient = jax.grad(loss, (0, 1, 2))
        along = lambda *at: sum(jnp.sin(g).sum() for g in gradient(*at))
        return gradient(x, kernel, bias), jax.grad(along, (0, 1, 2))(x, kernel, bias)

    how = ((2, 1), ((0, 1), (2, 0)))
    inside = derivatives(lambda x, k, b: convolve(x, k, *how, bias=b))
    outside = derivatives(lambda x, k, b: convolve(x, k, *how) + b)
    for a, b in zip(*map(jax.tree.leaves, (inside, outside)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_under_vmap_no_convolution_is_a_grouped_one():
    pairs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *operands((3, 3)))
    loss = lambda x, k: jnp.sum(jnp.sin(convolve(x, k, (1, 1), "SAME")))
    for axes in [(0, 0), (0, None), (None, 0)]:
        at = [x if axis == 0 else x[0] for x, axis in zip(pairs, axes, strict=True)]
        run = jax.vmap(jax.grad(loss, (0, 1)), axes)
        text = jax.jit(run).lower(*at).as_text()
        groups = re.findall(r"(?:feature|batch)_group_count = (\d+)", text)
        assert set(groups) == {"1"}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("padding", ["SAME", "VALID", 1])
def test_in_a_flax_layer_it_is_flax_own(padding, channels):
    x = operands((3, 3))[0][0][..., :channels]
    how = {"padding": padding, "strides": 2, "param_dtype": jnp.float64}
    plain = nn.Conv(4, (3, 3), **how)
    ours = nn.Conv(4, (3, 3), conv_general_dilated=convolve, **how)
    params = plain.init(jax.random.key(0), x)
    np.testing.assert_allclose(
        ours.apply(params, x), plain.apply(params, x), atol=1e-12
    )


def test_gray_images_are_unfolded_whatever_the_padding_is_called():
    x = operands((3, 3))[0][0][..., :1]
    layer = nn.Conv(4, (3, 3), padding="SAME", conv_general_dilated=convolve)
    text = jax.jit(layer.init).lower(jax.random.key(0), x).as_text()
    assert "stablehlo.convolution" not in text
