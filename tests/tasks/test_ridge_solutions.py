import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.tasks.ridge import diabetes_ridge, ridge_regression
from metax.tasks.ridge_solutions import (
    best_weights,
    hypergradient,
    joint_solution,
    optimum,
    response,
    validation_loss,
)
from tests.tasks.test_ridge import NAMES, natural, train_loss

DATA = diabetes_ridge()
VECTOR = np.random.default_rng(0).normal(-2, 0.7, 10)
CASES = [
    ("global", -2.0),
    ("feature", VECTOR),
    ("input_dropout", -1.0),
    ("input_dropout", VECTOR),
]


def distance(found, expected):
    return jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)


def normal_quadrature(sigma, points=40):
    """Nodes and weights of the expectation over ε ~ N(0, σ²), exact for our purpose."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    return sigma * nodes, weights / weights.sum()


def test_best_weights_and_response_are_those_of_the_reference():
    # the references of this file have six or seven decimals
    np.testing.assert_allclose(
        jnp.linalg.norm(best_weights(DATA, -2.0)), 0.5107063, atol=1e-7
    )
    jacobian = response(DATA, -2.0)
    np.testing.assert_allclose(jnp.linalg.norm(jacobian), 0.0586135, atol=1e-7)
    expected = [
        *(0.010794, 0.020424, -0.032045, -0.008259, 0.015679),
        *(0.01554, -0.00217, -0.004556, -0.035394, 0.006425),
    ]
    np.testing.assert_allclose(jacobian, expected, atol=1e-6)


def test_validation_loss_and_optimum_are_those_of_the_reference():
    best = optimum(DATA)
    np.testing.assert_allclose(best, -1.06, atol=5e-5)
    for lam, expected in [(best, 0.261521), (-6.0, 0.268935), (2.0, 0.348567)]:
        np.testing.assert_allclose(validation_loss(DATA, lam), expected, atol=5e-7)
    dropout = optimum(DATA, kind="input_dropout")
    np.testing.assert_allclose(dropout, -1.07, atol=5e-4)
    np.testing.assert_allclose(jax.nn.sigmoid(dropout), 0.2554, atol=5e-5)


@pytest.mark.parametrize("kind", ["global", "input_dropout"])
def test_nothing_is_better_than_the_optimum(kind):
    best = optimum(DATA, kind=kind)
    np.testing.assert_allclose(hypergradient(DATA, best, kind=kind), 0, atol=1e-14)
    losses = [validation_loss(DATA, lam, kind=kind) for lam in np.linspace(-9, 9, 37)]
    assert validation_loss(DATA, best, kind=kind) < min(losses)


def test_hypergradients_are_those_of_the_reference():
    np.testing.assert_allclose(hypergradient(DATA, -3.0), -0.00253012, atol=5e-9)
    np.testing.assert_allclose(hypergradient(DATA, 0.0), 0.01893716, atol=5e-9)


@pytest.mark.parametrize(("kind", "lam"), CASES)
def test_best_weights_minimise_the_training_loss(kind, lam):
    problem = ridge_regression(10, kind=kind, init=natural(kind, lam))
    hparams = {NAMES[kind]: natural(kind, jnp.asarray(lam))}
    mean = lambda w: train_loss(problem, {"w": w}, hparams, DATA.train).mean()
    gradient = jax.grad(mean)(best_weights(DATA, lam, kind=kind))
    np.testing.assert_allclose(gradient, 0, atol=1e-13)


@pytest.mark.parametrize(("kind", "lam"), CASES)
def test_response_is_the_derivative_of_the_best_weights(kind, lam):
    weights = lambda lam: best_weights(DATA, lam, kind=kind)
    found = response(DATA, lam, kind=kind)
    np.testing.assert_allclose(found, jax.jacobian(weights)(lam), atol=1e-13)
    step = 1e-5 * np.ones_like(lam)
    along = (weights(lam + step) - weights(lam - step)) / 2e-5
    total = found.sum(-1) if np.ndim(lam) else found
    np.testing.assert_allclose(total, along, atol=1e-9)


@pytest.mark.parametrize(("kind", "lam"), CASES)
def test_hypergradient_is_the_derivative_of_the_validation_loss(kind, lam):
    loss = lambda lam: validation_loss(DATA, lam, kind=kind)
    found = hypergradient(DATA, lam, kind=kind)
    np.testing.assert_allclose(found, jax.grad(loss)(lam), atol=1e-13)


@pytest.mark.parametrize(
    ("sigma", "bias", "split", "joint"),
    [
        (1e-3, 4.1e-8, 3.5e-7, 2.7e-7),
        (0.05, 1.0e-4, 8.7e-4, 6.6e-4),
        (0.1, 4.1e-4, 3.5e-3, 2.7e-3),
        (0.5, 1.02e-2, 8.1e-2, 6.4e-2),
        (1.0, 3.92e-2, 0.28, 0.23),
    ],
)
def test_biases_at_finite_sigma_are_those_of_the_reference(sigma, bias, split, joint):
    w0, phi = joint_solution(DATA, -2.0, sigma)
    truth = response(DATA, -2.0)
    # the table has two figures
    found = distance(w0, best_weights(DATA, -2.0)), distance(phi, truth)
    np.testing.assert_allclose(found, (bias, joint), rtol=0.04)
    learned = response(DATA, -2.0, sigma=sigma)
    np.testing.assert_allclose(distance(learned, truth), split, rtol=0.02)
    if sigma == 1.0:
        norms = jnp.linalg.norm(learned) * jnp.linalg.norm(truth)
        np.testing.assert_allclose(learned @ truth / norms, 0.987, atol=5e-4)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 1.0])
@pytest.mark.parametrize(
    ("kind", "lam"), [case for case in CASES if case[1] is not VECTOR]
)
def test_one_coordinate_learned_at_finite_sigma_is_stationary(kind, lam, sigma):
    problem = ridge_regression(10, kind=kind)
    nodes, weights = normal_quadrature(sigma)

    def objective(w0, phi):
        def loss(eps):
            hparams = {NAMES[kind]: natural(kind, lam + eps)}
            params = {"w": w0 + phi * eps}
            return train_loss(problem, params, hparams, DATA.train).mean()

        return weights @ jax.vmap(loss)(nodes)

    w, phi = (
        best_weights(DATA, lam, kind=kind),
        response(DATA, lam, sigma=sigma, kind=kind),
    )
    split = jax.grad(objective, argnums=1)(w, phi)
    joint = jax.grad(objective, argnums=(0, 1))(
        *joint_solution(DATA, lam, sigma, kind=kind)
    )
    np.testing.assert_allclose(split, 0, atol=1e-12)
    np.testing.assert_allclose(joint, 0, atol=1e-12)


def test_one_coordinate_a_feature_learned_at_finite_sigma_is_stationary():
    # On two features, so that the expectation is a small grid.
    data = jax.tree.map(lambda leaf: leaf[..., :2] if leaf.ndim > 1 else leaf, DATA)
    problem = ridge_regression(2, kind="feature")
    lam, sigma = jnp.array([-1.0, 0.5]), jnp.array([0.3, 0.8])
    w = best_weights(data, lam)
    nodes, weights = normal_quadrature(1.0, points=20)
    grid = sigma * jnp.stack(jnp.meshgrid(nodes, nodes), axis=-1).reshape(-1, 2)

    def objective(phi):
        def loss(eps):
            hparams = {"weight_decay": jnp.exp(lam + eps)}
            params = {"w": w + phi @ eps}
            return train_loss(problem, params, hparams, data.train).mean()

        return jnp.outer(weights, weights).ravel() @ jax.lax.map(loss, grid)

    gradient = jax.grad(objective)(response(data, lam, sigma=sigma))
    np.testing.assert_allclose(gradient, 0, atol=1e-12)


def test_small_sigma_gives_the_derivative_a_feature():
    # the error is of the order of σ²
    learned = response(DATA, VECTOR, sigma=1e-4)
    np.testing.assert_allclose(distance(learned, response(DATA, VECTOR)), 0, atol=1e-8)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"joint_solution\(lam=\.\.\.\).*scalar"):
        joint_solution(DATA, VECTOR, 0.1)
    with pytest.raises(ValueError, match=r"kind=\.\.\..*dropout"):
        best_weights(DATA, -1.0, kind="dropout")
