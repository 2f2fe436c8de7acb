"""Clipping by the norm of the weights: no tensor moves by more than a share of itself.

Meta-gradients through hundreds of steps are heavy-tailed. Measured against the norm of
the weights they are added to, a bound needs no tuning.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from metax.arguments import check_number, refuse

__all__ = ["clip_by_weight_norm", "frobenius_norm", "weight_norm_bound"]


def clip_by_weight_norm(
    clipping: Any = 0.1, eps: Any = 1e-3
) -> optax.GradientTransformationExtraArgs:
    """Clips the gradient of every weight tensor against the norm of that tensor.

        g_w ← g_w · min(1, c max(‖w‖, ε) / ‖g_w‖)

    with Frobenius norms over whole tensors. Below the bound a gradient is unchanged,
    bit for bit; so is one that is not finite, for whoever watches. Stateless.

    Args:
      clipping: c > 0, the largest ratio of the norms.
      eps: ε > 0, the norm that weights have at least, so that zeros can be left.

    Returns:
      A rule; its `update` needs `params`.

    Raises:
      ValueError: a number is not above 0, or `update` was given no `params`.

    Note:
      The norm of Brock et al., and of `optax.adaptive_grad_clip`, is that of each unit
      (row of a matrix), which clips other gradients.

    References:
      Brock et al., High-Performance Large-Scale Image Recognition Without Normalization
      (2021), section 4; Huang et al., Optimizer Amalgamation (2022), appendix.

    Example:
      >>> import jax.numpy as jnp
      >>> from metax.amalgamation import clip_by_weight_norm
      >>> rule, weights = clip_by_weight_norm(0.1), jnp.array([3.0, 4.0])
      >>> clipped, _ = rule.update(jnp.array([0.0, 2.0]), rule.init(weights), weights)
      >>> [round(float(g), 3) for g in clipped]
      [0.0, 0.5]
    """
    check_number("clip_by_weight_norm", "clipping", clipping, above=0)
    check_number("clip_by_weight_norm", "eps", eps, above=0)

    def init_fn(params: Any) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        del extra_args
        if params is None:
            raise ValueError(
                "`clip_by_weight_norm(...).update(params=...)` must be the weights; "
                "got None. Call `update(grads, state, params)`."
            )

        _check_trees(updates, params)

        def clip(g: jax.Array, w: jax.Array) -> jax.Array:
            norm, bound = frobenius_norm(g), weight_norm_bound(w, clipping, eps)
            above = norm > bound
            # the inner `where` keeps derivatives finite where the norm is zero
            factor = bound / jnp.where(above, norm, 1)
            return jnp.where(above, g * factor, g).astype(g.dtype)

        return jax.tree.map(clip, updates, params), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_trees(updates: Any, params: Any) -> None:
    function, shapes = "clip_by_weight_norm(...).update", lambda x: jnp.shape(x)
    ours, theirs = (jax.tree.map(shapes, tree) for tree in (updates, params))
    if ours != theirs:
        rule = f"must have the tree and the shapes of params, {theirs}"
        refuse(function, "updates", rule, ours)


def frobenius_norm(x: jax.Array) -> jax.Array:
    """Computes ‖x‖ in at least float32, where squares would leave its range as well.

    Args:
      x: any shape; a scalar or an empty array too.

    Returns:
      A scalar, with derivative 0 where x = 0; NaN where x is not finite.
    """
    x = x.astype(jnp.promote_types(jnp.float32, x.dtype))
    most = jax.lax.stop_gradient(jnp.max(jnp.abs(x), initial=0))
    unit = x / jnp.where(most > 0, most, 1)
    square = jnp.sum(unit**2)
    return most * jnp.sqrt(jnp.where(most > 0, square, 1))


def weight_norm_bound(w: jax.Array, clipping: Any = 0.1, eps: Any = 1e-3) -> jax.Array:
    """Computes c max(‖w‖, ε), above which `clip_by_weight_norm` clips a gradient.

    Args:
      w: the weight tensor.
      clipping: c.
      eps: ε.

    Returns:
      A scalar, at least float32.
    """
    return clipping * jnp.maximum(frobenius_norm(w), eps)
