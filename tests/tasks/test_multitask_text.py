import numpy as np
import pytest

from metax.tasks.multitask_text import TASKS, load, synthetic, vocab_sizes
from metax.tasks.seq2seq import END, NUM_MARKS, PAD, UNKNOWN

NUM_CAPTIONS = {"train": 40, "val": 8, "test_2016_flickr": 6, "test_2018_flickr": 5}
NUM_NAMED = {"test": 40, "dev": 1110}


@pytest.fixture
def small(tmp_path):
    """A small made-up set in the formats of the corpora."""
    german, captions = tmp_path / "german", tmp_path / "multi30k"
    german.mkdir()
    captions.mkdir()
    for part, size in NUM_CAPTIONS.items():
        rows = [f"rot{'e' * (i % 3)} tor {'ab' * (i % 2)}" for i in range(size)]
        (captions / f"{part}.de").write_text("\n".join(rows) + "\n")
        rows = [f"red{'s' * (i % 3)} gate" for i in range(size)]
        (captions / f"{part}.en").write_text("\n".join(rows) + "\n")
    for part, size in NUM_NAMED.items():
        rare = "OTH" if part == "dev" else "O"
        rows = [f"1\tBert{i % 7}\tB-PER\tO\n2\ttat\t{rare}\tO\n" for i in range(size)]
        (german / f"germeval2014.{part}.tsv").write_text("\n".join(rows))
    word = "{}\t{}\t_\t{}\t_\t_\t_\t_\t_\t_"
    for i, name in enumerate(
        ("gsd-ud-dev", "gsd-ud-test", "lit-ud-test", "pud-ud-test")
    ):
        rows = []
        for j in range(10):
            letters = "abcdefghij"[j] * (i + 1)
            rows += [word.format(1, letters, "NOUN"), word.format(2, "da", "ADV"), ""]
        (german / f"de_{name}.conllu").write_text("\n".join(rows))
    return tmp_path


def lengths(array):
    return (array != PAD).sum(1)


def test_parts_have_the_sizes_of_the_division(small):
    splits = load(small, vocab_size=60)
    sizes = [[len(part[task]["source"]) for task in TASKS] for part in splits]
    pos = [8, 2, 24, 2, 4]  # of 40
    expected = [[10, 4, 30, 4, 6], [10, 550, 30, 550, 10], pos]
    assert sizes == [list(row) for row in zip(*expected, strict=True)]
    assert len(splits.test["mt_2018"]["source"]) == 5
    for part in splits:
        for pairs in part.values():
            assert pairs["source"].dtype == pairs["target"].dtype == np.int32


def test_a_fraction_keeps_that_share_of_the_training_sentences_alone(small):
    splits = load(small, vocab_size=60, fraction=0.5)
    sizes = [len(part["mt"]["source"]) for part in splits]
    assert sizes == [5, 4, 15, 4, 6]


def test_rows_are_symbols_an_end_and_padding(small):
    for part in load(small, vocab_size=60):
        for task in TASKS:
            source, target = part[task]["source"], part[task]["target"]
            for rows, last in ((source, None), (target, END)):
                for row, length in zip(rows, lengths(rows), strict=True):
                    assert length >= 1
                    assert (row[length:] == PAD).all()
                    assert last is None or row[length - 1] == last
            if task != "mt":  # a tag for every subword
                np.testing.assert_array_equal(lengths(target), lengths(source) + 1)


def test_tags_that_training_lacks_are_unknown(small):
    splits = load(small, vocab_size=60)
    tags = lambda part: set(np.unique(part["ner"]["target"])) - {END, PAD}
    assert tags(splits.task_train) == {NUM_MARKS, NUM_MARKS + 1}  # B-PER and O
    assert tags(splits.test) == {NUM_MARKS, UNKNOWN}


def test_the_seed_alone_decides(small):
    first, again, other = (load(small, vocab_size=60, seed=s) for s in (0, 0, 1))
    rows = lambda splits: splits.task_train["mt"]["source"]
    np.testing.assert_array_equal(rows(first), rows(again))
    assert rows(first).shape != rows(other).shape or (rows(first) != rows(other)).any()


