"""The scripts of learned optimizers run at tiny sizes and leave what they promise."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from benchmarks import amalgamation as benchmark
from experiments import (
    amalgamate,
    amalgamation_evaluate,
    amalgamation_stability,
    meta_training,
    sections_optimizers,
)
from experiments.amalgamation_problems import problem
from experiments.meta_training import choice_options, policy_of, warmup
from experiments.optimizer_runs import STUDENTS
from experiments.training_cards import training_command
from metax.amalgamation import load_artifact, pretrained
from metax.harness import read_metrics

LEFT_BEHIND = {"config.json", "metrics.jsonl", "summary.json", "figure.png"}
LENGTHS = ["--truncation-length", "2", "--warmup-steps", "2"]
JUDGED = ["--num-steps", "6", "--judge-every", "2", "--num-evaluations", "2"]
TRAINED = [*LENGTHS, "--depths", "1", "--validation-depths", "1", "--weights", "0.1"]
TINY = [*TRAINED, *JUDGED, "--trajectories", "1", "--periods", "1"]
TINY += ["--steps-per-epoch", "2", "--gate-steps", "20"]
TINY += ["--remat", "none", "--no-second-order"]


def summary_of(run):
    assert {path.name for path in run.iterdir()} >= LEFT_BEHIND
    return json.loads((run / "summary.json").read_text())


class Trained(Exception):
    """Stops a script where the judging begins."""


def stop(*args, **kwargs):
    raise Trained


def forbid(*args, **kwargs):
    raise AssertionError("this was done already")


@pytest.fixture(scope="module", autouse=True)
def cheap():
    """Nearly all of the time is compilation: of small networks."""
    small = {"hidden_size": 2, "num_layers": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STUDENTS, "rnnprop", ("rnnprop", small))
        patch.setitem(STUDENTS, "l2l", ("l2l", small))
        whole = meta_training.choice_options
        chosen = lambda config: {**whole(config), **small}
        patch.setattr(meta_training, "choice_options", chosen)
        patch.setattr(amalgamate, "choice_options", chosen)
        yield


@pytest.fixture(scope="module")
def minmax(tmp_path_factory):
    """A finished run of two replicates."""
    run = tmp_path_factory.mktemp("minmax")
    amalgamate.main([*TINY, "--num-replicates", "2", "--out", str(run)])
    return run


def test_a_run_leaves_artefacts_with_whole_cards(minmax):
    summary = summary_of(minmax)
    rows = summary["replicates"]
    assert [row["replicate"] for row in rows] == [0, 1]
    assert all(row["truncations"] == 1 and row["candidates"] == 1 for row in rows)
    assert np.shape(summary["short"]["train"]) == (2, 2)
    for number in range(2):
        student, theta, card = load_artifact(minmax / f"replicate_{number}")
        assert student.rule(theta).init({"w": np.ones(3)}) is not None
        assert card["licence"] == "Apache-2.0"
        assert card["warmup_steps"] == 2
        assert card["trained_steps"] == 2
        assert card["gate_steps"] == 20
        assert card["gate_passed"] == rows[number]["gate_passed"]
        assert card["versions"]["jax"]
        short, long = card["evaluation"]
        assert (short["steps"], long["steps"], long["clipped_to"]) == (6, 20, 1.0)
        mean = np.mean(summary["short"]["best_valid"], 0)[number]
        assert short["mean_best_ln_test"] == pytest.approx(mean)


def test_a_finished_run_is_judged_again_but_not_trained_again(minmax, monkeypatch):
    monkeypatch.setattr(amalgamate, "train_student", forbid)
    monkeypatch.setattr(amalgamate, "judged", stop)
    with pytest.raises(Trained):
        amalgamate.main(["--resume", str(minmax)])


def test_the_command_of_a_card_gives_its_config(minmax):
    command = load_artifact(minmax / "replicate_0")[2]["training_command"]
    start = "python -m experiments.amalgamate "
    assert command.startswith(start)
    config, _ = amalgamate.parse(
        amalgamate.Config,
        presets=amalgamate.PRESETS,
        argv=command[len(start) :].split(),
    )
    assert json.loads((minmax / "config.json").read_text()) == json.loads(
        json.dumps(dataclasses.asdict(config))
    )
    digits = dataclasses.replace(amalgamate.DIGITS, reduce="none")
    assert training_command(digits, amalgamate.PRESETS) == (
        f"{start}--preset digits --reduce none"
    )


def test_the_release_is_the_same_in_training_and_on_the_card():
    config = amalgamate.Config(setting="release")
    assert warmup(config) == {"warmup_steps": 100, "warmup_learning_rate": 0.05}
    policy, options = policy_of(config)
    assert (policy, options["bias_correction"]) == ("rnnprop", "constant")
    assert choice_options(config)["setting"] == "release-choice"
    assert warmup(amalgamate.Config())["warmup_learning_rate"] == 0.01


@pytest.mark.slow
def test_choice_trains_a_policy_then_a_student_and_reuses_the_policy(
    tmp_path, monkeypatch
):
    argv = [*TINY, "--reduce", "choice", "--setting", "release"]
    amalgamate.main([*argv, "--out", str(tmp_path)])
    summary = summary_of(tmp_path)
    card = load_artifact(tmp_path / "choice_0")[2]
    assert card["policy_options"]["setting"] == "release-choice"
    assert card["warmup_learning_rate"] == 0.05
    assert len(card["evaluation"]) == 2
    assert np.shape(summary["choice"]["long"]["train"]) == (2, 1)
    assert len(read_metrics(tmp_path)) == 1
    # as if killed between the two trainings
    monkeypatch.setattr(amalgamate, "train_choice", forbid)
    config, _ = amalgamate.parse(amalgamate.Config, argv=argv)
    optimizee, data, _ = problem("Digits", None)
    key = jax.random.key(0)
    one = (config, optimizee, data, tmp_path, 0, key)
    teacher = amalgamate.choice_teacher(*one, mesh=None)
    assert teacher.init({"w": np.ones(3)}) is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "more"),
    [
        ("l2l", ["--random-scale", "0"]),
        ("scale", ["--random-scale", "0"]),
        ("rnnprop", ["--imitation-probability", "0.5", "--trajectories", "3"]),
    ],
)
def test_baselines_are_trained_without_teachers(student, more, tmp_path, monkeypatch):
    monkeypatch.setattr(amalgamate, "judged", stop)
    argv = [*TINY, "--reduce", "none", "--student", student, *more]
    with pytest.raises(Trained):
        amalgamate.main([*argv, "--out", str(tmp_path)])
    card = load_artifact(tmp_path / "replicate_0")[2]
    assert card["policy"] == student
    assert all(word in card["training_command"] for word in more[:1])
    (trajectories,) = card["config"]["trajectories"]
    assert read_metrics(tmp_path)[0]["truncations"] == trajectories


def test_evaluate_sets_learned_files_beside_rules(
    minmax, tmp_path, monkeypatch, capsys
):
    files = [str(minmax / f"replicate_{i}") for i in range(2)]
    argv = [*JUDGED, "--steps-per-epoch", "2", "--warmup-steps", "2", "--rules", "adam"]
    argv += ["--rates", "0.01", "0.1"]
    amalgamation_evaluate.main([*argv, "--learned", *files, "--out", str(tmp_path)])
    assert "<- oracle" in capsys.readouterr().out
    summary = summary_of(tmp_path)
    adam, learned = summary["table"]
    assert adam["oracle"]
    assert adam["setting"] in (0.01, 0.1)
    # two replicates of one folder are one line, with the interval between them
    assert (learned["oracle"], learned["replicates"]) == (False, 2)
    (found,) = summary["across"].values()
    assert learned["best_valid"]["low"] == found["ci_low"]
    monkeypatch.setattr(amalgamation_evaluate, "race", forbid)
    amalgamation_evaluate.main(["--resume", str(tmp_path)])
    assert summary_of(tmp_path)["table"] == summary["table"]


def test_evaluate_takes_the_replicates_of_a_folder(minmax, tmp_path):
    files = amalgamation_evaluate.found(["all", str(minmax)])
    own = [f"{minmax.name}/replicate_{i}" for i in range(2)]
    assert list(files) == [*pretrained(), *own]
    assert [len(group.thetas) for group in amalgamation_evaluate.groups(files)][-1] == 2
    with pytest.raises(FileNotFoundError, match="replicate_<i>.json"):
        amalgamation_evaluate.found([str(tmp_path)])


def test_a_rule_that_diverges_is_never_the_best():
    row = {"problem": "P", "optimizer": "adam", "kind": "analytical", "finite": 1.0}
    names = (*amalgamation_evaluate.QUANTITIES, "optimization_stability")
    cells: dict[str, float] = dict.fromkeys(names, 0.0)
    bad = row | cells | {"setting": 1.0, "best_valid": np.nan}
    good = row | cells | {"setting": 0.1, "best_valid": -1.0}
    (line,) = amalgamation_evaluate.table([bad, good], "P")
    assert line["setting"] == 0.1


@pytest.mark.slow
def test_stability_of_two_replicates_resumes(tmp_path, monkeypatch):
    argv = [*LENGTHS, *JUDGED, "--depths", "1", "--weights", "0.1", "--remat", "none"]
    argv += ["--trajectories", "1", "--gaussian", "0.001", "--out", str(tmp_path)]
    amalgamation_stability.main(argv)
    summary = summary_of(tmp_path)
    cell = summary["rows"]["gaussian 0.001"]
    assert (cell["replicates"], cell["finite"]) == (2, 2)
    assert cell["statistics"]["best_valid"]["evaluation_stability"] > 0
    monkeypatch.setattr(amalgamation_stability, "train", forbid)
    amalgamation_stability.main(["--resume", str(tmp_path)])
    assert summary_of(tmp_path)["rows"] == summary["rows"]


@pytest.mark.slow
def test_the_benchmark_runs_and_its_section_reads_what_it_wrote(tmp_path, capsys):
    benchmark.main(["--quick", "--out", str(tmp_path)])
    assert "2 teachers" in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert "no teachers" in "\n".join(sections_optimizers.benchmark(summary))
