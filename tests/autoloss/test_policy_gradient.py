import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.autoloss import Trajectory, controller, ppo_loss, reinforce_loss
from metax.autoloss.policy_gradient import (
    Buffer,
    Transition,
    advantages,
    clip_advantage,
    entropy,
    one_step_targets,
    push,
)

NET = controller(2, hidden=(3,), activation=jnp.tanh, critic_hidden=(3,))
PHI = NET.init(jax.random.key(0), 2)


def inputs_of(actions):
    """What is seen before each step: the last action, and how many have been."""
    last = jnp.concatenate([jnp.array([-1.0]), jnp.asarray(actions[:-1], float)])
    return jnp.stack([last, jnp.arange(len(actions)) / 2], axis=-1)


def reward_of(actions):
    """Prefers 1, and prefers a change."""
    actions = jnp.asarray(actions, float)
    return jnp.sum(actions) + 2 * jnp.sum(jnp.abs(jnp.diff(actions)))


def trajectory_of(actions, log_probs=None):
    steps = len(actions)
    return Trajectory(
        inputs=inputs_of(actions),
        actions=jnp.asarray(actions, jnp.int8),
        log_probs=jnp.zeros(steps) if log_probs is None else log_probs,
        rewards=jnp.zeros(steps),
        live=jnp.ones(steps, bool),
    )


def log_probs_of(phi, actions):
    logits = NET.logits(phi, inputs_of(actions))
    picked = jax.nn.log_softmax(logits)
    return picked[jnp.arange(len(actions)), jnp.asarray(actions)]


def sequences(steps):
    return [list(s) for s in itertools.product((0, 1), repeat=steps)]


def expected(phi, steps):
    """E[R] by enumeration."""
    return sum(
        jnp.exp(jnp.sum(log_probs_of(phi, a))) * reward_of(a) for a in sequences(steps)
    )


def test_the_gradient_is_that_of_the_enumerated_expectation():
    @jax.jit
    def run():
        wanted = jax.grad(lambda phi: expected(phi, 2))(PHI)
        found = jax.tree.map(jnp.zeros_like, PHI)
        for actions in sequences(2):
            chance = jnp.exp(jnp.sum(log_probs_of(PHI, actions)))
            grad = jax.grad(reinforce_loss)(
                PHI, NET, trajectory_of(actions), reward_of(actions)
            )
            found = jax.tree.map(lambda f, g, c=chance: f - c * g, found, grad)
        return found, wanted

    found, wanted = run()
    chex.assert_trees_all_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(wanted)) > 0.01


def test_sampled_episodes_estimate_it_within_their_standard_error():
    number, steps = 20_000, 3
    all_actions = jnp.array(sequences(steps))

    @jax.jit
    def run(key):
        chances = jnp.stack([jnp.sum(log_probs_of(PHI, a)) for a in sequences(steps)])
        drawn = all_actions[jax.random.categorical(key, chances, shape=(number,))]
        one = lambda a: jax.grad(reinforce_loss)(
            PHI, NET, trajectory_of(a), reward_of(a) - 2.0
        )["actor"]["layer_1"]["bias"]
        grads = jax.vmap(one)(drawn)
        wanted = jax.grad(lambda phi: -expected(phi, steps))(PHI)
        error = grads.std(0) / np.sqrt(number)
        return grads.mean(0), error, wanted["actor"]["layer_1"]["bias"]

    mean, error, wanted = run(jax.random.key(4))
    assert (jnp.abs(mean - wanted) < 3 * error).all()
    # tight enough to tell the sign
    assert (jnp.abs(wanted) > 10 * error).all()


