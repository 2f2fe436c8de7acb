"""One truncated gradient of google/learned_optimization beside one of metax.

    git clone https://github.com/google/learned_optimization DIR
    pip install dm-haiku gin-config dm-tree
    python -m benchmarks.amalgamation_peer --source DIR        about 3 minutes

The peer's release cannot be installed; its source runs from a clone, with stand-ins for
what it imports and this does not use (TensorFlow and others, where they are missing).
Both take the paper's CNN of 18,122 parameters, batch 128 of random images, K = 20,
second order: the peer by its vectorised truncated step with one task and its
`TruncatedGrad`, which keeps every step's residuals, metax by `amalgamate` without
teachers, which computes steps again. All run in turn, round after round. Columns as in
`benchmarks.amalgamation`; `peer/ours` is in CPU seconds. Rows of the peer:

    as shipped            its RNN-MLP on Haiku's convolutions
    RNNProp, as shipped   metax's RNNProp as one of its learned optimizers, likewise
    RNNProp, optimizee    and with the optimizee of metax: the same convolutions

What to expect: XLA's own convolution, differentiated twice in a loop, is an order of
magnitude slower than ours ("lax convolution" in `benchmarks.amalgamation`), so as much
as shipped; with the same convolutions both make the same products, and what remains is
the keeping of 1 GB.
"""

import argparse
import functools
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.amalgamation import CASES, clock, compile_case, random_images
from metax.amalgamation import rnnprop
from metax.harness import create_run, write_summary
from metax.tasks import optimizees

# what the peer imports, and what is run here does not call
UNUSED = (
    "launchpad", "oryx", "oryx.core", "oryx.core.interpreters",
    "oryx.core.interpreters.harvest", "seqio", "tensorboard", "tensorflow",
    "tensorflow.compat", "tensorflow.compat.v2", "tensorflow.io",
    "tensorflow.io.gfile", "tensorflow_datasets",
)  # fmt: skip
NEEDED = ("haiku", "gin", "tree")
LENGTH, BATCH = 20, 128


class Row(NamedTuple):
    """A compiled truncated gradient, its arguments and what XLA says of it."""

    run: Callable[[], Any]
    seconds: float
    megabytes: float


def peer_modules(source: Path) -> dict[str, Any]:
    """The modules of a clone, importable from now on."""
    if not (source / "learned_optimization").is_dir():
        raise ValueError(
            "`benchmarks.amalgamation_peer --source` must be a clone of "
            f"google/learned_optimization; got {source}."
        )
    missing = [name for name in NEEDED if not _exists(name)]
    if missing:
        raise ValueError(f"the peer needs {missing}: see the head of this file.")
    importlib.import_module("flax.training.checkpoints")  # it looks for TensorFlow
    absent = [name for name in UNUSED if not _exists(name.partition(".")[0])]
    sys.modules.update({name: MagicMock() for name in absent})
    sys.path.insert(0, str(source))
    names = {
        "tasks": "tasks.base",
        "learned": "learned_optimizers.base",
        "rnn_mlp": "learned_optimizers.rnn_mlp_lopt",
        "optimizers": "optimizers.base",
        "schedule": "outer_trainers.truncation_schedule",
        "step": "outer_trainers.lopt_truncated_step",
        "gradient": "outer_trainers.truncated_grad",
        "learner": "outer_trainers.gradient_learner",
    }
    load = lambda name: importlib.import_module(f"learned_optimization.{name}")
    return {key: load(name) for key, name in names.items()}


