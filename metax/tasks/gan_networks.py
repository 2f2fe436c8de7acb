"""Generators and discriminators of images, as functions of their parameters.

Both are stacks of 5 × 5 convolutions with stride 2, the generator's transposed. An
image is halved until its side is odd or at most 7: 28 → 14 → 7, 32 → 16 → 8 → 4.
"""

import itertools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from metax.tasks.convolution import Conv

__all__ = [
    "Architecture",
    "architectures",
    "discriminate",
    "generate",
    "init_discriminator",
    "init_generator",
]

Activation = Literal["relu", "leaky_relu"]
Layer = dict[str, jax.Array]

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "leaky_relu": lambda x: jax.nn.leaky_relu(x, 0.2),
}
_KERNEL = 5
_SMALLEST = 7  # a side of at most that is not halved
_EPSILON = 1e-5  # added to the variances of the normalisation


class Architecture(NamedTuple):
    """What differs between the networks of a GAN; the defaults are those for MNIST.

    Attributes:
      filters_g: channels of the generator's last hidden layer; each earlier one has
        twice as many.
      filters_d: channels of the discriminator's first layer; each later one has twice
        as many.
      dim_z: size of a latent vector.
      batch_norm_g: whether each hidden layer of the generator is normalised.
      batch_norm_d: whether each layer of the discriminator but the first is.
      activation_g: of the generator's hidden layers.
      activation_d: of the discriminator's; the leaky one has slope 0.2 below 0.
    """

    filters_g: int = 64
    filters_d: int = 64
    dim_z: int = 128
    batch_norm_g: bool = False
    batch_norm_d: bool = False
    activation_g: Activation = "relu"
    activation_d: Activation = "leaky_relu"


def architectures() -> tuple[Architecture, ...]:
    """Lists the 24 architectures between which a learned schedule is transferred.

    Filters {32, 64, 128} × latent size {64, 128} × batch norm {off, on} × activation
    {ReLU, leaky ReLU}, the two networks alike.

    Returns:
      The 24, in that order, the activation fastest.

    Example:
      >>> from metax.tasks import gan
      >>> len(gan.architectures()), gan.architectures()[0].filters_g
      (24, 32)

    Reference:
      Xu et al., "AutoLoss: learning discrete schedules for alternate optimization",
      ICLR 2019, arXiv 1810.02442, appendix A.5.
    """
    activations: tuple[Activation, ...] = ("relu", "leaky_relu")
    cells = itertools.product((32, 64, 128), (64, 128), (False, True), activations)
    return tuple(
        Architecture(filters, filters, dim_z, norm, norm, activation, activation)
        for filters, dim_z, norm, activation in cells
    )


def init_generator(
    key: jax.Array, architecture: Architecture, shape: tuple[int, ...]
) -> dict[str, Any]:
    """Draws the generator's parameters: weights N(0, 0.02²), biases 0.

    Args:
      key: a typed key.
      architecture: the sizes.
      shape: height, width (equal) and channels of an image.

    Returns:
      `"dense"` and `"layers"`, the transposed convolutions in order; each layer has
      `"kernel"`, [5, 5, out, in] for the latter, and `"bias"`, all float32.
    """
    side, depth = _halvings(shape)
    widths = [architecture.filters_g * 2**i for i in reversed(range(depth))]
    channels = [*widths, shape[-1]]
    units = side * side * channels[0]
    keys = jax.random.split(key, depth + 1)
    dense = _layer(keys[0], (architecture.dim_z, units), units)
    pairs = zip(keys[1:], channels[:-1], channels[1:], strict=True)
    layers = tuple(
        _layer(k, (_KERNEL, _KERNEL, wide, narrow), wide) for k, narrow, wide in pairs
    )
    return {"dense": dense, "layers": layers}


