"""Which nodes the logits react to most when their weights have fewer bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from pyft.export.quantize import Weight, weights_of


def ranked_groups(
    proto: Any, lower: Callable[[Any, Sequence[str]], Any], moved: Callable[[Any], float], max_trials: int
) -> list[tuple[str, ...]]:
    """Groups of nodes, that first whose return to float32 brings the logits nearest to those of float32.

    Args:
        proto: the float32 graph.
        lower: (graph, names of nodes left in float32) to the graph in fewer bits.
        moved: how far the logits of a graph are from those of float32.
        max_trials: groups are so large that there are no more than this.

    Returns:
        Tuples of node names; groups that bring nothing are left out, and one that holds most of the bytes comes late.
    """
    weights = weights_of(proto)
    num_bytes = {weight.node: weight.num_bytes for weight in weights}
    total = sum(num_bytes.values())
    gains = []
    everything = moved(lower(proto, []))
    for group in groups_of(weights, max_trials):
        gain = everything - moved(lower(proto, group))
        if gain > 0:
            gains.append((gain * (1 - sum(num_bytes[name] for name in group) / total), group))
    return [group for _, group in sorted(gains, key=lambda one: -one[0])]


def groups_of(weights: Sequence[Weight], most: int) -> list[tuple[str, ...]]:
    """At most `most` groups of neighbours: the first and the last node alone, as these are often the sensitive ones.

    >>> weights = [Weight(name, "Conv", 4) for name in "abcdef"]
    >>> groups_of(weights, 4)
    [('a',), ('b', 'c'), ('d', 'e'), ('f',)]
    """
    names = [weight.node for weight in weights]
    if len(names) <= most:
        return [(name,) for name in names]
    inner, count = names[1:-1], max(most - 2, 1)
    bounds = [round(i * len(inner) / count) for i in range(count + 1)]
    parts = [tuple(inner[start:stop]) for start, stop in itertools.pairwise(bounds)]
    return [(names[0],), *(part for part in parts if part), (names[-1],)]
