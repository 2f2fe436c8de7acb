"""Time and memory traffic of hypergradient rules, against the limit and against peers.

    python -m benchmarks.hypergradient                       about 2 minutes on 2 cores
    python -m benchmarks.hypergradient --sizes 100000000     on a GPU
    python -m benchmarks.hypergradient --out DIR             writes DIR/summary.json too

One step is `rule.update` and `optax.apply_updates`, compiled, on float32 parameters,
with the gradients as inputs; parameters and state are donated. All rules of a size run
in turn, again and again, and the median is printed, so that other load on the machine
hits them alike. Columns:

    ms        median time of a step
    ratio     to the plain rule of the same family in the same run
    limit     ratio of the words (4 bytes) that must move: of the gradient, parameters
              and state read and written, HD being unable to do with fewer than two
              passes over the gradient
    stream    ratio of the words that do move in one loop an array on a machine whose
              caches fetch a line before writing it: the prediction for arrays that no
              cache holds
    words     per parameter, read and written, by XLA's own count
    temp      temporaries, in copies of the parameters
    state     state, in copies of the parameters

Below that, the compilations that eight steps with eight learning rates needed.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from metax.harness import create_run, write_summary
from metax.hypergradient import adam_hd, sgd_hd


class Row(NamedTuple):
    """A rule, its family, and the words a parameter it must and will move."""

    build: Callable[[], optax.GradientTransformation]
    family: str
    limit: float | None = None
    stream: float | None = None


MUL: dict[str, Any] = {"rule": "multiplicative"}
# Plain SGD reads p and g and writes p. HD reads g and d for the inner product, then g
# and p again and writes p and d: 5 words if d were the gradient's own buffer, 6 with d
# written, 8 where that is a loop of its own (g read, d fetched and written, then p, g
# read and p written). The others likewise.
ROWS = {
    "sgd": Row(lambda: optax.sgd(1e-3), "sgd", 3, 3),
    "sgd_hd": Row(lambda: sgd_hd(1e-3, 1e-9), "sgd", 6, 8),
    "sgd_hd multiplicative": Row(lambda: sgd_hd(1e-3, 0.02, **MUL), "sgd", 6, 10),
    "sgd_hd bfloat16 direction": Row(
        lambda: sgd_hd(1e-3, 1e-9, direction_dtype=jnp.bfloat16), "sgd", 5, 6.5
    ),
    "sgd_hd element": Row(lambda: sgd_hd(1e-3, 1e-9, scope="element"), "sgd", 7, None),
    "sgdn": Row(lambda: optax.sgd(1e-3, 0.9, True), "sgdn", 5, None),
    "sgdn_hd": Row(lambda: sgd_hd(1e-3, 1e-9, 0.9, True), "sgdn", 8, None),
    "adam": Row(lambda: optax.adam(1e-3), "adam", 7, 10),
    "adam_hd": Row(lambda: adam_hd(1e-3, 1e-12), "adam", 10, 16),
    "adam_hd multiplicative": Row(lambda: adam_hd(1e-3, 0.02, **MUL), "adam", 10, 18),
    "mechanize sgd": Row(lambda: contrib.mechanize(optax.sgd(1.0)), "sgd"),
    "schedule_free_sgd": Row(lambda: contrib.schedule_free_sgd(1e-3), "sgd"),
    "dog": Row(lambda: contrib.dog(1.0), "sgd"),
    "prodigy": Row(lambda: contrib.prodigy(), "adam"),
    "dadapt_adamw": Row(lambda: contrib.dadapt_adamw(), "adam"),
}


class Compiled(NamedTuple):
    """A compiled step with its arguments, and what XLA says of it."""

    step: Any
    arguments: list
    words: float
    temp: float
    state: float


def leaves_of(size: int, num_leaves: int, value: float) -> list[jax.Array]:
    """`num_leaves` matrices with `size` numbers in all, up to rounding."""
    columns = max(size // num_leaves // 1000, 1)
    rows = size // num_leaves // columns
    return [jnp.full((rows, columns), value, jnp.float32) for _ in range(num_leaves)]


def compile_step(row: Row, params: list, grads: list) -> Compiled:
    rule = optax.with_extra_args_support(row.build())
    params = jax.tree.map(jnp.copy, params)
    # A copy: some peers keep the parameters they were given, which donation deletes.
    state = jax.tree.map(jnp.copy, jax.jit(rule.init)(params))

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = rule.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = (
        jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grads).compile()
    )
    size = optax.tree.size(params)
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return Compiled(
        step=compiled,
        arguments=[params, state],
        words=cost.get("bytes accessed", np.nan) / 4 / size if cost else np.nan,
        temp=memory.temp_size_in_bytes / 4 / size if memory else np.nan,
        state=sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 4 / size,
    )


def measure(size: int, num_leaves: int, num_rounds: int) -> list[dict[str, Any]]:
    params, grads = (leaves_of(size, num_leaves, value) for value in (1.0, 0.01))
    steps = {name: compile_step(row, params, grads) for name, row in ROWS.items()}
    times: dict[str, list[float]] = {name: [] for name in ROWS}
    for _ in range(num_rounds):
        for name, compiled in steps.items():
            # As in training, a step finds its arrays where the last one left them.
            again = [_timed(compiled, grads) for _ in range(6)][1:]
            times[name].append(float(np.median(again)))
    rows = [
        {"parameters": f"{size:.0e}", "leaves": num_leaves, "rule": name}
        | _columns(name, steps[name], times)
        for name in ROWS
    ]
    for row in [dict(zip(rows[0], rows[0], strict=True)), *rows]:
        print(
            f"{row['rule']:27}"
            + "".join(f"{cell:>8}" for cell in list(row.values())[3:])
        )
    return rows


def _timed(compiled: Compiled, grads: list) -> float:
    begin = time.perf_counter()
    compiled.arguments[:] = compiled.step(*compiled.arguments, grads)
    jax.block_until_ready(compiled.arguments)
    return 1e3 * (time.perf_counter() - begin)


def _columns(
    name: str, this: Compiled, times: dict[str, list[float]]
) -> dict[str, str]:
    row, plain = ROWS[name], ROWS[ROWS[name].family]
    low, middle, high = np.percentile(times[name], [10, 50, 90])
    return {
        "ms": f"{middle:.3f}",
        "p10": f"{low:.3f}",
        "p90": f"{high:.3f}",
        # Of one round each: load that comes and goes hits both sides of a quotient.
        "ratio": f"{np.median(np.divide(times[name], times[row.family])):.2f}",
        "limit": _quotient(row.limit, plain.limit),
        "stream": _quotient(row.stream, plain.stream),
        "words": f"{this.words:.1f}",
        "temp": f"{this.temp:.2f}",
        "state": f"{this.state:.2f}",
    }


def _quotient(words: float | None, plain: float | None) -> str:
    return "" if words is None or plain is None else f"{words / plain:.2f}"


def compilations() -> int:
    """Counts the traces of eight jitted steps with eight learning rates."""
    traces = []

    @jax.jit
    def step(alpha: Any, beta: Any, params: Any, grads: Any) -> Any:
        traces.append(1)
        rule = sgd_hd(alpha, beta)
        return rule.update(grads, rule.init(params), params)

    x = jnp.ones(10)
    for alpha in np.logspace(-8, -1, 8):
        step(alpha, alpha / 10, x, x)
    return len(traces)


def main() -> None:
    parser = argparse.ArgumentParser(description="Rules, timed.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--leaves", type=int, nargs="+", default=[1, 50])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    config = {"sizes": arguments.sizes, "leaves": arguments.leaves}
    run = None if arguments.out is None else create_run(arguments.out, config)
    begin, device, rows = time.perf_counter(), jax.devices()[0], []
    print(
        f"jax {jax.__version__}, {device.device_kind}, {jax.device_count()} device(s)"
    )
    for size in arguments.sizes:
        for num_leaves in arguments.leaves:
            print(f"\n{size:.0e} parameters, {num_leaves} leaves")
            rows += measure(size, num_leaves, arguments.rounds)
    print(f"\ncompilations for eight learning rates: {compilations()}")
    if run is not None:
        seconds = time.perf_counter() - begin
        write_summary(run, {"config": config, "rows": rows}, wall_time=seconds)


if __name__ == "__main__":
    main()
