"""Image classifiers in flax.linen.

Each takes float images [batch, height, width, channels], which it flattens itself
where it must, and `train`, which only batch norm and dropout heed, and returns logits
[batch, num_classes].

Learning rates of published settings assume a start. `Linear`, `MLP` and `CNN` begin
with weights and biases uniform in ±1/√fan_in, PyTorch's default; `VGG16` begins as the
published one does.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from metax.tasks.convolution import Conv, convolve
from metax.tasks.patches import max_pool

__all__ = ["CNN", "MLP", "VGG16", "BatchNorm", "Conv", "Linear", "max_pool"]

# Channels of the convolutions of each block; a pooling ends the block.
_VGG16_BLOCKS = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)


class Linear(nn.Module):
    """Softmax regression on the pixels.

    Attributes:
      num_classes: how many logits.
    """

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits [batch, num_classes] of images [batch, ...]."""
        return _dense(_flatten(x), self.num_classes)


class MLP(nn.Module):
    """Fully connected layers with ReLU between them.

    Attributes:
      num_classes: how many logits.
      widths: units of each hidden layer.
    """

    num_classes: int
    widths: Sequence[int] = (1000, 1000)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits [batch, num_classes] of images [batch, ...]."""
        x = _flatten(x)
        for width in self.widths:
            x = nn.relu(_dense(x, width))
        return _dense(x, self.num_classes)


class CNN(nn.Module):
    """Two 5 × 5 convolutions with ReLU and 2 × 2 max pooling, then two dense layers.

    Made for MNIST (28 × 28); it takes images from 4 × 4.

    Attributes:
      num_classes: how many logits.
      channels: channels of the two convolutions.
      width: units of the hidden dense layer.
    """

    num_classes: int
    channels: tuple[int, int] = (16, 32)
    width: int = 128

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits [batch, num_classes] of images [batch, height, width, channels]."""
        for channels in self.channels:
            init = _uniform(5 * 5 * x.shape[-1])
            x = max_pool(nn.relu(_conv(channels, 5, init, bias_init=init)(x)), 2)
        x = nn.relu(_dense(_flatten(x), self.width))
        return _dense(x, self.num_classes)


class BatchNorm(nn.Module):
    """Batch norm over all axes but the last, with running statistics for evaluation.

        y = (x - mean) / √(var + epsilon) · scale + bias
        running ← momentum · running + (1 - momentum) · (mean, var · n / (n - 1))

    In training, mean and (biased) variance are those of the batch, of n values a
    channel; in evaluation they are the running ones. As PyTorch has it.

    Why not flax's: `Task.carry` computes the training pass once more and counts on XLA
    to find it the same as that of the loss. XLA rewrites flax's form of the scaling
    differently in the two, and a step costs a third more; this form it leaves alone.

    Ioffe & Szegedy, "Batch normalization: accelerating deep network training by
    reducing internal covariate shift", 2015, arXiv 1502.03167, algorithm 1.

    Attributes:
      momentum: weight of the old running statistics, in 0..1.
      epsilon: added to the variance, above 0; a number or a scalar array.
      affine: whether it has `scale` and `bias`; without them it normalises only.
    """

    momentum: float = 0.9
    epsilon: Any = 1e-5
    affine: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """`x` [..., channels], normalised, in the same shape."""
        start = x.shape[-1:], jnp.float32
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, *start)
        running_var = self.variable("batch_stats", "var", jnp.ones, *start)
        mean, var = running_mean.value, running_var.value
        if train:
            axes, n = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
            mean = x.mean(axes)
            var = jnp.square(x - mean).mean(axes)
            unbiased = var * (n / max(n - 1, 1))
            running_mean.value = self._average(running_mean.value, mean)
            running_var.value = self._average(running_var.value, unbiased)
        factor = jax.lax.rsqrt(var + self.epsilon)
        if not self.affine:
            return (x - mean) * factor
        scale = self.param("scale", nn.initializers.ones, *start)
        bias = self.param("bias", nn.initializers.zeros, *start)
        return (x - mean) * (factor * scale) + bias

    def _average(self, old: jax.Array, new: jax.Array) -> jax.Array:
        average = self.momentum * old + (1 - self.momentum) * new
        return average.astype(old.dtype)


class VGG16(nn.Module):
    """VGG-16 with batch norm, cut to 32 × 32 images: 15 253 578 parameters.

    Thirteen 3 × 3 convolutions in five blocks, each followed by batch norm and ReLU, a
    2 × 2 max pooling at the end of a block, then dropout, dense 512, ReLU, twice, and
    the dense output. Convolution weights begin normal with variance 2 / fan_out and
    zero biases, dense layers uniform in ±1/√fan_in.

    Simonyan & Zisserman, "Very deep convolutional networks for large-scale image
    recognition", 2015, arXiv 1409.1556, configuration D.

    Attributes:
      num_classes: how many logits.
      dropout: chance that a unit is dropped before either hidden dense layer, in
        0..1 without 1.
      scale: multiplies every width; 1/16 makes a model for tests on a CPU.
    """

    num_classes: int
    dropout: float = 0.5
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits [batch, num_classes] of images [batch, height, width, channels]."""
        if min(x.shape[1:3]) < 32:
            raise ValueError(
                "`VGG16(...)(x=...)` halves images five times, so they must be at "
                f"least 32 × 32; got {x.shape[1]} × {x.shape[2]}."
            )
        for block in _VGG16_BLOCKS:
            for channels in block:
                x = _conv_norm_relu(x, self._scaled(channels), train)
            x = max_pool(x, 2)
        x = _flatten(x)
        for _ in range(2):
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
            x = nn.relu(_dense(x, self._scaled(512)))
        return _dense(x, self.num_classes)

    def _scaled(self, width: int) -> int:
        return max(1, round(self.scale * width))


def _conv_norm_relu(x: jax.Array, channels: int, train: bool) -> jax.Array:
    init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    x = _conv(channels, 3, init)(x)
    return nn.relu(BatchNorm()(x, train=train))


def _conv(channels: int, size: int, init: Any, **options: Any) -> nn.Conv:
    """One whose gradients are as fast in a loop as elsewhere."""
    options = {"kernel_init": init, "conv_general_dilated": convolve, **options}
    return nn.Conv(channels, (size, size), **options)


def _flatten(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1)


def _dense(x: jax.Array, features: int) -> jax.Array:
    init = _uniform(x.shape[-1])
    return nn.Dense(features, kernel_init=init, bias_init=init)(x)


def _uniform(fan_in: int) -> nn.initializers.Initializer:
    """Uniform in ±1/√fan_in, for a bias too, whose shape does not tell its fan-in."""
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: Sequence[int], dtype=jnp.float32) -> jax.Array:
        return jax.random.uniform(key, tuple(shape), dtype, -bound, bound)

    return init
