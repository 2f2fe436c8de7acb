"""Delta-STN beside random search, Bayesian optimisation and implicit differentiation.

One network, one space: the dropout rates and the weight decay of an MLP, on digits with
40 % of the training labels corrupted; those of validation stay clean. Searches draw
uniformly from the natural range, decay and learning rate by their logarithms, and each
seed searches for itself. They are judged by the least validation loss over trials and
epochs so far, so they may stop early. Costs are gradients of the plain network, by
floating point operations. The rates are those that validation chose for Delta-STN in
`stn_mnist`.

    fixed_start, fixed_literature    one run
    random_equal                     `num_trials`, together at the cost of `delta_stn`
    random_full, tpe_full            `num_trials`, each of `num_steps`
    random_rate, tpe_rate            likewise; the learning rate is searched as well
    delta_stn                        one run
    delta_stn_decay, implicit_decay  one run, the decay alone, no dropout

    python -m experiments.stn_baselines                      2 minutes, 2 cores
    python -m experiments.stn_baselines --preset results     15 minutes, busy
    python -m experiments.stn_baselines --preset cnn         Fashion-MNIST, SimpleCNN

TPE, of the preset or named by `--methods`, needs optuna (`pip install optuna`).
Expect from `results` least validation losses near .71 for Delta-STN, .70 at the start
values and for TPE, .73 for TPE with the rate, .74 and .79 for the full random search
without and with it, 1.01 for the equal one.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np
import optax

from experiments.judged_runs import (
    QUANTITIES,
    VALID_COST,
    Part,
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
from metax import BilevelProblem, Hyperparameter, Loop, unroll
from metax.harness import (
    append_metrics,
    create_run,
    long_rows,
    parse,
    plot_panels,
    read_metrics,
    write_summary,
)
from metax.implicit import implicit_hypergradient
from metax.stn import constrain, unconstrain
from metax.tasks import ImageTuning, TuningData

METHODS = (
    "fixed_start",
    "fixed_literature",
    "random_equal",
    "delta_stn",
    "implicit_decay",
    "delta_stn_decay",
    "random_full",
    "random_rate",
)


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: Literal["digits", "mnist", "fashion_mnist"] = "digits"
    model: Literal["mlp", "cnn"] = "mlp"
    widths: tuple[int, ...] = (200, 200)
    corrupted: float = 0.4
    methods: tuple[str, ...] = METHODS
    num_trials: int = 20
    num_steps: int = 500
    eval_every: int = 50
    batch_size: int = 128
    learning_rate: float = 0.01
    rate_range: tuple[float, float] = (0.001, 0.1)  # of the searches named *_rate
    momentum: float = 0.9
    outer_rate: float = 0.1
    scale_rate: float = 0.01
    entropy_weight: float = 1e-3
    train_steps: int = 5
    warmup_steps: int = 50
    implicit_every: int = 25
    implicit_products: int = 10
    implicit_damping: float = 0.01
    by_step: bool = False  # runs in turn, no scan, no vmap: no faster any more
    num_seeds: int = 2
    seed: int = 0
    data_dir: str | None = None


PRESETS = {
    "results": Config(
        methods=(*METHODS, "tpe_full", "tpe_rate"), num_steps=1000, num_seeds=3
    ),
    "cnn": Config(
        dataset="fashion_mnist",
        model="cnn",
        corrupted=0.0,
        num_steps=300,
        methods=("random_equal", "delta_stn"),
        outer_rate=0.03,
        warmup_steps=60,
        by_step=True,
        num_seeds=3,
    ),
}
TRAIN_COST = 8 / 3  # of a step of Delta-STN, in plain gradients
RATE = "learning_rate"
TPE_ROUND = 5  # trials that are asked for at once
Values = Mapping[str, Any]
Specs = Mapping[str, Hyperparameter]


def tuning(config: Config, image: np.ndarray, name: str) -> ImageTuning:
    return network(config, image, ["weight_decay"], rates=not name.endswith("_decay"))


def space(config: Config, problem: BilevelProblem, name: str) -> Specs:
    """What a search moves: the hyperparameters, and for `*_rate` the learning rate."""
    rate = Hyperparameter(config.learning_rate, *config.rate_range, "log")
    return {**problem.hparams, **({RATE: rate} if name.endswith("_rate") else {})}


def place(specs: Specs, uniform: Mapping[str, Any]) -> Values:
    """From 0..1 to the natural range; what spans decades by its logarithm."""
    values: dict[str, Any] = {}
    for name, x in uniform.items():
        spec = specs[name]
        low, high, is_log = spec.lower, spec.upper, spec.scale == "log"
        low, high = (np.log(low), np.log(high)) if is_log else (low, high)
        placed = low + np.asarray(x) * (high - low)
        values[name] = np.exp(placed) if is_log else placed
    return values


def implicit_loop(config: Config, problem: BilevelProblem) -> Loop:
    """Alternates `implicit_every` training steps and one of Adam on the raw decay."""
    specs, outer = problem.hparams, optax.adam(config.outer_rate)
    rule = optax.sgd(config.learning_rate, config.momentum)
    plain = lambda values: plain_loop(problem, values, rule)
    natural = lambda raw: constrain(specs, raw)

    def init(key: jax.Array) -> Any:
        raw = unconstrain(specs, {n: spec.init for n, spec in specs.items()})
        return plain(natural(raw)).init(key), raw, outer.init(raw)

    def step(state: Any, key: jax.Array, data: TuningData) -> tuple[Any, Values]:
        (inner, raw, outer_state), values = state, natural(state[1])
        key_run, key_train, key_valid, key_noise = jax.random.split(key, 4)
        keys = jax.random.split(key_run, config.implicit_every)
        inner, _ = unroll(plain(values), inner, keys, data)
        by_natural, _ = implicit_hypergradient(
            problem,
            inner.params,
            values,
            problem.sample_train(data, key_train),
            problem.sample_valid(data, key_valid),
            key=key_noise,
            iterations=config.implicit_products,
            damping=config.implicit_damping,
            curvature="gauss_newton",
        )
        (by_raw,) = jax.vjp(natural, raw)[1](by_natural)
        updates, outer_state = outer.update(by_raw, outer_state, raw)
        raw = optax.apply_updates(raw, updates)
        return (inner, raw, outer_state), natural(raw)

    return Loop(init, step)


def build(config: Config, judged: ImageTuning, name: str, setting: Any) -> Part:
    """One run of a method at (seed, natural values), judged every `eval_every`."""
    (seed, values), num, problem = setting, config.eval_every, judged.problem
    if name == "implicit_decay":
        loop, num = implicit_loop(config, problem), num // config.implicit_every
        weights: Callable = lambda state: state[0].params
    elif name.startswith("delta_stn"):
        tuned = tuned_loop(config, problem, config.learning_rate, config.outer_rate)
        loop = without_scan(config, problem, tuned) if config.by_step else tuned
        num, weights = num // config.train_steps, tuned.params
    else:
        values = dict(values)
        rate = values.pop(RATE, config.learning_rate)
        loop = plain_loop(problem, values, optax.sgd(rate, config.momentum))
        weights = lambda state: state.params
    own = lambda key: jax.random.fold_in(key, seed)
    step = lambda state, key, data: loop.step(state, own(key), data)
    return Part(Loop(lambda key: loop.init(own(key)), step), num, weights)


def cost_of_step(config: Config, name: str) -> float:
    """Plain gradients of a training step; a product with the curvature counts 2."""
    if name == "implicit_decay":
        return 1 + (4 + 2 * (config.implicit_products + 1)) / config.implicit_every
    is_tuned = name.startswith("delta_stn")
    return TRAIN_COST + VALID_COST / config.train_steps if is_tuned else 1.0


def length(config: Config, name: str) -> int:
    """Training steps of a trial, a multiple of `eval_every`."""
    if not name.endswith("_equal"):
        return config.num_steps
    budget = cost_of_step(config, "delta_stn") * config.num_steps / config.num_trials
    return config.eval_every * max(round(budget / config.eval_every), 1)


def run_trials(
    config: Config, data: Any, key: jax.Array, name: str, values: Values, trials: range,
    mesh: Any,
) -> list[dict]:  # fmt: skip
    """Trials from all seeds side by side; `values` are [seeds, trials] each."""
    judged = tuning(config, data.train.image[0], name)
    shape = (config.num_seeds, len(trials))
    settings = np.indices(shape)[0], {n: np.float32(x) for n, x in values.items()}
    one = lambda setting: build(config, judged, name, setting)
    rows, num = jax.tree.map(np.ravel, settings), length(config, name)
    num //= config.eval_every
    how: dict[str, Any] = {"by_step": config.by_step, "mesh": mesh}
    infos, seconds = run_watched(judged, one, rows, data, key, num, 1, name, **how)
    fold = lambda x: np.moveaxis(x[0].reshape(num, *shape), 0, -1)
    measured = {n: fold(x) for n, x in judgements(infos).items()}
    moved = infos.steps if name == "implicit_decay" else {}
    moved = getattr(infos.steps, "hparams", moved)
    kept = {n: np.broadcast_to(x[..., None], (*shape, num)) for n, x in values.items()}
    last = {n: fold(x[..., -1]) for n, x in moved.items()}
    done = [config.eval_every * (i + 1) for i in range(num)]
    axes = {"seed": range(config.num_seeds), "trial": trials, "step": done}
    constant = {"method": name, "seconds": seconds / shape[0] / shape[1]}
    return long_rows({**measured, **kept, **last}, axes, **constant)


def run_search(
    config: Config, data: TuningData, key: jax.Array, name: str, mesh: Any
) -> list[dict]:
    """All trials of a method; a seed searches for itself."""
    problem = tuning(config, data.train.image[0], name).problem
    seeds, rng = config.num_seeds, np.random.default_rng(config.seed)
    specs = space(config, problem, name)
    if name.startswith("tpe"):
        return tpe_search(config, data, key, name, specs, mesh)
    if name.startswith("random"):
        shape = (seeds, config.num_trials)
        values = place(specs, {n: rng.uniform(size=shape) for n in specs})
    else:
        shape = (seeds, 1)
        start = fixed_values(problem, name)
        values = {n: np.full(shape, x) for n, x in start.items()}
    return run_trials(config, data, key, name, values, range(shape[1]), mesh)


def tpe_search(
    config: Config, data: TuningData, key: jax.Array, name: str, specs: Specs, mesh: Any
) -> list[dict]:
    """Optuna's TPE, `TPE_ROUND` trials at once, told their least validation loss."""
    try:
        import optuna  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SystemExit(f"{name} needs optuna: pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = lambda seed: optuna.samplers.TPESampler(seed=seed)
    studies = [optuna.create_study(sampler=sampler(i)) for i in range(config.num_seeds)]
    unit = optuna.distributions.FloatDistribution(0.0, 1.0)
    units: dict[str, Any] = dict.fromkeys(specs, unit)
    rows = []
    for first in range(0, config.num_trials, TPE_ROUND):
        trials = range(first, min(first + TPE_ROUND, config.num_trials))
        asked = [[study.ask(units) for _ in trials] for study in studies]
        read = lambda n, asked=asked: [[t.params[n] for t in own] for own in asked]
        values = place(specs, {n: np.array(read(n)) for n in specs})
        found = run_trials(config, data, key, name, values, trials, mesh)
        losses = np.reshape(
            [r["valid_loss"] for r in found], (len(asked), len(trials), -1)
        )
        losses = np.nan_to_num(losses, nan=1e3).min(-1)
        for study, own, best in zip(studies, asked, losses, strict=True):
            for trial, loss in zip(own, best, strict=True):
                study.tell(trial, float(loss))
        rows += found
    return sorted(rows, key=lambda row: (row["seed"], row["trial"], row["step"]))


def summarise(config: Config, rows: list[dict], name: str) -> dict[str, Any]:
    """Costs, what validation chose at the end and of all, and the best so far."""
    seeds, num = config.num_seeds, length(config, name) // config.eval_every
    columns = {q: np.reshape([r[q] for r in rows], (seeds, -1)) for q in QUANTITIES}
    valid = np.nan_to_num(columns["valid_loss"], nan=np.inf)
    is_last = np.arange(valid.shape[1]) % num == num - 1
    last = np.where(is_last, valid, np.inf)
    chosen = {"final": last.argmin(1), "best": valid.argmin(1)}
    pick = lambda at: {q: x[np.arange(seeds), at] for q, x in columns.items()}
    total = valid.shape[1] * config.eval_every * cost_of_step(config, name)
    seconds = np.mean([row["seconds"] for row in rows]) * valid.shape[1] / num
    best = [np.minimum.accumulate(own) for own in valid]
    names = [n for n in rows[0] if n not in (*QUANTITIES, "method", "seconds")]
    return {
        "gradients": total,
        "seconds": seconds,
        "trials": valid.shape[1] // num,
        "steps": length(config, name),
        **{when: pick(at) for when, at in chosen.items()},
        "chosen": [
            {n: rows[s * valid.shape[1] + at][n] for n in names}
            for s, at in enumerate(chosen["best"])
        ],
        "best_so_far": np.array(best),
    }


def report(run: Any, config: Config, seconds: float) -> None:
    """Prints the table; writes the summary and the figure."""
    rows, outcomes = read_metrics(run), {}
    panels: dict[str, dict] = {"cost in gradients": {}, "cost in seconds": {}}
    for name in config.methods:
        mine = [row for row in rows if row["method"] == name]
        outcome = outcomes[name] = summarise(config, mine, name)
        best = outcome["best_so_far"]
        spent = np.arange(1, best.shape[1] + 1) / best.shape[1]
        for title, unit in zip(panels, ("gradients", "seconds"), strict=True):
            panels[title][name] = spent * outcome[unit], best
        print(f"{name:17} {outcome['gradients']:6.0f} gradients", end="")
        for when in ("final", "best"):
            cells = [f"{q} {np.mean(outcome[when][q]):.3f}" for q in QUANTITIES]
            print(f"  {when}: {' '.join(cells)}", end="")
        print()
    pairs = {when: differences(outcomes, when) for when in ("final", "best")}
    summary = {"config": config, "methods": outcomes, "differences": pairs}
    write_summary(run, summary, wall_time=seconds)
    ylabel = "least validation loss so far"
    plot_panels(run / "figure.png", panels, xlabel="cost", ylabel=ylabel, logx=True)


def main(argv: list[str] | None = None) -> None:
    config, options = parse(
        Config, presets=PRESETS, argv=argv, description=__doc__, several_devices=True
    )
    run, begin = create_run(options.out, config), time.perf_counter()
    key_labels, key = jax.random.split(jax.random.key(config.seed))
    data = prepare(config, key_labels)
    finished = {row["method"] for row in read_metrics(run)}
    for name in [name for name in config.methods if name not in finished]:
        append_metrics(run, run_search(config, data, key, name, options.mesh))
    report(run, config, time.perf_counter() - begin)


if __name__ == "__main__":
    main()
