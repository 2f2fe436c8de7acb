"""Nothing that metax reads can run code, and importing it calls nobody.

Read by `ast`: no pickle and its kin, no eval, no shell, no download anywhere in the
package and its scripts; what opens a connection stands within a function that a user
calls. Beside that a fresh interpreter, whose audit hook hears all that an import does.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("metax", "experiments", "benchmarks")
FILES = {
    str(path.relative_to(ROOT)): path
    for room in ROOMS
    for path in (ROOT / room).rglob("*.py")
}

# whose files run code when they are read
READERS = {
    "pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "jsonpickle",
    "marshal", "shelve",
}  # fmt: skip
DOWNLOADS = {
    "urllib.request", "urllib3", "http", "requests", "httpx", "aiohttp", "ftplib",
    "smtplib", "xmlrpc", "telnetlib", "paramiko",
}  # fmt: skip
CALLS = {
    "eval", "exec", "compile", "builtins.eval", "builtins.exec", "__import__",
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "torch.load",
}  # fmt: skip
# what opens a connection: fine in a function, not while a module is imported
CONNECTIONS = ("socket.", "jax.distributed.", "tensorflow_datasets.", "urllib.")
NEVER_FALSE = {"allow_pickle", "shell"}


def within(dotted: str, names: set[str]) -> bool:
    return any(dotted == name or dotted.startswith(f"{name}.") for name in names)


def imports(tree: ast.AST) -> dict[str, str]:
    """What each name in the file stands for, as a dotted path."""
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                known[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return known


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def called(node: ast.Call, known: dict[str, str]) -> str:
    """The dotted name of what is called, imports resolved; "" for anything else."""
    parts = []
    function = node.func
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    if not isinstance(function, ast.Name):
        return ""
    return ".".join([known.get(function.id, function.id), *reversed(parts)])


def at_import(node: ast.AST) -> Iterator[ast.Call]:
    """The calls that happen when a module is imported: not those within functions."""
    if isinstance(node, ast.Call):
        yield node
    deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for name, value in ast.iter_fields(node):
        if deferred and name == "body":
            continue  # but for its decorators and defaults
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from at_import(child)


def dangers(source: str) -> list[str]:
    """What could run foreign code or call somebody, one sentence each."""
    tree = ast.parse(source)
    known = imports(tree)
    found = [
        f"{line}: imports {name}"
        for line, name in imported(tree)
        if within(name, READERS | DOWNLOADS)
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if (name := called(node, known)) in CALLS:
            found.append(f"{node.lineno}: calls {name}")
        for keyword in node.keywords:
            is_false = isinstance(keyword.value, ast.Constant) and not (
                keyword.value.value
            )
            if keyword.arg in NEVER_FALSE and not is_false:
                found.append(f"{node.lineno}: {keyword.arg}=... is not False")
    for node in at_import(tree):
        if called(node, known).startswith(CONNECTIONS):
            found.append(f"{node.lineno}: connects while it is imported")
    return found


@pytest.mark.parametrize("name", sorted(FILES))
def test_nothing_that_is_read_can_run_code(name):
    assert not dangers(FILES[name].read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import cloudpickle as c",
        "import marshal",
        "import shelve",
        "import joblib",
        "eval('1')",
        "def f(x):\n    exec(x)",
        "import builtins\nbuiltins.eval('1')",
        "compile('1', '', 'eval')",
        "import yaml\nyaml.load(text)",
        "from yaml import load\ndef f(x):\n    return load(x, Loader=L)",
        "import torch as t\nt.load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "def f(x, sure):\n    return numpy.load(x, allow_pickle=sure)",
        "import os\nos.system('ls')",
        "from os import system as s\ns('ls')",
        "import os\nos.popen('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import subprocess as s\ndef f(x):\n    s.Popen(x, shell=x)",
        "import requests",
        "def f():\n    import urllib.request",
        "from urllib.request import urlopen",
        "from http import client",
        "import socket\nhost = socket.gethostbyname('example.org')",
        "import jax\njax.distributed.initialize()",
        "import socket\nclass A:\n    host = socket.create_connection(('a', 1))",
        "import socket\ndef f(at=socket.socket()):\n    pass",
        "import tensorflow_datasets as tfds\ndata = tfds.load('mnist')",
    ],
)
def test_a_planted_danger_is_seen(source):
    assert dangers(source)


@pytest.mark.parametrize(
    "source",
    [
        "import json\njson.loads('1')",
        "import numpy as np\nnp.load('x', allow_pickle=False)",
        "import subprocess\nsubprocess.run(['git'], shell=False)",
        "import socket\ndef f():\n    return socket.gethostname()",
        "import jax\ndef f():\n    jax.distributed.initialize()",
        "import yaml\nyaml.safe_load('1')",
        "model.eval()\nre.compile('a')",
        "from urllib.parse import quote",
    ],
)
def test_what_is_harmless_is_allowed(source):
    assert not dangers(source)


LISTENER = """
import importlib, pkgutil, sys
heard, armed = set(), False
BAD = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind",
       "urllib.Request", "os.system", "pickle.find_class"}
sys.addaudithook(lambda event, args: heard.add(event) if armed else None)
# what these do is theirs
import metax, numpy, jax, optax, flax.linen, orbax.checkpoint, tqdm, tyro
armed = True
RUN
armed = False
print(sorted(heard & BAD))
"""
IMPORT_ALL = """
for module in pkgutil.walk_packages(metax.__path__, "metax."):
    importlib.import_module(module.name)
assert "metax.tasks.gan" in sys.modules
"""


def listened(run: str) -> str:
    command = [sys.executable, "-c", LISTENER.replace("RUN", run)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_every_module_connects_to_nothing():
    assert listened(IMPORT_ALL) == "[]"


def test_a_connection_would_be_heard():
    run = "import socket; socket.getaddrinfo('127.0.0.1', 1)"
    assert listened(run) == "['socket.getaddrinfo']"
