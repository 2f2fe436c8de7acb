"""From a gradient and the previous direction to the signal that moves a learning rate.

Everything here is a formula on pytrees. A learning rate may be one scalar (`"global"`),
a scalar a leaf (`"leaf"`) or one number a parameter (`"element"`); inner products are
taken within that scope, in at least float32, over every device the parameters are
spread on. The products of all leaves travel in one small array, so that sharded
parameters cost one collective a step.
"""

from typing import Any

import jax
import jax.numpy as jnp

from metax.hypergradient.rates import rate_dtype

__all__ = ["hypergradient_and_signal"]


def hypergradient_and_signal(
    grad: Any, direction: Any, *, rule: str, scope: str, axis_name: Any
) -> tuple[Any, Any]:
    """Computes h = −⟨g, d⟩ and the signal s that `rule` makes of it.

        additive          s = h
        multiplicative    s = (h / ‖g‖) / ‖d‖        minus the cosine of g and d
        normalized        s = h / ‖d‖²

    Separate square roots keep the cosine in range where ‖g‖²‖d‖² would leave float32.
    A normalised signal is 0 where a norm in its denominator is 0.

    Args:
      grad: g_t, a pytree of arrays.
      direction: d_{t−1}, the same tree and shapes.
      rule: `"additive"`, `"multiplicative"` or `"normalized"`.
      scope: `"global"`, `"leaf"` or `"element"`.
      axis_name: None, or the mesh axes over which the inner products are summed.

    Returns:
      (h, s), each a scalar, a tree of scalars or a tree like `grad`, by scope.
    """
    if scope == "element":
        return _elementwise(grad, direction, rule)
    pairs = {
        "additive": [(grad, direction)],
        "multiplicative": [(grad, direction), (grad, grad), (direction, direction)],
        "normalized": [(grad, direction), (direction, direction)],
    }[rule]
    products, *squares = _inner_products(pairs, scope, axis_name)
    h = jax.tree.map(jnp.negative, products)
    if rule == "additive":
        return h, h
    if rule == "multiplicative":
        return h, jax.tree.map(_cosine, h, *squares)
    return h, jax.tree.map(_divide, h, *squares)


def _inner_products(pairs: list, scope: str, axis_name: Any) -> list:
    table = jnp.stack([_leaf_products(a, b) for a, b in pairs])  # [pairs, leaves]
    if axis_name is not None:
        table = jax.lax.psum(table, axis_name)
    if scope == "global":
        return list(jnp.sum(table, axis=1))
    structure = jax.tree.structure(pairs[0][0])
    return [structure.unflatten(list(row)) for row in table]


def _leaf_products(a: Any, b: Any) -> jax.Array:
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    products = [_product(x, y).astype(rate_dtype()) for x, y in leaves]
    return jnp.stack(products) if products else jnp.zeros((0,), rate_dtype())


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Re⟨x, y⟩ as one contraction over all axes.

    No reshape, which would gather a leaf sharded along an inner axis; full precision,
    which accelerators do not give by default; and an accumulator of at least float32.
    """
    x, y = (z.astype(jnp.promote_types(x.dtype, y.dtype)) for z in (x, y))
    axes = tuple(range(x.ndim))
    total = jax.lax.dot_general(
        jnp.conj(x),
        y,
        ((axes, axes), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.promote_types(jnp.float32, x.dtype),
    )
    return jnp.real(total)


def _elementwise(grad: Any, direction: Any, rule: str) -> tuple[Any, Any]:
    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        wide = jnp.promote_types(jnp.float32, jnp.promote_types(x.dtype, y.dtype))
        negative = -jnp.real(jnp.conj(x.astype(wide)) * y.astype(wide))
        return negative.astype(rate_dtype(x))

    h = jax.tree.map(product, grad, direction)
    if rule == "additive":
        return h, h
    # The cosine of two numbers: of their signs alone, which cannot underflow.
    sign = lambda tree: jax.tree.map(jnp.sign, tree)
    return h, jax.tree.map(product, sign(grad), sign(direction))


def _cosine(h: jax.Array, grad_square: jax.Array, direction_square: jax.Array):
    # Tested with != so that NaN counts as a norm and reaches the guard.
    nonzero = (grad_square != 0) & (direction_square != 0)
    # Both branches of a where are differentiated: the roots never see a zero.
    grad_norm = jnp.sqrt(jnp.where(nonzero, grad_square, 1.0))
    direction_norm = jnp.sqrt(jnp.where(nonzero, direction_square, 1.0))
    return jnp.where(nonzero, h / grad_norm / direction_norm, 0.0)


def _divide(h: jax.Array, square: jax.Array) -> jax.Array:
    nonzero = square != 0
    return jnp.where(nonzero, h / jnp.where(nonzero, square, 1.0), 0.0)
