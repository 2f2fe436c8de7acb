from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax import Loop
from metax.harness import (
    evaluate,
    first_non_finite,
    freeze,
    grid,
    replicate,
    train,
)

KEY = jax.random.key(3)
STEPS = 6


class Info(NamedTuple):
    x: jax.Array
    count: jax.Array
    is_finite: jax.Array


def growing(rate):
    """x ← rate·x + noise, from 1; at 100 and above the step is not finite, as is x.

    Only a run that goes on regardless would come back: what is not finite becomes 0.
    """

    def step(state, key, data):
        x, count = state
        x = rate * jnp.nan_to_num(x) + 1e-3 * jax.random.normal(key)
        x = jnp.where(x >= 100, jnp.nan, x)
        return (x, count + 1), Info(x, count, jnp.isfinite(x))

    return Loop(lambda key: (jnp.ones(()), jnp.int32(0)), step)


RATES = jnp.array([0.5, 5.0, 1.0])  # the second fails at step 2


def test_a_run_stays_at_the_state_before_its_first_step_that_is_not_finite():
    loop = growing(5.0)
    before, _ = train(loop, None, KEY, 2)
    frozen, infos = train(freeze(loop, None), None, KEY, STEPS, check_finite=False)
    for wanted, got in zip(before, frozen.state, strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert not frozen.is_finite
    assert infos.is_finite.tolist() == [True] * 2 + [False] * 4
    assert np.isfinite(infos.x).tolist() == [True] * 2 + [False] * 4
    # the step that failed still says what it saw; an integer cannot say NaN
    assert infos.count[2] == 2


def test_the_others_go_on_bit_for_bit_as_if_alone():
    """In one program, whose settings are arguments: with and without the bad run."""
    key_init, key_run = jax.random.split(KEY)

    @jax.jit
    def run(rates):
        loop = freeze(grid(growing, rates), None)
        step = lambda state, i: loop.step(state, jax.random.fold_in(key_run, i), None)
        return jax.lax.scan(step, loop.init(key_init), jnp.arange(STEPS))

    (state, _), infos = run(RATES)
    (sound, flags), wanted = run(RATES.at[1].set(0.9))
    assert flags.all()
    for at in (0, 2):
        np.testing.assert_array_equal(state[0][at], sound[0][at])
        np.testing.assert_array_equal(infos.x[:, at], wanted.x[:, at])
    assert state[1].tolist() == [STEPS, 2, STEPS]


def test_each_setting_of_each_replicate_freezes_by_itself_and_is_reported(capsys):
    lines = {}
    for chunk in (1, 3):
        seen = []
        look = lambda step, state, infos, seen=seen: seen.append(state[1].tolist())
        states, infos = evaluate(
            grid(growing, RATES), None, KEY, STEPS, num_seeds=2,
            chunk=chunk, on_chunk=look, progress="run",
        )  # fmt: skip
        assert first_non_finite(infos).tolist() == [[-1, 2, -1]] * 2
        # those who look on see the state of the loop, not what freezing needs
        assert seen[-1] == states[1].tolist() == [[STEPS, 2, STEPS]] * 2
        text = capsys.readouterr().err
        lines[chunk] = [x for x in text.split("\n") if "frozen" in x]
    said = "run: not finite, frozen: replicate 0, 1 at step 2; 1, 1 at step 2"
    assert [len(x) for x in lines.values()] == [1, 1]
    assert said in lines[1][0]
    assert said in lines[3][0]


def test_freezing_around_replicates_is_freezing_inside():
    """So that `record_run` can have it: the flags are state like any other."""
    outside = freeze(replicate(grid(growing, RATES), 2), None)
    inside = replicate(freeze(grid(growing, RATES), None), 2)
    run = lambda loop: train(loop, None, KEY, STEPS, check_finite=False)
    (a, infos_a), (b, infos_b) = run(outside), run(inside)
    assert a.is_finite.shape == (2, 3)
    jax.tree.map(np.testing.assert_array_equal, (a, infos_a), (b, infos_b))


def test_flags_inside_a_run_count_together():
    """As of rollouts: the state has no axis of theirs."""

    def step(x, key, data):
        fine = jnp.arange(3) != jnp.where(x == 1, 2, 9)
        return x + 1, Info(x, jnp.ones(4), fine)

    loop = freeze(Loop(lambda key: jnp.zeros(()), step), None)
    state, infos = train(loop, None, KEY, 4, check_finite=False)
    assert float(state.state) == 1
    assert infos.is_finite.all(1).tolist() == [True, False, False, False]
    np.testing.assert_array_equal(infos.count[:, 0], [1, 1, np.nan, np.nan])


def test_what_is_frozen_stays_so_though_the_next_step_would_do():
    def step(x, key, data):
        return x + 1, Info(x, x, jax.random.bernoulli(key))

    loop = Loop(lambda key: jnp.zeros(()), step)
    run = lambda loop: train(loop, None, KEY, STEPS, check_finite=False)
    flags = run(loop)[1].is_finite
    first = int(flags.argmin())
    assert 0 < first < STEPS - 1
    assert flags[first:].any()
    state, infos = run(freeze(loop, None))
    assert infos.is_finite.tolist() == [True] * first + [False] * (STEPS - first)
    assert float(state.state) == first


def test_loops_that_recover_can_be_left_alone():
    _, infos = evaluate(growing(5.0), None, KEY, STEPS, num_seeds=1, freeze=False)
    assert infos.is_finite[0].tolist() == [True, True, False, True, True, True]


def test_a_loop_that_does_not_say_is_refused_here_and_carried_on_by_evaluate():
    silent = Loop(lambda key: jnp.ones(()), lambda x, key, data: (x * 1e200, x))
    with pytest.raises(ValueError, match=r"freeze\(loop=...\)` must have a field"):
        freeze(silent, None).init(KEY)
    _, seen = evaluate(silent, None, KEY, 4, num_seeds=1)
    assert np.isinf(seen[0, -1])
