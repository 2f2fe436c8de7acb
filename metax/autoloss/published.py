"""The features of the authors' released code, on which the published numbers rest.

They differ from those of the paper: scaled by hand, without progress and, but for
translation, with no stale values.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from metax.arguments import check_number, check_one_of
from metax.autoloss.decisions import Observation
from metax.autoloss.vectors import (
    Features,
    FeatureSpec,
    as_float,
    check_spec,
    keep_before,
    look_up,
    remembering,
    validation_loss,
)

__all__ = ["ImprovementState", "advance_improvement", "no_improvement", "released"]

OBSERVE = "the problem's `observe`"
AUX = "what its losses return beside themselves (`has_aux`)"
# how many batches of a task its training terms average over
BATCHES = 10

Update = Callable[[Any, Observation], tuple[Any, jax.Array]]


class ImprovementState(NamedTuple):
    """How fast v falls.

    Attributes:
      seen: bool [], whether v was ever refreshed.
      value: [], v at its last refresh, 0 before the first.
      trend: [], d, the exponential moving average of the improvements.
    """

    seen: jax.Array
    value: jax.Array
    trend: jax.Array


class AdversarialState(NamedTuple):
    """Moving averages of the costs of a GAN.

    Attributes:
      seen: bool [], whether there was a step.
      emas: [3], of the generator's cost and the discriminator's on real and fake.
    """

    seen: jax.Array
    emas: jax.Array


class TranslationState(NamedTuple):
    """The last batches of three tasks, and what is known of their validation.

    Attributes:
      counts: int32 [3], batches of each task so far.
      recent: [2, 3, 10], losses and accuracies of the last ten.
      seen: bool [], whether the metric was ever refreshed.
      valid: [2, 3], validation losses and accuracies at the last refresh.
    """

    counts: jax.Array
    recent: jax.Array
    seen: jax.Array
    valid: jax.Array


class Parts(NamedTuple):
    """What differs between the tasks."""

    size: int
    decay: float | None
    refresh: Literal["chosen", "all"]
    observe_every: int
    state: Callable[[], Any]
    start: Callable[[], jax.Array]
    update: Callable[[float, float], Update]


def released(
    task: Literal["regression", "classification", "gan", "translation"],
    *,
    decay: float | None = None,
    score_offset: float = 8.0,
    observe_every: int | None = None,
) -> Features:
    """The features of the authors' released code.

    With rms the root mean square of a gradient, i_t = v_{t-1} - v_t and d the moving
    average of i, which begins at i_1 := .1 and is 1 before that:

        regression      (v - ℓ_1)/ℓ_1;  1 + ln(|d| + 1e-5)/12;  min(1, ℓ_1/20) - .5;
                        ℓ_2 - 1;  rms ∇ℓ_1 - rms ∇ℓ_2
        classification  (v - ℓ_1)/ℓ_1;  1 + ln(|d| + 1e-4)/10;  ℓ_1;  ℓ_2;
                        (a - a_valid)/a_valid;  (rms ∇ℓ_1 - rms ∇ℓ_2)/rms ∇ℓ_2
        gan             ln(rms ∇ℓ_D / rms ∇ℓ_G);  ema(ℓ_G) - 1;
                        (ema(d_real) + ema(d_fake))/2;  inception score - offset
        translation     for each of three tasks (ℓ - 2)/3;  (v - 2)/3;  ℓ - v;  a;
                        a_valid;  10 (a - a_valid)

    where a is an accuracy. A ratio is 0 where its denominator is (the first where ℓ_1 ≤
    1e-6). Losses are (main, penalty) in the first two, (discriminator, generator) in
    the third; in the last ℓ and a are means over the last 10 batches of their task.
    They need, from the problem's `observe`, `train_accuracy`, `valid_accuracy` and
    `valid_loss` (classification), `inception_score` (gan), `valid_loss` [3] and
    `valid_accuracy` [3] (translation); from losses with `has_aux`, `d_real` and
    `d_fake` of the discriminator's (gan) and `accuracy` (translation).

    Args:
      task: which of them.
      decay: of the moving averages, in [0, 1); None for .8 in regression and .9
        elsewhere. Translation has none.
      score_offset: gan: 8 for MNIST, 6 for CIFAR-10.
      observe_every: steps between two refreshes of v; None for 1, in gan 500 and in
        translation 50. Another period is a departure: d then averages improvements over
        that period.

    Returns:
      The features, with 5, 6, 4 or 18 entries.

    Raises:
      ValueError: an argument out of range; at the first update, a name that the problem
        does not give.

    Note:
      In translation, until a task has its first batch or v its first check, the one
      stands for the other; the released code begins with a check.

    Reference:
      The code released with Xu et al., 2019, arXiv:1810.02442.

    Example:
      >>> from metax.autoloss import features
      >>> state, x = features.released("regression").init()
      >>> [round(entry, 5) for entry in x.tolist()]
      [0.0, 1.0, -0.5, -1.0, 0.0]
    """
    check_one_of("released", "task", task, tuple(TASKS))
    check_number("released", "score_offset", score_offset)
    parts = TASKS[task]
    if decay is None:
        decay = parts.decay
    if decay is not None:
        check_number("released", "decay", decay, least=0, below=1)
    every = parts.observe_every if observe_every is None else observe_every
    arguments = {
        "task": task,
        "decay": decay,
        "score_offset": score_offset,
        "observe_every": every,
    }
    spec = FeatureSpec("released", 1, parts.size, arguments, parts.refresh, every)
    check_spec("released", spec)
    start = lambda *_: (parts.state(), parts.start())
    update = parts.update(decay or 0.0, score_offset)
    found = Features(start, update, start, keep_before, spec)
    if task == "gan":  # an entry of 0 before the first score
        return remembering(found, {"inception_score": score_offset})
    if task == "classification":
        return remembering(found, {"train_accuracy": 0.0, "valid_accuracy": 0.0})
    return found


def no_improvement() -> ImprovementState:
    """Before the first step: d = 1."""
    return ImprovementState(jnp.zeros((), bool), jnp.zeros(()), jnp.ones(()))


def advance_improvement(
    state: ImprovementState,
    value: jax.Array,
    refreshed: jax.Array,
    decay: Any,
    first: Any = 0.1,
) -> tuple[ImprovementState, jax.Array]:
    """One more v where it was refreshed; returns the improvement i as well.

    i = v_{t-1} - v_t, `first` at the first refresh, and 0 where there was none.
    """
    improvement = jnp.where(state.seen, state.value - value, first)
    trend = jnp.where(state.seen, state.trend, improvement)
    trend = decay * trend + (1 - decay) * improvement
    new = ImprovementState(
        seen=state.seen | refreshed,
        value=jnp.where(refreshed, value, state.value),
        trend=as_float(jnp.where(refreshed, trend, state.trend)),
    )
    return new, as_float(jnp.where(refreshed, improvement, 0))


def _regression_start() -> jax.Array:
    return as_float(jnp.stack([0, 1 + jnp.log1p(1e-5) / 12, -0.5, -1, 0]))


def _regression(decay: float, _: float) -> Update:
    def update(
        state: ImprovementState, observation: Observation
    ) -> tuple[ImprovementState, jax.Array]:
        state, _ = advance_improvement(
            state, validation_loss(observation), observation.metric_refreshed, decay
        )
        main, penalty = as_float(observation.losses)
        rms_main, rms_penalty = as_float(observation.gradient_rms)
        x = [
            _gap(state, main),
            1 + jnp.log(jnp.abs(state.trend) + 1e-5) / 12,
            jnp.minimum(1, main / 20) - 0.5,
            penalty - 1,
            rms_main - rms_penalty,
        ]
        return state, jnp.stack(x)

    return update


def _classification_start() -> jax.Array:
    return jnp.zeros(6).at[1].set(1 + jnp.log1p(1e-4) / 10)


def _classification(decay: float, _: float) -> Update:
    who = 'released("classification")'

    def update(
        state: ImprovementState, observation: Observation
    ) -> tuple[ImprovementState, jax.Array]:
        extras = observation.extras
        state, _ = advance_improvement(
            state,
            jnp.reshape(look_up(extras, "valid_loss", who, OBSERVE), ()),
            observation.metric_refreshed,
            decay,
        )
        main, penalty = as_float(observation.losses)
        rms_main, rms_penalty = as_float(observation.gradient_rms)
        accuracy = look_up(extras, "train_accuracy", who, OBSERVE)
        valid = look_up(extras, "valid_accuracy", who, OBSERVE)
        x = [
            _gap(state, main),
            1 + jnp.log(jnp.abs(state.trend) + 1e-4) / 10,
            main,
            penalty,
            _ratio(accuracy - valid, valid),
            _ratio(rms_main - rms_penalty, rms_penalty),
        ]
        return state, jnp.stack(x)

    return update


def _gap(state: ImprovementState, main: jax.Array) -> jax.Array:
    """(v - ℓ_1)/ℓ_1, 0 for a tiny ℓ_1 or before v is known."""
    there = state.seen & ~(main <= 1e-6)
    return _ratio(jnp.where(there, state.value - main, 0), jnp.where(there, main, 1))


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Their ratio, 0 where the denominator is."""
    zero = denominator == 0
    return jnp.where(zero, 0, numerator / jnp.where(zero, 1, denominator))


