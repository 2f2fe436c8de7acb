"""Problems × optimizers: learned optimizers beside tuned analytical ones.

Every optimizer runs from the same seeds, behind 100 steps of SGD by .01; a learned one
behind the warm-up of its card. Analytical rules are run at a grid of rates; the
*oracle* of a problem is that of all of them with the least mean best test loss, and so
is chosen on the measure it is judged by, as in the paper: it is a bound, not a
competitor. Learned optimizers have nothing to choose. `--learned` takes names of
`metax.amalgamation.pretrained()` and files that `experiments.amalgamate` wrote, without
their suffix; replicates of one folder are also set apart by Eq. 9.

    python -m experiments.amalgamation_evaluate                     1 minute on 2 cores
    python -m experiments.amalgamation_evaluate --preset transfer   10 minutes
    python -m experiments.amalgamation_evaluate --preset paper      a GPU

Expect on the digits Adam at .05 near -5.4 (ln training loss) and -3.6 (best ln test
loss), and the pretrained optimizers near -4.6 and -3.3.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.optimizer_runs import (
    RATES,
    RULES,
    Race,
    analytical,
    learned,
    problem,
    race,
    stacked,
)
from metax.amalgamation import load_artifact, pretrained
from metax.amalgamation.artifacts import PRETRAINED
from metax.harness import (
    append_metrics,
    create_run,
    long_rows,
    mean_interval,
    mixed_effects,
    optimization_stability,
    parse,
    plot_panels,
    read_metrics,
    write_summary,
)


@dataclasses.dataclass(frozen=True)
class Config:
    problems: tuple[str, ...] = ("Digits",)
    learned: tuple[str, ...] = ("all",)  # names or files; "all" for all pretrained
    rules: tuple[str, ...] = tuple(RULES)
    warmup_steps: int = 100  # of the analytical rules
    num_steps: int = 375  # a warm-up, and 25 epochs of the digits
    judge_every: int = 1
    steps_per_epoch: int = 11
    num_evaluations: int = 5
    seed: int = 100
    data_dir: str | None = None


PRESETS = {
    "transfer": Config(
        problems=("MLP",), num_steps=2340, judge_every=117, steps_per_epoch=468,
        num_evaluations=3,
    ),
    "paper": Config(
        problems=("Train", "MLP", "Wider", "Deeper", "FMNIST", "CIFAR", "ResNet",
                  "SmallBatch", "MNIST-DP", "ResNet-52"),
        num_steps=11_700, judge_every=468, steps_per_epoch=468, num_evaluations=10,
    ),
}  # fmt: skip
QUANTITIES = ("train", "best_valid", "last_valid", "accuracy")


class Group(NamedTuple):
    """Learned optimizers of one policy and warm-up, which run together.

    Attributes:
      build: from weights to a rule, for `race`.
      names: as the table has them.
      thetas: their weights.
    """

    build: Callable[[Any], Any]
    names: list[str]
    thetas: list[Any]


def groups(asked: tuple[str, ...]) -> dict[str, Group]:
    """The learned optimizers by what they share."""
    names = pretrained() if asked == ("all",) else asked
    together: dict[str, Group] = {}
    for name in names:
        path = PRETRAINED / name if name in pretrained() else Path(name)
        student, theta, card = load_artifact(path)
        warm = card["warmup_steps"], card["warmup_learning_rate"]
        same = f"{card['policy']} {card['policy_options']} {warm}"
        group = together.setdefault(same, Group(learned(student, *warm), [], []))
        # files of several folders have the same names
        group.names.append("/".join(Path(name).parts[-2:]))
        group.thetas.append(theta)
    return together


def measure(
    config: Config, name: str, mesh: Any
) -> tuple[dict[str, Race], dict[str, list]]:
    """All optimizers on one problem: races by label, and the settings of each."""
    optimizee, *sets = problem(name, config.data_dir)
    how: dict[str, Any] = {
        "num_steps": config.num_steps,
        "judge_every": config.judge_every,
        "num_seeds": config.num_evaluations,
        "last": config.steps_per_epoch,
        "mesh": mesh,
    }
    key, races, settings = jax.random.key(config.seed), {}, {}
    rates = np.asarray(RATES, np.float32)
    for rule in config.rules:
        races[rule] = race(
            optimizee, analytical(rule, config.warmup_steps, 0.01), rates, tuple(sets),
            key, label=f"{name}: {rule}", **how,
        )  # fmt: skip
        settings[rule] = list(RATES)
    for same, (build, names, thetas) in groups(config.learned).items():
        races[same] = race(
            optimizee, build, stacked(thetas), tuple(sets), key,
            label=f"{name}: {names[0]}", **how,
        )  # fmt: skip
        settings[same] = names
    return races, settings


def rows_of(
    config: Config, problem_name: str, races: dict[str, Race], settings: dict[str, list]
) -> list[dict[str, Any]]:
    """One row an evaluation: problem, optimizer, setting, seed, outcomes."""
    rows = []
    for label, outcome in races.items():
        wobbles = wobble(outcome, config.steps_per_epoch // config.judge_every)
        for i, setting in enumerate(settings[label]):
            is_rule = label in RULES
            measured = {q: getattr(outcome, q)[:, i] for q in QUANTITIES}
            measured["finite"] = outcome.is_finite[:, i].astype(float)
            measured["optimization_stability"] = wobbles[:, i]
            axes = {"seed": range(config.num_evaluations)}
            rows += long_rows(
                measured, axes, problem=problem_name,
                optimizer=label if is_rule else setting,
                setting=float(setting) if is_rule else 0.0,
                kind="analytical" if is_rule else "learned",
            )  # fmt: skip
    return rows


def wobble(outcome: Race, per_epoch: int) -> np.ndarray:
    """Optimization stability of each run; NaN where it diverged. Over whole epochs."""
    curves = np.exp(outcome.curves)
    per_epoch = max(per_epoch, 1)
    num = curves.shape[-1] // per_epoch
    shape = (*curves.shape[:-1], num, per_epoch)
    epochs = curves[..., : num * per_epoch].reshape(shape).mean(-1)
    found = np.full(epochs.shape[:-1], np.nan)
    sound = (np.isfinite(epochs) & (epochs > 0)).all(-1)
    if num > 1 and sound.any():
        found[sound] = optimization_stability(epochs[sound])
    return found


def table(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """A line an optimizer, at its best rate; the oracle is marked."""
    mine = [row for row in rows if row["problem"] == name]
    lines = []
    for optimizer in dict.fromkeys(row["optimizer"] for row in mine):
        own = [row for row in mine if row["optimizer"] == optimizer]
        by_setting = {
            s: [row for row in own if row["setting"] == s]
            for s in dict.fromkeys(row["setting"] for row in own)
        }
        setting, found = min(by_setting.items(), key=lambda pair: level(pair[1]))
        line: dict[str, Any] = {
            "problem": name,
            "optimizer": optimizer,
            "kind": own[0]["kind"],
            "setting": setting,
            "finite": float(np.mean([row["finite"] for row in found])),
        }
        for q in (*QUANTITIES, "optimization_stability"):
            values = [row[q] for row in found]
            sound = len(values) > 1 and np.isfinite(values).all()
            line[q] = mean_interval(values) if sound else float(np.mean(values))
        lines.append(line)
    rules = [line for line in lines if line["kind"] == "analytical"]
    best = min(rules, key=lambda line: _finite(line["best_valid"]), default=None)
    return [{**line, "oracle": line is best} for line in lines]


def level(rows: list[dict[str, Any]]) -> float:
    """The mean best test loss; a run that never had one is worse than any."""
    return _finite(np.mean([row["best_valid"] for row in rows]))


def across(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Eq. 9 over the replicates of each folder, by problem."""
    found: dict[str, Any] = {}
    for row in rows:
        folder, _, name = row["optimizer"].rpartition("/")
        if name.startswith("replicate_"):
            runs = found.setdefault(f"{row['problem']}: {folder}", {})
            runs.setdefault(name, []).append(row["best_valid"])
    values = {name: list(runs.values()) for name, runs in found.items()}
    return {
        name: mixed_effects(x)._asdict()
        for name, x in values.items()
        if len(x) > 1 and len(x[0]) > 1 and np.isfinite(x).all()
    }


