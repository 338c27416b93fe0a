"""The page of a run: well-formed, complete, and nothing in it that the data wrote as HTML."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_runs import HOSTILE, classes_run, labels_run, values_run

from pyft.errors import CheckpointError, ConfigError
from pyft.report.facts import RunFacts, read_run
from pyft.report.markup import Html, element, escape, foreign, join
from pyft.report.page import render

RUNS = {"classes": classes_run, "values": values_run, "labels": labels_run}
VOID = {"meta", "link", "img", "br", "hr", "input", "col", "wbr"}


class Reader(HTMLParser):
    """Elements, text and attributes of a page; fails where a tag is not closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


@pytest.mark.parametrize("name", RUNS)
def test_what_the_data_wrote_stays_text(name: str) -> None:
    page = Reader(render(RUNS[name]()))
    assert page.tags.count("script") == 1
    assert HOSTILE in page.text
    assert not [one for one in page.attributes if one[1].startswith("on")]
    ids = [value for _, key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    links = {value[1:] for tag, key, value in page.attributes if tag == "a" and key == "href"}
    assert links <= set(ids)
    # Nothing is asked of the network.
    sources = [value for _, key, value in page.attributes if key in ("src", "href", "action", "data", "poster")]
    assert all(value.startswith(("data:", "#")) for value in sources)
    assert not re.search(r"@import|url\(|https?://", render(RUNS[name]()))


@pytest.mark.parametrize("name", RUNS)
def test_every_section_is_there(name: str) -> None:
    page = Reader(render(RUNS[name](), [Html("<p>attributions</p>")]))
    sections = [value for tag, key, value in page.attributes if tag == "section" and key == "id"]
    special = {
        "classes": ["confusion", "classes", "calibration"],
        "labels": ["classes", "calibration"],
        "values": ["errors"],
    }[name]
    first, last = ["repeat", "curves", "metrics"], ["worst", "explanations", "onnx", "cost", "versions"]
    assert [section for section in sections if section != "notes"] == [*first, *special, *last]


def test_numbers_of_the_run_are_on_the_page() -> None:
    facts = classes_run()
    text = Reader(render(facts)).text
    values = facts.metrics["test"]["values"]
    for expected in (f"{values['accuracy']:.4f}", f"{facts.held_out['calibration']['ece']:.4f}", "29,645 of 22,595,021",
                     "23.1 MB", "1.90 ms", "said 1 min 40 s", "1.05 times as long", "2.1 GB", "epoch 4"):  # fmt: skip
        assert expected in text, expected
    matrix = facts.metrics["test"]["confusion"]
    pairs = sorted(
        (-count, row, column)
        for row, counts in enumerate(matrix)
        for column, count in enumerate(counts)
        if count and row != column
    )
    worst = f"{-pairs[0][0] / sum(matrix[pairs[0][1]]):.1%}"
    assert worst in text


def test_stages_of_ones_own_are_told_in_words() -> None:
    run = classes_run()
    run.config["arguments"]["strategy"] = [
        {"name": "head", "freeze": "encoder*", "epochs": 1, "lr_scale": 1.0, "kind": "head"},
        {"name": "rest", "freeze": None, "epochs": 4, "lr_scale": 0.01, "kind": "full"},
    ]
    run.config["settings"] = {"epochs": 5, "clip": 1.0}
    page = Reader(render(run)).text
    assert "head: 1 epoch, encoder* frozen; rest: 4 epochs, learning rate times 0.01" in page
    # Each stage has its own number of epochs: that of the settings would be a false one.
    settings = page[page.index("All training settings") :].partition("How it learned")[0]
    assert "clip" in settings
    assert "epochs" not in settings


def test_a_run_that_has_only_begun_has_a_page() -> None:
    page = Reader(render(RunFacts("run", {"data": {"kind": "text", "problem": "classification"}})))
    assert "The run is not finished" in page.text
    Reader(render(RunFacts("run", {})))


@pytest.mark.parametrize("name", RUNS)
def test_any_file_may_be_missing(name: str) -> None:
    facts = RUNS[name]()
    for one in dataclasses.fields(facts):
        if one.name not in ("name", "config"):
            Reader(render(dataclasses.replace(facts, **{one.name: type(getattr(facts, one.name))()})))


@pytest.mark.parametrize("count", [1, 2, 20, 120, 300])
def test_any_number_of_classes(count: int) -> None:
    facts = classes_run(max(count, 3))
    if count < 3:
        facts.config["classes"] = facts.config["classes"][:count]
        facts.detail["per_class"] = facts.detail["per_class"][:count]
        facts.detail["confusion"] = [row[:count] for row in facts.detail["confusion"][:count]]
    page = Reader(render(facts))
    drawn = any(key == "aria-label" and value == "confusion matrix" for _, key, value in page.attributes)
    assert drawn == (count <= 200)


def test_reading_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        read_run(tmp_path)
    (tmp_path / "config.json").write_text('{"classes": ["a"], "data": {"problem": "classification"}}')
    (tmp_path / "metrics.csv").write_text("stage,epoch,lr,train_loss,val_loss,seconds\nhead,1,0.1,nan,,2.0\n")
    (tmp_path / "notes.txt").write_text("one\n\ntwo\n")
    (tmp_path / "report.html").write_text("old")
    facts = read_run(tmp_path)
    assert facts.history == [
        {"stage": "head", "epoch": 1.0, "lr": 0.1, "train_loss": None, "val_loss": None, "seconds": 2.0}
    ]
    assert facts.notes == ["one", "two"]
    assert [name for name, _ in facts.files] == ["config.json", "metrics.csv", "notes.txt"]
    assert facts.role is None
    Reader(render(facts))
    for content in ("{", "[1]", "\udcff"):
        (tmp_path / "parity.json").write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(CheckpointError, match=r"parity\.json"):
            read_run(tmp_path)


def test_markup_escapes_all_but_markup() -> None:
    assert element("a", "<b>", Html("<i>"), None, title='"&', class_="x", hidden=True, lang=None) == (
        '<a title="&quot;&amp;" class="x" hidden>&lt;b&gt;<i></a>'
    )
    assert join(["<", Html("<")]) == "&lt;<"
    assert escape("a\x00b\ud800c") == "a\ufffdb\ufffdc"
    escape("\ud83d\ude00 \u202e").encode("utf-8", "surrogatepass")
    assert foreign("a_b<c") == "<bdi>a_<wbr>b&lt;c</bdi>"
    assert foreign("__a_") == "<bdi>__<wbr>a_</bdi>"
