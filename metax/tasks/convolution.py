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

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from metax.tasks.patches import convolve_gray

__all__ = ["convolve"]

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
    x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, for `nn.Conv(conv_general_dilated=convolve)`.

    The same numbers; on a CPU a gradient of it costs in a loop what it costs outside.

    Args:
      x: [batch, height, width, in].
      kernel: [height, width, in, out].
      strides: as `nn.Conv` passes it, as the others.
      padding: likewise.
      **options: likewise; ignored on CPUs, where `nn.Conv`'s defaults are taken for
        granted.

    Returns:
      [batch, height, width, out].
    """
    if jax.default_backend() != "cpu":
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    image, taps = x.shape[1:3], kernel.shape[:2]
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(image, taps, strides, padding)
    if x.shape[-1] == 1:
        return convolve_gray(x, kernel, strides, padding, **options)
    pads = tuple((low, high) for low, high in padding)
    window = _Window(image, taps, tuple(strides), pads)
    return _FORWARD.bind(x, kernel, window=window)


def _forward(x: jax.Array, kernel: jax.Array, *, window: _Window) -> jax.Array:
    return _plain(x, kernel, window.strides, window.padding)


def _by_image(g: jax.Array, kernel: jax.Array, *, window: _Window) -> jax.Array:
    """Each output's g spread over what its kernel saw."""
    pads = [
        (taps - 1 - low, size + low - 1 - (out - 1) * stride)
        for out, (size, taps, stride, (low, _)) in _by_axis(window)
    ]
    turned = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    return _plain(g, turned, (1, 1), pads, lhs_dilation=window.strides)


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


def _plain(x: jax.Array, kernel: jax.Array, *how: Any, **dilation: Any) -> jax.Array:
    names = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, *how, dimension_numbers=names, **dilation
    )


def _primitive(name: str, fun: Callable[..., jax.Array]) -> Primitive:
    """`fun` as a primitive that is not differentiated yet."""
    primitive = Primitive(name)

    def abstract(*operands: Any, window: _Window) -> Any:
        specs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands]
        out = jax.eval_shape(functools.partial(fun, window=window), *specs)
        return ShapedArray(out.shape, out.dtype)

    def batch(operands: Any, axes: Any, *, window: _Window) -> tuple[jax.Array, int]:
        of_one = functools.partial(fun, window=window)
        return jax.vmap(of_one, in_axes=tuple(axes))(*operands), 0

    primitive.def_impl(fun)
    primitive.def_abstract_eval(abstract)
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(fun, multiple_results=False))
    return primitive


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
