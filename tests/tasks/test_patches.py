import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metax.tasks.models
from metax.tasks import Conv, max_pool
from metax.tasks.patches import convolve_gray

KEY = jax.random.key(0)


def vdot(a, b):
    return sum(map(jnp.vdot, jax.tree.leaves(a), jax.tree.leaves(b)))


def variables_of(conv, x):
    """Weights of the right shapes in the dtype of `x`, without a compilation."""
    shapes = jax.eval_shape(conv.init, KEY, x)
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), x.dtype), shapes
    )


def derivatives(conv, x):
    """Value, gradient and Hessian-vector product of a curved function of the output."""

    def loss(at):
        return jnp.sum(jnp.sin(conv.apply(*at)))

    @jax.jit
    def compute(at, along):
        product = jax.grad(lambda at: vdot(jax.grad(loss)(at), along))(at)
        return conv.apply(*at), jax.grad(loss)(at), product

    at = (variables_of(conv, x), x)
    return compute(at, jax.tree.map(lambda leaf: leaf[::-1], at))


@pytest.mark.parametrize(
    ("kernel_size", "strides", "padding"),
    [
        (3, 1, "VALID"),
        ((2, 3), (3, 1), "VALID"),
        (3, 2, "SAME"),
        ((2, 3), (1, 3), "SAME"),
    ],
)
def test_all_ways_agree_in_value_gradient_and_hessian_vector_product(
    kernel_size, strides, padding
):
    x = jax.random.normal(KEY, (2, 8, 7, 3))
    conv = Conv(4, kernel_size, strides, padding, impl="lax")
    expected = jax.tree.leaves(derivatives(conv, x))
    assert all(np.abs(leaf).max() > 0 for leaf in expected)
    for impl in ("auto", "gemm"):
        found = jax.tree.leaves(derivatives(conv.clone(impl=impl), x))
        for leaf, lax in zip(found, expected, strict=True):
            np.testing.assert_allclose(leaf, lax, rtol=1e-10, atol=1e-10)


def test_they_agree_in_single_precision():
    x = jax.random.normal(KEY, (2, 8, 7, 3), jnp.float32)
    conv = Conv(4, 3, impl="gemm")
    for gemm, lax in zip(
        jax.tree.leaves(derivatives(conv, x)),
        jax.tree.leaves(derivatives(conv.clone(impl="lax"), x)),
        strict=True,
    ):
        assert gemm.dtype == lax.dtype == jnp.float32
        # sums of 60 products and more, 24 bits each, some of which cancel
        error = np.abs(np.subtract(gemm, lax)).max()
        assert error <= 1e-5 * np.abs(lax).max()


def test_forward_over_reverse_is_allowed():
    # what linear solvers of implicit differentiation ask for
    x = jax.random.normal(KEY, (1, 4, 4, 1))
    conv = Conv(1, 2, impl="gemm")
    variables = variables_of(conv, x)

    @jax.jit
    def compute(variables):
        grad = jax.grad(lambda variables: jnp.sum(conv.apply(variables, x) ** 2))
        return jax.jvp(grad, (variables,), (variables,))[1], grad(variables)

    # quadratic and homogeneous, so H v at v is the gradient
    for product, grad in zip(*map(jax.tree.leaves, compute(variables)), strict=True):
        np.testing.assert_allclose(product, grad, rtol=1e-12)


def test_convolution_is_the_sum_over_the_patch():
    x = jax.random.normal(KEY, (2, 6, 5, 3))
    conv = Conv(4, (3, 2), strides=(2, 1), impl="gemm")
    variables = variables_of(conv, x)
    kernel, bias = (np.asarray(variables["params"][n]) for n in ("kernel", "bias"))
    x = np.asarray(x)
    expected = np.zeros((2, 2, 4, 4))
    for i in range(2):
        for j in range(4):
            patch = x[:, 2 * i : 2 * i + 3, j : j + 2]
            expected[:, i, j] = np.einsum("buvc,uvco->bo", patch, kernel) + bias
    np.testing.assert_allclose(jax.jit(conv.apply)(variables, x), expected, rtol=1e-10)


def test_kernels_begin_glorot_uniform_and_biases_zero():
    params = jax.jit(Conv(32, 5).init)(KEY, jnp.zeros((1, 8, 8, 16)))["params"]
    assert params["kernel"].shape == (5, 5, 16, 32)
    assert params["kernel"].dtype == jnp.float32
    # fans are positions times channels
    bound = np.sqrt(6 / (25 * 16 + 25 * 32))
    largest = float(jnp.abs(params["kernel"]).max())
    # 12800 uniform draws come within 1 % of their bound
    assert 0.99 * bound < largest <= bound
    assert params["bias"].tolist() == [0.0] * 32


