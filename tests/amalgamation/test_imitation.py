"""Off-policy imitation: on the teacher's trajectory, towards the teacher's updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax import inner_loop, unroll
from metax.amalgamation import imitate, rnnprop
from tests.amalgamation import toys

K = 4
PARABOLA = toys.plain_task(lambda x: 0.5 * x**2)


def run(loop, data, num, seed=0):
    @jax.jit
    def go(key, data):
        key_init, key_run = jax.random.split(key)
        return unroll(loop, loop.init(key_init), jax.random.split(key_run, num), data)

    return go(jax.random.key(seed), data)


def build(task, student, teacher, **options):
    lengths = {"truncation_length": K, "unroll_length": 2 * K}
    return imitate(task, student, teacher, **{**lengths, **options})


@pytest.mark.parametrize("random_scale", [0.0, 1.0])
def test_loss_and_gradient_on_a_parabola_in_closed_form(random_scale):
    """Rates r and .2: the misses are (r s² - .2) g, with g = .8^i."""
    rate = np.exp(-2.0)
    loop = build(
        PARABOLA, toys.descent(-2.0), optax.sgd(0.2), random_scale=random_scale,
        meta_optimizer=optax.sgd(1.0),
    )  # fmt: skip
    state, info = run(loop, (), 1)
    square, grads = state.scale[0] ** 2, 0.8 ** np.arange(K)
    np.testing.assert_allclose(info.inner_losses[0], 0.5 * grads**2)
    wanted = 0.5 * np.mean(((rate * square - 0.2) * grads) ** 2)
    np.testing.assert_allclose(info.loss[0], wanted)
    slope = np.mean((rate * square - 0.2) * grads**2 * rate * square)
    np.testing.assert_allclose(state.theta["log_rate"], -2.0 - slope)


def test_optimizees_go_where_the_teacher_goes_and_restart_with_it():
    loop = build(toys.network(4), rnnprop(3, 1), optax.adam(0.01), num_tasks=2)
    state, infos = run(loop, toys.rows(), 3)
    assert infos.restarted.tolist() == [True, False, True]
    assert int(state.inner_step) == K
    for ours, theirs in zip(
        *map(jax.tree.leaves, (state.params, state.teacher_params["teacher"])),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert state.student_state.count.tolist() == [K, K]


def test_trajectory_is_that_of_an_inner_loop():
    task, teacher, key = toys.network(4), optax.adam(0.01), jax.random.key(5)
    loop = build(task, rnnprop(3, 1), teacher)

    @jax.jit
    def both(key, data):
        state = loop.init(jax.random.key(1))
        state, _ = loop.step(state, jax.random.key(2), data)
        after, info = loop.step(state, key, data)
        _, key_run = jax.random.split(key)
        keys = jax.random.split(jax.random.split(key_run, 1)[0], K)
        inner = inner_loop(task, teacher)
        first = jax.tree.map(lambda x: x[0], (state.params, state.teacher_states))
        start = inner.init(key)._replace(params=first[0], opt_state=first[1]["teacher"])
        last, infos = unroll(inner, start, keys, data)
        return after.params, info.inner_losses, last.params, infos.loss

    params, losses, wanted, wanted_losses = both(key, toys.rows())
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-12)
    for ours, theirs in zip(*map(jax.tree.leaves, (params, wanted)), strict=True):
        np.testing.assert_allclose(ours[0], theirs, rtol=1e-12)


def test_a_student_comes_to_make_the_teachers_steps():
    parts = {"log_rate": "free", "decay": "fixed"}
    rules = {"free": optax.adam(0.05), "fixed": optax.set_to_zero()}
    adam = optax.partition(rules, parts)
    loop = build(PARABOLA, toys.descent(-3.0), optax.sgd(0.2), meta_optimizer=adam)
    state, infos = run(loop, (), 150)
    np.testing.assert_allclose(jnp.exp(state.theta["log_rate"]), 0.2, rtol=0.02)
    assert infos.loss[-1] < 1e-3 * infos.loss[0]
    assert infos.is_finite.all()


def test_a_loss_that_is_not_finite_moves_no_weight():
    loop = build(toys.plain_task(lambda x: x * jnp.nan), toys.descent(), optax.sgd(0.2))
    state, info = run(loop, (), 1)
    assert not info.is_finite[0]
    assert float(state.theta["log_rate"]) == -2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation_length": 3}, "must divide"),
        ({"num_tasks": 0}, "num_tasks"),
        ({"random_scale": -1.0}, "random_scale"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=rf"`imitate.*{message}"):
        build(PARABOLA, toys.descent(), optax.sgd(0.2), **options)
