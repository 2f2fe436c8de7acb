"""The learning rate learned on MNIST, as in Baydin et al. 2018, Figures 2 to 4.

Six optimizers from one learning rate ("tuning", Figure 3), or the three learned ones
over a grid of α_0 and β beside their bases at each α_0 ("grid", Figures 2 and 4). The
authors' settings: batch 128 in a new order each epoch, L2 of 1e-4 on every parameter,
training loss without L2 before each update, the 10000 test images as validation set.

    python -m experiments.hypergradient_mnist                        1 minute, 2 cores
    python -m experiments.hypergradient_mnist --preset paper         1 minute
    python -m experiments.hypergradient_mnist --preset paper-mlp    40 minutes
    python -m experiments.hypergradient_mnist --preset paper-grid    2 minutes

Expect at epoch 10, logistic regression, training loss: sgd .396, sgd_hd .28 to .31,
sgdn .289, sgdn_hd .258 to .270, adam .2585, adam_hd .2575.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metax import Loop, inner_loop
from metax.harness import (
    append_metrics,
    create_run,
    evaluate,
    grid,
    long_rows,
    parse,
    plot_panels,
    read_metrics,
    write_summary,
)
from metax.hypergradient import adam_hd, sgd_hd
from metax.tasks import MLP, Linear, epochs, image_classification, load, normalization


@dataclasses.dataclass(frozen=True)
class Config:
    setting: Literal["tuning", "grid"] = "tuning"
    model: Literal["logistic", "mlp"] = "logistic"
    dataset: Literal["mnist", "fashion_mnist", "digits"] = "mnist"
    epochs: int = 2
    num_seeds: int = 2
    batch_size: int = 128
    l2: float = 1e-4
    learning_rate: float = 1e-3
    hyper_learning_rate: float = 1e-3
    adam_hyper_learning_rate: float = 1e-7
    momentum: float = 0.9
    seed: int = 0
    data_dir: str | None = None


PRESETS = {
    "paper": Config(epochs=10, num_seeds=3),
    "paper-mlp": Config(model="mlp", epochs=10, num_seeds=3),
    "paper-grid": Config(setting="grid", epochs=5, num_seeds=3),
}
RATES = np.logspace(-1, -6, 6)  # the paper's grid, of α_0 and of β


def rules(config: Config) -> dict[str, tuple[Callable, Any]]:
    """Name → (rule of a setting, settings), where a setting is α_0, or α_0 and β."""
    mu, beta = config.momentum, config.hyper_learning_rate
    alphas = np.array([config.learning_rate])
    pairs, adam_pairs = (
        (alphas, np.array([beta])),
        (
            alphas,
            np.array([config.adam_hyper_learning_rate]),
        ),
    )
    if config.setting == "grid":
        alphas = RATES
        pairs = tuple(x.ravel() for x in np.meshgrid(RATES, RATES, indexing="ij"))
        adam_pairs = pairs
    return {
        "sgd": (optax.sgd, alphas),
        "sgd_hd": (lambda s: sgd_hd(*s), pairs),
        "sgdn": (lambda a: optax.sgd(a, mu, nesterov=True), alphas),
        "sgdn_hd": (lambda s: sgd_hd(*s, momentum=mu, nesterov=True), pairs),
        "adam": (optax.adam, alphas),
        "adam_hd": (lambda s: adam_hd(*s), adam_pairs),
    }


def build(
    config: Config, image: np.ndarray, rule: optax.GradientTransformation
) -> Loop:
    """A loop of epochs with one rule, whose infos hold the learning rates."""
    model = Linear(10) if config.model == "logistic" else MLP(10)
    mean, std = normalization(config.dataset)
    task = image_classification(model, image, mean=mean, std=std)
    rule = optax.chain(optax.add_decayed_weights(config.l2), rule)
    rate = lambda state: optax.tree.get(state, "learning_rate", jnp.nan)
    loop = inner_loop(task, rule, observe=rate)
    test = lambda state, split: task.evaluate(state.params, split)
    return epochs(loop, config.batch_size, evaluate=test)


def measure(infos: Any) -> dict[str, np.ndarray]:
    """What is reported, each [seeds, epochs, settings]; steps count from 1."""
    loss, rate = infos.steps.loss, infos.steps.observed
    before = np.arange(loss.shape[1])[:, None] * loss.shape[-1]
    return {
        "train_loss": loss.mean(-1),
        "valid_loss": infos.metrics["loss"],
        "valid_accuracy": infos.metrics["accuracy"],
        "learning_rate": rate[..., -1],
        "max_learning_rate": rate.max(-1),
        "max_at_step": before + rate.argmax(-1) + 1,
        "min_learning_rate": rate.min(-1),
    }


def main(argv: list[str] | None = None) -> None:
    config, options = parse(
        Config, presets=PRESETS, argv=argv, description=__doc__, several_devices=True
    )
    run = create_run(options.out, config)
    begin, data = time.perf_counter(), load(config.dataset, data_dir=config.data_dir)
    key, image, cells = jax.random.key(config.seed), data.train.image[0], rules(config)
    finished = {row["method"] for row in read_metrics(run)}
    for name in [name for name in cells if name not in finished]:
        rule, settings = cells[name][0], jax.tree.map(np.float32, cells[name][1])
        loop = grid(lambda s, rule=rule: build(config, image, rule(s)), settings)
        how = {"num_seeds": config.num_seeds, "chunk": 1, "progress": name}
        _, infos = evaluate(loop, data, key, config.epochs, mesh=options.mesh, **how)
        measured = measure(infos)
        seeds, times, choices = map(range, measured["train_loss"].shape)
        axes = {"seed": seeds, "epoch": [t + 1 for t in times], "setting": choices}
        append_metrics(run, long_rows(measured, axes, method=name))
    report(run, config, cells, time.perf_counter() - begin)


def report(run: Any, config: Config, cells: dict, seconds: float) -> None:
    """Prints the means after the last epoch; writes summary and figure."""
    rows = read_metrics(run)
    curves: dict[str, dict[str, np.ndarray]] = {"train_loss": {}, "valid_loss": {}}
    for name in cells:
        of_name = [row for row in rows if row["method"] == name]
        shape = (config.num_seeds, config.epochs, -1)
        for quantity, panel in curves.items():
            values = np.reshape([row[quantity] for row in of_name], shape)
            final = np.nan_to_num(values[:, -1].mean(0), nan=np.inf)
            best = int(final.argmin())
            panel[name] = values[:, :, best]
            print(f"{quantity:11} {name:8} best of {final.size:2}: {final[best]:.4f}")
    settings = {name: np.asarray(cell[1]).T for name, cell in cells.items()}
    summary = {"config": config, "settings": settings, "rows": rows}
    write_summary(run, summary, wall_time=seconds)
    plot_panels(run / "figure.png", curves, xlabel="epoch", ylabel="cross-entropy")


if __name__ == "__main__":
    main()
