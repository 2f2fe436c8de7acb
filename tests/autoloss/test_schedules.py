import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.autoloss.controllers import bind, context_free
from metax.autoloss.features import released
from metax.autoloss.schedules import always, bernoulli, cycle, phases, threshold
from metax.autoloss.weighting import random_weights
from tests.autoloss.observations import decisions, follow, observation


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (always(2), [2, 2, 2, 2, 2, 2, 2]),
        (cycle((1, 1)), [0, 1, 0, 1, 0, 1, 0]),
        (cycle((1, 3)), [0, 1, 1, 1, 0, 1, 1]),
        (cycle((2, 1)), [0, 0, 1, 0, 0, 1, 0]),
        (cycle((0, 1, 2)), [1, 2, 2, 1, 2, 2, 1]),
    ],
)
def test_fixed_schedules_are_their_sequences(policy, expected):
    made = decisions(policy, 7)
    assert made.action.tolist() == expected
    assert not made.log_prob.any()
    assert made.inputs.shape == (7, 0)
    assert (policy.refresh, policy.observe_every) == ("none", None)


@pytest.mark.parametrize(("p", "shares"), [(0.3, [0.7, 0.3]), ([0.5, 0.2, 0.3], None)])
def test_bernoulli_takes_each_action_at_its_rate(p, shares):
    shares = np.array(p if shares is None else shares)
    made = decisions(bernoulli(jnp.array(p)), 1000)
    taken = np.bincount(made.action, minlength=shares.size) / 1000
    # standard deviation of a share: at most .016
    np.testing.assert_allclose(taken, shares, atol=0.065)
    np.testing.assert_allclose(made.log_prob, np.log(shares)[made.action], rtol=1e-10)


def test_bernoulli_at_its_ends_is_constant():
    for p in (0.0, 1.0):
        assert set(decisions(bernoulli(p), 20).action.tolist()) == {int(p)}


def test_a_sweep_over_probabilities_is_a_vmap():
    keys = jax.random.split(jax.random.key(0), 400)

    @jax.jit
    @jax.vmap
    def share(p):
        act = bernoulli(p).act
        return jax.vmap(lambda key: act((), key)[1].action)(keys).mean()

    shares = share(jnp.array([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(shares, [0, 0.5, 1], atol=0.1)


RULES = {
    # what is just above and just below a threshold of .5
    "S1": lambda x: {"metric": jnp.array(2 * (1 + x)), "losses": jnp.array([2.0, 0])},
    "S2": lambda x: {"metric": jnp.array(4.0), "losses": jnp.array([0, 4 * (1 + x)])},
    "S3": lambda x: {"gradient_rms": jnp.array([0.1, 0.1 * (1 + x)])},
}


@pytest.mark.parametrize("kind", RULES)
def test_thresholds_take_the_auxiliary_action_above_them(kind):
    policy = threshold(kind, 0.5)
    assert (policy.refresh, policy.observe_every) == ("all", 1)
    for ratio, action in ((0.51, 1), (0.49, 0), (-1.0, 0)):
        seen = observation(**RULES[kind](ratio))
        assert decisions(policy, 3, seen).action.tolist() == [0, action, action]


def test_thresholds_name_their_actions():
    policy = threshold("S3", 0.0, main=1, auxiliary=0)
    seen = observation(gradient_rms=jnp.array([2.0, 1.0]))
    assert decisions(policy, 2, seen).action.tolist() == [1, 0]


@pytest.mark.parametrize("kind", RULES)
def test_a_denominator_of_zero_takes_the_main_action(kind):
    zeros = {"metric": jnp.array(0.0), "gradient_rms": jnp.array([0.0, 1.0])}
    if kind == "S1":
        zeros["metric"] = jnp.array(1.0)
    seen = observation(losses=jnp.array([0.0, 1.0]), **zeros)
    assert decisions(threshold(kind, 0.0), 2, seen).action.tolist() == [0, 0]


def test_a_sweep_over_thresholds_is_a_vmap():
    seen = observation(gradient_rms=jnp.array([1.0, 3.0]))

    @jax.vmap
    def action(th):
        policy = threshold("S3", th)
        state = policy.observe(policy.init(), seen)
        return policy.act(state, jax.random.key(0))[1].action

    assert action(jnp.array([1.0, 1.9, 2.1])).tolist() == [1, 1, 0]


@pytest.mark.parametrize("lengths", [(3, 2), (3, 2, 1)])
def test_phases_follow_each_other_and_the_last_goes_on(lengths):
    policy = phases((always(0), cycle((1, 1)), always(2)), lengths)
    assert decisions(policy, 8).action.tolist() == [0, 0, 0, 0, 1, 2, 2, 2]


def test_a_single_phase_is_its_policy():
    assert decisions(phases((cycle((1, 1)),), ()), 3).action.tolist() == [0, 1, 0]


def test_a_later_phase_has_seen_the_whole_run():
    policy = phases((always(0), threshold("S3", 0.0)), (3,))
    seen = observation(gradient_rms=jnp.array([1.0, 2.0]))
    assert decisions(policy, 4, seen).action.tolist() == [0, 0, 0, 1]
    assert (policy.refresh, policy.observe_every) == ("all", 1)


def test_a_controller_may_be_a_phase():
    network = context_free(2)
    learned = bind(network, network.init(jax.random.key(0), 4), released("gan"))
    policy = phases((always(0), learned), (1,))
    assert (policy.refresh, policy.observe_every) == ("all", 500)
    step = lambda state, key: policy.act(state, key)
    keys = jax.random.split(jax.random.key(0), 20)
    _, made = follow(step, policy.init(), keys)
    assert set(made.action[1:].tolist()) == {0, 1}
    assert made.inputs.shape == (20, 0)
    np.testing.assert_allclose(made.log_prob, [0, *[np.log(0.5)] * 19], rtol=1e-10)


def test_phases_do_not_mix_weights_and_choices():
    policy = phases((always(0), random_weights(2)), (1,))
    with pytest.raises(ValueError, match=r"`phases\(policies=.*weights"):
        policy.act(policy.init(), jax.random.key(0))


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: always(-1), r"always\(action"),
        (lambda: cycle((1, -1)), r"cycle\(counts"),
        (lambda: cycle((0, 0)), r"cycle\(counts"),
        (lambda: bernoulli(1.5), r"bernoulli\(p"),
        (lambda: bernoulli(jnp.array([0.5, 0.6])), r"bernoulli\(p"),
        (lambda: threshold("S4", 0.0), r"threshold\(kind"),
        (lambda: threshold("S1", jnp.ones(2)), r"threshold\(th"),
        (lambda: threshold("S1", 0.0, main=-1), r"threshold\(main"),
        (lambda: phases((), ()), r"phases\(lengths"),
        (lambda: phases((always(0), always(1)), ()), r"phases\(lengths"),
        (lambda: phases((always(0), always(1)), (0,)), r"phases\(lengths"),
    ],
)
def test_arguments_out_of_range_are_refused(make, argument):
    with pytest.raises(ValueError, match=argument):
        make()
