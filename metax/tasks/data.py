"""Image sets by name, as arrays on the host.

A set is two `Split`s of uint8 images and int32 labels, in the order in which it was
published. The digits ship inside scikit-learn; the others are read, without
TensorFlow, from folders in the array_record format of tensorflow-datasets. Decoding
60000 images takes seconds, so the arrays are kept once decoded, and the next `load`
takes a fraction of a second. Nothing is downloaded.

Arrays go to the device once, by `jax.device_put`, and from there into `step` as an
argument.

Sets of any kind on which one model is trained to learn how to train another are cut in
five, a `FiveWay`.
"""

import hashlib
import json
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metax.arguments import check_has

__all__ = [
    "Dataset",
    "FiveWay",
    "Split",
    "controller_data",
    "load",
    "normalization",
    "task_data",
]

# what experiments/prepare_data.py makes, and what tensorflow-datasets alone does
_OURS = ("mnist", "fashion_mnist", "cifar10")
_NAMES = ("digits", *_OURS, "cifar100", "svhn_cropped")

# Mean and standard deviation of each channel over the training images, and the stored
# value that stands for full intensity: 16 for the digits, 255 for the others.
_STATISTICS = {
    "digits": ((0.3058,), (0.3762,), 16),
    "mnist": ((0.1307,), (0.3081,), 255),
    "fashion_mnist": ((0.2860,), (0.3530,), 255),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 255),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 255),
}


class Split(NamedTuple):
    """Images with their classes; also what a batch is.

    Attributes:
      image: uint8 [N, height, width, channels], as stored: 0..16 for the digits,
        0..255 for the others.
      label: int32 [N], the class of each image, from 0.
    """

    image: Any
    label: Any


class Dataset(NamedTuple):
    """A set with its official division.

    Attributes:
      train: what is learned from.
      test: what is held out; a caller that tunes takes a part of `train` for it.
    """

    train: Split
    test: Split


class FiveWay(NamedTuple):
    """A set in five parts, so that nothing is scored on what taught it.

    What is learned about training (a schedule, a controller) comes from the first two
    parts; the model that it then guides has the next two; the last is read once. Each
    part is any pytree of arrays.

    Fan et al., "Learning to teach", ICLR 2018, arXiv 1805.03643, section 5.1.

    Attributes:
      controller_train: what models are trained on while a controller learns.
      controller_valid: where their metric is measured, which is its reward.
      task_train: what the guided model is trained on.
      task_valid: where its best step is chosen.
      test: where it is scored.
    """

    controller_train: Any
    controller_valid: Any
    task_train: Any
    task_valid: Any
    test: Any


def controller_data(splits: FiveWay) -> dict[str, Any]:
    """The data of an `AlternatingProblem` while a controller learns on it.

    Args:
      splits: a set in five parts.

    Returns:
      `{"train", "valid"}`, the two parts of the controller.
    """
    fields = ("controller_train", "controller_valid")
    check_has("controller_data", "splits", splits, "a `FiveWay`", *fields)
    return {"train": splits.controller_train, "valid": splits.controller_valid}


def task_data(splits: FiveWay) -> dict[str, Any]:
    """The data of an `AlternatingProblem` for the model that counts.

    Args:
      splits: a set in five parts.

    Returns:
      `{"train", "valid", "test"}`, the parts that no controller has seen.
    """
    fields = ("task_train", "task_valid", "test")
    check_has("task_data", "splits", splits, "a `FiveWay`", *fields)
    return {
        "train": splits.task_train,
        "valid": splits.task_valid,
        "test": splits.test,
    }


