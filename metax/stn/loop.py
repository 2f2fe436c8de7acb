"""Self-Tuning Networks as a Loop: Delta-STN, STN and the four settings between them.

Two words of the papers: the *general* weights w0 are the network's own; the *response*
Φ maps a displacement of the hyperparameters to one of the weights. λ is unconstrained,
ε = σ ⊙ z with z ~ N(0, I) the perturbation, H(σ) its entropy. What is minimised stands
in `objectives.py`, what a step does in `kernels.py`.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import optax

from metax.base import Batch, BilevelProblem, Data, Params
from metax.stn import kernels
from metax.stn.doors import check_options, check_parts, check_scales
from metax.stn.hparams import make_space
from metax.stn.objectives import Objectives
from metax.stn.perturbation import Perturbation
from metax.stn.response import Response, best_response
from metax.stn.states import DeltaSTNInfo, DeltaSTNState

__all__ = ["DeltaSTN", "centered_stn", "delta_stn", "stn"]

Kernel = Callable[[DeltaSTNState, Batch, jax.Array], tuple[DeltaSTNState, DeltaSTNInfo]]


class DeltaSTN(NamedTuple):
    """A `Loop`, by its first two fields, and the kernels its step is made of.

    Attributes:
      init: `init(key) -> state`.
      step: `step(state, key, data) -> (state, info)`: `train_steps` training steps,
        then, after the warm-up, `valid_steps` validation steps.
      train_step: `train_step(state, batch, key) -> (state, info)`: w0 and Φ.
      valid_step: `valid_step(state, batch, key) -> (state, info)`: λ and σ.
      params: `params(state)`, the weights at the current λ.
    """

    init: Callable[[jax.Array], DeltaSTNState]
    step: Callable[[DeltaSTNState, jax.Array, Data], tuple[DeltaSTNState, DeltaSTNInfo]]
    train_step: Kernel
    valid_step: Kernel
    params: Callable[[DeltaSTNState], Params]


def delta_stn(
    problem: BilevelProblem,
    *,
    inner_optimizer: optax.GradientTransformation,
    response_optimizer: optax.GradientTransformation,
    outer_optimizer: optax.GradientTransformation,
    scale_optimizer: optax.GradientTransformation | None = None,
    entropy_weight: float | jax.Array = 1e-3,
    train_steps: int = 5,
    valid_steps: int = 1,
    warmup_steps: int = 0,
    centered: bool = True,
    split: bool = True,
    linearized: bool = True,
    perturbation: Literal["example", "group", "batch"] = "example",
    valid_forward: Literal["nonlinear", "linearized"] = "nonlinear",
    response: Response | None = None,
    groups: int = 8,
    antithetic: bool = False,
    couple_draws: bool = False,
    logit_bound: float = 5.0,
    scale_bounds: tuple[float, float] = (1e-3, 3.0),
    predictor: bool = False,
) -> DeltaSTN:
    """Tunes hyperparameters in the run that trains the network.

    A training step descends, and a validation step follows,

        w0 ← w0 - rule(∂ L_T(λ, w0))                                   general pass
        Φ  ← Φ  - rule(∂ E_ε L_T(λ + ε, f(w0) + J_w f Φε))             response pass
        λ, σ ← λ, σ - rule(∂ E_ε L_V(w0 + Φ(λ + ε - stop λ)) - τ H(σ))

    The derivative of the training loss in λ is never needed: λ enters by its samples
    alone. So dropout rates, augmentation strengths and counts can be tuned. What does
    not change the best weights (a learning rate, the momentum of running statistics)
    cannot: its response is zero.

    In floating point operations a training step costs 2.67 plain steps and a noisy
    validation step 1.3; Φ and its optimizer take as much memory as the weights and
    theirs. On a CPU XLA takes the gradients of convolutions several times as long
    inside a `lax.scan`, which `step` is, as outside: drive `train_step` and
    `valid_step` there, each jitted; `metax.harness.evaluate_in_turn` runs a loop so.

    Args:
      problem: what is solved. Its parameters are floats; hyperparameters of data that
        a step never sees are refused at the first step.
      inner_optimizer: an optax rule for w0.
      response_optimizer: one for Φ, of the same learning rate in the paper.
      outer_optimizer: one for λ. A bias-corrected one (`optax.adam`): RMSprop without
        it starts with steps of 10 learning rates.
      scale_optimizer: one for the raw σ. None: σ stays, and the validation step has
        neither noise nor entropy.
      entropy_weight: τ ≥ 0; σ comes to rest near √(τ / curvature).
      train_steps: training steps a step, at least 1.
      valid_steps: validation steps a step, at least 1.
      warmup_steps: training steps before tuning begins; λ and σ stay as they are,
        noise and Φ are on.
      centered: perturb the response around λ. False with the next two is STN.
      split: train w0 without noise, by an objective of its own.
      linearized: fit Φ on the linearised network; needs `centered`.
      perturbation: "example", an ε for each example (flax.linen layers; the least
        noise); "group", for each of `groups` parts of the batch, one after the other:
        slow where batches are small; "batch", one for all (the last two: any model).
      valid_forward: the network in a noisy validation step.
      response: the form of Φ; by default `best_response(h)` for all h coordinates.
      groups: for "group", a divisor of the batch.
      antithetic: the second half of the perturbations is the first, negated.
      couple_draws: the general and the response pass draw from the same key.
      logit_bound: λ of a logit stays in ±logit_bound; 5 is .0067 to .9933 of the range.
      scale_bounds: of σ, where it is tuned.
      predictor: w0 ← w0 + ΦΔλ after a step of λ.

    Returns:
      A `DeltaSTN`.

    Raises:
      ValueError: an option or a hyperparameter breaks a rule above; when traced, a
        batch, a loss or a layer does. By function, argument, rule and value.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from metax import BilevelProblem, Hyperparameter, squared_norm, unroll
      >>> from metax.stn import best_response, delta_stn, natural_hparams
      >>> def train_loss(outputs, batch, hparams, params):
      ...     penalty = hparams["decay"] * squared_norm(params)
      ...     return 0.5 * ((outputs - 1) ** 2 + penalty)
      >>> problem = BilevelProblem(  # the best w is 1 / (1 + decay); wanted is 1 / 2
      ...     lambda key: {"w": jnp.zeros(())},
      ...     predict=lambda params, batch, hparams, key: params["w"] * batch,
      ...     train_loss=train_loss,
      ...     valid_loss=lambda outputs, batch: jnp.mean((outputs - 0.5) ** 2),
      ...     sample_train=lambda data, key: data,
      ...     sample_valid=lambda data, key: data,
      ...     hparams={"decay": Hyperparameter(0.1, 1e-3, 10.0, "log", 0.1)},
      ... )
      >>> loop = delta_stn(
      ...     problem,
      ...     inner_optimizer=optax.sgd(0.3),
      ...     response_optimizer=optax.sgd(9.0),
      ...     outer_optimizer=optax.adam(0.02),
      ...     perturbation="batch",
      ... )
      >>> keys = jax.random.split(jax.random.key(1), 500)
      >>> state, infos = unroll(loop, loop.init(jax.random.key(0)), keys, jnp.ones(4))
      >>> print(f"{natural_hparams(state)['decay']:.1f}")
      1.0

    References:
      Bae & Grosse, "Delta-STN: efficient bilevel optimization for neural networks using
      structured response Jacobians", NeurIPS 2020, arXiv 2010.13514.

    Note:
      Bounds on λ and σ are ours: without them the authors' code drives dropout rates
      below .001, whence they do not return.
    """
    name = "delta_stn"
    check_parts(
        name,
        problem,
        response,
        inner_optimizer=inner_optimizer,
        response_optimizer=response_optimizer,
        outer_optimizer=outer_optimizer,
        scale_optimizer=scale_optimizer,
    )
    check_options(
        name,
        centered=centered,
        split=split,
        linearized=linearized,
        perturbation=perturbation,
        valid_forward=valid_forward,
        antithetic=antithetic,
        predictor=predictor,
        scale_bounds=scale_bounds,
        entropy_weight=entropy_weight,
        logit_bound=logit_bound,
        train_steps=train_steps,
        valid_steps=valid_steps,
        warmup_steps=warmup_steps,
        groups=groups,
    )
    space = make_space(problem.hparams, name, logit_bound)
    if scale_optimizer is not None:
        check_scales(name, problem.hparams, scale_bounds)
    if response is None:
        response = best_response(space.size())
    perturb = Perturbation(perturbation, groups, antithetic, space, response)
    is_valid_linear = valid_forward == "linearized"
    objectives = Objectives(
        problem, perturb, centered, split, linearized, is_valid_linear
    )
    rules = kernels.Rules(
        inner=inner_optimizer,
        response=response_optimizer,
        outer=outer_optimizer,
        scale=scale_optimizer,
        entropy_weight=entropy_weight,
        train_steps=train_steps,
        valid_steps=valid_steps,
        warmup_steps=warmup_steps,
        couple_draws=couple_draws,
        predictor=predictor,
        logit_bound=logit_bound,
        scale_bounds=scale_bounds,
    )
    parts = (objectives, rules)
    return DeltaSTN(
        init=functools.partial(kernels.init, *parts, problem.hparams),
        step=functools.partial(kernels.step, *parts),
        train_step=functools.partial(kernels.train_step, *parts),
        valid_step=functools.partial(kernels.valid_step, *parts),
        params=functools.partial(kernels.weights_at_centre, *parts),
    )


def centered_stn(problem: BilevelProblem, **options: Any) -> DeltaSTN:
    """Centred STN: `delta_stn(problem, linearized=False, ...)`.

    The response is fitted on the network itself, f(x, w0 + Φε), in place of its
    linearisation, at the same cost.

    Args:
      problem: what is solved.
      **options: those of `delta_stn`.

    Returns:
      A `DeltaSTN`.
    """
    return delta_stn(problem, linearized=False, **options)


def stn(problem: BilevelProblem, **options: Any) -> DeltaSTN:
    """STN: `delta_stn(problem, centered=False, split=False, linearized=False, ...)`.

    The weights at λ are w0 + Φλ, and one noisy objective trains both: 2 plain steps a
    training step in floating point operations. The farther λ lies from 0 the worse it
    is conditioned, and the weights move whenever λ does.

    MacKay et al., "Self-Tuning Networks", ICLR 2019, arXiv 1903.03088.

    Args:
      problem: what is solved.
      **options: those of `delta_stn`.

    Returns:
      A `DeltaSTN`.
    """
    return delta_stn(problem, centered=False, split=False, linearized=False, **options)
