import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax import Action, unroll
from metax.autoloss import (
    PPO,
    autoloss,
    bernoulli,
    bind,
    context_free,
    controller,
    cycle,
    divergence,
    features,
    frozen,
    guide,
    identical_actions,
    improvement,
    load_controller,
    reinforce_loss,
    rollout,
    save_controller,
    segment,
)
from metax.autoloss.rollouts import rollouts
from metax.harness import NonFiniteError, train
from tests.autoloss.toys import bandit, best_reward, two_groups, two_groups_data

SEEN, KEY = features.paper(2), jax.random.key(0)


def learn(problem, num_updates, seed=0, data=1.0, net=None, **options):
    options = {"features": SEEN, "num_steps": 6, "num_rollouts": 4} | options
    loop = autoloss(problem, net or context_free(2), **options)
    key_init, key_run = jax.random.split(jax.random.key(seed))
    keys = jax.random.split(key_run, num_updates)
    return jax.jit(lambda: unroll(loop, loop.init(key_init), keys, data))()


also = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "advantage", ["leave_one_out", also("ema"), also("normalized")]
)
@pytest.mark.parametrize("sign", [1, also(-1)])
def test_the_good_arm_is_learned_in_ten_of_ten_seeds(advantage, sign):
    """And where the metric is -x, action 1 is the good one."""
    problem = bandit(metric=lambda p, data: sign * p["x"])
    net = context_free(2)
    loop = autoloss(
        problem, net, features=SEEN, num_steps=4, num_rollouts=4, advantage=advantage,
        meta_optimizer=optax.adam(0.1),
    )  # fmt: skip

    @jax.jit
    def run(key):
        key_init, key_run = jax.random.split(key)
        keys = jax.random.split(key_run, 200)
        state, _ = unroll(loop, loop.init(key_init), keys, 1.0)
        return jax.nn.softmax(net.logits(state.phi, jnp.zeros(9)))[0]

    chances = jax.vmap(run)(jax.random.split(jax.random.key(0), 10))
    assert (chances >= 0.9).all() if sign == 1 else (chances <= 0.1).all()


def test_one_step_is_the_policy_gradient_of_whole_runs():
    """By hand, from `rollouts` and `reinforce_loss`."""
    net = controller(3, hidden=(4,))
    seen = features.running_norm(features.paper(2))
    problem, data = two_groups(), two_groups_data()
    rule = optax.sgd(0.5)
    loop = autoloss(
        problem, net, features=seen, num_steps=12, num_rollouts=3, meta_optimizer=rule,
        advantage_clip=0.7, reward_scale=3.0, entropy_coefficient=0.1, reduction="mean",
    )  # fmt: skip

    @jax.jit
    def run(key):
        state = loop.init(key)
        after, info = loop.step(state, key, data)
        key_run, _ = jax.random.split(key)
        key_runs, _ = jax.random.split(key_run)
        policy = bind(net, state.phi, seen, state.feature_state)
        keys = jax.random.split(key_runs, 3)
        results, trajectory = rollouts(problem, policy, keys, data, 12)
        rewards = 3 * results.reward
        weights = jnp.clip(rewards - rewards.mean(), -0.7, 0.7)
        grad = jax.grad(reinforce_loss)(
            state.phi, net, trajectory, weights, entropy_coefficient=0.1,
            reduction="mean",
        )  # fmt: skip
        wanted = jax.tree.map(lambda p, g: p - 0.5 * g, state.phi, grad)
        merged = seen.merge(state.feature_state, results.policy_state.features)
        return after, info, wanted, weights, rewards, merged

    after, info, wanted, weights, rewards, merged = run(jax.random.key(2))
    chex.assert_trees_all_close(after.phi, wanted, rtol=1e-10)
    chex.assert_trees_all_close(after.feature_state, merged, rtol=1e-10)
    np.testing.assert_allclose(info.advantage, weights, rtol=1e-10)
    np.testing.assert_allclose(after.baseline, rewards.mean(), rtol=1e-10)
    np.testing.assert_allclose(info.action_fraction.sum(1), 1, rtol=1e-12)
    assert int(after.num_updates) == 1


