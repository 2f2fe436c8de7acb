import json
import subprocess
import sys

import numpy as np
import pytest

from metax.tasks import (
    Dataset,
    FiveWay,
    Split,
    controller_data,
    data,
    load,
    normalization,
    task_data,
)

SETS = {
    "mnist": (60000, 10000, (28, 28, 1)),
    "fashion_mnist": (60000, 10000, (28, 28, 1)),
    "cifar10": (50000, 10000, (32, 32, 3)),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A folder that looks prepared, whose records are counted when read."""
    folder = tmp_path / "data" / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text('{"fileFormat": "array_record"}')
    split = Split(np.arange(12, dtype=np.uint8).reshape(3, 2, 2, 1), np.arange(3))
    reads = []

    def read(folder):
        reads.append(folder)
        return Dataset(train=split, test=split)

    monkeypatch.setattr(data, "_read_records", read)
    return folder, reads


def load_prepared(folder, cache_dir):
    return load("mnist", data_dir=folder.parents[1], cache_dir=cache_dir)


def test_digits_are_divided_alike_in_every_class():
    digits = load("digits")
    train, test = digits
    assert train.image.shape == (1437, 8, 8, 1)
    assert test.image.shape == (360, 8, 8, 1)
    assert train.image.dtype == np.uint8
    assert train.label.dtype == np.int32
    assert train.image.max() == 16
    counts = np.bincount(train.label), np.bincount(test.label)
    fractions = counts[1] / (counts[0] + counts[1])
    np.testing.assert_allclose(fractions, 0.2, atol=1 / 174)  # one image of a class


def test_digits_split_holds_every_image_once():
    from sklearn.datasets import load_digits

    train, test = load("digits")
    images = np.concatenate([train.image, test.image]).reshape(1797, -1)
    published = load_digits().data.astype(np.uint8)
    assert sorted(map(bytes, images)) == sorted(map(bytes, published))


# the two that are slow take about 7 s each to decode
PREPARED = [
    "mnist",
    pytest.param("fashion_mnist", marks=pytest.mark.slow),
    pytest.param("cifar10", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", PREPARED)
def test_prepared_sets_have_their_published_shape(name, tfds_dir, cache):
    num_train, num_test, shape = SETS[name]
    train, test = load(name, data_dir=tfds_dir, cache_dir=cache)
    assert train.image.shape == (num_train, *shape)
    assert test.image.shape == (num_test, *shape)
    assert np.bincount(test.label).tolist() == [1000] * 10 or name == "mnist"


@pytest.mark.parametrize("name", [*PREPARED, "digits"])
def test_normalization_standardises_the_training_images(name, request, cache):
    tfds_dir = None if name == "digits" else request.getfixturevalue("tfds_dir")
    image = load(name, data_dir=tfds_dir, cache_dir=cache).train.image
    mean, std = normalization(name)
    full = 16 if name == "digits" else 255
    # the figures are published with four digits, on the scale of full intensity
    np.testing.assert_allclose(image.mean((0, 1, 2)) / full, mean / full, atol=6e-5)
    np.testing.assert_allclose(image.std((0, 1, 2)) / full, std / full, atol=6e-5)


def test_mnist_keeps_its_official_order(tfds_dir, cache):
    train, test = load("mnist", data_dir=tfds_dir, cache_dir=cache)
    assert train.label[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert test.label[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]


def test_second_load_reads_the_cache_and_gives_the_same(prepared, tmp_path):
    folder, reads = prepared
    first = load_prepared(folder, tmp_path / "cache")
    second = load_prepared(folder, tmp_path / "cache")
    assert len(reads) == 1
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.label, b.label)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".npz"]


def test_changed_records_make_a_new_entry(prepared, tmp_path):
    folder, reads = prepared
    load_prepared(folder, tmp_path / "cache")
    (folder / "mnist-train.array_record").write_bytes(b"more")
    load_prepared(folder, tmp_path / "cache")
    assert len(reads) == 2


def flip_bit(content):
    middle = 200  # inside the bytes of the first array
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"no zip at all", flip_bit],
)
def test_damaged_cache_is_read_anew(damage, prepared, tmp_path):
    folder, reads = prepared
    expected = load_prepared(folder, tmp_path / "cache")
    (entry,) = (tmp_path / "cache").iterdir()
    entry.write_bytes(damage(entry.read_bytes()))
    again = load_prepared(folder, tmp_path / "cache")
    assert len(reads) == 2
    np.testing.assert_array_equal(again.train.image, expected.train.image)
    load_prepared(folder, tmp_path / "cache")  # and the entry is whole again
    assert len(reads) == 2


def test_a_pickle_in_the_cache_is_never_opened(prepared, tmp_path):
    folder, reads = prepared
    load_prepared(folder, tmp_path / "cache")
    (entry,) = (tmp_path / "cache").iterdir()
    objects = np.array([{"a": 1}], dtype=object)
    np.savez(entry, **dict.fromkeys(("train_image", "train_label"), objects))
    load_prepared(folder, tmp_path / "cache")
    assert len(reads) == 2


def test_unwritable_cache_does_not_break_loading(prepared, tmp_path):
    folder, reads = prepared
    (tmp_path / "file").write_text("no folder")
    assert load_prepared(folder, tmp_path / "file").train.image.shape == (3, 2, 2, 1)
    assert len(reads) == 1


def test_default_folders_come_from_the_environment(prepared, tmp_path, monkeypatch):
    folder, reads = prepared
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder.parents[1]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load("mnist")
    assert reads == [folder]
    assert len(list((tmp_path / "xdg" / "metax").iterdir())) == 1


def test_the_newest_version_is_read(prepared, tmp_path):
    folder, reads = prepared
    newer = folder.with_name("3.0.10")
    newer.mkdir()
    (newer / "dataset_info.json").write_text('{"fileFormat": "array_record"}')
    load_prepared(folder, tmp_path / "cache")
    assert reads == [newer]


def test_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"`load\(name=.*'mnist'.*got 'minst'"):
        load("minst")
    with pytest.raises(ValueError, match=r"`normalization\(name=.*'imagenet'"):
        normalization("minst")


def test_missing_set_says_where_and_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load("cifar10", data_dir=tmp_path)
    for word in (str(tmp_path), "TFDS_DATA_DIR", "experiments.prepare_data cifar10"):
        assert word in str(error.value)
    # a script that does not know the set is not recommended for it
    with pytest.raises(FileNotFoundError, match=r"prepare it by tensorflow-datasets"):
        load("cifar100", data_dir=tmp_path)


def test_other_record_formats_are_refused(prepared, tmp_path):
    folder, _ = prepared
    info = {"fileFormat": "tfrecord"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="'tfrecord'"):
        load_prepared(folder, tmp_path / "cache")


def test_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch):
    folder = tmp_path / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text('{"fileFormat": "array_record"}')
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"metax\[data\]"):
        load("mnist", data_dir=tmp_path, cache_dir=tmp_path / "cache")


def test_import_pulls_in_no_data_package():
    code = "import sys, metax.tasks; print(*sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    heavy = {"tensorflow_datasets", "sklearn", "tensorflow", "array_record", "PIL"}
    assert heavy & set(out.stdout.split()) == set()


def test_a_controller_and_the_task_it_guides_share_no_data():
    splits = FiveWay("a", "b", "c", "d", "e")
    assert controller_data(splits) == {"train": "a", "valid": "b"}
    assert task_data(splits) == {"train": "c", "valid": "d", "test": "e"}
