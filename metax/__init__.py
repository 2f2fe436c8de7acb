"""metax: what people tune by hand in a training loop, learned instead."""

from metax import amalgamation, hypergradient, implicit, stn
from metax.base import (
    BilevelProblem,
    Hyperparameter,
    InnerInfo,
    InnerState,
    Loop,
    Task,
    check_key,
    inner_loop,
    squared_norm,
    truncate,
    unroll,
)

__all__ = [
    "BilevelProblem",
    "Hyperparameter",
    "InnerInfo",
    "InnerState",
    "Loop",
    "Task",
    "amalgamation",
    "check_key",
    "hypergradient",
    "implicit",
    "inner_loop",
    "squared_norm",
    "stn",
    "truncate",
    "unroll",
]
