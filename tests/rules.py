"""The rows of the rules battery: every rule of metax, and how to call it.

A new rule is one row of `RULES`. What a rule needs beyond gradients it says in its row,
so that the battery itself knows no rule by name.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from metax.amalgamation import LearnedOptimizer, choice, l2l, pool, rnnprop, with_warmup
from metax.amalgamation.teachers import (
    adam_constant_correction,
    addsign,
    momentum_ema,
    powersign,
)
from metax.hypergradient import adam_hd, adamw_hd, hdm_hb, hypergradient_descent, sgd_hd


class Rule(NamedTuple):
    """One rule as the battery calls it.

    Attributes:
      factory: makes the rule from `numbers` and `options`.
      numbers: arguments that may be traced; the first is the one that is swept.
      options: all other arguments.
      reduces: which sums over parameters it takes: "all" (over all of them), "none",
        or "fixed" for a rule without the argument `axis_name`, which says over which
        axes parameters sharded inside `shard_map` are spread.
      sees_objective: the rule evaluates the objective itself, on the whole tree, so
        wrappers that show it a part of the tree or average its gradients do not apply.
    """

    factory: Callable[..., optax.GradientTransformationExtraArgs]
    numbers: Mapping[str, float]
    options: Mapping[str, Any] = {}
    reduces: str = "all"
    sees_objective: bool = False

    def __call__(self, **changed: Any) -> optax.GradientTransformationExtraArgs:
        return self.factory(**{**self.numbers, **self.options, **changed})

    @property
    def swept(self) -> str:
        return next(iter(self.numbers))


def _tower(learning_rate, hyper_learning_rate, hyper_hyper_learning_rate):
    hyper = hypergradient_descent(
        optax.identity(), hyper_learning_rate, hyper_hyper_learning_rate
    )
    return sgd_hd(learning_rate, hyper_optimizer=hyper)


def _learned(
    make: Callable[[], LearnedOptimizer], seed: int = 0
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """A learned optimizer behind two steps of SGD, whose rate is its only number.

    Untrained ones may climb as well: each has a seed with which it descends.
    """

    @functools.cache
    def trained() -> tuple[LearnedOptimizer, Any]:
        student = make()
        return student, jax.tree.map(np.asarray, student.init(jax.random.key(seed)))

    def factory(learning_rate: Any) -> optax.GradientTransformationExtraArgs:
        student, theta = trained()
        return with_warmup(student.rule(theta), 2, learning_rate)

    return factory


RATES = {"learning_rate": 0.02, "hyper_learning_rate": 1e-3}
RATE = {"learning_rate": 0.05}
# A root inside Adam's square root: without it the derivative at a zero is NaN.
ADAM = {"eps_root": 1e-12}

RULES = {
    "sgd_hd": Rule(sgd_hd, RATES),
    "sgd_hd_momentum": Rule(sgd_hd, RATES, {"momentum": 0.9}),
    "sgd_hd_nesterov": Rule(sgd_hd, RATES, {"momentum": 0.9, "nesterov": True}),
    "sgd_hd_multiplicative": Rule(sgd_hd, RATES, {"rule": "multiplicative"}),
    "sgd_hd_normalized": Rule(sgd_hd, RATES, {"rule": "normalized"}),
    "sgd_hd_leaf": Rule(sgd_hd, RATES, {"scope": "leaf"}),
    "sgd_hd_element": Rule(sgd_hd, RATES, {"scope": "element"}, reduces="none"),
    "sgd_hd_limited": Rule(
        sgd_hd, RATES, {"bounds": (0, 1.0), "max_relative_change": 0.2}
    ),
    "sgd_hd_transition": Rule(
        sgd_hd, RATES, {"transition": (lambda count: 1 / (count + 1) ** 2, 0.1)}
    ),
    "sgd_hd_tower": Rule(
        _tower, {**RATES, "hyper_hyper_learning_rate": 1e-8}, reduces="fixed"
    ),
    "adam_hd": Rule(adam_hd, RATES, ADAM),
    "adam_hd_multiplicative": Rule(adam_hd, RATES, ADAM | {"rule": "multiplicative"}),
    "adam_hd_leaf": Rule(adam_hd, RATES, ADAM | {"scope": "leaf"}),
    "adamw_hd": Rule(adamw_hd, RATES, ADAM),
    "hdm_hb": Rule(hdm_hb, {"smoothness": 4.0}, reduces="fixed", sees_objective=True),
    "hdm_hb_scalar": Rule(
        hdm_hb,
        {"smoothness": 4.0},
        {"scaling": "scalar"},
        reduces="fixed",
        sees_objective=True,
    ),
    "addsign": Rule(addsign, RATE, reduces="fixed"),
    "addsign_hard": Rule(addsign, RATE, {"smooth": False}, reduces="fixed"),
    "powersign": Rule(powersign, RATE, reduces="fixed"),
    "momentum_ema": Rule(momentum_ema, RATE, reduces="fixed"),
    "adam_constant_correction": Rule(adam_constant_correction, RATE, reduces="fixed"),
    "rnnprop": Rule(_learned(lambda: rnnprop(3, 1)), RATE, reduces="fixed"),
    "rnnprop_release": Rule(
        _learned(
            lambda: rnnprop(3, 1, input_layer=True, bias_correction="constant"), seed=2
        ),
        RATE,
        reduces="fixed",
    ),
    "l2l": Rule(
        _learned(lambda: l2l(3, 1, preprocess="log_sign")), RATE, reduces="fixed"
    ),
    "choice": Rule(
        _learned(lambda: choice(pool("small"), 3, num_layers=1)), RATE, reduces="fixed"
    ),
}
