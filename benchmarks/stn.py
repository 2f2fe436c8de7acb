"""Time, operations and memory of Self-Tuning Networks, against plain training.

    python -m benchmarks.stn                    about 4 minutes on 2 cores
    python -m benchmarks.stn --cutout           the CNN with cutout tuned as well
    python -m benchmarks.stn --quick            tiny sizes: does it run?
    python -m benchmarks.stn --out DIR          writes DIR/summary.json too

Two models on random images: an MLP 784-1200-1200-1200-10 and a small CNN, batch 128,
with every dropout rate tuned. A step is timed as training runs it, in a `lax.scan` of
four over a state that is donated; all steps of a model run in turn, again and again.
Plain is SGD with momentum on the same model with the same dropouts. Columns:

    ms       median wall time of a step, with the first and last decile
    cpu      median of the process's CPU time, all threads together
    ratio    median quotient of the CPU times to plain's in the same round
    GFLOP    by XLA's own count, and its ratio to plain's
    limit    the ratio of the products that must be done (below)
    MB       temporaries of a step by itself, by XLA's plan, nothing donated (neither
             state counts), and those beyond plain's
    authors  wall times of the authors' PyTorch code on another, quiet machine

F are the operations of all layers forward, F₁ of the first, which needs no gradient in
its input. A response pass calls every layer once more, for W_r x:

    plain          Wx, dW, Wᵀg                                    3F −  F₁
    STN            Wx, W_r x, two dW, two Wᵀg                     6F − 2F₁
    Delta-STN      plain, and Wx, W_r x, Wẋ, dW_r, Wᵀg            8F − 3F₁
    centred STN    plain, and Wx, W_r x, dW_r, two Wᵀg            8F − 3F₁
    valid, noisy   Wx, W_r x, two Wᵀg                             4F − 2F₁
    valid, plain   a gradient, and Φᵀg                            3F −  F₁

Prediction, made before measuring: 2.64 for Delta-STN on the MLP by products (7.13 by
2.70 GFLOP). All else a step does is done twice, so it pulls towards 2: random masks,
and the optimizers, which read gradient, momentum and weights and write two of them (77
MB for w0, as many for Φ). So 2.5 to 2.6, were every pass over memory as cheap. That was
too low: RESULTS.md. XLA counts the operations of a loop's body once, hence the small
numbers of `delta group`.
"""

import argparse
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from metax.base import BilevelProblem
from metax.harness import create_run, write_summary
from metax.stn import (
    DeltaSTNState,
    best_response,
    centered_stn,
    delta_stn,
    natural_hparams,
    stn,
)
from metax.tasks import SimpleCNN, Split, TunableMLP, image_tuning, stock_hparams

# Milliseconds of pomonam/Self-Tuning-Networks (PyTorch 2.13, 2 threads of an x86 CPU,
# batch 128, σ tuned; its MLP lacks the output layer), lowest and highest median.
AUTHORS = {
    "mlp": {
        "plain": "19.6-21.1",
        "stn": "41-43",
        "centred": "78-80",
        "delta example": "123-131",
        "valid noisy": "38-41",
    },
    "cnn": {
        "plain": "25-31",
        "stn": "47-56",
        "centred": "108",
        "delta example": "158-192",
        "valid noisy": "48-60",
    },
}
# (F, F₁) -> products of a step.
LIMITS: dict[str, Callable[[float, float], float]] = {
    "plain": lambda f, first: 3 * f - first,
    "stn": lambda f, first: 6 * f - 2 * first,
    "centred": lambda f, first: 8 * f - 3 * first,
    "delta example": lambda f, first: 8 * f - 3 * first,
    "valid noisy": lambda f, first: 4 * f - 2 * first,
    "valid plain": lambda f, first: 3 * f - first,
}
CYCLE = "delta cycle 5:1"
LOOP = 4  # steps that are timed together


class Case(NamedTuple):
    """A model whose dropouts, and perhaps cutout, are tuned."""

    name: str
    model: nn.Module
    hparams: list[str]
    batch: Split


class Compiled(NamedTuple):
    """A compiled loop of steps, its state, and what XLA says of one step."""

    loop: Any
    state: list
    gflop: float
    megabytes: float


Step = Callable[[Any, Split, jax.Array], Any]


def build_cases(quick: bool, cutout: bool) -> list[Case]:
    size = 8 if quick else 128
    key_image, key_label = jax.random.split(jax.random.key(0))
    image = jax.random.randint(key_image, (size, 28, 28, 1), 0, 256).astype(jnp.uint8)
    batch = Split(image, jax.random.randint(key_label, (size,), 0, 10, jnp.int32))
    mlp = TunableMLP(10, (16,) * 3 if quick else (1200,) * 3)
    cnn = SimpleCNN(10, (2, 2), 16) if quick else SimpleCNN(10)
    holes = ["cutout_length", "cutout_holes"] if cutout else []
    return [
        Case("mlp", mlp, list(mlp.rate_names), batch),
        Case("cnn", cnn, [*cnn.rate_names, *holes], batch),
    ]


