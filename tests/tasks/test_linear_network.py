import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.tasks.linear_network import (
    TwoLayerLinear,
    network_params,
    network_response,
    row_rescaling,
    two_layer_regression,
)
from metax.tasks.ridge import diabetes_ridge
from metax.tasks.ridge_solutions import best_weights, response, validation_loss
from tests.tasks.test_ridge import train_loss

DATA = diabetes_ridge()
LAM = -1.5


def composed(params):
    """The weights of the one linear map that the network is."""
    layers = params["params"]
    return (layers["first"]["kernel"] @ layers["second"]["kernel"])[:, 0]


def with_rows_scaled(params, scale):
    layers = params["params"]
    kernel = layers["first"]["kernel"] * scale
    return {"params": {**layers, "first": {"kernel": kernel}}}


def mean_loss(problem, params, lam):
    hparams = {"weight_decay": jnp.exp(lam)}
    return train_loss(problem, params, hparams, DATA.train).mean()


@pytest.mark.parametrize("lam", [-6.0, LAM, 2.0])
def test_the_exact_network_is_ridge_regression(lam):
    params = network_params(DATA, lam)
    np.testing.assert_allclose(composed(params), best_weights(DATA, lam), atol=1e-12)
    problem = two_layer_regression(10)
    outputs = problem.predict(params, DATA.valid, {}, None)
    loss = problem.valid_loss(outputs, DATA.valid)
    np.testing.assert_allclose(loss, validation_loss(DATA, lam), rtol=1e-12)
    prediction = TwoLayerLinear(10).apply(params, DATA.valid.x)
    np.testing.assert_allclose(outputs[0], prediction, rtol=1e-12)


def test_the_best_row_scaling_is_that_of_ridge_regression():
    problem = two_layer_regression(10)
    start = network_params(DATA, 3.0)
    loss = lambda scale: mean_loss(problem, with_rows_scaled(start, scale), LAM)
    # quadratic in the scaling: one Newton step is the minimiser
    ones = jnp.ones(10)
    scale = ones - jnp.linalg.solve(jax.hessian(loss)(ones), jax.grad(loss)(ones))
    best = with_rows_scaled(start, scale)
    np.testing.assert_allclose(composed(best), best_weights(DATA, LAM), atol=1e-11)
    exact = network_params(DATA, LAM)["params"]["first"]["kernel"]
    np.testing.assert_allclose(best["params"]["first"]["kernel"], exact, atol=1e-11)


def test_the_exact_network_is_stationary_in_all_it_trains():
    problem = two_layer_regression(10)
    loss = lambda params: mean_loss(problem, params, LAM)
    gradient = jax.grad(loss)(network_params(DATA, LAM))
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_allclose(leaf, 0, atol=1e-13)


def test_the_second_layer_gets_no_gradient():
    problem = two_layer_regression(10)
    params = problem.init(jax.random.key(0))
    gradient = jax.grad(lambda params: mean_loss(problem, params, LAM))(params)
    assert not np.any(gradient["params"]["second"]["kernel"])
    assert np.all(gradient["params"]["first"]["kernel"])


def test_the_response_is_the_derivative_and_a_row_rescaling():
    tangent = network_response(DATA, LAM)
    exact = jax.jacobian(lambda lam: network_params(DATA, lam))(LAM)
    for found, expected in zip(
        jax.tree.leaves(tangent), jax.tree.leaves(exact), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-13)
    kernel = network_params(DATA, LAM)["params"]["first"]["kernel"]
    rescaled = kernel * row_rescaling(DATA, LAM)
    np.testing.assert_allclose(
        tangent["params"]["first"]["kernel"], rescaled, atol=1e-14
    )


@pytest.mark.parametrize("sigma", [0.0, 0.05, 1.0])
def test_the_composed_response_is_that_of_ridge_regression(sigma):
    layers = network_params(DATA, LAM)["params"]
    moved = layers["first"]["kernel"] * row_rescaling(DATA, LAM, sigma=sigma)
    np.testing.assert_allclose(
        (moved @ layers["second"]["kernel"])[:, 0],
        response(DATA, LAM, sigma=sigma),
        atol=1e-12,
    )


def test_each_example_is_penalised_with_its_own_weights():
    problem = two_layer_regression(10)
    trees = [network_params(DATA, lam) for lam in (-3.0, 0.0)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    batch = jax.tree.map(lambda leaf: leaf[:2], DATA.train)
    hparams = {"weight_decay": jnp.array([0.2, 3.0])}
    # each example through weights of its own, as a per-example response has it
    one = lambda params, row: jax.tree.map(
        lambda leaf: leaf[0],
        problem.predict(params, jax.tree.map(lambda leaf: leaf[None], row), {}, None),
    )
    outputs = jax.vmap(one)(stacked, jax.tree.map(jnp.asarray, batch))
    losses = problem.train_loss(outputs, batch, hparams, None)
    for i, tree in enumerate(trees):
        w = composed(tree)
        expected = 0.5 * (batch.x[i] @ w - batch.y[i]) ** 2
        expected += 0.5 * hparams["weight_decay"][i] * w @ w
        np.testing.assert_allclose(losses[i], expected, rtol=1e-12)


def test_the_batch_is_tiled_and_the_decay_has_its_bounds():
    problem = two_layer_regression(10, init=0.3, perturbation=0.7, draws=3)
    batch = problem.sample_train(DATA, jax.random.key(0))
    np.testing.assert_array_equal(batch.x[300:600], DATA.train.x)
    assert batch.y.shape == (900,)
    decay = problem.hparams["weight_decay"]
    assert decay == (0.3, 0.0, np.inf, "log", 0.7, False, False)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"draws=\.\.\..*got 0"):
        two_layer_regression(10, draws=0)
    with pytest.raises(ValueError, match=r"num_features=\.\.\..*got 0"):
        two_layer_regression(0)
