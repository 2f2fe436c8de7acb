"""How far replicates of one learned optimizer lie apart, by what perturbs training.

For each perturbation the replicates are trained side by side as one `vmap`, through the
stages of the curriculum but without its periods, repeats and gate, so that nothing is
selected; then each is run several times. Best ln test loss and last ln training loss
are split into meta-stability (between replicates) and evaluation stability (between
runs of one), Eq. 9 of the paper, the former with an interval; optimization stability
is Eq. 10, over epochs. All rows begin with the same weights and train on the same
optimizees.

    python -m experiments.amalgamation_stability                    2 minutes on 2 cores
    python -m experiments.amalgamation_stability --preset small     15 minutes
    python -m experiments.amalgamation_stability --preset digits    an hour
    python -m experiments.amalgamation_stability --preset paper     a GPU

Expect large meta-stabilities on the digits: without the selection of
`experiments.amalgamate` some replicates diverge. The paper finds σ = 5e-4 to 1e-3 best.
"""

import dataclasses
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.amalgamation_problems import problem
from experiments.amalgamation_tables import meta_interval
from experiments.meta_training import Training, build, stages, student_of, warmup
from experiments.optimizer_runs import learned, race
from metax.amalgamation import pool
from metax.harness import (
    append_metrics,
    create_run,
    host_unroll,
    long_rows,
    mixed_effects,
    optimization_stability,
    parse,
    plot_panels,
    put_everywhere,
    read_metrics,
    replicate,
    write_summary,
)
from metax.harness.processes import all_on_host


@dataclasses.dataclass(frozen=True)
class Config:
    optimizee: str = "Digits"
    reduce: Literal["none", "mean", "minmax", "softmax"] = "minmax"
    gaussian: tuple[float, ...] = (0.0, 5e-4)
    adversarial: tuple[float, ...] = ()
    input_noise: tuple[float, ...] = ()
    num_tasks: int = 1
    truncation_length: int = 100
    warmup_steps: int = 100
    remat: Literal["none", "step", "block"] = "step"
    depths: tuple[int, ...] = (1, 2)
    weights: tuple[float, ...] = (0.2, 0.1)
    trajectories: tuple[int, ...] = (20, 5)  # of each stage in all
    num_replicates: int = 2
    num_steps: int = 374  # a warm-up, and 25 epochs of the digits
    judge_every: int = 11
    num_evaluations: int = 5
    seed: int = 0
    data_dir: str | None = None


DIGITS = Config(
    gaussian=(0.0, 5e-4, 2e-3, 1e-2),
    adversarial=(1e-4, 1e-3),
    input_noise=(1e-2, 1e-1),
    depths=(1, 2, 5),
    weights=(0.2, 0.1, 0.05),
    trajectories=(40, 15, 4),
    num_replicates=4,
)
PRESETS = {
    "small": dataclasses.replace(
        DIGITS, gaussian=(0.0, 5e-4, 5e-3), adversarial=(1e-3,), input_noise=(1e-1,),
        depths=(1, 2), weights=(0.2, 0.1), trajectories=(20, 10), num_replicates=3,
    ),
    "digits": DIGITS,
    "paper": dataclasses.replace(
        DIGITS, optimizee="Train", gaussian=(0.0, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2),
        num_tasks=4, remat="block", depths=(1, 2, 5, 10),
        weights=(0.2, 0.1, 0.05, 0.02), trajectories=(60, 60, 60, 60),
        num_replicates=8, num_steps=11_700, judge_every=468, num_evaluations=10,
    ),
}  # fmt: skip


QUANTITIES = ("best_valid", "train", "optimization_stability")


def cells(config: Config) -> dict[str, dict[str, Any]]:
    """The rows of the table: what each changes of the training."""
    gaussian = {
        f"gaussian {s:g}": {"perturbation": "gaussian", "perturbation_size": s}
        for s in config.gaussian
    }
    adversarial = {
        f"adversarial {s:g}": {"perturbation": "adversarial", "perturbation_size": s}
        for s in config.adversarial
    }
    noise = {f"input noise {s:g}": {"input_noise": s} for s in config.input_noise}
    return {**gaussian, **adversarial, **noise}


def training(config: Config, changes: dict[str, Any]) -> Training:
    """What the shared functions read."""
    shared = {field.name for field in dataclasses.fields(Training)}
    asked = {k: v for k, v in dataclasses.asdict(config).items() if k in shared}
    plain = {"perturbation": "none", "input_noise": 0.0}
    rest = {"validation_depths": config.depths, "periods": (1,) * len(config.depths)}
    return Training(**{**asked, **rest, **plain, **changes})


