"""Hyperparameters between their natural range and the unbounded line.

A tuner moves an unconstrained u; the problem sees a natural x. The `scale` of a
`Hyperparameter` names the map between them:

    scale       x(u)                                   u(x)
    "linear"    clip(u, lower, upper)                  x
    "log"       clip(exp u, lower, upper)              log x
    "logit"     lower + (upper - lower) · sigmoid(u)   log(x - lower) - log(upper - x)
    "softplus"  lower + softplus(u)                    v + log(1 - e⁻ᵛ), v = x - lower

A discrete one is rounded down afterwards. All names together, sorted, make one vector
of h coordinates, which is what perturbations and responses are about.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from metax.arguments import check_numbers
from metax.base import Hparams, Hyperparameter

__all__ = ["HyperparameterSpace", "constrain", "entropy", "unconstrain"]

_SCALES = ("linear", "log", "logit", "softplus")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class HyperparameterSpace:
    """What is known of the hyperparameters before a run: a static node, no arrays.

    Attributes:
      names: sorted.
      shapes: of each name, that of its `init`.
      specs: of each name, without `init` (None), which is an array.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    specs: tuple[Hyperparameter, ...]

    def by_name(self) -> Mapping[str, Hyperparameter]:
        """The specs by name."""
        return dict(zip(self.names, self.specs, strict=True))

    def size(self) -> int:
        """The number h of coordinates."""
        return sum(math.prod(shape) for shape in self.shapes)

    def flatten(self, tree: Mapping[str, jax.Array]) -> jax.Array:
        """`{name: init.shape}` as one vector (h,)."""
        return jnp.concatenate([jnp.ravel(tree[name]) for name in self.names])

    def unflatten(self, flat: jax.Array) -> Hparams:
        """A vector (..., h) as `{name: (...,) + init.shape}`."""
        tree, start = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            stop = start + math.prod(shape)
            tree[name] = flat[..., start:stop].reshape(*flat.shape[:-1], *shape)
            start = stop
        return tree

    def shared(self) -> jax.Array:
        """Which coordinates have one perturbation a batch: bool (h,)."""
        marks = {
            name: jnp.full(shape, spec.shared)
            for name, shape, spec in zip(
                self.names, self.shapes, self.specs, strict=True
            )
        }
        return self.flatten(marks)


def constrain(
    specs: Mapping[str, Hyperparameter], unconstrained: Mapping[str, jax.Array]
) -> Hparams:
    """Natural values of unconstrained ones, elementwise.

    No value leaves its bounds, whatever u is; a "logit" never reaches them, by one
    machine epsilon of the range, so that 1 / (1 - rate) is finite.

    Args:
      specs: the `Hyperparameter` of each name.
      unconstrained: some or all of these names, arrays of any shape.

    Returns:
      The same names, shapes and dtypes.

    Raises:
      ValueError: a name that `specs` lacks.

    Example:
      >>> import jax.numpy as jnp
      >>> from metax import Hyperparameter
      >>> from metax.stn import constrain, unconstrain
      >>> specs = {"rate": Hyperparameter(0.05, 0.0, 0.95, "logit")}
      >>> u = unconstrain(specs, {"rate": 0.05})
      >>> print(f"{u['rate']:.3f} {constrain(specs, u)['rate']:.3f}")
      -2.890 0.050
    """
    _check_names("constrain(unconstrained=...)", specs, unconstrained)
    return {
        name: _natural(specs[name], _as_float(u)) for name, u in unconstrained.items()
    }


def unconstrain(
    specs: Mapping[str, Hyperparameter], natural: Mapping[str, Any]
) -> Hparams:
    """The inverse of `constrain` where nothing was clipped or rounded.

    Args:
      specs: the `Hyperparameter` of each name.
      natural: some or all of these names, values within their bounds.

    Returns:
      The same names; arrays of at least float32.

    Raises:
      ValueError: a name that `specs` lacks; a concrete value outside its bounds, or on
        a bound that the scale does not reach ("logit": both; "log": 0; "softplus":
        lower).
    """
    _check_names("unconstrain(natural=...)", specs, natural)
    values = {name: _as_float(x) for name, x in natural.items()}
    for name, x in values.items():
        check_within(f"unconstrain(natural=...)[{name!r}]", specs[name], x)
    return {name: _coordinate(specs[name], x) for name, x in values.items()}


