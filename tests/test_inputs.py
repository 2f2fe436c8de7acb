"""Bad input is refused in words: no public function answers with a bare trace.

The rows stand in `tests/inputs`, a module for each package of metax. Whatever is public
has its rows there, or stands below with the reason why not.
"""

import importlib
import inspect
import pkgutil
import types
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import pytest

import metax
import metax.harness

# what a message may be an instance of; all but the first name a file
TYPED = (ValueError, FileNotFoundError, metax.harness.StorageError)

FLAX = "a flax module: flax names the layer and both shapes, tests/tasks its own checks"
WITHOUT_ROWS = {
    "truncate": "takes any tree, and does nothing to its values",
    "autoloss.leaky_relu": "elementwise, of any array",
    "stn.HyperparameterSpace": "made by `delta_stn`, which checks",
    "stn.NoResponse": "a leaf without contents",
    "harness.latest_step": "answers None for a folder without checkpoints",
    "harness.read_metrics": "answers [] for a folder without metrics",
}
MODULES = {"hypergradient": "hypergradient", "implicit": "hypergradient", "stn": "stn",
           "amalgamation": "amalgamation", "autoloss": "autoloss", "tasks": "tasks",
           "harness": "harness"}  # fmt: skip


def packages() -> dict[str, types.ModuleType]:
    """metax, its packages, and the modules that those export as a whole."""
    found = {"": metax}
    for module in pkgutil.iter_modules(metax.__path__):
        if module.ispkg:
            found[module.name] = importlib.import_module(f"metax.{module.name}")
    for name, package in list(found.items()):
        for public in package.__all__:
            value = getattr(package, public)
            if isinstance(value, types.ModuleType) and name:
                found[f"{name}.{public}"] = value
    return found


def public_functions() -> Iterator[tuple[str, Any]]:
    """Each once, by the first of its names."""
    seen: set[int] = set()
    for name, package in packages().items():
        for public in package.__all__:
            value = getattr(package, public)
            is_plain = isinstance(value, type) and hasattr(value, "_fields")
            if is_plain or not callable(value) or id(value) in seen:
                continue
            seen.add(id(value))
            yield f"{name}.{public}".lstrip("."), value


FUNCTIONS = dict(public_functions())


def reason(name: str, value: Any) -> str | None:
    """Why a public name needs no row; None where it does."""
    if isinstance(value, type) and issubclass(value, BaseException):
        return "an error"
    if isinstance(value, type) and name.startswith("tasks."):
        return FLAX
    if not isinstance(value, type) and not inspect.signature(value).parameters:
        return "takes no argument"
    return WITHOUT_ROWS.get(name)


NEED_ROWS = sorted(n for n, value in FUNCTIONS.items() if reason(n, value) is None)


def table(name: str) -> dict[str, Any]:
    """The cases of a public function: its own, and those of what it returns."""
    module = MODULES.get(name.split(".")[0], "base")
    rows = importlib.import_module(f"tests.inputs.{module}").TABLE
    return {key: case for key, case in rows.items() if key.split(":")[0] == name}


def complaint(key: str, case: Any, row: tuple) -> str | None:
    """What is wrong with the answer to a bad value; None for a good refusal."""
    argument, value, *words = row
    names = (key.split(":")[-1].split(".")[-1], *case.named)
    try:
        case.function(**{**case.good, argument: value})
    except TYPED as error:
        message = str(error)
        if words:
            fine = all(word in message for word in words)
        else:
            is_named = any(f"{name}(" in message for name in names)
            fine = is_named and any(f"{argument}{end}" in message for end in "=[")
        return None if fine else f"says only: {message[:200]}"
    except Exception as error:
        return f"answers with a bare {type(error).__name__}: {str(error)[:200]}"
    return "is silent"


@pytest.mark.parametrize("name", NEED_ROWS)
def test_bad_input_is_refused_by_name(name):
    cases = table(name)
    assert name in cases, f"{name} is public: give it rows in tests/inputs"
    for key, case in cases.items():
        assert case.bad
        if case.runs:  # it is the bad value that is refused, and nothing else
            case.function(**case.good)
        for row in case.bad:
            wrong = complaint(key, case, row)
            assert wrong is None, f"{key}({row[0]}={row[1]!r}) {wrong}"


def test_reasons_are_given_for_what_is_public_and_has_no_rows():
    assert set(WITHOUT_ROWS) <= set(FUNCTIONS)
    assert not any(table(name) for name in WITHOUT_ROWS)


def test_no_row_is_about_something_that_is_not_public():
    for module in {*MODULES.values(), "base"}:
        rows = importlib.import_module(f"tests.inputs.{module}").TABLE
        assert {key.split(":")[0] for key in rows} <= set(FUNCTIONS)


@pytest.mark.parametrize(
    ("function", "wrong"),
    [
        (lambda x: 1 / x, "bare ZeroDivisionError"),
        (lambda x: jax.numpy.ones(2) + jax.numpy.ones(3), "bare TypeError"),
        (lambda x: None, "is silent"),
    ],
)
def test_a_bare_trace_and_a_silence_are_seen(function, wrong):
    from tests.inputs.cases import case

    assert wrong in (complaint("f", case(function, {}, ("x", 0)), ("x", 0)) or "")


def test_a_message_without_the_argument_is_seen():
    from tests.inputs.cases import case

    def f(x):
        raise ValueError("`f(...)` got something invalid.")

    assert "says only" in (complaint("f", case(f, {}, ("x", 0)), ("x", 0)) or "")


def test_traced_numbers_pass_the_doors():
    """A sweep over numbers stays a vmap: no door looks at a traced value."""
    from metax.amalgamation import clip_by_weight_norm, teachers
    from metax.autoloss import bernoulli
    from metax.hypergradient import adam_hd
    from metax.stn import entropy
    from metax.tasks import dropout, mixup, regression, smooth_labels

    key, x, labels = jax.random.key(0), jax.numpy.ones((4, 2)), jax.numpy.eye(4)

    def build(rate):
        adam_hd(rate, b1=rate, eps=rate)
        clip_by_weight_norm(rate, rate)
        teachers.addsign(rate)
        bernoulli(rate)
        regression.problem(rate, learning_rate=rate)
        mixup(x, labels, key, alpha=rate)
        return entropy(rate) + dropout(x, rate, key).sum() + smooth_labels(labels, rate)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.eval_shape(jax.vmap(build), jax.numpy.array([0.1, -1.0]))
