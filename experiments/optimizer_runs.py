"""What the experiments on learned optimizers share: students, and races.

No script, and not to be run. A *race* runs one rule at several settings from several
seeds on a problem, and judges its parameters on the other split on the way.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metax import Loop, inner_loop, unroll
from metax.amalgamation import LearnedOptimizer, with_warmup
from metax.amalgamation.teachers import adam_constant_correction
from metax.harness import evaluate, grid
from metax.tasks.optimizees import Optimizee

# The students by the names that scripts know them by: their policy and its options.
STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnnprop": ("rnnprop", {}),
    "rnnprop_constant": ("rnnprop", {"bias_correction": "constant"}),
    "rnnprop_lv": ("rnnprop", {"b1": 0.95, "b2": 0.95, "input_layer": True}),
    "l2l": ("l2l", {}),
    "scale": ("scale", {}),
}
# of all analytical rules: the paper's range, 1-2-5
RATES = (5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
RULES: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "adam": lambda rate: optax.adam(rate, eps=0.0, eps_root=1e-10),
    "adam_constant": adam_constant_correction,
    "rmsprop": lambda rate: optax.rmsprop(rate, decay=0.9, eps=1e-10, eps_in_sqrt=True),
    "sgd": optax.sgd,
}
Data = Mapping[str, Any]


class Race(NamedTuple):
    """Outcomes of a race, arrays [seeds, settings].

    Attributes:
      train: ln of the mean training loss of the last `last` steps.
      best_valid: ln of the least loss on the other split met at a judgement; +∞ where
        none was finite, and so below.
      last_valid: ln of that loss at the end.
      accuracy: the best on the other split, 0..1.
      is_finite: whether every training loss was.
      curves: ln training loss of each stretch between judgements, the mean of the
        stretch, [seeds, settings, stretches].
    """

    train: np.ndarray
    best_valid: np.ndarray
    last_valid: np.ndarray
    accuracy: np.ndarray
    is_finite: np.ndarray
    curves: np.ndarray


def race(
    optimizee: Optimizee,
    build: Callable[[Any], optax.GradientTransformation],
    settings: Any,
    data: tuple[Data, ...],
    key: jax.Array,
    *,
    num_steps: int,
    judge_every: int,
    num_seeds: int,
    last: int,
    label: str | None = None,
    mesh: Any = None,
) -> Race:
    """Runs `build(setting)` for all settings and seeds, in one compiled program.

    Args:
      optimizee: the problem.
      build: from a setting to a rule.
      settings: a tree of arrays with a leading axis of settings.
      data: training data, and what to judge on.
      key: seeds and batches are the same for all settings.
      num_steps: of each run; a multiple of `judge_every`.
      judge_every: steps between judgements.
      num_seeds: runs of each setting.
      last: a multiple of `judge_every`: steps over which the last loss is averaged.
      label: of a progress bar.
      mesh: devices to spread the seeds over; None for one.
    """

    def judged(setting: Any) -> Loop:
        loop = inner_loop(optimizee.task, build(setting))

        def step(state: Any, key: jax.Array, data: Any) -> tuple[Any, Any]:
            keys = jax.random.split(key, judge_every)
            state, infos = unroll(loop, state, keys, data[0])
            found = optimizee.task.evaluate(state.params, data[1])
            return state, (infos.loss.mean(), found)

        return Loop(loop.init, step)

    num = num_steps // judge_every
    how: dict[str, Any] = {"num_seeds": num_seeds, "progress": label, "mesh": mesh}
    loop = grid(judged, settings)
    # a run that diverges is a result
    _, (losses, found) = evaluate(loop, data, key, num, **how)
    with np.errstate(all="ignore"):
        finite = np.isfinite(found["loss"])
        valid = np.log(np.where(finite, found["loss"], np.inf))
        tail = losses[:, max(num - last // judge_every, 0) :].mean(1)
        return Race(
            train=np.log(tail),
            best_valid=valid.min(1),
            last_valid=valid[:, -1],
            accuracy=found["accuracy"].max(1),
            is_finite=np.isfinite(losses).all(1),
            curves=np.moveaxis(np.log(losses), 1, 2),
        )


def learned(
    student: LearnedOptimizer,
    warmup_steps: int,
    warmup_learning_rate: float,
    clip: float | None = None,
) -> Callable[[Any], optax.GradientTransformation]:
    """A rule of given weights behind the warm-up it was trained behind, for `race`."""

    def build(theta: Any) -> optax.GradientTransformation:
        rule = with_warmup(student.rule(theta), warmup_steps, warmup_learning_rate)
        if clip is None:
            return rule
        return optax.chain(optax.clip_by_global_norm(clip), rule)

    return build


def analytical(
    name: str, steps: int, rate: float
) -> Callable[[Any], optax.GradientTransformation]:
    """A rule of a given learning rate, behind a warm-up as the learned ones have."""
    return lambda setting: with_warmup(RULES[name](setting), steps, rate)


def stacked(thetas: list[Any]) -> Any:
    """Weights of several students as the settings of one race."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *thetas)
