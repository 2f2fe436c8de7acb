"""When to step on the discriminator and when on the generator: by hand, or learned.

Schedules 1:K (K steps of the generator after each of the discriminator) and K:1, random
ones, controllers that see the run and controllers that see nothing, compared after
equally many optimizer steps and from the same initialisations, as in Xu et al.,
"AutoLoss: learning discrete schedules for alternate optimization", ICLR 2019, figures
2, 4b and 4c.

    python -m experiments.autoloss_gan                     Gaussians, 3 minutes
    python -m experiments.autoloss_gan --preset digits     8 x 8 images, 5 minutes
    python -m experiments.autoloss_gan --preset released   MNIST, made for a GPU
    python -m experiments.autoloss_gan --preset released --architectures 24
    python -m experiments.autoloss_gan --preset released --transfer cifar10

Times are rough ones, for 2 idle cores. Images are scored by a classifier that is
trained first; scores of another classifier are not comparable. `released` has the
settings of the authors' code, where one decision for the generator is four of its
steps; `paper` those of the text; `mnist` our own.

On the grid, which is for trying things out, expect scores between 0.30 and 0.36, the
higher ones where the generator steps no more often than the discriminator.
"""

import dataclasses
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax

from experiments import led_runs, led_tables
from metax import AlternatingProblem, inner_loop
from metax.artifact import fit_arrays, read_arrays, write_arrays
from metax.autoloss import Features, SavedController, bernoulli, cycle, features
from metax.harness import create_run, parse, train, write_summary
from metax.tasks import gan, load

Images = Literal["digits", "mnist", "fashion_mnist", "cifar10"]
SCHEMA = "experiments.score_classifier/1"


@dataclasses.dataclass(frozen=True)
class Config(led_runs.Learning):
    dataset: Literal["gaussian_grid", Images] = "gaussian_grid"
    transfer: Literal["none", Images] = "none"  # where controllers are tried as well
    architectures: int = 0  # how many of the 24 controllers are tried on as well
    schedules: tuple[str, ...] = ("1:1", "1:3", "1:5", "3:1")  # steps of D : of G
    chances: tuple[float, ...] = (0.25, 0.5, 0.75)  # of G, of the random schedules
    num_updates: int = 1000  # optimizer steps of a run, of D and G together
    validate_every: int = 50  # decisions
    generator_repeats: int = 1  # steps of a decision for G, of the controllers alone
    side: int = 3  # of the grid
    std: float = 0.2  # of its modes
    filters: int = 64
    dim_z: int = 128
    batch_norm: bool = False
    batch_size: int = 128
    learning_rate: float = 2e-4
    discriminator_scale: float = 0.5
    generator_loss: Literal["non_saturating", "minimax"] = "non_saturating"
    lowest_pixel: float = -1.0
    common_counter: bool = False
    score_samples: int = 5000
    final_samples: int = 500_000
    classifier_steps: int = 20_000
    small_classifier: bool = False
    num_images: int = 0  # of the training set; 0: all


MNIST = Config(
    dataset="mnist", schedules=("1:1", "1:3", "1:5", "1:7", "1:9", "3:1", "5:1"),
    chances=(0.5, 0.75, 0.875), num_updates=100_000, validate_every=500,
    meta_updates=50, num_rollouts=8, episode_steps=20_000, restart_limit=500,
)  # fmt: skip
RELEASED = dataclasses.replace(
    MNIST, features="released", normalise=False, activation="leaky_relu",
    meta_updates=400, num_rollouts=1, episode_steps=200_000, advantage="ema",
    baseline_order="after", keep="best", generator_repeats=4, lowest_pixel=0.0,
    common_counter=True,
)  # fmt: skip
PRESETS = {
    "digits": Config(
        dataset="digits", schedules=("1:1", "1:3", "3:1"), chances=(0.5,), num_seeds=2,
        num_updates=300, episode_steps=60, meta_updates=4, validate_every=20, filters=8,
        dim_z=16, batch_size=32, learning_rate=1e-3, score_samples=500,
        final_samples=1000, classifier_steps=300, small_classifier=True,
    ),
    "mnist": MNIST,
    "released": RELEASED,
    "paper": dataclasses.replace(
        MNIST, normalise=False, hidden=(), temperature=1.0, estimator="ppo",
        meta_updates=10_000, meta_rate=1e-3, segment_reward="paper", batch_norm=True,
        discriminator_scale=1.0, generator_loss="minimax",
    ),
}  # fmt: skip


class Scene(NamedTuple):
    """Where schedules are compared.

    Attributes:
      name: for tables and files.
      problem: each decision one optimizer step.
      repeated: likewise, but for the decisions of a controller.
      seen: what controllers see.
      learning: the data of a controller that learns.
      data: of the runs that are compared.
    """

    name: str
    problem: AlternatingProblem
    repeated: AlternatingProblem
    seen: Features
    learning: Any
    data: Any


def scenes(config: Config, run: Path) -> Iterable[Scene]:
    """The one where controllers learn first, then those they are carried to."""
    if config.dataset == "gaussian_grid":
        if config.architectures or config.transfer != "none":
            raise ValueError(
                "`--architectures` and `--transfer` are for images; got --dataset "
                "gaussian_grid. Give --dataset mnist, say."
            )
        grid = gan.gaussian_grid(side=config.side, std=config.std)
        grid = grid._replace(validate_every=config.validate_every)
        yield Scene(config.dataset, grid, grid, watched(config, 0.5), None, None)
        return
    norm = config.batch_norm
    size = config.filters, config.filters, config.dim_z
    own = gan.Architecture(*size, norm, norm)
    yield image_scene(config, run, config.dataset, config.dataset, own)
    for i, other in enumerate(gan.architectures()[: config.architectures]):
        yield image_scene(config, run, f"architecture {i}", config.dataset, other)
    if config.transfer != "none":
        other = own._replace(batch_norm_g=True, batch_norm_d=True)
        name = f"to {config.transfer}"
        yield image_scene(config, run, name, config.transfer, other)


