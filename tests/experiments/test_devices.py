"""One script a method spreads its work over two devices; each in its own process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HDM = ["--steps", "40", "--num-seeds", "2", "--tolerance", "1.0"]
STARTS = [
    "--dataset", "digits", "--widths", "8", "--batch-size", "16", "--num-steps", "20",
    "--eval-every", "10", "--warmup-steps", "5", "--num-seeds", "2", "--starts", "0.1",
]  # fmt: skip
STABILITY = [
    "--truncation-length", "2", "--warmup-steps", "2", "--depths", "1", "--weights",
    "0.1", "--trajectories", "1", "--remat", "none", "--num-steps", "4",
    "--judge-every", "2", "--num-evaluations", "2", "--gaussian", "0.001",
]  # fmt: skip
SCHEDULES = [
    "--num-guided", "1", "--num-rollouts", "2", "--num-updates", "2", "--max-steps",
    "20", "--num-steps", "20", "--num-seeds", "1", "--chances", "0.5",
]  # fmt: skip
SEARCHES = [
    "--dataset", "digits", "--widths", "8", "--batch-size", "16", "--num-steps", "20",
    "--eval-every", "10", "--warmup-steps", "5", "--num-trials", "3", "--num-seeds",
    "2", "--methods",
]  # fmt: skip
RIDGE = ["--steps", "20", "--num-seeds", "2", "--draws", "2", "--calls", "1"]
AMALGAMATE = [
    "--truncation-length", "2", "--warmup-steps", "2", "--depths", "1", "--num-tasks",
    "2", "--validation-depths", "1", "--weights", "0.1", "--trajectories", "1",
    "--periods", "1", "--num-steps", "4", "--judge-every", "2", "--steps-per-epoch",
    "2", "--num-evaluations", "1", "--gate-steps", "20", "--remat", "none",
    "--no-second-order",
]  # fmt: skip
REGRESSION = [
    *SCHEDULES, "--num-controllers", "2", "--num-runs", "2", "--num-lams", "2",
    "--num-coarse", "2",
]  # fmt: skip
SWEEP = [*SCHEDULES, "--lams", "0.2", "0.4", "--num-runs", "1"]
TRANSFER = [*SCHEDULES, "--num-controllers", "2", "--num-lams", "2", "--num-runs", "2"]
CLASSIFICATION = [*SCHEDULES, "--num-lams", "3", "--joint-lams", "0.1"]


def start(script, argv, out, *flags, **variables):
    command = [sys.executable, "-m", f"experiments.{script}", *argv, *flags]
    return subprocess.Popen(
        [*command, "--out", str(out)],
        cwd=Path(__file__).parents[2], env={**os.environ, **variables},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def in_two_processes(script, argv, out):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [
        start(script, argv, out, "--distributed", JAX_PROCESS_ID=str(i), **variables)
        for i in range(2)
    ]


def end(process):
    try:
        text, _ = process.communicate(timeout=550)
    finally:
        process.kill()
    return process.returncode, text


def summary_of(run):
    return json.loads((run / "summary.json").read_text())


def by_one_and_two_processes(script, argv, folder):
    """The summaries of the same run, made by one process and by two."""
    together = in_two_processes(script, argv, folder / "two")
    for process in [*together, start(script, argv, folder / "one")]:
        code, text = end(process)
        assert code == 0, text
    return [summary_of(folder / run) for run in ("one", "two")]


# up to a minute of compilation each; the default suite has the refusals below
SPREAD = [
    ("hypergradient_hdm", HDM),
    ("stn_baselines", [*SEARCHES, "fixed_start", "random_equal", "delta_stn"]),
    ("stn_ridge", RIDGE),
    ("stn_starts", STARTS),
    ("amalgamate", AMALGAMATE),
    ("amalgamation_stability", STABILITY),
    ("autoloss_classification", CLASSIFICATION),
    ("autoloss_regression", REGRESSION),
    ("autoloss_sweep", SWEEP),
]


@pytest.mark.slow
@pytest.mark.parametrize(("script", "argv"), SPREAD)
def test_a_script_spreads_over_two_devices(script, argv, tmp_path):
    code, text = end(start(script, argv, tmp_path / "run", "--devices", "2"))
    assert code == 0, text
    assert summary_of(tmp_path / "run")["config"]
    assert (tmp_path / "run" / "figure.png").exists()


@pytest.mark.slow
def test_learned_schedules_over_two_devices_are_those_of_one(tmp_path):
    """Three settings, of which the second device has one and a copy of it."""
    argv = [*TRANSFER, "--num-lams", "3", "--num-runs", "1"]
    flags = {"two": ["--devices", "2"], "one": []}
    for name, more in flags.items():
        code, text = end(start("autoloss_transfer", argv, tmp_path / name, *more))
        assert code == 0, text
    two, one = (summary_of(tmp_path / name) for name in flags)
    assert two["device"]["count"] == 2
    assert two["lams"] == one["lams"]
    assert two["steps"] == one["steps"]
    for name, matrix in one["matrices"].items():
        # products of other widths, in float32
        np.testing.assert_allclose(two["matrices"][name], matrix, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes_train_the_optimizer_of_one(tmp_path):
    """The first writes the artefact that both read."""
    one, two = by_one_and_two_processes("amalgamate", AMALGAMATE, tmp_path)
    assert two["device"]["count"] == 2
    # sums over tasks are made in another order, in float32
    np.testing.assert_allclose(two["long"]["train"], one["long"]["train"], rtol=1e-4)


@pytest.mark.slow
def test_two_processes_write_one_run_that_is_that_of_one_device(tmp_path):
    found = by_one_and_two_processes("hypergradient_hdm", HDM, tmp_path)
    one, two = (summary["table"] for summary in found)
    assert one.keys() == two.keys()
    for name in one:
        assert one[name]["solved"] == two[name]["solved"]
        np.testing.assert_array_equal(one[name]["counts"], two[name]["counts"])


@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [
        pytest.param(
            "hypergradient_cifar",
            ["--devices", "2"],
            "has nothing to divide",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "hypergradient_hdm",
            ["--num-seeds", "3", "--devices", "2"],
            "got 3 on 2 devices",
            marks=pytest.mark.slow,
        ),
        ("amalgamate", ["--devices", "2"], "`--num-tasks` must be a multiple"),
        (
            "autoloss_classification",
            [*CLASSIFICATION, "--num-rollouts", "3", "--devices", "2"],
            "`--num-rollouts` must be a multiple",
        ),
    ],
)
def test_a_script_that_cannot_spread_says_so(script, flags, said, tmp_path):
    code, text = end(start(script, [], tmp_path / "run", *flags))
    assert code != 0
    assert said in " ".join(text.split())