def entropy(scale: Any) -> jax.Array:
    """Of the Gaussian perturbation: H(σ) = Σ_k log(σ_k √(2πe)).

    Args:
      scale: any pytree of standard deviations σ > 0 (not raw scales).

    Returns:
      A scalar.

    Example:
      >>> from metax.stn import entropy
      >>> print(f"{entropy({'a': 1.0, 'b': 1.0}):.4f}")
      2.8379
    """
    check_numbers("entropy", "scale", scale, above=0)
    half_log = 0.5 * math.log(2 * math.pi * math.e)
    sums = [jnp.sum(jnp.log(sigma) + half_log) for sigma in jax.tree.leaves(scale)]
    return sum(sums, start=jnp.zeros(()))


def make_space(
    specs: Mapping[str, Hyperparameter], function: str, logit_bound: float
) -> HyperparameterSpace:
    """The space of checked specs."""
    if not specs:
        raise ValueError(
            f"`{function}(problem=...)` must have at least one hyperparameter; got "
            "problem.hparams={}."
        )
    names = tuple(sorted(specs))
    # A loop may be built inside a trace (one a setting, by vmap); the checks look at
    # values that are known before it.
    with jax.ensure_compile_time_eval():
        for name in names:
            _check_spec(f"{function}(problem=...).hparams[{name!r}]", specs[name])
            _check_start(function, name, specs[name], logit_bound)
    return HyperparameterSpace(
        names=names,
        shapes=tuple(jnp.shape(specs[name].init) for name in names),
        specs=tuple(specs[name]._replace(init=None) for name in names),
    )


def unconstrained_bounds(
    spec: Hyperparameter, logit_bound: float
) -> tuple[float, float]:
    """Where u is kept: the bounds of x, or ±`logit_bound` for a logit."""
    match spec.scale:
        case "linear":
            return float(spec.lower), float(spec.upper)
        case "log":
            log = lambda x: -math.inf if x == 0 else math.log(x)
            return log(spec.lower), math.inf if spec.upper == math.inf else log(
                spec.upper
            )
        case "logit":
            return -logit_bound, logit_bound
        case _:
            return -math.inf, math.inf


def inverse_softplus(x: Any) -> jax.Array:
    """log(eˣ - 1) in the form that does not overflow: x + log(1 - e⁻ˣ)."""
    x = _as_float(x)
    return x + jnp.log(-jnp.expm1(-x))


def check_within(argument: str, spec: Hyperparameter, value: jax.Array) -> None:
    """Refuses concrete values that `spec` excludes; traced ones pass."""
    closed = (value >= spec.lower) & (value <= spec.upper)
    inner = (value > spec.lower) & (value < spec.upper)
    inside = {
        "linear": closed,
        "log": closed & (value > 0),
        "logit": inner,
        "softplus": value > spec.lower,
    }[spec.scale]
    is_inside = jnp.all(inside & jnp.isfinite(value))
    # under jit the comparison of a concrete array is traced as well
    if not isinstance(is_inside, jax.core.Tracer) and not bool(is_inside):
        raise ValueError(
            f"`{argument}` must lie in [{spec.lower:g}, {spec.upper:g}]"
            f"{_ENDS[spec.scale]}; got {value}."
        )


_ENDS = {
    "linear": "",
    "log": " and above 0, since its scale is 'log'",
    "logit": " and on neither bound, since its scale is 'logit'",
    "softplus": " and above the lower bound, since its scale is 'softplus'",
}


