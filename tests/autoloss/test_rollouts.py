import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax import Action
from metax.autoloss import (
    Decision,
    Policy,
    always,
    bernoulli,
    bind,
    controller,
    cycle,
    features,
    identical_actions,
    improvement,
    rollout,
)
from metax.autoloss.rollouts import rollouts
from tests.autoloss.toys import bandit, best_reward, two_groups, two_groups_data


def watching(refresh="chosen", observe_every=None, schedule=None) -> Policy:
    """A schedule that keeps what it is shown, a row a step."""
    schedule = cycle((1, 1)) if schedule is None else schedule
    rows = 40

    def init():
        return schedule.init(), jnp.zeros((rows, 6)), jnp.int32(0)

    def act(state, key):
        inner, decision = schedule.act(state[0], key)
        return (inner, *state[1:]), decision

    def observe(state, seen):
        inner, table, n = state
        row = jnp.stack(
            [
                *seen.losses,
                *seen.gradient_rms,
                seen.metric,
                seen.metric_refreshed.astype(float),
            ]
        )
        return schedule.observe(inner, seen), table.at[n].set(row), n + 1

    return Policy(init, act, observe, refresh, observe_every)


def test_a_run_is_the_steps_of_its_schedule():
    """Against a loop in Python over gradient steps."""
    result, trajectory = jax.jit(
        lambda key: rollout(bandit(), cycle((2, 1)), key, 2.0, 7)
    )(jax.random.key(0))
    x, path = 0.0, []
    for action in (0, 0, 1, 0, 0, 1, 0):
        x -= 0.2 * (x - (1, -1)[action])
        path.append(2 * x)
    np.testing.assert_allclose(result.metrics, path, rtol=1e-12)
    np.testing.assert_allclose(result.params["x"], x, rtol=1e-12)
    assert trajectory.actions.tolist() == [0, 0, 1, 0, 0, 1, 0]
    assert trajectory.actions.dtype == jnp.int8
    assert result.action_counts.tolist() == [5, 2]
    assert result.best_step == 5
    np.testing.assert_allclose(result.best_metric, max(path), rtol=1e-12)
    np.testing.assert_allclose(result.reward, path[-1], rtol=1e-12)


def test_cached_values_change_only_for_the_chosen_loss():
    """Departure of the released code, `refresh="all"`: everything is fresh."""
    problem = two_groups(sample=lambda data, key: data["train"])
    data = two_groups_data()
    run = lambda refresh: jax.jit(
        lambda key: rollout(problem, watching(refresh), key, data, 6)[0]
    )(jax.random.key(0))
    seen = run("chosen").policy_state[1][:6]
    assert seen[0, 1] == 0 == seen[0, 3]
    for t in range(1, 6):
        idle = 1 - t % 2
        assert seen[t, idle] == seen[t - 1, idle]
        assert seen[t, 2 + idle] == seen[t - 1, 2 + idle]
        assert seen[t, 1 - idle] != seen[t - 1, 1 - idle]
    fresh = run("all").policy_state[1][:6]
    assert (fresh[1:, :4] != fresh[:-1, :4]).all()


def test_full_batch_gradients_that_are_carried_change_nothing():
    fixed = two_groups(
        losses=(
            lambda p, batch, key: jnp.sum((p["a"] - batch) ** 2),
            lambda p, batch, key: jnp.sum(p["b"]["w"] ** 4) + jnp.sum(p["a"] ** 2),
        ),
        sample=lambda data, key: data["train"],
    )
    run = lambda problem: jax.jit(
        lambda key: rollout(
            problem, watching("all"), key, two_groups_data(), 11, chunk=4
        )
    )(jax.random.key(0))
    drawn, carried = run(fixed), run(fixed._replace(full_batch=True))
    chex.assert_trees_all_close(drawn, carried, rtol=1e-12)


@pytest.mark.parametrize("kind", ["bernoulli", "controller"])
def test_what_is_drawn_beforehand_is_what_each_key_would_give(kind):
    """Bit for bit: a run's numbers do not say how they were drawn."""
    policy, seen = bernoulli(jnp.array([0.2, 0.8])), features.paper(2)
    if kind == "controller":
        net = controller(2, (4,))
        policy = bind(net, net.init(jax.random.key(1), seen.spec.size), seen)
    run = lambda policy: jax.jit(
        lambda key: rollout(bandit(), policy, key, 1.0, 40, chunk=7)
    )(jax.random.key(0))
    beforehand, by_key = run(policy), run(policy._replace(draw=None))
    assert 0 < beforehand[0].action_counts[0] < 40
    chex.assert_trees_all_equal(beforehand, by_key)


