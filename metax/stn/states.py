"""What a Self-Tuning Network carries, what it shows, and what can be read off it."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metax.arguments import check_has
from metax.base import Params
from metax.stn.hparams import HyperparameterSpace, constrain, unconstrain
from metax.stn.response import ResponseParams, tangent

__all__ = [
    "DeltaSTNInfo",
    "DeltaSTNState",
    "natural_hparams",
    "replace_hparams",
    "response_jacobian",
    "silent_hparams",
]


class DeltaSTNState(NamedTuple):
    """What is carried from one step to the next.

    Attributes:
      params: w0, like the problem's parameters.
      response: Φ, a node for each leaf of w0.
      hparams: λ, unconstrained, of shape init.shape for each name; at least float32.
      scale: raw s of the perturbation, σ = softplus(s), like `hparams`.
      inner_state: of the optimizer of w0.
      response_state: of that of Φ.
      outer_state: of that of λ.
      scale_state: of that of s; None where σ is fixed.
      count: () int32, training steps done.
      space: names, shapes, bounds and scales: a static node.
    """

    params: Params
    response: ResponseParams
    hparams: dict[str, jax.Array]
    scale: dict[str, jax.Array]
    inner_state: optax.OptState
    response_state: optax.OptState
    outer_state: optax.OptState
    scale_state: optax.OptState | None
    count: jax.Array
    space: HyperparameterSpace


class DeltaSTNInfo(NamedTuple):
    """What a person wants to see of a step; NaN where a kernel did not compute it.

    Attributes:
      train_loss: () of the general pass (joint: of the noisy pass), mean over the
        training steps.
      response_loss: () of the response pass (joint: the same as `train_loss`), mean.
      valid_loss: () without the entropy term, at the last validation step.
      entropy: () H(σ), after the step.
      hparams: natural values after the step, init.shape for each name.
      scale: σ after the step, likewise.
      hypergradient: of the last validation step, in unconstrained coordinates.
      grad_norm: () of the gradient in w0, mean over the training steps.
      response_grad_norm: () of that in Φ, mean.
      at_bound: bool, init.shape: a bound of λ, or of a tuned σ, binds.
      updated: () bool, whether λ was stepped: not so during the warm-up.
      is_finite: () bool, over what was computed.
    """

    train_loss: jax.Array
    response_loss: jax.Array
    valid_loss: jax.Array
    entropy: jax.Array
    hparams: dict[str, jax.Array]
    scale: dict[str, jax.Array]
    hypergradient: dict[str, jax.Array]
    grad_norm: jax.Array
    response_grad_norm: jax.Array
    at_bound: dict[str, jax.Array]
    updated: jax.Array
    is_finite: jax.Array


def natural_hparams(state: DeltaSTNState) -> dict[str, jax.Array]:
    """The hyperparameters in natural units.

    Args:
      state: of `delta_stn`.

    Returns:
      For each name an array of shape init.shape.
    """
    _check_state("natural_hparams", state)
    return constrain(state.space.by_name(), state.hparams)


def replace_hparams(state: DeltaSTNState, natural: Mapping[str, Any]) -> DeltaSTNState:
    """The same state at other hyperparameters; a sweep over starts is a vmap of this.

    Args:
      state: of `delta_stn`.
      natural: new values for some or all names, of init.shape or a scalar for all.

    Returns:
      A state with these; optimizer states and all else as they were.

    Raises:
      ValueError: a name or a (concrete) value that the problem excludes.
    """
    _check_state("replace_hparams", state)
    changed = unconstrain(state.space.by_name(), natural)
    shaped = {
        name: jnp.broadcast_to(u, state.hparams[name].shape).astype(
            state.hparams[name].dtype
        )
        for name, u in changed.items()
    }
    return state._replace(hparams={**state.hparams, **shaped})


def response_jacobian(state: DeltaSTNState) -> dict[str, Params]:
    """dw/dλ by name, in unconstrained coordinates: what Φ has learned.

    It holds h times the parameters: for small problems, tests and pictures.

    Args:
      state: of `delta_stn`.

    Returns:
      For each name a tree like the parameters, each leaf of init.shape + leaf.shape.
    """
    _check_state("response_jacobian", state)
    space = state.space
    units = jnp.eye(space.size())
    rows = jax.vmap(lambda unit: tangent(state.response, unit, state.params))(units)
    jacobians, start = {}, 0
    for name, shape in zip(space.names, space.shapes, strict=True):
        stop = start + math.prod(shape)
        jacobians[name] = jax.tree.map(
            lambda x, start=start, stop=stop, shape=shape: x[start:stop].reshape(
                *shape, *x.shape[1:]
            ),
            rows,
        )
        start = stop
    return jacobians


def _check_state(function: str, state: Any) -> None:
    what = "a `DeltaSTNState`"
    check_has(function, "state", state, what, "space", "hparams", "response")


def silent_hparams(infos: DeltaSTNInfo) -> tuple[str, ...]:
    """Names whose hypergradient was exactly zero wherever it was computed.

    After the first cycle: nothing responds to such a hyperparameter, since its leaves
    were excluded, or its gradient is zero in every draw. One that does not change the
    best weights but is part of the loss (a constant added to it) has a hypergradient of
    mean zero, not zero: its λ wanders.

    Args:
      infos: of one or more steps, concrete.

    Returns:
      The names, sorted; none where no step tuned.
    """

    what = "a `DeltaSTNInfo`"
    check_has("silent_hparams", "infos", infos, what, "hypergradient")

    def is_silent(gradient: jax.Array) -> bool:
        known = ~jnp.isnan(gradient)
        return bool(jnp.any(known) and jnp.all(jnp.where(known, gradient, 0) == 0))

    return tuple(
        name
        for name, gradient in sorted(infos.hypergradient.items())
        if is_silent(jnp.asarray(gradient))
    )
