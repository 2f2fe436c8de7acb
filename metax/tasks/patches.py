"""Convolution and pooling that stay cheap when differentiated twice, also on a CPU.

A convolution is one matrix product: every output position sees a patch of the image,
and the patches, laid out as rows, multiply the kernel as a matrix. XLA's CPU backend
differentiates that product as fast as it computes it, while its own convolution, taken
twice or inside a scan, falls back to code that is many times slower; and under `vmap`
over weights it becomes a grouped convolution, slower still. On other backends the
convolution is the fast one.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from metax.arguments import check_axes, refuse

__all__ = ["Conv", "check_impl", "convolve_gray", "max_pool"]

_IMPLS = ("auto", "gemm", "lax")


class Conv(nn.Module):
    """Convolution of images, with kernels glorot-uniform and biases zero at the start.

        y[b, i, j, o] = Σ_{u, v, c} x[b, s·i + u, s·j + v, c] k[u, v, c, o] + bias[o]

    Parameters: `kernel` [kh, kw, in, out] and `bias` [out]. The two ways to compute it
    agree up to rounding, in value and in every derivative. "gemm" holds the patches,
    kh · kw times the input, in memory.

    Attributes:
      features: channels of the output.
      kernel_size: height and width of the kernel, or one number for both.
      strides: s, or one for the height and one for the width.
      padding: "VALID" or "SAME", the latter with ⌈size / s⌉ outputs.
      impl: "gemm", "lax", or "auto": "gemm" on the CPU backend, "lax" elsewhere.

    Raises:
      ValueError: `impl` or `padding` is none of these.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from metax.tasks import Conv
      >>> x = jnp.ones((1, 5, 5, 2))
      >>> variables = Conv(3, 3, strides=2).init(jax.random.key(0), x)
      >>> Conv(3, 3, strides=2).apply(variables, x).shape
      (1, 2, 2, 3)
    """

    features: int
    kernel_size: int | tuple[int, int]
    strides: int | tuple[int, int] = 1
    padding: str = "VALID"
    impl: str = "auto"

    def __post_init__(self) -> None:
        check_impl(self.impl, "Conv(impl=...)")
        if self.padding not in ("VALID", "SAME"):
            raise ValueError(
                f"`Conv(padding=...)` must be 'VALID' or 'SAME'; got {self.padding!r}."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` [batch, height, width, channels] to [batch, height, width, features]."""
        shape = (*_pair(self.kernel_size), x.shape[-1], self.features)
        init = nn.initializers.glorot_uniform()
        kernel = self.param("kernel", init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape[-1:], jnp.float32)
        dtype = jnp.result_type(x, kernel)
        impl = _impl_of_backend() if self.impl == "auto" else self.impl
        convolve = _gemm if impl == "gemm" else _lax
        strides = _pair(self.strides)
        y = convolve(x.astype(dtype), kernel.astype(dtype), strides, self.padding)
        return y + bias


def max_pool(x: jax.Array, size: int) -> jax.Array:
    """The maximum of each `size` × `size` square; what is left at the end is dropped.

    By reshaping: the gradient of a windowed maximum (`nn.max_pool`) is a scatter, slow
    on a CPU, and slower the second time. And by maxima of two: the gradient of a
    reduction divides by how often the maximum is found again, which is never where XLA
    computes an entry twice and rounds it differently; that was NaN.

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
    x = x.reshape(batch, rows, size, columns, size, channels)
    x = functools.reduce(jnp.maximum, [x[:, :, i] for i in range(size)])
    return functools.reduce(jnp.maximum, [x[:, :, :, j] for j in range(size)])


def convolve_gray(
    x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, for `nn.Conv` on images of one channel.

    XLA's own convolution of one channel is slow on CPUs; a product with patches is not,
    and the patches of one channel are small.

    Args:
      x: [batch, height, width, 1].
      kernel: [height, width, 1, features].
      strides: as `nn.Conv` passes it, as the others.
      padding: likewise.
      **options: likewise; ignored on CPUs, where `nn.Conv`'s defaults are taken for
        granted.

    Returns:
      [batch, height, width, features].
    """
    if _impl_of_backend() == "lax" or isinstance(padding, str):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    height, width, _, features = kernel.shape
    x = jnp.pad(x[..., 0], ((0, 0), *padding))
    # Taps first: single pixels side by side would be copied one by one.
    windows = jnp.stack(_windows(x, (height, width), _pair(strides)))
    taps = height * width
    y = jnp.tensordot(windows.reshape(taps, -1), kernel.reshape(taps, features), (0, 0))
    return y.reshape(*windows.shape[1:], features)


def check_impl(impl: str, argument: str) -> None:
    """Refuses what is no way to convolve.

    Args:
      impl: what the caller passed.
      argument: how the error names it, e.g. `"Conv(impl=...)"`.

    Raises:
      ValueError: `impl` is unknown.
    """
    if impl not in _IMPLS:
        names = ", ".join(map(repr, _IMPLS))
        raise ValueError(f"`{argument}` must be one of {names}; got {impl!r}.")


def _impl_of_backend() -> str:
    return "gemm" if jax.default_backend() == "cpu" else "lax"


def _lax(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: str
) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _gemm(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: str
) -> jax.Array:
    """Patches as rows, ordered like the kernel's first three axes, times the kernel."""
    height, width, _, features = kernel.shape
    if padding == "SAME":
        pads = jax.lax.padtype_to_pads(x.shape[1:3], (height, width), strides, "SAME")
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    windows = jnp.concatenate(_windows(x, (height, width), strides), axis=-1)
    return windows @ kernel.reshape(-1, features)


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


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
