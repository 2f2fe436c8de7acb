"""A curriculum of longer and longer unrolls, in periods that may be taken back.

Meta-training is unsteady: a period may spoil a student, and one that looks well over
the trained horizon may diverge after it. So training goes by *periods*, each validated;
a period that made things much worse is done again from where it began; a *stage* of one
unroll length ends when validation no longer improves, and its best period goes on.
At the end the candidates of all stages run a long horizon, and the best that survives
is chosen.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from metax.amalgamation.decisions import (
    PAPER_STAGES,
    PeriodRecord,
    Settings,
    Stage,
    accept,
    decide,
)
from metax.amalgamation.states import DUE, AmalgamationState
from metax.amalgamation.validation import Gate
from metax.arguments import check_at_least, check_one_of
from metax.base import Loop, check_key, unroll

__all__ = [
    "CurriculumResult",
    "curriculum",
]

Params = Any
Data = Any
# An attempt at a period: what is known of it, and the state after it.
Attempt = tuple[PeriodRecord, AmalgamationState]


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
    accepted = accept(done, settings)
    judge = None if gate is None else lambda theta: gate(theta, key_gate, data)
    (_, state), passed = _select(accepted, len(stages), judge)
    records = tuple(record for record, _ in accepted)
    return CurriculumResult(state, state.theta, records, passed)


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
    accepted = [pair for pair in accept(done, settings) if pair[0].accepted]
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
