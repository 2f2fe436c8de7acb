"""Layers whose weights are masked, and the masks.

Dropconnect and word dropout strike weights, not activations. A method that displaces
the weights of a layer by itself (a response to hyperparameters, say) has to strike the
displacement with the same mask, so the mask is no business of the layer: it is drawn
outside, from the key of the pass, and comes in as an argument of the call.

Both layers are affine in each parameter, and entry r of the last axis of what
`__call__` returns depends on slice [..., r] of a parameter alone.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from metax.arguments import check_count, check_number
from metax.base import check_key
from metax.tasks.dropout import dropout

__all__ = ["MaskedDense", "MaskedEmbed", "dropconnect_mask", "word_mask"]


class MaskedDense(nn.Module):
    """A dense layer with a mask on its weights:  y = x (K ⊙ mask) + b.

    Attributes:
      features: the size of the last axis of y.
      use_bias: whether there is b.
      kernel_init: draws K, of shape (in, features).
      bias_init: draws b, of shape (features,).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from metax.tasks import MaskedDense
      >>> layer, x = MaskedDense(3), jnp.ones((2, 4), jnp.float32)
      >>> params = layer.init(jax.random.key(0), x)
      >>> y = layer.apply(params, x, jnp.zeros((4, 3), jnp.float32))
      >>> y.shape, float(abs(y).max())
      ((2, 3), 0.0)
    """

    features: int
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """y [..., features] of x [..., in]; `mask` (in, features), None for ones."""
        shape = x.shape[-1], self.features
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        if mask is not None:
            _check_shape("MaskedDense(...)(mask=...)", mask, shape)
            kernel = kernel * mask
        y = x @ kernel
        if self.use_bias:
            y += self.param("bias", self.bias_init, shape[1:], jnp.float32)
        return y


class MaskedEmbed(nn.Module):
    """Rows of a table by id, with a mask on the rows, and the decoder tied to them.

    Attributes:
      num_embeddings: how many rows, the size of the vocabulary.
      features: the size of a row.
      embedding_init: draws the table, of shape (num_embeddings, features).
    """

    num_embeddings: int
    features: int
    embedding_init: nn.initializers.Initializer = nn.initializers.normal(1.0)

    def setup(self):
        """One table for both methods."""
        shape = self.num_embeddings, self.features
        self.embedding = self.param(
            "embedding", self.embedding_init, shape, jnp.float32
        )

    def __call__(self, ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Rows [..., features] of int ids [...]; `mask` (num_embeddings,)."""
        rows = jnp.take(self.embedding, ids, axis=0)
        if mask is None:
            return rows
        _check_shape("MaskedEmbed(...)(mask=...)", mask, (self.num_embeddings,))
        return rows * jnp.take(mask, ids)[..., None]

    def attend(self, query: jax.Array) -> jax.Array:
        """Products [..., num_embeddings] of query [..., features] with every row."""
        return query @ self.embedding.T


def dropconnect_mask(
    key: jax.Array, shape: Sequence[int], rate: jax.typing.ArrayLike
) -> jax.Array:
    """A mask for the weights of a layer: 0 by chance `rate`, else 1 / (1 - rate).

    No gradient goes through the rate: how the loss depends on it is for the caller's
    method to find out.

    Wan et al., "Regularization of neural networks using DropConnect", ICML 2013.

    Args:
      key: a typed key; the same key gives the same mask.
      shape: of the weights.
      rate: a scalar in 0..1. One for the whole batch, since the weights
        are: its `Hyperparameter` is `shared`.

    Returns:
      float32, of that shape.

    Raises:
      ValueError: `rate` is no scalar.

    Example:
      >>> import jax
      >>> from metax.tasks import dropconnect_mask
      >>> mask = dropconnect_mask(jax.random.key(0), (100, 100), 0.75)
      >>> sorted({float(m) for m in mask.ravel()}), round(float(mask.mean()), 1)
      ([0.0, 4.0], 1.0)
    """
    check_key(key, "dropconnect_mask(key=...)")
    _check_scalar("dropconnect_mask(rate=...)", rate)
    check_number("dropconnect_mask", "rate", rate, least=0, most=1)
    return dropout(jnp.ones(shape, jnp.float32), rate, key)


def word_mask(key: jax.Array, vocab: int, rate: jax.typing.ArrayLike) -> jax.Array:
    """A mask for the rows of an embedding: a word is dropped wherever it occurs.

    Gal & Ghahramani, "A theoretically grounded application of dropout in recurrent
    neural networks", NeurIPS 2016, arXiv 1512.05287.

    Args:
      key: a typed key.
      vocab: the number of rows.
      rate: a scalar in 0..1; `shared`, as for `dropconnect_mask`.

    Returns:
      float32 (vocab,), 0 or 1 / (1 - rate); no gradient goes through the rate.

    Raises:
      ValueError: `rate` is no scalar.
    """
    check_key(key, "word_mask(key=...)")
    check_count("word_mask", 1, vocab=vocab)
    _check_scalar("word_mask(rate=...)", rate)
    check_number("word_mask", "rate", rate, least=0, most=1)
    return dropout(jnp.ones((vocab, 1), jnp.float32), rate, key)[:, 0]


def _check_scalar(argument: str, rate: jax.typing.ArrayLike) -> None:
    if jnp.ndim(rate) != 0:
        raise ValueError(
            f"`{argument}` must be a scalar, since one mask serves the whole batch; "
            f"got shape {jnp.shape(rate)}. Declare its Hyperparameter with shared=True."
        )


def _check_shape(argument: str, mask: jax.Array, shape: tuple[int, ...]) -> None:
    if mask.shape != shape:
        raise ValueError(
            f"`{argument}` must have the shape {shape} of what it masks; got "
            f"{mask.shape}."
        )
