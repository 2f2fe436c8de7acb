"""Run as a program, once or as two processes: replicates over four virtual devices.

    python -m tests.several_processes PORT RANK COUNT PHASE...

COUNT processes share the devices. A PHASE, in turn:

    run:FOLDER:STEPS     goes on with a run up to STEPS, prints the digest of its state
    files:FOLDER         all write the same files, the first one late
    full:FOLDER          the first process finds its disk full when it saves
    signal:FOLDER        the last process gets SIGTERM in the second step
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from metax import Loop, Task, inner_loop
from metax.harness import (
    StorageError,
    append_metrics,
    create_run,
    read_metrics,
    record_run,
    replicate,
    save_checkpoint,
    write_json,
)
from metax.harness.processes import all_on_host, wait_for_all
from tests.test_loops import digest

SEED = 3  # a key would start a backend, before `main` can say which


def build_loop() -> Loop:
    """Eight replicates of SGD on a noisy quadratic, and a number all of them share."""
    task = Task(
        init=lambda key: {"w": jax.random.normal(key, (5,))},
        loss=lambda params, batch, key: jnp.sum((params["w"] - batch) ** 2),
        sample=lambda data, key: data + jax.random.normal(key, (5,)),
        evaluate=lambda params, data: {},
    )
    several = replicate(inner_loop(task, optax.adam(0.1)), 8)

    def step(state, key, data):
        replicates, info = several.step(state[0], key, data)
        return (replicates, state[1] + 1), info

    return Loop(lambda key: (several.init(key), jnp.array(0)), step)


def spread(loop: Loop) -> Loop:
    """The loop with the leading axis of its state over all devices."""
    mesh = jax.make_mesh((4,), ("seed",), axis_types=(AxisType.Auto,))
    spec = lambda leaf: P("seed") if leaf.ndim else P()
    state = jax.eval_shape(loop.init, jax.random.key(SEED))
    places = jax.tree.map(lambda leaf: NamedSharding(mesh, spec(leaf)), state)
    return loop._replace(init=jax.jit(loop.init, out_shardings=places))


def rows(step, state, infos):
    return [{"step": step, "loss": infos.loss.mean()}]


def run(folder: str, num_steps: int, rows=rows) -> None:
    create_run(folder, {"rate": 0.1})
    loop, data, key = spread(build_loop()), jnp.arange(5.0), jax.random.key(SEED)
    state, _ = record_run(
        folder, loop, data, key, num_steps, chunk=1, rows=rows, resume=True, keep=None
    )
    assert len(jax.tree.leaves(state[0].params)[0].sharding.device_set) == 4
    print(digest(all_on_host(state)), flush=True)


def write_files(folder: str) -> None:
    """Each process offers its number, and reads at once what was written."""
    rank, run = jax.process_index(), create_run(folder, {"rate": 0.1})
    if rank == 0:
        time.sleep(1)
    write_json(run / "cell.json", {"rank": rank})
    append_metrics(run, [{"step": 1, "rank": rank}])
    cell, rows = (run / "cell.json").read_text(), read_metrics(run)
    if rank == 0:
        (run / "closed.json").mkdir()  # where no file can be put
    try:
        write_json(run / "closed.json", {})
    except StorageError as error:
        print(json.loads(cell), rows, error.strerror, flush=True)


def fill_the_disk(folder: str) -> None:
    """What the first process cannot write all are told of."""
    full = OSError(28, "No space left on device") if jax.process_index() == 0 else None
    state = spread(build_loop()).init(jax.random.key(SEED))
    with mock.patch("metax.harness.checkpoint.write_manifest", side_effect=full):
        try:
            save_checkpoint(folder, 1, state)
        except StorageError as error:
            print(error.strerror, flush=True)
    assert not list(Path(folder).iterdir())
    wait_for_all("looked into the folder")
    save_checkpoint(folder, 1, state)
    append_metrics(folder, [{"step": 1}])


def get_a_signal(folder: str) -> None:
    def and_a_signal(step, state, infos):
        if step == 2 and jax.process_index() == jax.process_count() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return rows(step, state, infos)

    run(folder, 10, and_a_signal)


def main(port: str, rank: int, count: int, phases: list[str]) -> None:
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", 4 // count)
    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", count, rank)
    for phase in phases:
        name, folder, *steps = phase.split(":")
        if name == "run":
            run(folder, int(steps[0]))
        else:
            {"files": write_files, "full": fill_the_disk, "signal": get_a_signal}[name](
                folder
            )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
