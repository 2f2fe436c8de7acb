import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax.tasks import private_loss

KEY = jax.random.key(0)


def mean_loss(params, batch, key):
    """Linear regression with two tensors, so that clipping them jointly shows."""
    x, y = batch
    return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)


@pytest.fixture
def problem():
    keys = jax.random.split(KEY, 3)
    params = {"w": jax.random.normal(keys[0], (3,)), "b": jnp.array(0.5)}
    # some examples have tiny gradients, most must be clipped
    scales = jnp.array([1e-3, 0.1, 1.0, 10.0, 100.0, 0.0])
    x = jax.random.normal(keys[1], (6, 3)) * scales[:, None]
    y = x @ params["w"] + params["b"] + jnp.array([1e-2, 1e-3, 2.0, 1.0, 5.0, 0.0])
    return params, (x, y)


def per_example_grads(params, batch):
    one = lambda x, y: mean_loss(params, (x[None], y[None]), KEY)
    grad = jax.grad(lambda p, x, y: mean_loss(p, (x[None], y[None]), KEY))
    assert one(batch[0][0], batch[1][0]).shape == ()
    return jax.vmap(grad, in_axes=(None, 0, 0))(params, *batch)


def test_value_is_that_of_the_plain_loss(problem):
    private = private_loss(mean_loss, 1.0, 1.1)
    assert private(*problem, KEY) == mean_loss(*problem, KEY)
    assert jax.value_and_grad(private)(*problem, KEY)[0] == mean_loss(*problem, KEY)


@pytest.mark.parametrize("clip_norm", [1.0, 0.3])
def test_one_example_has_at_most_the_clip_norm_over_all_tensors(problem, clip_norm):
    private = private_loss(mean_loss, clip_norm, 0.0)
    params, batch = problem
    grad = jax.jit(jax.grad(private))
    for i in range(6):
        example = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch)
        norm = optax.tree.norm(grad(params, example, KEY))
        plain = optax.tree.norm(jax.grad(mean_loss)(params, example, KEY))
        assert norm <= clip_norm * (1 + 1e-6)
        np.testing.assert_allclose(norm, min(plain, clip_norm), rtol=1e-12)


def test_gradient_is_the_mean_of_the_clipped_ones(problem):
    grads = per_example_grads(*problem)
    norms = np.sqrt(np.sum(np.square(grads["w"]), 1) + np.square(grads["b"]))
    assert (norms > 1).any()
    assert (norms < 1).any()
    factors = 1 / np.maximum(norms, 1)
    expected = {
        "w": np.mean(factors[:, None] * np.asarray(grads["w"]), 0),
        "b": np.mean(factors * np.asarray(grads["b"])),
    }
    actual = jax.grad(private_loss(mean_loss, 1.0, 0.0))(*problem, KEY)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-12), actual, expected
    )


def test_without_clipping_and_noise_it_is_the_plain_gradient(problem):
    actual = jax.grad(private_loss(mean_loss, 1e9, 0.0))(*problem, KEY)
    plain = jax.grad(mean_loss)(*problem, KEY)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-10), actual, plain
    )


def test_noise_has_the_deviation_of_the_clip_norm_over_the_batch(problem):
    params, batch = problem
    noisy, clipped = (jax.grad(private_loss(mean_loss, 0.5, s)) for s in (1.1, 0.0))

    @jax.jit
    def differences(keys):
        return jax.vmap(
            lambda key: optax.tree.sub(
                noisy(params, batch, key), clipped(params, batch, key)
            )
        )(keys)

    noise = differences(jax.random.split(KEY, 4000))
    sample = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(noise)])
    # 16000 draws tell a standard deviation to 0.6 %, a mean to 0.8 % of it
    assert sample.std() == pytest.approx(1.1 * 0.5 / 6, rel=0.03)
    assert abs(sample.mean()) < 0.03 * 1.1 * 0.5 / 6
    # every tensor has noise of its own
    correlation = np.corrcoef(noise["w"][:, 0], noise["b"])[0, 1]
    assert abs(correlation) < 0.06


def test_a_cotangent_scales_the_gradient(problem):
    private = private_loss(mean_loss, 1.0, 1.1)
    grad = jax.grad(private)(*problem, KEY)
    tripled = jax.grad(lambda *args: 3 * private(*args))(*problem, KEY)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 3 * b), tripled, grad)


def test_forward_mode_is_refused(problem):
    private = private_loss(mean_loss, 1.0, 1.1)
    params, batch = problem
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda p: private(p, batch, KEY), (params,), (params,))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"private_loss\(clip_norm=...\).*got 0"):
        private_loss(mean_loss, 0, 1.1)
    with pytest.raises(ValueError, match=r"noise_multiplier=...\).*got -1"):
        private_loss(mean_loss, 1.0, -1)
