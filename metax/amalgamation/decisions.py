"""What comes after a period of a curriculum, from what is known of all before it.

Tables of numbers alone: nothing here trains, and no state of a loop is looked at.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from metax.arguments import refuse

__all__ = [
    "PAPER_STAGES",
    "Decision",
    "PeriodRecord",
    "Settings",
    "Stage",
    "accept",
    "decide",
]

Decision = Literal["repeat", "next_period", "next_stage", "stop"]


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


def accept(
    done: Sequence[tuple[PeriodRecord, Any]], settings: Settings
) -> list[tuple[PeriodRecord, Any]]:
    """Sets `accepted`: of each period the last attempt, or the best if all failed.

    Args:
      done: attempts in order, each a record and whatever belongs to it.
      settings: the rules.

    Returns:
      The same, with the records' `accepted` as it now stands.
    """
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