def test_sentences_that_are_too_long_are_dropped(small):
    every = load(small, vocab_size=60)
    longest = every.task_train["mt"]["source"].shape[1]
    cut = load(small, vocab_size=60, max_length=longest - 1)
    assert len(cut.task_train["mt"]["source"]) < len(every.task_train["mt"]["source"])
    assert cut.task_train["mt"]["source"].shape[1] < longest


def test_vocabularies_are_seen_in_the_arrays(small):
    sizes = vocab_sizes(load(small, vocab_size=40))
    assert sizes["ner"] == NUM_MARKS + 2
    assert sizes["pos"] == NUM_MARKS + 2
    assert NUM_MARKS < sizes["source"] <= 40
    assert NUM_MARKS < sizes["mt"] <= 40


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corpus": "wit3"}, r"corpus=...\)` must be 'multi30k'; got 'wit3'"),
        ({"fraction": 0.0}, r"fraction=...\)` must lie in \(0, 1\]; got 0.0"),
        ({"max_length": 0}, r"max_length=...\)` must be at least 1; got 0"),
        ({"vocab_size": 6}, r"num_pieces=...\)` must be at least the number"),
    ],
)
def test_settings_out_of_range_are_refused(small, settings, message):
    with pytest.raises(ValueError, match=message):
        load(small, **settings)


def test_the_synthetic_targets_are_functions_of_the_source():
    splits = synthetic(3, vocab_size=9, lengths=(2, 4), sizes=(50, 5, 6, 7, 8))
    assert [len(part["mt"]["source"]) for part in splits] == [50, 5, 6, 7, 8]
    code = {}
    for task in TASKS:
        for part in splits:
            rows = zip(part[task]["source"], part[task]["target"], strict=True)
            for source, target in rows:
                length = (source != PAD).sum()
                assert 2 <= length <= 4
                assert target[length] == END
                assert (target[length + 1 :] == PAD).all()
                words, said = source[:length] - NUM_MARKS, target[:length] - NUM_MARKS
                if task == "ner":
                    np.testing.assert_array_equal(said, words % 2)
                elif task == "pos":
                    np.testing.assert_array_equal(2**said <= words + 1, True)
                    np.testing.assert_array_equal(words + 1 < 2 ** (said + 1), True)
                else:  # one permutation throughout, in reverse
                    for word, other in zip(words, said[::-1], strict=True):
                        assert code.setdefault(word, other) == other
    assert len(set(code.values())) == len(code) == 9
    assert vocab_sizes(splits) == {"source": 14, "mt": 14, "ner": 7, "pos": 9}


def test_frequent_words_of_the_synthetic_set_are_frequent():
    source = synthetic(0).task_train["mt"]["source"]
    counts = np.bincount(source[source != PAD] - NUM_MARKS, minlength=50)
    # 1/(r + 1), and some 15 000 draws
    assert 1.8 < counts[0] / counts[1] < 2.2
    assert counts[0] > 30 * counts[49]


def test_a_synthetic_set_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size=1, lengths=\(5, 10\)"):
        synthetic(0, vocab_size=1)
    with pytest.raises(ValueError, match=r"lengths=\(3, 2\)"):
        synthetic(0, lengths=(3, 2))


@pytest.mark.slow
def test_the_corpora_make_five_parts(corpora_dir):
    splits = load(corpora_dir, vocab_size=4000)
    assert [len(part["mt"]["source"]) for part in splits] == [
        7250,
        507,
        21750,
        507,
        1000,
    ]
    # some are too long
    for part, size in zip(splits, (1275, 550, 3825, 550, 1100), strict=True):
        assert 0.8 * size < len(part["ner"]["source"]) < size
    # of 23 names that occur three occur in the development part alone
    sizes = {"source": 4000, "mt": 4000, "ner": NUM_MARKS + 20, "pos": NUM_MARKS + 17}
    assert vocab_sizes(splits) == sizes
