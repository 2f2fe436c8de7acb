"""A step: whose random numbers, whose statistics, the warm-up and the bounds."""

import itertools
import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax import BilevelProblem, Hyperparameter, squared_norm
from metax.stn import best_response, delta_stn, natural_hparams

DECAY = Hyperparameter(0.1, 1e-3, 10.0, "log", 0.3)
KEY = jax.random.key(0)
DATA = {"x": np.linspace(-1, 1, 24).reshape(8, 3), "y": np.linspace(0, 2, 8)}


def predict(params, batch, hparams, key):
    return jnp.tanh(batch["x"] @ params["w"])


def train_loss(outputs, batch, hparams, params):
    return (outputs - batch["y"]) ** 2 + hparams["decay"] * squared_norm(params)


PROBLEM = BilevelProblem(
    init=lambda key: {"w": jnp.full(3, 0.1)},
    predict=predict,
    train_loss=train_loss,
    valid_loss=lambda outputs, batch: jnp.mean((outputs - batch["y"] / 2) ** 2),
    sample_train=lambda data, key: data,
    sample_valid=lambda data, key: data,
    hparams={"decay": DECAY},
)


def tuner(problem=PROBLEM, **options):
    rules = {
        "inner_optimizer": optax.sgd(0.1),
        "response_optimizer": optax.sgd(0.1),
        "outer_optimizer": optax.sgd(0.1),
        "perturbation": "batch",
    }
    return delta_stn(problem, **{**rules, **options})


def started(loop, value=0.3):
    """A state whose response is not 0."""
    state = loop.init(KEY)
    return state._replace(response=jax.tree.map(lambda x: x + value, state.response))


def noisy_predict(params, batch, hparams, key):
    x = batch["x"]
    x = x if key is None else x * jax.random.normal(key, x.shape)
    return predict(params, {"x": x}, hparams, key)


def test_general_weights_take_the_path_of_plain_sgd():
    """Same keys, λ at rest; bitwise op by op."""
    problem, rule = PROBLEM._replace(predict=noisy_predict), optax.sgd(0.1, 0.9)
    loop = tuner(problem, inner_optimizer=rule)
    fresh, keys = loop.init(KEY), jax.random.split(jax.random.key(5), 3)
    natural = {"decay": jnp.broadcast_to(natural_hparams(fresh)["decay"], 8)}

    def plain(params, opt_state, key):
        _, key_general, _ = jax.random.split(key, 3)

        def loss(params):
            outputs = noisy_predict(params, DATA, natural, key_general)
            return jnp.mean(train_loss(outputs, DATA, natural, params))

        gradient = jax.grad(loss)(params)
        updates, opt_state = rule.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state, state = fresh.params, rule.init(fresh.params), fresh
    for key in keys:
        params, opt_state = plain(params, opt_state, key)
        state, _ = loop.train_step(state, DATA, key)
    chex.assert_trees_all_equal(state.params, params)
    run = lambda s, d: jax.lax.scan(lambda s, k: loop.train_step(s, d, k), s, keys)
    compiled, _ = jax.jit(run)(fresh, DATA)
    chex.assert_trees_all_close(compiled.params, params, rtol=1e-12)


def states_of(loop, num_steps, data=DATA):
    """All states, from the one before the first step on, and the infos."""

    def step(state, key):
        after, info = loop.step(state, key, data)
        return after, (after, info)

    keys = jax.random.split(jax.random.key(1), num_steps)
    first = loop.init(KEY)
    _, (states, infos) = jax.jit(lambda s: jax.lax.scan(step, s, keys))(first)
    joined = jax.tree.map(lambda x, xs: np.stack([x, *xs]), first, states)
    return joined, infos


def test_warmup_leaves_lambda_and_sigma_and_trains_the_response():
    loop = tuner(scale_optimizer=optax.sgd(0.1), train_steps=2, warmup_steps=4)
    states, infos = states_of(loop, 4)
    assert states.count.tolist() == [0, 2, 4, 6, 8]
    assert infos.updated.tolist() == [False, False, True, True]
    assert np.isnan(infos.valid_loss[:2]).all()
    assert infos.is_finite.all()
    for tuned in (states.hparams["decay"], states.scale["decay"]):
        assert tuned[0] == tuned[1] == tuned[2]
        assert tuned[2] != tuned[3] != tuned[4]
    rescale = states.response["w"].rescale
    assert all((a != b).any() for a, b in itertools.pairwise(rescale))


def test_several_validation_steps_report_the_last():
    once, thrice = tuner(train_steps=1), tuner(train_steps=1, valid_steps=3)
    run = lambda data: [loop.step(started(loop), KEY, data) for loop in (once, thrice)]
    (one, _), (three, info) = jax.jit(run)(DATA)
    assert int(one.count) == int(three.count) == 1
    moved = natural_hparams(three)["decay"] / 0.1, natural_hparams(one)["decay"] / 0.1
    assert math.log(moved[0]) == pytest.approx(3 * math.log(moved[1]), rel=0.1)
    np.testing.assert_allclose(info.hparams["decay"], natural_hparams(three)["decay"])


