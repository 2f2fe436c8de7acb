"""Judging a student: mean log improvement, and the long horizon."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax import Task, inner_loop, unroll
from metax.amalgamation import (
    LearnedOptimizer,
    amalgamate,
    long_horizon_gate,
    rnnprop,
    validation_loss,
    with_warmup,
)
from tests.amalgamation import toys

THETA = {"log_rate": jnp.array(-2.0), "decay": jnp.array(0.3)}


def test_validation_is_the_mean_log_improvement_of_an_inner_loop():
    """By hand: the student behind its warm-up, its losses, the loss of each start."""
    task, student, steps = toys.network(), rnnprop(3, 1), 6
    validate = validation_loss(
        task, student, truncation_length=3, num_trajectories=2, warmup_steps=2,
        warmup_learning_rate=0.1, random_scale=0.0,
    )  # fmt: skip

    @jax.jit
    def both(key, data):
        theta = student.init(key)
        loop = inner_loop(task, with_warmup(student.rule(theta), 2, 0.1))

        def trajectory(key):
            # the optimizees are those that validation draws from its key
            key_restart, _ = jax.random.split(key)
            key_init = jax.random.split(jax.random.split(key_restart)[0])[0]
            state = loop.init(key_init)
            _, infos = unroll(loop, state, jax.random.split(key, 2 + steps), data)
            log = jnp.log(infos.loss[2:] + 1e-10).reshape(2, 3)
            return jnp.mean(log - log[:, :1])

        by_hand = jnp.mean(jnp.stack([trajectory(k) for k in jax.random.split(key)]))
        return validate(theta, key, data, jnp.int32(steps)), by_hand

    np.testing.assert_allclose(*both(jax.random.key(0), toys.rows()), rtol=1e-9)


def test_any_length_is_one_compilation_and_rounds_down_to_truncations():
    validate = jax.jit(
        validation_loss(
            toys.plain_task(lambda x: 0.1 + x**2), toys.descent(),
            truncation_length=2, num_trajectories=1, warmup_steps=0, random_scale=0.0,
        )
    )  # fmt: skip
    at = lambda n: validate(THETA, jax.random.key(0), (), jnp.int32(n))
    values = [float(at(n)) for n in (0, 2, 3, 4, 6)]
    assert values[0] == values[1] == values[2]
    assert len({*values[2:]}) == 3
    assert validate._cache_size() == 1


def test_validation_never_sees_noise_and_runs_no_teacher():
    """What training perturbs is not an argument here: one value for one key."""
    parameters = inspect.signature(validation_loss).parameters
    for name in ("perturbation", "input_noise", "teachers", "estimator"):
        assert name in inspect.signature(amalgamate).parameters
        assert name not in parameters


def test_scale_of_the_coordinates_is_drawn_as_in_training():
    """SGD in θ/s steps by s² in θ: on one coordinate the value follows by hand."""
    student, task = toys.descent(), toys.plain_task(jnp.square)
    validate = validation_loss(
        task, student, truncation_length=2, num_trajectories=400, warmup_steps=0,
        random_scale=0.5,
    )  # fmt: skip
    theta = {"log_rate": jnp.array(-3.0), "decay": jnp.array(0.0)}
    value = jax.jit(validate)(theta, jax.random.key(0), (), jnp.int32(2))
    # half the terms are 0, half ln((1 - 2 r s²)²) with ln s uniform in [-½, ½]
    s = np.exp(np.linspace(-0.5, 0.5, 10_001))
    terms = np.log((1 - 2 * np.exp(-3.0) * s**2) ** 2)
    np.testing.assert_allclose(
        value, terms.mean() / 2, atol=4 * terms.std() / 2 / 400**0.5
    )
    assert np.abs(value - terms[5000] / 2) > 1e-5


def diverging(after):
    """A student that descends, and climbs once its count is reached."""

    def rule(theta):
        def update(grads, count, params=None, **extra):
            rate = jnp.where(count < after, 0.1, -0.2)
            return jax.tree.map(lambda g: -rate * g, grads), count + 1

        init = lambda params: jnp.zeros((), jnp.int32)
        return optax.GradientTransformationExtraArgs(init, update)

    return LearnedOptimizer(lambda key: {}, rule)


def judged(task, student, **options):
    options = {"steps": 40, "window": 5, "runs": 2, "warmup_steps": 0, **options}
    gate = jax.jit(long_horizon_gate(task, student, **options))
    return gate({}, jax.random.key(0), ())


def test_gate_refuses_what_rises_late_and_passes_what_does_not():
    bowl = toys.plain_task(lambda x: 0.1 + x**2)
    good, bad = judged(bowl, diverging(100)), judged(bowl, diverging(20))
    assert good.passed
    assert not bad.passed
    assert good.log_loss.shape == bad.log_loss.shape == (2, 8)
    x = 0.8 ** np.arange(40)
    windows = np.log((0.1 + x**2).reshape(8, 5).mean(-1))
    np.testing.assert_allclose(good.log_loss, [windows, windows], rtol=1e-9)
    rise = float(bad.log_loss[0, -1] - bad.log_loss[0].min())
    assert judged(bowl, diverging(20), max_rise=rise + 0.01).passed
    assert not judged(bowl, diverging(20), max_rise=rise - 0.01).passed


def test_gate_refuses_a_loss_that_is_not_finite_even_once():
    """The student walks by a hole in the loss, and is well at the end."""
    hole = lambda x: jnp.where((x < 0.5) & (x > 0.45), jnp.nan, 1.0) * (0.1 + x**2)
    step = LearnedOptimizer(lambda key: {}, lambda theta: toys.walking().rule(
        {"w": jnp.array([0.02])}
    ))  # fmt: skip
    assert not judged(toys.plain_task(hole), step).passed
    assert judged(toys.plain_task(lambda x: 0.1 + x**2), step).passed


def test_gate_passes_a_loss_of_zero():
    task = toys.plain_task(lambda x: 0 * x)
    outcome = judged(task, diverging(100))
    assert outcome.passed
    assert np.isneginf(outcome.log_loss).all()


def test_gate_refuses_all_where_one_run_fails():
    """Runs differ by their starts; from one of them the loss is not finite."""
    bad = lambda x: jnp.where(x > 0.5, jnp.nan, 1.0) * (0.1 + x**2)
    task = toys.plain_task(bad)
    task: Task = task._replace(init=lambda key: jax.random.uniform(key))
    keys = jax.random.split(jax.random.key(0), 6)
    gate = jax.jit(
        long_horizon_gate(
            task, diverging(100), steps=4, window=2, runs=3, warmup_steps=0
        )
    )
    outcomes = [gate({}, key, ()) for key in keys]
    finite = [np.isfinite(outcome.log_loss[:, 0]) for outcome in outcomes]
    assert any(0 < runs.sum() < 3 for runs in finite)
    for outcome, runs in zip(outcomes, finite, strict=True):
        assert outcome.passed == runs.all()


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (
            validation_loss,
            {"truncation_length": 0},
            "truncation_length=...\\)` must be",
        ),
        (validation_loss, {"num_trajectories": 0}, "num_trajectories=...\\)` must be"),
        (
            validation_loss,
            {"warmup_steps": -1},
            "warmup_steps=...\\)` must be at least 0; got -1",
        ),
        (validation_loss, {"random_scale": -1.0}, "random_scale=...\\)` must be"),
        (long_horizon_gate, {"steps": 0}, "steps=...\\)` must be at least 1"),
        (long_horizon_gate, {"runs": 0}, "runs=...\\)` must be at least 1"),
        (long_horizon_gate, {"max_rise": -0.1}, "max_rise=...\\)` must be at least 0"),
        (long_horizon_gate, {"steps": 10, "window": 3}, "window=...\\)` must divide"),
        (long_horizon_gate, {"warmup_steps": -1}, "warmup_steps=...\\)` must be"),
    ],
)
def test_arguments_outside_their_range_are_refused(make, options, words):
    with pytest.raises(ValueError, match=f"{make.__name__}\\({words}"):
        make(toys.plain_task(jnp.square), toys.descent(), **options)
