"""Hypergradients by differentiating at the optimum, or through the training run.

`implicit_hypergradient` needs the weights to be near their optimum and solves one
linear system; `unrolled_hypergradient` differentiates a few steps of any optax rule.
Baselines and oracles for methods that tune the same `BilevelProblem`.
"""

from metax.implicit.stationarity import ImplicitInfo, implicit_hypergradient
from metax.implicit.unrolling import unrolled_hypergradient

__all__ = [
    "ImplicitInfo",
    "implicit_hypergradient",
    "unrolled_hypergradient",
]
