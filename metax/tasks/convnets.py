"""The networks of optimizer amalgamation: small, and cheap to differentiate twice.

Kernels begin glorot-uniform, biases zero, running statistics at (0, 1). Each takes
images [batch, height, width, channels] and `train`, which only batch norm heeds, and
returns logits [batch, num_classes].
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax

from metax.tasks.convolution import Conv, check_impl
from metax.tasks.models import BatchNorm
from metax.tasks.patches import max_pool

__all__ = ["ConvNet", "Layer", "OneHidden", "ResNet"]


class Layer(NamedTuple):
    """One convolution of a `ConvNet`.

    Attributes:
      features: channels of its output.
      size: height and width of the kernel.
      stride: step between the patches.
      pool: whether 2 × 2 max pooling follows.
    """

    features: int
    size: int
    stride: int = 1
    pool: bool = False


class OneHidden(nn.Module):
    """Pixels, a hidden layer, logits.

    Attributes:
      width: units of the hidden layer.
      activation: applied to it.
      num_classes: how many logits.
    """

    width: int
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits [batch, num_classes] of images [batch, ...]."""
        x = x.reshape(x.shape[0], -1)
        return _dense(self.activation(_dense(x, self.width)), self.num_classes)


class ConvNet(nn.Module):
    """Convolutions without padding, each with ReLU, then the dense output.

    Attributes:
      layers: the convolutions in order.
      num_classes: how many logits.
      conv: how to convolve, see `Conv.impl`.
    """

    layers: tuple[Layer, ...]
    num_classes: int = 10
    conv: str = "auto"

    def __post_init__(self) -> None:
        check_impl(self.conv, "ConvNet(conv=...)")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits [batch, num_classes] of images [batch, height, width, channels]."""
        height, width = (_seen(size, self.layers) for size in x.shape[1:3])
        x = x[:, :height, :width]
        for layer in self.layers:
            x = Conv(layer.features, layer.size, layer.stride, impl=self.conv)(x)
            # ReLU and the maximum commute; this order has a quarter of the work, and
            # no ties between zeros, so the gradient is the same
            x = nn.relu(max_pool(x, 2) if layer.pool else x)
        return _dense(x.reshape(x.shape[0], -1), self.num_classes)


class ResNet(nn.Module):
    """A residual network of 6 · blocks + 4 layers with batch norm, 16 to 64 channels.

    A 3 × 3 convolution, batch norm and ReLU; three groups of `blocks` blocks with 16,
    32 and 64 channels, 2 × 2 max pooling between the groups; the average over
    positions; the dense output. A block is

        x ← project(x) + f(f(x)),     f = ReLU ∘ BatchNorm ∘ Conv 3 × 3

    with no ReLU after the sum, and `project` a linear 1 × 1 convolution where the width
    changes, the identity elsewhere.

    Attributes:
      blocks: residual blocks in each group.
      num_classes: how many logits.
      conv: how to convolve, see `Conv.impl`.
    """

    blocks: int
    num_classes: int = 10
    conv: str = "auto"

    def __post_init__(self) -> None:
        check_impl(self.conv, "ResNet(conv=...)")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits [batch, num_classes] of images [batch, height, width, channels]."""
        x = self._conv_norm_relu(x, 16, train)
        for width in (16, 32, 64):
            x = max_pool(x, 2) if width > 16 else x
            for _ in range(self.blocks):
                x = self._block(x, width, train)
        return _dense(x.mean((1, 2)), self.num_classes)

    def _block(self, x: jax.Array, width: int, train: bool) -> jax.Array:
        same = x.shape[-1] == width
        projected = x if same else Conv(width, 1, impl=self.conv)(x)
        for _ in range(2):
            x = self._conv_norm_relu(x, width, train)
        return projected + x

    def _conv_norm_relu(self, x: jax.Array, width: int, train: bool) -> jax.Array:
        x = Conv(width, 3, padding="SAME", impl=self.conv)(x)
        return nn.relu(BatchNorm()(x, train=train))


def _seen(size: int, layers: tuple[Layer, ...]) -> int:
    """How many of `size` rows or columns reach the output.

    Pooling drops an odd row, and a stride what is left at the end; what only those
    would see need not be computed. Of 28 × 28 pixels the optimizee of training sees
    26 × 26, and computes a fifth less.
    """
    for layer in layers:
        size = (size - layer.size) // layer.stride + 1
        size = size // 2 if layer.pool else size
    for layer in reversed(layers):
        size = 2 * size if layer.pool else size
        size = (size - 1) * layer.stride + layer.size
    return size


def _dense(x: jax.Array, features: int) -> jax.Array:
    return nn.Dense(features, kernel_init=nn.initializers.glorot_uniform())(x)
