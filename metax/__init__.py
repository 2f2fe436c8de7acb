"""metax: what people tune by hand in a training loop, learned instead."""

from metax import amalgamation, autoloss, hypergradient, implicit, stn
from metax.base import (
    Action,
    AlternatingProblem,
    BilevelProblem,
    Hyperparameter,
    InnerInfo,
    InnerState,
    Loop,
    Task,
    check_key,
    inner_loop,
    last_reward,
    squared_norm,
    truncate,
    unroll,
)

__all__ = [
    "Action",
    "AlternatingProblem",
    "BilevelProblem",
    "Hyperparameter",
    "InnerInfo",
    "InnerState",
    "Loop",
    "Task",
    "amalgamation",
    "autoloss",
    "check_key",
    "hypergradient",
    "implicit",
    "inner_loop",
    "last_reward",
    "squared_norm",
    "stn",
    "truncate",
    "unroll",
]
