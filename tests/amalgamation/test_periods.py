"""Periods, repeats, stages and selection: on tables, then for real."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax import Loop
from metax.amalgamation import (
    PAPER_STAGES,
    AmalgamationState,
    Gate,
    PeriodRecord,
    Settings,
    Stage,
    amalgamate,
    choice,
    curriculum,
    decide,
    pool,
    validation_loss,
)
from tests.amalgamation import toys

NAN, INF = float("nan"), float("inf")


def table(*rows):
    """Records of (stage, period, repeat, train loss, validation)."""
    return [PeriodRecord(*row, accepted=False) for row in rows]


def periods(*validations, stage=0):
    return table(*((stage, i, 0, 0.0, v) for i, v in enumerate(validations)))


PAPER = Settings(4)
SHORT = Settings(2, min_periods=1, patience=1)


@pytest.mark.parametrize(
    ("validation", "expected"),
    [(-0.51, "next_period"), (-0.49, "repeat"), (NAN, "repeat"), (INF, "repeat")],
)
def test_a_period_is_repeated_beyond_half_of_the_best_before(validation, expected):
    """ref + ½ |ref| at ref = -1, the best of the attempts at the period before."""
    before = table((0, 0, 0, 0, -0.9), (0, 1, 0, 0, 3.0), (0, 1, 1, 0, -1.0))
    last = table((0, 2, 0, 0, validation))
    assert decide(before + last, PAPER) == expected


def test_a_positive_reference_may_grow_by_half_as_well():
    grown = [decide(periods(2.0, v), PAPER) for v in (2.9, 3.1)]
    assert grown == ["next_period", "repeat"]


def test_the_first_period_of_all_is_never_repeated():
    for validation in (100.0, NAN, INF):
        assert decide(table((0, 0, 0, NAN, validation)), PAPER) == "next_period"


def test_a_period_after_one_that_was_not_finite_is_not_repeated():
    for threshold in (0.0, 0.5):
        settings = PAPER._replace(repeat_threshold=threshold)
        assert decide(periods(INF, 1.0), settings) == "next_period"
        assert decide(periods(INF, INF), settings) == "next_period"


@pytest.mark.parametrize(
    ("by", "train", "validation", "expected"),
    [
        ("train", -0.6, 5.0, "next_period"),
        ("train", -0.4, -5.0, "repeat"),
        ("train", NAN, -5.0, "repeat"),
        ("validation", 5.0, -0.6, "next_period"),
        ("validation", -5.0, -0.4, "repeat"),
    ],
)
def test_the_first_period_of_a_stage_is_compared_with_the_best_of_the_last_stage(
    by, train, validation, expected
):
    """By its training loss in the paper, by its validation where all lengths agree."""
    before = periods(-0.2, -1.0, -0.8)
    last = table((1, 0, 0, train, validation))
    settings = PAPER._replace(stage_reference=by)
    assert decide(before + last, settings) == expected


def test_repeats_have_a_limit():
    tries = [(0, 1, repeat, 0.0, 9.0) for repeat in range(5)]
    settings = PAPER._replace(max_repeats=4)
    for num in range(1, 5):
        assert decide(periods(-1.0) + table(*tries[:num]), settings) == "repeat"
    assert decide(periods(-1.0) + table(*tries), settings) == "next_period"
    none = PAPER._replace(max_repeats=0)
    assert decide(periods(-1.0) + table(*tries[:1]), none) == "next_period"


def test_a_stage_ends_when_its_best_is_as_old_as_the_patience():
    improving = [-1.0, -1.1, -1.2, -1.3, -1.4, -1.5]
    assert decide(periods(*improving), PAPER) == "next_period"
    stale = [-1.5, -1.4, -1.4, -1.4, -1.4]
    assert decide(periods(*stale), PAPER) == "next_period"  # too few, and age 4
    assert decide(periods(*stale, -1.4), PAPER) == "next_stage"
    assert decide(periods(-1.0, *stale, -1.4), PAPER) == "next_stage"
    assert decide(periods(-1.0, -1.1, *stale[:-1], -1.4), PAPER) == "next_period"


def test_a_tie_is_no_improvement():
    settings = Settings(2, min_periods=1, patience=2)
    assert decide(periods(-1.0, -1.0), settings) == "next_period"
    assert decide(periods(-1.0, -1.0, -1.0), settings) == "next_stage"


def test_min_and_max_periods_bound_a_stage():
    assert decide(periods(-1.0, -0.9), SHORT._replace(min_periods=3)) == "next_period"
    assert decide(periods(-1.0, -0.9), SHORT) == "next_stage"
    capped = SHORT._replace(max_periods=2)
    assert decide(periods(-1.0, -2.0), SHORT) == "next_period"
    assert decide(periods(-1.0, -2.0), capped) == "next_stage"


def test_the_last_stage_ends_the_training():
    before = periods(-1.0, -0.9)
    last = table((1, 0, 0, -1.0, -1.0), (1, 1, 0, -1.0, -0.9))
    assert decide(before + last, SHORT) == "stop"


def test_a_stage_of_fixed_periods_has_exactly_these():
    settings = Settings(2, periods=(2, None), max_periods=1)
    assert decide(periods(-1.0), settings) == "next_period"
    assert decide(periods(-1.0, -2.0), settings) == "next_stage"
    assert decide(periods(-1.0, 5.0), settings) == "repeat"


class Meant(NamedTuple):
    meta_loss: jax.Array


class Script:
    """A training whose every attempt has the losses of a table, and a trace of it."""

    def __init__(self, losses):
        self.losses, self.starts, self.lengths = list(losses), [], []

    def state(self):
        zero = jnp.zeros(())
        return AmalgamationState(
            theta=zero, meta_state=zero, params=zero, student_state=(),
            teacher_params={}, teacher_states={}, scale=zero,
            inner_step=jnp.int32(0), count=jnp.int32(0),
            imitation_weight=jnp.float32(0), unroll_length=jnp.int32(0),
            estimator_state=(),
        )  # fmt: skip

    def run(self, loop, state, keys, data):
        number = len(self.starts)
        self.starts.append((int(state.theta), state))
        self.lengths.append(len(keys))
        # weights and meta state tell which attempt made them
        new = state._replace(theta=jnp.array(number + 1.0), meta_state=-number - 1.0,
                             inner_step=state.unroll_length)  # fmt: skip
        return new, Meant(jnp.array([self.losses[number][0]]))

    def validate(self, theta, key, data, length):
        return self.losses[int(theta) - 1][1]

    def __call__(self, **options):
        options = {"stages": TWO_STAGES, "min_periods": 1, "patience": 1, **options}
        return curriculum(
            Loop(None, None), self.validate, self.state(), jax.random.key(0), (),
            truncation_length=5, trajectories=2, run=self.run, **options,
        )  # fmt: skip


TWO_STAGES = (Stage(10, 20, 0.2), Stage(20, 40, 0.1))
# losses (train, validation) by attempt; stage 0: attempts 1 to 4, then stage 1
PLAIN = [(-1, -1.0), (-1, 3.0), (-1, -2.0), (-1, -1.5), (-2, -3.0), (-2, -2.5)]


def test_a_repeat_begins_where_the_period_began_and_a_stage_at_the_best_period():
    script = Script(PLAIN)
    result = script()
    places = [record[:3] for record in result.records]
    assert places == [(0, 0, 0), (0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 0, 0), (1, 1, 0)]
    # attempt 3 repeats attempt 2; stage 1 begins from attempt 3, the best of stage 0
    assert [start for start, _ in script.starts] == [0, 1, 1, 3, 3, 5]
    accepted = [record.accepted for record in result.records]
    assert accepted == [True, False, True, True, True, True]
    assert [record.validation for record in result.records] == [v for _, v in PLAIN]
    assert result.theta == result.state.theta == 5  # the best of the last stage
    assert result.gate_passed is None


def test_a_stage_restarts_optimizees_and_keeps_the_meta_state_of_the_best_period():
    script = Script(PLAIN)
    script()
    first, later, new_stage = (script.starts[i][1] for i in (0, 2, 4))
    assert new_stage.meta_state == -3
    for state, alpha, length in ((first, 0.2, 10), (later, 0.2, 10),
                                 (new_stage, 0.1, 20)):  # fmt: skip
        np.testing.assert_allclose(state.imitation_weight, alpha, rtol=1e-6)
        assert state.imitation_weight.dtype == jnp.float32
        assert state.unroll_length == length
        assert state.inner_step >= length  # due for a restart
    assert script.lengths == [4, 4, 4, 4, 8, 8]


def test_after_the_last_repeat_training_goes_on_from_the_best_attempt():
    """The release goes on with the last one."""
    losses = [(-1, -1.0), (-1, 3.0), (-1, 1.0), (-1, 2.0), (-1, -1.0)]
    script = Script(losses)
    stages = (Stage(10, 20, 0.2, periods=3),)
    result = script(stages=stages, max_repeats=2)
    assert [record.accepted for record in result.records] == [1, 0, 1, 0, 1]
    assert script.starts[4][0] == 3


def test_a_validation_that_is_not_finite_counts_as_infinite():
    script = Script([(-1, NAN), (-1, -INF), (-1, -1.0), (-1, -0.9)])
    result = script(stages=TWO_STAGES[:1], max_repeats=0, min_periods=4)
    assert [r.validation for r in result.records[:2]] == [INF, INF]
    assert result.theta == 3


def test_stages_may_have_numbers_of_their_own():
    script = Script([(-1, -1.0)] * 4)
    stages = (Stage(10, 20, 0, trajectories=3, periods=1), Stage(5, 20, 0, periods=3))
    result = script(stages=stages)
    assert script.lengths == [6, 2, 2, 2]
    assert [record[:2] for record in result.records] == [(0, 0), (1, 0), (1, 1), (1, 2)]


def test_training_resumed_after_any_period_ends_the_same():
    seen = []
    whole = Script(PLAIN)
    expected = whole(on_period=lambda *pair: seen.append(pair))
    assert len(seen) == len(PLAIN)
    for done in range(len(PLAIN) + 1):
        rest = Script(PLAIN)
        rest.starts = whole.starts[:done]
        result = rest(resume=seen[:done])
        chex.assert_trees_all_equal(result, expected)
        assert len(rest.starts) == len(PLAIN)


def judged_by(passing, scores):
    """A gate that passes some thetas; `log_loss` of each is its score."""
    asked = []

    def gate(theta, key, data):
        asked.append(int(theta))
        score = jnp.full((2, 3), scores.get(int(theta), 0.0))
        return Gate(jnp.array(int(theta) in passing), score)

    return gate, asked


def test_gate_judges_two_of_every_stage_and_the_least_log_loss_wins():
    gate, asked = judged_by({3, 4, 6}, {3: -1.0, 4: -5.0, 6: -2.0})
    result = Script(PLAIN)(gate=gate)
    # of stage 0 attempts 3 and 4, validated best among the accepted; of stage 1 both
    assert asked == [3, 4, 5, 6]
    assert result.theta == 4
    assert result.gate_passed is True


def test_where_nothing_passes_the_gate_the_best_of_the_last_stage_is_marked():
    gate, _ = judged_by(set(), {})
    result = Script(PLAIN)(gate=gate)
    assert result.theta == 5
    assert result.gate_passed is False


def test_papers_stages():
    assert [stage[:3] for stage in PAPER_STAGES] == [
        (100, 200, 0.2), (200, 500, 0.1), (500, 1000, 0.05), (1000, 2000, 0.02),
    ]  # fmt: skip
    assert Settings(4) == (4, 6, 50, 5, 0.5, 4, "train", ())


def small(student, teachers, **options):
    """A loop on a tiny regression, its validation, and jitted ways to run them."""
    task = toys.network(4)
    loop = amalgamate(
        task, student, teachers, truncation_length=2, warmup_steps=1, **options
    )
    validate = jax.jit(
        validation_loss(
            task, student, truncation_length=2, num_trajectories=2, warmup_steps=1
        )
    )
    step = jax.jit(loop.step)

    def run(loop, state, keys, data):
        """One program for any number of steps, as a harness that runs chunks of one."""
        losses = []
        for key in keys:
            state, info = step(state, key, data)
            losses.append(info.meta_loss)
        return state, Meant(jnp.stack(losses))

    return loop, validate, run, step


def test_stages_train_without_a_new_compilation_and_resume_bit_for_bit():
    """Every period has four truncations here: in stages of one, two and four."""
    loop, validate, run, step = small(toys.descent(), pool("small"), unroll_length=8)
    stages = (Stage(2, 4, 0.2, 4), Stage(4, 8, 0.1, 2), Stage(8, 16, 0.05, 1))
    state = jax.jit(loop.init)(jax.random.key(0))
    seen = []

    def train(**options):
        return curriculum(
            loop, validate, state, jax.random.key(1), toys.rows(),
            truncation_length=2, stages=stages, min_periods=2, max_periods=2,
            max_repeats=1, run=run, **options,
        )  # fmt: skip

    result = train(on_period=lambda *pair: seen.append(pair))
    assert step._cache_size() == 1
    assert validate._cache_size() == 1
    assert [record[:2] for record in result.records if record.accepted] == [
        (stage, period) for stage in range(3) for period in range(2)
    ]
    assert len({r.train_loss for r in result.records}) == len(result.records)
    saved = [(r, jax.tree.map(np.array, s)) for r, s in seen[:3]]
    resumed = train(resume=[(r, jax.tree.map(jnp.array, s)) for r, s in saved])
    chex.assert_trees_all_equal(resumed, result)


@pytest.mark.slow
def test_recipe_of_the_choice_policy():
    """Truncations an unroll 1, 2, 5, 5, 5; no teachers; compared by validation.

    The paper has no warm-up in the first period; here every period has it.
    """
    student = choice({"slow": optax.sgd(0.01), "fast": optax.sgd(0.1)}, 2, num_layers=1)
    loop, validate, run, _ = small(student, {}, unroll_length=10)
    depths = (1, 2, 5, 5, 5)
    stages = [Stage(2 * depth, 20, 0.0, periods=1) for depth in depths]
    state = jax.jit(loop.init)(jax.random.key(0))
    result = curriculum(
        loop, validate, state, jax.random.key(1), toys.rows(), truncation_length=2,
        stages=stages, trajectories=1, repeat_threshold=0.9,
        stage_reference="validation", run=run,
    )  # fmt: skip
    accepted = [record for record in result.records if record.accepted]
    assert [record[:2] for record in accepted] == [(stage, 0) for stage in range(5)]
    assert np.isfinite([record.validation for record in accepted]).all()
    assert result.gate_passed is None
    assert result.state.count == sum(depths)
    moved = optax.tree.norm(optax.tree.sub(result.theta, state.theta))
    assert 0 < moved < 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stages": ()}, r"curriculum\(stages=...\)` must have at least one"),
        ({"stages": [Stage(12, 20, 0)]}, "multiple of truncation_length=5; got 12"),
        ({"min_periods": 0}, r"min_periods=...\)` must be at least 1"),
        ({"max_periods": 1, "min_periods": 2}, r"max_periods=...\)` must be at least"),
        ({"patience": 0}, r"patience=...\)` must be at least 1"),
        ({"max_repeats": -1}, r"max_repeats=...\)` must be at least 0"),
        ({"repeat_threshold": -1}, r"repeat_threshold=...\)` must be at least 0"),
        ({"stage_reference": "test"}, r"stage_reference=...\)` must be"),
    ],
)
def test_arguments_outside_their_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Script(PLAIN)(**options)


def test_a_raw_key_is_refused():
    raw = jnp.zeros(2, jnp.uint32)
    with pytest.raises(ValueError, match=r"`curriculum\(key=...\)` must be made by"):
        curriculum(Loop(None, None), None, None, raw, ())
