import gzip
import json
import struct

import numpy as np
import pytest

from experiments.prepare_data import prepare
from metax.tasks import Dataset, Split, load

pytest.importorskip("tensorflow_datasets", reason="needs the extra `data`")
pytest.importorskip("array_record", reason="needs the extra `data`")


def random_split(num, shape, seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (num, *shape), dtype=np.uint8)
    return Split(image=image, label=rng.integers(0, 10, num).astype(np.int32))


def idx(array):
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_idx_set(raw, data, *, dash="-", packed=False):
    for stem, split in zip(("train", "t10k"), data, strict=True):
        for name, content in [
            (f"{stem}-images{dash}idx3-ubyte", idx(split.image[..., 0])),
            (f"{stem}-labels{dash}idx1-ubyte", idx(split.label)),
        ]:
            if packed:
                (raw / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (raw / name).write_bytes(content)


def cifar_records(split):
    planes = split.image.transpose(0, 3, 1, 2).reshape(len(split.label), -1)
    return np.hstack([split.label[:, None].astype(np.uint8), planes]).tobytes()


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    return folder


@pytest.fixture
def mnist(raw):
    data = Dataset(random_split(7, (5, 4, 1), 0), random_split(3, (5, 4, 1), 1))
    write_idx_set(raw, data)
    return data


@pytest.fixture
def cifar10(raw):
    batches = [random_split(2, (32, 32, 3), seed) for seed in range(6)]
    for i, batch in enumerate(batches[:5]):
        (raw / f"data_batch_{i + 1}.bin").write_bytes(cifar_records(batch))
    (raw / "test_batch.bin").write_bytes(cifar_records(batches[5]))
    train = Split(*(np.concatenate(parts) for parts in zip(*batches[:5], strict=True)))
    return Dataset(train=train, test=batches[5])


def assert_loads(data, name, tmp_path):
    loaded = load(name, data_dir=tmp_path / "out", cache_dir=tmp_path / "cache")
    for split, expected in zip(loaded, data, strict=True):
        np.testing.assert_array_equal(split.image, expected.image)
        np.testing.assert_array_equal(split.label, expected.label)
        assert (split.image.dtype, split.label.dtype) == (np.uint8, np.int32)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_prepared_idx_set_loads_bit_for_bit(name, mnist, raw, tmp_path):
    folder = prepare(name, raw, tmp_path / "out")
    assert folder == tmp_path / "out" / name / "3.0.1"
    assert_loads(mnist, name, tmp_path)


@pytest.mark.parametrize("dash", ["-", "."])
def test_packed_files_and_both_spellings_are_read(dash, raw, tmp_path):
    data = Dataset(random_split(4, (3, 3, 1), 0), random_split(2, (3, 3, 1), 1))
    write_idx_set(raw, data, dash=dash, packed=True)
    prepare("mnist", raw, tmp_path / "out")
    assert_loads(data, "mnist", tmp_path)


def test_prepared_cifar10_loads_bit_for_bit(cifar10, raw, tmp_path):
    prepare("cifar10", raw, tmp_path / "out")
    assert_loads(cifar10, "cifar10", tmp_path)


@pytest.mark.parametrize("name", ["cifar100", "svhn_cropped"])
def test_folders_of_tensorflow_datasets_are_read_like_ours(
    name, cifar10, raw, tmp_path
):
    """Their published format: records and features of the same make, another name."""
    made = prepare("cifar10", raw, tmp_path / "made")
    folder = tmp_path / "out" / name / "3.0.2"
    folder.mkdir(parents=True)
    for path in made.iterdir():
        content = path.read_bytes()
        if path.suffix == ".json":
            content = content.replace(b'"cifar10"', f'"{name}"'.encode())
        (folder / path.name.replace("cifar10", name)).write_bytes(content)
    assert_loads(cifar10, name, tmp_path)


def test_tensorflow_datasets_reads_the_set_by_name(cifar10, raw, tmp_path):
    import tensorflow_datasets as tfds

    prepare("cifar10", raw, tmp_path / "out")
    source = tfds.data_source(
        "cifar10", split="train", data_dir=tmp_path / "out", download=False
    )
    assert [example["id"] for example in source][:2] == [b"train_00001", b"train_00002"]
    assert [example["label"] for example in source] == cifar10.train.label.tolist()


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_features_equal_those_of_a_folder_in_use(
    name, request, raw, tmp_path, tfds_dir
):
    reference = next((tfds_dir / name).glob("*/features.json"))
    if name == "mnist":
        data = Dataset(random_split(2, (28, 28, 1), 0), random_split(2, (28, 28, 1), 1))
        write_idx_set(raw, data)
    else:
        request.getfixturevalue("cifar10")
    folder = prepare(name, raw, tmp_path / "out")
    written = json.loads((folder / "features.json").read_text())
    assert written == json.loads(reference.read_text())


def test_an_existing_set_is_replaced_only_on_request(mnist, raw, tmp_path):
    prepare("mnist", raw, tmp_path / "out")
    other = Dataset(random_split(6, (2, 2, 1), 5), random_split(1, (2, 2, 1), 6))
    write_idx_set(raw, other)
    with pytest.raises(FileExistsError, match="--overwrite"):
        prepare("mnist", raw, tmp_path / "out")
    assert_loads(mnist, "mnist", tmp_path)
    prepare("mnist", raw, tmp_path / "out", overwrite=True)
    assert_loads(other, "mnist", tmp_path)
    assert [path.name for path in (tmp_path / "out").rglob("3.0.1")] == ["3.0.1"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["mnist"]


def test_a_failure_while_writing_leaves_nothing(mnist, raw, tmp_path, monkeypatch):
    def fail(image):
        raise OSError("no space left")

    monkeypatch.setattr("experiments.prepare_data._png", fail)
    with pytest.raises(OSError, match="no space left"):
        prepare("mnist", raw, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def spoil(path, change):
    path.write_bytes(change(path.read_bytes()))


IDX_FAULTS = {
    "truncated": ("train-images-idx3-ubyte", lambda b: b[:-1], "by its header"),
    "longer": ("train-images-idx3-ubyte", lambda b: b + b"0", "by its header"),
    "headless": ("train-labels-idx1-ubyte", lambda b: b[:5], "within its header"),
    "swapped": ("t10k-images-idx3-ubyte", lambda b: b"\0\0\x08\x01" + b[4:], "2051"),
    "label 200": ("t10k-labels-idx1-ubyte", lambda b: b[:-1] + b"\xc8", "0 to 9"),
    "count": (
        "train-labels-idx1-ubyte",
        lambda b: struct.pack(">2I", 2049, 6) + b[8:-1],
        "belong together",
    ),
}


@pytest.mark.parametrize("fault", IDX_FAULTS)
def test_faulty_idx_file_is_refused_before_anything_is_written(
    fault, mnist, raw, tmp_path
):
    name, change, message = IDX_FAULTS[fault]
    spoil(raw / name, change)
    with pytest.raises(ValueError, match=message):
        prepare("mnist", raw, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_gzip_is_refused(mnist, raw, tmp_path):
    plain = raw / "train-images-idx3-ubyte"
    packed = gzip.compress(plain.read_bytes())
    plain.unlink()
    (raw / "train-images-idx3-ubyte.gz").write_bytes(packed[:-12])
    with pytest.raises(ValueError, match="damaged"):
        prepare("mnist", raw, tmp_path / "out")


@pytest.mark.parametrize(
    ("cut", "message"), [(1, "whole records"), (3073, "equally long")]
)
def test_truncated_cifar_batch_is_refused(cut, message, cifar10, raw, tmp_path):
    spoil(raw / "data_batch_3.bin", lambda b: b[:-cut])
    with pytest.raises(ValueError, match=message):
        prepare("cifar10", raw, tmp_path / "out")


def test_missing_raw_file_names_it_and_its_folder(mnist, raw, tmp_path):
    (raw / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte") as error:
        prepare("mnist", raw, tmp_path / "out")
    assert str(raw) in str(error.value)


def test_pickled_cifar_is_not_read(raw, tmp_path):
    (raw / "data_batch_1").write_bytes(b"never opened")
    with pytest.raises(FileNotFoundError, match="binary version"):
        prepare("cifar10", raw, tmp_path / "out")


def test_unwritable_output_names_the_flag(mnist, raw, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="--data-dir"):
        prepare("mnist", raw, tmp_path / "file")
