"""Token numbers alone as the input of a text model: its masks are made in the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyft.errors import ConfigError, need
from pyft.export.graph import Graph

IDS, MASK, TYPES = "input_ids", "attention_mask", "token_type_ids"


def text_front(spec: Mapping[str, Any], inputs: Sequence[str]) -> Graph:
    """A graph from `input_ids` (B, T) int64, padded on the right with the pad id, to the model's mask and token types.

    Only the pads behind the last other token are masked, as a text may hold the pad token itself. Where a text can
    end with it, `attention_mask` stays an input of the file.

    Args:
        spec: of a `TextPreprocess`: tokenizer, pad_id.
        inputs: names of the model's inputs.

    Raises:
        ConfigError: the model does not take `input_ids`.
    """
    if IDS not in inputs:
        raise ConfigError(
            f"inputs='raw': a model of texts takes '{IDS}', this one takes {', '.join(inputs)}: give inputs='tensor'"
        )
    graph = Graph("text")
    ids = graph.input(IDS, np.int64, ["batch", "sequence"])
    if MASK in inputs and not ends_with_pad(spec):
        graph.output(MASK, mask_of(graph, ids, int(spec["pad_id"])), ["batch", "sequence"])
    if TYPES in inputs:
        graph.output(TYPES, ids * 0, ["batch", "sequence"])
    return graph


def mask_of(graph: Graph, ids: Any, pad_id: int) -> Any:
    """1 up to the last token that is no pad, 0 after it: (B, T) int64."""
    others = graph.Not(graph.Equal(ids, pad_id)).to(np.int64)
    behind = graph.CumSum(others, graph.constant(1, np.int64), reverse=1)
    return graph.Greater(behind, 0).to(np.int64)


def ends_with_pad(spec: Mapping[str, Any]) -> bool:
    """Whether a text can end with the pad token: only where the tokenizer puts no other token behind every text."""
    tokenizers = need("tokenizers", "text", "reading the tokenizer of the model")
    tokenizer = tokenizers.Tokenizer.from_str(spec["tokenizer"])
    tokenizer.no_padding()
    tokenizer.no_truncation()
    empty = tokenizer.encode("").ids
    ends = {tuple(tokenizer.encode(text).ids[-1:]) for text in ("", "a", "1 !")}
    return not empty or len(ends) != 1 or ends == {(int(spec["pad_id"]),)}
