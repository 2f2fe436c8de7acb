"""Image classifiers whose dropout rates, and norm epsilon, are arguments of the call.

    model.apply(variables, x, rates, train, rngs={"dropout": key}) -> logits

`x` is float [batch, height, width, channels], `rates` maps names to arrays, each a
scalar or [batch], a rate an example; `model.rate_names` lists the names it takes. A
rate that is missing is no dropout, in evaluation none is used. The key is needed in
training alone, and only where there is a rate.

Dropout of feature maps drops whole channels; of pixels and dense layers single units.
Weights and biases begin uniform in ±1/√fan_in, but in VGG-16, whose convolutions begin
normal with variance 2 / fan_out and zero biases. Every weight lies in a layer that is
called on the batch, so a response of its own for each example can be put behind it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from metax.tasks.convolution import convolve
from metax.tasks.dropout import dropout
from metax.tasks.models import BatchNorm, _flatten, _uniform
from metax.tasks.patches import max_pool

__all__ = ["AlexNet", "ResNet18", "SimpleCNN", "TunableMLP", "TunableVGG16"]

Rates = Mapping[str, jax.Array]

_VGG16_BLOCKS = ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)
_EPSILON = 1e-5  # of both norms, where it is not given


class TunableMLP(nn.Module):
    """Dense layers with ReLU; dropout of the input and after each hidden layer.

    28 × 28 images and the default widths make 3 836 410 parameters.

    Attributes:
      num_classes: how many logits.
      widths: units of each hidden layer.
    """

    num_classes: int
    widths: Sequence[int] = (1200, 1200, 1200)

    @property
    def rate_names(self) -> tuple[str, ...]:
        """`input_dropout`, and `dropout_1` etc., one a hidden layer."""
        return ("input_dropout", *_numbered(len(self.widths)))

    @nn.compact
    def __call__(self, x: jax.Array, rates: Rates, train: bool) -> jax.Array:
        """Logits [batch, num_classes] of images [batch, ...]."""
        drop = _dropper(self, rates, train)
        x = drop("input_dropout", _flatten(x), "element")
        for i, width in enumerate(self.widths, 1):
            x = nn.relu(_dense(x, width, f"fc_{i}"))
            x = drop(f"dropout_{i}", x, "element")
        return _dense(x, self.num_classes, "output")


class SimpleCNN(nn.Module):
    """Two 5 × 5 convolutions with ReLU and 2 × 2 max pooling, and two dense layers.

    28 × 28 images and the default sizes make 2 489 130 parameters.

    Attributes:
      num_classes: how many logits.
      channels: channels of the two convolutions.
      width: units of the hidden dense layer.
      channelwise: `input_dropout` drops whole channels instead of pixels, as the code
        of Bae & Grosse (2020) does: a grey image is then blank with the chance of
        the rate.
    """

    num_classes: int
    channels: tuple[int, int] = (16, 32)
    width: int = 1568
    channelwise: bool = False

    @property
    def rate_names(self) -> tuple[str, ...]:
        """Of the input, after either pooling, and after the hidden dense layer."""
        return ("input_dropout", *_numbered(2), "dropout_fc")

    @nn.compact
    def __call__(self, x: jax.Array, rates: Rates, train: bool) -> jax.Array:
        """Logits [batch, num_classes] of images [batch, height, width, channels]."""
        _check_size("SimpleCNN", x, 4)
        drop = _dropper(self, rates, train)
        x = drop("input_dropout", x, "channel" if self.channelwise else "element")
        for i, channels in enumerate(self.channels, 1):
            x = max_pool(nn.relu(_conv(x, channels, f"conv_{i}", size=5)), 2)
            x = drop(f"dropout_{i}", x, "channel")
        x = nn.relu(_dense(_flatten(x), self.width, "fc_1"))
        return _dense(drop("dropout_fc", x, "element"), self.num_classes, "output")


class AlexNet(nn.Module):
    """Five 3 × 3 convolutions and three dense layers, for 32 × 32 images.

    The first convolution has stride 2; a 2 × 2 max pooling follows the first, second
    and fifth. At 32 × 32 × 3: 23 272 266 parameters.

    Krizhevsky, "One weird trick for parallelizing convolutional neural networks",
    2014, arXiv 1404.5997, cut to small images.

    Attributes:
      num_classes: how many logits.
      scale: multiplies every width; 1/16 makes a model for tests on a CPU.
    """

    num_classes: int
    scale: float = 1.0

    @property
    def rate_names(self) -> tuple[str, ...]:
        """Of the input, after each convolution, after either hidden dense layer."""
        return ("input_dropout", *_numbered(5), "dropout_fc1", "dropout_fc2")

    @nn.compact
    def __call__(self, x: jax.Array, rates: Rates, train: bool) -> jax.Array:
        """Logits [batch, num_classes] of images [batch, height, width, channels]."""
        _check_size("AlexNet", x, 15)
        drop = _dropper(self, rates, train)
        x = drop("input_dropout", x, "element")
        for i, channels in enumerate((64, 192, 384, 256, 256), 1):
            width = _scaled(self.scale, channels)
            x = nn.relu(_conv(x, width, f"conv_{i}", stride=2 if i == 1 else 1))
            x = drop(f"dropout_{i}", x, "channel")
            x = max_pool(x, 2) if i in (1, 2, 5) else x
        x = _flatten(x)
        for i in (1, 2):
            x = nn.relu(_dense(x, _scaled(self.scale, 4096), f"fc_{i}"))
            x = drop(f"dropout_fc{i}", x, "element")
        return _dense(x, self.num_classes, "output")


class TunableVGG16(nn.Module):
    """VGG-16 without normalisation, for 32 × 32 images: 15 245 130 parameters.

    Simonyan & Zisserman, "Very deep convolutional networks for large-scale image
    recognition", 2015, arXiv 1409.1556, configuration D.

    Attributes:
      num_classes: how many logits.
      scale: multiplies every width; 1/16 makes a model for tests on a CPU.
    """

    num_classes: int
    scale: float = 1.0

    @property
    def rate_names(self) -> tuple[str, ...]:
        """Of the input, after each convolution, after either hidden dense layer."""
        return ("input_dropout", *_numbered(13), "dropout_fc1", "dropout_fc2")

    @nn.compact
    def __call__(self, x: jax.Array, rates: Rates, train: bool) -> jax.Array:
        """Logits [batch, num_classes] of images [batch, height, width, channels]."""
        _check_size("TunableVGG16", x, 32)
        drop = _dropper(self, rates, train)
        x = drop("input_dropout", x, "element")
        i = 0
        for block in _VGG16_BLOCKS:
            for channels in block:
                i += 1
                width = _scaled(self.scale, channels)
                init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
                conv = nn.Conv(
                    width,
                    (3, 3),
                    kernel_init=init,
                    name=f"conv_{i}",
                    conv_general_dilated=convolve,
                )
                x = drop(f"dropout_{i}", nn.relu(conv(x)), "channel")
            x = max_pool(x, 2)
        x = _flatten(x)
        for i in (1, 2):
            x = nn.relu(_dense(x, _scaled(self.scale, 512), f"fc_{i}"))
            x = drop(f"dropout_fc{i}", x, "element")
        return _dense(x, self.num_classes, "output")


class ResNet18(nn.Module):
    """ResNet-18 for 32 × 32 images: 11 173 962 parameters with either norm.

    A 3 × 3 stem and four stages of two basic blocks, 64 to 512 channels, then the mean
    over places; dropout before each stage and before the classifier. Batch norm in
    training couples the examples of a batch, and tangents pass through its statistics;
    group norm does not. Group norm has 32 groups, scaled like the widths.

    He et al., "Deep residual learning for image recognition", CVPR 2016, arXiv
    1512.03385. Wu & He, "Group normalization", ECCV 2018, arXiv 1803.08494.

    Attributes:
      num_classes: how many logits.
      norm: "group", or "batch", which keeps running statistics in "batch_stats".
      scale: multiplies every width; 1/16 makes a model for tests on a CPU.
    """

    num_classes: int
    norm: Literal["group", "batch"] = "group"
    scale: float = 1.0

    @property
    def rate_names(self) -> tuple[str, ...]:
        """Four stages, the classifier, and `norm_epsilon`: a scalar, no rate."""
        return (*_numbered(4), "dropout_fc", "norm_epsilon")

    @nn.compact
    def __call__(self, x: jax.Array, rates: Rates, train: bool) -> jax.Array:
        """Logits [batch, num_classes] of images [batch, height, width, channels]."""
        _check_norm(self.norm)
        drop = _dropper(self, rates, train)
        num_groups = _scaled(self.scale, 32) if self.norm == "group" else None
        normed = _norm(num_groups, train, rates)
        x = _conv(x, _scaled(self.scale, 64), "stem", use_bias=False)
        x = nn.relu(normed(x, "stem_norm"))
        for i, channels in enumerate((64, 128, 256, 512), 1):
            x = drop(f"dropout_{i}", x, "channel")
            width, stride = _scaled(self.scale, channels), 1 if i == 1 else 2
            x = _Stage(width, stride, num_groups, name=f"stage_{i}")(x, rates, train)
        x = drop("dropout_fc", x.mean((1, 2)), "element")
        return _dense(x, self.num_classes, "output")


class _Stage(nn.Module):
    """Two basic blocks; the first may halve the image and widen the channels."""

    channels: int
    stride: int
    num_groups: int | None

    @nn.compact
    def __call__(self, x: jax.Array, rates: Rates, train: bool) -> jax.Array:
        normed = _norm(self.num_groups, train, rates)
        for block, stride in ((1, self.stride), (2, 1)):
            conv = lambda x, k, stride, block=block: _conv(
                x, self.channels, f"conv_{block}_{k}", stride=stride, use_bias=False
            )
            y = nn.relu(normed(conv(x, 1, stride), f"norm_{block}_1"))
            y = normed(conv(y, 2, 1), f"norm_{block}_2")
            if x.shape != y.shape:
                x = _conv(
                    x, self.channels, "shortcut", size=1, stride=stride, use_bias=False
                )
                x = normed(x, "shortcut_norm")
            x = nn.relu(x + y)
        return x


class _ScaleBias(nn.Module):
    """The learned half of a norm, apart from the half that depends on epsilon."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-1:], jnp.float32
        scale = self.param("scale", nn.initializers.ones, *shape)
        return x * scale + self.param("bias", nn.initializers.zeros, *shape)