def _gan_state() -> AdversarialState:
    return AdversarialState(jnp.zeros((), bool), jnp.zeros(3))


def _gan(decay: float, score_offset: float) -> Update:
    who = 'released("gan")'

    def update(
        state: AdversarialState, observation: Observation
    ) -> tuple[AdversarialState, jax.Array]:
        real = look_up(observation.aux, "d_real", who, AUX)[0]
        fake = look_up(observation.aux, "d_fake", who, AUX)[0]
        score = look_up(observation.extras, "inception_score", who, OBSERVE)
        costs = jnp.stack([as_float(observation.losses)[1], real, fake])
        emas = decay * state.emas + (1 - decay) * costs
        emas = jnp.where(state.seen, emas, costs)
        # a gradient of exactly zero must not make the whole vector infinite
        rms = jnp.maximum(as_float(observation.gradient_rms), 1e-30)
        x = [
            jnp.log(rms[0]) - jnp.log(rms[1]),
            emas[0] - 1,
            (emas[1] + emas[2]) / 2,
            score - score_offset,
        ]
        return AdversarialState(jnp.ones((), bool), emas), jnp.stack(x)

    return update


def _translation_state() -> TranslationState:
    return TranslationState(
        counts=jnp.zeros(3, jnp.int32),
        recent=jnp.zeros((2, 3, BATCHES)),
        seen=jnp.zeros((), bool),
        valid=jnp.zeros((2, 3)),
    )


