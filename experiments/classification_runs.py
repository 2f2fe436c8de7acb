"""What the classification experiment on learned schedules runs, on one data set.

No script, and not to be run. The test split enters where a row is scored, after all
choices; what searches and what leads is given data without it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from sklearn.datasets import make_classification

from experiments import schedule_runs
from metax import Loop
from metax.autoloss import (
    always,
    bernoulli,
    bind,
    cycle,
    features,
    joint,
    running_norm,
)
from metax.harness import shard
from metax.harness.parallel import check_share
from metax.harness.processes import all_on_host
from metax.tasks import FiveWay, classification, controller_data, join_splits, task_data

KINDS = ("AutoLoss", "context-free")
CONTROLLERS = 50  # untrained ones, for the spread
# Another reading of the paper: many inputs, and a penalty of hundreds in the features.
WIDE = {"hidden": 100, "num_features": 1600, "optimizer": optax.adam(5e-3)}
WIDE_SIZES, WIDE_STEPS = (500, 1000, 500, 1000, 1000), 50

Row = dict[str, Any]


class Parts(NamedTuple):
    """The compiled parts, which all data sets share; see `schedule_runs`.

    Attributes:
      hand_made: how runs of each schedule are led.
      learn: by kind, how controllers are trained.
      lead: by kind, how they lead.
      score: the accuracy of parameters on the test split.
    """

    hand_made: dict[str, Callable]
    learn: dict[str, Callable]
    lead: dict[str, Callable]
    score: Callable


class Set(NamedTuple):
    """One data set with its keys; no two of these are used for the same thing.

    Attributes:
      splits: all five.
      search: those of the task but for the test split.
      search_keys: of the initialisations of a search.
      final_keys: of those that count, which all methods share.
      act_key: of the policies.
      learn_key: of the controllers.
    """

    splits: FiveWay
    search: dict[str, Any]
    search_keys: jax.Array
    final_keys: jax.Array
    act_key: jax.Array
    learn_key: jax.Array


def draw(config: Any, seed: int, *, wide: bool = False) -> Set:
    """The authors' generator: two informative features, two redundant, 28 of noise.

    Or, `wide`, 16 and 16 of 1600.
    """
    sizes = WIDE_SIZES if wide else (200, 1000, 200, 1000, 1000)
    informative, total = (16, 1600) if wide else (2, 32)
    inputs, labels = make_classification(
        sum(sizes),
        total,
        n_informative=informative,
        n_redundant=informative,
        random_state=seed,
    )
    splits = classification.from_arrays(inputs, labels, sizes=sizes)
    search = {"train": splits.task_train, "valid": splits.task_valid}
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), seed), 4)
    return Set(
        splits=splits,
        search=search,
        search_keys=jax.random.split(keys[0], 1),
        final_keys=jax.random.split(keys[1], config.num_guided),
        act_key=keys[2],
        learn_key=keys[3],
    )


def build(config: Any, mesh: Any = None) -> Parts:
    """Over several devices runs are spread, of controllers those of each update."""
    problem = classification.problem
    made = {
        "joint": lambda s: (joint()(problem(s["lam"])), always(0)),
        "random": lambda s: (problem(s["lam"]), bernoulli(s["p"])),
        "alternate": lambda s: (problem(s["lam"]), cycle((1, 1))),
    }
    if config.num_controllers:  # now, and not after the runs made by hand
        check_share("--num-rollouts", config.num_rollouts, mesh)
    learn, lead = {}, {}
    seen = schedule_runs.seen_by(config, "classification")
    for kind in KINDS:
        net = schedule_runs.network(config, kind)
        one = lambda lam, net=net: schedule_runs.loop_of(
            config, problem(lam), net, seen
        )
        shared = lambda lam, one=one: over_devices(one(lam), config.num_rollouts, mesh)
        learn[kind] = schedule_runs.learner(shared, config.num_updates)
        led = schedule_runs.guided(problem, net, seen)
        lead[kind] = schedule_runs.leader(led, config.num_steps, mesh=mesh)
    return Parts(
        hand_made={
            name: schedule_runs.leader(make, config.num_steps, mesh=mesh)
            for name, make in made.items()
        },
        learn=learn,
        lead=lead,
        score=schedule_runs.scorer(problem(), "test_accuracy"),
    )


def over_devices(loop: Loop, num_rollouts: int, mesh: Any) -> Loop:
    """Each device makes its share of the runs of an update."""
    return loop if mesh is None else shard(loop, mesh, num_rollouts)


def hand_made(config: Any, parts: Parts, data: Set) -> dict[str, Row]:
    """The joint loss and random orders, each tuned by as many runs as it has settings.

    Beside them what needs no search: no penalty, on the training rows or on those of
    both splits; the same at each λ of the controllers; and turns of one step.
    """
    low, high = config.lam_range
    fine = np.geomspace(low, high, config.num_lams)
    best, won = _searched(parts, data, "joint", {"lam": fine})
    fixed = {f"joint at {x:g}": (0, {"lam": x}) for x in config.joint_lams}
    rows = _led(config, parts, data, "joint", {
        "without L1": (0, {"lam": 0.0}), "DGS": best(fine > 0), **fixed,
    })  # fmt: skip
    # by itself: near the edge of collapse a λ may win that would mostly have lost
    rows["DGS, the run that won"] = won
    coarse = np.geomspace(low, high, config.num_coarse)
    pairs = np.meshgrid(np.append(coarse, config.lams), config.chances)
    lam, p = (x.ravel() for x in pairs)
    best, _ = _searched(parts, data, "random", {"lam": lam, "p": p})
    chosen = {"random(p*)": best(lam > 0)}
    for x in config.lams:
        chosen[f"random(p*) at {x:g}"] = best(lam == x)
        chosen[f"random(.5) at {x:g}"] = (0, {"lam": x, "p": 0.5})
    rows |= _led(config, parts, data, "random", chosen)
    turns = {f"alternate at {x:g}": (0, {"lam": x}) for x in config.lams}
    rows |= _led(config, parts, data, "alternate", turns)
    both = join_splits(data.search["train"], data.search["valid"])
    data = data._replace(search={"train": both, "valid": both})
    name = "without L1, train and valid"
    rows |= _led(config, parts, data, "joint", {name: (0, {"lam": 0.0})})
    # nothing is left to choose a check by: what counts is the end
    rows[name]["test"] = rows[name]["last_test"]
    return rows


def train(config: Any, parts: Parts, data: Set, kind: str, lam: float) -> Any:
    """Controllers as `lead` takes them, and what their training was."""
    keys = jax.random.split(data.learn_key, config.num_controllers)
    lams = np.full(len(keys), lam)
    data_of = controller_data(data.splits)
    learned = all_on_host(parts.learn[kind](lams, keys, data_of))
    kept = np.full(len(keys), config.num_updates)
    if config.kept_over:
        kept = schedule_runs.kept_updates(learned, config.kept_over, maximize=True)
    per_run = learned.num_steps[..., 0].size * config.num_rollouts
    return schedule_runs.held(lams, learned, kept), {
        "search_runs": per_run // len(keys),
        "search_steps": int(np.asarray(learned.num_steps, np.int64).sum()) / len(keys),
        "updates": kept,
        "curve": 1 - np.asarray(learned.metric).mean(-1),
    }


def led(parts: Parts, data: Set, kind: str, controllers: Any, training: Row) -> Row:
    """What runs led by trained controllers come to, by [controller, run]."""
    runs = parts.lead[kind](controllers, data.final_keys, data.act_key, data.search)
    setting = {"lam": float(controllers[0][0])}
    return _row(parts, data, runs, slice(None), setting) | training


def spread(config: Any, data: Set, lam: float, *, wide: bool = False) -> dict[str, Row]:
    """Runs led by controllers that have learned nothing, from one initialisation."""
    problem = classification.problem(lam, **(WIDE if wide else {}))
    net = schedule_runs.network(config)
    keys = jax.random.split(data.learn_key, CONTROLLERS)
    accuracy = schedule_runs.scorer(problem, "valid_accuracy")
    sets = {"paper": features.paper(2)}
    if not wide:
        sets["released"] = features.released("classification")
    rows = {}
    for name, seen in sets.items():
        phi = jax.vmap(lambda key, n=seen.spec.size: net.init(key, n))(keys)
        for normed, own in {"": seen, ", normalised": running_norm(seen)}.items():
            lead = schedule_runs.leader(
                lambda phi, own=own: (problem, bind(net, phi, own)),
                WIDE_STEPS if wide else config.num_steps,
            )
            runs = lead(phi, data.final_keys[:1], data.act_key, data.search)
            final = np.asarray(accuracy(runs.params, data.search))[:, 0]
            share = np.asarray(runs.share)[:, 0]
            rows[name + normed] = {
                "lam": lam,
                "accuracy": final,
                "std": float(final.std(ddof=1)),
                "range": float(np.ptp(final)),
                "best_std": float(np.asarray(runs.metric)[:, 0].std(ddof=1)),
                "share": [float(share.min()), float(share.max())],
            }
    return rows


def _searched(
    parts: Parts, data: Set, name: str, settings: Any
) -> tuple[Callable, Row]:
    """`best(where)` of a grid: how many settings those are, and the best of them.

    And the row of the best run of all by itself.
    """
    lead = parts.hand_made[name]
    runs = lead(settings, data.search_keys, data.act_key, data.search)

    def best(where: np.ndarray) -> tuple[int, dict[str, float]]:
        index = np.flatnonzero(where)
        some = schedule_runs.of_setting(runs, index)
        found = index[schedule_runs.best_setting(some, maximize=True)]
        return len(index), {key: float(x[found]) for key, x in settings.items()}

    index = schedule_runs.best_setting(runs, maximize=True)
    setting = {key: float(x[index]) for key, x in settings.items()}
    searched = len(runs.metric)
    return best, _row(parts, data, runs, index, setting) | {
        "search_runs": searched,
        "search_steps": int(np.asarray(runs.num_steps, np.int64).sum()),
    }


def _led(
    config: Any, parts: Parts, data: Set, name: str, chosen: dict[str, tuple[int, Any]]
) -> dict[str, Row]:
    """The runs that count, of settings that were each chosen from so many."""
    stack = lambda *values: np.array(values, np.float32)
    settings = jax.tree.map(stack, *(setting for _, setting in chosen.values()))
    lead = parts.hand_made[name]
    runs = lead(settings, data.final_keys, data.act_key, data.search)
    return {
        method: _row(parts, data, runs, i, setting)
        | {"search_runs": searched, "search_steps": searched * config.num_steps}
        for i, (method, (searched, setting)) in enumerate(chosen.items())
    }


def _row(parts: Parts, data: Set, runs: Any, index: Any, setting: Any) -> Row:
    """What is kept of runs; the test split is read here and nowhere else."""
    own = schedule_runs.of_setting(runs, index)
    whole = task_data(data.splits)
    error = lambda params: 1 - parts.score(params, whole)
    return {
        "setting": setting,
        "test": error(own.best_params),
        "last_test": error(own.params),
        "valid": 1 - own.metric,
        "share": own.share,
        "finite": own.is_finite,
    }
