"""When to step on translation and when on two taggings that share its encoder.

Translation alone, a ratio by the sizes of the training sets (fixed, or followed by
translation alone: fine-tuned), a rotation, random schedules, and controllers that learn
by PPO, as in Xu et al., "AutoLoss: learning discrete schedules for alternate
optimization", ICLR 2019, figure 3. All begin with the same parameters and take equally
many steps.

    python -m experiments.autoloss_translation             words made up, 3 minutes
    python -m experiments.autoloss_translation --segment-reward released
    python -m experiments.autoloss_translation --preset small --data-dir DIR
    python -m experiments.autoloss_translation --preset paper --data-dir DIR

Times are rough ones, for 2 idle cores. `small` is Multi30k on a CPU, for hours, as far
as `--num-steps` goes; `paper` and `released` want a GPU.
DIR holds the folders `multi30k` and `german`. Captions are no talks: perplexities are
not those of the paper, and no order of schedules is to be expected from it.

On the made-up words the tags teach nothing about the translation: expect a perplexity
of 1.1 of translation alone, 2.1 of the fixed ratio, and the more steps on translation
the better. Controllers have seen six short runs, and theirs scatter from 1.2 to 3.0:
segments are paid by their improvement over that of the one before, and controllers
learn to put translation off. Paid by their own improvement (`released`) theirs come to
1.3 to 1.4.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from experiments import led_runs, led_tables
from metax import AlternatingProblem
from metax.autoloss import (
    Features,
    Policy,
    SavedController,
    always,
    bernoulli,
    cycle,
    features,
    phases,
)
from metax.harness import create_run, parse, write_summary
from metax.tasks import FiveWay, controller_data, task_data, translation

TASKS = ("mt", "ner", "pos")


@dataclasses.dataclass(frozen=True)
class Config(led_runs.Learning):
    corpus: Literal["synthetic", "multi30k"] = "synthetic"
    pos_tags: Literal["upos", "stts"] = "upos"
    vocab_size: int = 20
    max_length: int = 6
    fraction: float = 1.0  # of the training sentences
    num_sentences: int = 1500  # of the made-up ones
    chances: tuple[float, ...] = (0.5, 0.75)  # of translation, of the random schedules
    fine_tuned_from: float = 0.7  # of the steps
    num_steps: int = 300
    validate_every: int = 20
    embedding: int = 16
    hidden_units: int = 32  # of the networks that are trained
    depth: int = 1
    bidirectional: bool = True
    residual: bool = False
    dropout: float = 0.1
    learning_rate: float = 5e-3
    batch_size: int = 32
    estimator: Literal["reinforce", "ppo"] = "ppo"
    meta_updates: int = 90  # segments
    meta_rate: float = 3e-3
    episode_steps: int = 300
    sync_every: int = 1
    buffer_size: int = 400
    restart_limit: int = 0


MULTI30K = Config(
    corpus="multi30k", vocab_size=2000, max_length=60, num_steps=20_000,
    validate_every=50, embedding=32, hidden_units=64, dropout=0.3, learning_rate=5e-4,
    meta_updates=400, episode_steps=10_000, segment_length=50, buffer_size=2000,
)  # fmt: skip
PAPER = dataclasses.replace(
    MULTI30K, vocab_size=10_000, pos_tags="stts", num_steps=50_000, validate_every=20,
    embedding=128, hidden_units=256, depth=2, batch_size=128, meta_updates=10_000,
    meta_rate=1e-3, episode_steps=100_000, segment_length=20, normalise=False,
    hidden=(32,), temperature=1.0, segment_reward="paper", sync_every=10,
)  # fmt: skip
PRESETS = {
    "small": MULTI30K,
    "paper": PAPER,
    "released": dataclasses.replace(
        PAPER, features="released", bidirectional=False, residual=True, fraction=0.7,
        learning_rate=1e-3, validate_every=50, segment_length=50, discount=0.9,
        segment_reward="released", buffer_size=200, sync_every=1, meta_updates=4000,
    ),
}  # fmt: skip


def sentences(config: Config) -> FiveWay:
    """The three tasks in five parts."""
    if config.corpus == "synthetic":
        num, few = config.num_sentences, max(config.num_sentences // 15, 1)
        sizes = (max(num // 3, 1), few, num, few, few)
        lengths = (max(config.max_length // 2, 1), config.max_length)
        return translation.synthetic(
            config.seed, vocab_size=config.vocab_size, lengths=lengths, sizes=sizes
        )
    if config.data_dir is None:
        raise ValueError(
            "`--data-dir` must name the folder that holds multi30k and german; got "
            "none."
        )
    return translation.load(
        config.data_dir, pos_tags=config.pos_tags, vocab_size=config.vocab_size,
        max_length=config.max_length, fraction=config.fraction, seed=config.seed,
    )  # fmt: skip


def problem_of(config: Config, splits: FiveWay) -> AlternatingProblem:
    return translation.problem(
        translation.vocab_sizes(splits),
        embedding=config.embedding,
        hidden=config.hidden_units,
        depth=config.depth,
        bidirectional=config.bidirectional,
        residual=config.residual,
        dropout=config.dropout,
        learning_rate=config.learning_rate,
        batch_size=config.batch_size,
        validate_every=config.validate_every,
    )


def watched(config: Config) -> Features:
    """What controllers see."""
    if config.features == "paper":
        return features.paper(3)
    return features.released("translation", observe_every=config.validate_every)


def hand_made(config: Config, splits: FiveWay) -> dict[str, Policy]:
    """The schedules by name."""
    sizes = np.array([len(splits.task_train[task]["source"]) for task in TASKS], float)
    ratio = bernoulli(sizes / sizes.sum())
    until = max(round(config.fine_tuned_from * config.num_steps), 1)
    chances = {
        f"random({p:g})": bernoulli(np.array([p, (1 - p) / 2, (1 - p) / 2]))
        for p in config.chances
    }
    return {
        "MT only": always(0),
        "FixedRatio": ratio,
        "FineTuned": phases((ratio, always(0)), (until,)),
        "1:1:1": cycle((1, 1, 1)),
        **chances,
    }


def measure(
    config: Config,
    splits: FiveWay,
    saved: dict[str, list[SavedController]],
    run: Path,
) -> dict[str, list[Any]]:
    """All methods from all seeds, of which what was done before is read."""
    by_hand, problem = hand_made(config, splits), problem_of(config, splits)
    data, policies = jax.device_put(task_data(splits)), list(by_hand.values())
    assert problem.evaluate is not None
    evaluate = problem.evaluate
    # the test split is read here, of what validation has chosen, and nowhere else
    score = lambda params, data: dict(evaluate(params, {"test": data["test"]}))
    make = lambda policy_of: led_runs.leader(
        problem, policy_of, config.num_steps, score
    )
    by_index = make(lambda index: led_runs.one_of(policies, index))
    settings = {name: [i] * config.num_seeds for i, name in enumerate(by_hand)}
    parts = {name: (by_index, each, problem) for name, each in settings.items()}
    for kind, many in saved.items():
        lead = make(led_runs.guided(many[0]))
        parts[kind] = (lead, led_runs.settings(many), problem)
    return led_runs.measure(run, config, "run", parts, data, "test_perplexity")


def main(argv: list[str] | None = None) -> None:
    config, options = parse(Config, presets=PRESETS, argv=argv, description=__doc__)
    run, begin = create_run(options.out, config), time.perf_counter()
    splits = sentences(config)
    learning = jax.device_put(controller_data(splits))
    saved = led_runs.all_learned(
        config, problem_of(config, splits), watched(config), learning, run
    )
    found = measure(config, splits, saved, run)
    outcome = led_tables.summarise(found, "test_perplexity", maximize=False)
    led_tables.show(outcome["rows"], ("MT", "NER", "POS"))
    cards = {kind: led_tables.controllers_row(many) for kind, many in saved.items()}
    words = {part: {task: len(rows["source"]) for task, rows in tasks.items()}
             for part, tasks in splits._asdict().items()}  # fmt: skip
    summary = {"config": config, "sentences": words, **outcome, "controllers": cards}
    write_summary(run, summary, wall_time=time.perf_counter() - begin)
    led_tables.draw(run / "figure.png", {"": found}, "validation loss of MT")


if __name__ == "__main__":
    main()
