import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from metax.harness import RunOptions, create_run, parse


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains something."""

    learning_rate: float = 0.1
    num_steps: int = 100
    rule: str = "sgd"
    widths: tuple[int, ...] = (3, 4)
    nesterov: bool = False
    clip: float | None = None


PRESETS = {"paper": Config(learning_rate=0.001, num_steps=5000), "tiny": Config(0.5, 2)}


def test_no_flags_give_the_defaults_and_a_dated_folder(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/experiments/demo.py"])
    config, options = parse(Config, presets=PRESETS)
    assert config == Config()
    assert not options.resume
    assert re.fullmatch(r"runs/demo-\d{8}-\d{6}", options.out.as_posix())


def test_flags_bear_the_names_of_the_fields():
    flags = "--learning-rate 1e-3 --num-steps 7 --rule adam --widths 5 6 7 --nesterov"
    config, options = parse(
        Config, argv=[*flags.split(), "--clip", "2", "--out", "a/b"]
    )
    assert config == Config(0.001, 7, "adam", (5, 6, 7), True, 2.0)
    assert options == RunOptions(out=Path("a/b"), resume=False)


@pytest.mark.parametrize("preset", [["--preset", "paper"], ["--preset=paper"]])
def test_flags_override_the_preset_on_either_side(preset):
    wanted = Config(0.5, 5000)
    rate = ["--learning-rate", "0.5"]
    assert parse(Config, presets=PRESETS, argv=[*preset, *rate])[0] == wanted
    assert parse(Config, presets=PRESETS, argv=[*rate, *preset])[0] == wanted
    assert parse(Config, presets=PRESETS, argv=preset)[0] == PRESETS["paper"]


def fails(capsys, *argv, presets=PRESETS):
    with pytest.raises(SystemExit) as caught:
        parse(Config, presets=presets, argv=[str(arg) for arg in argv])
    assert caught.value.code == 2
    # the box that tyro draws breaks lines
    return " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().err).split())


def test_unknown_preset_lists_those_there_are(capsys):
    message = fails(capsys, "--preset", "papper")
    assert "papper" in message
    assert "paper" in message
    assert "tiny" in message


def test_bad_flags_exit_with_2(capsys):
    assert "--learning-rat" in fails(capsys, "--learning-rat", "0.1")
    assert "x" in fails(capsys, "--num-steps", "x")
    assert "--preset" in fails(capsys, "--preset", "a", presets=None)
    assert "--out" in fails(capsys, "--out")


def test_help_shows_every_flag_and_the_defaults_of_the_preset(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(Config, presets=PRESETS, argv=["--help", "--preset", "paper"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "Trains something." in text
    for flag in ("--learning-rate", "--preset {paper,tiny}", "--out DIR"):
        assert flag in text
    assert "5000" in text


def test_resume_takes_the_stored_config(tmp_path):
    create_run(tmp_path, PRESETS["paper"])
    wanted = PRESETS["paper"], RunOptions(out=tmp_path, resume=True)
    assert parse(Config, presets=PRESETS, argv=["--resume", str(tmp_path)]) == wanted
    flags = f"--resume {tmp_path} --preset paper --num-steps 5000 --out {tmp_path}"
    assert parse(Config, presets=PRESETS, argv=flags.split()) == wanted


def test_resume_with_another_config_is_refused(tmp_path, capsys):
    create_run(tmp_path, Config())
    message = fails(capsys, "--resume", tmp_path, "--num-steps", 7)
    assert "num_steps=100" in message
    assert "num_steps=7" in message
    message = fails(capsys, "--resume", tmp_path, "--preset", "tiny")
    assert "num_steps=2" in message
    assert "must not change it" in message
    assert "leave --out away" in fails(capsys, "--resume", tmp_path, "--out", "b")


def test_resume_of_no_run_or_another_script_is_refused(tmp_path, capsys):
    assert "no config.json" in fails(capsys, "--resume", tmp_path / "nowhere")
    create_run(tmp_path, {"other": 1})
    message = fails(capsys, "--resume", tmp_path)
    assert "another script" in message
    assert "other" in message


def test_config_types_that_cannot_work_are_refused():
    @dataclasses.dataclass(frozen=True)
    class Taken:
        out: str = ""

    with pytest.raises(ValueError, match=r"must not have fields named .*got \['out'\]"):
        parse(Taken, argv=[])
    with pytest.raises(ValueError, match="must be a dataclass; got int"):
        parse(int, argv=[])


def test_devices_of_scripts_that_do_not_spread_are_refused(capsys):
    for flags in (["--devices", "2"], ["--distributed"], ["--devices", "0"]):
        assert "has nothing to divide" in fails(capsys, *flags)
    options = parse(Config, argv=["--devices", "1"])[1]
    assert (options.devices, options.distributed, options.mesh) == (1, False, None)


def test_devices_that_are_not_there_are_refused(capsys, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    has = jax.local_device_count()  # JAX has begun: it cannot have more

    def refused(*flags):
        with pytest.raises(SystemExit) as caught:
            parse(Config, argv=flags, several_devices=True)
        assert caught.value.code == 2
        return capsys.readouterr().err

    assert f"to the {has} cpu devices there are; got 99" in refused("--devices", "99")
    assert "got 0" in refused("--devices", "0")
    assert "--distributed needs --out DIR" in refused("--distributed")
    assert "JAX_NUM_PROCESSES" in refused("--distributed", "--out", "somewhere")


def test_names_of_common_flags_are_taken():
    for name in ("devices", "distributed"):
        taken = dataclasses.make_dataclass("Taken", [(name, int, 0)], frozen=True)
        with pytest.raises(ValueError, match=f"got .'{name}'"):
            parse(taken, argv=[])


def test_harness_imports_neither_orbax_nor_matplotlib():
    code = "import sys, metax.harness; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    roots = {name.split(".")[0] for name in result.stdout.split()}
    assert not roots & {"orbax", "matplotlib", "tensorflow"}
    assert "metax" in roots
