"""Task steps a second of AutoLoss, dispatch, and the time to train a controller.

    python -m benchmarks.autoloss              about 6 minutes on 2 cores
    python -m benchmarks.autoloss --quick      tiny sizes: does it run?
    python -m benchmarks.autoloss --out DIR    writes DIR/summary.json too

    python -m benchmarks.autoloss --parts dispatch overhead
    python -m benchmarks.autoloss --devices 2  the same runs over 2 devices beside

*Throughput.* Whole runs of a fixed number of steps, led by an untrained controller
(16 hidden units), S of them at once; live steps over wall seconds, best of the rounds,
compilation apart. Regression with the released features: every loss, both gradients and
the validation loss are fresh after each step. Classification with the paper's features,
validation at every tenth step, and with the released ones, at every step. The limit is
what the products alone would take at the rate of a large matrix product, timed in the
same run: 3 passes of 200 rows and 152 columns a step for regression (0.18 MF); forward
and backward on 200 rows, without a gradient of the inputs, and a tenth of a forward
pass on 1000 (1.1 MF), or all of it (3.1 MF), for classification.

`--devices N` makes N devices of the CPU and adds, where there is a goal for many runs,
a row whose runs are spread over them, in turns with the row of one device. On one
device all cores share the large operations, and all but one idle through the others;
on N each core has runs of its own, and more of what they touch stays in its cache. Only
the keys of the runs are placed: the compiler divides the rest.

*Overhead.* What of such a step is the task's: beside it a loop by hand that takes the
same steps, measures the metric as often, and has neither controller nor features,
frozen groups, caches or records. In turns, and in seconds of the processor, for other
programs disturb these less.

*Dispatch.* Three heads on a trunk of 64-256-256, batch 128: microseconds a step and
run of "mix" under vmap, "switch" under vmap (the work of all branches), and "switch"
run after run; in turns, wall and processor. Prediction by passes: all branches share
the forward pass of the trunk, which compilers see is the same, and none a backward
pass. So vmapped switch takes one forward and three backward passes, each twice as much,
where mix takes one of each: 7/3, and a little less for what else there is in a step.
"apart" is mix on the same losses with the trunk written into each, where sums of
gradients hide from the compiler that one backward pass would do: predicted as slow as
vmapped switch, without its two more optimizers.

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
from jax.sharding import NamedSharding, PartitionSpec

from metax import Action, AlternatingProblem, unroll
from metax.autoloss import (
    Features,
    autoloss,
    bernoulli,
    bind,
    controller,
    features,
    leaky_relu,
)
from metax.autoloss.rollouts import rollout, rollouts
from metax.harness import (
    create_run,
    device_mesh,
    put_everywhere,
    start_devices,
    write_summary,
)
from metax.tasks import classification, controller_data, regression

PEER = {"regression": 1056.0, "classification": 736.0}
GOALS = {
    ("regression", 1): 100e3,
    ("regression", 64): 200e3,
    ("classification, check 10", 64): 100e3,
}
TRAINING_GOAL = 60.0  # seconds
PARTS = ("throughput", "overhead", "dispatch", "training")


def best_times(
    runs: dict[str, Callable[[], Any]], rounds: int
) -> dict[str, tuple[float, float]]:
    """The least wall and processor seconds of each call, in turns.

    The first call compiles and does not count.
    """
    for run in runs.values():
        jax.block_until_ready(run())
    best = dict.fromkeys(runs, (float("inf"), float("inf")))
    for _ in range(rounds):
        for name, run in runs.items():
            wall, processor = time.perf_counter(), time.process_time()
            jax.block_until_ready(run())
            took = time.perf_counter() - wall, time.process_time() - processor
            best[name] = min(best[name][0], took[0]), min(best[name][1], took[1])
    return best


def product_rate(rounds: int) -> float:
    """Operations a second of a matrix product, for the limits."""
    size = 1024
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    wall, _ = best_times({"": lambda: product(a)}, max(rounds, 3))[""]
    return 2 * size**3 / wall


def by_hand(problem: AlternatingProblem, every: int, steps: int) -> Callable:
    """The steps of a task without what leads, watches and records them.

    Actions are drawn beforehand, and all runs step on every loss and keep one.
    """
    loss_of, rule = problem.losses, problem.optimizers
    assert isinstance(rule, optax.GradientTransformation)

    def run(key: jax.Array, data: Any) -> Any:
        batch = problem.sample(data, key)
        params = problem.init(key)

        def step(carry: Any, action: jax.Array) -> tuple[Any, Any]:
            params, state = carry
            ways = [
                jax.value_and_grad(lambda p, f=f: f(p, batch, key))(params)
                for f in loss_of
            ]
            (values, grads) = zip(*ways, strict=True)
            chosen = jax.tree.map(lambda a, b: jnp.where(action, a, b), *grads)
            updates, state = rule.update(chosen, state, params)
            return (optax.apply_updates(params, updates), state), sum(values)

        def block(carry: Any, actions: jax.Array) -> tuple[Any, Any]:
            carry, values = jax.lax.scan(step, carry, actions)
            return carry, (values, problem.metric(carry[0], data))

        actions = jax.random.bernoulli(key, 0.5, (steps // every, every))
        return jax.lax.scan(block, (params, rule.init(params)), actions)[1]

    return jax.jit(jax.vmap(run, in_axes=(0, None)))


def cases(rate: float = 0.0) -> dict[str, tuple[Any, ...]]:
    """Problem, data, features and the limit in steps a second of each task."""
    reg, cla = regression.problem(), classification.problem()
    # 1024 weights of the first layer, 64 of the second
    trained, checked = 200 * (4 * 1024 + 6 * 64), 1000 * 2 * 1088
    wanted = {
        "regression": (
            reg, controller_data(regression.generate(1)),
            features.released("regression"), 3 * 2 * 200 * 152,
        ),
        "classification, check 10": (
            cla, controller_data(classification.generate(1)), features.paper(2),
            trained + checked / 10,
        ),
        "classification, check 1": (
            cla, controller_data(classification.generate(1)),
            features.released("classification"), trained + checked,
        ),
    }  # fmt: skip
    return {
        name: (problem, jax.device_put(data), seen, rate / operations)
        for name, (problem, data, seen, operations) in wanted.items()
    }


def led(problem: AlternatingProblem, seen: Features, steps: int) -> Callable:
    """Whole runs by an untrained controller."""
    net = controller(2, (16,), 2.0, activation=leaky_relu)
    phi = net.init(jax.random.key(1), seen.spec.size)

    @jax.jit
    def run(keys: Any, data: Any, phi: Any) -> Any:
        policy = bind(net, phi, seen)
        results, _ = rollouts(problem, policy, keys, data, steps, early_stopping=False)
        return results.num_steps

    return lambda keys, data: run(keys, data, phi)


def throughput(quick: bool, rounds: int, devices: int = 1) -> list[dict[str, Any]]:
    rows = []
    for name, (problem, data, seen, limit) in cases(product_rate(rounds)).items():
        for runs in (1, 2) if quick else (1, 8, 64, 256):
            steps, goal = 20 if quick else max(500, 16_000 // runs), (name, runs)
            run = led(problem, seen, steps)
            keys, calls = jax.random.split(jax.random.key(2), runs), {}
            wanted = runs > 1 and (quick or goal in GOALS) and devices > 1
            for number in (1, devices) if wanted else (1,):
                calls[number] = on_devices(run, keys, data, number)
            for number, (wall, own) in best_times(calls, rounds).items():
                rows.append({
                    "task": name, "runs": runs, "devices": number,
                    "steps_per_s": runs * steps / wall,
                    "processor_us": 1e6 * own / runs / steps, "limit": limit,
                    "goal": GOALS.get(goal), "peer": PEER[name.split(",")[0]],
                })  # fmt: skip
    return rows


def on_devices(run: Callable, keys: Any, data: Any, number: int) -> Callable[[], Any]:
    """The call of a run whose keys, and with them its runs, lie on several devices."""
    if number > 1:
        mesh = device_mesh(number)
        share = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        keys = jax.device_put(keys, share)
        data = put_everywhere(data, mesh)
    return lambda: run(keys, data)


def overhead(quick: bool, rounds: int) -> list[dict[str, Any]]:
    """Microseconds of the processor a step and run, where there is a goal."""
    rows, found = [], cases()
    for name, runs in GOALS:
        problem, data, seen, _ = found[name]
        runs = min(runs, 2) if quick else runs
        steps = 20 if quick else max(300, 4000 // runs)
        keys, every = (
            jax.random.split(jax.random.key(2), runs),
            seen.spec.observe_every or 10,
        )
        ways = {
            "led": led(problem, seen, steps),
            "by hand": by_hand(problem, every, steps),
        }
        calls = {
            way: lambda run=run, keys=keys, data=data: run(keys, data)
            for way, run in ways.items()
        }
        took = best_times(calls, 2 * rounds)
        row = {way: 1e6 * own / runs / steps for way, (_, own) in took.items()}
        rows.append({"task": name, "runs": runs, **row})
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


def written_into_each(problem: AlternatingProblem) -> AlternatingProblem:
    """The same losses, each with a trunk of its own to the eye of `grad`."""
    shared = problem.shared
    assert shared is not None

    def apart(loss: Callable[..., Any]) -> Callable[..., Any]:
        return lambda p, batch, key: loss(p, batch, key, shared(p, batch, key))

    return problem._replace(losses=tuple(map(apart, problem.losses)), shared=None)


def dispatch(quick: bool, rounds: int) -> list[dict[str, Any]]:
    problem = three_heads(16 if quick else 256)
    batch = jax.random.normal(jax.random.key(0), (8 if quick else 128, 64), jnp.float32)
    steps, policy = 5 if quick else 100, bernoulli(jnp.ones(3) / 3)
    in_turn = lambda f: lambda xs: jax.lax.map(f, xs)
    ways = {
        "mix": (problem, "mix", jax.vmap),
        "apart": (written_into_each(problem), "mix", jax.vmap),
        "vmapped switch": (problem, "switch", jax.vmap),
        "switch": (problem, "switch", in_turn),
    }
    rows = []
    for runs in (1, 2) if quick else (1, 8):
        keys, calls = jax.random.split(jax.random.key(1), runs), {}
        for name, (own, way, over) in ways.items():

            @jax.jit
            def run(
                keys: Any, batch: Any, own: Any = own, way: Any = way, over: Any = over
            ) -> Any:
                one = lambda key: rollout(own, policy, key, batch, steps, dispatch=way)
                return over(lambda key: one(key)[0].params["head_0"])(keys)

            calls[name] = lambda run=run, keys=keys: run(keys, batch)
        took, number = best_times(calls, rounds), steps * runs
        row: dict[str, Any] = {"runs": runs}
        row |= {name: 1e6 * wall / number for name, (wall, _) in took.items()}
        row["processor"] = {name: 1e6 * own / number for name, (_, own) in took.items()}
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
    for row in summary.get("throughput", ()):
        rate, limit = row["steps_per_s"], row["limit"]
        goal = "" if row["goal"] is None else f"  goal {row['goal']:,.0f}"
        times = rate / row["peer"]
        print(
            f"{row['task']:26} {row['runs']:4} on {row['devices']} {rate:9,.0f} "
            f"steps/s, {row['processor_us']:.1f} µs of the processor, limit "
            f"{limit:9,.0f} {rate / limit:6.0%}  {times:.0f} times the peer{goal}"
        )
    for row in summary.get("overhead", ()):
        own, plain = row["led"], row["by hand"]
        print(
            f"{row['task']:26} {row['runs']:4} {own:6.1f} µs of the processor, by hand "
            f"{plain:6.1f} ({plain / own:.0%})"
        )
    for row in summary.get("dispatch", ()):
        for time_of, times in (("wall", row), ("processor", row["processor"])):
            ratio = times["vmapped switch"] / times["mix"]
            print(
                f"dispatch, S = {row['runs']}, µs, {time_of}: "
                + ", ".join(f"{name} {times[name]:.0f}" for name in row["processor"])
                + f"; vmapped switch over mix {ratio:.2f} (goal 1.5)"
            )
    for row in summary.get("training", ()):
        best = f"{row['first']:.3f} -> {row['last']:.3f}"
        print(
            f"{row['updates']:4} updates of {row['runs']:<2} {row['steps']:10,} steps, "
            f"compile {row['compile_s']:.1f} s, {row['seconds']:.1f} s (goal "
            f"{TRAINING_GOAL:g}); best validation {best}"
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args(argv)
    start_devices(flags.devices)
    begin = time.perf_counter()
    rounds = 1 if flags.quick else flags.rounds
    config = {"rounds": rounds, "quick": flags.quick}
    parts = {
        "throughput": lambda: throughput(flags.quick, rounds, flags.devices),
        "overhead": lambda: overhead(flags.quick, rounds),
        "dispatch": lambda: dispatch(flags.quick, rounds),
        "training": lambda: training(flags.quick),
    }
    summary = {"config": config, **{name: parts[name]() for name in flags.parts}}
    show(summary)
    if flags.out is not None:
        run = create_run(flags.out, config)
        write_summary(run, summary, wall_time=time.perf_counter() - begin)


if __name__ == "__main__":
    main()