def test_the_best_controller_is_the_one_that_led_the_best_run():
    state, infos = learn(bandit(), 30, meta_optimizer=optax.adam(0.3))
    assert float(state.best_metric) == float(infos.best_metric.max())
    # the logits of another update than the last
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(state.best_phi, state.phi)


def test_a_schedule_scales_the_rewards():
    scale = optax.exponential_decay(2.0, 1, 0.5)
    _, infos = learn(bandit(), 3, reward_scale=scale)
    np.testing.assert_allclose(infos.reward_scale, [2, 1, 0.5], rtol=1e-6)


@pytest.mark.slow
def test_common_random_numbers_share_the_task():
    problem = two_groups(actions=(Action(0), Action(0)))
    options = {"data": two_groups_data(), "num_steps": 10}
    same = learn(problem, 2, common_random_numbers=True, **options)[1]
    apart = learn(problem, 2, **options)[1]
    assert np.ptp(same.reward, axis=1).max() < 1e-12
    assert np.ptp(apart.reward, axis=1).min() > 1e-3


def diverging():
    """Action 1 is not finite where action 0 has not been taken first."""
    bad = lambda p, batch, key: jnp.log(p["x"] - 0.1)
    return bandit(losses=(bandit().losses[0], bad))


def test_a_run_that_is_not_finite_does_not_spoil_the_others():
    state, infos = learn(
        diverging(), 20, meta_optimizer=optax.adam(0.1), num_rollouts=8
    )
    assert not infos.is_finite.all()
    assert np.isfinite(infos.advantage).all()
    assert np.isfinite(infos.gradient_norm).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.phi))
    # it enters with the least reward of the others
    bad = ~np.asarray(infos.is_finite)
    row = int(np.flatnonzero(bad.any(axis=1) & ~bad.all(axis=1))[0])
    assert infos.advantage[row][bad[row]].max() <= infos.advantage[row].min() + 1e-12


def test_a_restart_replaces_the_advantage_and_may_draw_a_new_controller():
    collapse = controller(2, hidden=())
    keep = identical_actions(2, penalty=-7.0, reinitialize=False)
    anew = identical_actions(2, penalty=-7.0, reinitialize=True)
    still = optax.sgd(0.0)
    runs = {
        rule.reinitialize: learn(
            bandit(), 4, net=collapse, restart=rule, meta_optimizer=still
        )
        for rule in (keep, anew)
    }
    for _, infos in runs.values():
        fired = np.asarray(infos.restarted)
        assert fired.any()
        assert not fired.all()
        assert set(np.asarray(infos.advantage)[fired].tolist()) == {-7.0}
    kept, drawn = runs[False][0].phi, runs[True][0].phi
    first = collapse.init(jax.random.split(jax.random.key(0))[0], 9)
    chex.assert_trees_all_equal(kept, first)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(drawn, first)


def test_divergence_is_a_restart_that_keeps_the_controller():
    rule = divergence(loss=0, above=0.5, at_step=3, penalty=-3.0)
    _, infos = learn(bandit(), 3, restart=rule)
    assert infos.restarted.any()
    assert set(infos.num_steps[infos.restarted].tolist()) == {3}


def test_step_rewards_enter_the_loss():
    problem = bandit(maximize=False, metric=lambda p, data: (p["x"] - 1) ** 2,
                     reward=best_reward)  # fmt: skip
    with_them = learn(problem, 1, step_reward=improvement())[1]
    without = learn(problem, 1)[1]
    np.testing.assert_allclose(with_them.reward, without.reward, rtol=1e-12)
    assert abs(with_them.loss[0] - without.loss[0]) > 1e-3


