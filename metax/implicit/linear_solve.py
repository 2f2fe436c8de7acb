"""Two ways to solve M v = b for a tree b, given v ↦ Mv for a symmetric M."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

__all__ = ["conjugate_gradient", "neumann_series"]


def conjugate_gradient(
    matvec: Callable[[Any], Any], rhs: Any, iterations: int
) -> tuple[Any, jax.Array]:
    """At most `iterations` steps of conjugate gradients from v = 0.

    The rest of the steps do nothing once ‖residual‖ ≤ ε ‖b‖, with ε the machine's, or
    once a direction has no positive curvature: M is not positive definite then, and v
    is the last good iterate.

    Args:
      matvec: v ↦ Mv on trees like `rhs`.
      rhs: b, float leaves.
      iterations: at least 1.

    Returns:
      v, and how many steps did something, an int32 scalar.

    References:
      Hestenes & Stiefel, "Methods of conjugate gradients for solving linear systems",
      1952.
    """
    squared = _dot(rhs, rhs)
    negligible = squared * jnp.square(jnp.finfo(squared.dtype).eps)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        v, residual, direction, rr, count = carry
        product = matvec(direction)
        curvature = _dot(direction, product)
        active = (rr > negligible) & (curvature > 0)
        alpha = jnp.where(active, rr / jnp.where(active, curvature, 1), 0)
        v = optax.tree.add_scale(v, alpha, direction)
        residual = optax.tree.add_scale(residual, -alpha, product)
        new = _dot(residual, residual)
        beta = jnp.where(active, new / jnp.where(active, rr, 1), 0)
        following = optax.tree.add_scale(residual, beta, direction)
        # held where it stopped: the same test then fails in every later step
        direction = optax.tree.where(active, following, direction)
        rr = jnp.where(active, new, rr)
        return (v, residual, direction, rr, count + active.astype(jnp.int32)), None

    start = (optax.tree.zeros_like(rhs), rhs, rhs, squared, jnp.int32(0))
    (v, _, _, _, count), _ = jax.lax.scan(step, start, length=iterations)
    return v, count


def neumann_series(
    matvec: Callable[[Any], Any], rhs: Any, iterations: int, step_size: Any
) -> tuple[Any, jax.Array]:
    """v = α Σ_{j=0..K} (I − αM)ʲ b, which tends to M⁻¹b where ‖I − αM‖ < 1.

    The error after K terms is (I − αM)ᴷ⁺¹ M⁻¹b: each direction shrinks by its own
    1 − α·eigenvalue. It equals the hypergradient through K + 1 more steps of gradient
    descent at rate α.

    Args:
      matvec: v ↦ Mv on trees like `rhs`.
      rhs: b, float leaves.
      iterations: K ≥ 1, the number of products.
      step_size: α, above 0 and below 2 / (largest eigenvalue of M).

    Returns:
      v, and K.

    References:
      Lorraine, Vicol & Duvenaud, "Optimizing millions of hyperparameters by implicit
      differentiation", AISTATS 2020, arXiv 1911.02590, Algorithm 3.
    """
    alpha = jnp.asarray(step_size, _dot(rhs, rhs).dtype)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        term, total = carry
        term = optax.tree.add_scale(term, -alpha, matvec(term))
        return (term, optax.tree.add(total, term)), None

    (_, total), _ = jax.lax.scan(step, (rhs, rhs), length=iterations)
    return optax.tree.scale(alpha, total), jnp.int32(iterations)


def _dot(a: Any, b: Any) -> jax.Array:
    return jnp.asarray(optax.tree.vdot(a, b))
