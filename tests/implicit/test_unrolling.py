import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax.base import Task, inner_loop, unroll
from metax.implicit import implicit_hypergradient, unrolled_hypergradient
from metax.tasks.ridge import diabetes_ridge, ridge_regression
from metax.tasks.ridge_solutions import best_weights, hypergradient
from tests.implicit import nonlinear

DATA = diabetes_ridge()
RIDGE = ridge_regression(10)
KEY = jax.random.key(0)
SMALL = nonlinear.make_data()
START = nonlinear.problem().init(jax.random.key(1))


def compiled(problem, params, hparams, data, key, **options):
    """The same under jit: op by op, what is compiled would take most of the time."""
    run = lambda params, hparams, data: unrolled_hypergradient(
        problem, params, hparams, data, key, **options
    )
    return jax.jit(run)(params, hparams, data)


def on_ridge(decay, params, **options):
    hparams = {"weight_decay": decay}
    gradient, last = compiled(RIDGE, params, hparams, DATA, KEY, **options)
    return gradient["weight_decay"], last


def on_network(hparams, rule=None, carried=True, **options):
    rule = optax.sgd(0.3, momentum=0.9) if rule is None else rule
    options["inner_optimizer"] = rule
    problem = nonlinear.problem(carried)
    return compiled(problem, START, hparams, SMALL, KEY, **options)


@functools.cache
def five_steps():
    return on_network(nonlinear.HPARAMS, steps=5)


def assert_trees_close(found, expected, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **tolerance), found, expected
    )


def test_a_long_unroll_is_the_closed_form():
    lam = -2.0
    gradient, last = on_ridge(
        jnp.exp(lam), {"w": jnp.zeros(10)}, inner_optimizer=optax.sgd(0.4), steps=300
    )
    # the slowest direction: (1 - .4 · .1425)³⁰⁰ = 2e-8, and 300 times that
    np.testing.assert_allclose(last["w"], best_weights(DATA, lam), atol=1e-7)
    found = gradient * jnp.exp(lam)
    np.testing.assert_allclose(found, hypergradient(DATA, lam), rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 8])
def test_from_the_optimum_gradient_descent_is_the_neumann_series(steps):
    decay, alpha = jnp.exp(-2.0), 0.3
    params = {"w": best_weights(DATA, -2.0)}
    found, _ = on_ridge(decay, params, inner_optimizer=optax.sgd(alpha), steps=steps)
    if steps == 1:  # one term: α ∂_w L_V
        x, y = DATA.valid
        valid_gradient = x.T @ (x @ params["w"] - y) / len(y)
        expected = -alpha * params["w"] @ valid_gradient
    else:
        options = {"solver": "neumann", "step_size": alpha, "iterations": steps - 1}
        gradient, _ = implicit_hypergradient(
            RIDGE, params, {"weight_decay": decay}, *DATA, **options
        )
        expected = gradient["weight_decay"]
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize(
    "rule", [optax.sgd(0.3, momentum=0.9), optax.adam(0.05, eps_root=1e-8)]
)
def test_it_agrees_with_finite_differences_of_the_whole_unroll(rule):
    found, _ = on_network(nonlinear.HPARAMS, rule, steps=7)

    def outcome(hparams):
        _, last = on_network(hparams, rule, steps=7)
        return nonlinear.valid_value(nonlinear.problem(), last, hparams, SMALL["valid"])

    expected = nonlinear.central_differences(outcome, nonlinear.HPARAMS)
    assert_trees_close(found, expected, rtol=1e-6, atol=1e-9)


def test_the_last_parameters_are_those_of_plain_training():
    rule = optax.adam(0.05)
    decay = 0.2
    task = Task(
        init=RIDGE.init,
        loss=lambda w, batch, key: (
            0.5 * jnp.mean((batch.x @ w["w"] - batch.y) ** 2)
            + 0.5 * decay * jnp.sum(w["w"] ** 2)
        ),
        sample=lambda data, key: data.train,
        evaluate=lambda params, data: {},
    )
    loop = inner_loop(task, rule)
    state, _ = unroll(loop, loop.init(KEY), jax.random.split(KEY, 5), DATA)
    _, last = on_ridge(decay, RIDGE.init(KEY), inner_optimizer=rule, steps=5)
    np.testing.assert_allclose(last["w"], state.params["w"], rtol=1e-12)


