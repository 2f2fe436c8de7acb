"""Regularisation of image classifiers tuned on CIFAR-10, as in Bae & Grosse 2020.

Delta-STN, centred STN, STN and fixed hyperparameters on AlexNet (18 of them), VGG-16
(26) or ResNet-18 (17 to 24: weight decay, global or a stage, and label smoothing; with
batch norm, through whose statistics tangents pass, its epsilon and decay as well). The
last fifth of the training images validates, batches are drawn with replacement, the
test images choose nothing.

    python -m experiments.stn_cifar                     smoke run, 3 minutes on 2 cores
    python -m experiments.stn_cifar --preset paper      made for a GPU
    python -m experiments.stn_cifar --preset paper --model vgg16

A learning rate cannot be tuned so: the best weights do not depend on it. `--inner-rule
sgd_hd` learns that of the weights by hypergradient descent; that of the response keeps
its schedule. Smoke runs show that all works, and compare nothing.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from experiments.tuning_runs import fixed, report, run_missing
from metax import Hyperparameter, Loop, unroll
from metax.harness import create_run, parse
from metax.hypergradient import sgd_hd
from metax.stn import DeltaSTN, centered_stn, delta_stn, natural_hparams, stn
from metax.tasks import (
    AlexNet,
    EpochInfo,
    ResNet18,
    TunableVGG16,
    TuningData,
    hold_out,
    image_tuning,
    load,
    normalization,
    stock_hparams,
)

Method = Literal["delta_stn", "centered_stn", "stn", "fixed"]


@dataclasses.dataclass(frozen=True)
class Config:
    model: Literal["alexnet", "vgg16", "resnet18"] = "resnet18"
    norm: Literal["group", "batch"] = "group"  # of ResNet-18
    decay: Literal["global", "stage"] = "global"  # of ResNet-18
    methods: tuple[Method, ...] = ("delta_stn", "fixed")
    inner_rule: Literal["sgd", "sgd_hd"] = "sgd"
    scale: float = 0.0625  # of the widths of the model
    num_images: int = 600  # of the training set, validation included; 50000 are all
    epochs: int = 6
    warmup_epochs: int = 1
    num_seeds: int = 1
    batch_size: int = 16
    learning_rate: float = 0.03  # of the weights and of the response
    drops: tuple[int, ...] = (60, 120, 180)  # epochs after which it is divided by 5
    momentum: float = 0.9
    hyper_learning_rate: float = 0.02  # of sgd_hd, multiplicative
    outer_learning_rate: float = 0.01  # of the hyperparameters and their noise
    entropy_weight: float = 1e-3
    train_steps: int = 5  # for each validation step
    seed: int = 0
    data_dir: str | None = None


PRESETS = {
    "paper": Config(
        methods=("delta_stn", "centered_stn", "stn", "fixed"),
        scale=1.0,
        num_images=50_000,
        epochs=200,
        warmup_epochs=5,
        num_seeds=5,
        batch_size=128,
    )
}
AUGMENTATIONS = (
    *("rotation", "shear", "translate", "zoom", "cutout_length", "cutout_holes"),
    *("brightness", "contrast", "saturation", "hue"),
)
STAGES = ("stem", "stage_1", "stage_2", "stage_3", "stage_4", "output")
LOSSES = ("valid_loss", "valid_accuracy", "test_loss", "test_accuracy")


METHODS: dict[str, Callable[..., DeltaSTN]] = {
    "delta_stn": delta_stn,
    "centered_stn": centered_stn,
    "stn": stn,
    "fixed": fixed,
}


def tuned(config: Config, model: Any) -> dict[str, Hyperparameter]:
    """What is tuned of a model."""
    names = [name for name in model.rate_names if "dropout" in name]
    names += AUGMENTATIONS
    if config.model == "resnet18":
        layers = [""] if config.decay == "global" else [f"_{s}" for s in STAGES]
        names += ["label_smoothing", *(f"weight_decay{layer}" for layer in layers)]
        names += ["norm_epsilon", "norm_decay"] if config.norm == "batch" else []
    return stock_hparams(names)


def rules(config: Config, steps: int) -> dict[str, optax.GradientTransformation]:
    """The four optimizers, for an epoch of `steps` training steps."""
    rate, momentum = config.learning_rate, config.momentum
    drops = {epoch * steps: 0.2 for epoch in config.drops}
    plain = optax.sgd(optax.piecewise_constant_schedule(rate, drops), momentum)
    beta: dict[str, Any] = {"rule": "multiplicative", "bounds": (0, None)}
    learned = sgd_hd(rate, config.hyper_learning_rate, momentum, **beta)
    # corrected at its start: without that the first steps are ten times too long
    outer = optax.rmsprop(config.outer_learning_rate, decay=0.99, bias_correction=True)
    return {
        "inner_optimizer": plain if config.inner_rule == "sgd" else learned,
        "response_optimizer": plain,
        "outer_optimizer": outer,
        "scale_optimizer": outer,
    }


def build(config: Config, method: str, data: TuningData) -> Loop:
    """A loop of epochs that measures losses, accuracies and hyperparameters."""
    models = {
        "alexnet": lambda: AlexNet(10, config.scale),
        "vgg16": lambda: TunableVGG16(10, config.scale),
        "resnet18": lambda: ResNet18(10, config.norm, config.scale),
    }
    model, (mean, std) = models[config.model](), normalization("cifar10")
    problem, evaluate = image_tuning(
        model,
        data.train.image,
        tuned(config, model),
        batch_size=config.batch_size,
        mean=mean,
        std=std,
        flip=True,
    )
    length = config.batch_size * config.train_steps
    cycles = max(len(data.train.label) // length, 1)
    steps = cycles * config.train_steps
    loop = METHODS[method](
        problem,
        **rules(config, steps),
        entropy_weight=config.entropy_weight,
        train_steps=config.train_steps,
        warmup_steps=config.warmup_epochs * steps,
    )

    def epoch(state: Any, key: jax.Array, data: TuningData) -> tuple[Any, EpochInfo]:
        keys = jax.random.split(key, cycles)
        state, infos = unroll(Loop(loop.init, loop.step), state, keys, data)
        hparams = natural_hparams(state)
        rate = optax.tree.get(state.inner_state, "learning_rate", jnp.nan)
        metrics = {"train_loss": infos.train_loss.mean(), "learning_rate": rate}
        for part in ("valid", "test"):
            judged = evaluate(loop.params(state), getattr(data, part), hparams)
            metrics |= {f"{part}_{name}": value for name, value in judged.items()}
        return state, EpochInfo(infos, metrics, jnp.all(infos.is_finite))

    return Loop(loop.init, epoch)


def main(argv: list[str] | None = None) -> None:
    config, options = parse(Config, presets=PRESETS, argv=argv, description=__doc__)
    run = create_run(options.out, config)
    begin, full = time.perf_counter(), load("cifar10", data_dir=config.data_dir)
    first = lambda split, num: jax.tree.map(lambda leaf: leaf[:num], split)
    images = full._replace(
        train=first(full.train, config.num_images),
        test=first(full.test, max(config.num_images // 5, 1)),
    )
    run_missing(run, config, build, hold_out(images, 0.2))
    report(run, config, LOSSES, time.perf_counter() - begin)


if __name__ == "__main__":
    main()
