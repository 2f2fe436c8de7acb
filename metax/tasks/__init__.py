"""Problems to train on: data sets, models, and the tasks made of them."""

from metax.tasks.augmentation import crop_and_flip
from metax.tasks.batching import EpochInfo, epochs, minibatch
from metax.tasks.classification import classification
from metax.tasks.data import Dataset, Split, load, normalization
from metax.tasks.models import CNN, MLP, VGG16, BatchNorm, Linear
from metax.tasks.svm import census_like, smoothed_svm

__all__ = [
    "CNN",
    "MLP",
    "VGG16",
    "BatchNorm",
    "Dataset",
    "EpochInfo",
    "Linear",
    "Split",
    "census_like",
    "classification",
    "crop_and_flip",
    "epochs",
    "load",
    "minibatch",
    "normalization",
    "smoothed_svm",
]
