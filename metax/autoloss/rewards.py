"""Rewards beside that of a whole run: for each step, and for each segment of steps."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from metax.arguments import check_count, check_number, check_one_of, refuse
from metax.autoloss.decisions import Observation
from metax.autoloss.published import advance_improvement, no_improvement
from metax.autoloss.vectors import as_float, validation_loss

__all__ = ["SegmentReward", "StepReward", "improvement", "segment"]


class StepReward(NamedTuple):
    """A reward for each step.

    Attributes:
      init: `init() -> state`.
      update: `update(state, observation) -> (state, reward [])`.
    """

    init: Callable[[], Any]
    update: Callable[[Any, Observation], tuple[Any, jax.Array]]


class SegmentReward(NamedTuple):
    """A reward for each segment of steps.

    Attributes:
      init: `init() -> state`.
      update: `update(state, value [], maximize) -> (state, reward [])`, with the metric
        at the end of a segment and whether a larger one is better, a bool.
    """

    init: Callable[[], Any]
    update: Callable[[Any, jax.Array, bool], tuple[Any, jax.Array]]


class SegmentState(NamedTuple):
    """The metric at the ends of the last segments.

    Attributes:
      count: int32 [], segments so far.
      values: [k + 1], the latest first.
    """

    count: jax.Array
    values: jax.Array


def improvement(
    scale: float = 1.0,
    clip: float = 20.0,
    decay: float = 0.8,
    first: float = 0.1,
    *,
    maximize: bool = False,
) -> StepReward:
    """Rewards a step by how the validation loss fell, against how it has been falling.

        i_t = v_{t-1} - v_t,    d_t = decay d_{t-1} + (1 - decay) i_t
        r_t = scale · sign(i_t) · min(√(|i_t| / (|d_t| + 1e-5)), clip)

    with i_1 := d_1 := first. v is `extras["valid_loss"]` where the problem gives one,
    else the metric. Where the metric was not refreshed the reward is 0.

    Args:
      scale: 1 in the released regression, .1 in its classification.
      clip: above 0; 20 and 5 there.
      decay: in [0, 1); .8 and .9 there.
      first: the improvement that the first step counts for.
      maximize: v is the metric and larger is better, so that a rise is an improvement;
        for problems that are maximised and give no `valid_loss`, which has its own
        direction whatever is said here.

    Returns:
      The reward.

    Raises:
      ValueError: an argument out of range.

    Reference:
      The code released with Xu et al., 2019, arXiv:1810.02442; their paper has no
      reward for steps.
    """
    check_number("improvement", "scale", scale)
    check_number("improvement", "clip", clip, above=0)
    check_number("improvement", "decay", decay, least=0, below=1)
    check_number("improvement", "first", first)

    def update(state: Any, observation: Observation) -> tuple[Any, jax.Array]:
        is_metric = "valid_loss" not in observation.extras
        v = validation_loss(observation)
        v = -v if maximize and is_metric else v
        refreshed = observation.metric_refreshed
        state, gain = advance_improvement(state, v, refreshed, decay, first)
        size = jnp.sqrt(jnp.abs(gain) / (jnp.abs(state.trend) + 1e-5))
        return state, as_float(scale * jnp.sign(gain) * jnp.minimum(size, clip))

    return StepReward(no_improvement, update)


def segment(
    form: Literal["safe", "paper", "released"] = "safe",
    scale: float = 1.0,
    history: int = 1,
    epsilon: float = 1e-3,
    clip: float = 10.0,
    offset: float = 4.6,
) -> SegmentReward:
    """Rewards a segment by its improvement, against the mean of the k before it.

    With P the metric at the ends of segments, C the scale, σ = 1 where larger is better
    and -1 where smaller is:

        safe      clip(C σ (P_t - P_{t-1}) / max(|P_{t-1} - P_{t-1-k}| / k, ε))
        paper     C (P_t - P_{t-1}) / ((P_{t-1} - P_{t-1-k}) / k)
        released  C (P_{t-1} - P_t) / max(P_t - offset, .01)

    The reward is 0 until there are the values that it needs: k + 2, or 2 for
    "released".

    Args:
      form: "paper" is the printed formula: its sign flips where the trend was negative
        (for metrics to be maximised, positive for others) and it explodes near 0; at a
        trend of exactly 0 it is taken as 0. "released" is for a loss.
      scale: C.
      history: k, at least 1.
      epsilon: ε, above 0. "safe" alone uses it.
      clip: the largest magnitude of a reward, above 0. Likewise.
      offset: "released" alone uses it.

    Returns:
      The reward.

    Raises:
      ValueError: an argument out of range; at the first update, "released" with a
        metric to be maximised.

    Note:
      "safe" is the default because of the two defects of the printed formula.

    Reference:
      Xu et al., AutoLoss: Learning Discrete Schedules for Alternate Optimization, 2019,
      arXiv:1810.02442, section 4; "released": the code that came with it.

    Example:
      >>> import jax.numpy as jnp
      >>> from metax.autoloss import segment
      >>> reward = segment(scale=2.0)
      >>> state = reward.init()
      >>> for score in (1.0, 2.0, 3.5):
      ...     state, r = reward.update(state, jnp.array(score), True)
      >>> float(r)
      3.0
    """
    check_one_of("segment", "form", form, ("safe", "paper", "released"))
    check_count("segment", 1, history=history)
    check_number("segment", "scale", scale)
    check_number("segment", "epsilon", epsilon, above=0)
    check_number("segment", "clip", clip, above=0)
    check_number("segment", "offset", offset)
    needed = 1 if form == "released" else history + 1

    def init() -> SegmentState:
        return SegmentState(jnp.zeros((), jnp.int32), jnp.zeros(history + 1))

    def update(
        state: SegmentState, value: jax.Array, maximize: bool
    ) -> tuple[SegmentState, jax.Array]:
        value = as_float(value)
        gain = value - state.values[0]
        trend = (state.values[0] - state.values[-1]) / history
        if form == "safe":
            better = gain if maximize else -gain
            reward = better / jnp.maximum(jnp.abs(trend), epsilon)
            reward = jnp.clip(scale * reward, -clip, clip)
        elif form == "paper":
            zero = trend == 0
            reward = jnp.where(zero, 0, scale * gain / jnp.where(zero, 1, trend))
        else:
            if maximize:
                rule = 'must not be "released" with a metric to be maximised'
                refuse("segment", "form", rule, "maximize=True")
            reward = -scale * gain / jnp.maximum(value - offset, 0.01)
        enough = state.count >= needed
        values = jnp.concatenate([value[None], state.values[:-1]])
        return SegmentState(state.count + 1, values), jnp.where(enough, reward, 0)

    return SegmentReward(init, update)
