"""Turns the raw files of an image set into the folder that `metax.tasks.load` reads.

    python -m experiments.prepare_data mnist --raw DIR [--data-dir OUT] [--overwrite]

DIR holds the files as their authors publish them, gzipped or not:

    mnist, fashion_mnist   train-images-idx3-ubyte   t10k-images-idx3-ubyte
                           train-labels-idx1-ubyte   t10k-labels-idx1-ubyte
    cifar10                data_batch_1.bin ... data_batch_5.bin   test_batch.bin

OUT defaults to $TFDS_DATA_DIR, and without it to ~/tensorflow_datasets. The folder,
e.g. OUT/mnist/3.0.1, is one of tensorflow-datasets in array_record format, with the
images in their published order; `tfds.data_source` reads it too. Neither needs
TensorFlow. About ten seconds a set on one core, and 30 to 140 MB.
"""

import dataclasses
import gzip
import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro

from metax.tasks import Dataset, Split

Name = Literal["mnist", "fashion_mnist", "cifar10"]

_VERSIONS = {"mnist": "3.0.1", "fashion_mnist": "3.0.1", "cifar10": "3.0.2"}
_PUBLISHED = {"mnist": (60000, 10000), "cifar10": (50000, 10000)}
_PUBLISHED["fashion_mnist"] = _PUBLISHED["mnist"]
_CLASSES = {
    "fashion_mnist": "T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag"
    " Ankle_boot",
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck",
}
_NUM_CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Config:
    name: Annotated[Name, tyro.conf.Positional]
    """Which set the raw files are of."""
    raw: Path
    """Folder of the raw files."""
    data_dir: Path | None = None
    """Where the prepared set goes (default: $TFDS_DATA_DIR, ~/tensorflow_datasets)."""
    overwrite: bool = False
    """Replace a set that is already there."""


def main(config: Config) -> None:
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    data_dir = config.data_dir or Path(default).expanduser()
    folder = prepare(config.name, config.raw, data_dir, overwrite=config.overwrite)
    print(f"{folder} is ready: metax.tasks.load({config.name!r}) reads it.")


def prepare(name: str, raw: Path, data_dir: Path, *, overwrite: bool = False) -> Path:
    """Writes `data_dir/<name>/<version>`, whole or not at all, and returns its path."""
    folder = Path(data_dir) / name / _VERSIONS[name]
    if folder.exists() and not overwrite:
        raise FileExistsError(
            f"{folder} exists already. Pass --overwrite to replace it."
        )
    data = read_cifar10(Path(raw)) if name == "cifar10" else read_idx_set(Path(raw))
    counts = len(data.train.label), len(data.test.label)
    if counts != _PUBLISHED[name]:
        print(f"note: {counts} images, where {_PUBLISHED[name]} were published.")
    incomplete = Path(data_dir) / f"incomplete-{os.getpid()}"
    try:
        _make_folder(incomplete)
        write_set(incomplete, name, data)
        _put_in_place(incomplete, folder)
    finally:
        shutil.rmtree(incomplete, ignore_errors=True)
    return folder


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise OSError(
            f"--data-dir must be a folder that can be written; got {folder.parent}: "
            f"{error}."
        ) from error


def _put_in_place(incomplete: Path, folder: Path) -> None:
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        incomplete.rename(folder)
        return
    replaced = folder.with_name(f"replaced-{os.getpid()}")
    folder.rename(replaced)
    incomplete.rename(folder)
    shutil.rmtree(replaced)


# --- raw files -------------------------------------------------------------------


class _Raw(NamedTuple):
    path: Path
    content: bytes


def read_idx_set(raw: Path) -> Dataset:
    """MNIST or Fashion-MNIST from its four idx files."""
    splits = [
        Split(image=read_idx(raw, f"{stem}-images", 3)[..., None], label=labels)
        for stem in ("train", "t10k")
        for labels in [read_idx(raw, f"{stem}-labels", 1).astype(np.int32)]
    ]
    for stem, split in zip(("train", "t10k"), splits, strict=True):
        _check_labels(raw / f"{stem}-labels", split.label)
        if len(split.image) != len(split.label):
            raise ValueError(
                f"{raw}: {stem} has {len(split.image)} images and "
                f"{len(split.label)} labels; the files do not belong together."
            )
    return Dataset(*splits)


def read_idx(raw: Path, stem: str, ndim: int) -> np.ndarray:
    """An idx file of bytes: a magic number, `ndim` sizes (big-endian), the bytes."""
    names = [f"{stem}{dash}idx{ndim}-ubyte" for dash in "-."]
    file = _read(raw, names)
    header = 4 * (1 + ndim)
    if len(file.content) < header:
        raise ValueError(f"{file.path} ends within its header; fetch it again.")
    magic, *shape = struct.unpack(f">{1 + ndim}I", file.content[:header])
    if magic != 0x0800 + ndim:
        raise ValueError(
            f"{file.path} is no idx file of bytes with {ndim} axes: it must begin with "
            f"the number {0x0800 + ndim}; got {magic}."
        )
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(file.content) != expected:
        raise ValueError(
            f"{file.path} must be {expected} bytes long by its header, which says "
            f"{shape}; got {len(file.content)}. Fetch it again."
        )
    return np.frombuffer(file.content, np.uint8, offset=header).reshape(shape)


