"""What the experiments on GANs and translation share: controllers, led runs, tables.

No script, and not to be run. A run here is large: one at a time, each step that of its
action alone, and what came of it is kept in a file, so that a broken-off experiment
goes on with the next run. Controllers are kept as files, too.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.schedule_runs import cells
from metax import AlternatingProblem, Loop
from metax.autoloss import (
    PPO,
    Controller,
    Features,
    Policy,
    Restart,
    SavedController,
    autoloss,
    bind,
    controller,
    features,
    frozen,
    identical_actions,
    leaky_relu,
    load_controller,
    rollout,
    running_norm,
    save_controller,
    segment,
)
from metax.harness import train

KINDS = ("AutoLoss", "context-free")
FIFTHS = 5  # of a run, in which actions are counted
# what a context-free controller sees: a constant, of which only its biases are left
NOTHING = features.custom(
    lambda seen: jnp.zeros(1), name="nothing", version=1, size=1
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Learning:
    """How controllers are learned: the fields that both configs have."""

    features: Literal["paper", "released"] = "paper"
    normalise: bool = True
    hidden: tuple[int, ...] = (16,)
    activation: Literal["relu", "leaky_relu"] = "relu"
    temperature: float = 2.0
    estimator: Literal["reinforce", "ppo"] = "reinforce"
    meta_updates: int = 6  # each of `num_rollouts` runs, or of a segment
    meta_rate: float = 0.02
    episode_steps: int = 200  # decisions of a run that a controller learns from
    num_rollouts: int = 4
    advantage: Literal["ema", "leave_one_out", "normalized"] = "normalized"
    baseline_order: Literal["before", "after"] = "before"
    reduction: Literal["sum", "mean"] = "mean"
    restart_limit: int = 100  # equal actions in a row that end a run; 0: no limit
    keep: Literal["last", "best"] = "last"  # controller; best: that led the best run
    segment_length: int = 20
    segment_reward: Literal["safe", "paper", "released"] = "safe"
    discount: float = 0.95
    buffer_size: int = 2000
    minibatch: int = 64
    sync_every: int = 10
    num_seeds: int = 3
    seed: int = 0
    data_dir: str | None = None


class Led(NamedTuple):
    """What came of a run; K checks, T decisions.

    Attributes:
      scores: at the best check, by name.
      last: at the end.
      metrics: [K], NaN where not reached.
      metric: [], at the best check.
      actions: int8 [T].
      num_steps: int32 [].
      is_finite: bool [].
    """

    scores: dict[str, jax.Array]
    last: dict[str, jax.Array]
    metrics: jax.Array
    metric: jax.Array
    actions: jax.Array
    num_steps: jax.Array
    is_finite: jax.Array


def leader(
    problem: AlternatingProblem,
    policy_of: Callable[[Any], Policy],
    num_updates: int,
    score: Callable[[Any, Any], dict[str, jax.Array]],
) -> Callable:
    """Runs of a given number of optimizer steps, whatever an action takes of them.

    Args:
      problem: what is run.
      policy_of: from a setting to a policy.
      num_updates: optimizer steps over all groups.
      score: `score(params, data)`, of the best and of the last parameters.

    Returns:
      `lead(setting, task_key, key, data) -> Led`, jitted.
    """
    num_steps = num_updates // min(action.repeats for action in problem.actions)
    # what a run is worth is measured by `score`, and not a second time
    plain = problem._replace(final_metric=None)

    def lead(setting: Any, task_key: jax.Array, key: jax.Array, data: Any) -> Led:
        result, trajectory = rollout(
            plain, policy_of(setting), key, data, num_steps,
            dispatch="switch", early_stopping=False, task_key=task_key,
            restart=used_up(problem, num_updates),
        )  # fmt: skip
        both = jax.tree.map(lambda *x: jnp.stack(x), result.best_params, result.params)
        # mapped, so that what may be a large program is there once
        scores = jax.lax.map(lambda params: score(params, data), both)
        return Led(
            scores={name: values[0] for name, values in scores.items()},
            last={name: values[1] for name, values in scores.items()},
            metrics=result.metrics,
            metric=result.best_metric,
            actions=trajectory.actions,
            num_steps=result.num_steps,
            is_finite=result.is_finite,
        )

    return jax.jit(lead)


def used_up(problem: AlternatingProblem, num_updates: int) -> Restart:
    """Ends a run with its optimizer steps: an action may take several."""
    repeats = tuple(action.repeats for action in problem.actions)

    def update(taken: jax.Array, seen: Any) -> tuple[jax.Array, jax.Array]:
        taken = taken + jnp.array(repeats)[seen.action].astype(jnp.int32)
        return taken, taken >= num_updates

    return Restart(lambda: jnp.int32(0), update, 0.0, False)


def one_of(policies: Sequence[Policy], index: Any) -> Policy:
    """The schedule of an index, which may be traced: all of them in one program."""

    def act(states: Any, key: jax.Array) -> tuple[Any, Any]:
        acts = [p.act(s, key) for p, s in zip(policies, states, strict=True)]
        decisions = [decision for _, decision in acts]
        chosen = jax.tree.map(lambda *each: jnp.stack(each)[index], *decisions)
        return tuple(state for state, _ in acts), chosen

    def observe(states: Any, seen: Any) -> Any:
        pairs = zip(policies, states, strict=True)
        return tuple(policy.observe(state, seen) for policy, state in pairs)

    return Policy(lambda: tuple(p.init() for p in policies), act, observe)


def network(config: Learning, kind: str, num_actions: int) -> Controller:
    """The controller of a config, or one that sees nothing, with a critic for PPO."""
    critic = None
    if config.estimator == "ppo":
        critic = config.hidden or (32,)
    if kind == "context-free":
        critic = critic and ()
        return controller(num_actions, (), config.temperature, critic_hidden=critic)
    activation = leaky_relu if config.activation == "leaky_relu" else jax.nn.relu
    return controller(
        num_actions, config.hidden, config.temperature,
        activation=activation, critic_hidden=critic,
    )  # fmt: skip


def learned(
    config: Learning,
    kind: str,
    problem: AlternatingProblem,
    seen: Features,
    data: Any,
    run: Path,
) -> list[SavedController]:
    """Controllers trained on a problem, one a seed, or those in the run's folder.

    Their metadata tell what they have been: the mean of the best metrics, and the
    shares of actions, after each update; steps of the task, restarts, and the seconds
    of all seeds.
    """
    seeds, blind = range(config.num_seeds), kind == "context-free"
    paths = [run / "controllers" / f"{kind}-{seed}" for seed in seeds]
    seen = NOTHING if blind else running_norm(seen) if config.normalise else seen
    if not all(path.with_name(f"{path.name}.json").is_file() for path in paths):
        begin, net = time.perf_counter(), network(config, kind, len(problem.actions))
        loop = in_turn(_loop(config, problem, net, seen), config.num_seeds)
        states, infos = train(
            loop, data, jax.random.key(config.seed), config.meta_updates,
            check_finite=False, progress=kind,
        )  # fmt: skip
        seconds = time.perf_counter() - begin
        for i, path in zip(seeds, paths, strict=True):
            own = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)
            state, info = own(states), jax.tree.map(lambda x, i=i: x[:, i], infos)
            phi = state.phi if config.keep == "last" else state.best_phi
            save_controller(
                path, net, phi, seen, state.feature_state, problem,
                metadata={**_metadata(config, info), "seconds": seconds},
            )  # fmt: skip
    kept = NOTHING if blind else None
    return [load_controller(path, features=kept, problem=problem) for path in paths]


def all_learned(
    config: Learning,
    problem: AlternatingProblem,
    seen: Features,
    data: Any,
    run: Path,
) -> dict[str, list[SavedController]]:
    """Controllers of both kinds; none where there are no updates."""
    kinds = KINDS if config.meta_updates else ()
    return {kind: learned(config, kind, problem, seen, data, run) for kind in kinds}


def in_turn(loop: Loop, number: int) -> Loop:
    """Several runs of a loop, one after the other in every step, in one program."""

    def init(key: jax.Array) -> Any:
        return jax.lax.map(loop.init, jax.random.split(key, number))

    def step(states: Any, key: jax.Array, data: Any) -> tuple[Any, Any]:
        keys = jax.random.split(key, number)
        one = lambda pair: loop.step(pair[0], pair[1], data)
        return jax.lax.map(one, (states, keys))

    return Loop(init, step)


def guided(saved: SavedController) -> Callable[[Any], Policy]:
    """Policies of controllers of one kind; a setting is (φ, state of the features)."""
    net, seen = saved.controller, frozen(saved.features)
    return lambda setting: bind(net, setting[0], seen, setting[1])


def settings(saved: Sequence[SavedController]) -> list[Any]:
    """What `guided` makes policies of."""
    return [(one.phi, one.feature_state) for one in saved]


def measure(
    run: Path,
    config: Learning,
    title: str,
    parts: Mapping[str, tuple[Callable, Sequence[Any], AlternatingProblem]],
    data: Any,
    main: str,
) -> dict[str, list[Any]]:
    """All methods from all seeds; what was done before is read.

    Args:
      run: its folder.
      config: its config.
      title: of the files.
      parts: methods to what `leader` gives, a setting for each seed, and the problem.
      data: of the runs.
      main: the score that is printed.

    Returns:
      Methods to cells. Run s of every method begins with the same parameters.
    """

    def run_one(name: str, seed: int) -> dict[str, Any]:
        lead, of_seed, problem = parts[name]
        own = jax.random.fold_in(jax.random.key(config.seed), 1000 + seed)
        begin = time.perf_counter()
        led = jax.device_get(lead(of_seed[seed], *jax.random.split(own), data))
        score = float(led.scores[main])
        print(f"{title}: {name}, seed {seed}: {main} {score:.3f}", flush=True)
        return cell(problem, led, time.perf_counter() - begin)

    found = {}
    for name in parts:
        files = {f"{title} {name} {i}".replace(":", "-"): i
                 for i in range(config.num_seeds)}  # fmt: skip
        found[name] = cells(
            run, list(files), lambda file, n=name, at=files: run_one(n, at[file])
        )
    return found


def cell(problem: AlternatingProblem, led: Led, seconds: float) -> dict[str, Any]:
    """A run as JSON."""
    actions = np.asarray(led.actions)[: int(led.num_steps)].astype(int)
    repeats = np.array([action.repeats for action in problem.actions])
    taken, every = np.cumsum(repeats[actions]), problem.validate_every
    checks = np.arange(every, len(actions) + 1, every)
    count = lambda part: np.bincount(part, minlength=len(repeats))
    parts = np.array_split(actions, FIFTHS)
    return {
        "scores": led.scores,
        "last": led.last,
        "metric": led.metric,
        "updates": taken[checks - 1],
        "curve": np.asarray(led.metrics)[: len(checks)],
        "shares": [count(part) / max(len(part), 1) for part in parts],
        "steps": repeats * count(actions),
        "seconds": seconds,
        "is_finite": led.is_finite,
    }


def _loop(
    config: Learning, problem: AlternatingProblem, net: Controller, seen: Features
) -> Any:
    limit = config.restart_limit
    return autoloss(
        problem,
        net,
        features=seen,
        num_steps=config.episode_steps,
        estimator=config.estimator,
        num_rollouts=config.num_rollouts,
        meta_optimizer=optax.adam(config.meta_rate),
        advantage=config.advantage,
        baseline_order=config.baseline_order,
        reduction=config.reduction,
        dispatch="switch",
        restart=identical_actions(limit) if limit else None,
        ppo=PPO(
            segment_length=config.segment_length,
            segment_reward=segment(config.segment_reward),
            discount=config.discount,
            buffer_size=config.buffer_size,
            batch_size=config.minibatch,
            sync_every=config.sync_every,
        ),
    )


def _metadata(config: Learning, info: Any) -> dict[str, Any]:
    """What a controller has been, as JSON."""
    steps = info.num_steps
    if config.estimator == "ppo":  # counted from the beginning of each run
        steps = np.where(np.diff(steps, axis=0, append=0) < 0, steps, 0)
    curve = [float(x) if np.isfinite(x) else None for x in info.best_metric.mean(-1)]
    return {
        "curve": curve,
        "shares": info.action_fraction.mean(1).round(4).tolist(),
        "steps": int(steps.astype(np.int64).sum()),
        "restarts": int(info.restarted.sum()),
    }
