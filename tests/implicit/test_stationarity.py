import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from metax.base import BilevelProblem, Hyperparameter
from metax.implicit import implicit_hypergradient
from metax.tasks.ridge import diabetes_ridge, ridge_regression
from metax.tasks.ridge_solutions import best_weights, hypergradient
from tests.implicit import nonlinear

DATA = diabetes_ridge()
GRAM = DATA.train.x.T @ DATA.train.x / 300
CASES = [
    ("global", "weight_decay", -2.0),
    ("feature", "weight_decay", np.linspace(-3, 0, 10)),
    ("input_dropout", "rate", -1.0),
]


def natural(kind, lam):
    """The value and its derivative by the unconstrained coordinate."""
    if kind == "input_dropout":
        rate = jax.nn.sigmoid(lam)
        return rate, rate * (1 - rate)
    return jnp.exp(lam), jnp.exp(lam)


def on_ridge(lam, *, kind="global", name="weight_decay", w=None, **options):
    """dL_V/dλ at the closed-form optimum, chained to the unconstrained coordinate."""
    value, slope = natural(kind, lam)
    params = {"w": best_weights(DATA, lam, kind=kind) if w is None else w}
    problem = ridge_regression(10, kind=kind)
    run = lambda params, value, data: implicit_hypergradient(
        problem, params, {name: value}, *data, **options
    )
    # under jit: op by op, what is compiled would take most of the time
    gradient, info = jax.jit(run)(params, value, DATA)
    return gradient[name] * slope, info


def valid_gradient(w):
    x, y = DATA.valid
    return x.T @ (x @ w - y) / len(y)


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize(("kind", "name", "lam"), CASES)
def test_cg_of_full_length_is_the_closed_form(kind, name, lam, curvature):
    found, info = on_ridge(
        lam, kind=kind, name=name, iterations=10, curvature=curvature
    )
    expected = hypergradient(DATA, lam, kind=kind)
    assert found.shape == np.shape(lam)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-12)
    assert info.residual_norm < 1e-9
    assert info.iterations == 10


@pytest.mark.parametrize("iterations", [1, 20])
def test_neumann_converges_at_the_rate_of_each_direction(iterations):
    lam, alpha = -2.0, 0.3
    found, info = on_ridge(
        lam, solver="neumann", step_size=alpha, iterations=iterations
    )
    w, decay = best_weights(DATA, lam), jnp.exp(lam)
    eigenvalues, basis = jnp.linalg.eigh(GRAM + decay * jnp.eye(10))
    left = (1 - alpha * eigenvalues) ** (iterations + 1)
    v = basis @ ((1 - left) / eigenvalues * (basis.T @ valid_gradient(w)))
    np.testing.assert_allclose(found, -decay * w @ v, rtol=1e-9)
    residual = jnp.linalg.norm(left * (basis.T @ valid_gradient(w)))
    np.testing.assert_allclose(info.residual_norm, residual, rtol=1e-9)
    assert info.iterations == iterations


def test_damping_is_added_to_every_eigenvalue():
    lam, damping = -2.0, 0.7
    w, decay = best_weights(DATA, lam), jnp.exp(lam)
    expected = (
        -decay
        * w
        @ jnp.linalg.solve(GRAM + (decay + damping) * jnp.eye(10), valid_gradient(w))
    )
    for options in ({}, {"solver": "neumann", "step_size": 0.3}):
        found, _ = on_ridge(lam, damping=damping, iterations=200, **options)
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def dense_gauss_newton(problem, params, hparams, train, valid):
    """The definition with a matrix, for a loss log cosh (f - y) and a penalty."""
    flat, unravel = ravel_pytree(nonlinear.weights_of(params))
    full = lambda flat: {**params, **unravel(flat)}
    spread = nonlinear.spread(hparams, train)
    output = lambda flat: problem.predict(full(flat), train, spread, None)["prediction"]
    penalty = lambda flat: problem.train_loss(
        {"prediction": train["y"]}, train, spread, full(flat)
    ).mean()
    jacobian = jax.jacobian(output)(flat)
    by_output = jnp.diag(1 / jnp.cosh(output(flat) - train["y"]) ** 2 / 12)
    matrix = jacobian.T @ by_output @ jacobian + jax.hessian(penalty)(flat)
    value = lambda flat, h: nonlinear.valid_value(problem, full(flat), h, valid)
    inner = lambda flat, h: nonlinear.train_value(problem, full(flat), h, train)
    by_weights, direct = jax.grad(value, argnums=(0, 1))(flat, hparams)
    mixed = jax.jacobian(jax.grad(inner), argnums=1)(flat, hparams)
    v = jnp.linalg.solve(matrix, by_weights)
    return {name: direct[name] - v @ mixed[name] for name in hparams}


