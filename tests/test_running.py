"""What docs/running.md shows is what happens: its blocks are run, in order."""

import contextlib
import io
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "running.md").read_text(encoding="utf-8")
# a python block and what it prints; "python cluster" needs machines we do not have
BLOCKS = re.findall(
    r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", PAGE, flags=re.DOTALL
)
CLUSTER = re.findall(r"```python cluster\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_blocks_print_what_the_page_says(tmp_path, monkeypatch):
    assert len(BLOCKS) == 3
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shared: dict = {}
    for source, output in BLOCKS:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, "running.md", "exec"), shared)
        assert output
        assert printed.getvalue() == output


@pytest.mark.parametrize("source", CLUSTER)
def test_what_needs_a_cluster_is_python_at_least(source):
    compile(source, "running.md", "exec")


def test_the_page_names_the_scripts_that_make_one_run_after_the_other():
    scripts = (Path(__file__).parents[1] / "experiments").glob("*.py")
    texts = {path.stem: path.read_text(encoding="utf-8") for path in scripts}
    alone = {
        name
        for name, text in texts.items()
        if " parse(" in text and "several_devices=True" not in text
    }
    (named,) = re.findall(r"and refuse: (.*?)\.", PAGE, flags=re.DOTALL)
    assert set(re.findall(r"`(\w+)`", named)) == alone


def test_the_page_is_short():
    assert len(PAGE.splitlines()) < 160
