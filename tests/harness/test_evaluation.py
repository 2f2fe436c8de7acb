from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax import Loop, Task, inner_loop, unroll
from metax.harness import evaluate, evaluate_in_turn, grid, replicate, train

KEY = jax.random.key(5)
DATA = jnp.arange(4.0)


def quadratic(rate):
    task = Task(
        init=lambda key: {"w": jax.random.normal(key, (2,))},
        loss=lambda params, batch, key: 0.5 * jnp.sum((params["w"] - batch) ** 2),
        sample=lambda data, key: data[jax.random.randint(key, (), 0, len(data))],
        evaluate=lambda params, data: {},
    )
    return inner_loop(task, optax.sgd(rate))


def keys_of_replicate(seed, num_seeds, num_steps):
    key_init, key_run = jax.random.split(KEY)
    folded = [jax.random.fold_in(key_run, i) for i in range(num_steps)]
    keys = jnp.stack([jax.random.split(key, num_seeds)[seed] for key in folded])
    return jax.random.split(key_init, num_seeds)[seed], keys


@pytest.mark.parametrize("seed", [0, 2])
def test_replicate_is_a_single_run_with_its_share_of_the_keys(seed):
    loop = quadratic(0.1)
    key_init, keys = keys_of_replicate(seed, 3, 6)
    wanted, wanted_infos = unroll(loop, loop.init(key_init), keys, DATA)
    states, infos = evaluate(loop, DATA, KEY, 6, num_seeds=3)
    # vmap may order sums differently than the single run
    np.testing.assert_allclose(states.params["w"][seed], wanted.params["w"], atol=1e-12)
    np.testing.assert_allclose(infos.loss[seed], wanted_infos.loss, atol=1e-12)


def test_more_seeds_keep_the_first_ones():
    two = evaluate(quadratic(0.1), DATA, KEY, 4, num_seeds=2)[1].loss
    five = evaluate(quadratic(0.1), DATA, KEY, 4, num_seeds=5)[1].loss
    np.testing.assert_allclose(five[:2], two, rtol=1e-12)
    assert len(np.unique(five[:, 0])) == 5


def test_evaluate_puts_the_seeds_first():
    states, infos = evaluate(quadratic(0.1), DATA, KEY, 6, num_seeds=3, chunk=2)
    assert infos.loss.shape == (3, 6)
    assert states.params["w"].shape == (3, 2)


@pytest.mark.parametrize("num_seeds", [1, 7])
def test_step_is_traced_once_for_any_number_of_seeds(num_seeds):
    traces = []
    loop = quadratic(0.1)

    def step(state, key, data):
        traces.append(None)
        return loop.step(state, key, data)

    counted = Loop(loop.init, step)
    evaluate(counted, DATA, KEY, 6, num_seeds=num_seeds, chunk=2)
    assert len(traces) == 1


class Info(NamedTuple):
    x: jax.Array
    is_finite: jax.Array


def halving(threshold):
    """Halves its start, which lies in [1, 2]; starts below the threshold diverge."""

    def step(x, key, data):
        x = jnp.where((x >= 1) & (x < threshold), jnp.nan, x / 2)
        return x, Info(x, jnp.isfinite(x))

    return Loop(lambda key: jax.random.uniform(key, minval=1.0, maxval=2.0), step)


def test_diverging_replicate_spoils_no_other():
    sound = evaluate(halving(0.0), None, KEY, 3, num_seeds=4, chunk=1)[1].x
    start = 2 * sound[:, 0]
    threshold = np.sort(start)[:2].mean()
    states, infos = evaluate(halving(threshold), None, KEY, 3, num_seeds=4, chunk=1)
    bad = start < threshold
    assert bad.sum() == 1
    assert np.isnan(infos.x[bad]).all()
    assert not infos.is_finite[bad].any()
    np.testing.assert_array_equal(infos.x[~bad], sound[~bad])
    assert np.isfinite(np.asarray(states)[~bad]).all()


def test_grid_is_each_setting_alone_with_the_same_keys():
    rates = jnp.array([0.05, 0.1, 0.3])
    states, infos = train(grid(quadratic, rates), DATA, KEY, 6, chunk=2)
    assert infos.loss.shape == (6, 3)
    for i, rate in enumerate(rates):
        state, info = train(quadratic(rate), DATA, KEY, 6, chunk=2)
        # vmap may order sums differently than the single run
        np.testing.assert_allclose(states.params["w"][i], state.params["w"], atol=1e-12)
        np.testing.assert_allclose(infos.loss[:, i], info.loss, atol=1e-12)


