"""When to step on the cross-entropy and when on λ Σ|θ|: learned, tuned and random.

Xu et al., "AutoLoss: learning discrete schedules for alternate optimization", ICLR
2019, table 1 (second row) and, with `--transfer`, figure 4a: a controller from one data
set leads runs on four. Data sets are scikit-learn's, as in the authors' code. On each
all is chosen on validation splits; the test error is that of the checkpoint that was
best there, the mean of 10 runs from initialisations that all methods share.

    python -m experiments.autoloss_classification                    2 minutes, 2 cores
    python -m experiments.autoloss_classification --preset table     half an hour
    python -m experiments.autoloss_classification --preset transfer  10 minutes

Expect errors of .12 to .17 without a penalty and .07 to .09 with one on the first data
set, whatever the schedule: differences between schedules are within ±.01, the noise of
1000 test points. At λ = .1 the joint loss fails (.3 or more), a random order with a
chance of .1 for the penalty does not, and a controller can learn as much.

The controllers see the paper's features with a running normaliser: chosen by validation
errors on data sets that are in no table, where they did no worse than the released
ones, which cost twice as much.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments import classification_runs as runs
from experiments import schedule_runs
from metax.harness import (
    create_run,
    mean_interval,
    parse,
    plot_panels,
    write_summary,
)


@dataclasses.dataclass(frozen=True)
class Config:
    transfer: bool = False  # figure 4a in place of the table
    num_seeds: int = 1  # data sets, by their seeds from `first_seed` on
    first_seed: int = 1
    lams: tuple[float, ...] = (0.02,)  # of the controllers; the first is the main one
    num_seeds_beside: int = 1  # data sets for the others
    joint_lams: tuple[float, ...] = (0.003, 0.01, 0.02, 0.1)
    num_lams: int = 10  # of the joint loss, and `num_coarse` for each p
    num_coarse: int = 2
    lam_range: tuple[float, float] = (1e-3, 0.2)
    chances: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    num_steps: int = 2000
    num_guided: int = 10
    num_controllers: int = 1
    num_sources: int = 1  # of the transfer: data sets on which a controller is trained
    num_rollouts: int = 8
    num_updates: int = 40
    max_steps: int = 2000
    kept_over: int = 10  # updates whose runs tell which controller is kept; 0: the last
    features: Literal["paper", "released"] = "paper"
    normalise: bool = True
    activation: Literal["relu", "leaky_relu"] = "relu"
    temperature: float = 2.0
    meta_rate: float = 0.02
    baseline_decay: float = 0.9
    advantage: Literal["ema", "leave_one_out", "normalized"] = "normalized"
    advantage_clip: float = 0.0  # 0: none
    baseline_order: Literal["before", "after"] = "before"
    step_reward: bool = False
    reduction: Literal["sum", "mean"] = "mean"
    early_stopping: bool = True
    untrained: bool = False  # how far controllers that learned nothing lie apart
    wide_lams: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
    seed: int = 0


TABLE = Config(
    num_seeds=10, lams=(0.02, 0.1), num_seeds_beside=2, num_lams=50, num_coarse=8,
    num_updates=60, untrained=True,
)  # fmt: skip
RELEASED = dataclasses.replace(
    TABLE, num_rollouts=1, num_updates=40_000, features="released", normalise=False,
    activation="leaky_relu", meta_rate=1e-3, advantage="ema", advantage_clip=5.0,
    baseline_order="after", step_reward=True, kept_over=0,
)  # fmt: skip
PRESETS = {
    "table": TABLE,
    "transfer": dataclasses.replace(
        TABLE, transfer=True, num_seeds=4, first_seed=11, lams=(0.02,), num_sources=4,
        untrained=False,
    ),
    "released": RELEASED,
    "paper": dataclasses.replace(
        RELEASED, features="paper", activation="relu", temperature=1.0,
        advantage_clip=0.0, baseline_order="before", step_reward=False, reduction="sum",
        early_stopping=False,
    ),
}  # fmt: skip
BESIDE = ("DGS", "DGS, the run that won", "random(p*)")
AT_LAM = ("joint", "random(.5)", "random(p*)", "context-free")

Rows = dict[str, dict[str, Any]]


def table(config: Config, parts: runs.Parts, folder: Path) -> dict[str, Any]:
    """Each data set by itself; a cell is a data set and a group of methods."""
    seeds = _seeds(config)

    def measure(name: str) -> Rows:
        seed, group, *lam = name.split(" ")
        data = runs.draw(config, int(seed))
        if group == "hand-made":
            rows = runs.hand_made(config, parts, data)
        else:
            trained = runs.train(config, parts, data, group, float(lam[0]))
            row = runs.led(parts, data, group, *trained)
            rows = {f"{group} at {lam[0]}": row}
        return _shown(seed, rows)

    names = [f"{seed} hand-made" for seed in seeds]
    for i, lam in enumerate(config.lams):
        own = seeds[: config.num_seeds_beside] if i else seeds
        names += [f"{s} {kind} {lam:g}" for s in own for kind in runs.KINDS]
    if config.num_controllers == 0:
        names = names[: len(seeds)]
    found = schedule_runs.cells(folder, names, measure)
    methods: dict[str, Rows] = {}
    for name, cell in zip(names, found, strict=True):
        for method, row in cell.items():
            methods.setdefault(method, {})[name.split(" ")[0]] = row
    rows = {name: _over_sets(by_seed) for name, by_seed in methods.items()}
    return {"data_seeds": seeds, "rows": rows, "pairs": _pairs(config, rows)}


def untrained(config: Config, folder: Path) -> dict[str, Any]:
    """The spread of what untrained controllers lead to, at each λ on the first set.

    "wide" is another reading of the paper, where it was found to be large.
    """

    def measure(name: str) -> Rows:
        kind, lam = name.split(" ")
        wide = kind == "wide"
        data = runs.draw(config, config.first_seed, wide=wide)
        return runs.spread(config, data, float(lam), wide=wide)

    names = [f"untrained {lam:g}" for lam in config.lams]
    names += [f"wide {lam:g}" for lam in config.wide_lams]
    found = schedule_runs.cells(folder, names, measure)
    for name, cell in zip(names, found, strict=True):
        for row, value in cell.items():
            print(f"{name:15} {row:22} std {value['std']:.4f} "
                  f"range {value['range']:.4f}")  # fmt: skip
    return dict(zip(names, found, strict=True))


def transfer(config: Config, parts: runs.Parts, folder: Path) -> dict[str, Any]:
    """Controllers of each source on every data set, beside schedules tuned there."""
    seeds, lam = _seeds(config), config.lams[0]
    sets = {seed: runs.draw(config, seed) for seed in seeds}

    def measure(name: str) -> Rows:
        seed, group = name.split(" ")
        data = sets[int(seed)]
        if group == "hand-made":
            rows = runs.hand_made(config, parts, data)
            return _shown(seed, rows)
        trained = runs.train(config, parts, data, group, lam)
        return _shown(
            f"{group} from {seed}",
            {str(to): runs.led(parts, sets[to], group, *trained) for to in seeds},
        )

    names = [f"{seed} hand-made" for seed in seeds]
    sources = seeds[: config.num_sources]
    names += [f"{seed} {kind}" for seed in sources for kind in runs.KINDS]
    found = dict(zip(names, schedule_runs.cells(folder, names, measure), strict=True))
    own = [found[f"{seed} hand-made"] for seed in seeds]
    rows = {
        name: _over_sets(
            {str(s): cell[name] for s, cell in zip(seeds, own, strict=True)}
        )
        for name in own[0]
    }
    matrices = {
        kind: [
            [float(np.mean(found[f"{s} {kind}"][str(to)]["test"])) for to in seeds]
            for s in sources
        ]
        for kind in runs.KINDS
    }
    # each data set led by the controllers of all the others
    for kind, matrix in matrices.items():
        away = _away(np.array(matrix))
        if away is not None:
            rows[f"{kind}, from elsewhere"] = {"test": away, "search_runs": 0}
    return {"data_seeds": seeds, "sources": sources, "rows": rows,
            "transfer": matrices, "pairs": _pairs(config, rows)}  # fmt: skip


def _away(matrix: np.ndarray) -> list[float] | None:
    """Of each column the mean of the rows but its own."""
    own = np.eye(*matrix.shape, dtype=bool)
    if matrix.shape[0] < 2:
        return None
    return np.ma.masked_array(matrix, own).mean(0).tolist()


def _over_sets(by_seed: Rows) -> dict[str, Any]:
    """Of one method: means over the runs of each data set."""
    each = list(by_seed.values())
    mean = lambda key: [float(np.mean(np.asarray(row[key], float))) for row in each]
    found = {
        **{key: mean(key) for key in ("test", "last_test", "valid", "share")},
        "settings": [row["setting"] for row in each],
        "search_runs": float(np.mean(mean("search_runs"))),
        "search_steps": float(np.mean(mean("search_steps"))),
        "finite": [int(np.sum([np.sum(row["finite"]) for row in each])),
                   int(np.sum([np.size(row["finite"]) for row in each]))],
        "seeds": list(by_seed),
    }  # fmt: skip
    if np.ndim(each[0]["test"]) == 2:
        found["controllers"] = [np.mean(row["test"], 1) for row in each]
    if len(each) > 1:
        found["interval"] = mean_interval(found["test"])._asdict()
    return found


def _pairs(config: Config, rows: Rows) -> Rows:
    """Learned schedules, and tuned random ones, against the rest over common sets."""
    found = {}
    for a in rows:
        beside = list(BESIDE)
        beside += [
            f"{b} at {lam:g}"
            for lam in config.lams
            for b in AT_LAM
            if a.endswith(f" at {lam:g}")
        ]
        if "elsewhere" in a:
            beside += ["without L1", "context-free, from elsewhere"]
        if not a.startswith(("AutoLoss", "context-free", "random(p*)")):
            continue
        for b in [b for b in beside if b in rows and b != a]:
            num = min(len(rows[a]["test"]), len(rows[b]["test"]))
            pair = (rows[a]["test"][:num], rows[b]["test"][:num])
            found[f"{a} − {b}"] = schedule_runs.paired(*pair)
    return found


def _shown(name: str, rows: Rows) -> Rows:
    for method, row in rows.items():
        setting = " ".join(f"{n}={x:.3g}" for n, x in row["setting"].items())
        print(f"{name:>12} {method:26} test {np.mean(row['test']):.4f} last "
              f"{np.mean(row['last_test']):.4f} share {np.mean(row['share']):.2f} "
              f"{setting}", flush=True)  # fmt: skip
    return rows


def _seeds(config: Config) -> list[int]:
    return [config.first_seed + i for i in range(config.num_seeds)]


def main(argv: Sequence[str] | None = None) -> None:
    config, options = parse(
        Config, presets=PRESETS, argv=argv, description=__doc__, several_devices=True
    )
    run, begin = create_run(options.out, config), time.perf_counter()
    parts = runs.build(config, options.mesh)
    found = (transfer if config.transfer else table)(config, parts, run)
    if config.untrained:
        found["untrained"] = untrained(config, run)
    summary = {"config": config, **found}
    write_summary(run, summary, wall_time=time.perf_counter() - begin)
    for name, pair in found["pairs"].items():
        low, high = pair.get("low", np.nan), pair.get("high", np.nan)
        print(f"{name:56} {pair['mean']:+.4f} [{low:+.4f}, {high:+.4f}] "
              f"wins {pair['wins']} of {pair['n']}")  # fmt: skip
    x = np.arange(config.num_seeds)
    points = {
        name: (x[: len(row["test"])], np.array(row["test"]))
        for name, row in found["rows"].items()
        if not name.startswith("joint") or name == "DGS"
    }
    plot_panels(
        run / "figure.png", {"test error": points}, xlabel="data set",
        ylabel="test error, mean of the runs",
    )  # fmt: skip


if __name__ == "__main__":
    main()
