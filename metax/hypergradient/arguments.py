"""What the hypergradient rules refuse at their doors, and how they say so.

Values are looked at only where they are concrete: traced ones pass, so that a sweep
over learning rates stays a vmap. Trees, shapes and dtypes are known while tracing and
are always compared.
"""

import math
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.core
import jax.numpy as jnp

from metax.arguments import check_number, check_rule

__all__ = [
    "check_arguments",
    "check_given",
    "check_hdm_arguments",
    "check_moments",
    "check_real",
    "check_tree",
]

DESCENT = "hypergradient_descent"
RULES = ("additive", "multiplicative", "normalized")
SCOPES = ("global", "leaf", "element")
HDM_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "smoothness": ("must be above 0", lambda x: x > 0),
    "hyper_learning_rate": ("must be at least 0", lambda x: x >= 0),
    "momentum_learning_rate": ("must be at least 0", lambda x: x >= 0),
    "max_momentum": ("must lie in (0, 1)", lambda x: 0 < x < 1),
    "momentum": ("must lie in [0, max_momentum]", lambda x: x >= 0),
    "max_scaling": ("must be above 0", lambda x: x > 0),
    "curvature_window": ("must be at least 1", lambda x: x >= 1),
    "epsilon": ("must be above 0", lambda x: x > 0),
}


def check_arguments(
    *,
    base: Any,
    direction_dtype: Any,
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
    check_rule(DESCENT, "base", base)
    if hyper_optimizer is not None:
        check_rule(DESCENT, "hyper_optimizer", hyper_optimizer)
    _check_dtype(direction_dtype)
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
    if learning_rate is None:
        _refuse("learning_rate", "must be a number", None)
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


def check_moments(function: str, **values: Any) -> None:
    """Raises a `ValueError` for decays outside [0, 1), and for other negatives."""
    for name, value in values.items():
        is_decay = name in ("b1", "b2", "momentum")
        check_number(function, name, value, least=0, below=1 if is_decay else None)


def check_hdm_arguments(scaling: str, **values: Any) -> None:
    """Raises a `ValueError` for an argument of `hdm_hb` outside its range."""
    _check_choice("scaling", scaling, ("diagonal", "scalar"), "hdm_hb")
    for name, value in values.items():
        rule, holds = HDM_RANGES[name]
        if value is None and name != "hyper_learning_rate":  # None: 10/L
            _refuse(name, "must be a number", None, "hdm_hb")
        number = _number(name, value, "hdm_hb")
        if number is not None and not (holds(number) and math.isfinite(number)):
            _refuse(name, f"{rule} and be finite", number, "hdm_hb")
    first, last = (_number(n, values[n]) for n in ("momentum", "max_momentum"))
    if first is not None and last is not None and first > last:
        _refuse("momentum", f"must lie in [0, max_momentum={last}]", first, "hdm_hb")


def check_real(params: Any) -> None:
    """Raises a `ValueError` where parameters given to `hdm_hb` are not real floats."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                "`hdm_hb(...).init(params=...)` must hold real floating arrays; got "
                f"{dtype or type(leaf).__name__} at '{jax.tree_util.keystr(path)}'."
            )


def check_given(**arguments: Any) -> None:
    """Raises a `ValueError` naming what the update of `hdm_hb` was not given."""
    missing = [name for name, value in arguments.items() if value is None]
    if missing:
        raise ValueError(
            f"`hdm_hb(...).update({'=..., '.join(missing)}=...)` must be given; got "
            "None. Call `update(grad, state, params, value=value, grad=grad, "
            "value_fn=value_fn)` with value and gradient of value_fn at params."
        )


def _check_choice(
    argument: str, value: Any, known: tuple[str, ...], function: str = DESCENT
) -> None:
    if value not in known:
        rule = f"must be one of {', '.join(map(repr, known))}"
        _refuse(argument, rule, repr(value), function)


def _check_dtype(dtype: Any) -> None:
    try:
        fine = dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.inexact)
    except TypeError:
        fine = False
    if not fine:
        _refuse("direction_dtype", "must be a floating dtype, or None", repr(dtype))


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


def _number(argument: str, value: Any, function: str = DESCENT) -> float | None:
    """The value as a float; None where it is None or traced."""
    if value is None:
        return None
    if isinstance(value, str) or jnp.shape(value) != ():
        got = repr(value) if isinstance(value, str) else f"shape {jnp.shape(value)}"
        _refuse(argument, "must be a scalar", got, function)
    if isinstance(value, jax.core.Tracer):
        return None
    number = float(value)
    if math.isnan(number):
        _refuse(argument, "must be a number", number, function)
    return number


def _refuse(argument: str, rule: str, got: Any, function: str = DESCENT) -> NoReturn:
    raise ValueError(f"`{function}({argument}=...)` {rule}; got {got}.")