def load(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Dataset:
    """Loads a set of images by name.

    `"digits"` is scikit-learn's: 1797 images of 8 × 8. It has no official division, so
    one is fixed here without chance: sorted by class, every fifth image is tested (360)
    and the rest, in the published order, is trained on (1437). Each class is divided
    alike, to within one image.

    `"mnist"`, `"fashion_mnist"` (60000 and 10000 images of 28 × 28) and `"cifar10"`
    (50000 and 10000 of 32 × 32 × 3) come from prepared folders, in the order of their
    records; `experiments/prepare_data.py` makes them from the raw files. `"cifar100"`,
    by its fine labels, and `"svhn_cropped"` are read likewise, from folders that
    tensorflow-datasets itself has prepared.

    Args:
      name: one of the six names above.
      data_dir: the folder that holds `mnist/3.0.1` and the like; by default
        `$TFDS_DATA_DIR`, and without it `~/tensorflow_datasets`.
      cache_dir: where decoded arrays are kept, 47 to 185 MB a set; by default
        `$XDG_CACHE_HOME/metax`, and without it `~/.cache/metax`. Changed records make
        a new entry. A damaged entry is read anew, a folder that cannot be written is
        passed over.

    Returns:
      The set, as numpy arrays.

    Raises:
      ValueError: the name is none of these, or the folder holds no array_record files.
      FileNotFoundError: the set is not in `data_dir`.
      ImportError: a prepared set is asked for, and tensorflow-datasets is missing.

    Example:
      >>> from metax.tasks import load
      >>> data = load("digits")
      >>> data.train.image.shape, data.test.image.shape
      ((1437, 8, 8, 1), (360, 8, 8, 1))
    """
    if name not in _NAMES:
        names = ", ".join(map(repr, _NAMES))
        raise ValueError(f"`load(name=...)` must be one of {names}; got {name!r}.")
    if name == "digits":
        return _digits()
    folder = _prepared_folder(name, data_dir)
    entry = _cache_folder(cache_dir) / f"{name}-{_fingerprint(folder)}.npz"
    data = _read_cache(entry)
    if data is None:
        data = _read_records(folder)
        _write_cache(entry, data)
    return data


def normalization(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, in the units of the stored images.

    So (image - mean) / std needs no scale besides: 0.1307 × 255 for MNIST, and
    0.3058 × 16 for the digits, whose full intensity is 16.

    Args:
      name: "digits", "mnist", "fashion_mnist" or "cifar10", for the figures of its own
        training images; or
        `"imagenet"`, the customary figures for colour photographs, with which many
        published settings for CIFAR-10 work.

    Returns:
      `(mean, std)`, float32 [channels] each, the arguments of `image_classification`.

    Raises:
      ValueError: the name is unknown.

    Example:
      >>> from metax.tasks import normalization
      >>> mean, std = normalization("mnist")
      >>> round(float(mean[0]), 2), round(float(std[0]), 2)
      (33.33, 78.57)
    """
    if name not in _STATISTICS:
        names = ", ".join(map(repr, _STATISTICS))
        raise ValueError(
            f"`normalization(name=...)` must be one of {names}; got {name!r}."
        )
    mean, std, full = _STATISTICS[name]
    return full * np.array(mean, np.float32), full * np.array(std, np.float32)


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    image = bunch.images.astype(np.uint8)[..., None]
    label = bunch.target.astype(np.int32)
    is_test = np.zeros(len(label), dtype=bool)
    is_test[np.argsort(label, kind="stable")[::5]] = True
    return Dataset(
        train=Split(image=image[~is_test], label=label[~is_test]),
        test=Split(image=image[is_test], label=label[is_test]),
    )


def _prepared_folder(name: str, data_dir: str | os.PathLike | None) -> Path:
    """The newest prepared version of a set, e.g. `<data_dir>/mnist/3.0.1`."""
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root = Path(default if data_dir is None else data_dir).expanduser().resolve()
    found = [path.parent for path in root.glob(f"{name}/*.*.*/dataset_info.json")]
    if not found:
        ours = (
            f"from its raw files, for which `python -m experiments.prepare_data {name} "
            "--raw DIR` needs no TensorFlow, or "
        )
        raise FileNotFoundError(
            f"`load({name!r})` looked for {root / name}/<version>/dataset_info.json "
            "and found none. If the set is elsewhere, set TFDS_DATA_DIR or pass "
            f"data_dir. If not, prepare it {ours if name in _OURS else ''}by "
            "tensorflow-datasets with file_format='array_record'."
        )
    folder = max(found, key=_version)
    form = json.loads((folder / "dataset_info.json").read_text()).get("fileFormat")
    if form != "array_record":
        raise ValueError(
            f"`load({name!r})` reads folders in the format 'array_record'; {folder} is "
            f"in {form!r}. Prepare it with file_format='array_record'; "
            "`python -m experiments.prepare_data` does, for the sets it knows."
        )
    return folder


def _version(folder: Path) -> list[int]:
    return [int(part) if part.isdigit() else -1 for part in folder.name.split(".")]


def _fingerprint(folder: Path) -> str:
    """Changes with the path of the folder, its version, and any file inside."""
    digest = hashlib.sha256(str(folder).encode())
    for path in sorted(folder.iterdir()):
        stat = path.stat()
        digest.update(f"|{path.name}|{stat.st_size}|{stat.st_mtime_ns}".encode())
    return f"{folder.name}-{digest.hexdigest()[:16]}"


def _read_records(folder: Path) -> Dataset:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"Reading {folder} needs tensorflow-datasets and array-record (not "
            'TensorFlow): `pip install "metax[data]"`.'
        ) from error
    builder: Any = tfds.builder_from_directory(folder)
    return Dataset(
        train=_read_split(builder.as_data_source(split="train")),
        test=_read_split(builder.as_data_source(split="test")),
    )


def _read_split(source: Any, chunk: int = 1000) -> Split:
    size = len(source)
    image = np.empty((size, *source[0]["image"].shape), np.uint8)
    label = np.empty(size, np.int32)
    for start in range(0, size, chunk):
        rows = range(start, min(start + chunk, size))
        for row, example in zip(rows, source.__getitems__(rows), strict=True):
            image[row] = example["image"]
            label[row] = example["label"]
    return Split(image=image, label=label)


def _cache_folder(cache_dir: str | os.PathLike | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "metax"


def _read_cache(entry: Path) -> Dataset | None:
    """The arrays of an entry, or None where it is absent or damaged."""
    try:
        # opened here, because np.load leaves a damaged file open
        with open(entry, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            train = Split(image=arrays["train_image"], label=arrays["train_label"])
            test = Split(image=arrays["test_image"], label=arrays["test_label"])
    # numpy tells of damage by whatever its parser stumbles over; the zip container
    # checks the sum of every array, so what does load is what was written.
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None
    return Dataset(train=train, test=test)


def _write_cache(entry: Path, data: Dataset) -> None:
    """Writes an entry whole or not at all."""
    temporary = None
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=entry.parent, suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            np.savez(
                file,
                train_image=data.train.image,
                train_label=data.train.label,
                test_image=data.test.image,
                test_label=data.test.label,
            )
        os.replace(temporary, entry)
    except OSError:  # a cache is a convenience: no room or no permission is no error
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
