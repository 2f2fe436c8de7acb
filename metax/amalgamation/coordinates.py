"""Trees of parameters as one axis of coordinates, and the small networks along it.

A learned optimizer applies one network to every scalar parameter. So a rule flattens
its gradients into `[N]` once, runs each layer as a single matrix product for all
coordinates, and cuts the result at the end; a product a leaf, or a cell vmapped over
coordinates, costs many times as much. Parameters that are sharded over devices are
gathered by this: there, use `optax.partition` by leaf.
"""

from typing import Any

import jax
import jax.numpy as jnp

__all__ = [
    "all_finite",
    "dense",
    "dense_init",
    "features_dtype",
    "flatten",
    "keep_unless",
    "lstm",
    "lstm_init",
    "unflatten",
    "zero_carries",
]

Params = Any


def features_dtype(*trees: Params) -> Any:
    """The dtype in which to compute: at least float32, and no narrower than any leaf.

    Args:
      *trees: parameters, gradients or weights of a policy.

    Returns:
      A floating dtype.
    """
    return jnp.result_type(jnp.float32, *jax.tree.leaves(trees))


def flatten(tree: Params, dtype: Any) -> jax.Array:
    """All entries of a tree, leaf after leaf, as one axis [N].

    Args:
      tree: any tree of arrays, scalars and the empty tree included.
      dtype: of the result.
    """
    leaves = [jnp.ravel(leaf).astype(dtype) for leaf in jax.tree.leaves(tree)]
    return jnp.concatenate(leaves) if leaves else jnp.zeros((0,), dtype)


def unflatten(vector: jax.Array, like: Params, dtype: Any = None) -> Params:
    """Cuts [N] into a tree: what `flatten` undid.

    Args:
      vector: [N].
      like: the tree that gives the shapes, and the dtypes where `dtype` is None.
      dtype: of all leaves.
    """
    leaves, treedef = jax.tree.flatten(like)
    # a split transposes into one concatenation; slices into a padded array each
    parts = jax.lax.split(vector, [leaf.size for leaf in leaves]) if leaves else []
    cut = [
        part.reshape(jnp.shape(leaf)).astype(dtype or leaf.dtype)
        for part, leaf in zip(parts, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, cut)


def all_finite(tree: Params) -> jax.Array:
    """Whether every entry of a tree is finite, a bool scalar."""
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves)) if leaves else jnp.ones((), bool)


def keep_unless(change: jax.Array, new: Params, old: Params) -> Params:
    """`new` where the bool scalar `change` holds, else `old` bit for bit."""
    return jax.tree.map(lambda n, o: jnp.where(change, n, o), new, old)


def dense_init(key: jax.Array, num_in: int, num_out: int) -> dict[str, jax.Array]:
    """A kernel, Glorot-uniform, and a bias of zeros."""
    kernel = jax.nn.initializers.glorot_uniform()(key, (num_in, num_out))
    return {"w": kernel, "b": jnp.zeros(num_out, kernel.dtype)}


def dense(theta: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """x W + b for all coordinates: [N, in] to [N, out]."""
    return x @ theta["w"] + theta["b"]


def lstm_init(key: jax.Array, num_in: int, size: int) -> dict[str, jax.Array]:
    """The weights of one layer; the four gates stand side by side in each array.

    The input kernel [in, 4 size] is Glorot-uniform as one matrix, the recurrent one
    [size, 4 size] orthogonal, the bias 0, and 1 for the forget gate. Cells that draw
    a kernel for each gate start with other bounds and another forget gate.
    """
    key_input, key_recurrent = jax.random.split(key)
    initializers = jax.nn.initializers
    return {
        "wx": initializers.glorot_uniform()(key_input, (num_in, 4 * size)),
        "wh": initializers.orthogonal()(key_recurrent, (size, 4 * size)),
        "b": jnp.zeros(4 * size).at[size : 2 * size].set(1.0),
    }


def lstm(
    theta: dict[str, jax.Array], x: jax.Array, carry: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """One step of one layer for all coordinates: σ gates and a tanh cell.

        i, f, g, o = x W_x + h W_h + b
        c ← σ(f) c + σ(i) tanh(g)
        h ← σ(o) tanh(c)

    Args:
      theta: `lstm_init`'s.
      x: [N, in].
      carry: (h, c), each [N, size].

    Returns:
      The new (h, c); h is the output.
    """
    h, c = carry
    size = c.shape[-1]
    # σ(a) = ½ + ½ tanh(a/2): one kind of function for all gates is faster than two.
    # The halves are in the weights, and one product reads [x, h]: passes over arrays
    # of N rows are what this costs, as much as the products
    half = jnp.array([0.5, 0.5, 1.0, 0.5], c.dtype).repeat(size)
    kernel = half * jnp.concatenate([theta["wx"], theta["wh"]])
    gates = jnp.concatenate([x, h], axis=-1) @ kernel + half * theta["b"]
    i, f, g, o = jnp.split(jnp.tanh(gates), 4, axis=-1)
    i, f, o = (0.5 + 0.5 * gate for gate in (i, f, o))
    c = f * c + i * g
    return o * jnp.tanh(c), c


def zero_carries(
    num_layers: int, num: int, size: int, dtype: Any
) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """The (h, c) of each layer before the first step, for `num` coordinates."""
    zeros = lambda: jnp.zeros((num, size), dtype)
    return tuple((zeros(), zeros()) for _ in range(num_layers))
