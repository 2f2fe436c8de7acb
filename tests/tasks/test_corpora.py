import gzip

import pytest

from metax.tasks.corpora import (
    Sentence,
    read_captions,
    read_entities,
    read_parts_of_speech,
    split_punctuation,
    unique,
)

GERMEVAL = """#\thttp://example.org\t[2020-01-01]
1\tAnna\tB-PER\tO
2\tmag\tO\tO
3\t#\tO\tO
4\t12\tO\tO

#\thttp://example.org\t[2020-01-02]
1\tJa\tO\tO
"""
EUROPARL = """Sie\tsie\tPPER\tI-NC\tO
geht\tgehen\tVVFIN\tI-VC\tO

Damit\tdamit\tPROAV\tI-PC\tO"""
CONLLU = """# sent_id = 1
1-2\tZum\t_\t_\t_\t_\t_\t_\t_\t_
1\tZu\tzu\tADP\tAPPR\t_\t3\tcase\t_\t_
2\tdem\tder\tDET\tART\t_\t3\tdet\t_\t_
3\tMeer\tMeer\tNOUN\tNN\t_\t0\troot\t_\t_
3.1\tleer\t_\tX\t_\t_\t_\t_\t_\t_

# sent_id = 2
1\tKomm\tkommen\tVERB\tVVIMP\t_\t0\troot\t_\t_
"""


@pytest.fixture
def small(tmp_path):
    """A file of each format, some packed."""
    german, captions = tmp_path / "german", tmp_path / "multi30k"
    german.mkdir()
    captions.mkdir()
    for part in ("dev", "test"):
        (german / f"germeval2014.{part}.tsv").write_text(GERMEVAL, encoding="utf-8")
    for name in ("de_gsd-ud-dev", "de_gsd-ud-test", "de_lit-ud-test", "de_pud-ud-test"):
        with gzip.open(german / f"{name}.conllu.gz", "wt", encoding="utf-8") as file:
            file.write(CONLLU)
    for part in ("train", "dev", "test"):
        (german / f"europarl_ner.{part}.tsv").write_text(EUROPARL, encoding="utf-8")
    (captions / "val.de").write_text("Ein Hund.\nZwei 30-jährige!\n", encoding="utf-8")
    (captions / "val.en").write_text("A dog.\nTwo of them!\n", encoding="utf-8")
    (captions / "val.lc.norm.tok.de").write_text("ein hund .\n", encoding="utf-8")
    (captions / "val.lc.norm.tok.en").write_text("a dog .\n", encoding="utf-8")
    return tmp_path


def test_captions_are_cut_and_digits_are_0(small):
    german, english = read_captions(small, "val")
    assert german == [("Ein", "Hund", "."), ("Zwei", "00-jährige", "!")]
    assert english == [("A", "dog", "."), ("Two", "of", "them", "!")]
    assert read_captions(small, "val", cased=False) == (
        [("ein", "hund", ".")],
        [("a", "dog", ".")],
    )


def test_captions_must_be_pairs(small):
    (small / "multi30k" / "val.en").write_text("A dog.\n")
    with pytest.raises(ValueError, match=r"2 German and 1 English captions in 'val'"):
        read_captions(small, "val")


def test_names_are_outer_tags_and_comments_are_skipped(small):
    first, second = read_entities(small, "dev")
    assert first == Sentence(("Anna", "mag", "#", "00"), ("B-PER", "O", "O", "O"))
    assert second == Sentence(("Ja",), ("O",))
    assert read_entities(small, "dev", cased=False)[0].words[0] == "anna"


def test_universal_tags_skip_ranges_and_empty_nodes(small):
    sentences = read_parts_of_speech(small)
    assert len(sentences) == 4 * 2
    assert sentences[0] == Sentence(("Zu", "dem", "Meer"), ("ADP", "DET", "NOUN"))
    assert sentences[1] == Sentence(("Komm",), ("VERB",))


def test_the_stts_comes_from_two_files_and_europarl_under_one_name_each(small):
    sentences = read_parts_of_speech(small, "stts")
    assert len(sentences) == 2 * 2 + 3 * 2
    assert sentences[0].tags == ("APPR", "ART", "NN")
    assert sentences[-1] == Sentence(("Damit",), ("PAV",))  # no line after the last


def test_sentences_of_the_same_words_are_kept_once(small):
    sentences = read_parts_of_speech(small, "stts")
    words = [" ".join(sentence.words) for sentence in unique(sentences)]
    assert words == ["Zu dem Meer", "Komm", "Sie geht", "Damit"]


def test_signs_stand_alone_and_hyphens_do_not():
    line = "„Geht's?“, fragte (laut) die T-Shirt-Frau..."
    assert split_punctuation(line) == (
        *("„", "Geht's", "?", "“", ",", "fragte", "(", "laut", ")"),
        *("die", "T-Shirt-Frau", ".", ".", "."),
    )


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither multi30k/train.de nor"):
        read_captions(tmp_path, "train")


def test_an_unknown_set_of_tags_is_refused(small):
    with pytest.raises(ValueError, match=r"tags=...\).*got 'ptb'"):
        read_parts_of_speech(small, "ptb")


def test_the_corpora_have_their_published_counts(corpora_dir):
    sizes = {"val": 1014, "test_2016_flickr": 1000, "test_2018_flickr": 1071}
    for part, size in sizes.items():
        german, english = read_captions(corpora_dir, part)
        assert len(german) == len(english) == size
    counts = {"test": (5100, 96_499, 51), "dev": (2200, 41_653, 50)}
    kinds = set()
    for part, expected in counts.items():
        sentences = read_entities(corpora_dir, part)
        lengths = [len(sentence.words) for sentence in sentences]
        assert (len(lengths), sum(lengths), max(lengths)) == expected
        kinds |= {tag for sentence in sentences for tag in sentence.tags}
    assert len(kinds) == 23
    sentences = read_parts_of_speech(corpora_dir)
    assert len(sentences) == 799 + 977 + 1920 + 1000
    words = 12_480 + 16_499 + 40_450 + 21_332
    assert sum(len(sentence.words) for sentence in sentences) == words
    assert len({tag for sentence in sentences for tag in sentence.tags}) == 17
    sentences = read_parts_of_speech(corpora_dir, "stts")
    words = 12_480 + 16_499 + 80_467 + 9_241 + 20_697
    assert sum(len(sentence.words) for sentence in sentences) == words
    assert len({tag for sentence in sentences for tag in sentence.tags}) == 50


@pytest.mark.slow
def test_the_training_captions_have_their_published_counts(corpora_dir):
    german, english = read_captions(corpora_dir, "train", cased=False)
    assert len(german) == len(english) == 29_000
    # 361 k and 378 k tokens
    assert round(sum(map(len, german)), -3) == 361_000
    assert round(sum(map(len, english)), -3) == 378_000