def test_on_the_cpu_auto_unfolds_gray_images(monkeypatch):
    def program():
        x = jnp.zeros((1, 4, 4, 1))
        conv = Conv(2, 3)
        return str(jax.make_jaxpr(lambda key: conv.init_with_output(key, x))(KEY))

    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert "conv_general" not in program()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "conv_general" in program()


def test_gradient_of_max_pool_does_not_compare_what_was_computed_twice():
    """Behind a normalisation that is fused into two programs, rounded differently."""

    def loss(x, kernel):
        conv = lambda x: jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = conv(x)
        spread = jnp.square(y - y.mean((0, 1, 2))).mean((0, 1, 2))
        y = (y - y.mean((0, 1, 2))) * jax.lax.rsqrt(spread + 1e-5)
        return jnp.sum(jnp.sin(conv(max_pool(y, 2))))

    x = jax.random.normal(jax.random.key(0), (10, 32, 32, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 3))
    grads = {
        dtype: jax.jit(jax.grad(loss))(x.astype(dtype), kernel.astype(dtype))
        for dtype in (jnp.float32, jnp.float64)
    }
    error = jnp.abs(grads[jnp.float32] - grads[jnp.float64]).max()
    # sums of some thousand products in single precision
    assert error < 1e-4 * jnp.abs(grads[jnp.float64]).max()


@pytest.mark.parametrize(("size", "shape"), [(2, (7, 6)), (3, (6, 8)), (1, (2, 2))])
def test_max_pool_is_the_windowed_maximum(size, shape):
    x = jax.random.normal(KEY, (2, *shape, 3))
    expected = nn.max_pool(x, (size, size), (size, size))
    assert (max_pool(x, size) == expected).all()


def test_derivatives_of_max_pool_are_those_of_the_windowed_maximum():
    x, along = jax.random.normal(KEY, (2, 2, 7, 6, 3))

    def derivatives(pool):
        loss = lambda x: jnp.sum(jnp.sin(pool(x)))
        gradient = jax.grad(loss)
        curved = jax.grad(lambda x: jnp.vdot(gradient(x), along))
        return gradient(x), jax.jvp(gradient, (x,), (along,))[1], curved(x)

    @jax.jit
    def both():
        windowed = lambda x: nn.max_pool(x, (3, 3), (3, 3))
        return derivatives(lambda x: max_pool(x, 3)), derivatives(windowed)

    for ours, theirs in zip(*both(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)
        assert np.abs(theirs).max() > 0


def test_among_equal_entries_one_has_the_gradient_of_max_pool():
    gradient = jax.grad(lambda x: max_pool(x, 2).sum())(jnp.ones((1, 2, 2, 1)))
    assert sorted(gradient.ravel().tolist()) == [0, 0, 0, 1]


def test_what_is_not_a_number_is_not_lost_in_max_pool():
    x = jnp.zeros((1, 2, 4, 1)).at[0, 1, 1].set(jnp.nan)
    assert jnp.isnan(max_pool(x, 2)).ravel().tolist() == [True, False]


def test_models_reaches_both_names():
    assert metax.tasks.models.Conv is Conv
    assert metax.tasks.models.max_pool is max_pool


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"Conv\(impl=...\).*'lax'; got 'fft'"):
        Conv(2, 3, impl="fft")
    with pytest.raises(ValueError, match=r"Conv\(padding=...\).*got 'CIRCULAR'"):
        Conv(2, 3, padding="CIRCULAR")
    with pytest.raises(ValueError, match=r"max_pool\(size=...\).*got 0"):
        max_pool(jnp.zeros((1, 2, 2, 1)), 0)


@pytest.mark.parametrize(("padding", "stride"), [(2, 1), (1, 2), (0, 1)])
def test_a_convolution_of_one_channel_is_that_of_flax(padding, stride):
    x = jax.random.normal(jax.random.key(0), (2, 9, 8, 1))
    how = {"strides": stride, "padding": padding, "param_dtype": jnp.float64}
    plain = nn.Conv(3, (5, 3), **how)
    ours = nn.Conv(3, (5, 3), conv_general_dilated=convolve_gray, **how)

    @jax.jit
    def difference(key):
        params = plain.init(key, x)
        value = lambda model: jax.value_and_grad(
            lambda p: jnp.sum(jnp.sin(model.apply(p, x)))
        )(params)
        return jax.tree.map(jnp.subtract, value(plain), value(ours))

    for leaf in jax.tree.leaves(difference(jax.random.key(1))):
        np.testing.assert_allclose(leaf, 0, atol=1e-12)
