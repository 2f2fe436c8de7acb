"""Rows of `metax.tasks`."""

import numpy as np

from metax import Hyperparameter, tasks
from metax.tasks import Dataset, Examples, RidgeData, Split
from tests.inputs.base import LOOP, STATE
from tests.inputs.cases import ABSENT, KEY, NAN, RAW, case, counts, numbers, rows

IMAGE = rows(6, 6, 3)
IMAGES = np.zeros((4, 6, 6, 3), np.uint8)
GREY = np.zeros((4, 6, 6, 1), np.uint8)
ONE_HOT = np.eye(4, dtype=np.float32)
SPLIT = Split(image=IMAGES, label=np.arange(4))
UNEVEN = Split(image=IMAGES, label=np.arange(3))
EMPTY = Split(image=IMAGES[:0], label=np.arange(0))
SET = Dataset(train=SPLIT, test=SPLIT)
RIDGE = RidgeData(*(Examples(x=rows(6, 3, seed=i), y=rows(6, seed=i)) for i in (1, 2)))
NO_RIDGE = RidgeData(*(Examples(x=rows(0, 3), y=rows(0)) for _ in range(2)))
UNEVEN_RIDGE = RidgeData(*(Examples(x=rows(6, 3), y=rows(5)) for _ in range(2)))
RIDGES = (("data", NO_RIDGE), ("data", UNEVEN_RIDGE), ("data", None))
LAM = (("lam", NAN), ("lam", rows(2)))
KIND = (("kind", "none"),)
SIZES = (("sizes", (1, 1)), ("sizes", (1, 1, 1, 1, 0)), ("sizes", 3))
RATE = numbers("rate", bad=(NAN, -0.1, 1.5))
FIVE = tasks.regression.generate(0, d=2, sizes=(3, 2, 3, 2, 2))
ALTERNATING = (
    *numbers("lam"),
    *numbers("reward_constant", bad=(NAN,)),
    ("reward", "none"),
    ("optimizer_sharing", "none"),
    *counts("validate_every"),
    ("patience", -1),
)
DRAWN = {"image": IMAGE, "key": KEY}
LINEAR = tasks.Linear(3)
TUNED = tasks.TunableMLP(3, (4,))
RATES = {"input_dropout": Hyperparameter(0.1, 0.0, 0.9, "logit")}

