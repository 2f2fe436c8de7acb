"""When to step on the error and when on λ Σ|θ|: learned, tuned and random schedules.

The d-ary quadratic regression of Xu et al., "AutoLoss: learning discrete schedules for
alternate optimization", ICLR 2019, table 1 (first row) and, with `--drop`, table 2. On
each data set everything is chosen on validation splits; the test split is read once, of
what was chosen, and given as excess over its own noise. All methods begin with the same
parameters, and all comparisons are paired over data sets.

    python -m experiments.autoloss_regression                    2 minutes on 2 cores
    python -m experiments.autoloss_regression --preset table     an hour
    python -m experiments.autoloss_regression --preset released  the authors' settings
    python -m experiments.autoloss_regression --drop losses      table 2

Expect on the first data set about .12 of the tuned joint loss and .50 of it at λ = .2,
and .09 to .10 of the controllers, which have λ = .2: with and without a look at the run
they learn to take about 70 % of penalty steps. Over ten data sets both are level with
the tuned joint loss and with the tuned random schedule (means about .3), and data sets
differ by ten times as much as these schedules do.
"""

import dataclasses
import time
from typing import Any, Literal

import jax
import numpy as np

from experiments import schedule_runs
from metax.autoloss import always, bernoulli, cycle, joint, threshold
from metax.harness import create_run, parse, plot_panels, write_summary
from metax.tasks import controller_data, join_splits, regression, task_data


@dataclasses.dataclass(frozen=True)
class Config(schedule_runs.Learning):
    """`lam` is also the λ of the thresholds and of the rows "at λ"."""

    num_seeds: int = 1  # data sets, by their seeds from `first_seed` on
    first_seed: int = 1
    num_lams: int = 8  # of the joint loss; for the other grids `num_coarse`
    num_coarse: int = 8
    lam_range: tuple[float, float] = (0.025, 3.2)
    chances: tuple[float, ...] = (0.3, 0.5, 0.7)
    thresholds: bool = False  # S1, S2 and S3
    num_steps: int = 10_000
    num_runs: int = 2  # initialisations of each setting of a grid
    kept_over: int = 5  # updates whose runs tell which controller is kept; 0: the last
    drop: tuple[Literal["magnitudes", "losses", "validation"], ...] = ()
    reward: Literal["best", "last"] = "best"
    quadratic_scale: float = 0.1
    intercept: bool = False


TABLE = Config(
    num_seeds=10, num_lams=50, num_coarse=12, chances=(0.1, 0.3, 0.5, 0.7, 0.9),
    thresholds=True, num_steps=8000, num_guided=5, num_controllers=3,
)  # fmt: skip
RELEASED = dataclasses.replace(
    TABLE, num_rollouts=1, num_updates=400, max_steps=20_000, kept_over=0,
    meta_rate=1e-3, advantage="ema", baseline_order="after", advantage_clip=20.0,
    step_reward=True, num_guided=10, num_steps=20_000,
)  # fmt: skip
PRESETS = {
    "table": TABLE,
    "released": RELEASED,
    "paper": dataclasses.replace(
        RELEASED, features="paper", activation="relu", temperature=1.0,
        advantage_clip=0.0, baseline_order="before", step_reward=False,
        reduction="sum", reward="last", early_stopping=False, quadratic_scale=1.0,
        intercept=True,
    ),
}  # fmt: skip
THRESHOLDS = {
    "S1": (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0),
    "S2": (0.0, *np.geomspace(0.5, 500, 19)),
    "S3": (0.0, *np.geomspace(0.5, 500, 19)),
}


Rows = dict[str, dict[str, Any]]


def problem_of(config: Config, lam: Any) -> Any:
    return regression.problem(
        lam,
        quadratic_scale=config.quadratic_scale,
        intercept=config.intercept,
        reward=config.reward,
    )


def hand_made(config: Config) -> dict[str, tuple[Any, dict[str, np.ndarray]]]:
    """How each schedule is built of a setting, and the settings to choose among."""
    problem = lambda setting: problem_of(config, setting["lam"])
    fine, coarse = (_lams(config, n) for n in (config.num_lams, config.num_coarse))
    lam, p = (x.ravel() for x in np.meshgrid(coarse, config.chances, indexing="ij"))
    kinds = THRESHOLDS if config.thresholds else {}

    def by(kind: Any) -> Any:
        return lambda setting: (problem(setting), threshold(kind, setting["th"]))

    return {
        "joint": (lambda s: (joint()(problem(s)), always(0)), {"lam": fine}),
        "1:1": (lambda s: (problem(s), cycle((1, 1))), {"lam": coarse}),
        "random": (lambda s: (problem(s), bernoulli(s["p"])), {"lam": lam, "p": p}),
        **{
            kind: (by(kind), {"lam": np.full(len(th), config.lam), "th": np.array(th)})
            for kind, th in kinds.items()
        },
    }


