import gzip
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.tasks.text import batchify, load_ptb, segments, synthetic_text


@pytest.fixture
def ptb_dir() -> Path:
    """The folder of the Penn Treebank; skips where there is none."""
    candidates = [
        Path(os.environ.get("TEXT_DATA_DIR") or Path.home() / "metax_text"),
        Path(__file__).parents[3] / "shared" / "data",
    ]
    for root in candidates:
        for folder in (root, root / "ptb"):
            if any(folder.glob("ptb.train.txt*")):
                return folder
    pytest.skip("no Penn Treebank: set TEXT_DATA_DIR (see metax.tasks.load_ptb)")


@pytest.fixture
def small(tmp_path):
    """Three little files, one of them packed."""
    (tmp_path / "ptb.train.txt").write_text(" the cat <unk> \n the dog \n")
    (tmp_path / "ptb.valid.txt").write_text(" dog the bird \n")
    with gzip.open(tmp_path / "ptb.test.txt.gz", "wt") as file:
        file.write(" cat \n")
    return tmp_path


def test_penn_treebank_has_its_published_counts(ptb_dir):
    text = load_ptb(ptb_dir)
    counts = [len(part) for part in (text.train, text.valid, text.test)]
    assert counts == [929_589, 73_760, 82_430]
    assert len(text.vocabulary) == 10_000
    assert text.vocabulary[:2] == ("aer", "banknote")
    assert np.array_equal(np.unique(text.train), np.arange(10_000))
    assert text.train.dtype == text.valid.dtype == text.test.dtype == np.int32


def test_words_are_numbered_by_first_occurrence_and_lines_end(small):
    text = load_ptb(small)
    assert text.vocabulary == ("the", "cat", "<unk>", "<eos>", "dog")
    assert text.train.tolist() == [0, 1, 2, 3, 0, 4, 3]


def test_a_word_unknown_to_the_training_text_is_the_unknown_word(small):
    text = load_ptb(small)
    assert text.valid.tolist() == [4, 0, 2, 3]
    assert text.test.tolist() == [1, 3]
    (small / "ptb.train.txt").write_text("the cat\n")
    with pytest.raises(ValueError, match=r"`load_ptb` found the word 'dog'.*<unk>"):
        load_ptb(small)


def test_the_folder_is_found_by_environment_and_by_its_name(small, monkeypatch):
    root = small / "root"
    root.mkdir()
    for path in small.glob("ptb.*"):
        (root / "ptb").mkdir(exist_ok=True)
        path.rename(root / "ptb" / path.name)
    monkeypatch.setenv("TEXT_DATA_DIR", str(root))
    assert len(load_ptb().train) == len(load_ptb(str(root / "ptb")).train) == 7


def test_a_missing_file_says_what_where_and_how(small):
    (small / "ptb.valid.txt").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load_ptb(small)
    for part in ("ptb.valid.txt", str(small), "TEXT_DATA_DIR", "simple-examples.tgz"):
        assert part in str(caught.value)


def test_synthetic_text_is_a_chain_whose_next_word_is_half_known():
    text = synthetic_text(jax.random.key(0), 20_000, 4)
    sizes = [part.size for part in (text.train, text.valid, text.test)]
    assert sizes == [16_000, 2_000, 2_000]
    assert len(text.vocabulary) == 4
    assert text.train.dtype == jnp.int32
    counts = np.ones((4, 4))
    np.add.at(counts, (text.train[:-1], text.train[1:]), 1)
    chain = counts / counts.sum(1, keepdims=True)
    # of the later parts, so that all parts are of one chain
    surprise = -np.log(chain[text.test[:-1], text.test[1:]]).mean()
    assert surprise < 0.9 * np.log(4)
    again = synthetic_text(jax.random.key(0), 20_000, 4)
    np.testing.assert_array_equal(text.train, again.train)


def test_rows_are_consecutive_and_the_rest_is_dropped():
    rows = batchify(np.arange(11), 3)
    assert rows.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_segments_follow_on_another_and_targets_are_one_ahead():
    rows = batchify(np.arange(26), 2)  # 13 a row: 3 segments of 4
    pieces = segments(rows, 4)
    assert pieces["input"].shape == (3, 2, 4)
    again = pieces["input"].swapaxes(0, 1).reshape(2, 12)
    np.testing.assert_array_equal(again, rows[:, :12])
    np.testing.assert_array_equal(pieces["target"], pieces["input"] + 1)
    assert pieces["starts"].tolist() == [[True] * 2, [False] * 2, [False] * 2]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: batchify(np.arange(3), 4), r"batchify\(batch_size=.*=4, 3 tokens"),
        (lambda: batchify(np.arange(3), 0), r"batchify\(batch_size=.*=0"),
        (lambda: segments(np.zeros((2, 4)), 4), r"segments\(length=.*=4, rows of 4"),
        (lambda: segments(np.zeros((2, 4)), 0), r"segments\(length=.*=0"),
        (lambda: synthetic_text(jax.random.key(0), 9, 3), r"num_tokens=9"),
        (lambda: synthetic_text(jax.random.key(0), 10, 1), r"vocab=1"),
        (lambda: synthetic_text(jax.random.PRNGKey(0), 10, 2), r"synthetic_text\(key="),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()
