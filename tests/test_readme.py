"""What README.md and CONTRIBUTING.md say is true: code, output, commands and links."""

import contextlib
import io
import os
import re
import subprocess
from pathlib import Path

import pytest

import metax

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
# a python block, and the text block right after it, if any: what it prints
BLOCKS = re.findall(
    r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", README, flags=re.DOTALL
)
DEMO = "pip install -e . && python -m experiments.demo"
TEST = 'pip install -e ".[test]" && pytest'


def run(source: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, "README.md", "exec"), {})
    return printed.getvalue()


@pytest.mark.parametrize(("source", "output"), BLOCKS)
def test_python_blocks_print_what_the_readme_says(source, output):
    assert output
    assert run(source) == output


def test_the_quickstart_is_an_optax_loop_and_mends_what_adam_does_not():
    source, _ = BLOCKS[0]
    learned = 'adam_hd(1e-5, 0.05, rule="multiplicative")'
    assert source.count(learned) == 1
    plain = source.replace(learned, "optax.adam(1e-5)")
    plain = re.sub(r", learning rate .*\"\)", '")', plain)
    claimed = re.search(r"With `optax.adam\(1e-5\)` .* ends at ([\d.]+)\.", README)
    assert run(plain) == f"loss {claimed[1]}\n"


def test_the_readme_is_short():
    assert len(README.splitlines()) < 150
    code = [line for line in BLOCKS[0][0].splitlines() if line.strip()]
    assert len(code) <= 18


def test_the_two_commands_are_there_verbatim():
    assert f"\n{DEMO}\n" in README
    assert f"\n{TEST}\n" in README


def test_ci_ends_with_the_test_command_of_the_readme():
    script = ROOT / ".ci" / "run"
    lines = script.read_text(encoding="utf-8").splitlines()
    # last, so that its exit code is the script's and its summary closes the output
    assert lines[-1] == TEST
    assert "set -euo pipefail" in lines
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_commands_and_names_exist(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (path.parent / target).exists(), target
    for module in re.findall(r"python -m ((?:experiments|benchmarks)\.\w+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
    for path in re.findall(r"`((?:metax|tests|experiments|\.ci)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path


def test_methods_said_to_be_planned_do_not_exist_yet():
    rows = dict(re.findall(r"`metax\.(\w+)`(, planned)? \|", README))
    assert len(rows) == 4
    for package, planned in rows.items():
        assert (ROOT / "metax" / package).is_dir() != bool(planned), package
        assert planned or package in metax.__all__
