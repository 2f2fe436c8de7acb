"""What λ does to a fixed schedule and to a learned one: joint, 1:1, random, AutoLoss.

Figure 1 of Xu et al., "AutoLoss: learning discrete schedules for alternate
optimization", ICLR 2019. Nothing is chosen here but the check of each run, on
validation: every λ is shown, and of each schedule how far its scores lie apart.

    python -m experiments.autoloss_sweep                    3 minutes on 2 cores
    python -m experiments.autoloss_sweep --num-seeds 3      6 minutes
    python -m experiments.autoloss_sweep --preset paper     ten λ, an hour
    python -m experiments.autoloss_sweep --task classification

Expect the joint loss to spread by 1.3 over λ = .1 to .8 on the first data set, and the
learned schedules, which take more penalty steps where λ is small, by a tenth of it at
most. In 60 updates a context-free controller does not come to the share that λ = .1
needs.
"""

import dataclasses
import time
from typing import Any, Literal

import jax
import numpy as np

from experiments import schedule_runs
from metax.autoloss import always, bernoulli, cycle, joint
from metax.harness import create_run, parse, plot_panels, write_summary
from metax.tasks import classification, controller_data, regression, task_data


@dataclasses.dataclass(frozen=True)
class Config(schedule_runs.Learning):
    """With `num_controllers=0` there are only schedules made by hand."""

    task: Literal["regression", "classification"] = "regression"
    lams: tuple[float, ...] = (0.1, 0.2, 0.4, 0.8)
    chances: tuple[float, ...] = (0.5,)
    num_seeds: int = 1
    first_seed: int = 1
    num_steps: int = 10_000
    num_runs: int = 5


LINEAR = {
    "regression": tuple(np.exp(np.linspace(-3.0, 1.0, 10)).tolist()),
    "classification": tuple(np.exp(np.linspace(-6.0, -2.0, 10)).tolist()),
}
PRESETS = {
    "paper": Config(lams=LINEAR["regression"], num_controllers=3, num_guided=10),
    "classification": Config(
        task="classification", lams=(0.003, 0.01, 0.03, 0.1), max_steps=2000,
        num_steps=3000, num_guided=10,
    ),
    "paper_classification": Config(
        task="classification", lams=LINEAR["classification"], max_steps=2000,
        num_steps=3000, num_controllers=3, num_guided=10,
    ),
}  # fmt: skip
KINDS = ("AutoLoss", "context-free")


def problem_of(config: Config) -> Any:
    return {
        "regression": regression.problem,
        "classification": classification.problem,
    }[config.task]


def build(config: Config, mesh: Any = None) -> dict[str, Any]:
    """The compiled parts, which all data sets share."""
    problem = problem_of(config)
    made: dict[str, Any] = {
        "joint": lambda lam: (joint()(problem(lam)), always(0)),
        "1:1": lambda lam: (problem(lam), cycle((1, 1))),
        **{
            f"random({p:g})": lambda lam, p=p: (problem(lam), bernoulli(p))
            for p in config.chances
        },
    }
    parts: dict[str, Any] = {
        name: schedule_runs.leader(make, config.num_steps, mesh=mesh)
        for name, make in made.items()
    }
    if config.num_controllers:
        for kind in KINDS:
            parts[kind] = schedule_runs.learning_parts(
                config, kind, problem, task=config.task, mesh=mesh
            )
    return parts


