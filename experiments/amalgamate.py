"""Trains learned optimizers: one configuration of optimizer amalgamation, by a command.

A student follows a pool of rules through a curriculum of longer and longer unrolls, in
periods that are validated and may be repeated; candidates of all stages must survive a
long horizon. Each replicate is a training of its own, one after the other with the same
compiled step. `--reduce choice` first trains a choice policy over the pool, by itself,
and then amalgamates it; `--reduce none` is plain meta-learning, which is how the
baselines (`--student l2l`, `scale`, `rnnprop_lv`) are trained; with
`--imitation-probability 0.3` some truncations only copy Adam, the stronger baselines of
Chen et al. What is chosen becomes `replicate_<i>.safetensors` and its card, and is
judged as in `amalgamation_evaluate`.

    python -m experiments.amalgamate                        1 minute on 2 cores
    python -m experiments.amalgamate --preset digits        half an hour, 3 replicates
    python -m experiments.amalgamate --preset short         4 minutes a replicate
    python -m experiments.amalgamate --preset paper         a GPU

Expect of `--preset digits` ln training losses of -4.2 to -4.8 after 375 steps, and best
ln test losses of -3.1 to -3.3. As published, `l2l` and `scale` are to be trained with
`--random-scale 0`.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.amalgamation_problems import problem
from experiments.meta_training import (
    Trained,
    Trainer,
    Training,
    choice_options,
    choice_stages,
    choice_student,
    policy_of,
    stages,
    student_of,
    train_choice,
    train_student,
    trainer,
    warmup,
)
from experiments.optimizer_runs import Race, learned, race, stacked
from experiments.training_cards import card, training_command
from metax.amalgamation import LearnedOptimizer, load_artifact, pool, save_artifact
from metax.harness import (
    append_metrics,
    create_run,
    parse,
    plot_panels,
    put_everywhere,
    read_metrics,
    write_summary,
)
from metax.harness.files import together
from metax.harness.processes import all_on_host, is_first
from metax.tasks.optimizees import Optimizee

CLIP = 1.0  # global norm of the gradients over the long horizon
# of a card: what is known when the weights are saved, and not later
MEASURED = ("trained_steps", "gate_steps", "gate_passed", "cpu_seconds", "versions")


@dataclasses.dataclass(frozen=True)
class Config(Training):
    num_replicates: int = 1
    num_steps: int = 375  # a warm-up, and 25 epochs of the digits
    judge_every: int = 1
    steps_per_epoch: int = 11
    num_evaluations: int = 5


DIGITS = Config(
    depths=(1, 2, 5, 10),
    validation_depths=(2, 5, 10, 20),
    weights=(0.2, 0.1, 0.05, 0.02),
    trajectories=(10, 10, 10, 4),
    periods=(10, 6, 4, 4),
    max_repeats=2,
    num_replicates=3,
)
SHORT = dataclasses.replace(
    DIGITS,
    depths=(1, 2, 5),
    validation_depths=(2, 5, 10),
    weights=(0.2, 0.1, 0.05),
    trajectories=(10, 10, 4),
    periods=(6, 3, 3),
    max_repeats=1,
)
PAPER = dataclasses.replace(
    DIGITS,
    optimizee="Train",
    num_tasks=4,
    remat="block",
    trajectories=(10, 10, 10, 10),
    periods=(0, 0, 0, 0),
    validation_trajectories=10,
    max_repeats=4,
    gate_steps=10_000,
    num_replicates=8,
    num_steps=11_700,
    judge_every=468,
    steps_per_epoch=468,
    num_evaluations=10,
)
PRESETS = {"digits": DIGITS, "short": SHORT, "paper": PAPER}


def replicate(
    config: Config,
    optimizee: Optimizee,
    data: Any,
    run: Path,
    number: int,
    parts: Trainer | None,
    mesh: Any = None,
) -> dict[str, Any]:
    """Trains replicate `number` and saves it; its row of metrics."""
    key = jax.random.fold_in(jax.random.key(config.seed), number)
    key_choice, key_student = jax.random.split(key)
    if parts is None:
        one = (config, optimizee, data, run, number, key_choice)
        teachers = {"choice": choice_teacher(*one, mesh)}
        parts = trainer(config, optimizee, student_of(config), teachers, mesh)
    threshold = config.repeat_threshold
    trained = train_student(
        config, parts, stages(config), data, key_student, repeat_threshold=threshold
    )
    result = trained.result
    outcome: dict[str, Any] = {
        "trained_steps": max(config.depths) * config.truncation_length,
        "gate_steps": config.gate_steps,
        "gate_passed": result.gate_passed,
    }
    save(config, run / f"replicate_{number}", trained, policy_of(config), outcome)
    return {
        "replicate": number,
        **outcome,
        "chosen_unroll": int(result.state.unroll_length),
        "candidates": len(trained.gate),
        "refused": trained.gate.count(False),
        "truncations": trained.truncations,
        "repeats": sum(record.repeat > 0 for record in result.records),
        "attempts": len(result.records),
        **{f"{name}_cpu_seconds": value for name, value in trained.spent.items()},
    }


def choice_teacher(
    config: Config, optimizee: Optimizee, data: Any, run: Path, number: int, key: Any,
    mesh: Any,
) -> Any:  # fmt: skip
    """The choice policy of a replicate as a rule, from its file if it is trained."""
    path = run / f"choice_{number}"
    if not path.with_suffix(".json").exists():
        trained = train_choice(config, optimizee, data, key, mesh)
        steps = max(stage.unroll_length for stage in choice_stages(config))
        policy = ("choice", choice_options(config))
        save(config, path, trained, policy, {"trained_steps": steps})
    return choice_student(config).rule(load_artifact(path)[1])


def save(
    config: Config,
    path: Path,
    trained: Trained,
    policy: tuple[str, dict[str, Any]],
    outcome: dict[str, Any],
) -> None:
    """The weights and their card, without the evaluation, which comes after."""
    more = {**outcome, "cpu_seconds": trained.spent}
    about = card(config, training_command(config, PRESETS), **more)
    theta, (name, options) = trained.result.theta, policy
    write(path, theta, policy=name, policy_options=options, metadata=about)


def complete(config: Config, path: Path, evaluation: list[dict[str, Any]]) -> None:
    """Writes the card anew, with the evaluation; the weights stay as they are."""
    _, theta, old = load_artifact(path)
    known = {name: old[name] for name in MEASURED if name in old}
    about = card(config, training_command(config, PRESETS), evaluation=evaluation)
    write(
        path, theta, policy=old["policy"], policy_options=old["policy_options"],
        metadata={**about, **known},
    )  # fmt: skip


def write(path: Path, theta: Any, **how: Any) -> None:
    """Saves an artefact; of several processes the first does."""
    theta = all_on_host(theta)
    with together(path):
        if is_first():
            save_artifact(path, theta, **how)


def judge(
    config: Config, optimizee: Optimizee, sets: Any, student: LearnedOptimizer,
    thetas: list,
) -> dict[str, Race]:  # fmt: skip
    """All replicates at the protocol's length, and over the gate's when clipped."""
    key, warm = jax.random.key(config.seed + 1), warmup(config)
    how: dict[str, Any] = {"num_seeds": config.num_evaluations}
    short = race(
        optimizee, learned(student, **warm), stacked(thetas), sets, key,
        num_steps=config.num_steps, judge_every=config.judge_every,
        last=config.steps_per_epoch, label="evaluation", **how,
    )  # fmt: skip
    every = min(10 * config.judge_every, config.gate_steps)
    long = race(
        optimizee, learned(student, **warm, clip=CLIP), stacked(thetas), sets, key,
        num_steps=config.gate_steps // every * every, judge_every=every,
        last=max(100 // every, 1) * every, label="long horizon", **how,
    )  # fmt: skip
    return {"short": short, "long": long}


def evaluation(
    config: Config, found: dict[str, Race], number: int
) -> list[dict[str, Any]]:
    """The table of a card: means over the runs of one replicate."""
    lengths = {"short": (config.num_steps, None), "long": (config.gate_steps, CLIP)}
    rows = []
    for name, outcome in found.items():
        steps, clip = lengths[name]
        measured = {
            "mean_ln_train": outcome.train,
            "mean_best_ln_test": outcome.best_valid,
            "mean_best_accuracy": outcome.accuracy,
        }
        means = {q: float(x[:, number].mean()) for q, x in measured.items()}
        rows.append({
            "problem": config.optimizee,
            "steps": steps,
            "clipped_to": clip,
            "runs": config.num_evaluations,
            "finite": int(outcome.is_finite[:, number].sum()),
            **{q: x if np.isfinite(x) else None for q, x in means.items()},
        })  # fmt: skip
    return rows


def judged(config: Config, optimizee: Optimizee, sets: Any, run: Path) -> dict:
    """Judges the students, and the choice policies if they had any; completes cards."""
    students = {"replicate": student_of(config)}
    if config.reduce == "choice":
        students["choice"] = choice_student(config)
    outcomes = {}
    for name, student in students.items():
        files = [run / f"{name}_{i}" for i in range(config.num_replicates)]
        thetas = [load_artifact(file)[1] for file in files]
        outcomes[name] = judge(config, optimizee, sets, student, thetas)
        for number, file in enumerate(files):
            complete(config, file, evaluation(config, outcomes[name], number))
    return outcomes


def main(argv: list[str] | None = None) -> None:
    config, options = parse(
        Config, presets=PRESETS, argv=argv, description=__doc__, several_devices=True
    )
    mesh = options.mesh
    run, begin = create_run(options.out, config), time.perf_counter()
    optimizee, *sets = problem(config.optimizee, config.data_dir)
    data = put_everywhere(sets[0], mesh)
    finished = {row["replicate"] for row in read_metrics(run)}
    missing = [i for i in range(config.num_replicates) if i not in finished]
    shared = None
    if config.reduce != "choice":  # there each replicate has a teacher of its own
        none = config.reduce == "none"
        teachers = {} if none else dict(pool(config.pool, setting=config.setting))
        shared = trainer(config, optimizee, student_of(config), teachers, mesh)
    for number in missing:
        row = replicate(config, optimizee, data, run, number, shared, mesh)
        append_metrics(run, [row])
    rows = sorted(read_metrics(run), key=lambda row: row["replicate"])
    outcomes = judged(config, optimizee, tuple(sets), run)
    found = outcomes["replicate"]
    for i, row in enumerate(rows):
        cells = [
            f"{length} ln train {x.train[:, i].mean():.2f}, "
            f"best ln test {x.best_valid[:, i].mean():.2f}"
            for length, x in found.items()
        ]
        print(f"replicate {i}: gate {row['gate_passed']}, {'; '.join(cells)}")
    plain = {
        who: {length: _without_curves(x) for length, x in races.items()}
        for who, races in outcomes.items()
    }
    summary = {"config": config, "replicates": rows, **plain.pop("replicate"), **plain}
    write_summary(run, summary, wall_time=time.perf_counter() - begin)
    draw(config, run, found)


def draw(config: Config, run: Path, found: dict[str, Race]) -> None:
    steps = {"short": config.num_steps, "long": config.gate_steps}
    panels = {}
    for name, outcome in found.items():
        num = outcome.curves.shape[-1]
        x = np.arange(1, num + 1) * (steps[name] // num)
        panels[f"{name}: training"] = {
            f"replicate {i}": (x, outcome.curves[:, i].mean(0))
            for i in range(config.num_replicates)
        }
    plot_panels(run / "figure.png", panels, xlabel="step", ylabel="ln loss")


def _without_curves(outcome: Race) -> dict[str, Any]:
    return {name: x for name, x in outcome._asdict().items() if name != "curves"}


if __name__ == "__main__":
    main()
