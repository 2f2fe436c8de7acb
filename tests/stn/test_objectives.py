"""The objectives, against the same written with a weight tree for each example."""

import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax import BilevelProblem, Hyperparameter, squared_norm
from metax.stn import best_response, constrain, delta_stn, entropy

SIZE, H, TAU = 4, 3, 0.05
SPECS = {
    "decay": Hyperparameter(0.3, 1e-3, 10.0, "log", 0.5),
    "gain": Hyperparameter(1.2, -3.0, 3.0, "linear", 0.3),
    "rate": Hyperparameter(0.3, 0.0, 0.9, "logit", 0.4),
}
SETTINGS = [
    setting
    for setting in itertools.product((False, True), repeat=3)
    if setting[0] or not setting[2]
]
RESPONSE = best_response(H)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(nn.Dense(2, param_dtype=float)(x))


def predict(params, batch, hparams, key):
    """Input dropout in training, a gain in both."""
    x = batch["x"]
    if key is not None:
        x = x * (jax.random.uniform(key, x.shape) > hparams["rate"][:, None])
    return hparams["gain"][:, None] * Net().apply(params, x)


def train_loss(outputs, batch, hparams, params):
    error = 0.5 * jnp.sum((outputs - batch["y"]) ** 2, 1)
    return error + 0.5 * hparams["decay"] * squared_norm(params)


def valid_loss(outputs, batch):
    return jnp.mean(jnp.sum(jnp.cos(outputs - batch["y"]), 1))


PROBLEM = BilevelProblem(
    init=lambda key: Net().init(key, jnp.ones((1, 3))),
    predict=predict,
    train_loss=train_loss,
    valid_loss=valid_loss,
    sample_train=lambda data, key: data,
    sample_valid=lambda data, key: data,
    hparams=SPECS,
)


def tuner(problem=PROBLEM, **options):
    """Every step is the negative gradient itself."""
    rules = {
        "inner_optimizer": optax.sgd(1.0),
        "response_optimizer": optax.sgd(1.0),
        "outer_optimizer": optax.sgd(1.0),
        "entropy_weight": TAU,
    }
    return delta_stn(problem, **{**rules, **options})


@pytest.fixture(scope="module")
def batch():
    key_x, key_y = jax.random.split(jax.random.key(7))
    x, y = jax.random.normal(key_x, (SIZE, 3)), jax.random.normal(key_y, (SIZE, 2))
    return {"x": x, "y": y}


def started(loop):
    """A state with a response that is not 0."""
    state = jax.jit(loop.init)(jax.random.key(0))
    leaves, treedef = jax.tree.flatten(state.response)
    draw = np.random.default_rng(1).standard_normal
    moved = [x + 0.3 * draw(x.shape) for x in leaves]
    return state._replace(response=treedef.unflatten(moved))


def vectors(state):
    sigma = jax.tree.map(jax.nn.softplus, state.scale)
    return state.space.flatten(state.hparams), state.space.flatten(sigma)


def natural(space, lam):
    """What every example of a batch sees at one λ."""
    values = constrain(SPECS, space.unflatten(lam))
    return {name: jnp.broadcast_to(x, SIZE) for name, x in values.items()}


def outputs_at(params, displacement, run, linearized):
    if linearized:
        return sum(jax.jvp(run, (params,), (displacement,)))
    return run(jax.tree.map(jnp.add, params, displacement))


def example_losses(space, weights, lams, etas, batch, key, linearized):
    """Of example i at its own λ_i and weights: the whole batch for each, then row i."""
    params, phi = weights

    def one(i, lam, eta):
        seen, displacement = natural(space, lam), RESPONSE.tangent(phi, eta)
        run = lambda params: predict(params, batch, seen, key)
        outputs = outputs_at(params, displacement, run, linearized)
        moved = jax.tree.map(jnp.add, params, displacement)
        return train_loss(outputs, batch, seen, moved)[i], outputs[i]

    return jax.vmap(one)(jnp.arange(SIZE), lams, etas)


def naive_train_gradients(setting, state, batch, key):
    """Losses of both passes and the gradients in w0 and Φ, as the objectives say."""
    centered, split, linearized = setting
    key_noise, key_general, key_response = jax.random.split(key, 3)
    lam, sigma = vectors(state)
    lams = lam + sigma * jax.random.normal(key_noise, (SIZE, H))
    etas = lams - lam if centered else lams

    def noisy(weights, key):
        seen = (state.space, weights, lams, etas, batch, key, linearized)
        return jnp.mean(example_losses(*seen)[0])

    def general(params):
        shift = RESPONSE.tangent(state.response, jnp.zeros(H) if centered else lam)
        now = jax.tree.map(jnp.add, params, shift)
        seen = natural(state.space, lam)
        outputs = predict(now, batch, seen, key_general)
        return jnp.mean(train_loss(outputs, batch, seen, now))

    weights = state.params, state.response
    if not split:
        loss, (by_params, by_phi) = jax.value_and_grad(noisy)(weights, key_general)
        return (loss, loss), by_params, by_phi
    loss, by_params = jax.value_and_grad(general)(state.params)
    noisy_phi = lambda phi: noisy((state.params, phi), key_response)
    response_loss, by_phi = jax.value_and_grad(noisy_phi)(state.response)
    return (loss, response_loss), by_params, by_phi


