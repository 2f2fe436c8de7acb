"""What a loop of amalgamation carries and shows, and how its weights move."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metax.amalgamation.clipping import (
    clip_by_weight_norm,
    frobenius_norm,
    weight_norm_bound,
)
from metax.amalgamation.coordinates import all_finite, keep_unless
from metax.amalgamation.truncation import Measured

__all__ = [
    "DUE",
    "AmalgamationInfo",
    "AmalgamationState",
    "default_meta_optimizer",
    "meta_update",
    "show",
]

Params = Any
# Beyond any unroll: a state that has never seen data is due for a restart.
DUE = jnp.iinfo(jnp.int32).max


class AmalgamationState(NamedTuple):
    """What the next truncation needs; B optimizees stand along a leading axis.

    A curriculum changes stage by `state._replace(imitation_weight=..., unroll_length=
    ...)` with arrays of the same dtype, and nothing recompiles.

    Attributes:
      theta: weights of the student.
      meta_state: state of the meta-optimizer.
      params: [B], parameters of the optimizees, in true coordinates.
      student_state: [B], state of the student's rule.
      teacher_params: by teacher, [B], in true coordinates.
      teacher_states: by teacher, [B].
      scale: [B], s, like `params`.
      inner_step: int32, steps made on these optimizees; the greatest int32 where they
        are to be drawn anew.
      count: int32, truncations made.
      imitation_weight: float32, α.
      unroll_length: int32, steps after which the optimizees are drawn anew.
      estimator_state: a `PESState`, else `()`.
    """

    theta: Params
    meta_state: Any
    params: Params
    student_state: Any
    teacher_params: dict[str, Params]
    teacher_states: dict[str, Any]
    scale: Params
    inner_step: jax.Array
    count: jax.Array
    imitation_weight: jax.Array
    unroll_length: jax.Array
    estimator_state: Any


class AmalgamationInfo(NamedTuple):
    """What a person wants to see of one truncation.

    Attributes:
      loss: the objective that was differentiated, mean over tasks, at the perturbed
        weights.
      meta_loss: its mean log improvement.
      imitation_loss: its distances, reduced over teachers and not weighted.
      distances: by teacher, the mean log distance over steps and tasks.
      farthest: by teacher, int32: steps at which it was the farthest, over all tasks.
      floor_share: share of the distances within 1 of the least possible, ln ε - ln N.
      inner_losses: [K], the student's losses, mean over tasks.
      gradient_norm: of the meta-gradient over all weights, before clipping.
      clipped_share: share of the weight tensors w whose gradient is longer than
        0.1 max(‖w‖, 1e-3).
      restarted: bool, whether the optimizees were drawn anew before this truncation.
      is_finite: bool, whether loss and meta-gradient were; where not, the meta-update
        was skipped.
    """

    loss: jax.Array
    meta_loss: jax.Array
    imitation_loss: jax.Array
    distances: dict[str, jax.Array]
    farthest: dict[str, jax.Array]
    floor_share: jax.Array
    inner_losses: jax.Array
    gradient_norm: jax.Array
    clipped_share: jax.Array
    restarted: jax.Array
    is_finite: jax.Array


def default_meta_optimizer() -> optax.GradientTransformation:
    """The paper's: clipping against the norm of the weights, then Adam at 1e-3."""
    return optax.chain(clip_by_weight_norm(), optax.adam(1e-3))


def meta_update(
    meta_optimizer: optax.GradientTransformation,
    state: AmalgamationState,
    gradient: Params,
    loss: jax.Array,
) -> tuple[AmalgamationState, jax.Array]:
    """Moves the weights, unless loss or gradient is not finite; and whether it did."""
    finite = jnp.isfinite(loss) & all_finite(gradient)
    safe = jax.tree.map(lambda g: jnp.where(finite, g, 0), gradient)
    updates, meta_state = meta_optimizer.update(safe, state.meta_state, state.theta)
    theta = optax.apply_updates(state.theta, updates)
    old = (state.theta, state.meta_state)
    theta, meta_state = keep_unless(finite, (theta, meta_state), old)
    count = optax.safe_increment(state.count)
    return state._replace(theta=theta, meta_state=meta_state, count=count), finite


def show(
    measured: Measured,
    loss: jax.Array,
    gradient: Params,
    theta: Params,
    names: list[str],
    floor: jax.Array,
) -> AmalgamationInfo:
    """The info of a truncation; `measured` has leaves [B, ...]."""
    far, counted = measured.distances, measured.counted
    first = jax.nn.one_hot(far.argmax(-1), len(names)) if names else far
    times = jnp.sum(first * counted[..., None], axis=(0, 1)).astype(jnp.int32)
    near = (far <= floor + 1) & counted[..., None]
    total = jnp.maximum(jnp.sum(counted) * len(names), 1)
    mean = far.mean((0, 1))
    long = jax.tree.map(
        lambda g, w: frobenius_norm(g) > weight_norm_bound(w),
        gradient,
        theta,
    )
    return AmalgamationInfo(
        loss=loss,
        meta_loss=measured.meta_loss.mean(),
        imitation_loss=measured.imitation_loss.mean(),
        distances={name: mean[i] for i, name in enumerate(names)},
        farthest={name: times[i] for i, name in enumerate(names)},
        floor_share=jnp.sum(near) / total,
        inner_losses=measured.inner_losses.mean(0),
        gradient_norm=optax.tree.norm(gradient),
        clipped_share=jnp.mean(jnp.stack(jax.tree.leaves(long))),
        restarted=jnp.zeros((), bool),
        is_finite=jnp.ones((), bool),
    )
