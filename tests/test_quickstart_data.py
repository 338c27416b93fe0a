"""The labelled messages that ship with pyft: format, counts, and no near-duplicates across the split."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "pyft" / "quickstart_data"
MAX_SHARED_WORDS = 0.6
MAX_SHARED_GRAMS = 0.4


def read(name: str) -> list[tuple[str, str]]:
    lines = (FOLDER / name).read_bytes().decode("utf-8").split("\n")
    assert lines[0] == "text\tlabel"
    assert lines[-1] == ""
    rows = [tuple(line.split("\t")) for line in lines[1:-1]]
    assert all(len(row) == 2 for row in rows)
    return rows  # type: ignore[return-value]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def grams(text: str, size: int = 5) -> frozenset[str]:
    plain = "".join(words(text))
    return frozenset(plain[i : i + size] for i in range(max(1, len(plain) - size + 1)))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b)


def most_alike(these: list[str], those: list[str] | None = None) -> tuple[float, float]:
    """Largest share of common words and of common 5-character runs, over all pairs of two lists (or within one)."""
    left = [(frozenset(words(text)), grams(text)) for text in these]
    right = left if those is None else [(frozenset(words(text)), grams(text)) for text in those]
    by_words = by_grams = 0.0
    for i, (a_words, a_grams) in enumerate(left):
        for b_words, b_grams in right[i + 1 :] if those is None else right:
            by_words = max(by_words, jaccard(a_words, b_words))
            by_grams = max(by_grams, jaccard(a_grams, b_grams))
    return by_words, by_grams


@pytest.fixture(scope="module")
def train() -> list[tuple[str, str]]:
    return read("train.tsv")


@pytest.fixture(scope="module")
def test() -> list[tuple[str, str]]:
    return read("test.tsv")


def test_counts_are_stratified(train: list[tuple[str, str]], test: list[tuple[str, str]]) -> None:
    assert len(train) == 520
    assert len(test) == 240
    train_counts, test_counts = Counter(label for _, label in train), Counter(label for _, label in test)
    assert len(train_counts) == 10
    assert set(train_counts.values()) == {52}
    assert test_counts == dict.fromkeys(train_counts, 24)


def test_texts_are_clean(train: list[tuple[str, str]], test: list[tuple[str, str]]) -> None:
    for text, label in train + test:
        assert text == " ".join(text.split()), text
        assert text.isprintable()
        assert not text.startswith('"'), f"a leading quote would be read as quoting: {text}"
        assert re.fullmatch(r"[a-z]+_[a-z]+", label)
    assert sum("\r" in text for text, _ in train + test) == 0


def test_texts_vary_in_length(train: list[tuple[str, str]], test: list[tuple[str, str]]) -> None:
    lengths = [len(words(text)) for text, _ in train + test]
    assert min(lengths) <= 4
    assert max(lengths) >= 20
    assert len({word for text, _ in train + test for word in words(text)}) > 1800


def test_all_texts_differ(train: list[tuple[str, str]], test: list[tuple[str, str]]) -> None:
    texts = Counter(" ".join(words(text)) for text, _ in train + test)
    assert [text for text, count in texts.items() if count > 1] == []


def test_no_near_duplicates_across_the_split(train: list[tuple[str, str]], test: list[tuple[str, str]]) -> None:
    by_words, by_grams = most_alike([text for text, _ in test], [text for text, _ in train])
    assert by_words < MAX_SHARED_WORDS
    assert by_grams < MAX_SHARED_GRAMS


@pytest.mark.parametrize("name", ["train.tsv", "test.tsv"])
def test_no_near_duplicates_within_a_file(name: str) -> None:
    by_words, by_grams = most_alike([text for text, _ in read(name)])
    assert by_words < MAX_SHARED_WORDS
    assert by_grams < MAX_SHARED_GRAMS


def test_measure_finds_near_duplicates(train: list[tuple[str, str]]) -> None:
    """The limits would catch a message with a word or two changed, and one with its words joined or misspelt."""
    assert (
        most_alike(["The printer on floor 2 is jammed again"], ["the printer on floor 3 is jammed again!"])[0]
        > MAX_SHARED_WORDS
    )
    assert most_alike(["I cannot log into my mailbox today"], ["I can not log in to my mail box today"])[1] > 0.9
    longest = max((text for text, _ in train), key=len)
    assert most_alike([longest], [longest.replace("the", "a")])[0] >= MAX_SHARED_WORDS


def test_source_says_who_how_and_licence(train: list[tuple[str, str]]) -> None:
    source = (FOLDER / "SOURCE.txt").read_text(encoding="utf-8")
    assert "Apache-2.0" in source
    assert "Author" in source
    assert "520 messages" in source
    assert "240 messages" in source
    assert all(f"  {label} " in source for label in {label for _, label in train})


def test_files_are_package_data() -> None:
    """An installed wheel finds the files beside pyft/quickstart.py."""
    from importlib.resources import files

    shipped = files("pyft").joinpath("quickstart_data")
    assert {name for name in ("train.tsv", "test.tsv", "SOURCE.txt") if shipped.joinpath(name).is_file()} == {
        "train.tsv",
        "test.tsv",
        "SOURCE.txt",
    }
