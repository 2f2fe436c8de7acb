"""The sections of RESULTS.md on learned optimizers say what their summaries hold."""

import json
import sys

import numpy as np
import pytest
from scipy import stats

from benchmarks import amalgamation_peer
from experiments import report, sections_amalgamation, sections_optimizers

CONFIG = {"num_evaluations": 2, "num_steps": 275, "gate_steps": 2000}


def digits_record(train, command="python -m experiments.amalgamate"):
    """Replicates with these ln train, each run twice; None for a divergence."""
    runs = [train, train]
    tested = [[-3.0] * len(train)] * 2
    outcome = {"train": runs, "best_valid": tested}
    rows = [
        {
            "replicate": i, "gate_passed": i == 0, "truncations": 600, "repeats": 2,
            "training_cpu_seconds": 200.0, "validation_cpu_seconds": 20.0,
            "selection_cpu_seconds": 70.0,
        }
        for i in range(len(train))
    ]  # fmt: skip
    return {
        "config": CONFIG, "command": command, "replicates": rows, "short": outcome,
        "long": outcome,
    }  # fmt: skip


def test_digits_alone_shows_each_replicate_and_which_goals_it_reached(tmp_path):
    record = digits_record([-4.0, None])
    record["replicates"][0] |= {"refused": 3, "candidates": 8}
    text = "\n".join(sections_amalgamation.digits(record, tmp_path))
    assert "| minmax | 0 | -4.00 | -3.00 | -4.00 | -3.00 | yes | 3 of 8 |" in text
    assert "| minmax | 1 | diverged | -3.00 | diverged | -3.00 | **no** | – |" in text
    assert "ln train of each replicate: at most diverged, goal -2: **not" in text
    assert "best ln test of each replicate: at most -3.00, goal -2.95: reached" in text
    assert "selection of each: at most 70.00, goal 60: **not reached**" in text
    assert "less meta only" not in text


def test_digits_gives_the_welch_interval_of_min_max_less_meta_only(tmp_path):
    a, b = [-4.0, -4.2, -4.6], [-5.4, -4.2, -4.5]
    other = tmp_path / "amalgamation_digits_none.json"
    other.write_text(json.dumps(digits_record(b, "python -m this --reduce none")))
    text = "\n".join(sections_amalgamation.digits(digits_record(a), tmp_path))
    low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    mean = np.mean(a) - np.mean(b)
    expected = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}], no difference is shown"
    assert f"minmax less meta only, ln train: {expected}" in text
    assert "meta only: `python -m this --reduce none`" in text


def test_students_say_how_often_each_was_trained_and_which_were_not(tmp_path):
    once = digits_record([-3.0], "python -m this --student l2l")
    (tmp_path / "amalgamation_short_l2l.json").write_text(json.dumps(once))
    twice = tmp_path / "amalgamation_short_minmax.json"
    twice.write_text(json.dumps(digits_record([-4.0, -4.2])))
    record = json.loads(twice.read_text())
    text = "\n".join(sections_amalgamation.students(record, tmp_path))
    low, high = stats.t.interval(0.95, 1, -4.1, 0.1)
    assert f"| RNNProp, min-max | 2 | -4.100 [{low:.3f}, {high:.3f}] |" in text
    assert "| L2L | 1 | -3.00 | -3.00 | -3.00 |" in text
    assert "L2L: `python -m this --student l2l`." in text
    assert "Trained once, so not compared: L2L." in text
    assert (
        "min-max, ln train of each replicate: at most -4.00, goal -2: reached" in text
    )
    assert "less meta only" not in text
    (tmp_path / "amalgamation_short_none.json").write_text(twice.read_text())
    text = "\n".join(sections_amalgamation.students(record, tmp_path))
    assert "* min-max less meta only, ln train: +0.00 [" in text
    left = text.splitlines()[-1]
    assert "Scale" in left
    assert "min-max" not in left


@pytest.mark.parametrize("problem", ["Digits", "MLP"])
def test_evaluations_mark_the_oracle_and_say_losses(problem):
    def line(name, best, kind, oracle=False):
        value = {"estimate": best, "low": best - 0.1, "high": best + 0.1}
        measured = dict.fromkeys(("train", "last_valid", "best_valid"), value)
        rest = {"accuracy": 0.9, "optimization_stability": None, "finite": 1.0}
        where = {"problem": problem, "optimizer": name, "kind": kind, "setting": 0.05}
        return {**where, **measured, **rest, "oracle": oracle}

    record = {
        "config": CONFIG | {"problems": [problem], "steps_per_epoch": 11},
        "table": [
            line("amalgamated-small", -3.1, "learned"),
            line("adam", -3.4, "analytical", oracle=True),
            line("sgd", -2.9, "analytical"),
        ],
    }
    text = "\n".join(sections_optimizers.evaluations(record))
    scale = "CPU" if problem == "MLP" else "digits"
    assert f"| {problem} | {scale} | `adam` **(oracle)** | 0.05 | – | -3.400" in text
    assert "| `amalgamated-small` | +0.30 (sgd) |" in text
    left = text.splitlines()[-1]
    assert ("MLP" in left) == (problem != "MLP")
    assert "ResNet-52" in left


