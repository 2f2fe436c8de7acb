"""Gradients to solve a badly conditioned SVM: HDM-HB against gradient descent at 1/L.

The smoothed SVM of `metax.tasks` stands in for a1a, on which Chu et al. 2025 report 276
gradients for their best setting where gradient descent needs more than 1000. A run is
solved when ‖∇f‖₂ < 1e-4, in float64. Counts of one run are chaotic (a step is taken or
not on the last bit of a comparison), so distributions over random starts are given.

    python -m experiments.hypergradient_hdm                   half a minute on 2 cores
    python -m experiments.hypergradient_hdm --preset paper    1 minute

Expect HDM-HB with η_P = 10/L to solve every start, with a median near 500, and no rule
of a single learning rate to solve any.
"""

import dataclasses
import time
from typing import Any

import jax
import numpy as np
import optax

from metax import inner_loop
from metax.harness import create_run, evaluate, parse, plot_curves, write_summary
from metax.hypergradient import hdm_hb, sgd_hd
from metax.tasks import census_like, smoothed_svm


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 1000
    num_seeds: int = 5
    tolerance: float = 1e-4
    seed: int = 0


PRESETS = {"paper": Config(num_seeds=20)}


def rules(smoothness: float) -> dict[str, optax.GradientTransformation]:
    rate = 1 / smoothness
    published = [(10, 1), (10, 3), (10, 5), (10, 10), (1, 3)]
    return {
        "gd 1/L": optax.sgd(rate),
        "sgd_hd additive": sgd_hd(rate, 1e-3 * rate),
        "sgd_hd multiplicative": sgd_hd(rate, 0.05, rule="multiplicative"),
        "sgd_hd normalized": sgd_hd(rate, 0.05 * rate, rule="normalized"),
        **{
            f"hdm_hb {p}/L, {b}": hdm_hb(smoothness, p * rate, float(b))
            for p, b in published
        },
        "hdm_hb scalar 10/L, 5": hdm_hb(smoothness, 10 * rate, 5.0, scaling="scalar"),
    }


def main(argv: list[str] | None = None) -> None:
    config, options = parse(
        Config, presets=PRESETS, argv=argv, description=__doc__, several_devices=True
    )
    jax.config.update("jax_enable_x64", True)
    run, begin = create_run(options.out, config), time.perf_counter()
    rows = census_like()
    task, table, curves = smoothed_svm(rows.shape[1]), {}, {}
    for name, rule in rules(float(np.linalg.norm(rows, 2) ** 2)).items():
        how = {"num_seeds": config.num_seeds, "chunk": config.steps, "progress": name}
        key = jax.random.key(config.seed)
        _, infos = evaluate(
            inner_loop(task, rule), rows, key, config.steps, mesh=options.mesh, **how
        )
        solved = infos.grad_norm < config.tolerance
        counts = np.where(solved.any(1), 1.0 + solved.argmax(1), np.inf)
        quartiles = np.percentile(counts, [0, 25, 50, 75, 100], method="nearest")
        table[name] = {"counts": counts, "solved": int(solved.any(1).sum())}
        curves[name] = infos.grad_norm
        print(f"{name:24} solved {table[name]['solved']:2}, quartiles {quartiles}")
    summary: dict[str, Any] = {"config": config, "table": table}
    write_summary(run, summary, wall_time=time.perf_counter() - begin)
    labels: dict[str, Any] = {"xlabel": "gradients", "ylabel": "‖∇f‖"}
    plot_curves(run / "figure.png", curves, logy=True, **labels)


if __name__ == "__main__":
    main()