def test_gauss_newton_is_its_definition_where_it_is_not_the_hessian():
    data, problem = nonlinear.make_data(), nonlinear.problem()
    params = problem.init(jax.random.key(1))

    def both(params, hparams, data):
        arguments = (problem, params, hparams, data["train"], data["valid"])
        options = {"iterations": 40, "curvature": "gauss_newton"}
        found, _ = implicit_hypergradient(*arguments, **options)
        by_hessian, _ = implicit_hypergradient(*arguments, iterations=40)
        return found, dense_gauss_newton(*arguments), by_hessian

    found, expected, by_hessian = jax.jit(both)(params, nonlinear.HPARAMS, data)
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-8)
        # far from the optimum the Hessian is another matrix
        assert not np.allclose(by_hessian[name], found[name], rtol=1e-3)


def test_a_network_at_its_optimum_agrees_with_retraining_it():
    problem = nonlinear.problem()
    data, hparams = nonlinear.make_data(), nonlinear.HPARAMS
    start = {**problem.init(jax.random.key(0)), "mean": jnp.array([0.1, -0.2])}
    train = lambda data: nonlinear.trained(problem, start, hparams, data["train"])
    params = jax.jit(train)(data)

    def retrained(hparams):
        best = nonlinear.optimum(problem, params, hparams, data["train"], 4)
        return nonlinear.valid_value(problem, best, hparams, data["valid"])

    run = lambda params, hparams, data: implicit_hypergradient(
        problem, params, hparams, data["train"], data["valid"], iterations=50
    )
    found, info = jax.jit(run)(params, hparams, data)
    expected = nonlinear.central_differences(retrained, hparams)
    for name in hparams:
        # central differences with step 1e-5 in double precision: 1e-9 or so
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, atol=1e-8)
    assert info.residual_norm < 1e-12


def test_what_the_validation_loss_sees_directly_is_counted():
    # w* = mean(y) whatever the gain: the direct term is all there is.
    problem = BilevelProblem(
        init=lambda key: jnp.zeros(()),
        predict=lambda w, batch, hparams, key: (w * jnp.ones(3), hparams["gain"]),
        train_loss=lambda out, batch, hparams, w: 0.5 * (out[0] - batch) ** 2,
        valid_loss=lambda out, batch: jnp.mean(out[1] * out[0] * batch),
        sample_train=lambda data, key: data,
        sample_valid=lambda data, key: data,
        hparams={"gain": Hyperparameter(2.0)},
    )
    batch = jnp.array([1.0, 2.0, 6.0])
    found, _ = implicit_hypergradient(
        problem, jnp.array(3.0), {"gain": 2.0}, batch, batch, iterations=2
    )
    np.testing.assert_allclose(found["gain"], 3.0 * 3.0, rtol=1e-12)


def test_a_sweep_over_values_and_damping_is_a_vmap():
    lams, dampings = jnp.array([-3.0, 0.0, 2.0]), jnp.array([0.0, 0.1, 1.0])
    w = jax.vmap(lambda lam: best_weights(DATA, lam))(lams)

    def gradient(w, lam, damping, data):
        hparams = {"weight_decay": jnp.exp(lam)}
        found, info = implicit_hypergradient(
            ridge_regression(10), {"w": w}, hparams, *data, damping=damping
        )
        return found["weight_decay"], info.iterations

    sweep = jax.jit(jax.vmap(gradient, in_axes=(0, 0, 0, None)))
    found, iterations = sweep(w, lams, dampings, DATA)
    expected = [
        -np.linalg.solve(
            GRAM + (np.exp(lam) + damping) * np.eye(10), valid_gradient(np.array(w))
        )
        @ w
        for w, lam, damping in zip(w, lams, dampings, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert iterations.shape == (3,)


def test_single_precision_weights_in_double_precision_stay_single():
    params = {"w": best_weights(DATA, -2.0).astype(jnp.float32)}
    data = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), DATA)
    run = lambda params, value, data: implicit_hypergradient(
        ridge_regression(10),
        params,
        {"weight_decay": value},
        *data,
        damping=np.array(0.0),
    )
    found, info = jax.jit(run)(params, np.exp(np.float32(-2.0)), data)
    assert found["weight_decay"].dtype == info.residual_norm.dtype == jnp.float32
    expected = hypergradient(DATA, -2.0) / np.exp(-2.0)
    # rounding of float32 times a condition number of 30
    np.testing.assert_allclose(found["weight_decay"], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, r"iterations=\.\.\..*at least 1; got 0"),
        ({"damping": -0.1}, r"damping=\.\.\..*at least 0; got -0.1"),
        ({"solver": "neumann"}, r"step_size=\.\.\..*must be given"),
        ({"step_size": 0.1}, r"step_size=\.\.\..*must be given"),
        ({"solver": "neumann", "step_size": 0.0}, r"step_size=\.\.\..*above 0"),
        ({"solver": "lu"}, r"solver=\.\.\..*'cg' or 'neumann'; got 'lu'"),
        ({"curvature": "fisher"}, r"curvature=\.\.\..*got 'fisher'"),
        ({"key": jnp.zeros(2, jnp.uint32)}, r"key=\.\.\..*jax.random.key"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=rf"implicit_hypergradient\({message}"):
        on_ridge(-2.0, w=jnp.zeros(10), **options)