def measure(config: Config, parts: dict[str, Any], seed: int) -> dict[str, Any]:
    """Every schedule at every λ on one data set: [λ, controllers or 1, runs]."""
    is_regression = config.task == "regression"
    splits = (regression if is_regression else classification).generate(seed)
    data, lams = task_data(splits), np.array(config.lams)
    search = {"train": data["train"], "valid": data["valid"]}
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), seed), 3)
    task_keys = jax.random.split(keys[0], max(config.num_runs, config.num_guided))
    quantity = "test_excess" if is_regression else "test_accuracy"
    score = schedule_runs.scorer(problem_of(config)(lams[0]), quantity)
    worth = lambda x: np.asarray(x) if is_regression else 1 - np.asarray(x)
    offset = data["valid"].noise if is_regression else 0.0
    found = {}
    for name, part in parts.items():
        begin, more = time.perf_counter(), 0
        if name in KINDS:
            (learn, lead), num = part, config.num_controllers
            all_lams = lams.repeat(num)
            own = jax.random.split(keys[2], len(all_lams))
            learned = learn(all_lams, own, controller_data(splits))
            ends = np.full(len(all_lams), config.num_updates)
            settings = schedule_runs.held(all_lams, learned, ends)
            first = task_keys[: config.num_guided]
            more = int(np.asarray(learned.num_steps, np.int64).sum())
        else:
            lead, settings, first = part, lams, task_keys[: config.num_runs]
        runs = jax.block_until_ready(lead(settings, first, keys[1], search))
        seconds = time.perf_counter() - begin
        shape = (len(lams), -1, len(first))
        by_lam = lambda x, shape=shape: np.asarray(x).reshape(shape)
        found[name] = {
            "test": by_lam(worth(score(runs.best_params, data))),
            "last_test": by_lam(worth(score(runs.params, data))),
            "valid": by_lam(worth(runs.metric)) - offset,
            "share": by_lam(runs.share),
            "steps": more + int(np.asarray(runs.num_steps, np.int64).sum()),
            "seconds": seconds,
        }
    return found


def summarise(config: Config, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over data sets and runs by λ, and of each data set the spread over λ."""
    rows = {}
    for name in found[0]:
        stacked = {
            key: np.stack([np.mean(cell[name][key], axis=(1, 2)) for cell in found])
            for key in ("test", "last_test", "valid", "share")
        }  # [data sets, λ]
        rows[name] = {
            **{key: x.mean(0) for key, x in stacked.items()},
            "by_seed": {key: stacked[key] for key in ("test", "valid")},
            "spread": np.ptp(stacked["test"], axis=1),
            "steps": float(np.mean([cell[name]["steps"] for cell in found])),
            "seconds": float(np.mean([cell[name]["seconds"] for cell in found])),
        }
    pairs = {}
    for name in rows:
        for index, lam in enumerate(config.lams):
            if name != "joint":
                one = lambda n, key, i=index: rows[n]["by_seed"][key][:, i]
                pairs[f"{name} − joint, λ = {lam:g}"] = {
                    key: schedule_runs.paired(one(name, key), one("joint", key))
                    for key in ("test", "valid")
                }
    return {"rows": rows, "pairs": pairs}


def main(argv: list[str] | None = None) -> None:
    config, options = parse(
        Config, presets=PRESETS, argv=argv, description=__doc__, several_devices=True
    )
    run, begin = create_run(options.out, config), time.perf_counter()
    parts = build(config, options.mesh)
    seeds = [config.first_seed + i for i in range(config.num_seeds)]
    found = schedule_runs.cells(run, seeds, lambda seed: measure(config, parts, seed))
    outcome = summarise(config, found)
    summary = {"config": config, "data_seeds": seeds, **outcome}
    write_summary(run, summary, wall_time=time.perf_counter() - begin)
    print(f"{'λ':14}", *(f"{lam:8.3g}" for lam in config.lams), "  spread")
    for name, row in outcome["rows"].items():
        values = [f"{x:8.3f}" for x in row["test"]]
        print(f"{name:14}", *values, f"  {np.mean(row['spread']):.3f}")
    log_lams = np.log(config.lams)
    curves = {name: (log_lams, row["test"]) for name, row in outcome["rows"].items()}
    plot_panels(
        run / "figure.png", {config.task: curves}, xlabel="ln λ", ylabel="test score"
    )


if __name__ == "__main__":
    main()