def test_stability_stands_beside_the_table_of_the_paper():
    found = {
        "mean": -3.0, "ci_low": -3.2, "ci_high": -2.8, "meta_stability": 0.25,
        "evaluation_stability": 0.05,
    }  # fmt: skip
    names = ("best_valid", "train", "optimization_stability")
    whole = {"finite": 2, "replicates": 2, "statistics": dict.fromkeys(names, found)}
    bounded = dict.fromkeys(names, found | {"meta_interval": [0.1, 0.9]})
    record = {
        "config": CONFIG
        | {
            "num_replicates": 2,
            "optimizee": "Digits",
            "depths": [1, 2],
            "trajectories": [20, 10],
        },
        "rows": {
            "gaussian 0": whole | {"statistics": bounded},
            "input noise 0.1": whole,
            "gaussian 0.01": whole | {"statistics": {}},
        },
    }
    lines = sections_optimizers.stability(record)
    assert "40 truncations, without selection" in "\n".join(lines)
    assert "no two rows are told apart" in lines[-1]
    cells = record["rows"]
    cells["gaussian 0.01"] = {
        "finite": 2, "replicates": 2,
        "statistics": {"best_valid": found | {"meta_interval": [1.0, 2.0]}},
    }  # fmt: skip
    said = sections_optimizers.stability(record)[-1]
    assert said.endswith(": gaussian 0 below gaussian 0.01.")
    plain, noise, gaussian = lines[-5:-2]
    assert "-3.00 [-3.20, -2.80] | 0.250 [0.100, 0.900] | 0.050" in plain
    assert "-3.00 [-3.20, -2.80] | 0.250 | 0.050" in noise
    assert noise.endswith("| 1.637 |")
    assert gaussian.count("–") == 8


def test_the_benchmark_says_which_goals_were_reached():
    def row(case, cpu, goal=None):
        return {"case": case, "K": 20, "cpu": cpu, "ms": 90.0, "MB": 210.0, "s": 9.0,
                "goal": goal}  # fmt: skip

    record = {
        "rows": [
            row("no teachers", 0.09, ["cpu", 0.1]),
            row("2 teachers", 0.16, ["cpu", 0.15]),
            row("no teachers, first order", 0.08),
            row("K=100 block, 6 teachers", None, ["MB", 350]),
        ],
        "rules": [{"rule": "adam", "parameters": 1000, "ms": 0.1, "bytes": 8.0}],
        "peer": {"as shipped": 1.04, "with the same convolution": 0.12},
    }
    text = "\n".join(sections_optimizers.benchmark(record))
    assert "no teachers, cpu, at most 0.1: 0.09, reached" in text
    assert "2 teachers, cpu, at most 0.15: 0.16, **not reached**" in text
    assert "K=100 block, 6 teachers, MB, at most 350: 210, reached" in text
    assert "at least 8: 11.6, reached" in text
    assert "| adam | 1,000 | 0.10 | 8 |" in text


def test_the_peer_is_compared_with_by_its_ratios():
    cases = {"metax": 1.0, "as shipped": 11.5, "RNNProp, as shipped": 12.0,
             "RNNProp, optimizee": 1.1}  # fmt: skip
    rows = [
        {"case": case, "cpu": 0.1 * ratio, "ms": 50.0, "MB": 160.0, "s": 9.0,
         "ratio": ratio}
        for case, ratio in cases.items()
    ]  # fmt: skip
    text = "\n".join(sections_optimizers.peer({"rows": rows}))
    assert "| RNNProp, as shipped | 1.200 | 50 | 160 | 9.0 | 12.00 |" in text
    assert "as shipped, at least 8: 11.5, reached" in text
    assert "at least 1.2: 1.1, **not reached**" in text


def test_what_is_no_peer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"amalgamation_peer --source.*nowhere"):
        amalgamation_peer.main(["--source", "nowhere"])
    (tmp_path / "learned_optimization").mkdir()
    path = list(sys.path)
    needed = ("metax_has_no_such_module",)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(amalgamation_peer, "NEEDED", needed)
        with pytest.raises(ValueError, match="metax_has_no_such_module"):
            amalgamation_peer.main(["--source", str(tmp_path)])
    assert sys.path == path


def test_the_report_has_the_sections():
    titles = [title for title, _ in report.SECTIONS.values()]
    assert sum(title.startswith("Optimizer amalgamation") for title in titles) == 8
