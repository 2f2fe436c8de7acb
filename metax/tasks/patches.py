"""Convolution and pooling as products and maxima of whole arrays.

A convolution is one matrix product: every output position sees a patch of the image,
and the patches, laid out as rows, multiply the kernel as a matrix. XLA's CPU backend
differentiates that product as fast as it computes it, once or twice, inside a loop or
outside, and under `vmap` over weights too, where a convolution becomes a grouped one.
The price is memory for the patches, and the time to write and read them; images of one
channel have small patches, and win.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from metax.arguments import check_axes, refuse

__all__ = ["convolve_by_patches", "convolve_gray", "max_pool", "pair"]


def max_pool(x: jax.Array, size: int) -> jax.Array:
    """The maximum of each `size` × `size` square; what is left at the end is dropped.

    The gradient of a windowed maximum (`nn.max_pool`) is a scatter, slow on a CPU, and
    slower the second time. Here it is a selection, of as little work as the maximum.
    Among equal entries one has all of the gradient.

    Args:
      x: [batch, height, width, channels].
      size: of the squares and of the step between them, at least 1.

    Returns:
      [batch, height // size, width // size, channels].

    Raises:
      ValueError: `size` is below 1 or above a side, or `x` no batch of images.

    Example:
      >>> import jax.numpy as jnp
      >>> from metax.tasks import max_pool
      >>> max_pool(jnp.arange(15.0).reshape(1, 3, 5, 1), 2).ravel().tolist()
      [6.0, 8.0]
    """
    if size < 1:
        raise ValueError(f"`max_pool(size=...)` must be at least 1; got {size}.")
    check_axes("max_pool", "x", x, "batch, height, width, channels")
    batch, height, width, channels = x.shape
    if size > min(height, width):
        rule = f"must be at most the sides of the image, {height} and {width}"
        refuse("max_pool", "size", rule, size)
    rows, columns = height // size, width // size
    x = x[:, : rows * size, : columns * size]
    return _maxima(x.reshape(batch, rows, size, columns, size, channels))


@jax.custom_jvp
def _maxima(x: jax.Array) -> jax.Array:
    """Over both sizes of [batch, rows, size, columns, size, channels]."""
    size = x.shape[2]
    x = functools.reduce(jnp.maximum, [x[:, :, i] for i in range(size)])
    return functools.reduce(jnp.maximum, [x[:, :, :, j] for j in range(size)])


@_maxima.defjvp
def _maxima_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The tangents of the places where the maxima stand.

    By places, and not by what equals its maximum: XLA may compute an entry twice and
    round it differently, and then nothing does.
    """
    (x,), (dx,) = primals, tangents
    size = x.shape[2]
    rows = [(x[:, :, i], jnp.int32(i)) for i in range(size)]
    largest, row = functools.reduce(_larger, rows)
    columns = [
        (largest[:, :, :, j], size * row[:, :, :, j] + jnp.int32(j))
        for j in range(size)
    ]
    place = functools.reduce(_larger, columns)[1][:, :, None, :, None]
    places = jnp.arange(size**2).reshape(size, 1, size, 1)
    # not `largest`: a second derivative is to go by this rule too
    return _maxima(x), jnp.sum(jnp.where(place == places, dx, 0), (2, 4))


def _larger(
    one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The larger of two values, and its place; of equal ones, the first."""
    (x, at_x), (y, at_y) = one, other
    return jnp.maximum(x, y), jnp.where(y > x, at_y, at_x)


def convolve_gray(
    x: jax.Array,
    kernel: jax.Array,
    strides: Any,
    padding: Any,
    *,
    bias: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, for `nn.Conv` on images of one channel.

    XLA's own convolution of one channel is slow on CPUs; a product with patches is not,
    and the patches of one channel are small.

    Args:
      x: [batch, height, width, 1].
      kernel: [height, width, 1, features].
      strides: as `nn.Conv` passes it, as the others.
      padding: likewise.
      bias: [features], added to the result.
      **options: as `nn.Conv` passes them; ignored on CPUs, where its defaults are taken
        for granted.

    Returns:
      [batch, height, width, features].
    """
    if jax.default_backend() != "cpu" or isinstance(padding, str):
        y = jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
        return y if bias is None else y + bias
    height, width, _, features = kernel.shape
    x = jnp.pad(x[..., 0], ((0, 0), *padding))
    # Taps first: single pixels side by side would be copied one by one.
    windows = _windows(x, (height, width), pair(strides))
    kernel = kernel.reshape(height * width, features)
    if bias is not None:
        # One tap more, of ones: the output is the largest array there is, and what is
        # added to it, and summed over it, in the product costs nothing.
        windows.append(jnp.ones_like(windows[0]))
        kernel = jnp.concatenate([kernel, bias[None]])
    seen = jnp.stack(windows)
    y = jnp.tensordot(seen.reshape(len(windows), -1), kernel, (0, 0))
    return y.reshape(*seen.shape[1:], features)


def convolve_by_patches(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: str
) -> jax.Array:
    """A convolution as one product, of all patches and the kernel.

    Args:
      x: [batch, height, width, in].
      kernel: [height, width, in, out].
      strides: for height and width.
      padding: "VALID" or "SAME".

    Returns:
      [batch, height, width, out].
    """
    height, width, _, features = kernel.shape
    if padding == "SAME":
        pads = jax.lax.padtype_to_pads(x.shape[1:3], (height, width), strides, "SAME")
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    # Rows are ordered like the kernel's first three axes.
    windows = jnp.concatenate(_windows(x, (height, width), strides), axis=-1)
    return windows @ kernel.reshape(-1, features)


def pair(size: Any) -> tuple[int, int]:
    """Height and width of what is given as one number or as two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _windows(
    x: jax.Array, size: tuple[int, int], strides: tuple[int, int]
) -> list[jax.Array]:
    """What each tap of a kernel of this size meets, row by row of the kernel."""
    (height, width), (down, right) = size, strides
    return [
        _strided(_strided(x, i, height, down, axis=1), j, width, right, axis=2)
        for i in range(height)
        for j in range(width)
    ]


def _strided(x: jax.Array, start: int, size: int, stride: int, axis: int) -> jax.Array:
    """What the kernel's tap `start`, of `size`, meets along an axis."""
    num_steps = (x.shape[axis] - size) // stride
    stop = start + num_steps * stride + 1
    return jax.lax.slice_in_dim(x, start, stop, stride, axis)
