"""What the experiments on tuned image classifiers share: data, loops, costs, pairs.

No script, and not to be run. A config is a dataclass with the fields that are read
here, under the names of `metax.stn.delta_stn` where these take them.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metax import BilevelProblem, Loop, Task, inner_loop, unroll
from metax.harness import (
    evaluate,
    evaluate_in_turn,
    grid,
    paired_difference,
    put_everywhere,
)
from metax.stn import DeltaSTN, delta_stn
from metax.tasks import (
    ImageTuning,
    SimpleCNN,
    TunableMLP,
    TuningData,
    corrupt_labels,
    hold_out,
    image_tuning,
    load,
    normalization,
    stock_hparams,
)

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


def network(
    config: Any, image: np.ndarray, more: Sequence[str] = (), rates: bool = True
) -> ImageTuning:
    """An MLP or SimpleCNN; tuned: dropout rates, cutout of the latter, and `more`."""
    is_mlp = config.model == "mlp"
    model = TunableMLP(10, config.widths) if is_mlp else SimpleCNN(10)
    cutout = () if is_mlp else ("cutout_length", "cutout_holes")
    hparams = stock_hparams([*((*model.rate_names, *cutout) if rates else ()), *more])
    mean, std = normalization(config.dataset)
    size = config.batch_size
    return image_tuning(model, image, hparams, batch_size=size, mean=mean, std=std)


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


def without_scan(config: Any, problem: BilevelProblem, tuned: DeltaSTN) -> Loop:
    """The steps of `tuned`, by the same keys, with no loop and no branch inside.

    A validation step is taken in the warm-up as well, and thrown away there.
    """

    def step(state: Any, key: jax.Array, data: TuningData) -> tuple[Any, Any]:
        key_train, key_valid = jax.random.split(key)
        is_tuning, losses = state.count >= config.warmup_steps, []
        for key_one in jax.random.split(key_train, config.train_steps):
            key_sample, key_step = jax.random.split(key_one)
            batch = problem.sample_train(data, key_sample)
            state, info = tuned.train_step(state, batch, key_step)
            losses.append(info.train_loss)
        key_sample, key_step = jax.random.split(jax.random.split(key_valid, 1)[0])
        batch = problem.sample_valid(data, key_sample)
        after = tuned.valid_step(state, batch, key_step)
        choose = lambda new, old: jnp.where(is_tuning, new, old)
        state, info = jax.tree.map(choose, after, (state, info))
        return state, info._replace(train_loss=jnp.stack(losses).mean())

    return Loop(tuned.init, step)


class Part(NamedTuple):
    """What is judged: a loop, its steps between judgements, the weights of a state."""

    loop: Any
    num_steps: int
    weights: Callable[[Any], Any]


def watch(judged: ImageTuning, part: Part) -> Loop:
    """A loop whose step is a stretch of another's, after which weights are judged."""

    def step(state: Any, key: jax.Array, data: TuningData) -> tuple[Any, Watched]:
        keys = jax.random.split(key, part.num_steps)
        state, steps = unroll(part.loop, state, keys, data)
        return state, Watched(steps, *_worth(judged, part, state, data))

    return Loop(part.loop.init, step)


def _worth(judged: ImageTuning, part: Part, state: Any, data: TuningData) -> Any:
    params = part.weights(state)
    return tuple(judged.evaluate(params, x) for x in (data.valid, data.test))


def run_watched(
    judged: ImageTuning, build: Callable[[Any], Part], settings: Any, data: TuningData,
    key: jax.Array, num: int, num_seeds: int, label: str, *, by_step: bool = False,
    see: Callable[[Watched], Any] = lambda infos: None, mesh: Any = None,
) -> tuple[Watched, float]:  # fmt: skip
    """Infos [seeds, `num`, settings, ...], and the seconds without compilation.

    All runs are one program, or, `by_step`, a step is one and the runs take turns. Over
    several devices seeds are spread, or settings where there is one seed.
    """
    if by_step and mesh is not None:
        raise SystemExit("--by-step takes its runs in turn: --devices must be 1")
    seeds_on, settings_on = (mesh, None) if num_seeds > 1 else (None, mesh)
    marks = [time.perf_counter()]

    def look(infos: Watched) -> None:
        marks.append(time.perf_counter())
        see(infos)

    if by_step:
        infos = _in_turn(
            judged, build, settings, data, key, num, num_seeds, label, look
        )
        turns = num * num_seeds * infos.valid["loss"].shape[2]
    else:
        one = lambda setting: watch(judged, build(setting))
        loop = grid(one, settings, mesh=settings_on)
        on_chunk = lambda step, state, infos: look(infos)
        how: dict[str, Any] = {"chunk": 1, "on_chunk": on_chunk}
        how |= {"num_seeds": num_seeds, "progress": label, "mesh": seeds_on}
        _, infos = evaluate(loop, put_everywhere(data, mesh), key, num, **how)
        turns = num
    # the first stretch holds the compilation
    return infos, float(np.median(np.diff(marks)[-max(turns - 1, 1) :]) * turns)


def _in_turn(
    judged: ImageTuning, build: Callable[[Any], Part], settings: Any, data: TuningData,
    key: jax.Array, num: int, num_seeds: int, label: str, see: Callable,
) -> Watched:  # fmt: skip
    part = build(jax.tree.map(lambda x: x[0], settings))
    infos, worth = evaluate_in_turn(
        lambda setting: build(setting).loop,
        settings,
        data,
        key,
        num * part.num_steps,
        num_seeds=num_seeds,
        judge=lambda state, data: _worth(judged, part, state, data),
        judge_every=part.num_steps,
        on_judged=lambda infos, worth: see(Watched(infos, *worth)),
        progress=label,
    )
    by_stretch = lambda x: np.moveaxis(
        x.reshape(num_seeds, num, part.num_steps, *x.shape[2:]), 2, 3
    )
    return Watched(jax.tree.map(by_stretch, infos), *worth)


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
