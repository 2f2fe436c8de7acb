"""How far a wrong learning rate is mended: α_0 from 1e-6 to 1e-1, softmax regression.

Every rule starts from each α_0; plain SGD and Adam on the same grid, refined, are the
tuned baselines; optimizers of optax.contrib that need no learning rate run once, with
their defaults, on the same data in the same order. "Recovered" means a final training
loss within 5 % of the best plain one, which is chosen by training loss. The settings
are those of `hypergradient_mnist`.

    python -m experiments.hypergradient_recovery                   1 minute on 2 cores
    python -m experiments.hypergradient_recovery --preset paper    3 minutes

Expect adam_hd multiplicative to recover from every start, additive from 1e-6 to 1e-3,
the SGD rules to end near .29 from every start, which is not recovered, and
schedule_free_adamw to end lower than any of them.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
import optax
from optax import contrib

from metax import Loop, inner_loop
from metax.harness import (
    append_metrics,
    create_run,
    evaluate,
    grid,
    long_rows,
    parse,
    plot_curves,
    read_metrics,
    write_summary,
)
from metax.hypergradient import adam_hd, sgd_hd
from metax.tasks import Linear, epochs, image_classification, load, normalization


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: Literal["mnist", "fashion_mnist", "digits"] = "mnist"
    epochs: int = 2
    num_seeds: int = 1
    batch_size: int = 128
    l2: float = 1e-4
    seed: int = 0
    data_dir: str | None = None


PRESETS = {"paper": Config(epochs=10, num_seeds=3)}
RATES = np.logspace(-6, -1, 6)
FINE_RATES = np.logspace(-6, 0, 19)  # three a decade: the tuned baselines
ONCE = np.zeros(1)
MULTIPLICATIVE: dict[str, Any] = {"rule": "multiplicative", "bounds": (0, None)}

RULES: dict[str, tuple[Callable, np.ndarray]] = {
    "sgd": (optax.sgd, FINE_RATES),
    "adam": (optax.adam, FINE_RATES),
    "sgd_hd additive 1e-3": (lambda a: sgd_hd(a, 1e-3), RATES),
    "sgd_hd multiplicative .05": (
        lambda a: sgd_hd(a, 0.05, **MULTIPLICATIVE),
        RATES,
    ),
    "adam_hd additive 1e-7": (lambda a: adam_hd(a, 1e-7), RATES),
    "adam_hd multiplicative .02": (
        lambda a: adam_hd(a, 0.02, **MULTIPLICATIVE),
        RATES,
    ),
    "adam_hd multiplicative .05": (
        lambda a: adam_hd(a, 0.05, **MULTIPLICATIVE),
        RATES,
    ),
    "schedule_free_adamw": (lambda _: contrib.schedule_free_adamw(2.5e-3), ONCE),
    "schedule_free_sgd": (lambda _: contrib.schedule_free_sgd(1.0), ONCE),
    "mechanize adam": (lambda _: contrib.mechanize(optax.adam(1.0)), ONCE),
    "mechanize sgd": (lambda _: contrib.mechanize(optax.sgd(1.0)), ONCE),
    "prodigy": (lambda _: contrib.prodigy(), ONCE),
    "dadapt_adamw": (lambda _: contrib.dadapt_adamw(), ONCE),
    "dog": (lambda _: contrib.dog(1.0, init_step=("distance", 1e-4)), ONCE),
    "cocob": (lambda _: contrib.cocob(), ONCE),
}


def build(
    config: Config, image: np.ndarray, rule: optax.GradientTransformation
) -> Loop:
    """A loop of epochs with one rule."""
    mean, std = normalization(config.dataset)
    task = image_classification(Linear(10), image, mean=mean, std=std)
    loop = inner_loop(task, optax.chain(optax.add_decayed_weights(config.l2), rule))
    test = lambda state, split: task.evaluate(state.params, split)
    return epochs(loop, config.batch_size, evaluate=test)


def main(argv: list[str] | None = None) -> None:
    config, options = parse(
        Config, presets=PRESETS, argv=argv, description=__doc__, several_devices=True
    )
    run = create_run(options.out, config)
    begin, data = time.perf_counter(), load(config.dataset, data_dir=config.data_dir)
    key, image = jax.random.key(config.seed), data.train.image[0]
    finished = {row["method"] for row in read_metrics(run)}
    for name in [name for name in RULES if name not in finished]:
        rule, rates = RULES[name]
        loop = grid(
            lambda a, rule=rule: build(config, image, rule(a)), np.float32(rates)
        )
        how = {"num_seeds": config.num_seeds, "chunk": 1, "progress": name}
        _, infos = evaluate(loop, data, key, config.epochs, mesh=options.mesh, **how)
        measured = {
            "train_loss": infos.steps.loss[:, -1].mean(-1),
            "valid_loss": infos.metrics["loss"][:, -1],
            "valid_accuracy": infos.metrics["accuracy"][:, -1],
        }
        axes = {"seed": range(config.num_seeds), "learning_rate": rates}
        append_metrics(run, long_rows(measured, axes, method=name))
    report(run, config, time.perf_counter() - begin)


def report(run: Any, config: Config, seconds: float) -> None:
    """Prints what each rule reaches from each rate; writes summary and figure."""
    rows = read_metrics(run)
    reached: dict[str, np.ndarray] = {}
    for name, (_, rates) in RULES.items():
        losses = [row["train_loss"] for row in rows if row["method"] == name]
        reached[name] = np.reshape(losses, (config.num_seeds, len(rates)))
    best = min(np.nanmin(reached[name].mean(0)) for name in ("sgd", "adam"))
    print(f"best tuned plain training loss: {best:.4f}")
    for name, (_, rates) in RULES.items():
        means = reached[name].mean(0)
        cells = [f"{a:.0e}: {m:.3f}{'*' if m <= 1.05 * best else ' '}" for a, m in
                 zip(rates, means, strict=True)]  # fmt: skip
        print(f"{name:27} {'  '.join(cells)}")
    write_summary(run, {"config": config, "rows": rows}, wall_time=seconds)
    curves = {
        name: (rates, np.clip(np.nan_to_num(reached[name], nan=9), 0, 9))
        for name, (_, rates) in RULES.items()
        if len(rates) > 1
    }
    labels: dict[str, Any] = {
        "xlabel": "first learning rate",
        "ylabel": "final training loss",
    }
    plot_curves(run / "figure.png", curves, logx=True, logy=True, **labels)


if __name__ == "__main__":
    main()