def build_problem(case: Case) -> BilevelProblem:
    hparams = stock_hparams(case.hparams)
    return image_tuning(case.model, (28, 28, 1), hparams, std=255.0).problem


def build_steps(problem: BilevelProblem) -> dict[str, tuple[Any, Step]]:
    """Name to a state and the step that takes it."""
    rule = optax.sgd(0.01, 0.9)
    rules: dict[str, Any] = {
        "inner_optimizer": rule,
        "response_optimizer": rule,
        "outer_optimizer": optax.adam(3e-3),
    }
    tuned = {**rules, "scale_optimizer": optax.adam(3e-3)}
    delta = delta_stn(problem, **tuned)
    state = jax.jit(delta.init)(jax.random.key(0))
    quiet = state._replace(scale_state=None)
    by = lambda name: delta_stn(problem, **tuned, perturbation=name).train_step
    return {
        "plain": build_plain(problem, rule, state),
        "stn": (state, stn(problem, **tuned).train_step),
        "centred": (state, centered_stn(problem, **tuned).train_step),
        "delta example": (state, delta.train_step),
        "delta group": (state, by("group")),
        "delta batch": (state, by("batch")),
        "valid noisy": (state, delta.valid_step),
        "valid plain": (quiet, delta_stn(problem, **rules).valid_step),
    }


def build_plain(
    problem: BilevelProblem, rule: optax.GradientTransformation, start: DeltaSTNState
) -> tuple[Any, Step]:
    """Ordinary training at the start values, which are arguments, one an example."""

    def step(state: Any, batch: Split, key: jax.Array) -> Any:
        params, rule_state, natural = state
        size = len(batch.label)
        rates = {name: jnp.broadcast_to(x, (size,)) for name, x in natural.items()}

        def loss(params: Any) -> jax.Array:
            outputs = problem.predict(params, batch, rates, key)
            return problem.train_loss(outputs, batch, rates, params).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, rule_state = rule.update(gradient, rule_state, params)
        return (optax.apply_updates(params, updates), rule_state, natural), value

    return (start.params, start.inner_state, natural_hparams(start)), step


def compile_step(state: Any, step: Step, batch: Split) -> Compiled:
    def loop(state: Any, batches: Split, keys: jax.Array) -> Any:
        return jax.lax.scan(lambda state, x: step(state, *x), state, (batches, keys))

    keys, batches = jax.random.split(jax.random.key(1), LOOP), _several(batch)
    single = jax.jit(step).lower(state, batch, keys[0]).compile()
    several = jax.jit(loop, donate_argnums=0).lower(state, batches, keys).compile()
    own = jax.tree.map(jnp.copy, state)
    return Compiled(several, [own], _gflop(single), _megabytes(single))


def _several(batch: Split) -> Split:
    """A batch for each step of the loop: what is alike in all would be done once."""
    rolled = lambda x: jnp.stack([jnp.roll(x, i, 0) for i in range(LOOP)])
    return jax.tree.map(rolled, batch)


def _gflop(compiled: Any) -> float:
    return (compiled.cost_analysis() or {}).get("flops", np.nan) / 1e9


def _megabytes(compiled: Any) -> float:
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes / 1e6 if memory else np.nan


def forward_gflop(case: Case) -> tuple[float, float]:
    """F and F₁, from the shapes of kernels and outputs."""
    layers = []

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y, held = call(*args, **kwargs), context.module.variables.get("params", {})
        if not isinstance(held.get("kernel", {}), Mapping):
            layers.append(2e-9 * y.size * held["kernel"][..., 0].size)
        return y

    x = jnp.zeros(case.batch.image.shape, jnp.float32)

    def call() -> Any:
        params = case.model.init(jax.random.key(0), x, {}, False)
        with nn.intercept_methods(record):
            return case.model.apply(params, x, {}, False)

    jax.eval_shape(call)
    return sum(layers), layers[0]


def measure(case: Case, num_rounds: int) -> list[dict[str, Any]]:
    problem = build_problem(case)
    steps = {
        name: compile_step(state, step, case.batch)
        for name, (state, step) in build_steps(problem).items()
    }
    keys = jax.random.split(jax.random.key(2), (num_rounds + 1, LOOP))
    batches = _several(case.batch)
    rounds = [
        {name: _timed(compiled, batches, few) for name, compiled in steps.items()}
        for few in keys
    ][1:]
    for times in rounds:
        train, valid = times["delta example"], times["valid noisy"]
        times[CYCLE] = 5 * train + valid
    train, valid = steps["delta example"], steps["valid noisy"]
    steps[CYCLE] = train._replace(gflop=5 * train.gflop + valid.gflop)
    rows = [
        {"model": case.name, "step": name} | _columns(case, name, steps, rounds)
        for name in steps
    ]
    for row in [dict(zip(rows[0], rows[0], strict=True)), *rows]:
        print(
            f"{row['step']:16}"
            + "".join(f"{cell:>10}" for cell in list(row.values())[2:])
        )
    return rows


def _timed(compiled: Compiled, batches: Split, keys: jax.Array) -> np.ndarray:
    """Milliseconds of wall and of CPU time of a step."""
    begin = np.array([time.perf_counter(), time.process_time()])
    out = jax.block_until_ready(compiled.loop(compiled.state[0], batches, keys))
    end = np.array([time.perf_counter(), time.process_time()])
    compiled.state[0] = out[0]
    return 1e3 * (end - begin) / LOOP


