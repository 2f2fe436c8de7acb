"""Problems × optimizers: learned optimizers beside tuned analytical ones.

Every optimizer runs from the same seeds, behind 100 steps of SGD by .01; a learned one
behind the warm-up of its card. Analytical rules are run at a grid of rates; the
*oracle* of a problem is that of all of them with the least mean best test loss, and so
is chosen on the measure it is judged by, as in the paper: it is a bound, not a
competitor. Learned optimizers have nothing to choose. `--learned` takes names of
`metax.amalgamation.pretrained()`, files that `experiments.amalgamate` wrote, without
their suffix, and its folders: the replicates of one are a line of the table, the mean
over them with the interval of Eq. 9. What is measured already is not run again.

    python -m experiments.amalgamation_evaluate                     1 minute on 2 cores
    python -m experiments.amalgamation_evaluate --preset small      10 minutes
    python -m experiments.amalgamation_evaluate --preset transfer   5 minutes
    python -m experiments.amalgamation_evaluate --preset paper      a GPU

Baselines are trained first, each by one command, `--preset short` or a longer one:

    python -m experiments.amalgamate --preset short --out runs/minmax
    ... --reduce none --student rnnprop_lv --out runs/rnnprop_lv
    ... --reduce none --student l2l --random-scale 0 --out runs/l2l
    ... --reduce none --student scale --random-scale 0 --out runs/scale
    ... --reduce none --student rnnprop_lv --imitation-probability 0.3
        --out runs/stronger
    python -m experiments.amalgamation_evaluate --preset small --learned all
        runs/minmax runs/rnnprop_lv runs/l2l runs/scale runs/stronger

Expect on the digits Adam at .05 near -5.4 (ln training loss) and -3.6 (best ln test
loss), and the pretrained optimizers near -4.6 and -3.3.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.amalgamation_problems import SMALL, problem
from experiments.amalgamation_tables import QUANTITIES, across, table, wobble
from experiments.optimizer_runs import (
    RATES,
    RULES,
    Race,
    analytical,
    learned,
    race,
    stacked,
)
from metax.amalgamation import load_artifact, pretrained
from metax.amalgamation.artifacts import PRETRAINED
from metax.harness import (
    append_metrics,
    create_run,
    long_rows,
    parse,
    plot_panels,
    read_metrics,
    write_summary,
)


@dataclasses.dataclass(frozen=True)
class Config:
    problems: tuple[str, ...] = ("Digits",)
    learned: tuple[str, ...] = ("all",)  # names, files, folders; "all": pretrained
    rules: tuple[str, ...] = tuple(RULES)
    rates: tuple[float, ...] = RATES
    warmup_steps: int = 100  # of the analytical rules
    num_steps: int = 375  # a warm-up, and 25 epochs of the digits
    judge_every: int = 1
    steps_per_epoch: int = 11
    num_evaluations: int = 5
    seed: int = 100
    data_dir: str | None = None


PRESETS = {
    "small": Config(
        problems=("Digits", *SMALL), rules=("adam", "rmsprop", "sgd"), num_steps=374,
        judge_every=11, num_evaluations=3,
    ),
    "transfer": Config(
        problems=("MLP",), rules=("adam", "rmsprop", "sgd"), num_steps=468,
        judge_every=117, steps_per_epoch=117, num_evaluations=3,
    ),
    "paper": Config(
        problems=("Train", "MLP", "Wider", "Deeper", "FMNIST", "CIFAR", "ResNet",
                  "SmallBatch", "MNIST-DP", "ResNet-52"),
        num_steps=11_700, judge_every=468, steps_per_epoch=468, num_evaluations=10,
    ),
}  # fmt: skip


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


def found(asked: Sequence[str]) -> dict[str, Path]:
    """The learned optimizers that are asked for: names, as tables have them, and files.

    A replicate is `<folder>/replicate_<i>`, as files of several folders share names.
    """
    files: dict[str, Path] = {}
    for word in asked:
        if word == "all" or word in pretrained():
            names = pretrained() if word == "all" else (word,)
            files |= {name: PRETRAINED / name for name in names}
            continue
        path = Path(word)
        inside = [path]
        if path.is_dir():
            cards = sorted(path.glob("replicate_*.json"))
            inside = [card.with_suffix("") for card in cards]
        if not inside:
            raise FileNotFoundError(
                f"--learned {word}: no replicate_<i>.json there; "
                f"`python -m experiments.amalgamate --out {word}` writes them."
            )
        files |= {"/".join(file.parts[-2:]): file for file in inside}
    return files


def groups(files: Mapping[str, Path]) -> list[Group]:
    """The learned optimizers by what they share."""
    together: dict[str, Group] = {}
    for name, path in files.items():
        student, theta, card = load_artifact(path)
        warm = card["warmup_steps"], card["warmup_learning_rate"]
        same = f"{card['policy']} {card['policy_options']} {warm}"
        group = together.setdefault(same, Group(learned(student, *warm), [], []))
        group.names.append(name)
        group.thetas.append(theta)
    return list(together.values())


def measure(
    config: Config, name: str, known: set[str], mesh: Any
) -> Iterator[tuple[Race, str | None, list]]:
    """All optimizers on one problem, but for those known: a race, its rule, settings.

    The rule is None for learned optimizers, whose settings are their names.
    """
    optimizee, *sets = problem(name, config.data_dir)
    how: dict[str, Any] = {
        "num_steps": config.num_steps,
        "judge_every": config.judge_every,
        "num_seeds": config.num_evaluations,
        "last": config.steps_per_epoch,
        "mesh": mesh,
    }
    key, data = jax.random.key(config.seed), tuple(sets)
    for rule in config.rules:
        if rule not in known:
            build = analytical(rule, config.warmup_steps, 0.01)
            rates = np.asarray(config.rates, np.float32)
            how["label"] = f"{name}: {rule}"
            yield race(optimizee, build, rates, data, key, **how), rule, [*config.rates]
    files = found(config.learned)
    missing = {who: file for who, file in files.items() if who not in known}
    for build, names, thetas in groups(missing):
        how["label"] = f"{name}: {names[0]}"
        yield race(optimizee, build, stacked(thetas), data, key, **how), None, names


def rows_of(
    config: Config, problem_name: str, outcome: Race, rule: str | None, settings: list
) -> list[dict[str, Any]]:
    """One row an evaluation: problem, optimizer, setting, seed, outcomes."""
    rows, axes = [], {"seed": range(config.num_evaluations)}
    wobbles = wobble(outcome, config.steps_per_epoch // config.judge_every)
    for i, setting in enumerate(settings):
        measured = {q: getattr(outcome, q)[:, i] for q in QUANTITIES}
        measured["finite"] = outcome.is_finite[:, i].astype(float)
        measured["optimization_stability"] = wobbles[:, i]
        rows += long_rows(
            measured, axes, problem=problem_name,
            optimizer=rule or setting, setting=float(setting) if rule else 0.0,
            kind="analytical" if rule else "learned",
        )  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> None:
    config, options = parse(
        Config, presets=PRESETS, argv=argv, description=__doc__, several_devices=True
    )
    run, begin = create_run(options.out, config), time.perf_counter()
    done = read_metrics(run)
    for name in config.problems:
        known = {row["optimizer"] for row in done if row["problem"] == name}
        for outcome in measure(config, name, known, options.mesh):
            append_metrics(run, rows_of(config, name, *outcome))
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


if __name__ == "__main__":
    main()