def test_tuned_values_stay_at_their_bounds_and_it_shows():
    loop = tuner(
        PROBLEM._replace(
            hparams={"decay": DECAY, "rate": Hyperparameter(0.5, 0.0, 1.0, "logit")},
            train_loss=lambda *seen: train_loss(*seen) + 0 * seen[2]["rate"],
            # falls with either
            valid_loss=lambda outputs, batch: jnp.sum(outputs),
            predict=lambda params, batch, hparams, key: (
                predict(params, batch, hparams, key)
                - (hparams["rate"] if key is None else 0.0)
            ),
        ),
        scale_optimizer=optax.sgd(1e6),
        outer_optimizer=optax.sgd(1e6),
        entropy_weight=1e3,
        logit_bound=2.0,
    )
    state, info = jax.jit(loop.valid_step)(started(loop), DATA, KEY)
    low, high = math.log(1e-3), math.log(10.0)
    decay = float(state.hparams["decay"])
    assert decay in (pytest.approx(low), pytest.approx(high))
    assert float(state.hparams["rate"]) == 2.0
    np.testing.assert_allclose(info.scale["decay"], 3.0, rtol=1e-12)
    assert info.at_bound == {"decay": True, "rate": True}
    _, inside = jax.jit(tuner().valid_step)(started(tuner()), DATA, KEY)
    assert info.updated
    assert inside.at_bound == {"decay": False}


def test_predictor_moves_the_weights_with_lambda():
    loops = tuner(), tuner(predictor=True)
    state = started(loops[0])
    run = lambda state: [loop.valid_step(state, DATA, KEY)[0] for loop in loops]
    plain, moved = jax.jit(run)(state)
    chex.assert_trees_all_equal(plain.params, state.params)
    change = (plain.hparams["decay"] - state.hparams["decay"])[None]
    tangent = best_response(1).tangent(state.response, change)
    wanted = jax.tree.map(jnp.add, state.params, tangent)
    assert float(jnp.abs(tangent["w"]).max()) > 1e-4
    chex.assert_trees_all_close(moved.params, wanted, rtol=1e-12)


def test_coupled_passes_draw_the_same_numbers():
    problem = PROBLEM._replace(
        predict=noisy_predict, hparams={"decay": DECAY._replace(perturbation=1e-10)}
    )
    loops = [tuner(problem, couple_draws=couple) for couple in (True, False)]
    run = lambda data: [loop.train_step(started(loop), data, KEY)[1] for loop in loops]
    coupled, free = jax.jit(run)(DATA)
    assert abs(float(coupled.train_loss - coupled.response_loss)) < 1e-8
    assert abs(float(free.train_loss - free.response_loss)) > 1e-3


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(2)(x))
        return nn.Dense(1)(jnp.tanh(x)).squeeze(-1)


def normed_predict(params, batch, hparams, key):
    """Noise on the input: passes with other draws have other statistics."""
    held = jax.lax.stop_gradient((params["batch_stats"], params["passes"]))
    x = jnp.asarray(batch["x"], jnp.float32)
    if key is not None:
        x = x * jax.random.normal(key, x.shape, x.dtype)
    outputs, new = Normed().apply(
        {"params": params["params"], "batch_stats": held[0]},
        x,
        key is not None,
        mutable=["batch_stats"],
    )
    return {"y": outputs, **jax.lax.stop_gradient(new), "passes": held[1] + 1}


NORMED = PROBLEM._replace(
    init=lambda key: {**Normed().init(key, DATA["x"], False), "passes": jnp.zeros(())},
    predict=normed_predict,
    train_loss=lambda outputs, *rest: train_loss(outputs["y"], *rest),
    valid_loss=lambda outputs, batch: jnp.mean((outputs["y"] - batch["y"]) ** 2),
    carry=lambda params, outputs: {
        **params, "batch_stats": outputs["batch_stats"], "passes": outputs["passes"]
    },
)  # fmt: skip


@pytest.mark.parametrize("perturbation", ["example", "batch"])
def test_statistics_are_those_of_the_general_pass(perturbation):
    """One more pass is carried for each of the two steps, none for the response."""
    loop = tuner(NORMED, perturbation=perturbation, scale_optimizer=optax.sgd(0.1))

    def run(data):
        state = loop.init(KEY)
        key_general = jax.random.split(KEY, 3)[1]
        wanted = normed_predict(state.params, data, {}, key_general)["batch_stats"]
        trained, _ = loop.train_step(state, data, KEY)
        return state, wanted, trained, loop.valid_step(trained, data, KEY)[0]

    state, wanted, trained, validated = jax.jit(run)(DATA)
    stats = trained.params["batch_stats"]
    # float32, two programs
    chex.assert_trees_all_close(stats, wanted, rtol=1e-5, atol=1e-6)
    moved = (
        stats["BatchNorm_0"]["var"] - state.params["batch_stats"]["BatchNorm_0"]["var"]
    )
    assert float(jnp.abs(moved).min()) > 1e-3
    chex.assert_trees_all_equal(validated.params["batch_stats"], stats)
    assert (trained.params["passes"], validated.params["passes"]) == (1, 2)