@pytest.mark.parametrize("setting", SETTINGS)
def test_training_step_follows_the_objective_of_its_setting(setting, batch):
    words = dict(zip(("centered", "split", "linearized"), setting, strict=True))
    loop, key = tuner(**words), jax.random.key(3)
    state = started(loop)
    run = lambda s, b: (
        loop.train_step(s, b, key),
        naive_train_gradients(setting, s, b, key),
    )
    (after, info), (losses, by_params, by_phi) = jax.jit(run)(state, batch)
    np.testing.assert_allclose((info.train_loss, info.response_loss), losses)
    moved = lambda old, new: jax.tree.map(jnp.subtract, old, new)
    chex.assert_trees_all_close(moved(state.params, after.params), by_params, atol=1e-9)
    by_response = moved(state.response, after.response)
    chex.assert_trees_all_close(by_response, by_phi, atol=1e-9)
    chex.assert_trees_all_equal(after.hparams, state.hparams)
    chex.assert_trees_all_equal(after.scale, state.scale)
    assert int(after.count) == 1
    assert not bool(info.updated)
    norms = info.grad_norm, info.response_grad_norm
    wanted = optax.tree.norm(by_params), optax.tree.norm(by_phi)
    np.testing.assert_allclose(norms, wanted)


def naive_valid_loss(state, lam, scale, eps_of, batch, centered, linearized):
    """L_V at (λ, σ), each example with a λ + ε of its own."""
    sigma = state.space.flatten(jax.tree.map(jax.nn.softplus, scale))
    lams = lam + eps_of(sigma)
    etas = lams - jax.lax.stop_gradient(lam) if centered else lams
    weights = state.params, state.response
    seen = (state.space, weights, lams, etas, batch, None, linearized)
    return valid_loss(example_losses(*seen)[1], batch)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("forward", ["nonlinear", "linearized"])
def test_noisy_validation_step_descends_in_lambda_and_sigma(centered, forward, batch):
    loop, key = (
        tuner(
            scale_optimizer=optax.sgd(1.0),
            centered=centered,
            linearized=False,
            valid_forward=forward,
        ),
        jax.random.key(3),
    )
    state = started(loop)
    z = jax.random.normal(key, (SIZE, H))

    def naive(lam, scale):
        eps_of, is_linear = lambda sigma: sigma * z, forward == "linearized"
        seen = (state, lam, scale, eps_of, batch, centered, is_linear)
        loss, sigma = naive_valid_loss(*seen), jax.tree.map(jax.nn.softplus, scale)
        return loss - TAU * entropy(sigma), loss

    def run(state, batch):
        gradients = jax.grad(naive, argnums=(0, 1), has_aux=True)
        return loop.valid_step(state, batch, key), gradients(
            vectors(state)[0], state.scale
        )

    (after, info), ((by_lam, by_scale), loss) = jax.jit(run)(state, batch)
    got = state.space.flatten(info.hypergradient)
    np.testing.assert_allclose(got, by_lam, rtol=1e-9)
    moved = jax.tree.map(jnp.subtract, state.scale, after.scale)
    chex.assert_trees_all_close(moved, by_scale, rtol=1e-9)
    np.testing.assert_allclose(info.valid_loss, loss, rtol=1e-9)
    sigma = jax.tree.map(jax.nn.softplus, after.scale)
    np.testing.assert_allclose(info.entropy, entropy(sigma), rtol=1e-12)
    chex.assert_trees_all_equal(after.params, state.params)
    chex.assert_trees_all_equal(after.response, state.response)
    assert bool(info.updated)


@pytest.mark.parametrize("centered", [True, False])
def test_noise_free_hypergradient_is_the_contraction_and_the_direct_term(
    centered, batch
):
    loop = tuner(centered=centered, linearized=False)
    state = started(loop)

    def by_parts(lam):
        shift = RESPONSE.tangent(state.response, lam * (not centered))
        now = jax.tree.map(jnp.add, state.params, shift)
        at = lambda params, lam: valid_loss(
            predict(params, batch, natural(state.space, lam), None), batch
        )
        by_params, direct = jax.grad(at, argnums=(0, 1))(now, lam)
        return RESPONSE.contract(state.response, by_params), direct

    def through_apply(lam):
        eta = lam - jax.lax.stop_gradient(lam) if centered else lam
        fn = lambda params: predict(params, batch, natural(state.space, lam), None)
        outputs = RESPONSE.apply(
            fn, state.params, state.response, jnp.broadcast_to(eta, (SIZE, H))
        )
        return valid_loss(outputs, batch)

    def run(state, batch):
        lam = vectors(state)[0]
        _, info = loop.valid_step(state, batch, jax.random.key(3))
        flat = state.space.flatten(info.hypergradient)
        return flat, by_parts(lam), jax.grad(through_apply)(lam)

    got, (indirect, direct), applied = jax.jit(run)(state, batch)
    assert direct.tolist()[0] == direct.tolist()[2] == 0.0
    assert min(abs(direct[1]), *jnp.abs(indirect)) > 1e-3
    np.testing.assert_allclose(got, indirect + direct, rtol=1e-12)
    np.testing.assert_allclose(got, applied, rtol=1e-9)