@pytest.mark.parametrize("dispatch", ["mix", "switch"])
def test_guided_runs_repeat_rollouts_of_the_same_policy(dispatch):
    """One decision a step of the loop, or one program, where nothing is drawn."""
    noisy, data = two_groups(), two_groups_data()
    problem = noisy._replace(
        losses=(noisy.losses[0], lambda p, batch, key: jnp.sum(p["b"]["w"] ** 2)),
        sample=lambda data, key: data["train"],
        metric=lambda p, data: jnp.maximum(noisy.metric(p, data), 1.0),
        patience=1,
    )
    key = jax.random.key(0)
    whole, trajectory = jax.jit(
        lambda: rollout(
            problem, cycle((2, 1)), key, data, 90, dispatch=dispatch, task_key=key
        )
    )()
    loop = guide(
        problem, cycle((2, 1)), num_steps=90, dispatch=dispatch, early_stopping=True
    )
    key_init = jax.random.split(key)[0]
    keys = jax.random.split(jax.random.key(9), 95)
    state, infos = jax.jit(lambda: unroll(loop, loop.init(key_init), keys, data))()
    steps = int(whole.num_steps)
    assert int(state.step) == steps < 90
    for name in ("params", "best_params", "optimizer_states", "best_metric"):
        mine, theirs = getattr(state, name), getattr(whole, name)
        chex.assert_trees_all_close(mine, theirs, rtol=1e-12)
    assert infos.action[:steps].tolist() == trajectory.actions[:steps].tolist()
    assert infos.metric_refreshed.sum() == steps // 5


def test_a_run_led_from_a_controller_file_repeats_bit_for_bit(tmp_path):
    """Once by what was learned, twice by what was read from its file."""
    net, seen = controller(3, hidden=(4,)), features.running_norm(features.paper(2))
    problem, data = two_groups(), two_groups_data()
    loop = autoloss(problem, net, features=seen, num_steps=10, num_rollouts=2)
    state, _ = jax.jit(loop.step)(loop.init(KEY), KEY, data)
    save_controller(
        tmp_path / "mine", net, state.phi, seen, state.feature_state, problem
    )

    def led(controller, phi, features, feature_state):
        policy = bind(controller, phi, frozen(features), feature_state)
        run = guide(problem, policy, num_steps=12)
        keys = jax.random.split(KEY, 12)
        return jax.jit(lambda data: unroll(run, run.init(KEY), keys, data))(data)

    saved = load_controller(tmp_path / "mine", problem=problem)
    first, again = led(*saved[:4]), led(*saved[:4])
    chex.assert_trees_all_equal(first, again)
    chex.assert_trees_all_equal(first, led(net, state.phi, seen, state.feature_state))
    assert len(set(first[1].action.tolist())) > 1


def test_a_guided_run_stands_still_when_it_is_over():
    loop = guide(bandit(), bernoulli(0.3), num_steps=3)
    keys = jax.random.split(jax.random.key(9), 5)
    state, infos = jax.jit(lambda: unroll(loop, loop.init(keys[0]), keys, 1.0))()
    assert int(state.step) == 3
    assert infos.metric_refreshed.tolist() == [True] * 3 + [False] * 2
    assert infos.metric[3] == infos.metric[4] == infos.metric[2]


def test_full_batch_gradients_are_primed_by_the_first_step():
    fixed = bandit(full_batch=True, sample=lambda data, key: data)
    net = controller(2, hidden=())
    seen = features.custom(
        lambda o: jnp.concatenate([o.losses, o.gradient_rms]),
        name="all", version=1, size=4, refresh="all",
    )  # fmt: skip
    phi = net.init(jax.random.key(3), 4)
    policy = bind(net, phi, seen, greedy=True)
    loop = guide(fixed, policy, num_steps=8)
    keys = jax.random.split(jax.random.key(9), 8)
    state, infos = jax.jit(lambda: unroll(loop, loop.init(keys[0]), keys, 1.0))()
    whole, trajectory = jax.jit(lambda: rollout(fixed, policy, keys[0], 1.0, 8))()
    np.testing.assert_allclose(state.params["x"], whole.params["x"], rtol=1e-12)
    assert infos.action.tolist() == trajectory.actions.tolist()


PPO_NET = controller(2, hidden=(8,), critic_hidden=(8,))