def test_runs_step_rewards_and_reductions_combine_as_the_formula_says():
    key = jax.random.key(1)
    several = Trajectory(
        inputs=jax.random.normal(key, (2, 5, 2)),
        actions=jnp.array([[0, 1, 1, 0, 1], [1, 1, 0, 0, 0]], jnp.int8),
        log_probs=jnp.zeros((2, 5)),
        rewards=jnp.arange(10.0).reshape(2, 5) / 10,
        live=jnp.array([[True] * 5, [True] * 2 + [False] * 3]),
    )
    advantage = jnp.array([2.0, -1.0])

    @jax.jit
    def run():
        logits = NET.logits(PHI, several.inputs)
        log_probs = jax.nn.log_softmax(logits)
        of = lambda reduction: reinforce_loss(
            PHI,
            NET,
            several,
            advantage,
            entropy_coefficient=0.3,
            reduction=reduction,
        )
        by_step = reinforce_loss(
            PHI, NET, several, jnp.broadcast_to(advantage[:, None], (2, 5)),
            entropy_coefficient=0.3,
        )  # fmt: skip
        return log_probs, entropy(logits), of("sum"), of("mean"), by_step

    log_probs, spread, total, mean, by_step = run()
    sums = []
    for s in range(2):
        terms = [
            (advantage[s] + several.rewards[s, t])
            * log_probs[s, t, several.actions[s, t]]
            + 0.3 * spread[s, t]
            for t in range(5)
            if several.live[s, t]
        ]
        sums.append(sum(terms))
    np.testing.assert_allclose(total, -sum(sums) / 2, rtol=1e-12)
    np.testing.assert_allclose(mean, -(sums[0] / 5 + sums[1] / 2) / 2, rtol=1e-12)
    np.testing.assert_allclose(by_step, total, rtol=1e-12)


def test_ppo_at_ratio_one_has_the_gradient_of_reinforce():
    actions = [0, 1, 1]
    advantage = jnp.array([1.0, -2.0, 0.5])

    @jax.jit
    def run():
        trajectory = trajectory_of(actions, log_probs_of(PHI, actions))
        ppo = jax.grad(ppo_loss)(
            PHI, NET, trajectory, advantage, jnp.zeros(3), value_coefficient=0.0
        )
        plain = jax.grad(reinforce_loss)(
            PHI, NET, trajectory, advantage, reduction="mean"
        )
        return ppo["actor"], plain["actor"]

    chex.assert_trees_all_close(*run(), rtol=1e-10, atol=1e-14)


def test_ppo_clips_only_what_would_go_further():
    """ρ = e^{±1/2}: beyond the clip the gradient is 0, on the way back it is not."""
    actions = [1]

    @jax.jit
    def slope(shift, advantage):
        log_probs = log_probs_of(PHI, actions) - shift
        loss = lambda phi: ppo_loss(
            phi, NET, trajectory_of(actions, log_probs), advantage, jnp.zeros(1),
            value_coefficient=0.0,
        )  # fmt: skip
        grad = jax.grad(loss)(PHI)["actor"]["layer_1"]["bias"]
        return loss(PHI), grad[1]

    value, grad = slope(0.5, 1.0)
    np.testing.assert_allclose(value, -1.2, rtol=1e-12)
    assert grad == 0
    assert slope(-0.5, 1.0)[1] < 0
    assert slope(-0.5, -1.0)[1] == 0
    assert slope(0.5, -1.0)[1] > 0


def test_the_entropy_term_is_a_bonus():
    """Departure from the released code, where it has the sign of a penalty."""
    actions = [0, 1]
    zero = jnp.zeros(2)
    loss = lambda c: ppo_loss(
        PHI, NET, trajectory_of(actions, log_probs_of(PHI, actions)), zero, zero,
        entropy_coefficient=c, value_coefficient=0.0,
    )  # fmt: skip
    difference = loss(1.0) - loss(0.0)
    spread = entropy(NET.logits(PHI, inputs_of(actions))).mean()
    np.testing.assert_allclose(difference, -spread, rtol=1e-12)
    assert spread > 0
    np.testing.assert_allclose(entropy(jnp.zeros(4)), np.log(4), rtol=1e-12)


