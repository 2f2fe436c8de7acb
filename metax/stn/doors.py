"""What `delta_stn` and its kernels refuse, before anything is computed."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from metax.arguments import check_has, check_rule
from metax.base import Batch, BilevelProblem, Hyperparameter, Params

__all__ = [
    "check_batch",
    "check_losses",
    "check_options",
    "check_parts",
    "check_scales",
    "check_used",
]


def check_parts(function: str, problem: Any, response: Any, **rules: Any) -> None:
    """What the tuner is made of: a problem, rules, and perhaps a response."""
    fields = ("init", "predict", "train_loss", "valid_loss", "hparams")
    check_has(function, "problem", problem, "a `BilevelProblem`", *fields)
    for name, rule in rules.items():
        if rule is not None or name != "scale_optimizer":
            check_rule(function, name, rule)
    if response is not None:
        fields = ("init", "tangent", "contract", "linearize", "apply")
        check_has(function, "response", response, "a `Response`", *fields)


def check_options(
    function: str,
    *,
    centered: bool,
    split: bool,
    linearized: bool,
    perturbation: str,
    valid_forward: str,
    antithetic: bool,
    predictor: bool,
    scale_bounds: tuple[float, float],
    entropy_weight: Any,
    logit_bound: float,
    **counts: int,
) -> None:
    """The options that depend on no data."""
    least = {"train_steps": 1, "valid_steps": 1, "warmup_steps": 0, "groups": 1}
    for name, count in counts.items():
        if count < least[name]:
            raise ValueError(
                f"`{function}({name}=...)` must be at least {least[name]}; got {count}."
            )
    if linearized and not centered:
        raise ValueError(
            f"`{function}(linearized=True)` needs centered=True, since the network is "
            "linearised at the centre; got centered=False."
        )
    if predictor and not centered:
        raise ValueError(
            f"`{function}(predictor=True)` needs centered=True: without it the weights "
            "follow λ by themselves; got centered=False."
        )
    _check_word(function, "perturbation", perturbation, ("example", "group", "batch"))
    _check_word(function, "valid_forward", valid_forward, ("nonlinear", "linearized"))
    if antithetic and perturbation == "batch":
        raise ValueError(
            f"`{function}(antithetic=True)` needs several perturbations a batch: "
            "perturbation='group' with groups=2 is a pair; got perturbation='batch'."
        )
    if antithetic and perturbation == "group" and counts["groups"] % 2:
        raise ValueError(
            f"`{function}(groups=...)` must be even where antithetic=True; got "
            f"{counts['groups']}."
        )
    if not 0 < scale_bounds[0] < scale_bounds[1]:
        raise ValueError(
            f"`{function}(scale_bounds=...)` must be 0 < lower < upper; got "
            f"{scale_bounds}."
        )
    if not logit_bound > 0:
        raise ValueError(
            f"`{function}(logit_bound=...)` must be above 0; got {logit_bound}."
        )
    if isinstance(entropy_weight, int | float) and not entropy_weight >= 0:
        raise ValueError(
            f"`{function}(entropy_weight=...)` must be at least 0; got "
            f"{entropy_weight}."
        )


def check_scales(
    function: str, specs: Mapping[str, Hyperparameter], scale_bounds: tuple
) -> None:
    """A σ that is tuned must start within its bounds."""
    for name, spec in specs.items():
        if not scale_bounds[0] <= spec.perturbation <= scale_bounds[1]:
            raise ValueError(
                f"`{function}(problem=...).hparams[{name!r}].perturbation` must lie in "
                f"scale_bounds={scale_bounds} where σ is tuned; got "
                f"{spec.perturbation}."
            )


def check_batch(
    argument: str, batch: Batch, *, groups: int | None, antithetic: bool
) -> None:
    """Refuses leaves of different lengths, and lengths that cannot be cut."""
    sizes = {
        jax.tree_util.keystr(path): jnp.shape(leaf)[:1]
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
    }
    if len(set(sizes.values())) != 1 or not all(all(s) and s for s in sizes.values()):
        raise ValueError(
            f"`{argument}` must hold arrays that share a leading axis of at least 1, "
            f"the examples; got leading axes {sizes}."
        )
    size = next(iter(sizes.values()))[0]
    if groups is not None and size % groups:
        raise ValueError(
            f"`delta_stn(groups=...)` must divide the batch; got groups={groups}, a "
            f"batch of {size}."
        )
    if antithetic and groups is None and size % 2:
        raise ValueError(
            "`delta_stn(antithetic=True)` needs an even batch, half of which gets -ε; "
            f"got a batch of {size}."
        )


def check_losses(losses: Any, size: int) -> None:
    """`train_loss` must give one loss for each example."""
    if jnp.shape(losses) != (size,):
        raise ValueError(
            "`BilevelProblem.train_loss(...)` must return one loss for each example, "
            f"shape ({size},); got shape {jnp.shape(losses)}."
        )


def check_used(
    problem: BilevelProblem, params: Params, batch: Batch, natural: Any, key: jax.Array
) -> None:
    """Refuses a hyperparameter that reaches neither a loss nor an output.

    Read off the traced program, so nothing is computed. What enters a function call
    inside it counts as used, whatever the function does with it.
    """

    def train(natural: Any) -> Any:
        outputs = problem.predict(params, batch, natural, key)
        return outputs, problem.train_loss(outputs, batch, natural, params)

    idle = _unused(train, natural)
    if idle:  # in validation alone is a use as well
        valid = lambda natural: problem.predict(params, batch, natural, None)
        idle &= _unused(valid, natural)
    if idle:
        raise ValueError(
            "`delta_stn(problem=...).hparams` must each be used by `predict` or "
            f"`train_loss`; these are not: {sorted(idle)}."
        )


def _unused(fn: Callable[[Any], Any], natural: Any) -> set[str]:
    """The names that no output of `fn` depends on."""
    jaxpr = jax.make_jaxpr(fn)(natural).jaxpr
    used = {id(var) for var in jaxpr.outvars}
    for equation in reversed(jaxpr.eqns):
        if any(id(var) in used for var in equation.outvars):
            used |= {id(var) for var in equation.invars}
    # the leaves of a dict come in the order of its sorted names
    named = zip(sorted(natural), jaxpr.invars, strict=True)
    return {name for name, var in named if id(var) not in used}


def _check_word(function: str, name: str, word: str, words: tuple[str, ...]) -> None:
    if word not in words:
        raise ValueError(
            f"`{function}({name}=...)` must be one of {words}; got {word!r}."
        )
