"""Who may import whom, and what no room below the harness may do, read by `ast`.

The floors: `base`, `problems`, `artifact` and `arguments` below; the methods, `tasks`
and `harness` side by side above them, none importing another; experiments, benchmarks
and tests on top. The tables here are the rule, and a new package is a new row.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "metax"
MODULES = {str(path.relative_to(PACKAGE)): path for path in PACKAGE.rglob("*.py")}
LONGEST = 400  # lines


class Floor(NamedTuple):
    """What a room may import.

    Attributes:
      metax: rooms of metax beside its own.
      anywhere: third-party packages.
      inside: third-party packages inside functions alone.
    """

    metax: frozenset[str] = frozenset()
    anywhere: frozenset[str] = frozenset()
    inside: frozenset[str] = frozenset()


def floor(metax: str = "", anywhere: str = "", inside: str = "") -> Floor:
    return Floor(*(frozenset(names.split()) for names in (metax, anywhere, inside)))


METHOD = floor("arguments base artifact", "jax optax flax")
FLOORS = {
    "__init__": floor("base amalgamation autoloss hypergradient implicit stn"),
    "arguments": floor("", "jax"),
    "base": floor("problems arguments", "jax optax"),
    "problems": floor("arguments", "jax optax"),
    "artifact": floor("", "jax optax", inside="safetensors"),
    "hypergradient": floor("arguments base artifact", "jax optax"),
    "stn": METHOD,
    "implicit": METHOD,
    "amalgamation": METHOD,
    "autoloss": METHOD,
    "tasks": floor(
        "arguments base", "jax numpy optax flax", inside="tensorflow_datasets sklearn"
    ),
    "harness": floor("arguments base", "jax numpy orbax tqdm tyro", inside="scipy"),
}
# what one file may that its package may not
ALSO_INSIDE = {"harness/plot.py": {"matplotlib"}}

# No host in the numerics: these belong to the harness and to the user. The files that
# read and write are the exceptions that the design names.
FORBIDDEN_CALLS = {"print", "open", "input", "breakpoint", "exec", "eval"}
FILE_METHODS = {"open", "read_text", "write_text", "read_bytes", "write_bytes"}
FORBIDDEN_NAMES = {"jax.jit", "jax.pmap", "jax.debug.print", "jax.debug.callback"}
FORBIDDEN_IMPORTS = {"time", "logging", "datetime"}
FILES = {
    "artifact.py",
    "tasks/corpora.py",
    "tasks/data.py",
    "tasks/text.py",
    "amalgamation/artifacts.py",
    "autoloss/files.py",
}


def room_of(name: str) -> str:
    """`tasks/data.py` → `tasks`, `base.py` → `base`."""
    return name.removesuffix(".py").split("/")[0]


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """The dotted names that are imported, and whether inside a function."""

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # a relative import stays within the package and is refused by style
            module = "." * node.level + (node.module or "")
            yield from ((f"{module}.{alias.name}", inside) for alias in node.names)
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside or is_function)

    return walk(ast.parse(source), inside=False)


def broken_floors(name: str, source: str) -> list[str]:
    """What a file imports that its floor does not have, one sentence each."""
    room = room_of(name)
    if room not in FLOORS:
        return [f"{name}: no row in FLOORS for {room!r}"]
    allowed, broken = FLOORS[room], []
    inside_too = allowed.anywhere | allowed.inside | ALSO_INSIDE.get(name, set())
    for dotted, inside in imports(source):
        top, *rest = dotted.split(".")
        if top == "metax":
            # `from metax import Task` would hide which room it comes from
            fine = bool(rest) and (rest[0] == room or rest[0] in allowed.metax)
        else:
            third_party = inside_too if inside else allowed.anywhere
            fine = top in third_party or top in sys.stdlib_module_names
        if not fine:
            where = "inside a function" if inside else "at the top"
            broken.append(f"{name}: imports {dotted} {where}")
    return broken


def host_acts(name: str, source: str) -> list[str]:
    """What a file does, or could do, to the host, one sentence each."""
    acts = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in FORBIDDEN_CALLS:
                acts.append(f"{name}:{node.lineno}: calls {node.func.id}")
        elif isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if dotted in FORBIDDEN_NAMES or node.attr in FILE_METHODS:
                acts.append(f"{name}:{node.lineno}: uses {dotted}")
    for dotted, _ in imports(source):
        if dotted in FORBIDDEN_NAMES or dotted.split(".")[0] in FORBIDDEN_IMPORTS:
            acts.append(f"{name}: imports {dotted}")
    return acts


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_down_only(name):
    assert not broken_floors(name, MODULES[name].read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "name", sorted(n for n in MODULES if room_of(n) != "harness" and n not in FILES)
)
def test_numerics_do_not_touch_the_host(name):
    assert not host_acts(name, MODULES[name].read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_files_stay_short_and_factories_close_over_statics(name):
    source = MODULES[name].read_text(encoding="utf-8")
    assert len(source.splitlines()) <= LONGEST
    assert "static_arg" not in source


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("base.py", "import numpy as np"),
        ("base.py", "from metax.hypergradient import sgd_hd"),
        ("hypergradient/descent.py", "from metax.tasks.data import load"),
        ("hypergradient/descent.py", "from metax import harness"),
        ("hypergradient/descent.py", "def f():\n    import flax"),
        ("hypergradient/descent.py", "from . import rates"),
        ("hypergradient/descent.py", "import metax"),
        ("stn/loop.py", "from metax.implicit import solve"),
        ("tasks/data.py", "import sklearn.datasets"),
        ("tasks/data.py", "from metax.harness import train"),
        ("harness/plot.py", "import matplotlib"),
        ("harness/records.py", "def f():\n    from matplotlib import pyplot"),
        ("harness/training.py", "from metax.hypergradient.descent import sgd_hd"),
        ("artifact.py", "from safetensors.numpy import save"),
        ("unheard/of.py", ""),
    ],
)
def test_a_climb_is_seen(name, source):
    assert broken_floors(name, source)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("hypergradient/descent.py", "import jax.numpy\nfrom metax.base import Task"),
        ("hypergradient/hdm.py", "from metax.hypergradient.rates import move"),
        ("tasks/data.py", "import os\ndef f():\n    import tensorflow_datasets as t"),
        ("harness/plot.py", "def f():\n    from matplotlib.figure import Figure"),
        ("artifact.py", "def f():\n    import safetensors.numpy"),
    ],
)
def test_what_the_design_allows_is_allowed(name, source):
    assert not broken_floors(name, source)


@pytest.mark.parametrize(
    "source",
    [
        "f = jax.jit(f)",
        "@jax.jit\ndef f(x): return x",
        "from jax import jit",
        "run = functools.partial(jax.jit, donate_argnums=0)(f)",
        "print(1)",
        "def f():\n    return open('x')",
        "text = path.read_text()",
        "import time",
        "def f():\n    from time import perf_counter",
        "import logging",
        "jax.debug.print('{}', x)",
    ],
)
def test_a_touch_of_the_host_is_seen(source):
    assert host_acts("tasks/models.py", source)