def test_the_critic_descends_to_its_targets_and_nothing_else_moves_it():
    targets = jnp.array([1.0, 2.0])
    trajectory = trajectory_of([0, 1], log_probs_of(PHI, [0, 1]))
    loss = lambda phi: ppo_loss(phi, NET, trajectory, jnp.zeros(2), targets)
    errors = targets - NET.value(PHI, trajectory.inputs)
    np.testing.assert_allclose(loss(PHI), 0.5 * jnp.mean(errors**2), rtol=1e-12)
    plain = jax.grad(reinforce_loss)(PHI, NET, trajectory, 1.0)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(plain["critic"]))


@pytest.mark.parametrize(
    ("kind", "order", "wanted"),
    [
        ("ema", "before", [-1.0, 1.0, 3.0]),
        ("ema", "after", [-1.4, 0.6, 2.6]),
        ("leave_one_out", "before", [-3.0, 0.0, 3.0]),
        ("normalized", "before", [-1.2247449, 0.0, 1.2247449]),
    ],
)
def test_advantages_by_hand(kind, order, wanted):
    """Rewards 1, 3, 5 and a baseline of 2: after it, .6 · 2 + .4 · 3 = 2.4."""
    found, baseline = advantages(
        jnp.array([1.0, 3.0, 5.0]), jnp.array(2.0), kind=kind,
        baseline_decay=0.6, baseline_order=order, is_first=jnp.array(False),
    )  # fmt: skip
    np.testing.assert_allclose(found, wanted, atol=1e-7)
    np.testing.assert_allclose(baseline, 2.4, rtol=1e-12)


def test_the_first_baseline_is_the_mean_of_the_first_rewards():
    found, baseline = advantages(
        jnp.array([1.0, 3.0]), jnp.array(77.0), kind="ema",
        baseline_decay=0.8, baseline_order="after", is_first=jnp.array(True),
    )  # fmt: skip
    np.testing.assert_allclose(baseline, 2, rtol=1e-12)
    np.testing.assert_allclose(found, [-1, 1], rtol=1e-12)


def test_clipping_by_value_and_by_magnitude():
    x = jnp.array([-30.0, -0.5, 0.2, 9.0])
    assert clip_advantage(x, None) is x
    assert clip_advantage(x, 5.0).tolist() == [-5, -0.5, 0.2, 5]
    assert clip_advantage(x, (1.0, 20.0)).tolist() == [-20, -1, 1, 9]


def test_the_ring_keeps_the_latest_live_transitions():
    def new(numbers):
        numbers = jnp.asarray(numbers, float)
        zeros = jnp.zeros(len(numbers), jnp.int8)
        inputs = numbers[:, None]
        return Transition(inputs, zeros, numbers, numbers, inputs, zeros != 0)

    empty = jax.tree.map(jnp.zeros_like, new([0] * 4))
    buffer = push(Buffer(empty, jnp.int32(0)), new([1, 2, 3]), jnp.ones(3, bool))
    assert buffer.content.reward.tolist() == [1, 2, 3, 0]
    buffer = push(buffer, new([4, 5, 6]), jnp.array([True, False, True]))
    assert buffer.content.reward.tolist() == [6, 2, 3, 4]
    assert int(buffer.pushed) == 5


def test_targets_by_hand():
    zeros = jnp.zeros(2)
    transitions = Transition(
        inputs=jnp.array([[1.0], [2.0]]), action=zeros, log_prob=zeros,
        reward=jnp.array([0.5, 0.25]), next_inputs=jnp.array([[3.0], [4.0]]),
        ended=jnp.array([False, True]),
    )  # fmt: skip
    value = lambda phi, x: phi * x[..., 0]
    targets, gain = one_step_targets(value, 10.0, transitions, 0.9)
    np.testing.assert_allclose(targets, [27.5, 0.25], rtol=1e-12)
    np.testing.assert_allclose(gain, [17.5, -19.75], rtol=1e-12)


def test_what_cannot_be_is_refused():
    trajectory = trajectory_of([0, 1])
    bare = controller(2)
    with pytest.raises(ValueError, match="critic_hidden"):
        ppo_loss({}, bare, trajectory, 0.0, 0.0)
    with pytest.raises(ValueError, match="reduction"):
        reinforce_loss(PHI, NET, trajectory, 0.0, reduction="max")