def _norm(
    num_groups: int | None, train: bool, rates: Rates
) -> Callable[[jax.Array, str], jax.Array]:
    """`normed(x, name)`: group norm, or batch norm for None.

    Epsilon is a field of layers without parameters only: what is injected behind one
    with parameters is differentiated in its inputs and not in its fields.
    """
    epsilon = jnp.asarray(rates.get("norm_epsilon", _EPSILON), jnp.float32)
    if epsilon.ndim:
        raise ValueError(
            "`ResNet18(...)(rates=...)['norm_epsilon']` must be a scalar, for it acts "
            f"on the whole batch (`shared=True`); got shape {list(epsilon.shape)}."
        )

    def normed(x: jax.Array, name: str) -> jax.Array:
        still: Any = epsilon.astype(x.dtype)
        if num_groups is None:
            x = BatchNorm(epsilon=still, affine=False)(x, train=train)
        else:
            groups: Any = math.gcd(num_groups, x.shape[-1])
            plain = nn.GroupNorm(groups, epsilon=still, use_scale=False, use_bias=False)
            x = plain(x)
        return _ScaleBias(name=name)(x)

    return normed


def _dropper(
    model: nn.Module, rates: Rates, train: bool
) -> Callable[[str, jax.Array, Any], jax.Array]:
    """`drop(name, x, shape)`, the identity in evaluation and without a rate."""
    known = model.rate_names
    for name in rates:
        if name not in known:
            raise ValueError(
                f"`{type(model).__name__}(...)(rates=...)` must have names among "
                f"{', '.join(known)}; got {name!r}."
            )

    def drop(name: str, x: jax.Array, shape: Any) -> jax.Array:
        if not train or name not in rates:
            return x
        return dropout(x, rates[name], model.make_rng("dropout"), shape=shape)

    return drop


