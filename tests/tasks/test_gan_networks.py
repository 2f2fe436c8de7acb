import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.tasks.gan_networks import (
    Architecture,
    architectures,
    discriminate,
    generate,
    init_discriminator,
    init_generator,
)

SHAPES = {"mnist": (28, 28, 1), "cifar10": (32, 32, 3), "digits": (8, 8, 1)}


def both(architecture, shape, batch=3):
    """Parameters of the two networks and what they put out, as shapes."""

    def run(key):
        params_g = init_generator(key, architecture, shape)
        params_d = init_discriminator(key, architecture, shape)
        latent = jnp.zeros((batch, architecture.dim_z), jnp.float32)
        image = generate(params_g, latent, architecture)
        return params_g, params_d, image, discriminate(params_d, image, architecture)

    return jax.eval_shape(run, jax.random.key(0))


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_there_are_24_architectures_all_different_with_both_networks_alike():
    cells = architectures()
    assert len(set(cells)) == 24
    for cell in cells:
        assert cell.filters_g == cell.filters_d
        assert cell.batch_norm_g == cell.batch_norm_d
        assert cell.activation_g == cell.activation_d
    assert {cell.filters_g for cell in cells} == {32, 64, 128}
    assert {cell.dim_z for cell in cells} == {64, 128}


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("mnist", (*architectures(), Architecture())),
        ("cifar10", architectures()[2:4]),
        ("digits", architectures()[2:4]),
    ],
)
def test_every_architecture_makes_images_and_judges_them(name, cells):
    for architecture in cells:
        *params, image, logits = both(architecture, SHAPES[name])
        assert image.shape == (3, *SHAPES[name])
        assert logits.shape == (3,)
        leaves = jax.tree.leaves((params, image, logits))
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


def test_parameters_of_the_published_networks_are_counted_by_hand():
    params_g, params_d, *_ = both(Architecture(), SHAPES["mnist"])
    dense = (128 + 1) * 7 * 7 * 128
    assert size(params_g) == dense + (25 * 128 + 1) * 64 + (25 * 64 + 1)
    assert size(params_d) == (25 + 1) * 64 + (25 * 64 + 1) * 128 + 7 * 7 * 128 + 1
    params_g, params_d, *_ = both(Architecture(), SHAPES["cifar10"])
    layers = (25 * 256 + 1) * 128 + (25 * 128 + 1) * 64 + (25 * 64 + 1) * 3
    assert size(params_g) == (128 + 1) * 4 * 4 * 256 + layers
    layers = (25 * 3 + 1) * 64 + (25 * 64 + 1) * 128 + (25 * 128 + 1) * 256
    assert size(params_d) == layers + 4 * 4 * 256 + 1


def test_batch_norm_adds_no_parameters():
    plain, normed = (
        both(Architecture(batch_norm_g=on, batch_norm_d=on), SHAPES["mnist"])[:2]
        for on in (False, True)
    )
    assert size(plain) == size(normed)


def test_weights_begin_small_and_biases_at_zero():
    params = jax.jit(lambda key: init_generator(key, Architecture(), (8, 8, 1)))(
        jax.random.key(0)
    )
    assert np.isclose(params["dense"]["kernel"].std(), 0.02, rtol=0.02)  # 131072 draws
    biases = [params["dense"]["bias"], *(layer["bias"] for layer in params["layers"])]
    assert all(not bias.any() for bias in biases)


def test_a_transposed_convolution_is_the_adjoint_of_the_convolution():
    architecture = Architecture(filters_g=2, filters_d=2, dim_z=3)
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(5, 5, 1, 2)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(1, 8, 8, 1)), jnp.float32)
    y = jnp.asarray(rng.normal(size=(1, 4, 4, 2)), jnp.float32)
    dense_g = {"kernel": jnp.eye(32, dtype=jnp.float32), "bias": jnp.zeros(32)}
    last = {"kernel": kernel, "bias": jnp.zeros(1, jnp.float32)}

    @jax.jit
    def inner_products(small):
        # relu and tanh are the identity on what is positive, and to third order
        image = generate({"dense": dense_g, "layers": (last,)}, small, architecture)
        down = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        positive = jnp.abs(y)
        return jnp.vdot(x, jnp.arctanh(image)) / 1e-3, jnp.vdot(down, positive)

    left, right = inner_products(1e-3 * jnp.abs(y).reshape(1, 32).astype(jnp.float32))
    # float32 sums of 64 products
    np.testing.assert_allclose(left, right, rtol=1e-4)


def test_batch_norm_takes_the_statistics_of_the_batch_it_is_given():
    architecture = Architecture(4, 4, 3, batch_norm_g=True, batch_norm_d=True)

    @jax.jit
    def images(key, scale):
        params = init_generator(key, architecture, (8, 8, 1))
        params = jax.tree.map(lambda leaf: 50 * leaf, params)
        latent = jax.random.normal(key, (16, 3), jnp.float32)
        return generate(params, scale * latent, architecture)

    key = jax.random.key(0)
    # the epsilon of the variance is small beside it, and not nothing
    np.testing.assert_allclose(images(key, 1.0), images(key, 3.0), atol=1e-4)


@pytest.mark.parametrize(("activation", "slope"), [("relu", 0.0), ("leaky_relu", 0.2)])
def test_what_is_negative_is_cut_or_leaks(activation, slope):
    architecture = Architecture(
        1, 1, 3, activation_g=activation, activation_d=activation
    )
    ones = jnp.ones((5, 5, 1, 1), jnp.float32)
    below = {"kernel": jnp.zeros((3, 16)), "bias": jnp.full((16,), -1.0)}
    layer = {"kernel": ones, "bias": jnp.zeros(1)}
    image = generate(
        {"dense": below, "layers": (layer,)}, jnp.ones((1, 3)), architecture
    )
    # the first pixel is under one tap of one place
    np.testing.assert_allclose(image[0, 0, 0, 0], jnp.tanh(-slope), rtol=1e-6)
    dense = {"kernel": jnp.ones((16, 1)), "bias": jnp.zeros(1)}
    shifted = {"kernel": 0 * ones, "bias": jnp.full((1,), -1.0)}
    params = {"layers": (shifted,), "dense": dense}
    logits = discriminate(params, jnp.ones((1, 8, 8, 1)), architecture)
    np.testing.assert_allclose(logits, [-16 * slope], rtol=1e-6)
