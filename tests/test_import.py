"""What `import metax` costs and brings, and what the packages promise by `__all__`."""

import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import metax

HEAVY = ("orbax", "tensorflow_datasets", "tensorflow", "matplotlib", "sklearn")
PACKAGES = [
    "metax",
    *(f"metax.{module.name}" for module in pkgutil.iter_modules(metax.__path__)),
]


def run_python(code: str) -> str:
    """The output of a fresh interpreter: here everything is imported already."""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_brings_nothing_heavy():
    loaded = run_python(
        f"import sys, metax; print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert loaded == "[]"


def test_import_brings_no_third_party_beyond_jax_and_optax():
    # So that its time is theirs: told by what is loaded, for clocks vary.
    code = (
        "import sys, jax, optax; before = set(sys.modules); import metax\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    new = set(run_python(code).split()) - sys.stdlib_module_names
    assert "metax" in new
    # jax and optax load parts of their own when they are first named
    assert new <= {"metax", "jax", "optax"}


def test_rules_run_where_matplotlib_is_missing():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import jax.numpy as jnp, metax, metax.tasks, metax.harness\n"
        "rule = metax.hypergradient.sgd_hd(0.1)\n"
        "updates, _ = rule.update(jnp.ones(1), rule.init(jnp.ones(1)), jnp.ones(1))\n"
        "print(round(float(updates[0]), 3))"
    )
    assert run_python(code) == "-0.1"


@pytest.mark.parametrize("name", PACKAGES)
def test_public_names_exist_and_are_explained(name):
    package = importlib.import_module(name)
    assert package.__doc__
    assert len(package.__all__) == len(set(package.__all__))
    for public in package.__all__:
        assert inspect.getdoc(getattr(package, public)), f"{name}.{public}"
