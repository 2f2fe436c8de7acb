"""What the experiments on learned schedules share: runs by grid, learners, selection.

No script, and not to be run. Three stages, each a jitted function of keys and data that
is compiled once for all data sets:

    leader     runs of a grid of schedules, from the same initialisations
    learner    controllers trained side by side, and all that they have been
    scorer     what parameters are worth on a split that nothing was chosen on

A choice is made by the validation metric and nothing else: what searches is given
data without a test split.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metax import AlternatingProblem, Loop
from metax.autoloss import (
    Controller,
    Features,
    Policy,
    autoloss,
    bind,
    context_free,
    controller,
    features,
    frozen,
    improvement,
    leaky_relu,
    rollout,
    running_norm,
)
from metax.harness import paired_difference, spread, write_json
from metax.harness.processes import agree, all_on_host

# entries of a feature vector that are made of something, for ablations
PARTS = {
    ("released", "magnitudes"): (4,),
    ("released", "losses"): (2, 3),
    ("released", "validation"): (0, 1),
    ("paper", "magnitudes"): (1, 2),
    ("paper", "losses"): (3, 4),
    ("paper", "validation"): (5, 6, 7, 8),
}

Build = Callable[[Any], tuple[AlternatingProblem, Policy]]


class Runs(NamedTuple):
    """Runs side by side; leading axes [G, R] of settings and initialisations.

    Attributes:
      best_params: at the best check.
      params: at the end.
      metric: [G, R], the validation metric at the best check.
      share: [G, R], of the last action among all.
      num_steps: [G, R].
      is_finite: bool [G, R].
    """

    best_params: Any
    params: Any
    metric: jax.Array
    share: jax.Array
    num_steps: jax.Array
    is_finite: jax.Array


class Learned(NamedTuple):
    """What controllers have been; leading axes [C] of controllers, U updates, S runs.

    Attributes:
      phi: leaves [C, U + 1, ...], before each update and after the last.
      feature_state: likewise.
      metric: [C, U, S], the best validation metric of each run.
      share: [C, U, S], of the last action.
      num_steps: [C, U, S].
    """

    phi: Any
    feature_state: Any
    metric: jax.Array
    share: jax.Array
    num_steps: jax.Array


@dataclasses.dataclass(frozen=True)
class Learning:
    """How controllers are learned: the fields that all configs have."""

    lam: float = 0.2
    num_controllers: int = 1
    num_rollouts: int = 8
    num_updates: int = 60
    max_steps: int = 5000  # of a run that a controller learns from
    features: Literal["paper", "released"] = "released"
    normalise: bool = False
    activation: Literal["relu", "leaky_relu"] = "leaky_relu"
    temperature: float = 2.0
    meta_rate: float = 0.02
    baseline_decay: float = 0.8
    advantage: Literal["ema", "leave_one_out", "normalized"] = "normalized"
    advantage_clip: float = 0.0  # 0: none
    baseline_order: Literal["before", "after"] = "before"
    step_reward: bool = False
    reduction: Literal["sum", "mean"] = "mean"
    early_stopping: bool = True
    num_guided: int = 8  # runs that a finished controller leads
    seed: int = 0


def learning_parts(
    config: Any,
    kind: str,
    problem_of: Callable[[Any], AlternatingProblem],
    *,
    task: Any = "regression",
    drop: str = "none",
    mesh: Any = None,
) -> tuple[Callable, Callable]:
    """A `learner` of a kind of controller, and a `leader` of runs that it guides.

    Settings are values of λ. The features of a context-free controller are the paper's,
    which cost the least: it ignores them.
    """
    blind = dataclasses.replace(config, features="paper", normalise=False)
    is_blind = kind == "context-free"
    seen = seen_by(blind if is_blind else config, task, drop)
    net = network(config, kind)
    learn = learner(
        lambda lam: loop_of(config, problem_of(lam), net, seen),
        config.num_updates,
        mesh,
    )
    return learn, leader(guided(problem_of, net, seen), config.num_steps, mesh=mesh)


def seen_by(config: Any, task: Any = "regression", drop: str = "none") -> Features:
    """The features that a config names, one kind of entry perhaps held at 0.

    An entry that is always 0 is as good as none: its weights neither act nor move.
    """
    kind = config.features
    seen = features.paper(2) if kind == "paper" else features.released(task)
    if drop != "none":
        seen = _without(seen, PARTS[kind, drop])
    return running_norm(seen) if config.normalise else seen


def network(config: Any, kind: str = "AutoLoss") -> Controller:
    """The controller that a config names, or the one that sees nothing."""
    if kind == "context-free":
        return context_free(2, config.temperature)
    activation = leaky_relu if config.activation == "leaky_relu" else jax.nn.relu
    return controller(2, (16,), config.temperature, activation=activation)


def loop_of(
    config: Any, problem: AlternatingProblem, net: Controller, seen: Features
) -> Loop:
    """The loop that trains it, by the settings of a config."""
    return autoloss(
        problem,
        net,
        features=seen,
        num_steps=config.max_steps,
        num_rollouts=config.num_rollouts,
        meta_optimizer=optax.adam(config.meta_rate),
        baseline_decay=config.baseline_decay,
        advantage=config.advantage,
        advantage_clip=config.advantage_clip or None,
        step_reward=improvement() if config.step_reward else None,
        reduction=config.reduction,
        baseline_order=config.baseline_order,
        early_stopping=config.early_stopping,
    )


def leader(
    build: Build, num_steps: int, *, early_stopping: bool = False, mesh: Any = None
) -> Callable:
    """Runs of `build(setting)`, one for each setting and initialisation.

    All runs are spread over the devices; the last one is repeated where they are too
    few for every device to have as many.

    Returns:
      `lead(settings, task_keys [R], key, data) -> Runs`. Settings are a tree with a
      leading axis [G]; run r of every setting begins with the same parameters, and its
      policy draws from the same key.
    """

    def one(setting: Any, task_key: jax.Array, key: jax.Array, data: Any) -> Runs:
        problem, policy = build(setting)
        result, _ = rollout(
            problem, policy, key, data, num_steps,
            early_stopping=early_stopping, task_key=task_key,
        )  # fmt: skip
        return Runs(
            best_params=result.best_params,
            params=result.params,
            metric=result.best_metric,
            share=result.action_counts[-1] / jnp.maximum(result.num_steps, 1),
            num_steps=result.num_steps,
            is_finite=result.is_finite,
        )

    def lead(settings: Any, task_keys: jax.Array, key: jax.Array, data: Any) -> Runs:
        keys = jax.random.split(key, len(task_keys))
        over_runs = jax.vmap(one, in_axes=(None, 0, 0, None))
        return jax.vmap(over_runs, in_axes=(0, None, None, None))(
            settings, task_keys, keys, data
        )

    if mesh is None:
        return jax.jit(lead)
    each = jax.jit(spread(one, (0, 0, 0, None), mesh))

    def lead_spread(settings: Any, task_keys: jax.Array, key: Any, data: Any) -> Runs:
        shape = len(jax.tree.leaves(settings)[0]), len(task_keys)
        num = shape[0] * shape[1]
        runs = np.minimum(np.arange(num + -num % mesh.size), num - 1)
        which, number = np.divmod(runs, shape[1])
        own = jax.tree.map(lambda x: x[which], settings)
        keys = jax.random.split(key, shape[1])
        found = all_on_host(each(own, task_keys[number], keys[number], data))
        return jax.tree.map(lambda x: x[:num].reshape(*shape, *x.shape[1:]), found)

    return lead_spread


def learner(
    build: Callable[[Any], Loop], num_updates: int, mesh: Any = None
) -> Callable:
    """Controllers trained side by side, over the devices, by the loop `build(setting)`.

    Returns:
      `learn(settings, keys [C], data) -> Learned`; settings are a tree with a leading
      axis [C].
    """

    def one(setting: Any, key: jax.Array, data: Any) -> Learned:
        loop = build(setting)
        key_init, key_run = jax.random.split(key)

        def step(state: Any, i: jax.Array) -> tuple[Any, Any]:
            after, info = loop.step(state, jax.random.fold_in(key_run, i), data)
            return after, ((state.phi, state.feature_state), info)

        last, (before, infos) = jax.lax.scan(
            step, loop.init(key_init), jnp.arange(num_updates)
        )
        join = lambda many, end: jnp.concatenate([many, jnp.asarray(end)[None]])
        phi, feature_state = jax.tree.map(join, before, (last.phi, last.feature_state))
        return Learned(
            phi=phi,
            feature_state=feature_state,
            metric=infos.best_metric,
            share=infos.action_fraction[..., -1],
            num_steps=infos.num_steps,
        )

    learn = jax.jit(spread(one, (0, 0, None), mesh))
    return learn if mesh is None else lambda *args: all_on_host(learn(*args))


def guided(
    problem_of: Callable[[Any], AlternatingProblem],
    controller: Controller,
    features: Features,
) -> Build:
    """Runs led by finished controllers; a setting is what `held` gives."""

    def build(setting: Any) -> tuple[AlternatingProblem, Policy]:
        own, phi, feature_state = setting
        policy = bind(controller, phi, frozen(features), feature_state)
        return problem_of(own), policy

    return build


def held(settings: Any, learned: Learned, updates: Any) -> Any:
    """Settings for `guided`: controller c as it was before update `updates[c]`."""
    index = (np.arange(len(updates)), np.asarray(updates))
    pick = lambda x: x[index]
    phi, state = jax.tree.map(pick, (learned.phi, learned.feature_state))
    return settings, phi, state


def kept_updates(learned: Learned, window: int, maximize: bool = False) -> np.ndarray:
    """[C], before which update each controller led the best runs on its own data.

    By the mean metric of the runs of `window` updates, the one before which the
    controller is taken being the last of them: a single update has too few runs.
    """
    metric = np.asarray(learned.metric, np.float64)
    metric = _worst_where_not_finite(metric if not maximize else -metric)
    means = metric.mean(-1)
    window = min(window, means.shape[-1])
    sums = np.cumsum(np.pad(means, ((0, 0), (1, 0))), axis=-1)
    return (sums[:, window:] - sums[:, :-window]).argmin(-1) + window - 1


def scorer(problem: AlternatingProblem, name: str) -> Callable:
    """What parameters [..., R] are worth: `score(params, data) -> f32[...]`."""
    assert problem.evaluate is not None
    evaluate = problem.evaluate

    def score(params: Any, data: Any) -> jax.Array:
        depth = jax.tree.leaves(params)[0].ndim - jax.tree.leaves(_shapes(problem))[0]
        one = lambda params: evaluate(params, data)[name]
        for _ in range(depth):
            one = jax.vmap(one)
        return one(params)

    return jax.jit(score)


def best_setting(runs: Runs, maximize: bool = False) -> int:
    """The index of the setting whose runs have the best mean validation metric."""
    metric = np.asarray(runs.metric, np.float64)
    metric = _worst_where_not_finite(metric if not maximize else -metric)
    return int(metric.mean(-1).argmin())


def of_setting(runs: Runs, index: Any) -> Runs:
    """The runs of one setting (or of several: an array of indices)."""
    return jax.tree.map(lambda x: x[index], runs)


def cells(folder: Path, names: Sequence[Any], measure: Callable[[Any], Any]) -> list:
    """`measure(name)` of each name, from the run's folder where it was done before."""
    (folder / "cells").mkdir(exist_ok=True)
    found = []
    for name in names:
        path = folder / "cells" / f"{name}.json"
        if agree(not path.is_file()):  # all processes measure, or none
            write_json(path, measure(name))
        found.append(json.loads(path.read_text(encoding="utf-8")))
    return found


def paired(a: Any, b: Any) -> dict[str, Any]:
    """a - b over data sets: mean, interval, standard error, and how often a < b."""
    difference = np.subtract(a, b)
    row: dict[str, Any] = {"mean": float(difference.mean()), "n": len(difference)}
    row["wins"] = int((difference < 0).sum())
    if len(difference) > 1:
        interval = paired_difference(a, b)
        row |= {"low": interval.low, "high": interval.high}
        row["error"] = float(difference.std(ddof=1) / np.sqrt(len(difference)))
    return row


def _without(seen: Features, dropped: Sequence[int]) -> Features:
    kept = np.ones(seen.spec.size, bool)
    kept[list(dropped)] = False

    def hide(pair: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        return pair[0], jnp.where(kept, pair[1], 0)

    return seen._replace(
        init=lambda: hide(seen.init()),
        update=lambda state, observation: hide(seen.update(state, observation)),
        reset=lambda state: hide(seen.reset(state)),
    )


def _shapes(problem: AlternatingProblem) -> Any:
    """How many axes each leaf of the parameters has."""
    shapes = jax.eval_shape(problem.init, jax.random.key(0))
    return jax.tree.map(lambda x: x.ndim, shapes)


def _worst_where_not_finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.inf)