def test_carried_and_integer_leaves_change_by_carry_alone():
    _, last = five_steps()
    assert last["count"] == 5
    assert last["count"].dtype == jnp.int32
    mean = SMALL["train"]["x"].mean(0) * (1 - 0.9**5)
    np.testing.assert_allclose(last["mean"], mean, rtol=1e-12)
    _, last = on_network(nonlinear.HPARAMS, carried=False, steps=5)
    assert last["count"] == 0
    assert not np.any(last["mean"])
    assert np.all(last["first"]["kernel"] != START["first"]["kernel"])


def test_truncation_differentiates_the_last_steps_only():
    decay, rule = jnp.array(0.3), optax.sgd(0.3)
    start = {"w": jnp.ones(10)}
    found, last = on_ridge(decay, start, inner_optimizer=rule, steps=9, truncation=4)
    _, middle = on_ridge(decay, start, inner_optimizer=rule, steps=5)
    expected, end = on_ridge(decay, middle, inner_optimizer=rule, steps=4)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(last["w"], end["w"], rtol=1e-12)
    whole, _ = on_ridge(decay, start, inner_optimizer=rule, steps=9)
    assert abs(found - whole) > 1e-3 * abs(whole)


def test_truncation_keeps_the_state_of_the_rule():
    _, last = on_network(nonlinear.HPARAMS, steps=5, truncation=2)
    assert_trees_close(last, five_steps()[1], rtol=1e-12)


def test_remat_and_truncation_at_all_steps_change_nothing():
    found = on_network(nonlinear.HPARAMS, steps=5, truncation=5, remat=True)
    assert_trees_close(found, five_steps(), rtol=1e-12)


def test_keys_draw_the_batches():
    # half of the training set, drawn anew each step
    draw = lambda data, key: jax.tree.map(
        lambda leaf: jax.random.permutation(key, leaf)[:6], data["train"]
    )
    problem = nonlinear.problem()._replace(sample_train=draw)
    options = {"inner_optimizer": optax.sgd(0.1), "steps": 3}
    run = lambda key: unrolled_hypergradient(
        problem, START, nonlinear.HPARAMS, SMALL, key, **options
    )
    compiled_run = jax.jit(run)
    gradient = lambda seed: compiled_run(jax.random.key(seed))[0]["gain"]
    assert gradient(0) == gradient(0)
    assert gradient(0) != gradient(1)


def test_a_sweep_is_a_vmap():
    def gradient(decay, data):
        found, _ = unrolled_hypergradient(
            RIDGE,
            {"w": jnp.zeros(10)},
            {"weight_decay": decay},
            data,
            KEY,
            inner_optimizer=optax.sgd(0.3),
            steps=6,
            truncation=4,
            remat=True,
        )
        return found["weight_decay"]

    decays = jnp.array([0.01, 0.3, 2.0])
    found = jax.jit(jax.vmap(gradient, in_axes=(0, None)))(decays, DATA)
    alone, _ = on_ridge(
        decays[1],
        {"w": jnp.zeros(10)},
        inner_optimizer=optax.sgd(0.3),
        steps=6,
        truncation=4,
    )
    np.testing.assert_allclose(found[1], alone, rtol=1e-10)
    assert found.shape == (3,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"steps=\.\.\..*at least 1; got 0"),
        ({"steps": 4, "truncation": 5}, r"truncation=\.\.\..*truncation=5, steps=4"),
        ({"steps": 4, "truncation": 0}, r"truncation=\.\.\..*truncation=0, steps=4"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=rf"unrolled_hypergradient\({message}"):
        on_network(nonlinear.HPARAMS, **options)


def test_a_raw_key_is_refused():
    with pytest.raises(ValueError, match=r"key=\.\.\..*jax.random.key"):
        unrolled_hypergradient(
            RIDGE,
            {"w": jnp.zeros(10)},
            {"weight_decay": 0.1},
            DATA,
            jnp.zeros(2, jnp.uint32),
            inner_optimizer=optax.sgd(0.1),
            steps=1,
        )
