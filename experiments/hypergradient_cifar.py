"""VGG-16 with batch norm on CIFAR-10, as in Baydin et al. 2018, Figure 3.

One optimizer a run, from α_0 = 1e-3; β = 1e-3 for the SGD rules, 1e-8 for Adam. Random
flip and pad-4 crop, ImageNet's mean and deviation, L2 of 1e-4, batch 128. The rule sees
the weights alone: batch-norm statistics are no parameters.

    python -m experiments.hypergradient_cifar                      1 minute on 2 cores
    python -m experiments.hypergradient_cifar --preset paper       made for a GPU
    python -m experiments.hypergradient_cifar --preset paper --method adam

Expect after epoch 1 of the paper preset (authors' runs), training / validation loss:
sgd 2.306 / 2.295, sgd_hd 2.228 / 1.892, sgdn 2.201 / 1.895, sgdn_hd 1.789 / 1.462,
adam 1.848 / 1.610, adam_hd 1.736 / 1.418; after epoch 100 adam_hd .0246 / .458 and adam
.137 / .390: the learned rate trains lower and does not validate better.
"""

import dataclasses
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metax import Loop, inner_loop
from metax.harness import (
    create_run,
    parse,
    plot_panels,
    read_metrics,
    record_run,
    write_summary,
)
from metax.hypergradient import adam_hd, sgd_hd
from metax.tasks import (
    VGG16,
    crop_and_flip,
    epochs,
    image_classification,
    load,
    normalization,
)


@dataclasses.dataclass(frozen=True)
class Config:
    method: Literal["sgd", "sgd_hd", "sgdn", "sgdn_hd", "adam", "adam_hd"] = "adam_hd"
    epochs: int = 2
    num_images: int = 512  # of the training set; 50000 are all
    width: float = 0.125  # of VGG-16's channels
    batch_size: int = 128
    l2: float = 1e-4
    learning_rate: float = 1e-3
    hyper_learning_rate: float = 1e-3
    adam_hyper_learning_rate: float = 1e-8
    momentum: float = 0.9
    seed: int = 0
    data_dir: str | None = None


PRESETS = {"paper": Config(epochs=100, num_images=50_000, width=1.0)}


def rule(config: Config) -> optax.GradientTransformation:
    alpha, beta, mu = config.learning_rate, config.hyper_learning_rate, config.momentum
    rules = {
        "sgd": lambda: optax.sgd(alpha),
        "sgd_hd": lambda: sgd_hd(alpha, beta),
        "sgdn": lambda: optax.sgd(alpha, mu, nesterov=True),
        "sgdn_hd": lambda: sgd_hd(alpha, beta, mu, nesterov=True),
        "adam": lambda: optax.adam(alpha),
        "adam_hd": lambda: adam_hd(alpha, config.adam_hyper_learning_rate),
    }
    decayed = optax.chain(optax.add_decayed_weights(config.l2), rules[config.method]())
    return optax.masked(decayed, {"params": True, "batch_stats": False})


def build(config: Config, image: np.ndarray) -> Loop:
    """A loop of epochs on augmented images, whose infos hold the learning rates."""
    mean, std = normalization("imagenet")
    model = VGG16(10, scale=config.width)
    task = image_classification(
        model, image, mean=mean, std=std, augment=crop_and_flip()
    )
    rate = lambda state: optax.tree.get(state, "learning_rate", jnp.nan)
    loop = inner_loop(task, rule(config), observe=rate)
    test = lambda state, split: task.evaluate(state.params, split)
    return epochs(loop, config.batch_size, evaluate=test)


def rows(step: int, state: Any, infos: Any) -> list[dict[str, Any]]:
    rate = infos.steps.observed[0]
    row = {
        "step": step,
        "train_loss": infos.steps.loss[0].mean(),
        "valid_loss": infos.metrics["loss"][0],
        "valid_accuracy": infos.metrics["accuracy"][0],
        "learning_rate": rate[-1],
        "max_learning_rate": rate.max(),
        "min_learning_rate": rate.min(),
    }
    print("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
    return [row]


def main(argv: list[str] | None = None) -> None:
    config, options = parse(Config, presets=PRESETS, argv=argv, description=__doc__)
    run = create_run(options.out, config)
    begin, data = time.perf_counter(), load("cifar10", data_dir=config.data_dir)
    train = jax.tree.map(lambda leaf: leaf[: config.num_images], data.train)
    test = jax.tree.map(lambda leaf: leaf[: max(config.num_images // 5, 1)], data.test)
    record_run(
        run,
        build(config, train.image[0]),
        data._replace(train=train, test=test),
        jax.random.key(config.seed),
        config.epochs,
        chunk=1,
        rows=rows,
        resume=options.resume,
        progress=config.method,
    )
    table = read_metrics(run)
    summary = {"config": config, "rows": table}
    write_summary(run, summary, wall_time=time.perf_counter() - begin)
    columns = ("train_loss", "valid_loss", "learning_rate")
    panels = {c: {config.method: np.array([row[c] for row in table])} for c in columns}
    plot_panels(run / "figure.png", panels, xlabel="epoch", ylabel="")


if __name__ == "__main__":
    main()
