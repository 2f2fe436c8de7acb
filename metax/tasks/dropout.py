"""Dropout whose rate is an array, one for the batch or one an example.

flax's own takes the rate as a number, the same for the whole batch. A rate that is
tuned enters as a value, and while it is probed each example may have another.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from metax.arguments import check_numbers
from metax.base import check_key

__all__ = ["dropout"]

_SHAPES = ("element", "channel", "sequence")


def dropout(
    x: jax.Array,
    rate: jax.typing.ArrayLike,
    key: jax.Array,
    *,
    shape: Literal["element", "channel", "sequence"] = "element",
) -> jax.Array:
    """Drops activations at random and scales the rest, so that the mean is kept.

        y = x · 1[u < 1 - rate_i] / (1 - rate_i),    u ~ U[0, 1)

    No gradient reaches the rate. One key gives one u whatever the rate is, so two rates
    under the same key drop nested sets.

    Args:
      x: floating, [batch, ..., channels]; for "sequence" [batch, time, features].
      rate: the chance of being dropped, in 0..1: a scalar, or [batch], one an example.
        At 1 everything is dropped and the result is 0.
      key: a typed key.
      shape: what shares a draw. "element": nothing. "channel": all places of a channel
        of an example, for feature maps. "sequence": all times of a feature of an
        example, as variational dropout has it.

    Returns:
      y, with the shape and dtype of `x`.

    Raises:
      ValueError: `x` is not floating or has no channels, `rate` is neither a scalar nor
        [batch], `shape` is none of these, or the key is raw.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from metax.tasks import dropout
      >>> x = jnp.ones((3, 1000), jnp.float32)
      >>> y = dropout(x, jnp.array([0.0, 0.5, 0.9]), jax.random.key(0))
      >>> [round(float(row.max())) for row in y], [float((row == 0).any()) for row in y]
      ([1, 2, 10], [0.0, 1.0, 1.0])

    References:
      Srivastava et al., "Dropout: a simple way to prevent neural networks from
      overfitting", JMLR 2014. Tompson et al., "Efficient object localization using
      convolutional networks", CVPR 2015, arXiv 1411.4280 (channels). Gal & Ghahramani,
      "A theoretically grounded application of dropout in recurrent neural networks",
      NeurIPS 2016, arXiv 1512.05287 (sequences).
    """
    check_key(key, "dropout(key=...)")
    check_numbers("dropout", "rate", rate, least=0, most=1)
    rate = jax.lax.stop_gradient(jnp.asarray(rate))
    _check(x, rate, shape)
    kept = (1 - rate).reshape(rate.shape + (1,) * (x.ndim - 1) * rate.ndim)
    # float32 whatever the dtype of x: a uniform of bfloat16 has 128 values
    u = jax.random.uniform(key, _mask_shape(x.shape, shape), jnp.float32)
    return x * jnp.where(u < kept, 1 / kept, 0).astype(x.dtype)


def _mask_shape(shape: tuple[int, ...], shared: str) -> tuple[int, ...]:
    batch, *places, channels = shape
    if shared == "channel":
        return (batch, *(1 for _ in places), channels)
    if shared == "sequence":
        return (batch, 1, *places[1:], channels)
    return shape


def _check(x: jax.Array, rate: jax.Array, shape: str) -> None:
    if shape not in _SHAPES:
        names = ", ".join(map(repr, _SHAPES))
        raise ValueError(f"`dropout(shape=...)` must be one of {names}; got {shape!r}.")
    least = 3 if shape == "sequence" else 2
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim < least:
        raise ValueError(
            f"`dropout(x=...)` with shape={shape!r} must be floating, of at least "
            f"{least} axes; got {x.dtype}{list(x.shape)}."
        )
    if rate.shape not in ((), x.shape[:1]):
        raise ValueError(
            "`dropout(rate=...)` must be a scalar or of shape [batch]; got shape "
            f"{list(rate.shape)} for x of shape {list(x.shape)}."
        )
