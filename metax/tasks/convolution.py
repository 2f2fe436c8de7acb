"""A convolution that stays fast when it is differentiated inside a loop, on a CPU.

XLA's CPU backend has fast code for convolutions of images [batch, height, width,
channels] with kernels [height, width, in, out], and brings the others into that form,
but only outside of loops: within `lax.scan` the gradient of such a convolution is one
of the others, and 40 (in the image) to 60 times (in the kernel) slower. So the three
bilinear maps

    F(x, k) = x ∗ k      X(g, k) = F(·, k)ᵀ g      K(x, g) = F(x, ·)ᵀ g

are written here in the fast form each, and transpose into each other:

    X(·, k)ᵀ x = F(x, k)    X(g, ·)ᵀ x = K(x, g)
    K(x, ·)ᵀ k = F(x, k)    K(·, g)ᵀ k = X(g, k)

which makes them primitives of JAX: a custom rule of derivatives serves one direction,
forward or reverse, and a linearised network needs both, one within the other.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from metax.tasks.patches import convolve_by_patches, convolve_gray, pair

__all__ = ["Conv", "check_impl", "convolve"]

_IMPLS = ("auto", "gemm", "lax")

Sizes = tuple[int, ...]


class _Window(NamedTuple):
    """How a kernel moves over an image; each for height and width."""

    image: Sizes
    kernel: Sizes
    strides: Sizes
    padding: tuple[Sizes, ...]

    def output(self) -> Sizes:
        """Sizes of the result."""
        return tuple(
            (size + sum(pads) - taps) // stride + 1
            for size, taps, stride, pads in zip(*self, strict=True)
        )


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    strides: Any,
    padding: Any,
    *,
    bias: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, for `nn.Conv(conv_general_dilated=convolve)`.

    The same numbers; on a CPU a gradient of it costs in a loop what it costs outside.

    Args:
      x: [batch, height, width, in].
      kernel: [height, width, in, out].
      strides: as `nn.Conv` passes it, as the others.
      padding: likewise.
      bias: [out], added to the result; with images of one channel at no cost.
      **options: as `nn.Conv` passes them; ignored on CPUs, where its defaults are taken
        for granted.

    Returns:
      [batch, height, width, out].
    """
    if jax.default_backend() != "cpu":
        y = _plain(x, kernel, strides, padding, **options)
        return y if bias is None else y + bias
    image, taps = x.shape[1:3], kernel.shape[:2]
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(image, taps, strides, padding)
    if x.shape[-1] == 1:
        return convolve_gray(x, kernel, strides, padding, bias=bias, **options)
    pads = tuple((low, high) for low, high in padding)
    window = _Window(image, taps, tuple(strides), pads)
    y = _FORWARD.bind(x, kernel, window=window)
    return y if bias is None else y + bias


class Conv(nn.Module):
    """Convolution of images, with kernels glorot-uniform and biases zero at the start.

        y[b, i, j, o] = Σ_{u, v, c} x[b, s·i + u, s·j + v, c] k[u, v, c, o] + bias[o]

    Parameters: `kernel` [kh, kw, in, out] and `bias` [out]. The ways to compute it
    agree up to rounding, in value and in every derivative. On a CPU "lax" is slow when
    differentiated in a loop; "gemm" is fast there, also under `vmap` over weights, and
    holds the patches, kh · kw times the input, in memory.

    Attributes:
      features: channels of the output.
      kernel_size: height and width of the kernel, or one number for both.
      strides: s, or one for the height and one for the width.
      padding: "VALID" or "SAME", the latter with ⌈size / s⌉ outputs.
      impl: "gemm", the product with all patches; "lax", JAX's convolution; "auto",
        `convolve`: JAX's too, but for the CPU backend, where it is fast in loops.

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
        shape = (*pair(self.kernel_size), x.shape[-1], self.features)
        init = nn.initializers.glorot_uniform()
        kernel = self.param("kernel", init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape[-1:], jnp.float32)
        dtype = jnp.result_type(x, kernel)
        x, kernel, bias = (a.astype(dtype) for a in (x, kernel, bias))
        how = (pair(self.strides), self.padding)
        if self.impl == "auto":
            return convolve(x, kernel, *how, bias=bias)
        by = {"gemm": convolve_by_patches, "lax": _plain}[self.impl]
        return by(x, kernel, *how) + bias


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


def _forward(x: jax.Array, kernel: jax.Array, *, window: _Window) -> jax.Array:
    return _plain(x, kernel, window.strides, window.padding)


def _by_image(g: jax.Array, kernel: jax.Array, *, window: _Window) -> jax.Array:
    """Each output's g spread over what its kernel saw."""
    if window.strides == (1, 1) and window.padding == ((0, 0), (0, 0)):
        return _by_rows(g, kernel)
    pads = [
        (taps - 1 - low, size + low - 1 - (out - 1) * stride)
        for out, (size, taps, stride, (low, _)) in _by_axis(window)
    ]
    turned = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    return _plain(g, turned, (1, 1), pads, lhs_dilation=window.strides)