def learned_kinds(config: Config) -> dict[str, str]:
    """The controllers of the table, and what each does not see."""
    if config.num_controllers == 0:
        return {}
    without = {f"AutoLoss without {part}": part for part in config.drop}
    return {"AutoLoss": "none", "context-free": "none", **without}


def build(config: Config, mesh: Any = None) -> dict[str, Any]:
    """The compiled parts, which all data sets share."""
    problem = lambda lam: problem_of(config, lam)
    parts: dict[str, Any] = {
        name: (schedule_runs.leader(make, config.num_steps, mesh=mesh), settings)
        for name, (make, settings) in hand_made(config).items()
    }
    for name, drop in learned_kinds(config).items():
        parts[name] = schedule_runs.learning_parts(
            config, name, problem, drop=drop, mesh=mesh
        )
    parts["score"] = schedule_runs.scorer(problem(config.lam), "test_excess")
    return parts


def measure(config: Config, parts: dict[str, Any], seed: int) -> dict[str, Any]:
    """All methods on one data set; the test split is not touched before the end."""
    splits = regression.generate(seed)
    data = task_data(splits)
    search = {"train": data["train"], "valid": data["valid"]}
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), seed), 3)
    task_keys = jax.random.split(keys[0], max(config.num_runs, config.num_guided))
    found: Rows = {}
    for name in hand_made(config):
        lead, settings = parts[name]
        begin = time.perf_counter()
        first = task_keys[: config.num_runs]
        runs = jax.block_until_ready(lead(settings, first, keys[1], search))
        rows = _chosen(config, name, settings, runs)
        seconds = time.perf_counter() - begin
        found |= {n: row | {"seconds": seconds} for n, row in rows.items()}
        if name == "joint":
            both = join_splits(search["train"], search["valid"])
            nothing, all_rows = {"lam": np.zeros(1)}, {"train": both, "valid": both}
            row = _row(lead(nothing, first, keys[1], all_rows), 0, {"lam": 0.0})
            # nothing is left to choose a check by: what counts is the end
            found["without L1"] = row | {"best_params": row["params"]}
    for name in learned_kinds(config):
        begin = time.perf_counter()
        rows = _learned(config, parts[name], keys[1:], task_keys, splits, search)
        seconds = time.perf_counter() - begin
        found |= {name + n: row | {"seconds": seconds} for n, row in rows.items()}
    for row in found.values():
        row["valid"] = np.asarray(row.pop("metric")) - data["valid"].noise
        row["test"] = parts["score"](row.pop("best_params"), data)
        row["last_test"] = parts["score"](row.pop("params"), data)
    return found


def _learned(
    config: Config,
    part: Any,
    keys: jax.Array,
    task_keys: jax.Array,
    splits: Any,
    search: Any,
) -> Rows:
    """Trains controllers and leads runs by those that were kept, and by the last."""
    learn, lead = part
    num, end = config.num_controllers, config.num_updates
    lams, own = np.full(num, config.lam), jax.random.split(keys[1], num)
    learned = learn(lams, own, controller_data(splits))
    last = np.full(num, end)
    kept = last
    if config.kept_over:
        kept = schedule_runs.kept_updates(learned, config.kept_over)
    settings = schedule_runs.held(
        lams.repeat(2), jax.tree.map(lambda x: x.repeat(2, 0), learned),
        np.stack([kept, last], 1).ravel(),
    )  # fmt: skip
    guided = task_keys[: config.num_guided]
    runs = jax.block_until_ready(lead(settings, guided, keys[0], search))
    steps = int(np.asarray(learned.num_steps, np.int64).sum())
    more = {
        "controller_steps": steps,
        "curve": np.asarray(learned.metric).mean(-1) - splits.controller_valid.noise,
    }
    own_row = lambda start: _row(
        runs, np.arange(start, 2 * num, 2), {"lam": config.lam}, more
    )
    rows = {"": own_row(0) | {"updates": kept}, ", last": own_row(1)}
    return rows if config.kept_over else {"": rows[", last"]}


def _chosen(config: Config, name: str, settings: Any, runs: Any) -> Rows:
    """The setting that is best on validation, and those at λ."""

    def at(index: int) -> dict[str, Any]:
        setting = {n: float(x[index]) for n, x in settings.items()}
        return _row(runs, index, setting)

    rows = {name: at(schedule_runs.best_setting(runs))}
    fixed = settings["lam"] == config.lam
    if name in ("joint", "1:1"):
        rows[f"{name} at λ"] = at(int(fixed.argmax()))
    elif name == "random":
        for p in config.chances:
            where = fixed & (settings["p"] == p)
            rows[f"random({p:g}) at λ"] = at(int(where.argmax()))
    return rows


