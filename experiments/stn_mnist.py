"""Dropout and cutout tuned while an image classifier trains, by Delta-STN and others.

Delta-STN, centred STN and STN (`--methods` takes the other three variants as well), and
plain training at fixed rates: the start values, and the literature's (dropout .2 of the
input, .5 elsewhere, no cutout). The last 15 % of the training images validate, the
first `num_train` of the rest train, and of these alone are labels corrupted, the same
ones for all seeds. Each method gets its best pair of `inner_rates` and `outer_rates` by
validation loss. Test figures are those of the last epoch, and of the epoch with the
least validation loss; nothing is selected by them.

    python -m experiments.stn_mnist                               2 minutes, 2 cores
    python -m experiments.stn_mnist --preset digits-corrupted     8 minutes
    python -m experiments.stn_mnist --preset cnn                  43 minutes, busy
    python -m experiments.stn_mnist --preset paper                days; a GPU

Expect on corrupted digits last validation losses near .75 for Delta-STN and for dropout
.05, each at its best rates, and near .79 and 1.06 at the inner rate .03.
From `cnn`, less than an epoch of Fashion-MNIST at one inner rate: .430 for STN, .449 at
the start values, .455 for Delta-STN and centred STN.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax

from experiments.judged_runs import (
    QUANTITIES,
    VALID_COST,
    Part,
    Watched,
    differences,
    fixed_values,
    judgements,
    network,
    plain_loop,
    prepare,
    run_watched,
    tuned_loop,
    without_scan,
)
from metax.harness import (
    append_metrics,
    create_run,
    long_rows,
    parse,
    plot_panels,
    read_metrics,
    write_summary,
)
from metax.stn import silent_hparams, unconstrain
from metax.tasks import ImageTuning, TuningData


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: Literal["digits", "mnist", "fashion_mnist"] = "mnist"
    model: Literal["mlp", "cnn"] = "mlp"
    widths: tuple[int, ...] = (200, 200)
    corrupted: float = 0.0
    num_train: int = 0  # 0: all
    methods: tuple[str, ...] = (
        "delta_stn",
        "centered_stn",
        "stn",
        "fixed_start",
        "fixed_literature",
    )
    num_steps: int = 1000
    eval_every: int = 100
    batch_size: int = 128
    inner_rates: tuple[float, ...] = (0.01,)
    momentum: float = 0.9
    outer_rule: Literal["adam", "rmsprop"] = "adam"
    outer_rates: tuple[float, ...] = (0.03,)
    scale_rate: float = 0.01
    entropy_weight: float = 1e-3
    train_steps: int = 5
    warmup_steps: int = 100
    by_step: bool = False  # runs in turn, no scan, no vmap: no faster any more
    num_seeds: int = 2
    seed: int = 0
    data_dir: str | None = None


GRID = (0.003, 0.01, 0.03)
PAPER = Config(
    widths=(1200, 1200, 1200), num_steps=200_000, eval_every=2000, warmup_steps=1995,
    inner_rates=GRID, outer_rule="rmsprop", outer_rates=(0.01,), num_seeds=5,
)  # fmt: skip
PRESETS = {
    "paper": PAPER,
    "cnn": Config(
        dataset="fashion_mnist", model="cnn", num_steps=300, eval_every=50,
        warmup_steps=60, by_step=True, num_seeds=3,
    ),
    "paper-cnn": dataclasses.replace(
        PAPER, dataset="fashion_mnist", model="cnn", num_steps=80_000
    ),
    "digits-corrupted": Config(
        dataset="digits", corrupted=0.4, num_steps=1450, eval_every=50, num_seeds=5,
        warmup_steps=50, inner_rates=(0.01, 0.03), outer_rates=(0.03, 0.1),
    ),
}  # fmt: skip


class Variant(NamedTuple):
    """The switches of `delta_stn`, and plain steps a training step, by its FLOPs."""

    centered: bool
    split: bool
    linearized: bool
    cost: float


VARIANTS = {
    "delta_stn": Variant(True, True, True, 8 / 3),
    "centered_stn": Variant(True, True, False, 8 / 3),
    "stn": Variant(False, False, False, 2.0),
    "centered_joint_stn": Variant(True, False, False, 2.0),
    "linearized_joint_stn": Variant(True, False, True, 3.0),
    "split_stn": Variant(False, True, False, 8 / 3),
}
OUTER_RULES: dict[str, Callable] = {
    "adam": optax.adam,
    "rmsprop": functools.partial(optax.rmsprop, decay=0.99),
}
FIXED = ("fixed_start", "fixed_literature")


def build(config: Config, judged: ImageTuning, name: str, setting: Any) -> Part:
    """One method at one (inner rate, outer rate), judged every `eval_every` steps."""
    (inner_rate, outer_rate), problem, num = setting, judged.problem, config.eval_every
    if name in FIXED:
        rule = optax.sgd(inner_rate, config.momentum)
        loop = plain_loop(problem, fixed_values(problem, name), rule)
        return Part(loop, num, lambda state: state.params)
    outer = OUTER_RULES[config.outer_rule]
    centered, split, linearized, _ = VARIANTS[name]
    how = {"centered": centered, "split": split, "linearized": linearized}
    tuned = tuned_loop(config, problem, inner_rate, outer_rate, outer, **how)
    loop = without_scan(config, problem, tuned) if config.by_step else tuned
    return Part(loop, num // config.train_steps, tuned.params)


def settings(config: Config, name: str) -> list[tuple[float, float]]:
    """Pairs (inner rate, outer rate); a fixed method has no outer rate."""
    outer_rates = config.outer_rates if name in VARIANTS else (0.0,)
    return list(itertools.product(config.inner_rates, outer_rates))


def measure(
    config: Config, judged: ImageTuning, data: TuningData, key: jax.Array, name: str,
    mesh: Any,
) -> list[dict]:  # fmt: skip
    """Runs a method from all seeds at all settings side by side; rows of metrics."""
    pairs, warned = settings(config, name), []

    def see(infos: Watched) -> None:
        """Names, once, what the first tuned stretch did not move."""
        if name in VARIANTS and not warned and infos.steps.updated.any():
            warned.append(silent_hparams(infos.steps))
            if warned[0]:
                print(f"{name}: no response to {', '.join(warned[0])}")

    one = lambda pair: build(config, judged, name, pair)
    rates = tuple(np.asarray(pairs, np.float32).T)
    num, seeds = config.num_steps // config.eval_every, config.num_seeds
    infos, seconds = run_watched(
        judged,
        one,
        rates,
        data,
        key,
        num,
        seeds,
        name,
        by_step=config.by_step,
        see=see,
        mesh=mesh,
    )
    shape, steps = (seeds, num, len(pairs)), infos.steps
    if name in FIXED:
        values, losses = fixed_values(judged.problem, name), steps.loss
        hparams = {n: np.broadcast_to(x, shape) for n, x in values.items()}
    else:
        losses = steps.train_loss
        hparams = {n: x[..., -1] for n, x in steps.hparams.items()}
    measured = {"train_loss": losses.mean(-1), **judgements(infos), **hparams}
    done = [config.eval_every * (i + 1) for i in range(num)]
    axes = {"seed": range(seeds), "step": done, "setting": range(len(pairs))}
    seconds /= seeds * len(pairs)
    return long_rows(measured, axes, method=name, seconds=seconds)


def gradients(config: Config, name: str) -> float:
    """Cost of a run in gradients of the plain network, by floating point operations."""
    if name in FIXED:
        return config.num_steps
    tuned = max(config.num_steps - config.warmup_steps, 0) // config.train_steps
    train = VARIANTS[name].cost * config.num_steps
    return train + VALID_COST * tuned


def choose(curves: dict[str, np.ndarray], pairs: list, when: str) -> dict[str, Any]:
    """The setting, and at "best" the evaluation, of least validation loss."""
    valid = np.nan_to_num(curves["valid_loss"], nan=np.inf)
    seeds, num, _ = valid.shape
    at = np.full_like(valid[:, 0], num - 1, int) if when == "final" else valid.argmin(1)
    scores = np.take_along_axis(valid, at[:, None], 1)[:, 0].mean(0)
    chosen = int(scores.argmin())
    index = (np.arange(seeds), at[:, chosen], chosen)
    return {
        "setting": chosen,
        "rates": pairs[chosen],
        "valid_loss_by_rates": [[*p, x] for p, x in zip(pairs, scores, strict=True)],
        **{q: curves[q][index] for q in (*QUANTITIES, "train_loss", "step")},
    }


def smooth(specs: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are no counts: a count was rounded, maybe onto its bound."""
    return {n: x for n, x in values.items() if not specs[n].discrete}


