"""Dropout tuned by Delta-STN from several starts, beside dropout that stays there.

All dropout rates of an MLP start at one of `starts`, on digits with 40 % of the
training labels corrupted, at the rates that validation chose for Delta-STN in
`stn_mnist`. The starts run side by side, by a vmap of `replace_hparams`, with the same
weights and batches.

    python -m experiments.stn_starts                      4 minutes, busy

Expect last validation losses of .77 to .79 from every start, where dropout that stays
comes to .72 at .1, .75 at .05 and 1.57 at .7.
"""

import dataclasses
import time
from typing import Any, Literal

import jax
import numpy as np
import optax

from experiments.judged_runs import (
    QUANTITIES,
    Part,
    judgements,
    network,
    plain_loop,
    prepare,
    run_watched,
    tuned_loop,
)
from metax import Loop
from metax.harness import (
    append_metrics,
    create_run,
    long_rows,
    paired_difference,
    parse,
    plot_panels,
    read_metrics,
    write_summary,
)
from metax.stn import replace_hparams
from metax.tasks import ImageTuning

METHODS = ("delta_stn", "fixed")


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: Literal["digits", "mnist", "fashion_mnist"] = "digits"
    model: Literal["mlp", "cnn"] = "mlp"
    widths: tuple[int, ...] = (200, 200)
    corrupted: float = 0.4
    starts: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
    num_steps: int = 1000
    eval_every: int = 50
    batch_size: int = 128
    learning_rate: float = 0.01
    momentum: float = 0.9
    outer_rate: float = 0.1
    scale_rate: float = 0.01
    entropy_weight: float = 1e-3
    train_steps: int = 5
    warmup_steps: int = 50
    num_seeds: int = 3
    seed: int = 0
    data_dir: str | None = None


def build(config: Config, judged: ImageTuning, name: str, start: Any) -> Part:
    """A method whose dropout rates all start, or stay, at `start`."""
    problem, num = judged.problem, config.eval_every
    values = dict.fromkeys(problem.hparams, start)
    if name == "fixed":
        rule = optax.sgd(config.learning_rate, config.momentum)
        return Part(plain_loop(problem, values, rule), num, lambda state: state.params)
    tuned = tuned_loop(config, problem, config.learning_rate, config.outer_rate)
    loop = Loop(lambda key: replace_hparams(tuned.init(key), values), tuned.step)
    return Part(loop, num // config.train_steps, tuned.params)


def measure(
    config: Config, judged: ImageTuning, data: Any, key: jax.Array, name: str, mesh: Any
) -> list[dict]:
    one = lambda start: build(config, judged, name, start)
    num, seeds = config.num_steps // config.eval_every, config.num_seeds
    starts = np.asarray(config.starts, np.float32)
    infos, seconds = run_watched(
        judged, one, starts, data, key, num, seeds, name, mesh=mesh
    )
    if name == "fixed":
        rates = np.broadcast_to(starts, (seeds, num, len(starts)))
        hparams = dict.fromkeys(judged.problem.hparams, rates)
    else:
        hparams = {n: x[..., -1] for n, x in infos.steps.hparams.items()}
    done = [config.eval_every * (i + 1) for i in range(num)]
    axes = {"seed": range(seeds), "step": done, "start": config.starts}
    return long_rows(
        {**judgements(infos), **hparams}, axes, method=name, seconds=seconds
    )


def last_of(config: Config, rows: list[dict], names: list[str]) -> dict[str, Any]:
    """By method: each column after the last step, [seeds, starts]."""
    shape, ends = (config.num_seeds, -1, len(config.starts)), {}
    for method in METHODS:
        mine = [row for row in rows if row["method"] == method]
        column = lambda q, mine=mine: np.reshape([row[q] for row in mine], shape)
        last = {q: column(q)[:, -1] for q in (*QUANTITIES, *names)}
        ends[method] = {**last, "seconds": mine[0]["seconds"]}
    return ends


def report(run: Any, config: Config, names: list[str], seconds: float) -> None:
    """Prints what each start came to; writes the summary and the figure."""
    ends = last_of(config, read_metrics(run), names)
    tuned, fixed = (ends[method] for method in METHODS)
    less = lambda q: [
        paired_difference(a, b) for a, b in zip(tuned[q].T, fixed[q].T, strict=True)
    ]
    differences = {q: less(q) for q in QUANTITIES}
    for at, start in enumerate(config.starts):
        cells = [f"{q} {tuned[q][:, at].mean():.3f}" for q in ("valid_loss", *names)]
        kept = fixed["valid_loss"][:, at].mean()
        print(f"from {start:g}: {'  '.join(cells)}; fixed: valid_loss {kept:.3f}")
    summary = {"config": config, "methods": ends, "differences": differences}
    write_summary(run, summary, wall_time=seconds)
    panels = {
        q: {method: (config.starts, ends[method][q]) for method in METHODS}
        for q in ("valid_loss", *names)
    }
    ylabel = "after the last step"
    plot_panels(run / "figure.png", panels, xlabel="start", ylabel=ylabel, logx=True)


def main(argv: list[str] | None = None) -> None:
    config, options = parse(
        Config, argv=argv, description=__doc__, several_devices=True
    )
    run, begin = create_run(options.out, config), time.perf_counter()
    key_labels, key = jax.random.split(jax.random.key(config.seed))
    data = prepare(config, key_labels)
    judged = network(config, data.train.image[0])
    finished = {row["method"] for row in read_metrics(run)}
    for name in [name for name in METHODS if name not in finished]:
        append_metrics(run, measure(config, judged, data, key, name, options.mesh))
    names = list(judged.problem.hparams)
    report(run, config, names, time.perf_counter() - begin)


if __name__ == "__main__":
    main()
