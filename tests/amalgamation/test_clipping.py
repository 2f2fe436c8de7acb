"""Clipping by whole tensors: the bound, what it leaves alone, whom it differs from."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax.amalgamation.clipping import (
    clip_by_weight_norm,
    frobenius_norm,
    weight_norm_bound,
)


def weights():
    keys = jax.random.split(jax.random.key(0))
    return {
        "w": jax.random.normal(keys[0], (5, 4)),
        "b": jnp.zeros(4),
        "s": jnp.array(2.0),
        "t": 1e-6 * jax.random.normal(keys[1], (3,)),
    }


def clip(grads, params, **options):
    rule = clip_by_weight_norm(**options)
    return jax.jit(rule.update)(grads, rule.init(params), params)[0]


def test_no_tensor_exceeds_its_bound_and_the_direction_stays():
    params = weights()
    grads = jax.tree.map(lambda w: 7 * jnp.cos(w), params)
    clipped = clip(grads, params)
    for g, c, w in zip(*map(jax.tree.leaves, (grads, clipped, params)), strict=True):
        bound = 0.1 * max(np.linalg.norm(w), 1e-3)
        np.testing.assert_allclose(np.linalg.norm(c), bound, rtol=1e-12)
        np.testing.assert_allclose(c, g * bound / np.linalg.norm(g), rtol=1e-12)


def test_below_the_bound_nothing_changes():
    params = weights()
    scaled = lambda w: jnp.where(w == 0, 4e-5, 0.09 * w)
    grads = jax.tree.map(scaled, params)
    jax.tree.map(np.testing.assert_array_equal, clip(grads, params), grads)


def test_each_tensor_is_clipped_for_itself():
    params = weights()
    grads = {**jax.tree.map(jnp.zeros_like, params), "s": jnp.array(9.0)}
    clipped = clip(grads, params, clipping=0.5)
    assert abs(clipped.pop("s") - 1.0) < 1e-12
    jax.tree.map(lambda c: np.testing.assert_array_equal(c, 0), clipped)


def test_it_is_not_the_unitwise_clipping_of_optax():
    w = jnp.array([[10.0, 0.1], [10.0, 0.1]])
    g = jnp.array([[0.1, 0.1], [0.1, 0.1]])
    unitwise = optax.adaptive_grad_clip(0.1, 1e-3)
    theirs, _ = unitwise.update({"w": g}, unitwise.init({"w": w}), {"w": w})
    ours = clip({"w": g}, {"w": w})
    np.testing.assert_array_equal(ours["w"], g)
    assert jnp.all(theirs["w"][:, 1] < g[:, 1])


def test_norms_are_right_where_squares_leave_the_range():
    for scale in (1e-30, 1.0, 1e30):
        x = jnp.array([[3.0, 0.0], [0.0, -4.0]], jnp.float32) * jnp.float32(scale)
        np.testing.assert_allclose(frobenius_norm(x), 5 * scale, rtol=1e-6)
    huge = clip({"w": 1e30 * jnp.ones(4, jnp.float32)}, {"w": jnp.ones(4, jnp.float32)})
    np.testing.assert_allclose(huge["w"], 0.1, rtol=1e-6)


def test_norm_of_nothing_is_zero_and_has_no_slope():
    assert frobenius_norm(jnp.zeros((0, 3))) == 0
    assert frobenius_norm(jnp.zeros(())) == 0
    np.testing.assert_array_equal(jax.grad(frobenius_norm)(jnp.zeros(3)), 0)


def test_slope_of_the_norm_is_the_unit_vector():
    x = jnp.array([3.0, 0.0, -4.0])
    np.testing.assert_allclose(jax.grad(frobenius_norm)(x), x / 5, rtol=1e-12)


@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf])
def test_what_is_not_finite_stays_visible(poison):
    clipped = clip(jnp.array([1.0, poison]), jnp.ones(2))
    np.testing.assert_array_equal(clipped, jnp.array([1.0, poison]))


def test_narrow_gradients_keep_their_dtype():
    params = {"w": jnp.ones(300, jnp.bfloat16)}
    clipped = clip(params, params)["w"]
    assert clipped.dtype == jnp.bfloat16
    # 8 bits of mantissa
    np.testing.assert_allclose(clipped.astype(float), 0.1, rtol=4e-3)


def test_the_bound_is_of_the_weights_or_of_eps():
    assert weight_norm_bound(jnp.array([3.0, 4.0]), 0.1, 1e-3) == 0.5
    assert weight_norm_bound(jnp.zeros(3), 0.5, 1e-2) == 5e-3


def test_update_without_weights_is_refused():
    rule = clip_by_weight_norm()
    with pytest.raises(ValueError, match="update\\(params=...\\)` must be the weights"):
        rule.update(jnp.ones(2), rule.init(jnp.ones(2)))


@pytest.mark.parametrize("options", [{"clipping": 0.0}, {"eps": -1e-3}])
def test_what_cannot_be_is_refused_by_name(options):
    with pytest.raises(
        ValueError, match=f"{next(iter(options))}=...\\)` must be above"
    ):
        clip_by_weight_norm(**options)
