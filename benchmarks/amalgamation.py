"""Time and memory of a truncation of optimizer amalgamation, and of the exported rule.

    python -m benchmarks.amalgamation              about 7 minutes on 2 cores
    python -m benchmarks.amalgamation --quick      tiny sizes: does it run?
    python -m benchmarks.amalgamation --out DIR    writes DIR/summary.json too

The optimizee is the paper's: a CNN of 18,122 parameters on 28×28 images (random ones
here), batch 128; the student its RNNProp of 5,141 weights. A whole `step` of the loop
is compiled, sampling and meta-update included, and timed inside an unroll, so that no
restart is in it. All cases run in turn, round after round. Columns:

    cpu      least CPU seconds of the process, all threads, per inner step
    ms       least wall milliseconds per inner step
    MB       temporaries by XLA's plan (2^20 bytes)
    s        seconds to compile
    goal     of the project, for the column named

What to expect, by operations as XLA counts them: an inner step without teachers is
3.6 GF with remat (0.24 f0, 0.70 gradient, 1.58 its derivative, 0.20 LSTM, 0.83 its
derivative and what is computed again), each teacher 0.70; at the 60 to 100 GF/s of one
core that is 36 to 60 CPU-ms, and 50 to 83 with two teachers. Passes over memory, 0.4 GB
a step, add about 40: 76 to 100 in all, and 90 to 123. This was counted beside the
measurement, which lies within the first and at the end of the second (RESULTS.md).

What peers take is printed beside it. The figures of google/learned_optimization, its
own truncated step over the same problem and K = 20, were measured by the authors of
metax on another machine of 2 cores: 1.04 CPU-s an inner step as shipped (its RNN-MLP,
Haiku's convolution), .12 with this package's optimizee, 1.3 and 1.7 GB.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metax.amalgamation import amalgamate, pool, rnnprop
from metax.harness import create_run, write_summary
from metax.tasks import optimizees

PEER = {"as shipped": 1.04, "with the same convolution": 0.12}
GOALS = {
    "no teachers": ("cpu", 0.10),
    "2 teachers": ("cpu", 0.15),
    "K=100 block, no teachers": ("MB", 250),
    "K=100 block, 6 teachers": ("MB", 350),
}


class Case(NamedTuple):
    """A truncation to time: what differs from two teachers, K = 20, remat by step."""

    name: str
    teachers: str | None = None
    length: int = 20
    options: Mapping[str, Any] = MappingProxyType({})
    conv: str = "auto"
    timed: bool = True


CASES = (
    Case("no teachers"),
    Case("2 teachers", "small"),
    Case("no teachers, first order", None, options={"second_order": False}),
    Case("no teachers, no remat", None, options={"remat": "none"}),
    Case(
        "no remat, first order", None,
        options={"remat": "none", "second_order": False},
    ),
    Case("2 teachers, first order", "small", options={"second_order": False}),
    Case("2 teachers, no remat", "small", options={"remat": "none"}, timed=False),
    Case("2 teachers, blocks", "small", options={"remat": "block"}),
    Case("6 teachers", "large"),
    Case("K=100 block, no teachers", None, 100, {"remat": "block"}, timed=False),
    Case("K=100 block, 6 teachers", "large", 100, {"remat": "block"}, timed=False),
    Case("no teachers, lax convolution", None, 4, conv="lax"),
)  # fmt: skip


class Compiled(NamedTuple):
    """A compiled step, its arguments, and what XLA says of it."""

    step: Any
    state: Any
    seconds: float
    megabytes: float


def compile_case(case: Case, data: Any, batch_size: int, length: int) -> Compiled:
    conv: Any = case.conv
    task = optimizees.train(conv=conv).task
    # sample fewer rows in a quick run; the network stays what it is
    sample = lambda data, key: jax.tree.map(
        lambda leaf: leaf[:batch_size], task.sample(data, key)
    )
    teachers = {} if case.teachers is None else pool(case.teachers)  # type: ignore[arg-type]
    options = {"remat": "step", **case.options}
    loop = amalgamate(
        task._replace(sample=sample), rnnprop(), teachers, truncation_length=length,
        unroll_length=100 * length, warmup_steps=1, **options,
    )  # fmt: skip
    key = jax.random.key(1)
    state, begin = jax.jit(loop.init)(jax.random.key(0)), time.perf_counter()
    step = jax.jit(loop.step).lower(state, key, data).compile()
    seconds = time.perf_counter() - begin
    memory: Any = step.memory_analysis()
    # the first call restarts the optimizees; the timed ones do not
    state, _ = step(state, key, data) if case.timed else (state, None)
    return Compiled(step, state, seconds, memory.temp_size_in_bytes / 2**20)


def random_images(num: int) -> dict[str, jax.Array]:
    """In the form and the range of MNIST."""
    keys = jax.random.split(jax.random.key(0))
    image = jax.random.randint(keys[0], (num, 28, 28, 1), 0, 256).astype(jnp.uint8)
    return {"image": image, "label": jax.random.randint(keys[1], (num,), 0, 10)}


def clock(run: Callable[[], Any]) -> tuple[float, float]:
    """CPU and wall seconds of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    jax.block_until_ready(run())
    return time.process_time() - cpu, time.perf_counter() - wall


