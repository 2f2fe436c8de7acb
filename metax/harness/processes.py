"""Several processes that run one program: who writes, and what all must agree on.

Every process calls the same functions in the same order; what is spread over them is
brought together by collectives. With one process none of this does anything.
"""

from typing import Any

import jax
import numpy as np

__all__ = ["agree", "all_on_host", "is_first", "is_single", "wait_for_all", "whole"]


def is_single() -> bool:
    """Whether this process is the only one; starts no backend to find out."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def is_first() -> bool:
    """Whether this is the process that writes the files of a run."""
    return is_single() or jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when every process has come here.

    Args:
      name: what is waited for; the same in every process.
    """
    if not is_single():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def agree(number: int) -> int:
    """Finds the largest of the numbers that the processes came with.

    Args:
      number: this process's, at least 0.

    Returns:
      The largest, the same in every process.
    """
    if is_single():
        return number
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.asarray(number))))


def whole(leaf: Any) -> np.ndarray:
    """Brings all of an array to this host.

    Args:
      leaf: a jax or numpy array; spread over processes, all of them must call.

    Returns:
      A numpy array, on a CPU perhaps a view of the memory of `leaf`.
    """
    if is_here(leaf):
        return np.asarray(leaf)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def is_here(leaf: Any) -> bool:
    """Whether this process holds all of an array."""
    if not isinstance(leaf, jax.Array):
        return True
    return leaf.is_fully_addressable or leaf.is_fully_replicated


def all_on_host(tree: Any) -> Any:
    """`jax.device_get`, for arrays spread over processes as well."""
    return jax.tree.map(whole, tree) if not is_single() else jax.device_get(tree)
