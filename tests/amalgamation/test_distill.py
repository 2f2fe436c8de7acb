"""Distances in closed form, how they are reduced, and their derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.amalgamation.distill import (
    choice_loss,
    log_distance,
    mean_loss,
    meta_loss,
    minmax_loss,
    softmax_loss,
)

N = 18_122


def tree(value, dtype=jnp.float32):
    """N entries in three leaves, one of them a scalar."""
    shapes = {"w": (100, 181), "b": (21,), "s": ()}
    return {name: jnp.full(shape, value, dtype) for name, shape in shapes.items()}


def test_equal_trajectories_are_at_the_floor():
    assert abs(log_distance(tree(0.3), tree(0.3)) - -32.8307) < 1e-4


def test_unit_differences_are_at_minus_ln_two():
    assert abs(log_distance(tree(1.5), tree(0.5)) - -0.6931) < 1e-4


@pytest.mark.parametrize(("gap", "half_square"), [(0.4, 0.08), (3.0, 0.5 * 2.75)])
def test_huber_is_quadratic_inside_and_linear_outside(gap, half_square):
    d = log_distance(jnp.array([gap]), jnp.array([0.0]), huber_delta=0.5)
    np.testing.assert_allclose(d, np.log(half_square + 1e-10), rtol=1e-12)


def test_slope_is_that_of_the_formula_and_largest_at_the_root_of_two_eps():
    slope = jax.jit(jax.grad(lambda a: log_distance({"w": a}, {"w": 0.0})))
    gaps = np.sqrt(2e-10) * np.array([0.5, 1.0, 2.0])
    slopes = np.array([slope(gap) for gap in gaps])
    np.testing.assert_allclose(slopes, gaps / (0.5 * gaps**2 + 1e-10), rtol=1e-12)
    assert slopes.argmax() == 1
    np.testing.assert_allclose(slopes[1], 1 / np.sqrt(2e-10), rtol=1e-12)


@pytest.mark.parametrize("huber_delta", [None, 1.0])
def test_derivative_where_student_and_teacher_coincide_is_zero(huber_delta):
    distance = lambda p: log_distance(p, tree(0.3), huber_delta=huber_delta)
    for leaf in jax.tree.leaves(jax.jit(jax.grad(distance))(tree(0.3))):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_parameters_are_summed_wide(dtype):
    d = log_distance(tree(1.5, dtype), tree(0.5, dtype))
    assert d.dtype == jnp.float32
    assert abs(d - -0.6931) < 1e-4


def test_mean_softmax_and_max_are_in_order():
    distances = 10 * jax.random.normal(jax.random.key(0), (50, 4))
    for tau in (0.1, 1.0, 10.0):
        soft = softmax_loss(distances, tau)
        assert jnp.all(mean_loss(distances) < soft)
        assert jnp.all(soft < minmax_loss(distances))


def test_softmax_goes_from_the_farthest_to_the_mean():
    distances = 10 * jax.random.normal(jax.random.key(1), (50, 4))
    cold, hot = softmax_loss(distances, 1e-3), softmax_loss(distances, 1e6)
    # a cold one is τ ln 4 below the maximum
    np.testing.assert_allclose(cold, minmax_loss(distances), atol=2e-3)
    # a hot one is var/2τ above the mean
    np.testing.assert_allclose(hot, mean_loss(distances), atol=1e-3)


def test_softmax_keeps_its_digits_in_single_precision():
    distances = jnp.array([-30.0, -3.0, -1.0], jnp.float32)
    for tau in (1e-2, 1.0, 1e5):
        exact = softmax_loss(distances.astype(jnp.float64), tau)
        assert abs(softmax_loss(distances, jnp.float32(tau)) - exact) < 1e-5


def test_softmax_gradient_is_the_softmax():
    distances = jnp.array([-3.0, -1.0, -2.0])
    slope = jax.jit(jax.grad(lambda d: softmax_loss(d, 0.7)))(distances)
    np.testing.assert_allclose(slope, jax.nn.softmax(distances / 0.7), rtol=1e-12)


def test_one_teacher_makes_all_reductions_one():
    distances = jnp.array([[-3.0], [2.0]])
    for reduce in (mean_loss, minmax_loss, softmax_loss, choice_loss):
        np.testing.assert_allclose(reduce(distances), [-3.0, 2.0], rtol=1e-12)


def test_max_picks_the_farthest_and_gives_it_all_the_gradient():
    distances = jnp.array([[-3.0, -1.0, -2.0], [4.0, 0.0, 5.0]])
    np.testing.assert_array_equal(minmax_loss(distances), [-1.0, 5.0])
    slope = jax.grad(lambda d: jnp.sum(minmax_loss(d)))(distances)
    np.testing.assert_array_equal(slope, [[0, 1, 0], [0, 0, 1]])


def test_meta_loss_is_the_mean_log_improvement():
    losses, start = jnp.array([2.0, 1.0, 0.5]), jnp.full(3, 2.0)
    expected = np.mean(np.log([1.0, 0.5, 0.25]))
    np.testing.assert_allclose(meta_loss(losses, start), expected, rtol=1e-9)


def test_meta_loss_of_a_student_that_stays_is_exactly_zero():
    losses = jnp.array([2.0, 0.0, 1e-12], jnp.float32)
    assert meta_loss(losses, losses) == 0


def test_meta_loss_has_a_finite_derivative_at_a_loss_of_zero():
    slope = jax.grad(meta_loss)(jnp.zeros(2, jnp.float32), jnp.ones(2, jnp.float32))
    np.testing.assert_allclose(slope, 0.5e10, rtol=1e-6)


@pytest.mark.parametrize("reduce", [mean_loss, minmax_loss, softmax_loss, choice_loss])
def test_no_teacher_is_refused(reduce):
    with pytest.raises(ValueError, match=f"`{reduce.__name__}"):
        reduce(jnp.zeros((5, 0)))


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: log_distance({"a": jnp.ones(2)}, {"b": jnp.ones(2)}), "one form"),
        (lambda: log_distance({"a": jnp.ones(2)}, {"a": jnp.ones(1)}), "['a']"),
        (lambda: log_distance({}, {}), "must hold numbers"),
        (lambda: log_distance(1.0, 1.0, eps=0.0), "log_distance(eps=...)"),
        (lambda: log_distance(1.0, 1.0, huber_delta=0.0), "huber_delta=..."),
        (lambda: choice_loss(jnp.ones((5, 2))), "choice_loss(distances=...)"),
        (lambda: softmax_loss(jnp.ones(2), 0.0), "softmax_loss(tau=...)"),
        (lambda: meta_loss(jnp.ones(2), jnp.ones(3)), "meta_loss(losses=...,"),
        (lambda: meta_loss(jnp.ones(0), jnp.ones(0)), "meta_loss(losses=...,"),
        (lambda: meta_loss(jnp.ones(2), jnp.ones(2), eps=-1), "meta_loss(eps=...)"),
    ],
)
def test_what_cannot_be_is_refused_by_name(make, argument):
    with pytest.raises(ValueError, match="must") as caught:
        make()
    assert argument in str(caught.value)
