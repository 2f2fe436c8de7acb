"""What is refused before anything runs: arguments, and rules without a derivative."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import optax

from metax.amalgamation.coordinates import all_finite
from metax.arguments import (
    check_at_least,
    check_has,
    check_one_of,
    check_rule,
    refuse,
)

__all__ = [
    "check_differentiable",
    "check_differentiable_student",
    "check_perturbation",
    "check_rules",
    "check_settings",
    "check_student",
]


def check_differentiable(rule: optax.GradientTransformation, argument: str) -> None:
    """Refuses a rule that cannot be differentiated through at a gradient of zero.

    Two updates with a gradient that has a zero entry, and reverse mode through them.

    Args:
      rule: any optax transformation.
      argument: how the error names it.

    Raises:
      ValueError: the derivative is not finite.
    """
    with jax.ensure_compile_time_eval():
        # a map compiles the whole probe as one program where it runs eagerly
        slope = jax.grad(lambda grad: _two_updates(rule, grad))
        slopes = jax.lax.map(slope, jnp.array([[0.0, 1.0]]))
        fine = all_finite(slopes)
    # rules made of traced numbers cannot be tried; they were where they were concrete
    if not isinstance(fine, jax.core.Tracer) and not fine:
        raise ValueError(
            f"`{argument}` must have a finite derivative where a gradient is exactly "
            f"zero; got {slopes.tolist()[0]} at the gradient [0, 1]. Rules like Adam "
            "need `eps_root` above 0, e.g. `optax.adam(0.005, eps=0.0, "
            "eps_root=1e-10)`."
        )


def check_differentiable_student(student: Any, argument: str) -> None:
    """Refuses a learned optimizer whose derivative in its weights is not finite.

    Args:
      student: a `LearnedOptimizer`.
      argument: how the error names it.

    Raises:
      ValueError: reverse mode through two updates, one entry of the gradient being
        zero, is not finite in the weights or in the gradient.
    """
    shapes = jax.eval_shape(student.init, jax.random.key(0))
    moved = lambda theta, grad: _two_updates(student.rule(theta), grad)

    def is_finite(value: jax.Array) -> jax.Array:
        # any weights will do but zeros, which would hide what is multiplied by them
        theta = jax.tree.map(lambda w: jnp.full(w.shape, value, w.dtype), shapes)
        return all_finite(jax.grad(moved, (0, 1))(theta, jnp.array([0.0, 1.0])))

    with jax.ensure_compile_time_eval():
        fine = jax.lax.map(is_finite, jnp.full(1, 0.1)).all()
    if not isinstance(fine, jax.core.Tracer) and not fine:
        raise ValueError(
            f"`{argument}` must have a finite derivative where a gradient is exactly "
            "zero; reverse mode through two updates at the gradient [0, 1] was not "
            "finite. Put a constant under its roots, or use an estimator that "
            'differentiates nothing: estimator="pes" or "es".'
        )


def check_perturbation(perturbation: Any, student: Any, estimator: str) -> None:
    """Refuses a perturbation that asks for gradients where none are computed.

    Args:
      perturbation: a `Perturbation`.
      student: a `LearnedOptimizer`, for the shapes of its weights.
      estimator: of `amalgamate`.

    Raises:
      ValueError: it calls its gradient function, and the estimator is not "bptt", or
        it is drawn at every step.
    """
    asked = []

    def gradient(theta: Any) -> Any:
        asked.append(True)
        return theta

    key = jax.random.key(0)
    shapes = jax.eval_shape(student.init, key)
    jax.eval_shape(lambda t, k: perturbation.apply(t, k, gradient), shapes, key)
    if asked and (estimator != "bptt" or perturbation.every == "step"):
        raise ValueError(
            "`amalgamate(perturbation=...)` must not be adversarial with "
            f"estimator={estimator!r} or at every step, where no gradient of the "
            "truncation is at hand; got one that asks for gradients. Use "
            "`perturb.gaussian`."
        )


def check_student(function: str, student: Any) -> None:
    """Refuses what is no learned optimizer."""
    what = "a `LearnedOptimizer`, for example `rnnprop()`"
    check_has(function, "student", student, what, "init", "rule")


def check_rules(function: str, name: str, rules: Any) -> None:
    """Refuses what is no mapping from names to optax rules."""
    if not isinstance(rules, Mapping):
        rule = "must be a mapping from names to optax rules, as `pool` makes one"
        refuse(function, name, rule, type(rules).__name__)
    for member, rule in rules.items():
        check_rule(function, f"{name}[{member!r}]", rule)


def check_settings(settings: Mapping[str, Any]) -> None:
    """The arguments of `amalgamate` by their rules.

    Args:
      settings: the arguments by name.

    Raises:
      ValueError: an argument outside its range, or two that do not go together.
    """
    s, name = settings, "amalgamate"
    check_has(name, "task", s["task"], "a `Task`", "init", "loss", "sample")
    check_student(name, s["student"])
    check_rules(name, "teachers", s["teachers"])
    if s["perturbation"] is not None:
        what = "a `Perturbation`"
        check_has(name, "perturbation", s["perturbation"], what, "apply", "every")
    if s["meta_optimizer"] is not None:
        check_rule(name, "meta_optimizer", s["meta_optimizer"])
    words = {
        "reduce": ("mean", "minmax", "softmax"),
        "combine": ("sum", "switch"),
        "warmup_coordinates": ("true", "scaled"),
        "estimator": ("bptt", "pes", "es"),
        "remat": ("none", "step", "block"),
        "distance_coordinates": ("scaled", "true"),
    }
    for word, allowed in words.items():
        check_one_of(name, word, s[word], allowed)
    whole = ("truncation_length", "unroll_length", "num_tasks")
    check_at_least(name, 1, **{key: s[key] for key in whole})
    positive = ("softmax_tau", "es_std", "distance_eps")
    check_at_least(name, 0, below=True, **{key: s[key] for key in positive})
    if s["huber_delta"] is not None:
        check_at_least(name, 0, below=True, huber_delta=s["huber_delta"])
    least = ("random_scale", "imitation_weight", "input_noise", "warmup_steps",
             "warmup_learning_rate")  # fmt: skip
    check_at_least(name, 0, **{key: s[key] for key in least})
    if s["unroll_length"] % s["truncation_length"]:
        raise ValueError(
            "`amalgamate(truncation_length=...)` must divide `unroll_length`; got "
            f"truncation_length={s['truncation_length']}, "
            f"unroll_length={s['unroll_length']}."
        )
    num = len(s["teachers"])
    if s["reduce"] in ("minmax", "softmax") and num < 2:
        raise ValueError(
            f"`amalgamate(reduce={s['reduce']!r})` must have at least two teachers to "
            f'choose from; got {num}. With one, or none, use reduce="mean".'
        )
    if s["combine"] == "switch":
        _check_switch(num, s["imitation_weight"])


def _check_switch(num_teachers: int, weight: Any) -> None:
    if not num_teachers:
        raise ValueError(
            '`amalgamate(combine="switch")` must have a teacher to switch to; '
            "got teachers={}."
        )
    if not isinstance(weight, jax.core.Tracer) and not weight <= 1:
        raise ValueError(
            "`amalgamate(imitation_weight=...)` must lie in [0, 1] with "
            f'combine="switch", where it is a probability; got {weight}.'
        )


def _two_updates(rule: optax.GradientTransformation, grad: jax.Array) -> jax.Array:
    """The sum of all entries of two updates with one gradient of two entries."""
    rule, params = optax.with_extra_args_support(rule), jnp.ones(2)
    first, state = rule.update(grad, rule.init(params), params)
    second, _ = rule.update(grad, state, params)
    return jnp.sum(jnp.asarray(first)) + jnp.sum(jnp.asarray(second))