@pytest.mark.parametrize(("observe_every", "validate_every"), [(1, 3), (4, 2), (3, 2)])
def test_the_metric_is_measured_when_it_is_due(observe_every, validate_every):
    result, _ = jax.jit(
        lambda key: rollout(
            bandit(),
            watching(observe_every=observe_every),
            key,
            1.0,
            13,
            validate_every=validate_every,
            chunk=5,
        )
    )(jax.random.key(0))
    refreshed = result.policy_state[1][:13, 5].tolist()
    due = lambda t: t % observe_every == 0 or t % validate_every == 0
    assert refreshed == [float(due(t)) for t in range(1, 14)]
    assert result.metrics.shape == (13 // validate_every,)
    path, x = [], 0.0
    for t in range(13):
        x -= 0.2 * (x - (1, -1)[t % 2])
        path.append(x)
    wanted = path[validate_every - 1 :: validate_every]
    np.testing.assert_allclose(result.metrics, wanted, rtol=1e-12)


@pytest.mark.parametrize(
    "chunk",
    [
        pytest.param(1, marks=pytest.mark.slow),
        3,
        pytest.param(8, marks=pytest.mark.slow),
        pytest.param(500, marks=pytest.mark.slow),
    ],
)
def test_chunks_change_nothing(chunk):
    run = lambda chunk: jax.jit(
        lambda key: rollout(
            two_groups(), bernoulli(jnp.ones(3) / 3), key, two_groups_data(), 23,
            chunk=chunk,
        )
    )(jax.random.key(0))  # fmt: skip
    chex.assert_trees_all_close(run(chunk), run(23), rtol=1e-12)


def test_patience_ends_a_run_once_exceeded():
    """A tie is no improvement, and the counter must exceed the patience."""
    problem = bandit(patience=2, metric=lambda p, data: jnp.minimum(p["x"], 0.5))
    result, trajectory = jax.jit(
        lambda key: rollout(problem, always(0), key, 1.0, 30, chunk=4)
    )(jax.random.key(0))
    # .2, .36, .488, .5, .5, .5, .5: the third check without a better one ends it
    assert int(result.num_steps) == 7 == int(trajectory.live.sum())
    assert int(result.best_step) == 4
    np.testing.assert_allclose(result.params["x"], 1 - 0.8**7, rtol=1e-12)
    np.testing.assert_allclose(result.best_params["x"], 1 - 0.8**4, rtol=1e-12)
    assert result.metrics_live.tolist() == [True] * 7 + [False] * 23
    assert np.isnan(result.metrics[7:]).all()
    on, _ = rollout(
        problem, always(0), jax.random.key(0), 1.0, 30, early_stopping=False
    )
    assert int(on.num_steps) == 30


def test_an_average_of_the_metric_may_judge_and_a_final_one_may_count():
    problem = bandit(
        metric_decay=0.5,
        final_metric=lambda p, data: 100 * p["x"],
        reward=lambda history, live: jnp.where(live, history, 0).sum(),
    )
    result, _ = jax.jit(lambda key: rollout(problem, always(0), key, 1.0, 3))(
        jax.random.key(0)
    )
    raw = [1 - 0.8**t for t in (1, 2, 3)]
    smooth = [raw[0], (raw[0] + raw[1]) / 2]
    smooth.append((smooth[-1] + raw[2]) / 2)
    np.testing.assert_allclose(result.metrics, smooth, rtol=1e-12)
    np.testing.assert_allclose(result.reward, sum(smooth) + 100 * raw[2], rtol=1e-12)


def test_without_a_check_the_last_parameters_are_the_best():
    problem = bandit(validate_every=10)
    result, _ = jax.jit(lambda key: rollout(problem, always(0), key, 1.0, 4))(
        jax.random.key(0)
    )
    assert result.metrics.shape == (0,)
    np.testing.assert_array_equal(result.best_params["x"], result.params["x"])
    assert np.isnan(result.reward)


def test_several_runs_at_once_equal_single_ones():
    problem = two_groups(patience=1, validate_every=1)
    net = controller(3, hidden=(4,))
    seen = features.running_norm(features.paper(2))
    data, keys = two_groups_data(), jax.random.split(jax.random.key(0), 3)
    policy = bind(net, net.init(jax.random.key(1), seen.spec.size), seen)
    one = jax.jit(lambda key: rollout(problem, policy, key, data, 20, chunk=4))
    ways = {
        "mix": lambda: rollouts(problem, policy, keys, data, 20, chunk=4),
        "switch": lambda: rollouts(
            problem, policy, keys, data, 20, chunk=4, dispatch="switch"
        ),
        "vmap": lambda: jax.vmap(one)(keys),
    }
    single = [one(key) for key in keys]
    lengths = [int(result.num_steps) for result, _ in single]
    assert len(set(lengths)) > 1, "patience must end them at different steps"
    for way in ways.values():
        several = jax.jit(way)()
        for s, alone in enumerate(single):
            mine = jax.tree.map(lambda leaf, s=s: leaf[s], several)
            # batched contractions may sum in another order
            chex.assert_trees_all_close(mine, alone, rtol=1e-6, atol=1e-9)


def test_the_same_key_gives_the_same_run_and_a_task_key_shares_the_task():
    data, problem = two_groups_data(), two_groups()
    run = jax.jit(
        lambda key, task: rollout(problem, bernoulli(0.5), key, data, 9, task_key=task)
    )
    keys, task = jax.random.split(jax.random.key(0)), jax.random.key(5)
    chex.assert_trees_all_equal(run(keys[0], task), run(keys[0], task))
    first = jax.jit(
        lambda key: rollout(problem, always(2), key, data, 9, task_key=task)[0].params
    )
    chex.assert_trees_all_equal(first(keys[0]), first(keys[1]))
    other = run(keys[1], task)[1].actions
    assert other.tolist() != run(keys[0], task)[1].actions.tolist()


def test_a_restart_rule_ends_a_run():
    result, trajectory = jax.jit(
        lambda key: rollout(
            bandit(), always(1), key, 1.0, 9, restart=identical_actions(3)
        )
    )(jax.random.key(0))
    assert result.restarted
    # the fourth repetition exceeds three: five actions
    assert int(trajectory.live.sum()) == 5
    assert result.is_finite


def test_step_rewards_are_zero_where_the_metric_was_not_measured():
    problem = bandit(maximize=False, reward=best_reward, validate_every=2)
    _, trajectory = jax.jit(
        lambda key: rollout(
            problem, always(1), key, 1.0, 6, step_reward=improvement(decay=0.0)
        )
    )(jax.random.key(0))
    # with decay 0 the trend is the improvement itself: each reward is close to 1
    assert trajectory.rewards[::2].tolist() == [0, 0, 0]
    np.testing.assert_allclose(trajectory.rewards[1::2], 1, atol=1e-3)


def test_a_population_is_a_vmap_over_numbers():
    @jax.jit
    def final(p):
        return rollout(bandit(), bernoulli(p), jax.random.key(0), 1.0, 50)[0].params[
            "x"
        ]

    ends = jax.vmap(final)(jnp.array([0.0, 0.5, 1.0]))
    assert ends[0] > 0.9 > ends[1] > -0.9 > ends[2]


def test_one_trace_whatever_the_seed():
    traces = []

    def losses(p, batch, key):
        traces.append(1)
        return (p["x"] - 1) ** 2

    problem = bandit(losses=(losses, bandit().losses[1]))
    run = jax.jit(lambda key: rollout(problem, always(0), key, 1.0, 20)[0].reward)
    run(jax.random.key(0))
    number = len(traces)
    for seed in range(3):
        run(jax.random.key(seed))
    assert len(traces) == number


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"actions": (Action(0), Action(2))}, r"actions\[1\].loss"),
        ({"actions": (Action(0), Action(1, "y"))}, r"actions\[1\].params.*\['y'\]"),
        ({"actions": (Action(0, "x", 0),)}, r"actions\[0\].repeats"),
        ({"actions": ()}, r"problem.actions"),
        ({"optimizers": {"z": optax.sgd(1.0)}}, r"missing \['x'\], extra \['z'\]"),
        ({"optimizers": 0.1}, r"problem.optimizers"),
        ({"optimizer_sharing": "loss"}, r"optimizer_sharing"),
        ({"maximize": False}, r"must grow where the metric gets better"),
        ({"maximize": None}, r"problem.maximize"),
        ({"validate_every": 0}, r"validate_every"),
        ({"patience": -1}, r"patience"),
        ({"metric_decay": 1.0}, r"metric_decay"),
        ({"names": ("one",)}, r"problem.names"),
        ({"init": lambda key: jnp.zeros(2)}, r"dict of named groups"),
        ({"actions": (Action(0), Action(1, None, 4))}, r"repeats=\(1, 4\)"),
    ],
)
def test_a_problem_that_does_not_fit_is_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        rollout(bandit(**changes), always(0), jax.random.key(0), 1.0, 3)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"dispatch": "both"}, "dispatch"),
        ({"chunk": 0}, "chunk"),
        ({"validate_every": 0}, "validate_every"),
        ({"key": 0}, "key"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, match):
    arguments = {"key": jax.random.key(0), "num_steps": 3} | arguments
    with pytest.raises(ValueError, match=rf"rollout\({match}=...\)"):
        rollout(bandit(), always(0), data=1.0, **arguments)


def test_weights_need_mixing():
    weigh = lambda state, key: (
        state,
        Decision(jnp.int32(0), jnp.zeros(()), jnp.zeros(0), jnp.ones(2)),
    )
    policy = Policy(lambda: (), weigh, lambda state, seen: state)
    with pytest.raises(ValueError, match=r"weights.*dispatch='mix'"):
        rollout(bandit(), policy, jax.random.key(0), 1.0, 3, dispatch="switch")
