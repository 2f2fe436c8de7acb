"""Problems by name: the paper's, and those at the size of the digits.

No script, and not to be run. Each of `SMALL` keeps what sets the problem of its name
apart from the others; its network is small, and its images are the digits, 8 × 8, or
Fashion-MNIST averaged to 7 × 7. They say how a rule transfers, and are not the paper's.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from metax.tasks import load, private_loss
from metax.tasks.convnets import ConvNet, Layer, OneHidden
from metax.tasks.optimizees import (
    OPTIMIZEES,
    Optimizee,
    digits,
    digits_data,
    optimizee_data,
)
from metax.tasks.pixels import pixel_classification

Data = Mapping[str, Any]


def _small(model: Any, batch_size: int = 128) -> Optimizee:
    task = pixel_classification(model, (8, 8, 1), batch_size)
    return digits()._replace(task=task, batch_size=batch_size)


def _convolutions(*layers: Layer) -> Optimizee:
    # by patches in evaluation too: under a vmap XLA's convolution is a grouped one
    return _small(ConvNet(layers, conv="gemm"))


def _fashion() -> Optimizee:
    shape = (7, 7, 1)
    task = pixel_classification(OneHidden(32), shape, 128)
    return digits()._replace(task=task, dataset="fashion_mnist", input_shape=shape)


def _private() -> Optimizee:
    plain = digits()
    loss = private_loss(plain.task.loss, clip_norm=1.0, noise_multiplier=1.1)
    return plain._replace(task=plain.task._replace(loss=loss))


SMALL: Mapping[str, Callable[[], Optimizee]] = {
    "Small-Train": lambda: _convolutions(Layer(8, 3, pool=True), Layer(16, 3)),
    "Small-MLP": lambda: _small(OneHidden(20, nn.sigmoid)),
    "Small-Wider": lambda: _convolutions(Layer(16, 3, pool=True), Layer(32, 3)),
    "Small-Deeper": lambda: _convolutions(Layer(16, 3), Layer(16, 3), Layer(16, 3)),
    "Small-FMNIST": _fashion,
    "Small-SmallBatch": lambda: _small(OneHidden(32), batch_size=32),
    "Small-MNIST-DP": _private,
}


def problem(name: str, data_dir: str | None) -> tuple[Optimizee, Data, Data]:
    """A problem by its name, its training data and its test data."""
    optimizee = {**OPTIMIZEES, **SMALL}[name]()
    if optimizee.dataset == "digits":
        return optimizee, *digits_data()
    sets: Any = load(optimizee.dataset, data_dir=data_dir)  # type: ignore[arg-type]
    training, test = (optimizee_data(split) for split in (sets.train, sets.test))
    return optimizee, shrink(training, optimizee), shrink(test, optimizee)


def shrink(data: Data, optimizee: Optimizee) -> Data:
    """Images averaged over blocks, where the problem wants smaller ones, in [0, 1]."""
    image = np.asarray(data["image"])
    num, height, width, channels = image.shape
    rows, columns, _ = optimizee.input_shape
    if (rows, columns) == (height, width):
        return data
    blocks = (num, rows, height // rows, columns, width // columns, channels)
    mean = image.reshape(blocks).mean((2, 4), dtype=np.float32) / np.float32(255)
    return {**data, "image": mean}
