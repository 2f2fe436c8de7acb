"""What `train` and `record_run` cost beside a bare jitted scan of the same step.

    python -m benchmarks.harness              about 2 minutes on 2 cores
    python -m benchmarks.harness --quick      tiny sizes: does it run?
    python -m benchmarks.harness --out DIR    writes DIR/summary.json too

An MLP 784-512-512-10 under Adam, batch 128: a step of some milliseconds, a state of
8 MB. Three ways take the same chunks of the same steps, in turn, in a new order each
round; the first chunk of a way, which compiles, does not count.

    bare      a jitted scan, the state donated, and a wait for its end
    train     the same, by `train`: infos to the host, `is_finite` looked at
    record    the same, by `record_run`: a row and a checkpoint a chunk

Columns, medians over rounds with the first and last decile:

    ms        wall time of a chunk
    cpu       CPU time of a chunk, all threads together
    ratio     quotient of the CPU times to bare's in the same round
    wall      quotient of the wall times to bare's in the same round

A checkpoint is written while the next chunk runs, so it delays a chunk by what the two
take from each other: on a machine whose cores the step keeps busy, that is the CPU time
of a save. `save` is one `save_checkpoint` alone, `copy` what of it the run waits for,
`flush` the wait for the last one at the end of a run; the shortest chunk for which a
save is 5 % follows from its CPU time.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metax.base import Loop, Task, inner_loop, unroll
from metax.harness import (
    create_run,
    record_run,
    save_checkpoint,
    train,
    write_summary,
)
from metax.harness.checkpoint import begin_save

KEY = jax.random.key(0)
GOALS = {"train": 1.03, "record": 1.05}


class Size(NamedTuple):
    """How much is run.

    Attributes:
      widths: of the layers.
      batch: examples a step.
      chunk: steps.
      chunks: that count, of each way in each round.
      rounds: how often each way is run.
    """

    widths: tuple[int, ...]
    batch: int
    chunk: int
    chunks: int
    rounds: int


FULL = Size((784, 512, 512, 10), 128, 250, 3, 5)
QUICK = Size((8, 8, 2), 4, 2, 2, 2)


def build_loop(size: Size) -> Loop:
    def init(key: jax.Array) -> list[jax.Array]:
        keys = jax.random.split(key, len(size.widths) - 1)
        pairs = zip(keys, size.widths[:-1], size.widths[1:], strict=True)
        return [jax.random.normal(k, (n, m)) / np.sqrt(n) for k, n, m in pairs]

    def loss(params: list, batch: tuple, key: jax.Array) -> jax.Array:
        x, y = batch
        for weights in params[:-1]:
            x = jax.nn.relu(x @ weights)
        logits = x @ params[-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def sample(data: tuple, key: jax.Array) -> tuple:
        rows = jax.random.randint(key, (size.batch,), 0, len(data[1]))
        return data[0][rows], data[1][rows]

    task = Task(init, loss, sample, lambda params, data: {})
    return inner_loop(task, optax.adam(1e-3))


def build_data(size: Size) -> tuple[jax.Array, jax.Array]:
    num = 8 * size.batch
    x = jax.random.normal(jax.random.key(1), (num, size.widths[0]))
    return x, jax.random.randint(jax.random.key(2), (num,), 0, size.widths[-1])


def now() -> np.ndarray:
    """Milliseconds of wall and of CPU time."""
    return 1e3 * np.array([time.perf_counter(), time.process_time()])


def run_bare(loop: Loop, data: Any, size: Size, stamps: list) -> None:
    def many(state: Any, key: jax.Array, first: jax.Array, data: Any) -> Any:
        steps = first + jnp.arange(size.chunk)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(steps)
        return unroll(loop, state, keys, data)

    key_init, key_run = jax.random.split(KEY)
    state = jax.jit(loop.init)(key_init)
    run = jax.jit(many, donate_argnums=0)
    for index in range(size.chunks + 1):
        state, infos = run(state, key_run, index * size.chunk, data)
        jax.block_until_ready((state, infos))
        stamps.append(now())


def run_train(loop: Loop, data: Any, size: Size, stamps: list) -> None:
    steps = size.chunk * (size.chunks + 1)
    stamp = lambda *_: stamps.append(now())
    train(loop, data, KEY, steps, chunk=size.chunk, on_chunk=stamp)


def run_record(loop: Loop, data: Any, size: Size, stamps: list) -> np.ndarray:
    """Milliseconds from the end of the last chunk until everything is written."""

    def rows(step: int, state: Any, infos: Any) -> list[dict[str, Any]]:
        stamps.append(now())
        return [{"step": step, "loss": infos.loss.mean()}]

    steps = size.chunk * (size.chunks + 1)
    with tempfile.TemporaryDirectory() as folder:
        record_run(folder, loop, data, KEY, steps, chunk=size.chunk, rows=rows)
        return now() - stamps[-1]


def compare(size: Size) -> dict[str, Any]:
    loop, data = build_loop(size), jax.device_put(build_data(size))
    ways: dict[str, Callable[..., Any]] = {
        "bare": run_bare,
        "train": run_train,
        "record": run_record,
    }
    state = jax.jit(loop.init)(KEY)
    save = _saves(state, size.rounds)  # and Orbax is imported
    rng = np.random.default_rng(0)
    times: dict[str, list] = {name: [] for name in ways}
    flushes = []
    for _ in range(size.rounds):
        for name in rng.permutation(list(ways)):
            stamps: list[np.ndarray] = []
            flush = ways[name](loop, data, size, stamps)
            times[name].append((stamps[-1] - stamps[0]) / size.chunks)
            if flush is not None:
                flushes.append(flush)
    return {
        "rows": [_columns(name, times) for name in ways],
        "save": save,
        "flush": _spread(np.array(flushes)[:, 0]),
        "megabytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6,
    }


def _columns(name: str, times: dict[str, list]) -> dict[str, Any]:
    wall, cpu = np.array(times[name]).T
    bare_wall, bare_cpu = np.array(times["bare"]).T
    return {
        "way": name,
        "ms": _spread(wall),
        "cpu": _spread(cpu),
        "ratio": _spread(cpu / bare_cpu),
        "wall": _spread(wall / bare_wall),
    }


def _saves(state: Any, rounds: int) -> dict[str, list[float]]:
    saves, copies = [], []
    with tempfile.TemporaryDirectory() as folder:
        for step in range(rounds + 1):
            begin = now()
            begin_save(folder, step, state)
            copies.append(now() - begin)
            begin = now()
            save_checkpoint(folder, step, state, keep=3)
            saves.append(now() - begin)
    wall, cpu = np.array(saves[1:]).T
    return {
        "ms": _spread(wall),
        "cpu": _spread(cpu),
        "copy": _spread(np.array(copies[1:])[:, 1]),
    }


def _spread(values: np.ndarray) -> list[float]:
    """Median, first and last decile."""
    return [float(x) for x in np.percentile(values, [50, 10, 90])]


def _text(values: list[float], digits: int = 1) -> str:
    middle, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} [{low}, {high}]"


def show(summary: dict[str, Any]) -> None:
    print(f"{'way':8} {'ms':>26} {'cpu':>26} {'ratio':>22} {'wall':>22}")
    for row in summary["rows"]:
        goal = GOALS.get(row["way"])
        print(
            f"{row['way']:8} {_text(row['ms']):>26} {_text(row['cpu']):>26} "
            f"{_text(row['ratio'], 3):>22} {_text(row['wall'], 3):>22}"
            + ("" if goal is None else f"  goal {goal}")
        )
    save = summary["save"]
    print(
        f"save of {summary['megabytes']:.1f} MB: {_text(save['ms'])} ms, CPU "
        f"{_text(save['cpu'])} ms (copy {_text(save['copy'])}); "
        f"flush {_text(summary['flush'])} ms; 5 % of a chunk whose CPU time is "
        f"{20 * save['cpu'][0] / 1e3:.1f} s"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The harness, timed.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--chunk", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args(argv)
    size = QUICK if flags.quick else FULL
    size = size._replace(
        chunk=flags.chunk or size.chunk, rounds=flags.rounds or size.rounds
    )
    begin, load = time.perf_counter(), os.getloadavg()[0]
    config = {"quick": flags.quick, **size._asdict()}
    summary = {"config": config, **compare(size)}
    summary["load"] = [load, os.getloadavg()[0]]
    show(summary)
    print(f"load {load:.1f} before, {summary['load'][1]:.1f} after")
    if flags.out is not None:
        run = create_run(flags.out, config)
        write_summary(run, summary, wall_time=time.perf_counter() - begin)


if __name__ == "__main__":
    main()
