"""Seven regularisers of an LSTM tuned on the Penn Treebank, as in MacKay et al. 2019.

Delta-STN, STN and fixed hyperparameters: five dropout rates, activation and temporal
regularisation. The text is read in order, 2 training segments to 1 of validation, the
hidden state carried over; λ moves by Adam and its noise keeps σ = 1.

    python -m experiments.stn_ptb --data-dir FOLDER        smoke run, 1 minute, 2 cores
    python -m experiments.stn_ptb --dataset synthetic      without files
    python -m experiments.stn_ptb --preset paper --data-dir FOLDER      made for a GPU

Simpler than published: the learning rate is divided by 4 after chosen epochs, and not
when the validation loss stops falling; the number of epochs is given; a validation step
has as many rows as a training step, 40 for 10. The smoke run reads the first tokens of
a text cut to its most frequent words: its perplexities are comparable with nothing.
Expect STN to diverge at the rate of the others: it wants a lower one, in a run apart
(`--methods stn --learning-rate 1`).
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.tuning_runs import fixed, report, run_missing
from metax import Loop, unroll
from metax.harness import create_run, parse
from metax.stn import DeltaSTN, DeltaSTNState, delta_stn, stn
from metax.tasks import (
    EpochInfo,
    TextData,
    batchify,
    language_tuning,
    load_ptb,
    segments,
    stock_language_hparams,
    synthetic_text,
)

Method = Literal["delta_stn", "stn", "fixed"]


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: Literal["ptb", "synthetic"] = "ptb"
    methods: tuple[Method, ...] = ("delta_stn", "stn", "fixed")
    vocab: int = 1000  # the most frequent words; 10000 are all
    num_tokens: int = 40_000  # of the training text; a tenth of the others; 0 is all
    width: int = 64
    layers: int = 2
    batch_size: int = 20
    segment: int = 35
    epochs: int = 4
    warmup_steps: int = 40  # training segments
    num_seeds: int = 1
    learning_rate: float = 30.0  # of the weights and of the response
    clip: float = 0.25  # the largest norm of a gradient
    drops: tuple[int, ...] = ()  # epochs after which the rate is divided by 4
    outer_learning_rate: float = 0.01
    train_steps: int = 2  # for each validation step
    seed: int = 0
    data_dir: str | None = None


PRESETS = {
    "paper": Config(
        vocab=10_000,
        num_tokens=0,
        width=650,
        batch_size=40,
        segment=70,
        epochs=72,
        warmup_steps=331,
        num_seeds=3,
        drops=(40, 50, 60, 65, 70),
    )
}


class Reading(NamedTuple):
    """A tuner, and the numbers of the segments that it reads next."""

    tuner: DeltaSTNState
    train_at: jax.Array
    valid_at: jax.Array


METHODS: dict[str, Callable[..., DeltaSTN]] = {
    "delta_stn": delta_stn,
    "stn": stn,
    "fixed": fixed,
}


def ordered(loop: DeltaSTN, train_steps: int, warmup_steps: int) -> Loop:
    """The tuner on the next segments of {"train", "valid"}, from the first again."""

    def segment(pieces: Any, at: jax.Array) -> Any:
        return jax.tree.map(lambda leaf: leaf[at % len(leaf)], pieces)

    def init(key: jax.Array) -> Reading:
        return Reading(loop.init(key), jnp.int32(0), jnp.int32(0))

    def step(state: Reading, key: jax.Array, data: Any) -> tuple[Reading, Any]:
        key_train, key_valid = jax.random.split(key)

        def train_step(tuner: Any, turn: Any) -> tuple[Any, Any]:
            at, key = turn
            return loop.train_step(tuner, segment(data["train"], at), key)

        turns = state.train_at + jnp.arange(train_steps, dtype=jnp.int32)
        keys = jax.random.split(key_train, train_steps)
        tuner, trained = jax.lax.scan(train_step, state.tuner, (turns, keys))
        last = jax.tree.map(lambda leaf: leaf[-1], trained)
        piece = segment(data["valid"], state.valid_at)
        is_tuning = state.tuner.count >= warmup_steps
        tuner, info = jax.lax.cond(
            is_tuning,
            lambda tuner: loop.valid_step(tuner, piece, key_valid),
            lambda tuner: (tuner, last),
            tuner,
        )
        info = info._replace(
            train_loss=trained.train_loss.mean(),
            is_finite=trained.is_finite.all() & info.is_finite,
        )
        moved = turns[-1] + 1, state.valid_at + is_tuning
        return Reading(tuner, *moved), info

    return Loop(init, step)


def build(config: Config, method: str, data: Any) -> Loop:
    """A loop of epochs that measures perplexities and hyperparameters."""
    specs = stock_language_hparams()
    specs.pop("weight_decay")
    problem, evaluate = language_tuning(
        specs,
        vocab=config.vocab,
        width=config.width,
        layers=config.layers,
        batch_size=config.batch_size,
        segment=config.segment,
    )
    num_segments = len(data["train"]["input"])
    drops = {epoch * num_segments: 0.25 for epoch in config.drops}
    rate = optax.piecewise_constant_schedule(config.learning_rate, drops)
    rule = optax.chain(optax.clip_by_global_norm(config.clip), optax.sgd(rate))
    loop = METHODS[method](
        problem,
        inner_optimizer=rule,
        response_optimizer=rule,
        outer_optimizer=optax.adam(config.outer_learning_rate),
    )
    warmup = 2**30 if method == "fixed" else config.warmup_steps
    reading = ordered(loop, config.train_steps, warmup)
    cycles = max(num_segments // config.train_steps, 1)

    def epoch(state: Reading, key: jax.Array, data: Any) -> tuple[Reading, EpochInfo]:
        keys = jax.random.split(key, cycles)
        state, infos = unroll(reading, state, keys, data)
        params = loop.params(state.tuner)
        metrics = {
            "train_loss": infos.train_loss.mean(),
            "valid_perplexity": evaluate(params, data["valid_rows"])["perplexity"],
            "test_perplexity": evaluate(params, data["test"])["perplexity"],
        }
        return state, EpochInfo(infos, metrics, infos.is_finite.all())

    return Loop(reading.init, epoch)


def read_text(config: Config) -> TextData:
    """The text, cut where the config says so; rare words become one."""
    if config.dataset == "synthetic":
        key = jax.random.key(config.seed)
        return synthetic_text(key, config.num_tokens or 100_000, config.vocab)
    text = load_ptb(config.data_dir)
    num = config.num_tokens or len(text.train)
    numbers = np.argsort(-np.bincount(text.train), kind="stable")
    rank = np.minimum(np.argsort(numbers), config.vocab - 1).astype(np.int32)
    short = num // 10 if config.num_tokens else num
    return text._replace(
        train=rank[text.train[:num]],
        valid=rank[text.valid[:short]],
        test=rank[text.test[:short]],
    )


def main(argv: list[str] | None = None) -> None:
    config, options = parse(Config, presets=PRESETS, argv=argv, description=__doc__)
    run = create_run(options.out, config)
    begin, text = time.perf_counter(), read_text(config)
    data = {
        "train": segments(batchify(text.train, config.batch_size), config.segment),
        "valid": segments(batchify(text.valid, config.batch_size), config.segment),
        "valid_rows": batchify(text.valid, 10),
        "test": text.test,
    }
    run_missing(run, config, build, data)
    judged = ("valid_perplexity", "test_perplexity")
    report(run, config, judged, time.perf_counter() - begin)


if __name__ == "__main__":
    main()