def measure(rounds: int, quick: bool) -> list[dict[str, Any]]:
    """The rows of the table of truncations."""
    data = random_images(64 if quick else 1024)
    if quick:
        data = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * 2), data)
    cases = CASES[:2] if quick else CASES
    lengths = {case.name: 2 if quick else case.length for case in cases}
    ready = {
        c.name: compile_case(c, data, 8 if quick else 128, lengths[c.name])
        for c in cases
    }
    best: dict[str, list[float]] = {}
    for i in range(rounds):
        for case in [case for case in cases if case.timed]:
            one = ready[case.name]
            spent = clock(
                lambda one=one, i=i: one.step(one.state, jax.random.key(i), data)
            )
            old = best.get(case.name, [np.inf, np.inf])
            best[case.name] = [min(pair) for pair in zip(old, spent, strict=True)]
    rows = []
    for case in cases:
        cpu, wall = (x / lengths[case.name] for x in best.get(case.name, [np.nan] * 2))
        compiled = ready[case.name]
        rows.append({
            "case": case.name, "K": lengths[case.name], "cpu": cpu, "ms": 1e3 * wall,
            "MB": compiled.megabytes, "s": compiled.seconds,
            "goal": GOALS.get(case.name),
        })  # fmt: skip
    return rows


def rule_cost(rounds: int, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """One update of the exported rule and of Adam, by the number of parameters."""
    theta = rnnprop().init(jax.random.key(0))
    rules = {"rnnprop": rnnprop().rule(theta), "adam": optax.adam(1e-3)}
    rows = []
    for size in sizes:
        grads = {"w": jax.random.normal(jax.random.key(1), (size,))}
        for name, rule in rules.items():
            update, state = jax.jit(rule.update), rule.init(grads)
            jax.block_until_ready(update(grads, state))
            run = lambda u=update, s=state, g=grads: u(g, s)
            wall = min(clock(run)[1] for _ in range(rounds))
            held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            rows.append({
                "rule": name, "parameters": size, "ms": 1e3 * wall,
                "bytes": held / size,
            })  # fmt: skip
    return rows


def show(rows: list[dict[str, Any]], rules: list[dict[str, Any]]) -> None:
    print(f"{'truncation':32} {'K':>4} {'cpu s':>8} {'ms':>8} {'MB':>8} {'s':>6}  goal")
    for row in rows:
        goal = "" if row["goal"] is None else f"{row['goal'][0]} <= {row['goal'][1]:g}"
        print(
            f"{row['case']:32} {row['K']:4} {row['cpu']:8.4f} {row['ms']:8.1f} "
            f"{row['MB']:8.1f} {row['s']:6.1f}  {goal}"
        )
    cpu = {row["case"]: row["cpu"] for row in rows}
    for name, seconds in PEER.items():
        ratio = seconds / cpu["no teachers"]
        print(f"learned_optimization {name}: {seconds} CPU-s, {ratio:.1f} times ours")
    for full, first in (
        ("no teachers", "no teachers, first order"),
        ("no teachers, no remat", "no remat, first order"),
        ("2 teachers", "2 teachers, first order"),
    ):
        if first in cpu:
            ratio = cpu[full] / cpu[first]
            print(f"second over first order, {full}: {ratio:.2f} (goal 1.4)")
    for row in rules:
        print(
            f"{row['rule']:10} {row['parameters']:9} parameters: {row['ms']:8.2f} ms, "
            f"{row['bytes']:.0f} bytes of state each"
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args(argv)
    begin = time.perf_counter()
    rounds = 1 if flags.quick else flags.rounds
    rows = measure(rounds, flags.quick)
    rules = rule_cost(rounds, (1000,) if flags.quick else (10_000, 100_000, 1_000_000))
    show(rows, rules)
    if flags.out is not None:
        config = {"rounds": rounds, "quick": flags.quick}
        run = create_run(flags.out, config)
        summary = {"config": config, "rows": rows, "rules": rules, "peer": PEER}
        write_summary(run, summary, wall_time=time.perf_counter() - begin)


if __name__ == "__main__":
    main()
