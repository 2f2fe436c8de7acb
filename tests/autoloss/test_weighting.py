import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.autoloss.weighting import (
    dynamic_weight_average,
    grad_norm,
    random_weights,
    uncertainty_weighting,
)
from tests.autoloss.observations import decisions, script

RULES = {
    "uncertainty_weighting": uncertainty_weighting,
    "dynamic_weight_average": dynamic_weight_average,
    "random_weights": random_weights,
    "grad_norm": grad_norm,
}


def weights(policy, seen):
    """The weights of each step, those of the first before anything was seen."""

    @jax.jit
    def run(seen):
        def step(state, observation):
            state, decision = policy.act(state, jax.random.key(0))
            return policy.observe(state, observation), decision.weights

        return jax.lax.scan(step, policy.init(), seen)[1]

    return np.array(run(seen))


def all_fresh(num_steps):
    seen = script(num_steps, 3)
    return seen._replace(refreshed=jnp.ones((num_steps, 3), bool))


@pytest.mark.parametrize("name", RULES)
def test_every_rule_weighs_the_losses_of_one_action(name):
    policy = RULES[name](3, action=1)
    seen = jax.tree.map(lambda leaf: leaf[0], all_fresh(1))
    made = decisions(policy, 4, seen)
    assert made.action.tolist() == [1, 1, 1, 1]
    assert made.weights.shape == (4, 3)
    assert (made.weights > 0).all()
    assert made.inputs.shape == (4, 0)
    wants = {"random_weights": "none", "grad_norm": "all"}
    assert policy.refresh == wants.get(name, "chosen")


def test_uncertainty_descends_its_objective():
    seen = all_fresh(5)
    got = weights(uncertainty_weighting(3, 0.1), seen)

    def objective(s, losses):
        return jnp.sum(jnp.exp(-s) * losses + s)

    slope, s = jax.jit(jax.grad(objective)), np.zeros(3)
    for t in range(5):
        np.testing.assert_allclose(got[t], np.exp(-s), rtol=1e-10)
        s = s - 0.1 * np.array(slope(s, seen.losses[t]))


def test_uncertainty_of_an_unmeasured_loss_stays():
    seen = all_fresh(3)._replace(refreshed=jnp.array([[True, False, True]] * 3))
    got = weights(uncertainty_weighting(3, 0.1), seen)
    assert (got[:, 1] == 1).all()
    assert (got[1:, 0] != 1).all()


def test_dynamic_weights_are_those_of_the_last_ratio():
    seen = all_fresh(5)
    got, losses = weights(dynamic_weight_average(3), seen), np.array(seen.losses)
    np.testing.assert_allclose(got[:2], 1)
    for t in range(2, 5):
        e = np.exp(losses[t - 1] / losses[t - 2] / 2)
        np.testing.assert_allclose(got[t], 3 * e / e.sum(), rtol=1e-10)


def test_random_weights_are_new_at_each_step_and_of_sum_m():
    made = decisions(random_weights(3), 200).weights
    np.testing.assert_allclose(made.sum(-1), 3)
    assert np.unique(np.array(made)[:, 0]).size == 200
    np.testing.assert_allclose(made.mean(0), 1, atol=0.2)


def test_grad_norm_follows_its_equation():
    seen, rate, alpha = all_fresh(6), 0.02, 1.5
    got = weights(grad_norm(3, alpha, rate), seen)
    first, w = np.array(seen.losses[0]), jnp.ones(3)
    for t in range(6):
        np.testing.assert_allclose(got[t], w, rtol=1e-10)
        rms, progress = np.array(seen.gradient_rms[t]), np.array(seen.losses[t]) / first
        target = np.mean(w * rms) * (progress / progress.mean()) ** alpha
        gap = lambda w, rms=rms, target=target: jnp.abs(w * rms - target).sum()
        w = w - rate * jax.grad(gap)(w)
        w = 3 * w / w.sum()


def test_grad_norm_keeps_weights_above_zero():
    got = weights(grad_norm(3, 1.5, 50.0), all_fresh(6))
    assert (got > 0).all()
    np.testing.assert_allclose(got.sum(-1), 3, rtol=1e-10)


def test_learning_rates_may_be_traced():
    seen = all_fresh(3)

    def last(rate):
        policy = grad_norm(3, learning_rate=rate)
        state, _ = jax.lax.scan(
            lambda s, o: (policy.observe(s, o), None), policy.init(), seen
        )
        return state.weights

    both = jax.jit(jax.vmap(last))(jnp.array([0.0, 0.1]))
    np.testing.assert_allclose(both[0], 1)
    assert (both[1] != 1).all()


@pytest.mark.parametrize("name", RULES)
def test_arguments_out_of_range_are_refused(name):
    make = RULES[name]
    for arguments in ((0,), (2, -1.0)):
        if len(arguments) == 2 and name == "random_weights":
            continue
        with pytest.raises(ValueError, match=rf"`{name}\("):
            make(*arguments)
    with pytest.raises(ValueError, match=rf"`{name}\(action="):
        make(2, action=-1)
