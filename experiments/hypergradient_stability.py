"""When Adam-HD diverges, and what keeps it from it.

Two tables. "failure": Adam-HD on MNIST's MLP with β from 1e-4 to 1e-7, unguarded and
behind each guard: the learning rate after the first steps, the first step whose loss is
not finite, and the mean training loss. "law": the largest stable β of the additive rule
around Adam on noisy quadratics of n parameters, times n, and whether the two normalised
rules are stable at fixed β. As a function of α the loss has curvature dᵀHd, and around
Adam ‖d‖² ≈ n, so the additive rule needs β ≲ 10/(L·n); the normalised ones lose the n.

    python -m experiments.hypergradient_stability                   1 minute on 2 cores
    python -m experiments.hypergradient_stability --preset paper    4 minutes

Expect β = 1e-4 to diverge within ten steps unguarded, 1e-5 to diverge in some seeds and
to spoil the loss in the others, every guard to stay finite, and the largest stable β·n
between 10 and 15 at each n.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metax import Loop, Task, inner_loop
from metax.harness import (
    create_run,
    evaluate,
    grid,
    parse,
    plot_curves,
    write_summary,
)
from metax.hypergradient import adam_hd
from metax.tasks import MLP, image_classification, load, normalization


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: Literal["mnist", "fashion_mnist", "digits"] = "mnist"
    steps: int = 40
    num_seeds: int = 2
    sizes: tuple[int, ...] = (100, 1000)
    learning_rate: float = 1e-3
    batch_size: int = 128
    l2: float = 1e-4
    seed: int = 0
    data_dir: str | None = None


PRESETS = {"paper": Config(steps=469, num_seeds=3, sizes=(100, 1000, 10_000, 100_000))}
GUARDS: dict[str, tuple[float, dict[str, Any]]] = {
    "additive 1e-4": (1e-4, {}),
    "additive 1e-5": (1e-5, {}),
    "additive 1e-7": (1e-7, {}),
    "additive 1e-4, bounds (0, 1e-2)": (1e-4, {"bounds": (0, 1e-2)}),
    "additive 1e-4, max_relative_change .1": (1e-4, {"max_relative_change": 0.1}),
    "multiplicative .02": (0.02, {"rule": "multiplicative"}),
}
LAW_BETAS = np.logspace(-1, 3, 25)  # of β·n
QUADRATIC_STEPS = 300


def failure(config: Config, data: Any, mesh: Any) -> dict[str, dict[str, Any]]:
    """Runs the MLP with each guard; a diverging run freezes and is reported."""
    mean, std = normalization(config.dataset)
    how = {"batch_size": config.batch_size, "mean": mean, "std": std}
    task = image_classification(MLP(10), data.train.image[0], **how)
    table = {}
    for name, (beta, options) in GUARDS.items():
        rule = adam_hd(config.learning_rate, beta, **options)
        loop = inner_loop(
            task,
            optax.chain(optax.add_decayed_weights(config.l2), rule),
            observe=lambda state: optax.tree.get(state, "learning_rate"),
        )
        key, seeds = jax.random.key(config.seed), config.num_seeds
        how = {"num_seeds": seeds, "progress": name, "mesh": mesh}
        _, infos = evaluate(loop, data.train, key, config.steps, **how)
        bad = ~np.isfinite(infos.loss)
        table[name] = {
            "learning_rate": infos.observed[:, :12],
            "diverged_at_step": [int(b.argmax()) + 1 if b.any() else None for b in bad],
            "largest_learning_rate": np.abs(infos.observed).max(-1),
            "mean_train_loss": infos.loss.mean(-1),
        }
    return table


def quadratic(n: int) -> Task:
    """½ Σ λ_i x_i², λ = 10^U(−2, 0), with gradient noise of .05; data are the λ."""

    def loss(x: jax.Array, batch: Any, key: jax.Array) -> jax.Array:
        eigenvalues, noise = batch
        return 0.5 * jnp.sum(eigenvalues * x**2) + jnp.vdot(noise, x)

    def sample(eigenvalues: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return eigenvalues, 0.05 * jax.random.normal(key, (n,))

    return Task(
        init=lambda key: jax.random.normal(key, (n,)),
        loss=loss,
        sample=sample,
        evaluate=lambda x, eigenvalues: {"loss": 0.5 * jnp.sum(eigenvalues * x**2)},
    )


def law(config: Config, mesh: Any) -> dict[str, dict[int, Any]]:
    """Largest stable β·n of the additive rule; whether the normalised are stable."""
    table: dict[str, dict[int, Any]] = {"additive, β·n": {}}
    for n in config.sizes:
        eigenvalues = 10 ** np.random.default_rng(config.seed).uniform(-2, 0, n)
        build = lambda beta, rule="additive", n=n: inner_loop(
            quadratic(n), adam_hd(config.learning_rate, beta, rule=rule)
        )
        stable = is_stable(config, build, eigenvalues, LAW_BETAS / n, mesh)
        first_bad = stable.shape[1] if stable.all() else int(stable.all(0).argmin())
        table["additive, β·n"][n] = LAW_BETAS[max(first_bad - 1, 0)]
        for rule, betas in {
            "multiplicative": [0.02, 0.2],
            "normalized": [0.01, 1.0],
        }.items():
            build_rule = lambda beta, rule=rule, build=build: build(beta, rule)
            held = is_stable(
                config, build_rule, eigenvalues, np.array(betas), mesh
            ).all(0)
            table.setdefault(f"{rule} {betas}", {})[n] = held
    return table


def is_stable(
    config: Config, build: Callable[[Any], Loop], eigenvalues: np.ndarray, betas: Any,
    mesh: Any,
) -> np.ndarray:  # fmt: skip
    """[seeds, settings]: never above 10 times the first loss, and at the end below."""
    loop, key = grid(build, np.float32(betas)), jax.random.key(config.seed)
    seeds, data = config.num_seeds, np.float32(eigenvalues)
    _, infos = evaluate(loop, data, key, QUADRATIC_STEPS, num_seeds=seeds, mesh=mesh)
    loss = np.nan_to_num(infos.loss, nan=np.inf)
    first = loss[:, :1]
    return (loss <= 10 * first).all(1) & (loss[:, -1] < first[:, 0])


def main(argv: list[str] | None = None) -> None:
    config, options = parse(
        Config, presets=PRESETS, argv=argv, description=__doc__, several_devices=True
    )
    run = create_run(options.out, config)
    begin, data = time.perf_counter(), load(config.dataset, data_dir=config.data_dir)
    mesh = options.mesh
    failures, laws = failure(config, data, mesh), law(config, mesh)
    for name, row in failures.items():
        rates = " ".join(f"{rate:.2g}" for rate in row["learning_rate"][0][:8])
        print(f"{name:38} diverged at {row['diverged_at_step']}, rate {rates}")
    for name, row in laws.items():
        print(f"{name:38} {row}")
    summary = {"config": config, "failure": failures, "law": laws}
    write_summary(run, summary, wall_time=time.perf_counter() - begin)
    curves = {name: np.abs(row["learning_rate"]) for name, row in failures.items()}
    labels: dict[str, Any] = {"xlabel": "step", "ylabel": "|learning rate|"}
    plot_curves(run / "figure.png", curves, logy=True, **labels)


if __name__ == "__main__":
    main()