def read_cifar10(raw: Path) -> Dataset:
    """CIFAR-10 from the six files of its binary version."""
    train = [read_cifar_batch(raw, f"data_batch_{i}") for i in range(1, 6)]
    test = read_cifar_batch(raw, "test_batch")
    lengths = [len(batch.label) for batch in train]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"{raw}: data_batch_1.bin to data_batch_5.bin must be equally long; got "
            f"{lengths} images. Fetch the shorter ones again."
        )
    joined = [np.concatenate(parts) for parts in zip(*train, strict=True)]
    return Dataset(train=Split(*joined), test=test)


def read_cifar_batch(raw: Path, stem: str) -> Split:
    """Records of one label byte and the red, green and blue plane of 32 × 32 bytes."""
    file = _read(raw, [f"{stem}.bin"])
    record = 1 + 3 * 32 * 32
    if not file.content or len(file.content) % record:
        raise ValueError(
            f"{file.path} must hold whole records of {record} bytes; got "
            f"{len(file.content)} bytes. Fetch it again."
        )
    rows = np.frombuffer(file.content, np.uint8).reshape(-1, record)
    label = rows[:, 0].astype(np.int32)
    _check_labels(file.path, label)
    image = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Split(image=image, label=label)


def _read(raw: Path, names: list[str]) -> _Raw:
    """The first of the names that is there, unpacked if it ends in .gz."""
    for path in [raw / (name + end) for name in names for end in ("", ".gz")]:
        if path.is_file():
            return _Raw(path, _content(path))
    hint = ""
    if (raw / names[0].removesuffix(".bin")).is_file():
        hint = " Its Python version (pickles) is not read; take the binary version."
    raise FileNotFoundError(
        f"--raw: looked for {names[0]} or {names[0]}.gz in {raw.resolve()} and found "
        f"neither.{hint}"
    )


def _content(path: Path) -> bytes:
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        return gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}. Fetch it again.") from error


def _check_labels(path: Path, label: np.ndarray) -> None:
    if label.size and label.max() >= _NUM_CLASSES:
        raise ValueError(
            f"{path}: labels must be 0 to {_NUM_CLASSES - 1}; got {label.max()}."
        )


# --- prepared folder --------------------------------------------------------------


def write_set(folder: Path, name: str, data: Dataset) -> None:
    """The records of both splits, and the descriptions that make them a set."""
    infos = []
    for split_name, split in data._asdict().items():
        path = folder / f"{name}-{split_name}.array_record-00000-of-00001"
        num_bytes = _write_records(path, _examples(name, split_name, split))
        infos.append(_split_info(split_name, num_bytes, len(split.label)))
    if name in _CLASSES:
        classes = [word.replace("_", " ") for word in _CLASSES[name].split()]
        (folder / "label.labels.txt").write_text("\n".join(classes) + "\n")
    features = _features(data.train.image.shape[1:], has_id=name == "cifar10")
    (folder / "features.json").write_text(json.dumps(features, indent=4))
    info = {
        "disableShuffling": True,
        "fileFormat": "array_record",
        "moduleName": "experiments.prepare_data",
        "name": name,
        "splits": infos,
        "supervisedKeys": {
            "tuple": {"items": [{"featureKey": "image"}, {"featureKey": "label"}]}
        },
        "version": _VERSIONS[name],
    }
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))


def _examples(name: str, split_name: str, split: Split) -> Iterator[bytes]:
    """Each image as a serialised `tf.train.Example`, with the image as PNG."""
    from tensorflow_datasets.proto import tf_example_pb2

    messages: Any = tf_example_pb2  # generated code, which makes its classes on import
    for i, (image, label) in enumerate(zip(*split, strict=True)):
        example = messages.Example()
        feature = example.features.feature
        feature["image"].bytes_list.value.append(_png(image))
        feature["label"].int64_list.value.append(int(label))
        if name == "cifar10":
            feature["id"].bytes_list.value.append(f"{split_name}_{i + 1:05}".encode())
        yield example.SerializeToString(deterministic=True)


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    pixels = np.ascontiguousarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _write_records(path: Path, records: Iterator[bytes]) -> int:
    """One record a group, so that each is read without its neighbours."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    num_bytes = 0
    for record in records:
        writer.write(record)
        num_bytes += len(record)
    writer.close()
    return num_bytes


def _split_info(name: str, num_bytes: int, length: int) -> dict:
    return {
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "name": name,
        "numBytes": str(num_bytes),
        "shardLengths": [str(length)],
    }


def _features(shape: tuple[int, ...], *, has_id: bool) -> dict:
    """What tensorflow-datasets needs to decode a record."""
    package = "tensorflow_datasets.core.features"
    image = {
        "dtype": "uint8",
        "encodingFormat": "png",
        "shape": {"dimensions": [str(size) for size in shape]},
    }
    features = {
        "image": {
            "image": image,
            "pythonClassName": f"{package}.image_feature.Image",
        },
        "label": {
            "classLabel": {"numClasses": str(_NUM_CLASSES)},
            "pythonClassName": f"{package}.class_label_feature.ClassLabel",
        },
    }
    if has_id:
        text = {"pythonClassName": f"{package}.text_feature.Text", "text": {}}
        features = {"id": text, **features}
    return {
        "featuresDict": {"features": features},
        "pythonClassName": f"{package}.features_dict.FeaturesDict",
    }


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except ImportError as error:
        raise SystemExit(
            f'prepare_data: {error}. Remedy: pip install "metax[data]".'
        ) from error
    except (OSError, ValueError) as error:
        raise SystemExit(f"prepare_data: {error}") from error