def _natural(spec: Hyperparameter, u: jax.Array) -> jax.Array:
    eps, largest = jnp.finfo(u.dtype).eps, float(jnp.finfo(u.dtype).max)
    match spec.scale:
        case "linear":
            x = u
        case "log":
            # clipped before it can overflow, and a little earlier: log rounds up
            top = min(math.log(spec.upper), math.log(largest) - 1e-3)
            x = jnp.exp(jnp.minimum(u, top))
        case "logit":
            fraction = jnp.clip(jax.nn.sigmoid(u), eps, 1 - eps)
            x = spec.lower + (spec.upper - spec.lower) * fraction
        case _:
            x = spec.lower + jax.nn.softplus(u)
    x = jnp.clip(x, spec.lower, spec.upper)
    return _round_down(spec, x) if spec.discrete else x


def _round_down(spec: Hyperparameter, x: jax.Array) -> jax.Array:
    # a count that went to u and back may come out just below itself
    slack = 64 * jnp.finfo(x.dtype).eps * jnp.maximum(1, jnp.abs(x))
    x = jnp.floor(x + slack)
    if spec.scale != "logit":
        return x
    return jnp.minimum(x, math.ceil(spec.upper) - 1)


def _coordinate(spec: Hyperparameter, x: jax.Array) -> jax.Array:
    match spec.scale:
        case "linear":
            return x
        case "log":
            return jnp.log(x)
        case "logit":
            return jnp.log(x - spec.lower) - jnp.log(spec.upper - x)
        case _:
            return inverse_softplus(x - spec.lower)


def _as_float(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.result_type(float)
    return x.astype(jnp.promote_types(dtype, jnp.float32))


def _check_names(argument: str, specs: Mapping, values: Mapping) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(
            f"`{argument}` must be a mapping from names; got {type(values).__name__}."
        )
    unknown = sorted(set(values) - set(specs))
    if unknown:
        raise ValueError(
            f"`{argument}` must name hyperparameters of the problem, {sorted(specs)}; "
            f"got {unknown}."
        )


def _check_spec(argument: str, spec: Hyperparameter) -> None:
    if spec.scale not in _SCALES:
        raise ValueError(
            f"`{argument}.scale` must be in {_SCALES}; got {spec.scale!r}."
        )
    if not spec.lower < spec.upper:
        raise ValueError(
            f"`{argument}` must have lower < upper; got lower={spec.lower}, "
            f"upper={spec.upper}."
        )
    rules = {
        "linear": ("any bounds", True),
        "log": ("lower >= 0", spec.lower >= 0),
        "logit": (
            "two finite bounds",
            math.isfinite(spec.lower) and math.isfinite(spec.upper),
        ),
        "softplus": (
            "a finite lower bound and no upper",
            math.isfinite(spec.lower) and spec.upper == math.inf,
        ),
    }
    rule, is_kept = rules[spec.scale]
    if not is_kept:
        raise ValueError(
            f"`{argument}` must have {rule}, since its scale is {spec.scale!r}; got "
            f"lower={spec.lower}, upper={spec.upper}."
        )
    if not spec.perturbation > 0 or not math.isfinite(spec.perturbation):
        raise ValueError(
            f"`{argument}.perturbation` must be finite and above 0; got "
            f"{spec.perturbation}."
        )


def _check_start(
    function: str, name: str, spec: Hyperparameter, logit_bound: float
) -> None:
    argument = f"{function}(problem=...).hparams[{name!r}].init"
    init = _as_float(spec.init)
    if init.size == 0:
        raise ValueError(f"`{argument}` must have coordinates; got shape {init.shape}.")
    check_within(argument, spec, init)
    if spec.scale != "logit":
        return
    u = _coordinate(spec, init)
    if bool(jnp.any(jnp.abs(u) > logit_bound)):
        raise ValueError(
            f"`{argument}` must lie within logit_bound={logit_bound} in unconstrained "
            f"units, or the first step would move it there; got {spec.init}, which is "
            f"{u}."
        )