def init_discriminator(
    key: jax.Array, architecture: Architecture, shape: tuple[int, ...]
) -> dict[str, Any]:
    """Draws the discriminator's parameters: weights N(0, 0.02²), biases 0.

    Args:
      key: a typed key.
      architecture: the sizes.
      shape: height, width (equal) and channels of an image.

    Returns:
      `"layers"`, the convolutions in order, kernels [5, 5, in, out], and `"dense"`.
    """
    side, depth = _halvings(shape)
    channels = [shape[-1], *(architecture.filters_d * 2**i for i in range(depth))]
    keys = jax.random.split(key, depth + 1)
    dense = _layer(keys[0], (side * side * channels[-1], 1), 1)
    pairs = zip(keys[1:], channels[:-1], channels[1:], strict=True)
    layers = tuple(_layer(k, (_KERNEL, _KERNEL, i, o), o) for k, i, o in pairs)
    return {"layers": layers, "dense": dense}


def generate(
    params: dict[str, Any], latent: jax.Array, architecture: Architecture
) -> jax.Array:
    """Images of latent vectors.

    Args:
      params: of `init_generator`.
      latent: float32 [batch, dim_z].
      architecture: the same as there.

    Returns:
      [batch, height, width, channels], in (-1, 1).

    Note:
      Batch norm takes mean and variance of this batch, in training and ever after; the
      released networks keep running averages. It has a bias, which is that of the
      layer, and no scale.
    """
    activation = _ACTIVATIONS[architecture.activation_g]
    normalised = architecture.batch_norm_g
    *hidden, last = params["layers"]
    channels = last["kernel"].shape[-1] * 2 ** len(hidden)
    x = latent @ params["dense"]["kernel"]
    x = activation(_shift(x, params["dense"], normalised))
    side = round((x.shape[-1] / channels) ** 0.5)
    x = x.reshape(-1, side, side, channels)
    for layer in hidden:
        x = activation(_shift(_transposed(x, layer), layer, normalised))
    return jnp.tanh(_shift(_transposed(x, last), last, False))


def discriminate(
    params: dict[str, Any], image: jax.Array, architecture: Architecture
) -> jax.Array:
    """Logits that images are real.

    Args:
      params: of `init_discriminator`.
      image: float32 [batch, height, width, channels].
      architecture: the same as there; its batch norm is as in `generate`.

    Returns:
      [batch], above 0 for images that it takes for real ones.
    """
    activation = _ACTIVATIONS[architecture.activation_d]
    x = image
    for i, layer in enumerate(params["layers"]):
        normalised = architecture.batch_norm_d and i > 0
        x = activation(_shift(_convolved(x, layer), layer, normalised))
    logits = x.reshape(x.shape[0], -1) @ params["dense"]["kernel"]
    return _shift(logits, params["dense"], False)[:, 0]


def _halvings(shape: tuple[int, ...]) -> tuple[int, int]:
    """The side of the smallest layer, and how many halvings lead to it."""
    side, depth = shape[0], 0
    while side % 2 == 0 and side > _SMALLEST:
        side, depth = side // 2, depth + 1
    return side, depth


def _layer(key: jax.Array, shape: tuple[int, ...], biases: int) -> Layer:
    kernel = 0.02 * jax.random.normal(key, shape, jnp.float32)
    return {"kernel": kernel, "bias": jnp.zeros((biases,), jnp.float32)}


def _shift(x: jax.Array, layer: Layer, normalised: bool) -> jax.Array:
    """Adds the bias; where the layer is normalised, after that, or it would cancel."""
    if normalised:
        axes = tuple(range(x.ndim - 1))
        centred = x - x.mean(axes)
        x = centred * jax.lax.rsqrt(jnp.square(centred).mean(axes) + _EPSILON)
    return x + layer["bias"]


def _convolved(x: jax.Array, layer: Layer) -> jax.Array:
    """Halves height and width."""
    channels = layer["kernel"].shape[-1]
    module = Conv(channels, _KERNEL, strides=2, padding="SAME")
    no_bias = jnp.zeros((channels,), layer["kernel"].dtype)
    variables = {"params": {"kernel": layer["kernel"], "bias": no_bias}}
    return jnp.asarray(module.apply(variables, x))


def _transposed(x: jax.Array, layer: Layer) -> jax.Array:
    """Doubles height and width: the gradient of `_convolved`, as its name says."""
    batch, height, width, _ = x.shape
    channels = layer["kernel"].shape[2]
    start = jnp.zeros((batch, 2 * height, 2 * width, channels), x.dtype)
    _, pull = jax.vjp(lambda image: _convolved(image, layer), start)
    return pull(x)[0]
