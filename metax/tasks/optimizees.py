"""The training problems of optimizer amalgamation, and the data they take.

All minimise the mean cross-entropy of a small image classifier. They are short because
an optimizer that is to be learned trains them thousands of times, differentiated twice.

The data of all is `{"image": uint8 [n, h, w, c], "label": int32 [n]}`; `optimizee_data`
makes it of a `Split`. Integer images are divided by 255, floating ones taken as they
are, in [0, 1]; `digits_data` gives such.

Huang et al., "Optimizer amalgamation", 2022, arXiv 2203.06474, table of problems.

Note: the paper's text and code disagree at two networks; the counts decide. "Deeper"
with pooling, which is what was evaluated, has 75 242 parameters; 72 042 are those of
the variant with strides. "ResNet" has widths of 16, 32 and 64, not 64, 128 and 256.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import numpy as np

from metax.arguments import check_has, check_length
from metax.base import Task
from metax.tasks.convnets import ConvNet, Layer, OneHidden, ResNet
from metax.tasks.data import Split
from metax.tasks.pixels import pixel_classification
from metax.tasks.privacy import private_loss

__all__ = [
    "OPTIMIZEES",
    "Optimizee",
    "cifar",
    "deeper",
    "digits",
    "digits_data",
    "fmnist",
    "mlp",
    "mnist_dp",
    "optimizee_data",
    "resnet",
    "resnet52",
    "small_batch",
    "svhn",
    "train",
    "wider",
]

Impl = Literal["auto", "gemm", "lax"]

_MNIST, _CIFAR = (28, 28, 1), (32, 32, 3)
_TRAIN = (Layer(16, 3, pool=True), Layer(32, 5, pool=True))
_WIDER = (Layer(32, 3, pool=True), Layer(64, 5, pool=True))
_POOLED = (
    *(Layer(16, 3), Layer(32, 3), Layer(32, 3, pool=True)),
    *(Layer(64, 3), Layer(64, 3, pool=True)),
)
_STRIDED = (
    *(Layer(16, 3), Layer(32, 3, stride=2), Layer(32, 3)),
    *(Layer(64, 3, stride=2), Layer(64, 3)),
)


class Optimizee(NamedTuple):
    """A problem for optimizers, and what it expects.

    Attributes:
      task: `init` gives the parameters, a dict of float32 arrays; with batch norm, one
        of `"params"` and `"batch_stats"`, of which the latter are carried and never
        differentiated. `sample(data, key)` draws a batch `(image float32 [b, h, w, c],
        label int32 [b])`, no row twice. `evaluate(params, data)` gives `"loss"` and
        `"accuracy"`, in 0..1, over the whole split.
      dataset: the name of the set it is meant for; `metax.tasks.load` reads "mnist",
        "fashion_mnist" and "cifar10", `digits_data` the digits.
      input_shape: height, width and channels of an image.
      num_classes: labels are 0 to num_classes - 1.
      batch_size: b.
    """

    task: Task
    dataset: str
    input_shape: tuple[int, ...]
    num_classes: int
    batch_size: int


def train(*, conv: Impl = "auto") -> Optimizee:
    """Two convolutions on MNIST, 18 122 parameters: what the paper meta-trains on.

    Args:
      conv: how to convolve, see `metax.tasks.Conv`; so in all that follow.

    Returns:
      The problem.

    Example:
      >>> import jax, numpy as np
      >>> from metax.tasks import optimizees
      >>> task = optimizees.train().task
      >>> image = np.zeros((200, 28, 28, 1), np.uint8)
      >>> data = {"image": image, "label": np.zeros(200, np.int32)}
      >>> @jax.jit
      ... def start(key, data):
      ...     params = task.init(key)
      ...     return params, task.loss(params, task.sample(data, key), key)
      >>> params, loss = start(jax.random.key(0), data)
      >>> sum(leaf.size for leaf in jax.tree.leaves(params))
      18122
      >>> round(float(loss), 4)  # black images, so no pixel speaks for a class: ln 10
      2.3026
    """
    return _optimizee(ConvNet(_TRAIN, conv=conv), "mnist", _MNIST)


def mlp() -> Optimizee:
    """20 sigmoid units on MNIST, 15 910 parameters."""
    return _optimizee(OneHidden(20, nn.sigmoid), "mnist", _MNIST)


def wider(*, conv: Impl = "auto") -> Optimizee:
    """`train` with twice the channels, 61 834 parameters."""
    return _optimizee(ConvNet(_WIDER, conv=conv), "mnist", _MNIST)


def deeper(
    variant: Literal["pooled", "strided"] = "pooled", *, conv: Impl = "auto"
) -> Optimizee:
    """Five convolutions on MNIST, 75 242 parameters.

    Args:
      variant: "pooled", as evaluated in the paper, or "strided", 72 042 parameters,
        with two strides of 2 in place of the pooling.
      conv: as in `train`.

    Returns:
      The problem.

    Raises:
      ValueError: `variant` is neither.
    """
    if variant not in ("pooled", "strided"):
        raise ValueError(
            f"`deeper(variant=...)` must be 'pooled' or 'strided'; got {variant!r}."
        )
    layers = _POOLED if variant == "pooled" else _STRIDED
    return _optimizee(ConvNet(layers, conv=conv), "mnist", _MNIST)


def fmnist(*, conv: Impl = "auto") -> Optimizee:
    """`train` on Fashion-MNIST, 18 122 parameters."""
    return train(conv=conv)._replace(dataset="fashion_mnist")


def svhn(*, conv: Impl = "auto") -> Optimizee:
    """The layers of `train` on cropped street-view house numbers, 21 290 parameters."""
    return _optimizee(ConvNet(_TRAIN, conv=conv), "svhn_cropped", _CIFAR)


def cifar(*, conv: Impl = "auto") -> Optimizee:
    """The layers of `wider` on CIFAR-10, 68 170 parameters."""
    return _optimizee(ConvNet(_WIDER, conv=conv), "cifar10", _CIFAR)


def resnet(*, conv: Impl = "auto") -> Optimizee:
    """A ResNet of 28 layers on CIFAR-10, 370 506 parameters and 1 824 statistics."""
    return _optimizee(ResNet(4, conv=conv), "cifar10", _CIFAR)


def small_batch(*, conv: Impl = "auto") -> Optimizee:
    """`train` with batches of 32."""
    return _optimizee(ConvNet(_TRAIN, conv=conv), "mnist", _MNIST, batch_size=32)


def mnist_dp(
    clip_norm: float = 1.0, noise_multiplier: float = 1.1, *, conv: Impl = "auto"
) -> Optimizee:
    """`train` with the gradient of DP-SGD: clipped per example, summed, noised.

    To evaluate optimizers, not to train them: the gradient is first order only, see
    `metax.tasks.private_loss`. The value of the loss is that of `train`.

    Args:
      clip_norm: joint l2 norm to which the gradient of each example is clipped, above
        0.
      noise_multiplier: standard deviation of the noise in units of `clip_norm`, at
        least 0.
      conv: as in `train`.

    Returns:
      The problem; the key of the loss draws the noise.

    Raises:
      ValueError: `clip_norm` is not above 0, or `noise_multiplier` negative.
    """
    plain = train(conv=conv)
    loss = private_loss(plain.task.loss, clip_norm, noise_multiplier)
    return plain._replace(task=plain.task._replace(loss=loss))


def resnet52(num_classes: int = 10, *, conv: Impl = "auto") -> Optimizee:
    """A ResNet of 52 layers on CIFAR-10 or CIFAR-100, far from the training problem.

    Args:
      num_classes: 10 (760 266 parameters and 3 616 statistics) or 100 (766 116).
      conv: as in `train`.

    Returns:
      The problem.

    Raises:
      ValueError: `num_classes` is neither.
    """
    if num_classes not in (10, 100):
        raise ValueError(
            f"`resnet52(num_classes=...)` must be 10 or 100; got {num_classes}."
        )
    model = ResNet(8, num_classes, conv=conv)
    return _optimizee(model, f"cifar{num_classes}", _CIFAR)


def digits() -> Optimizee:
    """32 ReLU units on scikit-learn's digits, 2 410 parameters: seconds on a CPU.

    No problem of the paper. Take `digits_data()` for its data.
    """
    return _optimizee(OneHidden(32), "digits", (8, 8, 1))


def optimizee_data(split: Split, *, full_intensity: int = 255) -> dict[str, Any]:
    """What an optimizee takes as data, from a `Split`.

    Args:
      split: images and labels, as `metax.tasks.load` gives them.
      full_intensity: the stored value of a white pixel: 255, or 16 for the digits. At
        255 the images stay as they are stored, otherwise they become float32 in [0, 1].

    Returns:
      `{"image": [n, h, w, c], "label": int32 [n]}`, numpy arrays.

    Raises:
      ValueError: `full_intensity` is below 1.

    Example:
      >>> from metax.tasks import load, optimizees
      >>> data = optimizees.optimizee_data(load("digits").train, full_intensity=16)
      >>> data["image"].shape, float(data["image"].max())
      ((1437, 8, 8, 1), 1.0)
    """
    check_has("optimizee_data", "split", split, "a `Split`", "image", "label")
    check_length("optimizee_data", "split", (split.image, split.label))
    if not full_intensity >= 1:
        raise ValueError(
            "`optimizee_data(full_intensity=...)` must be at least 1; got "
            f"{full_intensity}."
        )
    image = np.asarray(split.image)
    if full_intensity != 255:
        image = image.astype(np.float32) / np.float32(full_intensity)
    return {"image": image, "label": np.asarray(split.label, np.int32)}


def digits_data() -> tuple[dict[str, Any], dict[str, Any]]:
    """Training and test data of `digits`, 1437 and 360 images.

    In the order of `np.random.default_rng(0).permutation(1797)`; `load("digits")`
    divides otherwise, class by class.

    Returns:
      Two dicts of `"image"`, float32 [n, 8, 8, 1] in [0, 1], and `"label"`, int32 [n].

    Example:
      >>> from metax.tasks import optimizees
      >>> training, test = optimizees.digits_data()
      >>> training["image"].shape, test["label"].shape
      ((1437, 8, 8, 1), (360,))
    """
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    splits = [
        Split(image=bunch.images[rows][..., None], label=bunch.target[rows])
        for rows in (order[:1437], order[1437:])
    ]
    training, test = (optimizee_data(split, full_intensity=16) for split in splits)
    return training, test


def _optimizee(
    model: Any, dataset: str, input_shape: tuple[int, ...], batch_size: int = 128
) -> Optimizee:
    return Optimizee(
        task=pixel_classification(model, input_shape, batch_size),
        dataset=dataset,
        input_shape=input_shape,
        num_classes=model.num_classes,
        batch_size=batch_size,
    )


# By the names of the paper; "Digits" is ours.
OPTIMIZEES: Mapping[str, Callable[[], Optimizee]] = {
    "Train": train,
    "MLP": mlp,
    "Wider": wider,
    "Deeper": deeper,
    "FMNIST": fmnist,
    "SVHN": svhn,
    "CIFAR": cifar,
    "ResNet": resnet,
    "SmallBatch": small_batch,
    "MNIST-DP": mnist_dp,
    "ResNet-52": resnet52,
    "Digits": digits,
}
