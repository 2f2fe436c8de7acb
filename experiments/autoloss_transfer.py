"""Does a controller that was trained on one data set serve on another?

For each pair (i, j) a controller is trained on the controller's part of data set i and
leads runs on the task's part of data set j, at the same λ. Beside it stand the joint
loss with λ tuned on j, which costs a search on j, and a random schedule whose chance p
was tuned where the controller learned, on i: what of the transfer is more than a rate
is what remains against that one.

    python -m experiments.autoloss_transfer                     10 minutes on 2 cores
    python -m experiments.autoloss_transfer --num-seeds 10 --num-controllers 3

Expect rows that differ little and columns that differ much: how hard a data set is
matters more than where the controller comes from.
"""

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from experiments import schedule_runs
from metax.autoloss import always, bernoulli, joint
from metax.harness import create_run, parse, plot_panels, write_summary
from metax.tasks import controller_data, regression, task_data

KINDS = ("AutoLoss", "context-free")


@dataclasses.dataclass(frozen=True)
class Config(schedule_runs.Learning):
    num_seeds: int = 4
    first_seed: int = 1
    chances: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    num_lams: int = 20
    lam_range: tuple[float, float] = (0.025, 3.2)
    num_steps: int = 10_000
    num_runs: int = 3


def build(config: Config, mesh: Any = None) -> dict[str, Any]:
    """The compiled parts, which all data sets share."""
    problem = regression.problem
    return {
        "joint": schedule_runs.leader(
            lambda lam: (joint()(problem(lam)), always(0)), config.num_steps, mesh=mesh
        ),
        "random": schedule_runs.leader(
            lambda p: (problem(config.lam), bernoulli(p)), config.num_steps, mesh=mesh
        ),
        "score": schedule_runs.scorer(problem(config.lam), "test_excess"),
        **{
            k: schedule_runs.learning_parts(config, k, problem, mesh=mesh)
            for k in KINDS
        },
    }


def measure(config: Config, parts: dict[str, Any], seed: int) -> dict[str, Any]:
    """Data set j: the tuned joint loss and each p; data set i: p, and its controllers.

    What the controllers come to on every data set is the last entry.
    """
    seeds = [config.first_seed + i for i in range(config.num_seeds)]
    data = {s: task_data(regression.generate(s)) for s in seeds}
    own = controller_data(regression.generate(seed))
    keys = {s: _keys(config, s) for s in seeds}
    score, chances = parts["score"], np.array(config.chances)
    lams = np.geomspace(*config.lam_range, config.num_lams)

    first = keys[seed][0][: config.num_runs]
    tuned = parts["joint"](lams, first, keys[seed][1], _search(data[seed]))
    best = schedule_runs.best_setting(tuned)
    here = parts["random"](chances, first, keys[seed][1], _search(data[seed]))
    where_learned = parts["random"](chances, first, keys[seed][1], own)
    found = {
        "lam": float(lams[best]),
        "p": int(schedule_runs.best_setting(where_learned)),
        "joint": score(tuned.best_params, data[seed])[best].mean(),
        "random": score(here.best_params, data[seed]).mean(-1),
        "steps": {
            "joint": int(tuned.num_steps.sum()),
            "random": int(where_learned.num_steps.sum()),
        },
    }
    for kind in KINDS:
        learn, lead = parts[kind]
        fixed = np.full(config.num_controllers, config.lam)
        learned = learn(fixed, jax.random.split(keys[seed][2], len(fixed)), own)
        settings = schedule_runs.held(
            fixed, learned, np.full(len(fixed), config.num_updates)
        )
        found[kind] = []
        for j in seeds:
            task_keys, key_act, _ = keys[j]
            task_keys = task_keys[: config.num_guided]
            runs = lead(settings, task_keys, key_act, _search(data[j]))
            worth = score(runs.best_params, data[j])
            row = {"test": worth.mean(), "share": runs.share.mean()}
            found[kind].append({name: float(x) for name, x in row.items()})
        found["steps"][kind] = int(np.asarray(learned.num_steps, np.int64).sum())
    return found


def summarise(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Matrices [i, j]: scores, and what lies between them and the baselines of j."""
    dgs = np.array([cell["joint"] for cell in found])  # [j]
    by_p = np.array([cell["random"] for cell in found])  # [j, p]
    chosen = np.array([cell["p"] for cell in found])  # [i]
    random = by_p[:, chosen].T  # p of i on data set j
    apart = ~np.eye(len(found), dtype=bool)
    matrices, pairs = {"random": random}, {}
    for kind in KINDS:
        matrices[kind] = np.array([[row["test"] for row in c[kind]] for c in found])
        for name, other in (("joint", np.broadcast_to(dgs, random.shape)),
                            ("random", random)):  # fmt: skip
            matrices[f"{kind} − {name}"] = matrices[kind] - other
            # of each column its mean over foreign rows: columns are independent data
            means = [
                np.where(apart, m, 0).sum(0) / apart.sum(0)
                for m in (matrices[kind], other)
            ]
            if len(found) > 1:
                pairs[f"{kind} from elsewhere − {name}"] = schedule_runs.paired(*means)
            own = (np.diag(matrices[kind]), np.diag(other))
            pairs[f"{kind} at home − {name}"] = schedule_runs.paired(*own)
    shares = {
        kind: [[row["share"] for row in cell[kind]] for cell in found] for kind in KINDS
    }
    return {"joint": dgs, "matrices": matrices, "pairs": pairs, "shares": shares}


def main(argv: list[str] | None = None) -> None:
    config, options = parse(
        Config, argv=argv, description=__doc__, several_devices=True
    )
    run, begin = create_run(options.out, config), time.perf_counter()
    parts = build(config, options.mesh)
    seeds = [config.first_seed + i for i in range(config.num_seeds)]
    found = schedule_runs.cells(run, seeds, lambda seed: measure(config, parts, seed))
    outcome = summarise(found)
    chances = [config.chances[cell["p"]] for cell in found]
    summary = {
        "config": config,
        "data_seeds": seeds,
        "chances": chances,
        "lams": [cell["lam"] for cell in found],
        "steps": [cell["steps"] for cell in found],
        **outcome,
    }
    write_summary(run, summary, wall_time=time.perf_counter() - begin)
    for name, matrix in outcome["matrices"].items():
        print(name)
        for seed, row in zip(seeds, matrix, strict=True):
            print(f"  from {seed:3}", *(f"{x:+8.3f}" for x in row))
    panels = {
        name: {f"from {i}": (np.array(seeds), row) for i, row in
               zip(seeds, outcome["matrices"][name], strict=True)}
        for name in ("AutoLoss − joint", "AutoLoss − random")
    }  # fmt: skip
    plot_panels(
        run / "figure.png", panels, xlabel="data set of the runs", ylabel="test excess"
    )


def _keys(config: Config, seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), seed), 3)
    number = max(config.num_runs, config.num_guided)
    return jax.random.split(keys[0], number), keys[1], keys[2]


def _search(data: dict[str, Any]) -> dict[str, Any]:
    """Without the test split."""
    return {"train": data["train"], "valid": data["valid"]}


if __name__ == "__main__":
    main()
