"""The objectives of the six settings, and their gradients.

    general      min_{w0}     L_T(λ, w(η | ε = 0))
    response     min_Φ        E_ε L_T(λ + ε, w(η))
    joint        min_{w0, Φ}  E_ε L_T(λ + ε, w(η))
    validation   min_{λ, σ}   E_ε L_V(λ + ε, w(η)) - τ H(σ)

with w(η) = w0 + Φη, the response input η = ε where centred (seen as λ + ε -
stop_gradient(λ) in validation) and η = λ + ε where not. Linearised, the predictions
f(x, w0) + J_w f(x, w0) Φη replace f(x, w(η)) in the response and the joint objective.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metax.base import Batch, BilevelProblem, Outputs, Params
from metax.stn.doors import check_losses
from metax.stn.perturbation import (
    Perturbation,
    batch_size,
    displaced,
    natural_values,
    responded,
)
from metax.stn.response import ResponseParams

__all__ = ["Objectives"]


class Objectives(NamedTuple):
    """What is minimised; static.

    Attributes:
      problem: the problem.
      perturbation: how a batch is perturbed.
      centered: η = ε in place of λ + ε.
      split: the general weights have an objective of their own, without noise.
      linearized: the response objective sees the linearised network.
      valid_linearized: so does the validation objective.
    """

    problem: BilevelProblem
    perturbation: Perturbation
    centered: bool
    split: bool
    linearized: bool
    valid_linearized: bool


def current_params(
    objectives: Objectives, params: Params, phi: ResponseParams, lam: jax.Array
) -> Params:
    """The weights at λ itself: w0, or w0 + Φλ where not centred."""
    return params if objectives.centered else displaced(params, phi, lam)


def general_gradient(
    objectives: Objectives,
    weights: tuple[Params, ResponseParams],
    lam: jax.Array,
    batch: Batch,
    key: jax.Array,
) -> tuple[jax.Array, Outputs, Params]:
    """Ordinary training at λ: loss, outputs, and the gradient in w0 with Φ held."""
    problem, space = objectives.problem, objectives.perturbation.space
    natural = natural_values(space, lam, batch_size(batch))

    def loss(params: Params) -> tuple[jax.Array, Outputs]:
        outputs = problem.predict(params, batch, natural, key)
        return _mean_loss(problem, outputs, batch, natural, params), outputs

    now = current_params(objectives, *weights, lam)
    (value, outputs), gradient = jax.value_and_grad(loss, has_aux=True)(now)
    return value, outputs, gradient


def noisy_gradient(
    objectives: Objectives,
    weights: tuple[Params, ResponseParams],
    hparams: tuple[jax.Array, jax.Array],
    batch: Batch,
    key: jax.Array,
) -> tuple[jax.Array, Outputs, Any]:
    """The response objective at (λ, ε): loss, outputs, and the gradient in Φ.

    For the joint objective that in (w0, Φ).
    """
    lam, eps = hparams
    eta = eps if objectives.centered else lam + eps

    def loss(moving: Any) -> tuple[jax.Array, Outputs]:
        params, phi = (weights[0], moving) if objectives.split else moving
        losses, outputs = responded(
            objectives.perturbation,
            objectives.problem,
            (params, phi),
            (lam + eps, eta),
            batch,
            key,
            linearized=objectives.linearized,
            finish=lambda *seen: _losses(objectives.problem, *seen),
        )
        return jnp.mean(losses), outputs

    moving = weights[1] if objectives.split else weights
    (value, outputs), gradient = jax.value_and_grad(loss, has_aux=True)(moving)
    return value, outputs, gradient


def noisy_valid_loss(
    objectives: Objectives,
    weights: tuple[Params, ResponseParams],
    hparams: tuple[jax.Array, jax.Array],
    batch: Batch,
) -> tuple[jax.Array, Outputs]:
    """E_ε L_V at (λ, ε), differentiable in both; and the outputs."""
    lam, eps = hparams
    eta = lam + eps - (jax.lax.stop_gradient(lam) if objectives.centered else 0.0)
    _, outputs = responded(
        objectives.perturbation,
        objectives.problem,
        weights,
        (lam + eps, eta),
        batch,
        None,
        linearized=objectives.valid_linearized,
        finish=lambda *seen: (),
    )
    return objectives.problem.valid_loss(outputs, batch), outputs


def plain_valid_gradient(
    objectives: Objectives,
    weights: tuple[Params, ResponseParams],
    lam: jax.Array,
    batch: Batch,
) -> tuple[jax.Array, Outputs, jax.Array]:
    """Without noise: loss, outputs, Φᵀ ∂_w L_V + ∂_λ L_V: one ordinary gradient."""
    problem, perturbation = objectives.problem, objectives.perturbation
    params = current_params(objectives, *weights, lam)

    def loss(params: Params, lam: jax.Array) -> tuple[jax.Array, Outputs]:
        natural = natural_values(perturbation.space, lam, batch_size(batch))
        outputs = problem.predict(params, batch, natural, None)
        return problem.valid_loss(outputs, batch), outputs

    (value, outputs), (by_params, direct) = jax.value_and_grad(
        loss, argnums=(0, 1), has_aux=True
    )(params, lam)
    indirect = perturbation.response.contract(weights[1], by_params, weights[0])
    return value, outputs, (indirect + direct).astype(lam.dtype)


def _losses(
    problem: BilevelProblem, outputs: Outputs, batch: Batch, natural: Any, params: Any
) -> jax.Array:
    losses = problem.train_loss(outputs, batch, natural, params)
    check_losses(losses, batch_size(batch))
    return losses


def _mean_loss(problem: BilevelProblem, *seen: Any) -> jax.Array:
    return jnp.mean(_losses(problem, *seen))
