"""Every rule through one battery: what any optax user expects of a transformation."""

import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.rules import RULES

CURVATURE = {"w": np.array([[0.5, 1.0], [2.0, 3.0]]), "b": np.array([1.5, 0.7])}


# Variants of rules that are here already, and take long to compile.
VARIANTS = {"hdm_hb_scalar", "rnnprop_release"}


@pytest.fixture(
    params=[
        pytest.param(name, marks=[pytest.mark.slow] if name in VARIANTS else [])
        for name in RULES
    ]
)
def rule(request):
    return RULES[request.param]


@pytest.fixture
def blind_rule(rule):
    """Rules that see nothing but gradients."""
    if rule.sees_objective:
        pytest.skip("the rule evaluates the objective on the whole tree")
    return rule


def start(dtype=None):
    params = {"w": jnp.array([[1.0, -2.0], [0.5, 1.5]]), "b": jnp.array([0.3, -0.7])}
    return params if dtype is None else optax.tree.cast(params, dtype)


def loss(params):
    terms = jax.tree.map(
        lambda p, h: jnp.sum(h.astype(p.dtype) * (jnp.cosh(p) - 1)), params, CURVATURE
    )
    return optax.tree.sum(terms).astype(jax.tree.leaves(params)[0].dtype)


def advance(transformation, params, state, objective=loss):
    value, grad = jax.value_and_grad(objective)(params)
    transformation = optax.with_extra_args_support(transformation)
    updates, state = transformation.update(
        grad, state, params, value=value, grad=grad, value_fn=objective
    )
    return optax.apply_updates(params, updates), state


def run(transformation, params, num_steps=6, objective=loss):
    def step(carry, _):
        params, state = advance(transformation, *carry, objective)
        return (params, state), params

    carry = (params, transformation.init(params))
    (params, state), path = jax.lax.scan(step, carry, length=num_steps)
    return path, state


def assert_close(a, b, tolerance=1e-12):
    chex.assert_trees_all_close(a, b, rtol=tolerance, atol=tolerance)


def test_loss_falls(rule):
    path, _ = run(rule(), start(), 30)
    assert loss(jax.tree.map(lambda leaf: leaf[-1], path)) < loss(start())


def test_scan_jit_and_eager_agree(rule):
    path, _ = run(rule(), start())
    jitted = jax.jit(lambda p, s: advance(rule(), p, s))
    eager = lambda p, s: advance(rule(), p, s)
    for step in (jitted, eager):
        params, state = start(), rule().init(start())
        for _ in range(6):
            params, state = step(params, state)
        assert_close(params, jax.tree.map(lambda leaf: leaf[-1], path))


@pytest.mark.parametrize("x64", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_state_keeps_tree_shapes_dtypes_and_weak_types(rule, dtype, x64):
    with jax.enable_x64(x64):
        params = start(dtype)
        before = jax.eval_shape(rule().init, params)
        _, after = jax.eval_shape(lambda p, s: advance(rule(), p, s), params, before)
        signature = lambda tree: jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)),
            tree,
        )
        assert signature(before) == signature(after)


def test_chain_is_transparent(rule):
    chain = optax.chain(optax.identity(), rule())
    assert_close(run(chain, start())[0], run(rule(), start())[0])


def test_masked_leaf_passes_and_the_rest_is_a_smaller_problem(blind_rule):
    masked = optax.chain(
        optax.masked(blind_rule(), {"w": True, "b": False}),
        optax.masked(optax.set_to_zero(), {"w": False, "b": True}),
    )
    path, _ = run(masked, start())
    np.testing.assert_array_equal(path["b"], jnp.broadcast_to(start()["b"], (6, 2)))

    def only_w(params):
        return loss({**params, "b": start()["b"]})

    alone, _ = run(blind_rule(), {"w": start()["w"]}, objective=only_w)
    assert_close(path["w"], alone["w"])


def test_multi_transform_trains_each_group(blind_rule):
    groups = optax.multi_transform(
        {"learned": blind_rule(), "fixed": optax.sgd(0.1)},
        {"w": "learned", "b": "fixed"},
    )
    path, _ = run(groups, start())

    def only_w(params):
        return loss({**params, "b": start()["b"]})

    alone, _ = run(blind_rule(), {"w": start()["w"]}, objective=only_w)
    assert_close(path["w"], alone["w"])


