"""How functions refuse an argument: by a `ValueError` that names rule and value.

Values are looked at only where they are concrete: traced ones pass, so that a sweep
over learning rates stays a vmap.
"""

import math
from typing import Any, NoReturn

import jax
import jax.core
import jax.numpy as jnp

__all__ = [
    "check_at_least",
    "check_axes",
    "check_count",
    "check_has",
    "check_length",
    "check_number",
    "check_numbers",
    "check_one_of",
    "check_rule",
    "refuse",
]


def check_number(
    function: str,
    name: str,
    value: Any,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Refuses what is no finite scalar within its bounds.

    Args:
      function: the public name that was called, e.g. `"addsign"`.
      name: the argument.
      value: what the caller passed; a traced scalar passes.
      least: the least value allowed.
      most: the largest value allowed.
      above: what it must exceed.
      below: what it must stay below.

    Raises:
      ValueError: naming function and argument, the rule and the value.
    """
    is_number = hasattr(value, "__float__") and not isinstance(value, bool)
    if not is_number or jnp.shape(value) != ():
        refuse(function, name, "must be a scalar number", repr(value))
    if isinstance(value, jax.core.Tracer):
        return
    number = float(value)
    rules = {
        f"at least {least}": least is None or number >= least,
        f"at most {most}": most is None or number <= most,
        f"above {above}": above is None or number > above,
        f"below {below}": below is None or number < below,
        "finite": math.isfinite(number),
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        refuse(function, name, f"must be {broken[0]}", number)


def check_numbers(function: str, name: str, value: Any, **bounds: float) -> None:
    """Refuses a tree of scalars and arrays where any entry breaks `check_number`."""
    for leaf in jax.tree.leaves(value):
        if isinstance(leaf, jax.core.Tracer):
            continue
        # numpy, since under jit even a concrete array would be compared by tracing
        entries = jax.device_get(leaf)
        if jnp.size(entries) == 0:
            continue
        is_array = hasattr(entries, "min")
        for end in (entries.min(), entries.max()) if is_array else (entries,):
            check_number(function, name, end, **bounds)


def check_at_least(
    function: str, least: float, *, below: bool = False, **values: Any
) -> None:
    """Refuses concrete values under `least`, and at it where `below`."""
    for name, value in values.items():
        if isinstance(value, jax.core.Tracer):
            continue
        fine = value > least if below else value >= least
        if not fine:
            rule = f"must be {'above' if below else 'at least'} {least}"
            refuse(function, name, rule, value)


def check_count(function: str, least: int, **values: Any) -> None:
    """Refuses what is no integer, and integers under `least`."""
    for name, value in values.items():
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            refuse(function, name, "must be an integer", repr(value))
        if value.__index__() < least:
            refuse(function, name, f"must be at least {least}", value)


def check_one_of(
    function: str, name: str, value: Any, allowed: tuple[str, ...]
) -> None:
    """Refuses a word that is not among `allowed`."""
    if value not in allowed:
        words = " or ".join(f'"{word}"' for word in allowed)
        refuse(function, name, f"must be {words}", repr(value))


def check_has(function: str, name: str, value: Any, what: str, *fields: str) -> None:
    """Refuses what lacks a field, naming in `what` the thing that has them."""
    missing = [field for field in fields if not hasattr(value, field)]
    if missing:
        rule = f"must be {what}, with {', '.join(fields)}"
        refuse(function, name, rule, f"{type(value).__name__} without {missing}")


def check_rule(function: str, name: str, value: Any) -> None:
    """Refuses what is no optax rule, the function that makes one among it."""
    what = "an optax rule, for example `optax.sgd(0.1)`"
    check_has(function, name, value, what, "init", "update")


def check_length(function: str, name: str, tree: Any) -> None:
    """Refuses arrays that do not share a leading axis of at least 1."""
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(tree)}
    if len(sizes) != 1 or sizes & {(), (0,)}:
        rule = "must hold arrays that share a leading axis of at least 1, the examples"
        refuse(function, name, rule, f"leading axes {sorted(sizes)}")


def check_axes(function: str, name: str, value: Any, axes: str) -> None:
    """Refuses an array whose axes are not those that `axes` names, "batch, classes"."""
    if jnp.ndim(value) != len(axes.split(",")):
        rule = f"must have the axes [{axes}]"
        refuse(function, name, rule, f"shape {jnp.shape(value)}")


def refuse(function: str, name: str, rule: str, got: Any) -> NoReturn:
    """Raises the `ValueError` that every refusal of an argument is."""
    raise ValueError(f"`{function}({name}=...)` {rule}; got {got}.")
