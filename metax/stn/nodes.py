"""The response of one leaf of a parameter tree, Φ: ε (h,) -> a displacement of it.

A response is a tree like the parameters with one *node* a leaf. Each node is a matrix
of shape (leaf.size, h) that is never formed:

    RowResponse       Φε = W ⊙ (Uε)                a scale for each output
    TiedRowResponse   Φε = stop_gradient(w) ⊙ (Uε)
    LowRankResponse   Φε = Σ_j (Mε)_j B_j
    DenseResponse     Φε = Σ_k ε_k C_k
    NoResponse        Φε = 0
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from metax.base import Params, Select

__all__ = [
    "DenseResponse",
    "LowRankResponse",
    "NoResponse",
    "RowResponse",
    "TiedRowResponse",
]

Structure = Literal["row", "tied_row", "dense", "none"] | int


class RowResponse(NamedTuple):
    """Rescales each output of a layer: ΔW = weight ⊙ (rescale ε) on the last axis.

    Attributes:
      weight: W, like the leaf.
      rescale: U, of shape (out, h), `out` the last axis of the leaf; starts at 0.
    """

    weight: jax.Array
    rescale: jax.Array


class TiedRowResponse(NamedTuple):
    """A `RowResponse` whose weight is the leaf itself, held constant.

    Attributes:
      rescale: U, of shape (out, h); starts at 0.
    """

    rescale: jax.Array


class LowRankResponse(NamedTuple):
    """Of rank k: Φε = Σ_j (mix ε)_j basis_j.

    Attributes:
      basis: B, of shape (k,) + leaf.shape.
      mix: M, of shape (k, h); starts at 0.
    """

    basis: jax.Array
    mix: jax.Array


class DenseResponse(NamedTuple):
    """The whole Jacobian, for small problems.

    Attributes:
      columns: C, of shape (h,) + leaf.shape; starts at 0.
    """

    columns: jax.Array


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NoResponse:
    """A leaf that does not respond: a static node, no arrays.

    Attributes:
      shape: of the leaf.
      dtype: of the leaf, its name.
    """

    shape: tuple[int, ...]
    dtype: str


Node = RowResponse | TiedRowResponse | LowRankResponse | DenseResponse | NoResponse
_KINDS = (RowResponse, TiedRowResponse, LowRankResponse, DenseResponse, NoResponse)


def is_node(x: Any) -> bool:
    """For `is_leaf` of tree functions."""
    return isinstance(x, _KINDS)


def init_node(
    key: jax.Array, leaf: jax.Array, structure: Structure, num_hparams: int, fan_in: int
) -> Node:
    """A node whose Φ is 0; its weights are uniform in ±1/√fan_in."""
    bound, dtype = fan_in**-0.5, leaf.dtype
    uniform = lambda shape: jax.random.uniform(key, shape, dtype, -bound, bound)
    zeros = lambda *shape: jnp.zeros((*shape, num_hparams), dtype)
    if structure == "none" or not jnp.issubdtype(dtype, jnp.floating):
        return NoResponse(shape=leaf.shape, dtype=jnp.dtype(dtype).name)
    if structure == "dense" or leaf.ndim == 0:
        return DenseResponse(columns=jnp.zeros((num_hparams, *leaf.shape), dtype))
    if structure == "row":
        return RowResponse(weight=uniform(leaf.shape), rescale=zeros(leaf.shape[-1]))
    if structure == "tied_row":
        return TiedRowResponse(rescale=zeros(leaf.shape[-1]))
    return LowRankResponse(
        basis=uniform((structure, *leaf.shape)), mix=zeros(structure)
    )


def displace(node: Node, eps: jax.Array, leaf: jax.Array | None = None) -> jax.Array:
    """Φε for one perturbation (h,), in the shape and dtype of the leaf."""
    match node:
        case RowResponse(weight, rescale):
            change, like = weight * (rescale @ eps), weight
        case TiedRowResponse(rescale):
            like = _still(leaf)
            change = like * (rescale @ eps)
        case LowRankResponse(basis, mix):
            change, like = jnp.tensordot(mix @ eps, basis, 1), basis
        case DenseResponse(columns):
            change, like = jnp.tensordot(eps, columns, 1), columns
        case _:
            return jnp.zeros(node.shape, node.dtype)
    return change.astype(like.dtype)


def contract_node(
    node: Node, gradient: jax.Array, leaf: jax.Array | None = None
) -> jax.Array:
    """Φᵀg, of shape (h,), of a node that responds."""
    rows = lambda x: x.reshape(-1, x.shape[-1]).sum(0)
    match node:
        case RowResponse(weight, rescale):
            return rows(weight * gradient) @ rescale
        case TiedRowResponse(rescale):
            return rows(_still(leaf) * gradient) @ rescale
        case LowRankResponse(basis, mix):
            return jnp.tensordot(basis, gradient, gradient.ndim) @ mix
        case DenseResponse(columns):
            return jnp.tensordot(columns, gradient, gradient.ndim)
        case _:
            raise TypeError(f"no response in {node}")


def _still(leaf: jax.Array | None) -> jax.Array:
    if leaf is None:
        raise ValueError(
            "`Response.tangent(params=...)` and `contract(params=...)` must be given "
            "for structure 'tied_row', which keeps no weights of its own; got None."
        )
    return jax.lax.stop_gradient(leaf)


def squared_norms(node: Node, leaf: jax.Array, eps: jax.Array) -> jax.Array:
    """‖w + Φε_i‖² for perturbations (batch, h), by the closed form: (batch,).

    With s = Uε_i:  Σ_r ‖w_r‖² + 2 s_ir ⟨w_r, v_r⟩ + s_ir² ‖v_r‖², and likewise for a
    sum of few fixed directions. No displaced weight is formed.
    """
    square = jnp.sum(jnp.square(leaf))
    match node:
        case RowResponse(weight, rescale):
            return square + _row_terms(leaf, weight, eps @ rescale.T)
        case TiedRowResponse(rescale):
            still = jax.lax.stop_gradient(leaf)
            return square + _row_terms(leaf, still, eps @ rescale.T)
        case LowRankResponse(basis, mix):
            return square + _direction_terms(leaf, basis, eps @ mix.T)
        case DenseResponse(columns):
            return square + _direction_terms(leaf, columns, eps)
        case _:
            return jnp.broadcast_to(square, eps.shape[:1])


def _row_terms(leaf: jax.Array, weight: jax.Array, scale: jax.Array) -> jax.Array:
    rows = lambda x: x.reshape(-1, x.shape[-1]).sum(0)
    return 2 * scale @ rows(leaf * weight) + jnp.square(scale) @ rows(weight * weight)


def _direction_terms(
    leaf: jax.Array, directions: jax.Array, amounts: jax.Array
) -> jax.Array:
    flat = directions.reshape(directions.shape[0], -1)
    quadratic = jnp.einsum("bj,jk,bk->b", amounts, flat @ flat.T, amounts)
    return 2 * amounts @ (flat @ leaf.ravel()) + quadratic


def init_tree(
    key: jax.Array,
    params: Params,
    num_hparams: int,
    structure: Structure | Callable[[tuple[Any, ...], Any], Structure],
    select: Select,
) -> Any:
    """A node for each leaf of `params`, each with a key of its own."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    shapes = {path: jnp.shape(leaf) for path, leaf in leaves}
    keys = jax.random.split(key, max(len(leaves), 1))
    nodes = []
    for (path, leaf), leaf_key in zip(leaves, keys, strict=True):
        kind = structure(path, leaf) if callable(structure) else structure
        kind = kind if select(path, leaf) else "none"
        fan_in = _fan_in(path, shapes)
        leaf = jnp.asarray(leaf)
        nodes.append(init_node(leaf_key, leaf, kind, num_hparams, fan_in))
    return treedef.unflatten(nodes)


def _fan_in(path: tuple[Any, ...], shapes: dict) -> int:
    """How many inputs an output of the leaf's layer sums over.

    That of a vector (a bias) is its neighbour's, where a layer has one. The rows of an
    embedding are not summed over: one is chosen.
    """
    shape = shapes[path]
    if len(shape) < 2:
        beside = [s for p, s in shapes.items() if p[:-1] == path[:-1] and len(s) > 1]
        shape = beside[0] if beside else (*shape, 1)
    is_embedding = "embedding" in jax.tree_util.keystr(path[-1:])
    inputs = shape[1:] if is_embedding and len(shape) > 1 else shape[:-1]
    return max(math.prod(inputs), 1)
