"""A run that is led by a finished policy, one decision a step of a loop."""

from typing import Any, Literal

import jax

from metax.autoloss.decisions import Policy
from metax.autoloss.doors import check_rollout, check_rules
from metax.autoloss.episodes import episode
from metax.autoloss.states import GuideInfo, GuideState
from metax.base import AlternatingProblem, Loop, check_key

__all__ = ["guide"]


def guide(
    problem: AlternatingProblem,
    policy: Policy,
    *,
    num_steps: int,
    dispatch: Literal["mix", "switch"] = "switch",
    validate_every: int | None = None,
    early_stopping: bool = False,
) -> Loop:
    """Leads one run by a policy: a hand-made schedule or a trained controller.

    The loop form of `rollout`, for long runs under the harness, with checkpoints,
    metrics and progress. One step is one decision; after `num_steps` of them, or when
    the run is over, a step changes nothing. The metric is measured by `lax.cond`, which
    under `vmap` measures it at every step: for many runs at once use `rollout`.

    Args:
      problem: what is run.
      policy: what decides, e.g. `bind(controller, phi, frozen(features), state)`.
      num_steps: T, decisions in all: what features call progress; at least 1.
      dispatch: "switch", the branch of the action alone; "mix" as in `rollout`.
      validate_every: steps between checks; None for the problem's.
      early_stopping: end when the problem's patience is exceeded.

    Returns:
      A `Loop` with `GuideState` and `GuideInfo`. `state.best_params` are the ones to
      keep.

    Raises:
      ValueError: as `rollout`.

    Example:
      >>> import jax, optax
      >>> from metax import Action, AlternatingProblem, unroll
      >>> from metax.autoloss import cycle, guide
      >>> problem = AlternatingProblem(
      ...     init=lambda key: {"x": jax.numpy.array(3.0)},
      ...     losses=(lambda p, b, k: (p["x"] - b) ** 2, lambda p, b, k: p["x"] ** 2),
      ...     actions=(Action(0), Action(1)),
      ...     optimizers=optax.sgd(0.25),
      ...     sample=lambda data, key: data,
      ...     metric=lambda params, data: (params["x"] - data) ** 2,
      ...     reward=lambda history, live: -history[-1],
      ...     validate_every=1,
      ... )
      >>> loop = guide(problem, cycle((1, 1)), num_steps=10)
      >>> keys = jax.random.split(jax.random.key(0), 4)
      >>> state, infos = unroll(loop, loop.init(jax.random.key(1)), keys, 1.0)
      >>> infos.action.tolist(), infos.metric.tolist()
      ([0, 1, 0, 1], [1.0, 0.0, 0.0, 0.25])
    """
    check_rollout(problem, "guide", num_steps, dispatch, validate_every)
    check_rules("guide", policy)
    run_of = episode(
        problem,
        policy,
        num_steps=num_steps,
        dispatch=dispatch,
        validate_every=validate_every,
        early_stopping=early_stopping,
    )

    def init(key: jax.Array) -> GuideState:
        check_key(key, "guide(...).init(key=...)")
        return run_of.start(key)

    def step(
        state: GuideState, key: jax.Array, data: Any
    ) -> tuple[GuideState, GuideInfo]:
        check_key(key, "guide(...).step(key=...)")
        key_act, key_batch = jax.random.split(key)
        # the first step knows the data, which `init` did not
        state = jax.lax.cond(
            state.step == 0, lambda: run_of.prime(state, key_batch, data), lambda: state
        )
        state, record = run_of.advance(state, key_act, key_batch, data, None)
        seen = state.observation
        return state, GuideInfo(
            action=record.decision.action,
            losses=seen.losses,
            metric=seen.metric,
            metric_refreshed=seen.metric_refreshed & record.live,
            is_finite=state.is_finite,
        )

    return Loop(init, step)