def test_multi_steps_averages_gradients_first(blind_rule):
    grads = [jax.tree.map(lambda p, s=s: s * p, start()) for s in (1.0, 3.0, 2.0, 4.0)]
    averaged = [jax.tree.map(lambda a, b: (a + b) / 2, *pair) for pair in
                (grads[:2], grads[2:])]  # fmt: skip
    multi, plain = optax.MultiSteps(blind_rule(), 2), blind_rule()
    params, state = start(), multi.init(start())
    for grad in grads:
        updates, state = multi.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    expected, state = start(), plain.init(start())
    for grad in averaged:
        updates, state = plain.update(grad, state, expected)
        expected = optax.apply_updates(expected, updates)
    # MultiSteps accumulates in float32.
    assert_close(params, expected, 1e-7)


def test_apply_if_finite_rejects_a_poisoned_step_whole(rule):
    guarded = optax.apply_if_finite(rule(), max_consecutive_errors=5)
    params, state = advance(guarded, start(), guarded.init(start()))
    poison = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    extra = {"value": jnp.nan, "grad": poison, "value_fn": loss}
    updates, after = guarded.update(poison, state, params, **extra)
    chex.assert_trees_all_equal(optax.apply_updates(params, updates), params)
    if (
        not rule.sees_objective
    ):  # one that does makes a null step of it, a finite update
        chex.assert_trees_all_equal(after.inner_state, state.inner_state)


def test_inject_hyperparams_changes_nothing(rule):
    injected = optax.inject_hyperparams(rule.factory)(**rule.numbers, **rule.options)
    path, state = run(injected, start())
    assert_close(path, run(rule(), start())[0])
    assert rule.swept in state.hyperparams


def test_vmap_over_a_number_equals_single_runs(rule):
    values = rule.numbers[rule.swept] * jnp.array([0.5, 1.0, 2.0])
    single = lambda value: run(rule(**{rule.swept: value}), start())[0]
    together = jax.vmap(single)(values)
    for i, value in enumerate(values):
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], together), single(value))


def test_one_trace_for_any_value_of_its_numbers(rule):
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def path(numbers):
        return run(rule(**numbers), start())[0]

    for factor in (1.0, 0.5, 0.25):
        path({name: jnp.asarray(factor * x) for name, x in rule.numbers.items()})


def test_narrow_parameters_keep_their_dtype(rule):
    path, state = run(rule(), start(jnp.bfloat16))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(path))
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(path))
    scalars = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 0]
    assert all(leaf.dtype.itemsize >= 4 or leaf.dtype == bool for leaf in scalars)
    # 8 bits of mantissa over 6 steps of a well-conditioned problem
    wide, _ = run(rule(), start(jnp.float32))
    chex.assert_trees_all_close(optax.tree.cast(path, jnp.float32), wide, atol=0.1)


def test_parameters_and_state_may_be_donated(rule):
    step = jax.jit(lambda p, s: advance(rule(), p, s), donate_argnums=(0, 1))
    expected = run(rule(), start(), 3)[0]
    params = jax.tree.map(jnp.copy, start())
    params, state = advance(rule(), params, rule().init(params))  # eager at first
    for _ in range(2):
        params, state = step(params, state)
    assert_close(params, jax.tree.map(lambda leaf: leaf[-1], expected))


def test_state_aliases_neither_parameters_nor_gradients_nor_itself(rule):
    params, grad = start(), jax.grad(loss)(start())
    extra = {"value": loss(params), "grad": grad, "value_fn": loss}
    first = rule().init(params)
    updates, second = rule().update(grad, first, params, **extra)
    for state in (first, second):
        leaves = jax.tree.leaves((params, grad, updates, state))
        pointers = [leaf.unsafe_buffer_pointer() for leaf in leaves]
        assert len(set(pointers)) == len(pointers)


def test_derivative_through_a_run_equals_finite_differences(rule):
    def final(value, path_of=None):
        begin = {"w": start()["w"], "b": jnp.zeros(2)}  # its gradient is exactly zero
        path, _ = run(rule(**{rule.swept: value}), begin, 4)
        return loss(jax.tree.map(lambda leaf: leaf[-1], path))

    at = rule.numbers[rule.swept]
    slope = jax.grad(final)(at)
    width = 1e-5 * at
    difference = (final(at + width) - final(at - width)) / (2 * width)
    # central differences: error ∝ width², with third derivatives of up to 1e4
    np.testing.assert_allclose(slope, difference, rtol=1e-5, atol=1e-8)


def test_no_nan_where_all_gradients_are_zero(rule):
    def final(scale):
        begin = jax.tree.map(lambda p: 0 * p * scale, start())
        path, _ = run(rule(), begin, 3)
        return loss(jax.tree.map(lambda leaf: leaf[-1], path))

    assert jax.grad(final)(1.0) == 0


@pytest.mark.slow
def test_sharded_over_eight_devices_equals_one():
    """All rules at once, in a process of its own that has eight virtual devices."""
    script = Path(__file__).with_name("sharded_rules.py")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", f"tests.{script.stem}"],
        cwd=script.parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(RULES)
