"""The weights w0 + Φε_i of every example of a batch, as an object with one ability."""

from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from metax.base import Params, Select
from metax.stn.nodes import is_node, squared_norms

__all__ = ["ExampleWeights"]


class ExampleWeights:
    """Stands for weights that differ between examples; only their norm can be had.

    `metax.squared_norm` asks it. Forming the weights would take batch × |w| numbers, so
    all else is a TypeError.
    """

    def __init__(self, params: Params, phi: Any, eps: jax.Array):
        self._parts = params, phi, eps

    def squared_norm(self, select: Select | None = None) -> jax.Array:
        """‖w0 + Φε_i‖² over the selected leaves, of shape (batch,)."""
        params, phi, eps = self._parts
        leaves = jax.tree_util.tree_leaves_with_path(params)
        nodes = jax.tree.leaves(phi, is_leaf=is_node)
        norms = [
            squared_norms(node, leaf, eps)
            for (path, leaf), node in zip(leaves, nodes, strict=True)
            if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
            and (select is None or select(path, leaf))
        ]
        return sum(norms, start=jnp.zeros(eps.shape[:1], eps.dtype))

    def _refuse(self, *args: Any) -> NoReturn:
        raise TypeError(
            "`train_loss(params=...)` stands for weights that differ between examples: "
            "use `metax.squared_norm(params)`, or perturbation='batch', which hands "
            "over a real parameter tree."
        )

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # Python's own questions, such as "is it a pytree?"
            raise AttributeError(name)
        self._refuse()

    __getitem__ = __iter__ = __len__ = __array__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __pow__ = _refuse
    __neg__ = __truediv__ = __rtruediv__ = __matmul__ = __rmatmul__ = __abs__ = _refuse