def test_ppo_learns_the_good_arm_online():
    problem = bandit(losses=(lambda p, b, k: -p["x"], lambda p, b, k: p["x"]))
    # a large ε: the reward is the rise itself, whatever the trend was
    rewarded = segment(epsilon=10.0, scale=10.0)
    loop = autoloss(
        problem, PPO_NET, features=SEEN, num_steps=40, estimator="ppo",
        meta_optimizer=optax.adam(0.01),
        ppo=PPO(segment_length=2, segment_reward=rewarded, buffer_size=40,
                batch_size=16, num_updates=4, sync_every=4, discount=0.0),
    )  # fmt: skip

    @jax.jit
    def run(key):
        keys = jax.random.split(key, 300)
        state, infos = unroll(loop, loop.init(keys[0]), keys, 1.0)
        return state, infos

    state, infos = run(jax.random.key(0))
    assert infos.action_fraction[-40:, 0, 0].mean() > 0.8
    assert infos.action_fraction[:20, 0, 0].mean() < 0.75
    assert int(state.num_updates) == 300 * 4
    assert int(state.online.episodes) == 300 * 2 // 40
    # the run begins anew by itself
    steps = infos.num_steps[:, 0].tolist()
    assert steps[:21] == [*range(2, 41, 2), 2]


def test_ppo_explores_uniformly_with_epsilon_and_takes_over_when_due():
    collapsed = controller(2, hidden=(), critic_hidden=())
    options = {"segment_length": 5, "buffer_size": 50, "num_updates": 2}
    always_random = PPO(epsilon=optax.constant_schedule(1.0), sync_every=4, **options)
    loop = autoloss(
        bandit(), collapsed, features=SEEN, num_steps=50, estimator="ppo",
        ppo=always_random, meta_optimizer=optax.sgd(0.01),
    )  # fmt: skip
    start = loop.init(jax.random.key(0))
    bias = jnp.array([50.0, -50.0])  # never takes action 1 by itself
    actor = start.phi["actor"] | {
        "layer_0": start.phi["actor"]["layer_0"] | {"bias": bias}
    }
    phi = start.phi | {"actor": actor}
    start = start._replace(phi=phi, online=start.online._replace(behaviour=phi))
    step, keys = jax.jit(loop.step), jax.random.split(jax.random.key(1), 4)
    state, counts = start, []
    for i, key in enumerate(keys):
        before = state.online.behaviour
        state, info = step(state, key, 1.0)
        counts.append(info.action_fraction[0, 1])
        # two updates a step: taken over at every second step
        wanted = state.phi if i % 2 else before
        chex.assert_trees_all_equal(state.online.behaviour, wanted)
    assert 0.2 < np.mean(counts) < 0.8


def test_controllers_train_under_the_harness_and_lead_when_frozen():
    net, seen = controller(3, hidden=(4,)), features.running_norm(features.paper(2))
    problem, data = two_groups(), two_groups_data()
    loop = autoloss(problem, net, features=seen, num_steps=10, num_rollouts=2)
    state, infos = train(loop, data, jax.random.key(0), 4)
    assert infos.reward.shape == (4, 2)
    policy = bind(net, state.phi, frozen(seen), state.feature_state)
    result, _ = jax.jit(lambda key: rollout(problem, policy, key, data, 10))(
        jax.random.key(1)
    )
    kept = result.policy_state.features
    chex.assert_trees_all_equal(kept.mean, state.feature_state.mean)
    bad = data | {"train": data["train"] * jnp.nan}
    with pytest.raises(NonFiniteError):
        train(loop, bad, jax.random.key(0), 2)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"estimator": "sarsa"}, "estimator"),
        ({"advantage": "best"}, "advantage"),
        ({"reduction": "max"}, "reduction"),
        ({"baseline_order": "never"}, "baseline_order"),
        ({"num_rollouts": 0}, "num_rollouts"),
        ({"num_steps": 0}, "num_steps"),
        ({"baseline_decay": 1.0}, "baseline_decay"),
        ({"dispatch": "both"}, "dispatch"),
        ({"advantage": "normalized", "num_rollouts": 1}, "at least two runs"),
        ({"net": context_free(3)}, "problem's 2 actions; got 3"),
        ({"estimator": "ppo"}, "critic_hidden"),
        (
            {"estimator": "ppo", "net": PPO_NET, "num_steps": 30},
            "segment_length=20",
        ),
        (
            {
                "estimator": "ppo",
                "net": PPO_NET,
                "num_steps": 40,
                "ppo": PPO(buffer_size=3),
            },
            "buffer_size",
        ),
    ],
)
def test_what_cannot_be_learned_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        learn(bandit(), 1, **options)