SOLUTIONS = tasks.ridge_solutions
TABLE = {
    "tasks.affine": case(
        tasks.affine,
        DRAWN,
        ("key", RAW),
        *numbers("rotation", "shear", "translate", "zoom", bad=(NAN,)),
        ("image", rows(6)),
        ("image", IMAGES),
        runs=False,
    ),
    "tasks.batchify": case(
        tasks.batchify,
        {"tokens": np.arange(10), "batch_size": 2},
        *counts("batch_size"),
        ("batch_size", 11),
        ("tokens", np.ones((2, 2))),
    ),
    "tasks.census_like": case(
        tasks.census_like,
        {"num_examples": 4, "num_features": 2},
        ("num_examples", 0),
        ("num_examples", 1),
        *counts("num_features"),
        ("seed", -1),
    ),
    "tasks.colour_jitter": case(
        tasks.colour_jitter,
        DRAWN,
        ("key", RAW),
        *numbers("brightness", "contrast", "saturation", "hue"),
    ),
    "tasks.controller_data": case(
        tasks.controller_data, {"splits": FIVE}, ("splits", None), ("splits", SET)
    ),
    "tasks.task_data": case(
        tasks.task_data, {"splits": FIVE}, ("splits", None), ("splits", SET)
    ),
    "tasks.corrupt_labels": case(
        tasks.corrupt_labels,
        {"split": SPLIT, "fraction": 0.5, "key": KEY, "num_classes": 3},
        ("key", RAW),
        *numbers("fraction"),
        ("fraction", 1.5),
        *counts("num_classes"),
        ("split", None),
        runs=False,
    ),
    "tasks.crop_and_flip": case(tasks.crop_and_flip, {}, ("pad", -1), ("pad", 0.5)),
    "tasks.crop_and_flip:call": case(
        lambda batch, key: tasks.crop_and_flip()(batch, key),
        {"batch": SPLIT, "key": KEY},
        ("key", RAW, "crop_and_flip(...)(key="),
        runs=False,
    ),
    "tasks.cutout": case(
        tasks.cutout,
        {**DRAWN, "length": 2, "holes": 1},
        ("key", RAW),
        *counts("max_holes"),
        *numbers("length", "holes"),
        ("image", rows(6)),
        runs=False,
    ),
    "tasks.dropconnect_mask": case(
        tasks.dropconnect_mask,
        {"key": KEY, "shape": (2, 3), "rate": 0.5},
        ("key", RAW),
        ("rate", rows(2)),
        *RATE,
    ),
    "tasks.word_mask": case(
        tasks.word_mask,
        {"key": KEY, "vocab": 3, "rate": 0.5},
        ("key", RAW),
        ("rate", rows(2)),
        *RATE,
        *counts("vocab"),
    ),
    "tasks.dropout": case(
        tasks.dropout,
        {"x": rows(4, 3), "rate": 0.5, "key": KEY},
        ("key", RAW),
        ("rate", rows(3)),
        *RATE,
        ("shape", "none"),
        ("x", np.arange(3)),
        ("x", np.float32(1)),
    ),
    "tasks.epochs": case(
        tasks.epochs, {"loop": LOOP, "size": 2}, *counts("size"), ("loop", None)
    ),
    "tasks.epochs:step": case(
        tasks.epochs(LOOP, 2).step,
        {"state": STATE, "key": KEY, "data": SET},
        ("key", RAW),
        ("data", None),
        ("data", Dataset(UNEVEN, SPLIT)),
        ("data", Dataset(EMPTY, SPLIT)),
        runs=False,
    ),
    "tasks.hold_out": case(
        tasks.hold_out,
        {"data": SET, "fraction": 0.5},
        *numbers("fraction"),
        ("fraction", 1.0),
        ("fraction", 0.01),
        ("data", None),
        ("data", Dataset(UNEVEN, SPLIT)),
    ),
    "tasks.horizontal_flip": case(
        tasks.horizontal_flip, DRAWN, ("key", RAW), ("image", rows(6))
    ),
    "tasks.image_classification": case(
        tasks.image_classification,
        {"model": LINEAR, "example": IMAGES[0]},
        *counts("batch_size"),
        *numbers("std", bad=(NAN, 0.0, -1.0)),
        ("mean", NAN),
        *numbers("l2"),
        ("example", rows(6)),
        ("example", (6, 6)),
        ("model", None),
        ("augment", 3),
    ),
    "tasks.image_tuning": case(
        tasks.image_tuning,
        {"model": TUNED, "example": IMAGES[0], "hparams": RATES},
        *counts("batch_size"),
        *numbers("std", bad=(NAN, 0.0, -1.0)),
        ("mean", NAN),
        ("hparams", {"none": RATES["input_dropout"]}),
        ("example", rows(6)),
        ("model", LINEAR),
        ("hparams", {"input_dropout": 0.1}),
    ),
    "tasks.join_splits": case(
        lambda splits: tasks.join_splits(*splits),
        {"splits": (FIVE.task_train, FIVE.task_valid)},
        ("splits", ()),
        ("splits", (FIVE.task_train, FIVE.task_valid._replace(inputs=rows(2, 5)))),
    ),
    "tasks.language_tuning": case(
        tasks.language_tuning,
        {"hparams": {}, "vocab": 5, "width": 2},
        *counts(
            "vocab", "width", "layers", "batch_size", "valid_batch_size", "segment"
        ),
        ("hparams", {"none": RATES["input_dropout"]}),
        ("hparams", {"word_dropout": RATES["input_dropout"]}),
    ),
    "tasks.load": case(
        tasks.load, {"name": "digits"}, ("name", "none"), ("name", 3), runs=False
    ),
    "tasks.load:folder": case(
        tasks.load,
        {"name": "mnist", "data_dir": ABSENT},
        ("data_dir", ABSENT, str(ABSENT), "prepare_data mnist"),
        runs=False,
    ),
    "tasks.load_ptb": case(
        tasks.load_ptb,
        {"data_dir": ABSENT},
        ("data_dir", ABSENT, str(ABSENT)),
        runs=False,
    ),
    "tasks.max_pool": case(
        tasks.max_pool,
        {"x": np.ones((1, 4, 4, 1)), "size": 2},
        *counts("size"),
        ("size", 5),
        ("x", rows(3)),
    ),
    "tasks.minibatch": case(
        tasks.minibatch,
        {"data": SPLIT, "key": KEY, "size": 2},
        ("key", RAW),
        *counts("size"),
        ("data", UNEVEN),
        ("data", EMPTY),
        ("data", {}),
    ),
    "tasks.mixup": case(
        tasks.mixup,
        {"images": IMAGES, "labels_onehot": ONE_HOT, "key": KEY, "alpha": 0.2},
        ("key", RAW),
        *numbers("alpha"),
        ("alpha", rows(3)),
        ("images", IMAGES[:3], "mixup(labels_onehot=...)"),
        ("labels_onehot", np.arange(4)),
        runs=False,
    ),
    "tasks.network_params": case(
        tasks.network_params, {"data": RIDGE, "lam": 0.0}, *RIDGES, *LAM, runs=False
    ),
    "tasks.network_response": case(
        tasks.network_response, {"data": RIDGE, "lam": 0.0}, *RIDGES, *LAM
    ),
    "tasks.row_rescaling": case(
        tasks.row_rescaling,
        {"data": RIDGE, "lam": 0.0},
        *RIDGES,
        *LAM,
        *numbers("sigma"),
    ),
    "tasks.normalization": case(
        tasks.normalization, {"name": "digits"}, ("name", "none"), ("name", 3)
    ),
    "tasks.private_loss": case(
        tasks.private_loss,
        {"loss": lambda p, b, k: 0.0, "clip_norm": 1.0, "noise_multiplier": 1.0},
        *numbers("clip_norm", "noise_multiplier"),
        ("clip_norm", 0.0),
    ),
    "tasks.ridge_regression": case(
        tasks.ridge_regression,
        {"num_features": 3},
        *counts("num_features", "draws"),
        *KIND,
        *numbers("init", "perturbation"),
        ("init", rows(2)),
    ),
    "tasks.two_layer_regression": case(
        tasks.two_layer_regression,
        {"num_features": 3},
        *counts("num_features", "draws"),
        *numbers("init", "perturbation"),
    ),
    "tasks.ridge_regression:init": case(
        tasks.ridge_regression(3).init, {"key": KEY}, ("key", RAW)
    ),
    "tasks.two_layer_regression:init": case(
        tasks.two_layer_regression(3).init, {"key": KEY}, ("key", RAW), runs=False
    ),
    "tasks.scaling_noise": case(
        tasks.scaling_noise,
        {**DRAWN, "strength": 0.1},
        ("key", RAW),
        *numbers("strength"),
        ("strength", rows(2)),
    ),
    "tasks.segments": case(
        tasks.segments,
        {"rows": np.ones((2, 7), int), "length": 3},
        *counts("length"),
        ("length", 7),
        ("rows", np.arange(3)),
    ),
    "tasks.smooth_labels": case(
        tasks.smooth_labels,
        {"labels_onehot": ONE_HOT, "strength": 0.1},
        *numbers("strength"),
        ("strength", 1.5),
        ("strength", rows(3)),
        ("labels_onehot", np.arange(4)),
    ),
    "tasks.smoothed_svm": case(
        tasks.smoothed_svm, {"num_weights": 3}, *counts("num_weights")
    ),
    "tasks.smoothed_svm:init": case(
        tasks.smoothed_svm(3).init, {"key": KEY}, ("key", RAW)
    ),
    "tasks.stock_hparams": case(
        tasks.stock_hparams,
        {"names": ["mixup"]},
        ("names", ["none"]),
        ("names", "mixup"),
    ),
    "tasks.synthetic_text": case(
        tasks.synthetic_text,
        {"key": KEY, "num_tokens": 20, "vocab": 3},
        ("key", RAW),
        ("num_tokens", 9),
        ("vocab", 1),
        ("vocab", 0),
        runs=False,
    ),
    "tasks.transform_images": case(
        tasks.transform_images,
        {"images": IMAGES, "strengths": {}, "key": KEY},
        ("key", RAW),
        ("strengths", {"none": 0.1}),
        ("strengths", {"cutout_holes": 1}),
        ("strengths", {"hue": rows(3)}, "strengths['hue']"),
        ("strengths", {"hue": NAN}),
        ("strengths", {"rotation": -1.0}),
        ("std", 0.0),
        ("images", IMAGES[0]),
        ("images", rows(3)),
        ("images", IMAGES[:0]),
    ),
    "tasks.classification.draw": case(
        tasks.classification.draw,
        {"key": KEY, "num_features": 4, "sizes": (4,) * 5},
        ("key", RAW),
        *SIZES,
        *counts("num_features"),
        runs=False,
    ),
    "tasks.classification.generate": case(
        tasks.classification.generate,
        {"seed": 0, "num_features": 4, "sizes": (4,) * 5},
        ("seed", -1),
        *SIZES,
        *counts("num_features"),
    ),
    "tasks.classification.from_arrays": case(
        tasks.classification.from_arrays,
        {"inputs": rows(10, 2), "labels": np.arange(10) % 2, "sizes": (2,) * 5},
        *SIZES,
        ("labels", np.arange(3)),
        ("inputs", rows(0, 2)),
        ("inputs", rows(10)),
    ),
    "tasks.classification.problem": case(
        tasks.classification.problem,
        {},
        *ALTERNATING,
        *counts("hidden", "num_features"),
        ("optimizer", 0.1),
    ),
    "tasks.classification.problem:init": case(
        tasks.classification.problem().init, {"key": KEY}, ("key", RAW), runs=False
    ),
    "tasks.regression.draw": case(
        tasks.regression.draw,
        {"key": KEY, "d": 2, "sizes": (3,) * 5},
        ("key", RAW),
        *SIZES,
        *counts("d"),
        *numbers("std"),
        runs=False,
    ),
    "tasks.regression.generate": case(
        tasks.regression.generate,
        {"seed": 0, "d": 2, "sizes": (3,) * 5},
        ("seed", -1),
        *SIZES,
        *counts("d"),
        *numbers("std"),
    ),
    "tasks.regression.problem": case(
        tasks.regression.problem,
        {},
        *ALTERNATING,
        *counts("d"),
        *numbers("learning_rate", "quadratic_scale"),
    ),
    "tasks.regression.problem:init": case(
        tasks.regression.problem().init, {"key": KEY}, ("key", RAW), runs=False
    ),
    "tasks.gan.classifier_task": case(
        tasks.gan.classifier_task, {"dataset": "digits"}, ("dataset", "none")
    ),
    "tasks.gan.gaussian_grid": case(
        tasks.gan.gaussian_grid, {}, *counts("side"), *numbers("spacing", "std")
    ),
    "tasks.gan.image_data": case(
        tasks.gan.image_data,
        {
            "train": GREY,
            "valid": GREY,
            "classifier": None,
            "key": KEY,
            "dim_z": 2,
            "score_samples": 5,
        },
        ("key", RAW),
        *counts("dim_z", "score_samples"),
        ("train", GREY[:0]),
        ("valid", GREY[:0]),
        ("train", rows(3)),
    ),
    "tasks.gan.inception_score": case(
        tasks.gan.inception_score,
        {"probabilities": np.full((10, 2), 0.5), "splits": 5},
        *counts("splits"),
        ("splits", 3),
        ("probabilities", rows(10)),
        ("probabilities", rows(0, 2)),
        runs=False,
    ),
    "tasks.gan.problem": case(
        tasks.gan.problem,
        {"dataset": "digits"},
        ("dataset", "none"),
        *counts("generator_repeats", "batch_size", "validate_every"),
        ("score_samples", 3),
        ("final_samples", 3),
        ("generator_loss", "none"),
        ("pixel_range", (1.0, 0.0)),
        *numbers("discriminator_scale", "learning_rate", "metric_decay"),
        ("metric_decay", 1.0),
        ("patience", -1),
        ("architecture", None),
    ),
    "tasks.optimizees.deeper": case(
        tasks.optimizees.deeper,
        {},
        ("variant", "none"),
        ("conv", "none"),
        named=("private_loss", "ConvNet", "ResNet"),
    ),
    "tasks.optimizees.mnist_dp": case(
        tasks.optimizees.mnist_dp,
        {},
        *numbers("clip_norm", "noise_multiplier"),
        ("conv", "none"),
        named=("private_loss", "ConvNet", "ResNet"),
    ),
    "tasks.optimizees.resnet52": case(
        tasks.optimizees.resnet52,
        {},
        ("num_classes", 3),
        ("conv", "none"),
        named=("private_loss", "ConvNet", "ResNet"),
    ),
    "tasks.optimizees.optimizee_data": case(
        tasks.optimizees.optimizee_data,
        {"split": SPLIT},
        ("full_intensity", 0),
        ("full_intensity", NAN),
        ("split", None),
        ("split", UNEVEN),
        ("split", EMPTY),
    ),
    **{
        f"tasks.optimizees.{name}": case(
            getattr(tasks.optimizees, name),
            {},
            ("conv", "none"),
            named=("ConvNet", "ResNet"),
        )
        for name in (
            "train",
            "wider",
            "fmnist",
            "svhn",
            "cifar",
            "resnet",
            "small_batch",
        )
    },
    "tasks.ridge_solutions.best_weights": case(
        SOLUTIONS.best_weights, {"data": RIDGE, "lam": 0.0}, *RIDGES, *LAM, *KIND
    ),
    "tasks.ridge_solutions.hypergradient": case(
        SOLUTIONS.hypergradient, {"data": RIDGE, "lam": 0.0}, *RIDGES, *LAM, *KIND
    ),
    "tasks.ridge_solutions.joint_solution": case(
        SOLUTIONS.joint_solution,
        {"data": RIDGE, "lam": 0.0, "sigma": 0.5},
        *RIDGES,
        ("lam", NAN),
        ("lam", rows(3)),
        *KIND,
        *numbers("sigma"),
    ),
    "tasks.ridge_solutions.optimum": case(
        SOLUTIONS.optimum, {"data": RIDGE}, *RIDGES, *KIND, runs=False
    ),
    "tasks.ridge_solutions.response": case(
        SOLUTIONS.response,
        {"data": RIDGE, "lam": 0.0},
        *RIDGES,
        *LAM,
        *KIND,
        *numbers("sigma"),
    ),
    "tasks.ridge_solutions.validation_loss": case(
        SOLUTIONS.validation_loss, {"data": RIDGE, "lam": 0.0}, *RIDGES, *LAM, *KIND
    ),
    "tasks.translation.load": case(
        tasks.translation.load,
        {"data_dir": ABSENT},
        ("data_dir", ABSENT, str(ABSENT)),
        ("corpus", "none"),
        ("pos_tags", "none"),
        *counts("vocab_size", "max_length"),
        *numbers("fraction"),
        runs=False,
    ),
    "tasks.translation.problem": case(
        tasks.translation.problem,
        {"vocab_sizes": dict.fromkeys(("source", "mt", "ner", "pos"), 5)},
        ("vocab_sizes", {}),
        ("hidden", 3),
        *counts("embedding", "hidden", "depth", "batch_size", "validate_every"),
        *numbers("dropout", "learning_rate", "clip_norm"),
        ("dropout", 1.0),
        ("optimizer_sharing", "none"),
        ("patience", -1),
    ),
    "tasks.translation.synthetic": case(
        tasks.translation.synthetic,
        {"seed": 0, "sizes": (2,) * 5},
        ("seed", -1),
        *counts("vocab_size"),
        ("lengths", (5, 2)),
        ("lengths", (0, 2)),
        *SIZES,
    ),
    "tasks.translation.vocab_sizes": case(
        tasks.translation.vocab_sizes,
        {"splits": tasks.translation.synthetic(0, sizes=(2,) * 5)},
        ("splits", None),
    ),
}
