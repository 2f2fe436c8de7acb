"""Run as a program, to be killed: a Loop with a checkpoint after every step.

    python -m tests.killed_loops NAME FOLDER NUM_STEPS

Goes on with what FOLDER holds, prints a line a step, and the digest of the last state.
"""

import sys
from pathlib import Path
from typing import Any

import jax

from metax.harness import mean_rows, record_run
from tests.loops import LOOPS
from tests.test_loops import digest


def rows(step: int, state: Any, infos: Any) -> list[dict[str, Any]]:
    print(step, flush=True)
    return mean_rows(step, state, infos)


def main(name: str, folder: Path, num_steps: int) -> None:
    loop, data = LOOPS[name].build(), LOOPS[name].data()
    state, _ = record_run(
        folder, loop, data, jax.random.key(0), num_steps, chunk=1, rows=rows,
        resume=True,
    )  # fmt: skip
    print(digest(state))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
