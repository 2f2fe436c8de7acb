import jax
import jax.numpy as jnp
import pytest

from metax.autoloss.restarts import Restart, any_of, divergence, identical_actions
from tests.autoloss.observations import follow, observation, script


def fired(restart, seen):
    return follow(restart.update, restart.init(), seen)[1].tolist()


def of_actions(*actions):
    return script(len(actions))._replace(action=jnp.array(actions, jnp.int32))


def test_a_policy_that_repeats_itself_is_given_up():
    seen = of_actions(0, 1, 1, 1, 0, 0, 1, 1, 1, 1)
    assert fired(identical_actions(2), seen) == [False] * 9 + [True]
    assert fired(identical_actions(0), seen)[2]


def test_the_first_action_repeats_nothing():
    assert fired(identical_actions(0), of_actions(0, 0)) == [False, True]


@pytest.mark.parametrize(("value", "expected"), [(1.9, False), (2.1, True)])
def test_a_loss_that_is_large_at_its_step_gives_up_the_run(value, expected):
    rule = divergence(1, above=2.0, at_step=3)
    losses = jnp.array([[0.0, 9.0], [0.0, 9.0], [9.0, value], [0.0, 9.0]])
    seen = script(4)._replace(losses=losses)
    assert fired(rule, seen) == [False, False, expected, False]


def test_a_loss_that_is_no_number_is_large():
    rule = divergence(0, above=2.0, at_step=1)
    seen = observation(losses=jnp.array([jnp.nan, 0.0]))
    assert bool(jax.jit(rule.update)((), seen)[1])


def test_any_of_several_rules_fires():
    both = any_of(identical_actions(1), divergence(1, above=2.0, at_step=1))
    seen = of_actions(0, 1, 1, 1)
    low = seen._replace(losses=jnp.zeros((4, 2)))
    high = seen._replace(losses=jnp.full((4, 2), 3.0))
    assert fired(both, low) == [False, False, False, True]
    assert fired(both, high) == [True, False, False, True]


def test_any_of_several_rules_has_the_strictest_consequences():
    mild = identical_actions(penalty=-1.0, reinitialize=False)
    hard = divergence(0, above=1.0, penalty=-5.0)
    assert any_of(mild, hard)[2:] == (-5.0, False)
    assert any_of(mild, hard._replace(reinitialize=True))[2:] == (-5.0, True)
    assert identical_actions()[2:] == (-20.0, True)


def test_a_rule_of_ones_own_is_a_predicate():
    rule = Restart(lambda: (), lambda s, seen: (s, seen.metric > 3), -1.0, False)
    both = any_of(rule, identical_actions())
    seen = script(5)._replace(metric=jnp.arange(5.0))
    assert fired(both, seen) == [False] * 4 + [True]


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: identical_actions(-1), r"identical_actions\(limit"),
        (lambda: identical_actions(penalty=None), r"identical_actions\(penalty"),
        (lambda: divergence(-1, 1.0), r"divergence\(loss"),
        (lambda: divergence(0, jnp.nan), r"divergence\(above"),
        (lambda: divergence(0, 1.0, at_step=0), r"divergence\(at_step"),
        (any_of, r"any_of\(restarts"),
    ],
)
def test_arguments_out_of_range_are_refused(make, argument):
    with pytest.raises(ValueError, match=argument):
        make()