def _translation(_: float, __: float) -> Update:
    who = 'released("translation")'

    def update(
        state: TranslationState, observation: Observation
    ) -> tuple[TranslationState, jax.Array]:
        accuracy = look_up(observation.aux, "accuracy", who, AUX)
        train = jnp.stack([as_float(observation.losses), accuracy])
        names = ("valid_loss", "valid_accuracy")
        valid = [look_up(observation.extras, name, who, OBSERVE) for name in names]
        state = _remember(state, observation, train, jnp.stack(valid))
        filled = jnp.minimum(state.counts, BATCHES)
        train = state.recent.sum(-1) / jnp.maximum(filled, 1)
        known = jnp.where(filled > 0, train, state.valid)
        loss, share = known
        valid_loss, valid_share = jnp.where(state.seen, state.valid, known)
        rows = [
            (loss - 2) / 3,
            (valid_loss - 2) / 3,
            loss - valid_loss,
            share,
            valid_share,
            10 * (share - valid_share),
        ]
        nothing = (filled == 0) & ~state.seen
        return state, jnp.where(nothing[:, None], 0, jnp.stack(rows, -1)).reshape(-1)

    return update


def _remember(
    state: TranslationState,
    observation: Observation,
    train: jax.Array,
    valid: jax.Array,
) -> TranslationState:
    """One more batch of the tasks that were stepped on, and the latest check."""
    place = jax.nn.one_hot(state.counts % BATCHES, BATCHES, dtype=bool)
    place &= observation.refreshed[:, None]
    refreshed = observation.metric_refreshed
    return TranslationState(
        counts=state.counts + observation.refreshed.astype(jnp.int32),
        recent=jnp.where(place, train[..., None], state.recent),
        seen=state.seen | refreshed,
        valid=jnp.where(refreshed, valid, state.valid),
    )


TASKS = {
    "regression": Parts(
        5, 0.8, "all", 1, no_improvement, _regression_start, _regression
    ),
    "classification": Parts(
        6, 0.9, "all", 1, no_improvement, _classification_start, _classification
    ),
    "gan": Parts(4, 0.9, "all", 500, _gan_state, lambda: jnp.zeros(4), _gan),
    # a task's training terms are of its own batches: nothing else need be measured
    "translation": Parts(
        18,
        None,
        "chosen",
        50,
        _translation_state,
        lambda: jnp.zeros(18),
        _translation,
    ),
}