def _row(runs: Any, index: Any, setting: dict[str, float], more: Any = None) -> Any:
    """What is kept of the runs of one setting, or of several controllers."""
    chosen = schedule_runs.of_setting(runs, index)
    return {
        "setting": setting,
        "metric": chosen.metric,
        "best_params": chosen.best_params,
        "params": chosen.params,
        "share": chosen.share,
        "steps": int(np.asarray(runs.num_steps, np.int64).sum()),
        "finite": [int(np.asarray(runs.is_finite).sum()), int(runs.is_finite.size)],
        **(more or {}),
    }


def summarise(seeds: list[int], found: list[Rows]) -> dict[str, Any]:
    """Each method over data sets: its scores, choices and cost, and the pairs."""
    found = [cell | _chosen_controllers(cell) for cell in found]
    rows = {}
    for name, first in found[0].items():
        each = [cell[name] for cell in found]
        mean = lambda key, each=each: [float(np.mean(row[key])) for row in each]
        total = [row["steps"] + row.get("controller_steps", 0) for row in each]
        rows[name] = {
            **{key: mean(key) for key in ("test", "last_test", "valid", "share")},
            "settings": [row["setting"] for row in each],
            "steps": float(np.mean(total)),
            "seconds": float(np.mean([row.get("seconds", 0.0) for row in each])),
            "finite": np.sum([row["finite"] for row in each], 0).tolist(),
        }
        if np.ndim(first["test"]) == 2:
            rows[name]["controllers"] = [np.mean(row["test"], 1) for row in each]
            rows[name]["updates"] = [row.get("updates", []) for row in each]
            # what a choice among them needs, so that it can be made again
            rows[name]["controllers_valid"] = [
                np.asarray(row["valid"], float).mean(1).tolist() for row in each
            ]
    compared = {
        f"{a} − {b}": schedule_runs.paired(rows[a]["test"], rows[b]["test"])
        for a in rows
        for b in (
            "joint", "random", "context-free", "context-free, chosen", "joint at λ"
        )
        if b in rows and a != b
    }  # fmt: skip
    return {"data_seeds": seeds, "rows": rows, "pairs": compared}


def _chosen_controllers(cell: Rows) -> Rows:
    """Of several controllers the one whose runs did best on the task's validation.

    As λ of the joint loss and p of the random order are chosen: by a mean over runs,
    with no look at the test split.
    """
    chosen = {}
    for name, row in cell.items():
        is_last = name.endswith(", last")
        if np.ndim(row["test"]) == 2 and len(row["test"]) > 1 and not is_last:
            valid = np.asarray(row["valid"], float)
            best = int(np.where(np.isfinite(valid), valid, np.inf).mean(1).argmin())
            one = {k: row[k][best] for k in ("test", "last_test", "valid", "share")}
            chosen[f"{name}, chosen"] = row | one | {"controller": best}
    return chosen


def main(argv: list[str] | None = None) -> None:
    config, options = parse(
        Config, presets=PRESETS, argv=argv, description=__doc__, several_devices=True
    )
    run, begin = create_run(options.out, config), time.perf_counter()
    parts = build(config, options.mesh)
    seeds = [config.first_seed + i for i in range(config.num_seeds)]
    found = schedule_runs.cells(
        run, seeds, lambda seed: _reported(seed, measure(config, parts, seed))
    )
    summary = {"config": config, **summarise(seeds, found)}
    write_summary(run, summary, wall_time=time.perf_counter() - begin)
    for name, pair in summary["pairs"].items():
        low, high = pair.get("low", np.nan), pair.get("high", np.nan)
        print(f"{name:44} {pair['mean']:+.3f} [{low:+.3f}, {high:+.3f}] "
              f"wins {pair['wins']} of {pair['n']}")  # fmt: skip
    curves = {
        name: (np.arange(config.num_updates), np.mean([c[name]["curve"] for c in found],
                                                      axis=(0, 1)))
        for name in learned_kinds(config)
    }  # fmt: skip
    plot_panels(
        run / "figure.png", {"controllers": curves}, xlabel="update",
        ylabel="excess validation error of its runs",
    )  # fmt: skip


def _reported(seed: int, found: Rows) -> Rows:
    for name, row in found.items():
        setting = " ".join(f"{n}={x:.3g}" for n, x in row["setting"].items())
        print(f"{seed:3} {name:36} test {np.mean(row['test']):+.3f} valid "
              f"{np.mean(row['valid']):+.3f} share {np.mean(row['share']):.2f} "
              f"{setting}", flush=True)  # fmt: skip
    return found


def _lams(config: Config, number: int) -> np.ndarray:
    """A grid that holds λ itself."""
    rest = np.geomspace(*config.lam_range, number - 1)
    return np.sort(np.append(rest, config.lam))


if __name__ == "__main__":
    main()
