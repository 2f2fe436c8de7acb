"""What is refused before anything runs, and how the refusal reads."""

import jax
import jax.numpy as jnp
import optax
import pytest

from metax.amalgamation import (
    LearnedOptimizer,
    amalgamate,
    choice,
    perturb,
    pool,
    rnnprop,
)
from metax.amalgamation.doors import check_differentiable, check_differentiable_student
from tests.amalgamation import toys

TASK = toys.plain_task(jnp.square)
ONE, TWO = {"sgd": optax.sgd(0.1)}, pool("small")


def build(teachers=TWO, student=None, **options):
    return amalgamate(TASK, student or toys.descent(), teachers, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reduce": "max"}, r'`amalgamate\(reduce=...\)` must be "mean" or "minmax" or '
                            r"\"softmax\"; got 'max'"),
        ({"combine": "both"}, r"combine=...\)` .*; got 'both'"),
        ({"warmup_coordinates": "no"}, r"warmup_coordinates=...\)` .*; got 'no'"),
        ({"estimator": "rl"}, r"estimator=...\)` .*; got 'rl'"),
        ({"remat": "all"}, r"remat=...\)` .*; got 'all'"),
        ({"distance_coordinates": ""}, r"distance_coordinates=...\)` .*; got ''"),
        ({"truncation_length": 0}, r"truncation_length=...\)` must be at least 1"),
        ({"unroll_length": -100}, r"unroll_length=...\)` must be at least 1"),
        ({"num_tasks": 0}, r"num_tasks=...\)` must be at least 1; got 0"),
        ({"softmax_tau": 0}, r"softmax_tau=...\)` must be above 0; got 0"),
        ({"es_std": 0.0}, r"es_std=...\)` must be above 0; got 0.0"),
        ({"distance_eps": 0}, r"distance_eps=...\)` must be above 0; got 0"),
        ({"huber_delta": 0}, r"huber_delta=...\)` must be above 0; got 0"),
        ({"random_scale": -1}, r"random_scale=...\)` must be at least 0; got -1"),
        ({"imitation_weight": -0.1}, r"imitation_weight=...\)` must be at least 0"),
        ({"input_noise": -1}, r"input_noise=...\)` must be at least 0; got -1"),
        ({"warmup_steps": -1}, r"warmup_steps=...\)` must be at least 0; got -1"),
        ({"warmup_learning_rate": -1}, r"warmup_learning_rate=...\)` must be at"),
        (
            {"truncation_length": 30, "unroll_length": 100},
            r"`amalgamate\(truncation_length=...\)` must divide `unroll_length`; got "
            "truncation_length=30, unroll_length=100",
        ),
        ({"reduce": "minmax", "teachers": ONE}, "at least two teachers .*; got 1"),
        ({"reduce": "softmax", "teachers": {}}, "at least two teachers .*; got 0"),
        ({"combine": "switch", "teachers": {}}, "must have a teacher to switch to"),
        (
            {"combine": "switch", "imitation_weight": 1.5},
            r"imitation_weight=...\)` must lie in \[0, 1\] .*; got 1.5",
        ),
        (
            {"estimator": "pes", "perturbation": perturb.adversarial()},
            r"`amalgamate\(perturbation=...\)` must not be adversarial .*'pes'",
        ),
        (
            {"estimator": "es", "perturbation": perturb.adversarial()},
            r"`amalgamate\(perturbation=...\)` must not be adversarial .*'es'",
        ),
        (
            {"perturbation": perturb.adversarial()._replace(every="step")},
            r"`amalgamate\(perturbation=...\)` .* at every step",
        ),
    ],
)  # fmt: skip
def test_arguments_outside_their_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        build(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"random_scale": 0, "imitation_weight": 0.0, "warmup_steps": 0},
        {"combine": "switch", "imitation_weight": 1.0},
        {"estimator": "pes", "perturbation": perturb.gaussian()},
        {"estimator": "es", "perturbation": perturb.adversarial(steps=0)},
        {"teachers": {}},
        {"teachers": ONE},
    ],
)
def test_arguments_at_the_edge_of_their_range_pass(options):
    build(**options)


def test_numbers_may_be_traced_and_swept():
    """Learning rates, weights and scales are arrays where the caller wants them so."""
    names = ("imitation_weight", "random_scale", "warmup_learning_rate", "input_noise",
             "softmax_tau", "distance_eps")  # fmt: skip

    def loss(values):
        loop = amalgamate(
            TASK, toys.descent(), TWO, reduce="softmax", truncation_length=1,
            unroll_length=2, warmup_steps=1, **dict(zip(names, values, strict=True)),
        )  # fmt: skip
        key = jax.random.key(0)
        state, _ = loop.step(loop.init(key), key, ())
        return loop.step(state, key, ())[1].loss

    base = jnp.array([0.1, 1.0, 0.01, 0.1, 1.0, 1e-6])
    swept = jnp.concatenate([base[None], base * (1 + 0.5 * jnp.eye(6))])
    values = jax.jit(jax.vmap(loss))(swept)
    assert jnp.isfinite(values).all()
    assert jnp.abs(values[1:] - values[0]).min() > 1e-9


def test_a_student_without_a_derivative_is_refused_but_by_evolution_strategies():
    """A root of the second moment that has nothing added under it."""

    def rule(theta):
        def update(grads, nu, params=None, **extra):
            nu = jax.tree.map(lambda v, g: 0.9 * v + 0.1 * g**2, nu, grads)
            step = lambda g, v: -theta["w"] * g / (jnp.sqrt(v) + 1e-8)
            return jax.tree.map(step, grads, nu), nu

        return optax.GradientTransformationExtraArgs(optax.tree.zeros_like, update)

    student = LearnedOptimizer(lambda key: {"w": jnp.ones(())}, rule)
    with pytest.raises(ValueError, match=r"amalgamate\(student=...\)` must have a fin"):
        build(student=student)
    build(student=student, estimator="pes")
    build(student=student, estimator="es")


@pytest.mark.parametrize("student", [rnnprop(2), choice(TWO, 2)])
def test_the_students_of_this_package_pass_also_inside_jit(student):
    check_differentiable_student(student, "f(student=...)")
    jax.jit(lambda: check_differentiable_student(student, "f(student=...)"))()


@pytest.mark.parametrize("name", ["small", "large"])
def test_every_member_of_the_pools_may_be_differentiated_through(name):
    for rule in pool(name).values():
        check_differentiable(rule, "f(rule=...)")


def test_rules_made_inside_jit_are_tried_where_their_numbers_are_concrete():
    inside = lambda: check_differentiable(optax.adam(0.1), "f(rule=...)")
    with pytest.raises(ValueError, match="f\\(rule=...\\)` must have a finite deriv"):
        jax.jit(inside)()
    # a traced rate cannot be tried, and must not break the trace
    jax.jit(lambda rate: check_differentiable(optax.adam(rate), "f(rule=...)"))(0.1)