def _columns(
    case: Case, name: str, steps: Mapping[str, Compiled], rounds: list[Any]
) -> dict[str, str]:
    wall, cpu = np.array([times[name] for times in rounds]).T
    _, plain = np.array([times["plain"] for times in rounds]).T
    low, middle, high = np.percentile(wall, [10, 50, 90])
    this, base, forward = steps[name], steps["plain"], forward_gflop(case)
    limit = LIMITS.get(name)
    needed = np.nan if limit is None else limit(*forward)
    return {
        "ms": f"{middle:.1f}",
        "p10": f"{low:.1f}",
        "p90": f"{high:.1f}",
        "cpu": f"{np.median(cpu):.1f}",
        # Of one round each: load that comes and goes hits both sides of a quotient.
        "ratio": f"{np.median(cpu / plain):.2f}",
        "GFLOP": f"{this.gflop:.3f}",
        "to plain": f"{this.gflop / base.gflop:.2f}",
        "limit": "" if limit is None else f"{needed / LIMITS['plain'](*forward):.2f}",
        "of limit": "" if limit is None else f"{this.gflop / needed:.3f}",
        "MB": f"{this.megabytes:.1f}",
        "beyond": f"{this.megabytes - base.megabytes:.1f}",
        "authors": AUTHORS[case.name].get(name, ""),
    }


def compare_naive(widths: tuple[int, ...], size: int, num_rounds: int) -> dict:
    """A response gradient by injection and by vmap(jvp), which forms all weights."""
    model, h = TunableMLP(10, widths), len(widths) + 1
    response = best_response(h)
    x = jax.ShapeDtypeStruct((size, 784), jnp.float32)
    eps = jax.ShapeDtypeStruct((size, h), jnp.float32)
    start = lambda key: model.init(key, jnp.zeros((1, 784)), {}, False)

    def loss(phi: Any, params: Any, eps: jax.Array, x: jax.Array, naive: bool) -> Any:
        fn = lambda x: lambda params: model.apply(params, x, {}, False)

        def one(eps: jax.Array, x: jax.Array) -> Any:
            return response.linearize(fn(x[None]), params, phi, eps)

        whole = jax.vmap(one)(eps, x) if naive else None
        value, change = whole or response.linearize(fn(x), params, phi, eps)
        return jnp.mean(jax.nn.logsumexp(value + change, axis=-1))

    params = jax.eval_shape(start, jax.random.key(0))
    phi = jax.eval_shape(response.init, jax.random.key(0), params)
    gradient = jax.jit(jax.grad(loss), static_argnums=4)
    compiled = {
        naive: gradient.lower(phi, params, eps, x, naive).compile()
        for naive in (False, True)
    }
    megabytes = {naive: _megabytes(step) for naive, step in compiled.items()}
    row: dict[str, Any] = {
        "widths": widths,
        "batch": size,
        "MB inject": megabytes[False],
        "MB naive": megabytes[True],
        "memory ratio": megabytes[True] / megabytes[False],
    }
    if num_rounds:
        operands = jax.tree.map(lambda s: jnp.ones(s.shape), (phi, params, eps, x))
        times = np.array(
            [
                [_duration(compiled[naive], operands) for naive in (False, True)]
                for _ in range(num_rounds + 1)
            ][1:]
        )
        row["ms inject"], row["ms naive"] = np.median(times, axis=0)
        row["time ratio"] = np.median(times[:, 1] / times[:, 0])
    print("  ".join(f"{k} {_short(v)}" for k, v in row.items()))
    return row


def _duration(step: Any, operands: tuple) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(step(*operands))
    return 1e3 * (time.perf_counter() - begin)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Self-Tuning Networks, timed.")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cutout", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    rounds = arguments.rounds or (2 if arguments.quick else 30)
    config = {"quick": arguments.quick, "cutout": arguments.cutout, "rounds": rounds}
    run = None if arguments.out is None else create_run(arguments.out, config)
    begin, device, rows = time.perf_counter(), jax.devices()[0], []
    print(
        f"jax {jax.__version__}, {device.device_kind}, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    for case in build_cases(arguments.quick, arguments.cutout):
        forward, first = forward_gflop(case)
        print(f"\n{case.name}: F = {forward:.3f} GFLOP, F₁ = {first:.3f}")
        rows += measure(case, rounds)
    print("\nper-example response gradient, injected and by vmap(jvp)")
    sizes = ((16, 16), 4) if arguments.quick else ((200, 200), 32)
    naive = [compare_naive(*sizes, rounds)]
    if not arguments.quick:
        # compiled only: it would need gigabytes
        naive.append(compare_naive((1200,) * 3, 128, 0))
    print(f"load {os.getloadavg()[0]:.1f}")
    if run is not None:
        seconds = time.perf_counter() - begin
        summary = {"config": config, "rows": rows, "naive": naive}
        write_summary(run, summary, wall_time=seconds)


if __name__ == "__main__":
    main()
