"""What a controller may look at: the paper's features, the released ones, or your own.

    features.paper(2)      features.released("regression")      features.custom(f, ...)

All of them speak of v, the validation loss: `extras["valid_loss"]` where the problem's
`observe` gives one, else the metric.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from metax.arguments import check_count, check_number, check_one_of, refuse
from metax.autoloss.decisions import Observation
from metax.autoloss.normalizing import frozen, running_norm
from metax.autoloss.published import released
from metax.autoloss.vectors import (
    Features,
    FeatureSpec,
    as_float,
    custom,
    keep_before,
    look_up,
    remembering,
    validation_loss,
)

__all__ = [
    "FeatureSpec",
    "Features",
    "custom",
    "frozen",
    "paper",
    "released",
    "running_norm",
]


class TrendState(NamedTuple):
    """What the paper's features remember of a run.

    Attributes:
      seen: bool [], whether the metric was ever refreshed.
      differences: [1 + K], v and its first K differences at the last refresh.
      emas: [1 + K], their exponential moving averages.
    """

    seen: jax.Array
    differences: jax.Array
    emas: jax.Array


def paper(
    num_losses: int,
    *,
    kind: Literal["losses", "gan"] = "losses",
    decay: float = 0.9,
    orders: int = 2,
) -> Features:
    """The features of the paper: progress, gradients, losses, and trends of v.

    "losses" has 1 + 2M + 2 + K entries,

        t/T;  rms ∇ℓ_1, ..., rms ∇ℓ_M;  ℓ_1, ..., ℓ_M;  v;  e_0, ..., e_K
        δ⁰_t = v_t,    δᵏ_t = δᵏ⁻¹_t - δᵏ⁻¹_{t-1},    e_k ← β e_k + (1 - β) δᵏ_t

    where t counts refreshes of v. At the first one e_0 = v and all differences are 0;
    before it v and every e_k are 0. Losses and gradients are those of the last step
    that chose them.

    "gan", for the losses (discriminator, generator) in this order, has 9,

        t/T;  rms ∇ℓ_G, rms ∇ℓ_D, ln(rms ∇ℓ_G / rms ∇ℓ_D);  ℓ_G, ℓ_D, ℓ_G/ℓ_D;
        inception score, classification error of the discriminator

    of which a ratio is 0 until both of its parts are there. It needs `inception_score`
    and `discriminator_error` from the problem's `observe`.

    Args:
      num_losses: M, at least 1; 2 for "gan".
      kind: "losses" or "gan".
      decay: β, in [0, 1). "losses" alone uses it, as it does `orders`.
      orders: K, at least 0.

    Returns:
      The features; `refresh="chosen"`, the metric at the problem's own period.

    Raises:
      ValueError: an argument out of range; at the first update, a name that the problem
        does not give.

    Note:
      The paper leaves open how often v is refreshed, β and K.

    Reference:
      Xu et al., AutoLoss: Learning Discrete Schedules for Alternate Optimization, 2019,
      arXiv:1810.02442, section 4.

    Example:
      >>> from metax.autoloss import features
      >>> features.paper(2).spec.size, features.paper(3).spec.size
      (9, 11)
    """
    check_count("paper", 1, num_losses=num_losses)
    check_count("paper", 0, orders=orders)
    check_one_of("paper", "kind", kind, ("losses", "gan"))
    check_number("paper", "decay", decay, least=0, below=1)
    arguments = {
        "num_losses": num_losses,
        "kind": kind,
        "decay": decay,
        "orders": orders,
    }
    if kind == "gan":
        if num_losses != 2:
            refuse("paper", "num_losses", 'must be 2 with kind="gan"', num_losses)
        plain = _adversarial(FeatureSpec("paper", 1, 9, arguments, "chosen", None))
        scores = {"inception_score": 0.0, "discriminator_error": 0.0}
        return remembering(plain, scores)
    size = 1 + 2 * num_losses + 2 + orders
    spec = FeatureSpec("paper", 1, size, arguments, "chosen", None)

    def init() -> tuple[TrendState, jax.Array]:
        zeros = jnp.zeros(1 + orders)
        return TrendState(jnp.zeros((), bool), zeros, zeros), jnp.zeros(size)

    def update(
        state: TrendState, observation: Observation
    ) -> tuple[TrendState, jax.Array]:
        state = _advance(state, observation, decay, orders)
        rms, losses = observation.gradient_rms, observation.losses
        head = [_progress(observation), as_float(rms), as_float(losses)]
        x = jnp.concatenate([*head, state.differences[:1], state.emas])
        return state, x

    return Features(init, update, lambda state: init(), keep_before, spec)


def _advance(
    state: TrendState, observation: Observation, decay: float, orders: int
) -> TrendState:
    """One more v, where the metric was refreshed."""
    v = validation_loss(observation)
    new = [v]
    for k in range(orders):
        new.append(new[k] - state.differences[k])
    differences = jnp.stack(new)
    emas = decay * state.emas + (1 - decay) * differences
    # the first v seeds: there is nothing that it could differ from
    first = jnp.zeros(1 + orders).at[0].set(v)
    differences = jnp.where(state.seen, differences, first)
    emas = jnp.where(state.seen, emas, first)
    refreshed = observation.metric_refreshed
    return TrendState(
        seen=state.seen | refreshed,
        differences=jnp.where(refreshed, differences, state.differences),
        emas=jnp.where(refreshed, emas, state.emas),
    )


def _adversarial(spec: FeatureSpec) -> Features:
    """The paper's features of a GAN, of the last observation alone."""

    def start(*_) -> tuple[tuple[()], jax.Array]:
        return (), jnp.zeros(spec.size)

    def update(_: tuple[()], observation: Observation) -> tuple[tuple[()], jax.Array]:
        get = lambda name: look_up(
            observation.extras, name, 'paper(kind="gan")', "the problem's `observe`"
        )
        rms_d, rms_g = as_float(observation.gradient_rms)
        loss_d, loss_g = as_float(observation.losses)
        there = (rms_d > 0) & (rms_g > 0)
        # logarithms of 1 where it does not matter: -inf times 0 is NaN in a gradient
        log_ratio = jnp.log(jnp.where(there, rms_g, 1) / jnp.where(there, rms_d, 1))
        ratio = jnp.where(loss_d == 0, 0, loss_g / jnp.where(loss_d == 0, 1, loss_d))
        entries = [rms_g, rms_d, log_ratio, loss_g, loss_d, ratio]
        scores = [get("inception_score"), get("discriminator_error")]
        x = jnp.stack([*entries, *scores])
        return (), jnp.concatenate([_progress(observation), x])

    return Features(start, update, start, keep_before, spec)


def _progress(observation: Observation) -> jax.Array:
    """t/T, with an axis of 1."""
    return (as_float(observation.step) / as_float(observation.num_steps))[None]