def image_scene(
    config: Config, run: Path, name: str, dataset: Any, architecture: gan.Architecture
) -> Scene:
    """A set of images; a controller learns on one half of them, runs on the other."""
    images = load(dataset, data_dir=config.data_dir)
    images = images._replace(
        train=jax.tree.map(lambda x: x[: config.num_images or None], images.train)
    )
    judge = classifier(config, run, dataset, images)
    halves = np.array_split(images.train.image, 2)
    keys = jax.random.split(jax.random.key(config.seed), 2)
    data = [
        gan.image_data(
            half, images.test.image, judge, key,
            dim_z=architecture.dim_z, score_samples=config.score_samples,
        )
        for half, key in zip(halves, keys, strict=True)
    ]  # fmt: skip
    make = lambda repeats: gan.problem(
        dataset,
        architecture=architecture,
        generator_repeats=repeats,
        discriminator_scale=config.discriminator_scale,
        generator_loss=config.generator_loss,
        pixel_range=(config.lowest_pixel, 1.0),
        learning_rate=config.learning_rate,
        batch_size=256 if dataset == "cifar10" else config.batch_size,
        common_counter=config.common_counter,
        score_samples=config.score_samples,
        final_samples=config.final_samples or None,
        validate_every=config.validate_every,
    )
    repeated = make(config.generator_repeats)
    offset = 6.0 if dataset == "cifar10" else 8.0
    seen = watched(config, offset)
    return Scene(name, make(1), repeated, seen, *(jax.device_put(x) for x in data))


def classifier(config: Config, run: Path, dataset: Any, images: Any) -> Any:
    """The one that scores images, from the run's folder or trained now."""
    path = run / "classifiers" / dataset
    task = gan.classifier_task(dataset, small=config.small_classifier)
    if not path.with_suffix(".json").is_file():
        loop = inner_loop(task, optax.adam(1e-3 if config.small_classifier else 1e-4))
        split, key = jax.device_put(images.train), jax.random.key(config.seed)
        name = f"{dataset} classifier"
        state, _ = train(loop, split, key, config.classifier_steps, progress=name)
        judged = jax.jit(task.evaluate)(state.params, jax.device_put(images.test))
        card = {name: float(value) for name, value in judged.items()}
        write_arrays(path, state.params, schema=SCHEMA, sidecar={"test": card})
    arrays, card = read_arrays(path, SCHEMA)
    print(f"classifier of {dataset}: {card['test']}")
    like = jax.eval_shape(task.init, jax.random.key(0))
    return fit_arrays(arrays, like, path)


def watched(config: Config, offset: float) -> Features:
    """What controllers see."""
    if config.features == "paper":
        return features.paper(2, kind="gan")
    every = config.validate_every
    return features.released("gan", score_offset=offset, observe_every=every)


def score_of(problem: AlternatingProblem) -> Any:
    """Scores of parameters: anew on many latents, where the problem says how."""
    last = problem.final_metric or problem.metric
    return lambda params, data: {"score": last(params, data)}


def hand_made(config: Config) -> dict[str, Any]:
    """The schedules by name."""
    counts = {n: tuple(int(x) for x in n.split(":")) for n in config.schedules}
    chances = {f"random({p:g})": bernoulli(p) for p in config.chances}
    return {**{name: cycle(pair) for name, pair in counts.items()}, **chances}


def measure(
    config: Config, scene: Scene, saved: dict[str, list[SavedController]], run: Path
) -> dict[str, list[Any]]:
    """All methods from all seeds, of which what was done before is read."""
    by_hand = hand_made(config)
    policies = list(by_hand.values())
    score = score_of(scene.problem)
    make = lambda problem, policy_of: led_runs.leader(
        problem, policy_of, config.num_updates, score
    )
    by_index = make(scene.problem, lambda index: led_runs.one_of(policies, index))
    settings = {name: [i] * config.num_seeds for i, name in enumerate(by_hand)}
    parts = {name: (by_index, each, scene.problem) for name, each in settings.items()}
    for kind, many in saved.items():
        first = many[0]
        if kind == "AutoLoss" and not config.normalise:
            # scores may be counted from elsewhere in this scene
            first = first._replace(features=scene.seen)
        lead = make(scene.repeated, led_runs.guided(first))
        parts[kind] = (lead, led_runs.settings(many), scene.repeated)
    return led_runs.measure(run, config, scene.name, parts, scene.data, "score")


def main(argv: list[str] | None = None) -> None:
    config, options = parse(Config, presets=PRESETS, argv=argv, description=__doc__)
    run, begin = create_run(options.out, config), time.perf_counter()
    saved: dict[str, list[SavedController]] = {}
    outcome, found = {}, {}
    for scene in scenes(config, run):
        if not saved:  # the first: controllers learn here
            saved = led_runs.all_learned(
                config, scene.repeated, scene.seen, scene.learning, run
            )
        found[scene.name] = measure(config, scene, saved, run)
        outcome[scene.name] = led_tables.summarise(found[scene.name], "score", True)
        print(scene.name)
        led_tables.show(outcome[scene.name]["rows"], ("D", "G"))
    cards = {kind: led_tables.controllers_row(many) for kind, many in saved.items()}
    summary = {"config": config, "scenes": outcome, "controllers": cards}
    write_summary(run, summary, wall_time=time.perf_counter() - begin)
    led_tables.draw(run / "figure.png", found, "score")


if __name__ == "__main__":
    main()