def _conv(
    x: jax.Array,
    channels: int,
    name: str,
    *,
    size: int = 3,
    stride: int = 1,
    use_bias: bool = True,
) -> jax.Array:
    """A size × size convolution, framed alike on all sides: at stride 1 no smaller."""
    init = _uniform(size * size * x.shape[-1])
    return nn.Conv(
        channels,
        (size, size),
        strides=stride,
        padding=size // 2,
        use_bias=use_bias,
        kernel_init=init,
        bias_init=init,
        name=name,
        conv_general_dilated=convolve,
    )(x)


def _dense(x: jax.Array, features: int, name: str) -> jax.Array:
    init = _uniform(x.shape[-1])
    return nn.Dense(features, kernel_init=init, bias_init=init, name=name)(x)


def _scaled(scale: float, width: int) -> int:
    return max(1, round(scale * width))


def _numbered(num: int) -> tuple[str, ...]:
    return tuple(f"dropout_{i}" for i in range(1, num + 1))


def _check_size(name: str, x: jax.Array, least: int) -> None:
    if x.ndim != 4 or min(x.shape[1:3]) < least:
        raise ValueError(
            f"`{name}(...)(x=...)` must be images [batch, height, width, channels] of "
            f"at least {least} × {least}; got shape {list(x.shape)}."
        )


def _check_norm(norm: str) -> None:
    if norm not in ("group", "batch"):
        raise ValueError(
            f"`ResNet18(norm=...)` must be 'group' or 'batch'; got {norm!r}."
        )
