"""What a feature vector is: pure functions from observations, and a description.

A controller sees a run only through such a vector. Its state is a pytree of arrays, so
it rides in a scan; its description is what a controller file records and compares.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from metax.arguments import check_count, check_one_of, refuse
from metax.autoloss.decisions import Observation

__all__ = [
    "FeatureSpec",
    "Features",
    "as_float",
    "check_spec",
    "custom",
    "keep_before",
    "look_up",
    "remembering",
    "validation_loss",
]

FeatureState = Any
BUILT_IN = ("paper", "released")


class FeatureSpec(NamedTuple):
    """What a controller file records of its features.

    Attributes:
      name: which features.
      version: grows when a formula changes.
      size: F, the length of the vector.
      arguments: JSON values with which they are rebuilt; under "running_norm" those of
        the normaliser, where there is one.
      refresh: which losses and gradient norms they want to see: "chosen" or "all".
      observe_every: steps between two refreshes of the metric; None for the problem's.
    """

    name: str
    version: int
    size: int
    arguments: dict[str, Any]
    refresh: Literal["chosen", "all"]
    observe_every: int | None


class Features(NamedTuple):
    """What a controller sees of a run, as pure functions.

    Attributes:
      init: `init() -> (state, x [F])`, before the first step.
      update: `update(state, observation) -> (state, x [F])`, after each step.
      reset: `reset(state) -> (state, x [F])`, for a new run: keeps statistics, forgets
        the run.
      merge: `merge(before, states) -> state`: of S runs that began with the statistics
        of `before`, their states stacked on a leading axis, what they saw together.
        What belongs to one run is forgotten; without statistics that is `before`.
      spec: their description.
      fixed: the same features with statistics that no longer move; None where there
        are none. `frozen` reads it.
    """

    init: Callable[[], tuple[FeatureState, jax.Array]]
    update: Callable[[FeatureState, Observation], tuple[FeatureState, jax.Array]]
    reset: Callable[[FeatureState], tuple[FeatureState, jax.Array]]
    merge: Callable[[FeatureState, FeatureState], FeatureState]
    spec: FeatureSpec
    fixed: "Features | None" = None


def custom(
    function: Callable[[Observation], jax.Array],
    *,
    name: str,
    version: int,
    size: int,
    refresh: Literal["chosen", "all"] = "chosen",
    observe_every: int | None = None,
) -> Features:
    """Features of your own: a function of the observation, without memory.

    For features with memory make a `Features` by hand. Before the first step the vector
    is zero.

    Args:
      function: `function(observation) -> x [size]`.
      name: what a controller file calls them; not "paper" or "released".
      version: at least 0; raise it when the formula changes, and controllers trained on
        the old one are refused.
      size: F, at least 1.
      refresh: which losses and gradient norms must be kept fresh.
      observe_every: steps between two refreshes of the metric; None for the problem's.

    Returns:
      The features.

    Raises:
      ValueError: a name that is taken, or a number out of range; at the first call,
        another shape than [size].

    Example:
      >>> from metax.autoloss import features
      >>> ratio = features.custom(
      ...     lambda seen: seen.losses[:1] / (1 + seen.losses[1:2]),
      ...     name="ratio", version=1, size=1)
      >>> ratio.spec.size, ratio.init()[1].tolist()
      (1, [0.0])
    """
    if not isinstance(name, str) or not name or name in BUILT_IN:
        refuse("custom", "name", f"must be a word other than {BUILT_IN}", repr(name))
    if not callable(function):
        refuse("custom", "function", "must be a function of an observation", function)
    check_count("custom", 0, version=version)
    spec = FeatureSpec(name, version, size, {}, refresh, observe_every)
    check_spec("custom", spec)
    start = lambda *_: ((), jnp.zeros(size))

    def update(state: Any, observation: Observation) -> tuple[Any, jax.Array]:
        x = as_float(function(observation))
        if x.shape != (size,):
            rule = f"must return an array of shape ({size},)"
            refuse("custom", "function", rule, f"shape {x.shape}")
        return state, x

    return Features(start, update, start, keep_before, spec)


class RememberedState(NamedTuple):
    """The state of the features below, and what they were shown last.

    Attributes:
      inner: of the features below.
      extras: the scalars that are remembered.
    """

    inner: Any
    extras: dict[str, jax.Array]


def remembering(features: Features, initial: dict[str, float]) -> Features:
    """Shows features the last values of some `extras` where none was refreshed.

    Args:
      features: without statistics.
      initial: which scalars, and what they are before the first refresh. One that the
        problem does not give is not made up: `look_up` still misses it.

    Returns:
      The features.
    """

    def start(inner: Any) -> RememberedState:
        return RememberedState(inner, {n: as_float(v) for n, v in initial.items()})

    def init() -> tuple[RememberedState, jax.Array]:
        inner, x = features.init()
        return start(inner), x

    def reset(state: RememberedState) -> tuple[RememberedState, jax.Array]:
        inner, x = features.reset(state.inner)
        return start(inner), x

    def update(
        state: RememberedState, observation: Observation
    ) -> tuple[RememberedState, jax.Array]:
        given, refreshed = observation.extras, observation.metric_refreshed
        latest = {
            name: jnp.where(refreshed, as_float(given.get(name, old)), old)
            for name, old in state.extras.items()
        }
        shown = {name: latest.get(name, value) for name, value in given.items()}
        inner, x = features.update(state.inner, observation._replace(extras=shown))
        return RememberedState(inner, latest), x

    return Features(init, update, reset, keep_before, features.spec)


def check_spec(function: str, spec: FeatureSpec) -> None:
    """Refuses a size, a refresh or a period that cannot be."""
    check_count(function, 1, size=spec.size)
    check_one_of(function, "refresh", spec.refresh, ("chosen", "all"))
    if spec.observe_every is not None:
        check_count(function, 1, observe_every=spec.observe_every)


def keep_before(before: FeatureState, states: FeatureState) -> FeatureState:
    """The merge of features without statistics."""
    del states
    return before


def as_float(value: Any) -> jax.Array:
    """In the default floating-point dtype, which no state of ours goes below."""
    return jnp.asarray(value, jnp.zeros(()).dtype)


def look_up(values: dict[str, jax.Array], name: str, who: str, where: str) -> jax.Array:
    """A named scalar that the features need; says who should have given it."""
    if name not in values:
        raise ValueError(
            f"`{who}` must find {name!r} in {where}; got {sorted(values)}."
        )
    return as_float(values[name])


def validation_loss(observation: Observation) -> jax.Array:
    """v: `extras["valid_loss"]` where the problem gives one, else the metric.

    Where the problem gives one for each loss it is the first, the main loss's.
    """
    given = observation.extras.get("valid_loss", observation.metric)
    return jnp.reshape(as_float(given), (-1,))[0]