def _by_rows(g: jax.Array, kernel: jax.Array) -> jax.Array:
    """`_by_image` for steps of 1 without padding: along the width, then the height.

    A convolution of both meets as many rows of zeros as the kernel is high less one
    above and below, and yields few channels at once, where products are slow. Along
    the width alone each row of the kernel gives channels of its own; its result then
    goes as far down as the row stands in the kernel.
    """
    height, width, channels, features = kernel.shape
    turned = kernel[:, ::-1].transpose(1, 3, 0, 2)
    turned = turned.reshape(1, width, features, height * channels)
    y = _plain(g, turned, (1, 1), [(0, 0), (width - 1, width - 1)])
    y = y.reshape(*y.shape[:3], height, channels)
    down = [((0, 0), (i, height - 1 - i), (0, 0), (0, 0)) for i in range(height)]
    rows = [jnp.pad(y[:, :, :, i], pads) for i, pads in enumerate(down)]
    return functools.reduce(jnp.add, rows)


def _by_kernel(x: jax.Array, g: jax.Array, *, window: _Window) -> jax.Array:
    """g moves over the image as a kernel would; the examples are its channels."""
    pads = [
        (low, taps - size - low + (out - 1) * stride)
        for out, (size, taps, stride, (low, _)) in _by_axis(window)
    ]
    x, g = x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)
    y = _plain(x, g, (1, 1), pads, rhs_dilation=window.strides)
    return y.transpose(1, 2, 0, 3)


def _by_axis(window: _Window) -> Any:
    return zip(window.output(), zip(*window, strict=True), strict=True)


def _plain(x: jax.Array, kernel: jax.Array, *how: Any, **options: Any) -> jax.Array:
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), **options}
    return jax.lax.conv_general_dilated(x, kernel, *how, **options)


def _primitive(name: str, fun: Callable[..., jax.Array]) -> Primitive:
    """`fun` as a primitive that is not differentiated yet."""
    primitive = Primitive(name)

    def abstract(*operands: Any, window: _Window) -> Any:
        specs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands]
        out = jax.eval_shape(functools.partial(fun, window=window), *specs)
        return ShapedArray(out.shape, out.dtype)

    def batch(operands: Any, axes: Any, *, window: _Window) -> tuple[jax.Array, int]:
        of_one = functools.partial(primitive.bind, window=window)
        if axes[1] is None and primitive is not _BY_KERNEL:
            x, kernel = operands
            return _as_one_batch(of_one, x, kernel, axes[0]), 0
        return _in_turn(of_one, operands, axes), 0

    primitive.def_impl(fun)
    primitive.def_abstract_eval(abstract)
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(fun, multiple_results=False))
    return primitive


def _as_one_batch(
    of_one: Callable[..., jax.Array], x: jax.Array, kernel: jax.Array, axis: int
) -> jax.Array:
    """Batches of images that meet the same kernel are one batch."""
    x = jnp.moveaxis(x, axis, 0)
    y = of_one(x.reshape(-1, *x.shape[2:]), kernel)
    return y.reshape(*x.shape[:2], *y.shape[1:])


def _in_turn(of_one: Callable[..., jax.Array], operands: Any, axes: Any) -> jax.Array:
    """One after the other: as one program it is a grouped convolution, and slower."""
    pairs = list(zip(operands, axes, strict=True))
    each = [jnp.moveaxis(x, axis, 0) for x, axis in pairs if axis is not None]

    def one(batched: list[jax.Array]) -> jax.Array:
        left = iter(batched)
        return of_one(*(x if axis is None else next(left) for x, axis in pairs))

    return jax.lax.map(one, each)


_FORWARD = _primitive("convolve", _forward)
_BY_IMAGE = _primitive("convolve_by_image", _by_image)
_BY_KERNEL = _primitive("convolve_by_kernel", _by_kernel)

# Of a cotangent and the other operand.
ad.defbilinear(
    _FORWARD,
    lambda g, x, kernel, **kw: _BY_IMAGE.bind(g, kernel, **kw),
    lambda g, x, kernel, **kw: _BY_KERNEL.bind(x, g, **kw),
)
ad.defbilinear(
    _BY_IMAGE,
    lambda x, g, kernel, **kw: _FORWARD.bind(x, kernel, **kw),
    lambda x, g, kernel, **kw: _BY_KERNEL.bind(x, g, **kw),
)
ad.defbilinear(
    _BY_KERNEL,
    lambda kernel, x, g, **kw: _BY_IMAGE.bind(g, kernel, **kw),
    lambda kernel, x, g, **kw: _FORWARD.bind(x, kernel, **kw),
)
