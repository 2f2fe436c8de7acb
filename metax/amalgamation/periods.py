"""A curriculum of longer and longer unrolls, in periods that may be taken back.

Meta-training is unsteady: a period may spoil a student, and one that looks well over
the trained horizon may diverge after it. So training goes by *periods*, each validated;
a period that made things much worse is done again from where it began; a *stage* of one
unroll length ends when validation no longer improves, and its best period goes on.
At the end the candidates of all stages run a long horizon, and the best that survives
is chosen.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from metax.amalgamation.states import DUE, AmalgamationState
from metax.amalgamation.validation import Gate
from metax.arguments import check_at_least, check_one_of, refuse
from metax.base import Loop, check_key, unroll

__all__ = [
    "PAPER_STAGES",
    "CurriculumResult",
    "PeriodRecord",
    "Settings",
    "Stage",
    "curriculum",
    "decide",
]

Params = Any
Data = Any
Decision = Literal["repeat", "next_period", "next_stage", "stop"]
# An attempt at a period: what is known of it, and the state after it.
Attempt = tuple["PeriodRecord", AmalgamationState]


class Stage(NamedTuple):
    """One stage of the curriculum.

    Attributes:
      unroll_length: steps of an optimizee; a multiple of the truncation length.
      validation_length: steps over which the stage is validated.
      imitation_weight: α.
      trajectories: unrolls a period; None for the argument of `curriculum`.
      periods: exactly so many, whatever their validation; None to stop by patience.
    """

    unroll_length: int
    validation_length: int
    imitation_weight: float
    trajectories: int | None = None
    periods: int | None = None


PAPER_STAGES = (
    Stage(100, 200, 0.2),
    Stage(200, 500, 0.1),
    Stage(500, 1000, 0.05),
    Stage(1000, 2000, 0.02),
)


class PeriodRecord(NamedTuple):
    """What is known of one attempt at one period.

    Attributes:
      stage: from 0.
      period: within the stage, from 0.
      repeat: the attempt, from 0.
      train_loss: mean L_meta of its truncations.
      validation: L_meta over the validation length; +∞ where it is not finite.
      accepted: whether training went on from this attempt.
    """

    stage: int
    period: int
    repeat: int
    train_loss: float
    validation: float
    accepted: bool


class Settings(NamedTuple):
    """By what `decide` decides; the arguments of `curriculum` of the same names.

    Attributes:
      num_stages: how many there are.
      periods: `Stage.periods` of each, or `()` where none says.
    """

    num_stages: int
    min_periods: int = 6
    max_periods: int = 50
    patience: int = 5
    repeat_threshold: float = 0.5
    max_repeats: int = 4
    stage_reference: Literal["train", "validation"] = "train"
    periods: tuple[int | None, ...] = ()


class CurriculumResult(NamedTuple):
    """What a curriculum ends with.

    Attributes:
      state: of the loop, after the period that was chosen.
      theta: its weights.
      records: every attempt, in order.
      gate_passed: whether they passed the gate; None without one.
    """

    state: AmalgamationState
    theta: Params
    records: tuple[PeriodRecord, ...]
    gate_passed: bool | None


def decide(records: Sequence[PeriodRecord], settings: Settings) -> Decision:
    """What comes after the last attempt.

    An attempt is repeated, at most `max_repeats` times, where

        value > ref + repeat_threshold |ref|

    with its validation as the value and the best of the attempts at the period before
    as ref. In the first period of a stage the value is its training loss or, by
    `stage_reference`, its validation, and ref the best validation of the stage before.
    The very first period is not repeated. A stage ends after `min_periods` once its
    best validation is `patience` periods old, or after `max_periods`.

    Args:
      records: all attempts so far, at least one; `accepted` of the last does not count.
      settings: the rules.

    Returns:
      "repeat" the period, or go on to the "next_period" or "next_stage", or "stop".
    """
    if not records:
        refuse("decide", "records", "must hold at least one attempt", records)
    last = records[-1]
    if last.repeat < settings.max_repeats and _is_worse(records, settings):
        return "repeat"
    best = {
        p: min(r.validation for r in records if (r.stage, r.period) == (last.stage, p))
        for p in range(last.period + 1)
    }
    age = last.period - min(best, key=lambda period: best[period])
    done = last.period + 1
    old = done >= settings.min_periods and age >= settings.patience
    over = old or done >= settings.max_periods
    fixed = settings.periods[last.stage] if settings.periods else None
    if not (over if fixed is None else done >= fixed):
        return "next_period"
    return "stop" if last.stage + 1 == settings.num_stages else "next_stage"


def curriculum(
    loop: Loop,
    validate: Callable[..., Any],
    state: AmalgamationState,
    key: jax.Array,
    data: Data,
    *,
    truncation_length: int = 100,
    stages: Sequence[Stage] = PAPER_STAGES,
    trajectories: int = 10,
    min_periods: int = 6,
    max_periods: int = 50,
    patience: int = 5,
    repeat_threshold: float = 0.5,
    max_repeats: int = 4,
    stage_reference: Literal["train", "validation"] = "train",
    gate: Callable[..., Gate] | None = None,
    run: Callable[..., tuple] = unroll,
    on_period: Callable[[PeriodRecord, AmalgamationState], None] | None = None,
    resume: Sequence[Attempt] = (),
) -> CurriculumResult:
    """Drives `amalgamate` through its stages, on the host; no jit or file of its own.

    A period is `trajectories` unrolls, then a validation under one fixed key. After a
    period that was repeated in vain training goes on from its best attempt; a stage
    starts from the best period of the one before, weights and meta-optimizer, with new
    optimizees. In the end, without a gate, the best-validated period of the last stage
    is chosen, as in the paper. With one, the two best-validated periods of every stage
    pass through it, and of the survivors that with the least mean `log_loss` is chosen:
    validation orders candidates badly, and the last stage is not always the best.

    Args:
      loop: from `amalgamate`, with the same `truncation_length`.
      validate: from `validation_loss`, jitted by the caller.
      state: from `loop.init`, or trained already.
      key: for all that is random.
      data: of the task, training data only.
      truncation_length: K; divides every stage's unroll length.
      stages: what to go through.
      trajectories: unrolls a period, at least 1.
      min_periods: of a stage, at least 1.
      max_periods: of a stage, at least `min_periods`.
      patience: periods without an improvement, at least 1.
      repeat_threshold: how much worse is too much, at least 0.
      max_repeats: at least 0.
      stage_reference: what the first period of a stage is compared by, "train" or
        "validation".
      gate: from `long_horizon_gate`, jitted by the caller; None for none.
      run: called as `run(loop, state, keys, data)`; pass a jitted `unroll`.
      on_period: called after each attempt; save there. `accepted` is final only for
        attempts before the last one.
      resume: what `on_period` was called with, in order: training goes on after it as
        it would have.

    Returns:
      A `CurriculumResult`. With `gate_passed=False` no candidate survived: do not ship
      its weights.

    Raises:
      ValueError: an argument outside its range, or lengths that do not divide.

    Reference:
      Huang et al., Optimizer Amalgamation, 2022, arXiv:2203.06474, training details.
    """
    check_key(key, "curriculum(key=...)")
    settings = Settings(
        len(stages), min_periods, max_periods, patience, repeat_threshold, max_repeats,
        stage_reference, tuple(stage.periods for stage in stages),
    )  # fmt: skip
    _check(stages, truncation_length, trajectories, settings)
    key_train, key_validate, key_gate = jax.random.split(key, 3)

    def attempt(place: tuple[int, int, int], start: AmalgamationState) -> Attempt:
        """Trains one period and validates it."""
        index, (stage, period, repeat) = stages[place[0]], place
        unrolls = trajectories if index.trajectories is None else index.trajectories
        num = unrolls * index.unroll_length // truncation_length
        own = key_train
        for number in (stage, period, repeat):
            own = jax.random.fold_in(own, number)
        after, infos = run(loop, start, jax.random.split(own, num), data)
        length = jnp.array(index.validation_length, jnp.int32)
        value = float(validate(after.theta, key_validate, data, length))
        value = value if value - value == 0 else float("inf")
        train = float(jnp.mean(infos.meta_loss))
        return PeriodRecord(*place, train, value, accepted=False), after

    done = list(resume)
    begun = _stage_start(state, stages[0])
    while True:
        place, start = _what_next(done, settings, stages, begun)
        if place is None:
            break
        done.append(attempt(place, start))
        if on_period is not None:
            on_period(*done[-1])
    accepted = _accept(done, settings)
    judge = None if gate is None else lambda theta: gate(theta, key_gate, data)
    (_, state), passed = _select(accepted, len(stages), judge)
    records = tuple(record for record, _ in accepted)
    return CurriculumResult(state, state.theta, records, passed)


def _is_worse(records: Sequence[PeriodRecord], settings: Settings) -> bool:
    """Whether the last attempt made things much worse than they were."""
    last = records[-1]
    if last.stage == 0 and last.period == 0:
        return False
    if last.period:
        before = [
            r for r in records if (r.stage, r.period) == (last.stage, last.period - 1)
        ]
        value = last.validation
    else:
        before = [r for r in records if r.stage == last.stage - 1]
        by_train = settings.stage_reference == "train"
        value = last.train_loss if by_train else last.validation
    reference = min(record.validation for record in before)
    # NaN and +∞ are worse than anything, but for a reference that is no better; ∞ · 0
    # in the second comparison has no value
    fine = value <= reference
    fine = fine or value <= reference + settings.repeat_threshold * abs(reference)
    return not fine


def _accept(done: Sequence[Attempt], settings: Settings) -> list[Attempt]:
    """Sets `accepted`: of each period the last attempt, or the best if all failed."""
    accepted, seen = [], []
    for _, group in itertools.groupby(done, key=lambda pair: pair[0][:2]):
        attempts = list(group)
        records = [record for record, _ in attempts]
        seen += records
        failed = records[-1].repeat == settings.max_repeats
        chosen = records[-1]
        if failed and _is_worse(seen, settings):
            chosen = min(records, key=lambda record: record.validation)
        accepted += [(r._replace(accepted=r is chosen), s) for r, s in attempts]
    return accepted


def _what_next(
    done: list[Attempt],
    settings: Settings,
    stages: Sequence[Stage],
    begun: AmalgamationState,
) -> tuple[tuple[int, int, int] | None, AmalgamationState]:
    """The next (stage, period, repeat) and where it starts; None at the end."""
    if not done:
        return (0, 0, 0), begun
    last = done[-1][0]
    decision = decide([record for record, _ in done], settings)
    accepted = [pair for pair in _accept(done, settings) if pair[0].accepted]
    if decision == "stop":
        return None, begun
    if decision == "repeat":
        earlier = [p for p in accepted if p[0][:2] != last[:2]]
        place = (last.stage, last.period, last.repeat + 1)
        if last.period:
            return place, earlier[-1][1]
        best = _best([p for p in earlier if p[0].stage == last.stage - 1])
        return place, _stage_start(best[1], stages[last.stage])
    if decision == "next_period":
        return (last.stage, last.period + 1, 0), accepted[-1][1]
    best = _best([pair for pair in accepted if pair[0].stage == last.stage])
    return (last.stage + 1, 0, 0), _stage_start(best[1], stages[last.stage + 1])


def _stage_start(state: AmalgamationState, stage: Stage) -> AmalgamationState:
    """The state with the numbers of a stage, its optimizees due for a restart."""
    like = state.imitation_weight
    return state._replace(
        imitation_weight=jnp.full_like(like, stage.imitation_weight),
        unroll_length=jnp.full_like(state.unroll_length, stage.unroll_length),
        inner_step=jnp.full_like(state.inner_step, DUE),
    )


def _best(pairs: Sequence[Attempt]) -> Attempt:
    return min(pairs, key=lambda pair: pair[0].validation)


def _select(
    attempts: Sequence[Attempt],
    num_stages: int,
    judge: Callable[[Params], Gate] | None,
) -> tuple[Attempt, bool | None]:
    """The attempt to keep, and whether it passed the gate."""
    accepted = [pair for pair in attempts if pair[0].accepted]
    fallback = _best([pair for pair in accepted if pair[0].stage == num_stages - 1])
    if judge is None:
        return fallback, None
    survivors = []
    for stage in range(num_stages):
        own = [pair for pair in accepted if pair[0].stage == stage]
        for pair in sorted(own, key=lambda pair: pair[0].validation)[:2]:
            outcome = judge(pair[1].theta)
            if outcome.passed:
                survivors.append((float(outcome.log_loss.mean()), pair))
    if not survivors:
        return fallback, False
    return min(survivors, key=lambda scored: scored[0])[1], True


def _check(
    stages: Sequence[Stage], length: int, trajectories: int, settings: Settings
) -> None:
    name = "curriculum"
    check_at_least(
        name,
        1,
        truncation_length=length,
        trajectories=trajectories,
        min_periods=settings.min_periods,
        patience=settings.patience,
    )
    check_at_least(
        name,
        0,
        repeat_threshold=settings.repeat_threshold,
        max_repeats=settings.max_repeats,
    )
    words = ("train", "validation")
    check_one_of(name, "stage_reference", settings.stage_reference, words)
    if settings.max_periods < settings.min_periods:
        raise ValueError(
            "`curriculum(max_periods=...)` must be at least `min_periods`; got "
            f"max_periods={settings.max_periods}, min_periods={settings.min_periods}."
        )
    if not stages:
        raise ValueError("`curriculum(stages=...)` must have at least one stage.")
    for stage in stages:
        if stage.unroll_length < 1 or stage.unroll_length % length:
            raise ValueError(
                "`curriculum(stages=...)`: every unroll_length must be a multiple of "
                f"truncation_length={length}; got {stage.unroll_length}."
            )
