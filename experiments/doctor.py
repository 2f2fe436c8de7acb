"""Whether metax can run here: versions, devices, data sets, disk, and a self-test.

    python -m experiments.doctor [--out DIR]

DIR is where runs are to be written (default: runs). The self-test trains on the digits
of scikit-learn, stops, goes on from its checkpoint, and compares the end with that of a
run that was never stopped: equal bit for bit. About 10 seconds on 2 cores. The exit
code is 0 where metax can be used, and 1 where not; missing data sets do not count.
"""

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import optax

from metax import inner_loop
from metax.harness import record_run, train, versions
from metax.tasks import Linear, image_classification, load, load_ptb, translation

IMAGE_SETS = ("mnist", "fashion_mnist", "cifar10", "cifar100", "svhn_cropped")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR")
    out = parser.parse_args(argv).out
    print("versions  ", ", ".join(f"{k} {v}" for k, v in versions().items()))
    for line in data_sets():
        print("data      ", line)
    checks: dict[str, Callable[[], str]] = {
        "devices": devices,
        "folder": lambda: folder(out),
        "self-test": lambda: self_test(out),
    }
    results = [check(name, run) for name, run in checks.items()]  # each is told
    fine = all(results)
    print(f"metax {'can' if fine else 'CANNOT'} be used here.")
    return 0 if fine else 1


def check(name: str, run: Callable[[], str]) -> bool:
    """Prints what a check says; a failure of any kind is what a doctor is for."""
    begin = time.perf_counter()
    try:
        found, fine = run(), True
    except Exception as error:
        found, fine = f"FAILED: {type(error).__name__}: {error}", False
    print(f"{name:10} {found} ({time.perf_counter() - begin:.1f} s)")
    return fine


def devices() -> str:
    kinds = [f"{device.device_kind} ({device.platform})" for device in jax.devices()]
    counted = ", ".join(
        f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds)
    )
    return f"{counted}; {os.cpu_count()} CPU cores"


def data_sets() -> Iterator[str]:
    """One line a set: where it is, or where it was looked for and how to get it."""
    root = Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    text = Path(os.environ.get("TEXT_DATA_DIR") or "~/metax_text").expanduser()
    for name in IMAGE_SETS:
        found = sorted(root.glob(f"{name}/*.*.*/dataset_info.json"))
        yield told(name, [path.parent for path in found], lambda name=name: load(name))
    if importlib.util.find_spec("tensorflow_datasets") is None:
        yield 'to read image sets: pip install -e ".[data]"'
    names = ("ptb.train.txt", "ptb.train.txt.gz")
    ptb = [at / name for at in (text, text / "ptb") for name in names]
    yield told("Penn Treebank", [path for path in ptb if path.is_file()], load_ptb)
    corpora = [text] if (text / "multi30k").is_dir() else []
    yield told("Multi30k, German", corpora, lambda: translation.load(text))


def told(name: str, found: Sequence[Path], read: Callable[[], object]) -> str:
    """Where a set is; else what reading it says, which names the remedy."""
    if found:
        return f"{name}: found, {found[-1]}"
    try:
        read()
    except (OSError, ImportError, ValueError) as error:
        return f"{name}: missing. {error}"
    return f"{name}: found"


def folder(out: Path) -> str:
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out) as file:
        file.write(bytes(1_000_000))
    free = shutil.disk_usage(out).free / 1e9
    return f"{out.resolve()} can be written, {free:.1f} GB are free"


def self_test(out: Path, num_steps: int = 40) -> str:
    data = load("digits").train
    task = image_classification(Linear(10), data.image[0], batch_size=64, std=16.0)
    loop, key = inner_loop(task, optax.adam(0.01)), jax.random.key(0)
    chunk = num_steps // 4
    state, infos = train(loop, data, key, num_steps, chunk=chunk)
    with tempfile.TemporaryDirectory(dir=out, prefix="doctor-") as run:
        record_run(run, loop, data, key, num_steps // 2, chunk=chunk)
        again, _ = record_run(run, loop, data, key, num_steps, chunk=chunk, resume=True)
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True)
    if not all(np.array_equal(a, b) for a, b in pairs):
        raise RuntimeError("a resumed run does not repeat one that was not stopped")
    if not infos.loss[-1] < infos.loss[0]:
        raise RuntimeError(f"the loss grew from {infos.loss[0]} to {infos.loss[-1]}")
    return f"trained, saved and resumed bit for bit; loss {infos.loss[-1]:.2f}"


if __name__ == "__main__":
    sys.exit(main())
