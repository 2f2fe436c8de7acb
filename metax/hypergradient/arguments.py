"""What hypergradient descent refuses at its door, and how it says so.

Values are looked at only where they are concrete: traced ones pass, so that a sweep
over learning rates stays a vmap. Trees and shapes are known while tracing and are
always compared.
"""

import math
from typing import Any, NoReturn

import jax
import jax.core
import jax.numpy as jnp

__all__ = ["check_arguments", "check_tree"]

RULES = ("additive", "multiplicative", "normalized")
SCOPES = ("global", "leaf", "element")


def check_arguments(
    *,
    learning_rate: Any,
    hyper_learning_rate: Any,
    hyper_optimizer: Any,
    rule: str,
    scope: str,
    bounds: Any,
    max_relative_change: Any,
    transition: Any,
) -> None:
    """Raises a `ValueError` that names the argument, the rule and the value."""
    _check_choice("rule", rule, RULES)
    _check_choice("scope", scope, SCOPES)
    if rule == "normalized" and scope == "element":
        _refuse("rule", 'cannot be "normalized" per element (h/d² has no scale)', scope)
    if (hyper_learning_rate is None) == (hyper_optimizer is None):
        _refuse(
            "hyper_learning_rate=..., hyper_optimizer",
            "must be given one without the other",
            "neither" if hyper_optimizer is None else "both",
        )
    alpha = _rate("learning_rate", learning_rate)
    if not callable(hyper_learning_rate):
        _rate("hyper_learning_rate", hyper_learning_rate)
    change = _number("max_relative_change", max_relative_change)
    if change is not None and not change > 0:
        _refuse("max_relative_change", "must be above 0", change)
    if alpha == 0 and (rule == "multiplicative" or max_relative_change is not None):
        cause = f"rule={rule!r}, max_relative_change={change}"
        _refuse(
            "learning_rate", f"can never leave 0 with {cause}: start above 0", alpha
        )
    _check_transition(transition)
    _check_bounds(bounds, alpha)


def check_tree(updates: Any, direction: Any) -> None:
    """Raises a `ValueError` where updates do not fit the parameters given to init."""
    what = "`hypergradient_descent(...).update(updates=...)` must have the"
    wanted, got = jax.tree.structure(direction), jax.tree.structure(updates)
    if wanted != got:
        raise ValueError(
            f"{what} tree of the parameters given to init; got {got}, wanted {wanted}."
        )
    given = jax.tree_util.tree_leaves_with_path(updates)
    for (path, leaf), stored in zip(given, jax.tree.leaves(direction), strict=True):
        if jnp.shape(leaf) != jnp.shape(stored):
            raise ValueError(
                f"{what} shapes of the parameters given to init; got "
                f"{jnp.shape(leaf)}, wanted {jnp.shape(stored)} at "
                f"'{jax.tree_util.keystr(path)}'."
            )


def _check_choice(argument: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        _refuse(argument, f"must be one of {', '.join(map(repr, known))}", repr(value))


def _check_transition(transition: Any) -> None:
    if transition is None:
        return
    is_pair = isinstance(transition, tuple | list) and len(transition) == 2
    if not is_pair or not callable(transition[0]):
        what = (
            "must be a pair (delta, final_learning_rate), delta a function of the count"
        )
        _refuse("transition", what, transition)
    _rate("transition", transition[1])


def _check_bounds(bounds: Any, alpha: float | None) -> None:
    if bounds is None:
        return
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        _refuse(
            "bounds", "must be a pair (lo, hi), either of which may be None", bounds
        )
    lo, hi = (_number("bounds", bound) for bound in bounds)
    lo = -math.inf if lo is None else lo
    hi = math.inf if hi is None else hi
    if lo > hi:
        _refuse("bounds", "must be in order, lo <= hi", bounds)
    if alpha is not None and not lo <= alpha <= hi:
        _refuse("learning_rate", f"must lie within bounds={tuple(bounds)}", alpha)


def _rate(argument: str, value: Any) -> float | None:
    number = _number(argument, value)
    if number is not None and not 0 <= number < math.inf:
        _refuse(argument, "must be at least 0 and finite", number)
    return number


def _number(argument: str, value: Any) -> float | None:
    """The value as a float; None where it is None or traced."""
    if value is None:
        return None
    if jnp.shape(value) != ():
        _refuse(argument, "must be a scalar", f"shape {jnp.shape(value)}")
    if isinstance(value, jax.core.Tracer):
        return None
    number = float(value)
    if math.isnan(number):
        _refuse(argument, "must be a number", number)
    return number


def _refuse(argument: str, rule: str, got: Any) -> NoReturn:
    raise ValueError(f"`hypergradient_descent({argument}=...)` {rule}; got {got}.")
