"""Settings every test shares: double precision, and the optional real data."""

import os
from pathlib import Path

import jax
import pytest

jax.config.update("jax_enable_x64", True)
# Tests compile much and run little: without LLVM's optimizations they take two thirds
# of the time. `JAX_DISABLE_MOST_OPTIMIZATIONS=0 pytest` tests what users run. By the
# environment as well: a process that a test starts is to compile as the test does.
if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1":
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Each compiled program holds maps of memory, of which a process has so many.

    Where they can be counted programs are kept until half of Linux's usual 65,530 are
    taken: what modules have in common need not be compiled again.
    """
    yield
    maps = Path("/proc/self/maps")
    if not maps.is_file() or len(maps.read_bytes().splitlines()) > 32_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def tfds_dir() -> Path:
    """Folder of prepared tensorflow-datasets sets; skips where there is none."""
    candidates = [
        os.environ.get("TFDS_DATA_DIR"),
        Path(__file__).parents[2] / "shared" / "data" / "tfds",
        Path.home() / "tensorflow_datasets",
    ]
    for candidate in candidates:
        if candidate and (Path(candidate) / "mnist").is_dir():
            return Path(candidate)
    pytest.skip(
        "no prepared MNIST: set TFDS_DATA_DIR (see experiments/prepare_data.py)"
    )


@pytest.fixture(scope="session")
def golden_path() -> Path:
    """The reference trajectories; skips where they are not at hand."""
    default = Path(__file__).parents[2] / "shared" / "golden" / "hypergradient.json"
    path = Path(os.environ.get("METAX_GOLDEN", default))
    if not path.is_file():
        pytest.skip("no reference trajectories: set METAX_GOLDEN to hypergradient.json")
    return path


@pytest.fixture(scope="session")
def corpora_dir() -> Path:
    """The folder of the corpora; skips where there is none."""
    candidates = [
        Path(os.environ.get("TEXT_DATA_DIR") or Path.home() / "metax_text"),
        Path(__file__).parents[2] / "shared" / "data",
    ]
    for root in candidates:
        if (root / "multi30k").is_dir() and (root / "german").is_dir():
            return root
    pytest.skip("no Multi30k and German corpora: set TEXT_DATA_DIR")
