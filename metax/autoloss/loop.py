"""Learning a schedule: the controller is updated by what whole runs came to.

One step of the loop is one update of φ. With REINFORCE it is S whole runs from new
initialisations and one policy gradient; with PPO a segment of one run that goes on, and
some minibatches out of what was seen.
"""

from typing import Any, Literal

import optax

from metax.arguments import (
    check_count,
    check_has,
    check_number,
    check_numbers,
    check_one_of,
    check_rule,
)
from metax.autoloss.controllers import Controller
from metax.autoloss.doors import check_rollout, check_rules
from metax.autoloss.features import Features
from metax.autoloss.guiding import guide
from metax.autoloss.learning import Learner
from metax.autoloss.restarts import Restart
from metax.autoloss.rewards import StepReward
from metax.autoloss.segments import PPO, online
from metax.autoloss.updates import offline
from metax.base import AlternatingProblem, Loop

__all__ = ["autoloss", "guide"]


def autoloss(
    problem: AlternatingProblem,
    controller: Controller,
    *,
    features: Features,
    num_steps: int,
    estimator: Literal["reinforce", "ppo"] = "reinforce",
    num_rollouts: int = 8,
    meta_optimizer: optax.GradientTransformation | None = None,
    baseline_decay: Any = 0.8,
    advantage: Literal["ema", "leave_one_out", "normalized"] = "ema",
    advantage_clip: float | tuple[float, float] | None = None,
    entropy_coefficient: Any = 0.0,
    reward_scale: Any = 1.0,
    step_reward: StepReward | None = None,
    dispatch: Literal["mix", "switch"] = "mix",
    restart: Restart | None = None,
    reduction: Literal["sum", "mean"] = "sum",
    baseline_order: Literal["before", "after"] = "before",
    common_random_numbers: bool = False,
    early_stopping: bool = True,
    ppo: PPO | None = None,
    chunk: int = 500,
) -> Loop:
    """Learns a controller that chooses the action at each step of a run.

    With `estimator="reinforce"` a step of the loop is

        Y_s      = run of the problem led by π_φ, from a new initialisation    (s ≤ S)
        A_s      = advantage of c(n) R(Y_s);   B ← α B + (1 - α) mean c(n) R(Y)
        φ        ← φ + u,    u from the meta-optimizer and ∇ `reinforce_loss`(φ, A)

    and costs S runs. With `estimator="ppo"` it is one segment of a run that goes on
    from step to step, whose transitions enter a ring buffer, and `ppo.num_updates`
    minibatch updates; the run begins anew when it has ended. `num_rollouts`,
    `advantage`, baseline, `reduction` and `step_reward` belong to "reinforce".

    A run that ceases to be finite ends. It enters with the least finite reward of the
    others, or with the penalty of `restart` if there is one, and never as NaN.

    Args:
      problem: what the runs are of.
      controller: the policy; with a critic for "ppo".
      features: what it sees. Their statistics go on from run to run.
      num_steps: T, decisions of a run at most; at least 1.
      estimator: "reinforce" or "ppo".
      num_rollouts: S, runs to an update, at least 1; memory grows with S·T.
      meta_optimizer: any optax rule for φ; Adam at 1e-3 by default.
      baseline_decay: α, in [0, 1).
      advantage: "ema", R - B; "leave_one_out", R minus the mean of the others;
        "normalized", by mean and standard deviation of the S. The last two need S ≥ 2.
      advantage_clip: c clips to ±c; (low, high) the magnitude into it, sign kept.
      entropy_coefficient: c_H, weight of an entropy bonus.
      reward_scale: c, a number or an optax schedule over updates. A constant has no
        effect with normalized advantages, and with Adam none but through clipping and
        beside step rewards; one that decays acts as a decay of the learning rate.
      step_reward: added to the advantage step by step; None for none.
      dispatch: "mix", runs as one vmap; "switch", one after the other, each step that
        of its action: for large problems.
      restart: ends a run when it fires, replaces its advantage by its penalty, and may
        draw a new φ (and a new state of the meta-optimizer) before the update.
      reduction: of `reinforce_loss`.
      baseline_order: the advantage with the "before" or "after" state of B.
      common_random_numbers: the S runs share initialisation and batches.
      early_stopping: end a run when the problem's patience is exceeded.
      ppo: the settings of "ppo"; `PPO()` by default.
      chunk: steps between two looks whether all runs are over.

    Returns:
      A `Loop` with `AutoLossState` and `AutoLossInfo`. To use what was learned:
      `bind(controller, state.phi, frozen(features), state.feature_state)`.

    Raises:
      ValueError: an argument breaks one of the rules above, or as `rollout`.

    Reference:
      Xu et al., AutoLoss: Learning Discrete Schedules for Alternate Optimization, 2019,
      arXiv:1810.02442, Eqs. 2 and 3 and Algorithm 1.

    Note:
      The paper has S = 1. Its online form divides by the trend of the metric; see
      `segment`.

    Example:
      >>> import jax, optax
      >>> from metax import Action, AlternatingProblem, unroll
      >>> from metax.autoloss import autoloss, context_free, features
      >>> problem = AlternatingProblem(
      ...     init=lambda key: {"x": jax.numpy.array(3.0)},
      ...     losses=(lambda p, b, k: (p["x"] - b) ** 2, lambda p, b, k: p["x"] ** 2),
      ...     actions=(Action(0), Action(1)),
      ...     optimizers=optax.sgd(0.25),
      ...     sample=lambda data, key: data,
      ...     metric=lambda params, data: (params["x"] - data) ** 2,
      ...     reward=lambda history, live: -history[-1],
      ... )
      >>> options = {"advantage": "normalized", "meta_optimizer": optax.adam(0.1)}
      >>> options |= {"features": features.paper(2), "num_steps": 10}
      >>> loop = autoloss(problem, context_free(2), **options)
      >>> keys = jax.random.split(jax.random.key(0), 40)
      >>> _, infos = unroll(loop, loop.init(jax.random.key(1)), keys, 1.0)
      >>> bool(infos.action_fraction[-1, :, 0].mean() > 0.9)
      True
    """
    check_rollout(problem, "autoloss", num_steps, dispatch, chunk=chunk)
    check_one_of("autoloss", "estimator", estimator, ("reinforce", "ppo"))
    kinds = ("ema", "leave_one_out", "normalized")
    check_one_of("autoloss", "advantage", advantage, kinds)
    check_one_of("autoloss", "reduction", reduction, ("sum", "mean"))
    check_one_of("autoloss", "baseline_order", baseline_order, ("before", "after"))
    _check_parts(controller, features, meta_optimizer, ppo)
    check_rules("autoloss", step_reward=step_reward, restart=restart)
    check_count("autoloss", 1, num_rollouts=num_rollouts)
    check_number("autoloss", "entropy_coefficient", entropy_coefficient, least=0)
    if not callable(reward_scale):
        check_number("autoloss", "reward_scale", reward_scale)
    if advantage_clip is not None:
        # a pair are the two ends, of which one may be negative
        ends = {} if isinstance(advantage_clip, tuple) else {"above": 0}
        check_numbers("autoloss", "advantage_clip", advantage_clip, **ends)
    check_number("autoloss", "baseline_decay", baseline_decay, least=0, below=1)
    if advantage != "ema" and num_rollouts < 2 and estimator == "reinforce":
        raise ValueError(
            f"`autoloss(advantage={advantage!r})` needs at least two runs to compare; "
            f"got num_rollouts={num_rollouts}."
        )
    if controller.spec.num_actions != len(problem.actions):
        raise ValueError(
            "`autoloss(controller=...)` must choose among the problem's "
            f"{len(problem.actions)} actions; got {controller.spec.num_actions}."
        )
    if meta_optimizer is None:
        meta_optimizer = optax.adam(1e-3)
    scale_of = reward_scale if callable(reward_scale) else lambda _: reward_scale
    learner = Learner(
        problem=problem,
        controller=controller,
        features=features,
        num_steps=num_steps,
        meta_optimizer=meta_optimizer,
        entropy_coefficient=entropy_coefficient,
        reward_scale=scale_of,
        dispatch=dispatch,
        restart=restart,
        early_stopping=early_stopping,
    )
    if estimator == "ppo":
        return online(learner, ppo or PPO())
    return offline(
        learner,
        num_rollouts=num_rollouts,
        baseline_decay=baseline_decay,
        advantage=advantage,
        advantage_clip=advantage_clip,
        step_reward=step_reward,
        reduction=reduction,
        baseline_order=baseline_order,
        common_random_numbers=common_random_numbers,
        chunk=chunk,
    )


def _check_parts(controller: Any, features: Any, meta_optimizer: Any, ppo: Any) -> None:
    """What is no part of this method is refused by its name."""
    what = "a `Controller`"
    check_has("autoloss", "controller", controller, what, "init", "logits", "spec")
    check_has("autoloss", "features", features, "`Features`", "init", "update", "spec")
    if meta_optimizer is not None:
        check_rule("autoloss", "meta_optimizer", meta_optimizer)
    if ppo is not None:
        check_has("autoloss", "ppo", ppo, "`PPO`", "segment_length", "buffer_size")
