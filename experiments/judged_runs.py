"""What the experiments on tuned image classifiers share: data, loops, costs, pairs.

No script, and not to be run. A config is a dataclass with the fields that are read
here, under the names of `metax.stn.delta_stn` where these take them.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metax import BilevelProblem, Loop, Task, inner_loop, unroll
from metax.harness import evaluate, paired_difference
from metax.stn import DeltaSTN, delta_stn
from metax.tasks import ImageTuning, TuningData, corrupt_labels, hold_out, load

QUANTITIES = ("valid_loss", "test_loss", "valid_accuracy", "test_accuracy")
VALID_COST = 1.3  # of a noisy validation step, in plain steps, by its FLOPs


class Watched(NamedTuple):
    """Some steps of a loop, and what the weights were worth after them."""

    steps: Any  # the infos of the loop, stacked
    valid: Mapping[str, jax.Array]  # "loss" and "accuracy"
    test: Mapping[str, jax.Array]


def prepare(config: Any, key: jax.Array, num_train: int = 0) -> TuningData:
    """Train, validation and test; only the training part is cut and corrupted."""
    data = hold_out(load(config.dataset, data_dir=config.data_dir), 0.15)
    train = type(data.train)(*(x[: num_train or None] for x in data.train))
    return data._replace(train=corrupt_labels(train, config.corrupted, key, 10))


def fixed_values(problem: BilevelProblem, name: str) -> dict[str, float]:
    """The start, or for "fixed_literature" its rates: .2 of the input, .5 elsewhere."""
    values = {n: spec.init for n, spec in problem.hparams.items()}
    if name == "fixed_literature":
        rates = [n for n in values if "dropout" in n]
        values |= {n: 0.2 if n == "input_dropout" else 0.5 for n in rates}
        values |= {n: 0.0 for n in values if n == "cutout_holes"}
    return values


def plain_loop(problem: BilevelProblem, values: Mapping[str, Any], rule: Any) -> Loop:
    """Training at natural values that stay."""

    def loss(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        full = lambda x: jnp.full(batch.label.shape, x, jnp.float32)
        spread = {n: full(x) for n, x in values.items()}
        outputs = problem.predict(params, batch, spread, key)
        return problem.train_loss(outputs, batch, spread, params).mean()

    task = Task(problem.init, loss, problem.sample_train, lambda params, data: {})
    return inner_loop(task, rule)


def tuned_loop(
    config: Any,
    problem: BilevelProblem,
    inner_rate: Any,
    outer_rate: Any,
    outer: Callable = optax.adam,
    **switches: Any,
) -> DeltaSTN:
    """Delta-STN or a variant, by the config; the rates may be traced."""
    sgd = lambda: optax.sgd(inner_rate, config.momentum)
    rules: dict[str, Any] = {
        "inner_optimizer": sgd(),
        "response_optimizer": sgd(),
        "outer_optimizer": outer(outer_rate),
        "scale_optimizer": outer(config.scale_rate),
    }
    return delta_stn(
        problem,
        **rules,
        entropy_weight=config.entropy_weight,
        train_steps=config.train_steps,
        warmup_steps=config.warmup_steps,
        **switches,
    )


def watch(
    judged: ImageTuning, loop: Any, num_steps: int, weights: Callable[[Any], Any]
) -> Loop:
    """A loop whose step is `num_steps` of another's, after which weights are judged."""

    def step(state: Any, key: jax.Array, data: TuningData) -> tuple[Any, Watched]:
        keys = jax.random.split(key, num_steps)
        state, steps = unroll(loop, state, keys, data)
        params = weights(state)
        valid, test = (judged.evaluate(params, x) for x in (data.valid, data.test))
        return state, Watched(steps, valid, test)

    return Loop(loop.init, step)


def run_watched(
    loop: Loop, data: TuningData, key: jax.Array, num: int, num_seeds: int, label: str,
    see: Callable[[Watched], Any] = lambda infos: None,
) -> tuple[Watched, float]:  # fmt: skip
    """Infos of `num` judged stretches, and the seconds of all without compilation."""
    marks = [time.perf_counter()]

    def on_chunk(step: int, state: Any, infos: Watched) -> None:
        marks.append(time.perf_counter())
        see(infos)

    how: dict[str, Any] = {"chunk": 1, "on_chunk": on_chunk, "progress": label}
    _, infos = evaluate(loop, data, key, num, num_seeds=num_seeds, **how)
    # the first stretch holds the compilation
    return infos, float(np.median(np.diff(marks)[-max(num - 1, 1) :]) * num)


def judgements(infos: Watched) -> dict[str, Any]:
    """The four `QUANTITIES`, by name."""
    valid = {f"valid_{n}": x for n, x in infos.valid.items()}
    return {**valid, **{f"test_{n}": x for n, x in infos.test.items()}}


def differences(outcomes: Mapping[str, Any], when: str) -> dict[str, Any]:
    """Delta-STN less each other method, by seed; methods that diverged are left out."""
    if "delta_stn" not in outcomes:
        return {}
    ours = outcomes["delta_stn"][when]
    sound = lambda a, b: len(a) > 1 and np.isfinite(a).all() and np.isfinite(b).all()
    return {
        name: {q: paired_difference(ours[q], theirs[when][q]) for q in QUANTITIES}
        for name, theirs in outcomes.items()
        if name != "delta_stn"
        and all(sound(ours[q], theirs[when][q]) for q in QUANTITIES)
    }
