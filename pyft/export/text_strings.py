"""Texts as strings: the tokenizer in the graph, by the operators of onnxruntime-extensions.

Only WordPiece tokenizers of BERT's kind have an operator that cuts as their `tokenizer.json` does. It is tried on
difficult texts whenever a file is made.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyft.errors import ConfigError, ExportError, need
from pyft.export.graph import Graph, Value
from pyft.export.raw_text import IDS, MASK, TYPES
from pyft.export.run import EXTENSION_OPS, first_line

# What goes wrong first: nothing, blanks, accents, signs, letters without a word, long words and texts, emoji.
DIFFICULT = [
    "", " ", "hello world", "  lead and trail  ", "Ünïcödé naïve café", "e\u0301 and \u00e9",
    "don't stop\u2014now\u2026", "100% @user #tag $5.00 <b>C++</b> & a/b", "a\tb\nc\r\nd",
    "\u65e5\u672c\u8a9e text \u4e2d\u6587", "emoji \U0001f600", "\u200bzero width\u00a0blank",
    "\uff11\uff12 \uff46\uff55\uff4c\uff4c", "x" * 120, "supercalifragilistic " * 400, "Stra\u00dfe \ufb01 \u2122",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440", "\u0645\u0631\u062d\u0628\u0627",
]  # fmt: skip
# The operator is known to cut these otherwise; a file made for them is told so, not refused.
UNLIKELY = {
    "the tokenizer's own marks, as [MASK]": "a [MASK] b",
    "Hindi": "\u0928\u092e\u0938\u094d\u0924\u0947",
    "pointed Hebrew": "\u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd",
    "Korean": "\ud55c\uad6d\uc5b4",
    "Turkish capital dotted I": "\u0130stanbul",
}


def strings_front(spec: Mapping[str, Any], inputs: Sequence[str]) -> Graph:
    """A graph from `text` (B,) string to `input_ids`, and the mask and token types where the model takes them.

    Args:
        spec: of a `TextPreprocess`: tokenizer, max_length, pad_id.
        inputs: names of the model's inputs.

    Raises:
        ConfigError: no operator does what this tokenizer does, or the model takes something else.
        ExportError: the operator cuts a difficult text otherwise.
        MissingExtraError: onnxruntime-extensions is not installed.
    """
    if IDS not in inputs or set(inputs) - {IDS, MASK, TYPES}:
        raise ConfigError(f"inputs='strings': a model of texts takes '{IDS}', this one takes {', '.join(inputs)}")
    attributes = _attributes(json.loads(spec["tokenizer"]))
    graph = Graph("strings")
    graph.opsets[EXTENSION_OPS] = 1
    texts = graph.input("text", np.str_, ["batch"])
    flat, lengths = _each(graph, texts, attributes, int(spec["max_length"]))
    for name, value in _padded(graph, flat, lengths, int(spec["pad_id"])).items():
        if name in inputs:
            graph.output(name, value, ["batch", "sequence"])
    _check(graph, spec)
    return graph


def _attributes(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """Of the operator BertTokenizer.

    Raises:
        ConfigError: the tokenizer is of another kind.
    """
    model, normalizer = tokenizer["model"], tokenizer.get("normalizer") or {}
    kinds = {
        "model": model.get("type"),
        "normalizer": normalizer.get("type"),
        "pre_tokenizer": (tokenizer.get("pre_tokenizer") or {}).get("type"),
    }
    expected = {"model": "WordPiece", "normalizer": "BertNormalizer", "pre_tokenizer": "BertPreTokenizer"}
    for part, kind in kinds.items():
        if kind != expected[part]:
            raise ConfigError(
                f"inputs='strings': onnxruntime-extensions cuts texts as BERT does ({part} {expected[part]}), the "
                f"{part} of this tokenizer is {kind}: give inputs='raw', and the file takes token numbers"
            )
    words = sorted(model["vocab"], key=model["vocab"].get)
    if [model["vocab"][word] for word in words] != list(range(len(words))) or any("\n" in word for word in words):
        raise ConfigError("inputs='strings': the vocabulary has gaps, or words with a line break: give inputs='raw'")
    lower, accents = normalizer.get("lowercase", True), normalizer.get("strip_accents")
    return {
        "vocab_file": "\n".join(words),
        "do_lower_case": int(lower),
        "strip_accents": int(lower if accents is None else accents),
        "tokenize_chinese_chars": int(normalizer.get("handle_chinese_chars", True)),
        "unk_token": model["unk_token"],
        "suffix_indicator": model["continuing_subword_prefix"],
    }


def _each(graph: Graph, texts: Value, attributes: Mapping[str, Any], most: int) -> tuple[Value, Value]:
    """The tokens of all texts one after the other, (N,), and their number for each text, (B,); both int64."""
    body = Graph("strings/each")
    number, more = body.input("strings/number", np.int64, []), body.input("strings/more", np.bool_, [])
    before = body.input("strings/before", np.int64, [None])
    # The operator takes one text; two would be a pair.
    text = body.Gather(texts, body.Reshape(number, [1]), axis=0)
    ids = body.BertTokenizer(text, domain=EXTENSION_OPS, outputs=[np.int64] * 4, **attributes)[0]
    last = body.Slice(ids, [-1], [np.iinfo(np.int64).max], [0])
    kept = body.Concat(body.Slice(ids, [0], body.Min(body.Shape(ids) - 1, most - 1), [0]), last, axis=0)
    body.output("strings/go_on", more, [])
    body.output("strings/tokens", body.Concat(before, kept, axis=0), [None])
    body.output("strings/length", body.Reshape(body.Shape(kept), []), [])
    flat, lengths = graph.loop(graph.Reshape(graph.Shape(texts), []), body, graph.constant([], np.int64))
    return flat, lengths


def _padded(graph: Graph, flat: Value, lengths: Value, pad_id: int) -> dict[str, Value]:
    """(B, T) int64, padded on the right to the longest text."""
    steps = graph.Unsqueeze(graph.Range(np.int64(0), graph.ReduceMax(lengths, keepdims=0), np.int64(1)), [0])
    starts = graph.Unsqueeze(graph.CumSum(lengths, graph.constant(0, np.int64), exclusive=1), [1])
    mask = graph.Less(steps, graph.Unsqueeze(lengths, [1]))
    ids = graph.Where(
        mask, graph.Gather(flat, graph.Where(mask, starts + steps, np.int64(0)), axis=0), np.int64(pad_id)
    )
    return {IDS: ids, MASK: mask.to(np.int64), TYPES: ids * 0}


def _check(graph: Graph, spec: Mapping[str, Any]) -> None:
    """Compare the graph with the tokenizer.

    Raises:
        ExportError: naming the first text that is cut otherwise.
    """
    library = need("onnxruntime_extensions", "text-graph", "a file that takes texts as strings")
    runtime = need("onnxruntime", "onnx", "trying the tokenizer in the graph")
    tokenizer = need("tokenizers", "text", "reading the tokenizer of the model").Tokenizer.from_str(spec["tokenizer"])
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length=int(spec["max_length"]))
    options = runtime.SessionOptions()
    options.register_custom_ops_library(library.get_library_path())
    options.log_severity_level = 4
    try:
        session = runtime.InferenceSession(graph.model().SerializeToString(), options)
    except Exception as error:
        raise ExportError(
            f"inputs='strings': onnxruntime-extensions does not take this tokenizer: {first_line(error)}: give "
            "inputs='raw', and the file takes token numbers"
        ) from error

    def differs(text: str) -> list[int] | None:
        found = session.run([IDS], {"text": np.array([text], dtype=object)})[0][0].tolist()
        return found if found != tokenizer.encode(text).ids else None

    for text in DIFFICULT:
        if (found := differs(text)) is not None:
            raise ExportError(
                f"inputs='strings': onnxruntime-extensions cuts {text[:60]!r} into {found[:12]}, the tokenizer into "
                f"{tokenizer.encode(text).ids[:12]}: give inputs='raw', and the file takes token numbers"
            )
    others = [name for name, text in UNLIKELY.items() if differs(text) is not None]
    if others:
        warnings.warn(
            f"inputs='strings': texts with {'; '.join(others)} are cut otherwise in the file than in training",
            UserWarning, stacklevel=2,
        )  # fmt: skip