def main(argv: list[str] | None = None) -> None:
    config, options = parse(
        Config, presets=PRESETS, argv=argv, description=__doc__, several_devices=True
    )
    run, begin = create_run(options.out, config), time.perf_counter()
    finished = {row["problem"] for row in read_metrics(run)}
    for name in [name for name in config.problems if name not in finished]:
        append_metrics(run, rows_of(config, name, *measure(config, name, options.mesh)))
    rows = read_metrics(run)
    lines = [line for name in config.problems for line in table(rows, name)]
    for line in lines:
        cells = [f"{q} {np.ravel(line[q])[0]:.3f}" for q in QUANTITIES]
        mark = "  <- oracle" if line["oracle"] else ""
        who = f"{line['problem']:10} {line['optimizer']:24} {line['setting']:<6g}"
        print(who, "  ".join(cells) + mark)
    summary = {"config": config, "table": lines, "across": across(rows)}
    write_summary(run, summary, wall_time=time.perf_counter() - begin)
    panels = {
        name: {
            line["optimizer"]: (
                [0.0, 1.0],
                [np.ravel(line["last_valid"])[0], np.ravel(line["best_valid"])[0]],
            )
            for line in lines
            if line["problem"] == name
        }
        for name in config.problems
    }
    plot_panels(run / "figure.png", panels, xlabel="0: last, 1: best", ylabel="ln test")


def _finite(value: Any) -> float:
    mean = np.ravel(value)[0]
    return float(mean) if np.isfinite(mean) else np.inf


if __name__ == "__main__":
    main()