def test_grid_gathers_each_batch_once():
    def build(rate):
        def step(x, key, data):
            batch = data[jax.random.randint(key, (2,), 0, len(data))]
            return x - rate * batch.mean(), ()

        return Loop(lambda key: jnp.zeros(()), step)

    loop = grid(build, jnp.linspace(0.1, 1.0, 5))
    state = loop.init(KEY)
    text = str(jax.make_jaxpr(loop.step)(state, KEY, DATA))
    gathers = [line for line in text.splitlines() if "= gather[" in line]
    assert len(gathers) == 1
    assert "f64[2,1]" in gathers[0] or "f64[2]" in gathers[0]


def test_grid_takes_trees_of_settings():
    def build(setting):
        scale, shift = setting["scale"], setting["shift"]
        return Loop(lambda key: jnp.ones(()), lambda x, k, d: (x * scale + shift, ()))

    settings = {"scale": np.array([2.0, 3.0]), "shift": np.array([1.0, -1.0])}
    state, _ = train(grid(build, settings), None, KEY, 2)
    np.testing.assert_array_equal(state, [7.0, 5.0])


def test_replicates_of_a_grid_nest():
    loop = grid(quadratic, jnp.array([0.1, 0.2]))
    states, infos = evaluate(loop, DATA, KEY, 4, num_seeds=3)
    assert infos.loss.shape == (3, 4, 2)
    # the settings of one seed start at the same point
    np.testing.assert_array_equal(infos.loss[:, 0, 0], infos.loss[:, 0, 1])
    assert states.params["w"].shape == (3, 2, 2)


@pytest.mark.parametrize(
    "settings", [{"a": np.ones(2), "b": np.ones(3)}, 1.0, {}, np.ones((0,))]
)
def test_settings_without_one_leading_axis_are_refused(settings):
    with pytest.raises(ValueError, match=r"grid\(settings=...\)` must be a tree"):
        grid(quadratic, settings)


def test_no_seeds_are_refused():
    with pytest.raises(ValueError, match=r"replicate\(num_seeds=...\).*got 0"):
        replicate(quadratic(0.1), 0)


RATES = jnp.array([0.1, 0.3])


def in_turn(build=quadratic, num_steps=6, num_seeds=3, judge_every=3, **options):
    judge = lambda state, data: {"w": state.params["w"] + data.sum()}
    how = {"num_seeds": num_seeds, "judge": judge, "judge_every": judge_every}
    return evaluate_in_turn(build, RATES, DATA, KEY, num_steps, **how, **options)


def test_runs_in_turn_are_those_side_by_side():
    infos, judged = in_turn()
    states, wanted = evaluate(grid(quadratic, RATES), DATA, KEY, 6, num_seeds=3)
    assert judged["w"].shape == (3, 2, 2, 2)
    # vmap may order sums differently than the single run
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), infos, wanted
    )
    last = states.params["w"] + DATA.sum()
    np.testing.assert_allclose(judged["w"][:, -1], last, atol=1e-12)
    halfway, _ = evaluate(grid(quadratic, RATES), DATA, KEY, 3, num_seeds=3)
    first = halfway.params["w"] + DATA.sum()
    np.testing.assert_allclose(judged["w"][:, 0], first, atol=1e-12)


def test_runs_in_turn_share_one_compiled_step_and_show_each_stretch():
    traces, seen = [], []

    def build(rate):
        loop = quadratic(rate)

        def step(state, key, data):
            traces.append(None)
            return loop.step(state, key, data)

        return Loop(loop.init, step)

    infos, judged = in_turn(build, on_judged=lambda *pair: seen.append(pair))
    assert len(traces) == 1
    assert len(seen) == 3 * 2 * 2
    np.testing.assert_array_equal(seen[1][0].loss, infos.loss[0, 3:, 0])
    np.testing.assert_array_equal(seen[2][1]["w"], judged["w"][0, 0, 1])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"judge_every": 4}, "judge_every=.* must divide num_steps; got judge_every=4"),
        ({"judge_every": 0}, "judge_every=.* must be at least 1; got 0"),
        ({"num_seeds": 0}, "num_seeds=.* must be at least 1; got 0"),
        ({"num_steps": 0}, "num_steps=.* must be at least 1; got 0"),
    ],
)
def test_runs_in_turn_refuse_what_does_not_fit(changed, said):
    with pytest.raises(ValueError, match=r"`evaluate_in_turn\(" + said):
        in_turn(**changed)


def test_runs_in_turn_refuse_settings_without_an_axis():
    judge = lambda state, data: state
    with pytest.raises(ValueError, match=r"`evaluate_in_turn\(settings"):
        evaluate_in_turn(
            quadratic, 0.1, DATA, KEY, 2, num_seeds=1, judge=judge, judge_every=1
        )