def report(run: Any, config: Config, judged: ImageTuning, seconds: float) -> None:
    """Prints the main table; writes the summary and the figures."""
    rows, outcomes, specs = read_metrics(run), {}, judged.problem.hparams
    shape = (config.num_seeds, config.num_steps // config.eval_every, -1)
    panels: dict[str, dict] = {"validation loss": {}, **{n: {} for n in specs}}
    costs: dict[str, dict] = {"validation loss": {}, "test loss": {}}
    for name in config.methods:
        mine, pairs = [r for r in rows if r["method"] == name], settings(config, name)
        columns = (*QUANTITIES, "train_loss", "step", *specs)
        curves = {q: np.reshape([row[q] for row in mine], shape) for q in columns}
        cost = {"gradients": gradients(config, name), "seconds": mine[0]["seconds"]}
        outcome = {when: choose(curves, pairs, when) for when in ("final", "best")}
        at_chosen = {q: x[..., outcome["final"]["setting"]] for q, x in curves.items()}
        steps, tuned = at_chosen["step"][0], {n: at_chosen[n] for n in specs}
        panels["validation loss"][name] = steps, at_chosen["valid_loss"]
        spent = steps / config.num_steps * cost["gradients"]
        for title, q in zip(costs, ("valid_loss", "test_loss"), strict=True):
            costs[title][name] = spent, at_chosen[q]
        if name in VARIANTS:
            raw = {**tuned, **unconstrain(specs, smooth(specs, tuned))}
            outcome["raw_spread"] = {n: raw[n].std(0)[-1] for n in raw}
            panels |= {n: {**panels[n], name: (steps, x)} for n, x in tuned.items()}
        outcome["curves"] = {q: x.mean(0) for q, x in at_chosen.items()}
        outcomes[name] = {**cost, **outcome}
        show(name, outcomes[name])
    pairs = {when: differences(outcomes, when) for when in ("final", "best")}
    summary = {"config": config, "methods": outcomes, "differences": pairs}
    write_summary(run, summary, wall_time=seconds)
    plot = lambda name, shown, xlabel: plot_panels(
        run / name, shown, xlabel=xlabel, ylabel="cross-entropy, or natural value"
    )
    plot("figure.png", panels, "training steps")
    plot("figure_cost.png", costs, "gradients of the plain network")


def show(name: str, outcome: dict[str, Any]) -> None:
    for when in ("final", "best"):
        cells = [f"{q} {np.mean(outcome[when][q]):.4f}" for q in QUANTITIES]
        print(f"{name:16} {when:5} {'  '.join(cells)}  rates {outcome[when]['rates']}")
    cost, seconds = outcome["gradients"], outcome["seconds"]
    print(f"{name:16} {cost:.0f} gradients and {seconds:.1f} s a run")


def main(argv: list[str] | None = None) -> None:
    config, options = parse(
        Config, presets=PRESETS, argv=argv, description=__doc__, several_devices=True
    )
    if config.num_steps % config.eval_every or config.eval_every % config.train_steps:
        raise SystemExit(
            "--eval-every must divide --num-steps and be a multiple of --train-steps"
        )
    run, begin = create_run(options.out, config), time.perf_counter()
    key_labels, key = jax.random.split(jax.random.key(config.seed))
    data = prepare(config, key_labels, config.num_train)
    judged = network(config, data.train.image[0])
    finished = {row["method"] for row in read_metrics(run)}
    for name in [name for name in config.methods if name not in finished]:
        append_metrics(run, measure(config, judged, data, key, name, options.mesh))
    report(run, config, judged, time.perf_counter() - begin)


if __name__ == "__main__":
    main()
