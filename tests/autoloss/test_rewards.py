import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.autoloss.rewards import improvement, segment
from tests.autoloss.observations import follow, observation, script


def by_hand(v, scale, clip, decay, first):
    d, out = None, []
    for t in range(len(v)):
        i = first if t == 0 else v[t - 1] - v[t]
        d = i if d is None else decay * d + (1 - decay) * i
        out.append(scale * np.sign(i) * min(np.sqrt(abs(i) / (abs(d) + 1e-5)), clip))
    return np.array(out)


def segments(values, maximize, **options):
    """The rewards of segments that end at these values."""
    reward = segment(**options)
    step = lambda state, value: reward.update(state, value, maximize)
    return follow(step, reward.init(), jnp.array(values))[1].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 1.0, "clip": 20.0, "decay": 0.8, "first": 0.1},
        {"scale": 0.1, "clip": 1.2, "decay": 0.9, "first": 0.3},
    ],
)
def test_improvement_is_the_released_reward(options):
    reward, seen = improvement(**options), script(15)
    _, got = follow(reward.update, reward.init(), seen)
    expected = by_hand(np.array(seen.metric), **options)
    np.testing.assert_allclose(got, expected, rtol=1e-10)
    assert (expected < 0).any()
    assert (expected > 0).any()


def test_improvement_waits_for_the_metric():
    reward = improvement()
    stale = observation(metric=jnp.array(0.5), metric_refreshed=jnp.array(False))
    update = jax.jit(reward.update)
    state, first = update(reward.init(), stale)
    assert float(first) == 0.0
    state, second = update(state, observation(metric=jnp.array(2.0)))
    assert float(second) == pytest.approx((0.1 / (0.1 + 1e-5)) ** 0.5)
    state, third = update(state, stale)
    assert float(third) == 0.0
    assert float(update(state, observation(metric=jnp.array(1.0)))[1]) > 0


@pytest.mark.parametrize(
    ("maximize", "extras", "sign"),
    [
        (False, {}, -1),
        (True, {}, 1),
        (True, {"valid_loss": jnp.array(1.0)}, -1),
        (False, {"valid_loss": jnp.array(1.0)}, -1),
    ],
)
def test_a_rise_is_an_improvement_of_metrics_to_be_maximised_alone(
    maximize, extras, sign
):
    reward = improvement(maximize=maximize)
    low = observation(metric=jnp.array(1.0), extras=extras)
    raised = {name: value + 1 for name, value in extras.items()}
    high = observation(metric=jnp.array(2.0), extras=raised)
    state, _ = reward.update(reward.init(), low)
    assert np.sign(reward.update(state, high)[1]) == sign


@pytest.mark.parametrize(
    ("form", "maximize", "values", "expected"),
    [
        ("safe", True, (1.0, 2.0, 3.5), 1.5),
        ("paper", True, (1.0, 2.0, 3.5), 1.5),
        ("paper", False, (4.0, 3.0, 2.5), 0.5),
        ("safe", False, (4.0, 3.0, 2.5), 0.5),
        ("paper", True, (3.0, 2.0, 2.5), -0.5),
        ("safe", True, (3.0, 2.0, 2.5), 0.5),
        ("safe", False, (2.0, 3.0, 3.5), -0.5),
    ],
)
def test_segments_are_rewarded_by_their_formula(form, maximize, values, expected):
    got = segments(values, maximize, form=form, scale=3.0)
    assert got == pytest.approx([0, 0, 3 * expected])


def test_segments_compare_with_the_mean_of_those_before():
    values = (1.0, 2.0, 4.0, 5.0, 5.5)
    got = segments(values, True, history=2)
    assert got == pytest.approx([0, 0, 0, 1 / 1.5, 0.5 / 1.5])


def test_safe_segments_are_clipped_and_do_not_explode():
    assert segments((1.0, 1.0, 3.0), True) == [0, 0, 10.0]
    assert segments((1.0, 1.0, 1.001), True, epsilon=0.1) == pytest.approx([0, 0, 0.01])
    assert segments((1.0, 1.0, -3.0), True, clip=2.0) == [0, 0, -2.0]


def test_a_printed_reward_without_a_trend_is_zero():
    assert segments((1.0, 1.0, 3.0), True, form="paper") == [0, 0, 0]


def test_released_segments_are_rewarded_from_the_second_on():
    got = segments((7.0, 6.6, 4.5), False, form="released", scale=2.0)
    assert got == pytest.approx([0, 2 * 0.4 / 2.0, 2 * 2.1 / 0.01])


def test_the_released_form_is_for_a_loss():
    reward = segment(form="released")
    with pytest.raises(ValueError, match="to be maximised"):
        reward.update(reward.init(), jnp.array(1.0), True)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (improvement, {"clip": 0.0}),
        (improvement, {"decay": 1.0}),
        (improvement, {"scale": jnp.inf}),
        (improvement, {"first": None}),
        (segment, {"form": "other"}),
        (segment, {"history": 0}),
        (segment, {"epsilon": 0.0}),
        (segment, {"clip": -1.0}),
        (segment, {"scale": "1"}),
        (segment, {"offset": jnp.nan}),
    ],
)
def test_arguments_out_of_range_are_refused(make, options):
    (argument,) = options
    with pytest.raises(ValueError, match=rf"`{make.__name__}\({argument}="):
        make(**options)
