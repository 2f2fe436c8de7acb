"""metax: what people tune by hand in a training loop, learned instead."""

from metax import hypergradient
from metax.base import (
    InnerInfo,
    InnerState,
    Loop,
    Task,
    check_key,
    inner_loop,
    truncate,
    unroll,
)

__all__ = [
    "InnerInfo",
    "InnerState",
    "Loop",
    "Task",
    "check_key",
    "hypergradient",
    "inner_loop",
    "truncate",
    "unroll",
]
