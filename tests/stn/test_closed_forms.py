"""Against closed forms: ridge regression, a two-layer linear network, rest points."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from metax import unroll
from metax.stn import (
    DenseResponse,
    TiedRowResponse,
    best_response,
    delta_stn,
    natural_hparams,
    replace_hparams,
    response_jacobian,
    stn,
)
from metax.stn.hparams import make_space
from metax.stn.objectives import Objectives, noisy_gradient
from metax.stn.perturbation import Perturbation
from metax.tasks import ridge_solutions
from metax.tasks.linear_network import (
    network_params,
    network_response,
    row_rescaling,
    two_layer_regression,
)
from metax.tasks.ridge import diabetes_ridge, ridge_regression

DENSE = best_response(1, structure="dense")
STN = {"centered": False, "split": False, "linearized": False}
CENTERED = {"linearized": False}


@pytest.fixture(scope="module")
def data():
    return jax.tree.map(jnp.asarray, diabetes_ridge())


def objectives(problem, response, *, linearized=True, split=True):
    space = make_space(problem.hparams, "test", 50.0)
    perturb = Perturbation("batch", 1, False, space, response)
    return Objectives(problem, perturb, True, split, linearized, False)


def expected_minimiser(goal, params, phi, lam, sigma, batch):
    """Of the response objective with E_ε by Gauss-Hermite quadrature.

    The objective is quadratic in a Φ of fixed directions, so one Newton step is exact.
    Column k of Φ meets the noise of coordinate k alone, and the mean e^{σ²/2} of the
    others' e^ε: one coordinate is perturbed at a time, the others' λ raised by σ²/2.
    """
    h = lam.size
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    flat, unravel = ravel_pytree(phi)
    units = jnp.eye(h)
    eps = jnp.concatenate([node * sigma * units for node in nodes])
    lams = jnp.concatenate([lam + (1 - units) * sigma**2 / 2] * len(nodes))
    chances = jnp.repeat(weights / weights.sum(), h)

    def gradient(flat):
        def one(lam, e):
            weights, key = (params, unravel(flat)), jax.random.key(0)
            by_phi = noisy_gradient(goal, weights, (lam, e), batch, key)[2]
            return ravel_pytree(by_phi)[0]

        return chances @ jax.vmap(one)(lams, eps)

    value, hessian = jax.jit(lambda x: (gradient(x), jax.jacfwd(gradient)(x)))(flat)
    return unravel(flat - jnp.linalg.lstsq(hessian, value)[0])


def relative(got, wanted):
    return float(jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted))


@pytest.mark.parametrize("kind", ["global", "input_dropout"])
@pytest.mark.parametrize("sigma", [1e-3, 0.05, 0.5, 1.0])
def test_response_objective_is_minimised_by_the_closed_form(data, kind, sigma):
    goal = objectives(ridge_regression(10, kind=kind), DENSE)
    params = {"w": ridge_solutions.best_weights(data, -2.0, kind=kind)}
    phi = DENSE.init(jax.random.key(0), params)
    lam = jnp.array([-2.0])
    found = expected_minimiser(goal, params, phi, lam, sigma, data.train)
    columns = found["w"].columns[0]
    biased = ridge_solutions.response(data, -2.0, sigma=sigma, kind=kind)
    assert relative(columns, biased) < 1e-7  # a 10 x 10 solve
    true = ridge_solutions.response(data, -2.0, kind=kind)
    assert relative(columns, true) < {1e-3: 1e-5, 0.05: 1e-2}.get(sigma, 0.5)


@pytest.mark.parametrize("sigma", [0.05, 0.2])
def test_per_feature_decays_have_the_closed_form_response(data, sigma):
    response = best_response(10, structure="dense")
    goal = objectives(ridge_regression(10, kind="feature"), response)
    lam = -2.0 + 0.7 * jax.random.normal(jax.random.key(3), (10,))
    params = {"w": ridge_solutions.best_weights(data, lam)}
    phi = response.init(jax.random.key(0), params)
    found = expected_minimiser(goal, params, phi, lam, sigma, data.train)["w"].columns
    assert relative(found.T, ridge_solutions.response(data, lam, sigma=sigma)) < 1e-7
    true = ridge_solutions.response(data, lam)
    assert relative(found.T, true) < sigma**2  # about σ² / 5


def test_loop_learns_the_response_jacobian_of_ridge(data):
    loop = delta_stn(
        ridge_regression(10, init=math.exp(-2.0), perturbation=0.05),
        inner_optimizer=optax.sgd(0.3),
        # σ² (A + d) has its largest eigenvalue at .011; decayed, for single draws
        response_optimizer=optax.sgd(optax.exponential_decay(60.0, 2000, 0.02)),
        outer_optimizer=optax.sgd(0.0),
        perturbation="batch",
        response=DENSE,
        warmup_steps=10**6,
    )
    keys = jax.random.split(jax.random.key(1), 400)
    state = loop.init(jax.random.key(0))
    state, infos = jax.jit(lambda s, d: unroll(loop, s, keys, d))(state, data)
    chex.assert_trees_all_close(
        state.params["w"], ridge_solutions.best_weights(data, -2.0), rtol=1e-6
    )
    learned = response_jacobian(state)["weight_decay"]["w"]
    # the bias of σ = .05 (8.7e-4) and what is left of the noise
    assert relative(learned, ridge_solutions.response(data, -2.0)) < 1e-2
    assert bool(infos.is_finite.all())


@pytest.mark.parametrize("start", [-6.0, 2.0])
def test_lambda_converges_to_the_optimum_from_far_starts(data, start):
    """λ* = -1.06; the joint objective goes about .06 too far, as its solution does."""
    delta = tuned(data, start, {}, 0.004, 2500)
    assert abs(delta[-200:].mean() + 1.06) < 0.05
    joint = tuned(data, start, {"split": False, "linearized": False}, 0.004, 2500)
    assert 0.04 < -1.06 - joint[-200:].mean() < 0.1


def tuned(data, start, variant, inner_rate, num_steps):
    """λ after each step of the toy loop: 5 to 1, 16 draws of σ = .5, RMSprop .02."""
    loop = toy(start, variant, inner_rate)
    keys = jax.random.split(jax.random.key(1), num_steps)
    run = jax.jit(lambda s, d: unroll(loop, s, keys, d))
    _, infos = run(loop.init(jax.random.key(0)), data)
    return np.log(infos.hparams["weight_decay"])


def toy(start, variant, inner_rate, **options):
    problem = ridge_regression(10, init=math.exp(start), perturbation=0.5, draws=4)
    return delta_stn(
        problem,
        inner_optimizer=optax.sgd(inner_rate),
        response_optimizer=optax.sgd(inner_rate),
        outer_optimizer=optax.rmsprop(0.02, 0.99, 1e-8, eps_in_sqrt=False),
        perturbation="group",
        groups=4,
        response=DENSE,
        **variant,
        **options,
    )


@pytest.mark.parametrize(
    ("variant", "stable", "unstable"), [(STN, 0.011, 0.014), (CENTERED, 0.4, 0.5)]
)
def test_largest_stable_rate_at_minus_six(data, variant, stable, unstable):
    """Bounds .012 and .461, 37 apart: 2 / ((λ_max(A) + e^λ) · λ_max of the factor)."""
    ends = [final_loss(data, variant, rate) for rate in (stable, unstable)]
    assert ends[0] < 1
    assert not ends[1] < 1e6


def final_loss(data, variant, rate):
    loop = toy(-6.0, variant, rate, warmup_steps=10**6)
    keys = jax.random.split(jax.random.key(1), 300)
    run = jax.jit(lambda s, d: unroll(loop, s, keys, d))
    _, infos = run(loop.init(jax.random.key(0)), data)
    return float(infos.train_loss[-1])


def test_uncentred_stn_diverges_where_the_centred_one_converges(data):
    """At inner rate .05 from λ = -6, while λ is tuned."""
    assert abs(tuned(data, -6.0, CENTERED, 0.05, 1500)[-200:].mean() + 1.06) < 0.05
    loop = toy(-6.0, STN, 0.05)
    keys = jax.random.split(jax.random.key(1), 50)
    run = jax.jit(lambda s, d: unroll(loop, s, keys, d))
    _, infos = run(loop.init(jax.random.key(0)), data)
    assert not float(infos.train_loss[-1]) < 1e20


@pytest.mark.parametrize(
    ("lam", "sigma", "uncentred", "centred"),
    [
        ([-5.0], 1.0, 727.0, 1.0),
        ([-5.0], 0.1, 67650.0, 100.0),
        ([-2.890372] * 3, 1.0, 730.0, 1.0),
        ([-2.890372] * 6, 1.0, 2715.0, 1.0),
    ],
)
def test_condition_number_of_the_hyperparameter_factor(lam, sigma, uncentred, centred):
    """The Hessian of the joint objective of f = w, ½ f², is E[λ̄ λ̄ᵀ] itself."""
    for is_centred, wanted in ((False, uncentred), (True, centred)):
        values = jnp.linalg.eigvalsh(joint_hessian(jnp.array(lam), sigma, is_centred))
        np.testing.assert_allclose(values[-1] / values[0], wanted, rtol=1e-3)


def joint_hessian(lam, sigma, is_centred):
    h = lam.size
    problem = ridge_regression(1)._replace(
        init=lambda key: {"w": jnp.zeros(())},
        predict=lambda params, batch, hparams, key: params["w"] * batch,
        train_loss=lambda outputs, batch, hparams, params: 0.5 * outputs**2,
    )
    response = best_response(h, structure="dense")
    goal = objectives(problem, response, linearized=False, split=False)
    space = goal.perturbation.space
    goal = goal._replace(
        centered=is_centred,
        perturbation=goal.perturbation._replace(space=spread(space, h)),
    )
    params = {"w": jnp.zeros(())}
    weights = (params, {"w": DenseResponse(columns=jnp.zeros(h))})
    flat, unravel = ravel_pytree(weights)
    # sigma points: the mean of εεᵀ over them is σ² I
    points = jnp.concatenate([jnp.eye(h), -jnp.eye(h)]) * sigma * h**0.5

    def gradient(flat):
        one = lambda e: ravel_pytree(
            noisy_gradient(
                goal, unravel(flat), (lam, e), jnp.ones(1), jax.random.key(0)
            )[2]
        )[0]
        return jax.vmap(one)(points).mean(0)

    return jax.jacfwd(gradient)(flat)


def spread(space, h):
    return type(space)(space.names, ((h,),), space.specs)


@pytest.mark.parametrize(("weight", "wanted"), [(1e-3, 0.310), (1e-4, 0.098)])
def test_scale_comes_to_rest_at_the_root_of_tau_over_curvature(data, weight, wanted):
    loop = delta_stn(
        ridge_regression(10, init=math.exp(-1.06), perturbation=0.2),
        inner_optimizer=optax.sgd(0.0),
        response_optimizer=optax.sgd(0.0),
        outer_optimizer=optax.sgd(0.0),
        scale_optimizer=optax.adam(optax.linear_schedule(0.05, 0.001, 800)),
        entropy_weight=weight,
        response=best_response(1, structure="dense", route="columns"),
        valid_forward="linearized",
    )
    state = loop.init(jax.random.key(0))
    columns = ridge_solutions.response(data, -1.06)[None]
    state = state._replace(
        params={"w": ridge_solutions.best_weights(data, -1.06)},
        response={"w": DenseResponse(columns=columns)},
    )
    step = lambda state, key: loop.valid_step(state, data.valid, key)
    keys = jax.random.split(jax.random.key(1), 1200)
    _, infos = jax.jit(lambda state: jax.lax.scan(step, state, keys))(state)
    sigma = infos.scale["weight_decay"][-200:].mean()
    np.testing.assert_allclose(sigma, wanted, rtol=0.1)  # noise of single draws
    np.testing.assert_allclose(sigma, rest_point(data, weight), rtol=0.05)


def rest_point(data, weight):
    moved = data.valid.x @ ridge_solutions.response(data, -1.06)
    return jnp.sqrt(weight / jnp.mean(moved**2))


@pytest.mark.parametrize("sigma", [1e-3, 0.5])
def test_rows_represent_the_response_of_a_linear_network_exactly(data, sigma):
    lam = -2.0
    problem = two_layer_regression(10, init=math.exp(lam))
    response = best_response(1, structure=lambda path, leaf: "tied_row", select=first)
    params = network_params(data, lam)
    phi = response.init(jax.random.key(0), params)
    goal = objectives(problem, response)
    found = expected_minimiser(goal, params, phi, jnp.array([lam]), sigma, data.train)[
        "params"
    ]["first"]["kernel"]
    assert isinstance(found, TiedRowResponse)
    chex.assert_trees_all_close(
        found.rescale[:, 0], row_rescaling(data, lam, sigma=sigma), rtol=1e-7
    )
    if sigma == 1e-3:
        exact = found._replace(rescale=row_rescaling(data, lam)[:, None])
        got = response.tangent(
            {"params": {**phi["params"], "first": {"kernel": exact}}},
            jnp.ones(1),
            params,
        )
        chex.assert_trees_all_close(got, network_response(data, lam), rtol=1e-12)


def first(path, leaf):
    return path[1].key == "first"


def test_two_layer_network_learns_its_response_to_1e_4(data):
    """By the loop itself, row structure, float32."""
    lam = -2.0
    as32 = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    problem = two_layer_regression(10, init=math.exp(lam), perturbation=3e-3, draws=2)
    response = best_response(1, structure="tied_row", select=first)
    loop = delta_stn(
        problem,
        inner_optimizer=optax.sgd(0.0),
        response_optimizer=optax.chain(
            # the curvature of U_k is σ² g_k² c_k² (a_k + e^λ): one rate a row
            scale_rows(data, lam, 3e-3),
            optax.sgd(optax.exponential_decay(0.2, 1000, 1e-3)),
        ),
        outer_optimizer=optax.sgd(0.0),
        # pairs of ±ε: what float32 leaves of the gradient at the optimum cancels
        perturbation="group",
        groups=2,
        antithetic=True,
        response=response,
        warmup_steps=10**6,
    )
    state = loop.init(jax.random.key(0))
    params = as32(network_params(data, lam))
    state = state._replace(
        params=params, response=response.init(jax.random.key(0), params)
    )
    keys = jax.random.split(jax.random.key(1), 200)
    run = jax.jit(lambda state, data: unroll(loop, state, keys, data))
    state, _ = run(state, as32(data))
    learned = response_jacobian(state)["weight_decay"]["params"]["first"]["kernel"]
    wanted = network_response(data, lam)["params"]["first"]["kernel"]
    # what is left of the noise, and float32 sums over 300 examples
    assert relative(learned, wanted) < 1e-4


def scale_rows(data, lam, sigma):
    eigenvalues, basis = jnp.linalg.eigh(data.train.x.T @ data.train.x / 300)
    moment = basis.T @ (data.train.x.T @ data.train.y / 300) / eigenvalues
    shrunk = jax.nn.sigmoid(jnp.log(eigenvalues) - lam) * moment
    curvature = sigma**2 * shrunk**2 * (eigenvalues + math.exp(lam))
    return optax.stateless(
        lambda updates, params: jax.tree.map(
            lambda g: (g / curvature[:, None]).astype(g.dtype), updates
        )
    )


def test_noise_free_hypergradient_is_the_closed_form(data):
    loop = toy(-3.0, {}, 0.0)
    state = loop.init(jax.random.key(0))
    state = state._replace(
        params={"w": ridge_solutions.best_weights(data, -3.0)},
        response={"w": DenseResponse(ridge_solutions.response(data, -3.0)[None])},
    )
    _, info = loop.valid_step(state, data.valid, jax.random.key(1))
    got = float(info.hypergradient["weight_decay"])
    np.testing.assert_allclose(got, -0.00253012, rtol=1e-5)
    np.testing.assert_allclose(
        got, ridge_solutions.hypergradient(data, -3.0), rtol=1e-12
    )


def test_uncentred_weights_move_with_lambda_and_centred_ones_do_not(data):
    for make, moves in ((stn, True), (delta_stn, False)):
        loop = make(
            ridge_regression(10),
            inner_optimizer=optax.sgd(0.01),
            response_optimizer=optax.sgd(0.01),
            outer_optimizer=optax.sgd(0.1),
            perturbation="batch",
            response=DENSE,
        )
        state, _ = loop.step(loop.init(jax.random.key(0)), jax.random.key(1), data)
        moved = replace_hparams(state, {"weight_decay": 1.0})
        assert float(natural_hparams(moved)["weight_decay"]) == 1.0
        change = jnp.abs(loop.params(moved)["w"] - loop.params(state)["w"]).max()
        assert bool(change > 1e-6) == moves