def train(
    config: Config, changes: dict[str, Any], optimizee: Any, data: Any, mesh: Any
) -> Any:
    """The weights of all replicates after the last stage, leaves [R, ...]."""
    own = training(config, changes)
    teachers = {} if config.reduce == "none" else dict(pool("small"))
    one = build(own, optimizee, student_of(own), teachers)
    loop = replicate(one, config.num_replicates, mesh=mesh)
    data = put_everywhere(data, mesh)
    key_init, key = jax.random.split(jax.random.key(config.seed))
    state, run = loop.init(key_init), host_unroll(loop)
    for i, stage in enumerate(stages(own)):
        weight = jnp.full_like(state.imitation_weight, stage.imitation_weight)
        length = jnp.full_like(state.unroll_length, stage.unroll_length)
        state = state._replace(
            imitation_weight=weight,
            unroll_length=length,
            inner_step=length,  # due for new optimizees
        )
        num = config.trajectories[i] * config.depths[i]
        keys = jax.random.split(jax.random.fold_in(key, i), num)
        state, _ = run(loop, state, keys, data)
    return all_on_host(state.theta)


def rows_of(
    config: Config, name: str, changes: dict[str, Any], optimizee: Any, sets: tuple,
    mesh: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """Trains the replicates of one cell and runs each; one row a run."""
    own = training(config, changes)
    theta = train(config, changes, optimizee, sets[0], mesh)
    outcome = race(
        optimizee, learned(student_of(own), **warmup(own)), theta, sets,
        jax.random.key(config.seed + 1), num_steps=config.num_steps,
        judge_every=config.judge_every, num_seeds=config.num_evaluations,
        last=config.judge_every,
    )  # fmt: skip
    epochs = np.exp(outcome.curves)
    sound = outcome.is_finite & (epochs > 0).all(-1)
    wobble = np.full(sound.shape, np.nan)
    if sound.any():
        wobble[sound] = optimization_stability(epochs[sound])
    measured = {
        "finite": outcome.is_finite,
        "best_valid": outcome.best_valid,
        "train": outcome.train,
        "optimization_stability": wobble,
    }
    axes = {
        "evaluation": range(config.num_evaluations),
        "replicate": range(config.num_replicates),
    }
    return long_rows(measured, axes, cell=name)


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One cell; replicates with a run that diverged are counted, not averaged."""
    members = sorted({row["replicate"] for row in rows})
    runs = {i: [row for row in rows if row["replicate"] == i] for i in members}
    sound = [i for i in members if all(_is_sound(row) for row in runs[i])]
    found: dict[str, Any] = {
        "replicates": len(members),
        "finite": len(sound),
        **{q: [[row[q] for row in runs[i]] for i in members] for q in QUANTITIES[:2]},
    }
    if len(sound) > 1 and len(runs[sound[0]]) > 1:
        values = {q: [[row[q] for row in runs[i]] for i in sound] for q in QUANTITIES}
        found["statistics"] = {
            q: {**mixed_effects(x)._asdict(), "meta_interval": meta_interval(x)}
            for q, x in values.items()
        }
    return found


def main(argv: list[str] | None = None) -> None:
    config, options = parse(
        Config, presets=PRESETS, argv=argv, description=__doc__, several_devices=True
    )
    run, begin = create_run(options.out, config), time.perf_counter()
    optimizee, *sets = problem(config.optimizee, config.data_dir)
    finished, found = {row["cell"] for row in read_metrics(run)}, {}
    for name, changes in cells(config).items():
        if name not in finished:
            rows = rows_of(config, name, changes, optimizee, tuple(sets), options.mesh)
            append_metrics(run, rows)
        own = [row for row in read_metrics(run) if row["cell"] == name]
        found[name] = summarise(own)
        text = [
            f"{q} {s['mean']:.2f} [{s['ci_low']:.2f}, {s['ci_high']:.2f}], meta "
            f"{s['meta_stability']:.3f} [{s['meta_interval'][0]:.3f}, "
            f"{s['meta_interval'][1]:.3f}], "
            f"evaluation {s['evaluation_stability']:.3f}"
            for q, s in found[name].get("statistics", {}).items()
        ]
        print(f"{name:20} {found[name]['finite']} finite; {'; '.join(text)}")
    summary = {"config": config, "rows": found}
    write_summary(run, summary, wall_time=time.perf_counter() - begin)
    x = np.arange(config.num_evaluations)
    panels = {
        name: {
            f"replicate {i}": (x, values)
            for i, values in enumerate(np.asarray(cell["best_valid"]))
        }
        for name, cell in found.items()
    }
    plot_panels(
        run / "figure.png", panels, xlabel="evaluation", ylabel="best ln test loss"
    )


def _is_sound(row: dict[str, Any]) -> bool:
    return bool(row["finite"]) and all(np.isfinite(row[q]) for q in QUANTITIES)


if __name__ == "__main__":
    main()
