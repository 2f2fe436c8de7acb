"""Problems to train on: data sets, models, and the tasks made of them."""

from metax.tasks import (
    classification,
    gan,
    optimizees,
    regression,
    ridge_solutions,
    translation,
)
from metax.tasks.augmentation import crop_and_flip
from metax.tasks.batching import EpochInfo, epochs, minibatch
from metax.tasks.colour import colour_jitter
from metax.tasks.data import (
    Dataset,
    FiveWay,
    Split,
    controller_data,
    load,
    normalization,
    task_data,
)
from metax.tasks.dropout import dropout
from metax.tasks.holdout import TuningData, corrupt_labels, hold_out
from metax.tasks.images import (
    affine,
    cutout,
    horizontal_flip,
    scaling_noise,
    transform_images,
)
from metax.tasks.labelled import image_classification
from metax.tasks.language import (
    LanguageData,
    LanguageTuning,
    language_tuning,
    stock_language_hparams,
)
from metax.tasks.linear_network import (
    TwoLayerLinear,
    network_params,
    network_response,
    row_rescaling,
    two_layer_regression,
)
from metax.tasks.masked import MaskedDense, MaskedEmbed, dropconnect_mask, word_mask
from metax.tasks.mixing import mixup, smooth_labels
from metax.tasks.models import (
    CNN,
    MLP,
    VGG16,
    BatchNorm,
    Conv,
    Linear,
    max_pool,
)
from metax.tasks.privacy import private_loss
from metax.tasks.ranges import stock_hparams
from metax.tasks.recurrent import LSTM, LayerState, Masks
from metax.tasks.ridge import Examples, RidgeData, diabetes_ridge, ridge_regression
from metax.tasks.svm import census_like, smoothed_svm
from metax.tasks.tables import join_splits
from metax.tasks.text import TextData, batchify, load_ptb, segments, synthetic_text
from metax.tasks.tunable import AlexNet, ResNet18, SimpleCNN, TunableMLP, TunableVGG16
from metax.tasks.tuning import ImageTuning, image_tuning

__all__ = [
    "CNN",
    "LSTM",
    "MLP",
    "VGG16",
    "AlexNet",
    "BatchNorm",
    "Conv",
    "Dataset",
    "EpochInfo",
    "Examples",
    "FiveWay",
    "ImageTuning",
    "LanguageData",
    "LanguageTuning",
    "LayerState",
    "Linear",
    "MaskedDense",
    "MaskedEmbed",
    "Masks",
    "ResNet18",
    "RidgeData",
    "SimpleCNN",
    "Split",
    "TextData",
    "TunableMLP",
    "TunableVGG16",
    "TuningData",
    "TwoLayerLinear",
    "affine",
    "batchify",
    "census_like",
    "classification",
    "colour_jitter",
    "controller_data",
    "corrupt_labels",
    "crop_and_flip",
    "cutout",
    "diabetes_ridge",
    "dropconnect_mask",
    "dropout",
    "epochs",
    "gan",
    "hold_out",
    "horizontal_flip",
    "image_classification",
    "image_tuning",
    "join_splits",
    "language_tuning",
    "load",
    "load_ptb",
    "max_pool",
    "minibatch",
    "mixup",
    "network_params",
    "network_response",
    "normalization",
    "optimizees",
    "private_loss",
    "regression",
    "ridge_regression",
    "ridge_solutions",
    "row_rescaling",
    "scaling_noise",
    "segments",
    "smooth_labels",
    "smoothed_svm",
    "stock_hparams",
    "stock_language_hparams",
    "synthetic_text",
    "task_data",
    "transform_images",
    "translation",
    "two_layer_regression",
    "word_mask",
]
