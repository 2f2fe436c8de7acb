"""Plain SGD in front of a rule: what learned optimizers are trained behind."""

from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax

from metax.amalgamation.coordinates import all_finite, features_dtype, keep_unless
from metax.arguments import check_rule

__all__ = ["WarmupState", "with_warmup"]

Params = Any


class WarmupState(NamedTuple):
    """State of `with_warmup`.

    Attributes:
      count: int32 scalar, the updates made.
      inner: state of the wrapped rule.
    """

    count: jax.Array
    inner: Any


def with_warmup(
    rule: optax.GradientTransformation, steps: int = 100, learning_rate: float = 0.01
) -> optax.GradientTransformationExtraArgs:
    """Plain SGD for some steps, then the rule.

        u = -learning_rate · g              in the first `steps` updates
        u = rule's update                   after them

    The rule is called from the first step on, with `warmup=True` at first, so that its
    moments and counts know the gradients met. Learned optimizers are trained behind
    such a warm-up, and expect it.

    Args:
      rule: any optax transformation; one that knows no `warmup` just runs.
      steps: at least 0; 0 returns the rule as it is.
      learning_rate: of the SGD, a number or a scalar array, at least 0.

    Returns:
      The rule. A gradient that is not finite counts for nothing: zero update, state
      unchanged.

    Raises:
      ValueError: negative `steps`, or a negative concrete `learning_rate`.

    Reference:
      Huang et al., 2022, arXiv:2203.06474, appendix on training details.
    """
    if steps < 0:
        raise ValueError(f"`with_warmup(steps=...)` must be at least 0; got {steps}.")
    if not isinstance(learning_rate, jax.core.Tracer) and not learning_rate >= 0:
        raise ValueError(
            f"`with_warmup(learning_rate=...)` must be at least 0; got {learning_rate}."
        )
    check_rule("with_warmup", "rule", rule)
    rule = optax.with_extra_args_support(rule)
    if steps == 0:
        return rule

    def init_fn(params: Params) -> WarmupState:
        return WarmupState(jnp.zeros((), jnp.int32), rule.init(params))

    def update_fn(
        updates: Params, state: Any, params: Params | None = None, **extra: Any
    ) -> tuple[Params, WarmupState]:
        grads = updates
        warm = state.count < steps
        outer = extra.pop("warmup", None)
        inside = warm if outer is None else warm | outer
        updates, inner = rule.update(grads, state.inner, params, warmup=inside, **extra)
        finite = all_finite(grads)
        # at least float32, so that a small rate is not lost in a half-precision leaf
        descend = lambda g: (-learning_rate * g.astype(features_dtype(g))).astype(
            g.dtype
        )
        plain = jax.tree.map(descend, grads)
        updates = keep_unless(warm, plain, updates)
        updates = keep_unless(finite, updates, optax.tree.zeros_like(grads))
        new = WarmupState(state.count + 1, inner)
        return updates, keep_unless(finite, new, state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
