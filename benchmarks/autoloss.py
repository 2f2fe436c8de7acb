"""Task steps a second of AutoLoss, dispatch, and the time to train a controller.

    python -m benchmarks.autoloss              about 6 minutes on 2 cores
    python -m benchmarks.autoloss --quick      tiny sizes: does it run?
    python -m benchmarks.autoloss --out DIR    writes DIR/summary.json too

*Throughput.* Whole runs of a fixed number of steps, led by an untrained controller
(16 hidden units), S of them at once; live steps over wall seconds, best of the rounds,
compilation apart. Regression with the released features: every loss, both gradients and
the validation loss are fresh after each step. Classification with the paper's features,
validation at every tenth step, and with the released ones, at every step. The limit is
what the products alone would take at the rate of a large matrix product, timed in the
same run: 3 passes of 200 rows and 152 columns a step for regression (0.18 MF); forward
and backward on 200 rows and a tenth of a forward pass on 1000 (1.1 MF), or all of it
(3.1 MF), for classification.

*Dispatch.* Three heads on a trunk of 64-256-256, batch 128: microseconds a step and
run of "mix" under vmap, "switch" under vmap (the work of all branches), and "switch"
run after run. Prediction by passes: vmapped switch takes three forward and backward
passes where mix takes one and two more heads: 1.9 to 2.6 times. Measured (RESULTS.md):
wrong, mix is the slower one here. The true switch takes the least.

*Training.* Regression, λ = .2, released features: 50 updates of 8 runs of at most
20,000 steps with early stopping; 60 updates of 8 runs of at most 5,000; and 400
updates of one run.

The authors' program (TensorFlow 1.15, their defaults) was timed by the authors of metax
on another machine of 2 cores: 1,056 steps/s on regression, 736 on classification, means
of one run. It makes about five passes a step where this makes three.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metax import Action, AlternatingProblem, unroll
from metax.autoloss import autoloss, bernoulli, bind, controller, features, leaky_relu
from metax.autoloss.rollouts import rollout, rollouts
from metax.harness import create_run, write_summary
from metax.tasks import classification, controller_data, regression

PEER = {"regression": 1056.0, "classification": 736.0}
GOALS = {
    ("regression", 1): 100e3,
    ("regression", 64): 200e3,
    ("classification, check 10", 64): 100e3,
}
TRAINING_GOAL = 60.0  # seconds


def best_time(run: Callable[[], Any], rounds: int) -> float:
    """The least wall seconds of a call; the first compiles and does not count."""
    jax.block_until_ready(run())
    best = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        best = min(best, time.perf_counter() - begin)
    return best


def product_rate(rounds: int) -> float:
    """Operations a second of a matrix product, for the limits."""
    size = 1024
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    return 2 * size**3 / best_time(lambda: product(a), max(rounds, 3))


def throughput(quick: bool, rounds: int) -> list[dict[str, Any]]:
    rate = product_rate(rounds)
    net = controller(2, (16,), 2.0, activation=leaky_relu)
    reg, cla = regression.problem(), classification.problem()
    cases = {
        "regression": (
            reg, controller_data(regression.generate(1)),
            features.released("regression"), 3 * 2 * 200 * 152,
        ),
        "classification, check 10": (
            cla, controller_data(classification.generate(1)), features.paper(2),
            6 * 200 * 1088 + 2 * 1000 * 1088 / 10,
        ),
        "classification, check 1": (
            cla, controller_data(classification.generate(1)),
            features.released("classification"), 6 * 200 * 1088 + 2 * 1000 * 1088,
        ),
    }  # fmt: skip
    rows = []
    for name, (problem, data, seen, operations) in cases.items():
        data = jax.device_put(data)
        phi = net.init(jax.random.key(1), seen.spec.size)
        for runs in (1, 2) if quick else (1, 8, 64, 256):
            steps = 20 if quick else max(500, 16_000 // runs)

            @jax.jit
            def run(keys: Any, data: Any, phi: Any, p=problem, f=seen, n=steps) -> Any:
                results, _ = rollouts(
                    p, bind(net, phi, f), keys, data, n, early_stopping=False
                )
                return results.num_steps

            keys = jax.random.split(jax.random.key(2), runs)
            seconds = best_time(lambda: run(keys, data, phi), rounds)  # noqa: B023
            rows.append({
                "task": name, "runs": runs, "steps_per_s": runs * steps / seconds,
                "limit": rate / operations, "goal": GOALS.get((name, runs)),
                "peer": PEER[name.split(",")[0]],
            })  # fmt: skip
    return rows


def three_heads(width: int) -> AlternatingProblem:
    def init(key: jax.Array) -> dict[str, Any]:
        keys = jax.random.split(key, 5)
        normal = lambda k, *shape: jax.random.normal(k, shape, jnp.float32) / 16
        return {
            "trunk": {
                "a": normal(keys[0], 64, width),
                "b": normal(keys[1], width, width),
            },
            **{f"head_{i}": normal(keys[2 + i], width, 10) for i in range(3)},
        }

    def trunk(params: Any, batch: jax.Array, key: jax.Array) -> jax.Array:
        hidden = jax.nn.relu(batch @ params["trunk"]["a"])
        return jax.nn.relu(hidden @ params["trunk"]["b"])

    def head(i: int) -> Callable[..., jax.Array]:
        def loss(params: Any, batch: Any, key: Any, hidden: jax.Array) -> jax.Array:
            return jnp.mean(jnp.square(hidden @ params[f"head_{i}"] - 1))

        return loss

    return AlternatingProblem(
        init=init,
        losses=tuple(map(head, range(3))),
        actions=tuple(Action(i, ("trunk", f"head_{i}")) for i in range(3)),
        optimizers=optax.adam(1e-3),
        sample=lambda data, key: data,
        metric=lambda params, data: jnp.sum(params["head_0"]),
        reward=lambda history, live: -history[-1],
        validate_every=1000,
        shared=trunk,
    )


def dispatch(quick: bool, rounds: int) -> list[dict[str, Any]]:
    problem = three_heads(16 if quick else 256)
    batch = jax.random.normal(jax.random.key(0), (8 if quick else 128, 64), jnp.float32)
    steps, policy = 5 if quick else 100, bernoulli(jnp.ones(3) / 3)
    rows = []
    for runs in (1, 2) if quick else (1, 8):
        keys = jax.random.split(jax.random.key(1), runs)
        row: dict[str, Any] = {"runs": runs}
        for name, way, over in (
            ("mix", "mix", jax.vmap), ("vmapped switch", "switch", jax.vmap),
            ("switch", "switch", lambda f: lambda xs, f=f: jax.lax.map(f, xs)),
        ):  # fmt: skip

            @jax.jit
            def run(keys: Any, batch: Any, way: Any = way, over: Any = over) -> Any:
                one = lambda key: rollout(
                    problem, policy, key, batch, steps, dispatch=way
                )[0].params["head_0"]
                return over(one)(keys)

            seconds = best_time(lambda: run(keys, batch), rounds)  # noqa: B023
            row[name] = 1e6 * seconds / (steps * runs)
        rows.append(row)
    return rows


def training(quick: bool) -> list[dict[str, Any]]:
    problem = regression.problem(0.2)
    net = controller(2, (16,), 2.0, activation=leaky_relu)
    data = jax.device_put(controller_data(regression.generate(1)))
    rows = []
    for updates, runs, most in ((50, 8, 20_000), (60, 8, 5_000), (400, 1, 5_000)):
        if quick:
            updates, runs, most = 2, min(runs, 2), 20
        loop = autoloss(
            problem, net, features=features.released("regression"), num_steps=most,
            num_rollouts=runs, advantage="ema" if runs == 1 else "normalized",
            meta_optimizer=optax.adam(0.02),
        )  # fmt: skip

        @jax.jit
        def train(key: Any, data: Any, loop: Any = loop, updates: int = updates) -> Any:
            key_init, key_run = jax.random.split(key)
            keys = jax.random.split(key_run, updates)
            _, infos = unroll(loop, loop.init(key_init), keys, data)
            return infos.best_metric, infos.num_steps

        begin = time.perf_counter()
        compiled = train.lower(jax.random.key(0), data).compile()
        middle = time.perf_counter()
        best, steps = jax.block_until_ready(compiled(jax.random.key(0), data))
        end = time.perf_counter()
        rows.append({
            "updates": updates, "runs": runs, "steps": int(steps.sum()),
            "compile_s": middle - begin, "seconds": end - middle,
            "first": float(best[0].mean()), "last": float(best[-1].mean()),
        })  # fmt: skip
    return rows


def show(summary: dict[str, Any]) -> None:
    print(f"{'throughput':26} {'S':>4} {'steps/s':>9} {'limit':>9} {'share':>6}  peer")
    for row in summary["throughput"]:
        rate, limit = row["steps_per_s"], row["limit"]
        goal = "" if row["goal"] is None else f"  goal {row['goal']:,.0f}"
        print(
            f"{row['task']:26} {row['runs']:4} {rate:9,.0f} {limit:9,.0f} "
            f"{rate / limit:6.0%}  {rate / row['peer']:.0f} times{goal}"
        )
    print(f"\n{'dispatch, µs':12} {'mix':>8} {'vmapped switch':>15} {'switch':>8}")
    for row in summary["dispatch"]:
        mixed, both = row["mix"], row["vmapped switch"]
        print(
            f"S = {row['runs']:<8} {mixed:8.0f} {both:15.0f} {row['switch']:8.0f}  "
            f"vmapped switch over mix {both / mixed:.2f} (goal 1.5)"
        )
    print(f"\n{'training':18} {'steps':>10} {'compile s':>10} {'s':>7}")
    for row in summary["training"]:
        print(
            f"{row['updates']:4} updates of {row['runs']:<2} {row['steps']:10,} "
            f"{row['compile_s']:10.1f} {row['seconds']:7.1f}  goal {TRAINING_GOAL:g}; "
            f"best validation {row['first']:.3f} -> {row['last']:.3f}"
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args(argv)
    begin = time.perf_counter()
    rounds = 1 if flags.quick else flags.rounds
    config = {"rounds": rounds, "quick": flags.quick}
    summary = {
        "config": config,
        "throughput": throughput(flags.quick, rounds),
        "dispatch": dispatch(flags.quick, rounds),
        "training": training(flags.quick),
    }
    show(summary)
    if flags.out is not None:
        run = create_run(flags.out, config)
        write_summary(run, summary, wall_time=time.perf_counter() - begin)


if __name__ == "__main__":
    main()