def _exists(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def haiku_network() -> Any:
    """The paper's CNN in the layers that the peer's tasks are made of."""
    hk: Any = importlib.import_module("haiku")

    def logits(x: jax.Array) -> jax.Array:
        for features, size in ((16, 3), (32, 5)):
            x = hk.Conv2D(features, size, padding="VALID")(x)
            x = jax.nn.relu(hk.max_pool(x, 2, 2, "VALID"))
        return hk.Linear(10)(hk.Flatten()(x))

    return hk.without_apply_rng(hk.transform(logits))


def haiku_task(peer: dict[str, Any]) -> Any:
    network = haiku_network()

    class Task(peer["tasks"].Task):
        def init(self, key: jax.Array) -> Any:
            return network.init(key, jnp.zeros((1, 28, 28, 1)))

        def loss(self, params: Any, key: jax.Array, data: Any) -> jax.Array:
            logits = network.apply(params, data["image"])
            losses = optax.softmax_cross_entropy_with_integer_labels
            return losses(logits, data["label"]).mean()

    return Task()


def metax_task(peer: dict[str, Any]) -> Any:
    task, typed = optimizees.train().task, jax.random.wrap_key_data

    class Task(peer["tasks"].Task):
        def init(self, key: jax.Array) -> Any:
            return task.init(typed(key))

        def loss(self, params: Any, key: jax.Array, data: Any) -> jax.Array:
            return task.loss(params, (data["image"], data["label"]), typed(key))

    return Task()


class State(NamedTuple):
    """What the peer's optimizers carry."""

    params: Any
    rule: Any
    model: Any
    iteration: Any


def peer_rnnprop(peer: dict[str, Any]) -> Any:
    """metax's RNNProp as one of the peer's learned optimizers."""
    student = rnnprop()

    def optimizer(theta: Any) -> Any:
        rule = student.rule(theta)

        class Rule(peer["optimizers"].Optimizer):
            def init(self, params: Any, model_state: Any = None, **_: Any) -> State:
                count = jnp.zeros((), jnp.int32)
                return State(params, rule.init(params), model_state, count)

            def get_params(self, state: State) -> Any:
                return state.params

            def get_state(self, state: State) -> Any:
                return state.model

            def update(
                self, state: State, grad: Any, model_state: Any = None, **_: Any
            ) -> State:
                updates, rule_state = rule.update(grad, state.rule, state.params)
                params = optax.apply_updates(state.params, updates)
                return State(params, rule_state, model_state, state.iteration + 1)

        return Rule()

    class Learned(peer["learned"].LearnedOptimizer):
        def init(self, key: jax.Array) -> Any:
            return student.init(jax.random.wrap_key_data(key))

        def opt_fn(self, theta: Any, is_training: bool = False) -> Any:
            return optimizer(theta)

    return Learned()


def peer_row(peer: dict[str, Any], task: Any, learned: Any) -> Row:
    """Its truncated gradient of one task, compiled."""
    never = peer["schedule"].ConstantTruncationSchedule(10**6)
    step = peer["step"].VectorizedLOptTruncatedStep(
        peer["tasks"].single_task_to_family(task), learned, never, num_tasks=1,
        random_initial_iteration_offset=0,
    )  # fmt: skip
    truncated = peer["gradient"].TruncatedGrad
    estimate = truncated(step, unroll_length=LENGTH, steps_per_jit=LENGTH)
    key = jax.random.PRNGKey(0)
    outer = peer["learner"].OuterState(jnp.zeros((), jnp.int32))
    weights = lambda theta: peer["learner"].WorkerWeights(theta, None, outer)
    theta = learned.init(key)
    state = estimate.init_worker_state(weights(theta), key)
    shape = (LENGTH, 1, BATCH)
    data = {
        "image": jax.random.uniform(key, (*shape, 28, 28, 1)),
        "label": jax.random.randint(key, shape, 0, 10),
    }

    def gradient(theta: Any, state: Any, key: jax.Array, data: Any) -> Any:
        out, _ = estimate.compute_gradient_estimate(
            weights(theta), key, state, datas_list=[data]
        )
        return out.mean_loss, out.grad, out.unroll_state

    begin = time.perf_counter()
    compiled = jax.jit(gradient).lower(theta, state, key, data).compile()
    seconds = time.perf_counter() - begin
    memory: Any = compiled.memory_analysis()
    run = functools.partial(compiled, theta, state, key, data)
    return Row(run, seconds, memory.temp_size_in_bytes / 2**20)


def our_row() -> Row:
    """`benchmarks.amalgamation`'s first case."""
    data = random_images(1024)
    ours = compile_case(CASES[0], data, BATCH, LENGTH)
    run = functools.partial(ours.step, ours.state, jax.random.key(0), data)
    return Row(run, ours.seconds, ours.megabytes)


def measure(peer: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    learned, shipped = peer_rnnprop(peer), haiku_task(peer)
    ready = {
        "metax": our_row(),
        "as shipped": peer_row(peer, shipped, peer["rnn_mlp"].RNNMLPLOpt()),
        "RNNProp, as shipped": peer_row(peer, shipped, learned),
        "RNNProp, optimizee": peer_row(peer, metax_task(peer), learned),
    }
    best = dict.fromkeys(ready, (np.inf, np.inf))
    for _ in range(rounds):
        for name, row in ready.items():
            cpu, wall = (x / LENGTH for x in clock(row.run))
            best[name] = (min(best[name][0], cpu), min(best[name][1], wall))
    return [
        {
            "case": name, "cpu": best[name][0], "ms": 1e3 * best[name][1],
            "MB": row.megabytes, "s": row.seconds,
            "ratio": best[name][0] / best["metax"][0],
        }
        for name, row in ready.items()
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path)
    flags = parser.parse_args(argv)
    begin = time.perf_counter()
    rows = measure(peer_modules(flags.source), flags.rounds)
    head = f"{'truncated gradient':24} {'cpu s':>8} {'ms':>8} {'MB':>8} {'s':>6}"
    print(f"{head}  peer/ours")
    for row in rows:
        print(
            f"{row['case']:24} {row['cpu']:8.4f} {row['ms']:8.1f} {row['MB']:8.1f} "
            f"{row['s']:6.1f} {row['ratio']:10.2f}"
        )
    if flags.out is not None:
        config = {"rounds": flags.rounds}
        summary = {"config": config, "rows": rows}
        run = create_run(flags.out, config)
        write_summary(run, summary, wall_time=time.perf_counter() - begin)


if __name__ == "__main__":
    main()
