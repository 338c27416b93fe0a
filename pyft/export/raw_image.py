"""Pictures as bytes: Pillow's resize, the crop of the centre and the scaling, in the graph, equal to the last bit.

Pillow resizes in two passes, along rows and then along columns, each to whole bytes, with weights in fixed point
(libImaging/Resample.c). Here each pass is a matrix product in float64, which holds every one of its sums exactly. The
outputs are worked out in tiles of neighbours, as each needs only the pixels under its filter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyft.errors import ConfigError, need
from pyft.export.graph import Graph, Value

SUPPORT = {"bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}
"""Half the width of each filter, in pixels of the smaller picture."""

PRECISION_BITS = 22
"""Resample.c: bits of a weight behind the point."""

TILE = 16


def image_front(spec: Mapping[str, Any], inputs: Sequence[str]) -> Graph:
    """A graph from `image` (B, H, W, 3) uint8, red first, every size free, to the model's input.

    Args:
        spec: of an `ImagePreprocess`.
        inputs: the name of the model's one input.

    Raises:
        ConfigError: the model takes more than one input.
    """
    if len(inputs) != 1:
        raise ConfigError(
            f"inputs='raw': a model of pictures takes one input, this one takes {', '.join(inputs)}: give "
            "inputs='tensor'"
        )
    graph = Graph("image")
    image = graph.input("image", np.uint8, ["batch", "height", "width", 3])
    pixels = resized(graph, image, int(spec["size"]), int(spec["resize"]), spec["interpolation"])
    scaled = normalised(graph, pixels, spec["scale"], spec["mean"], spec["std"])
    graph.output(inputs[0], scaled, ["batch", 3, int(spec["size"]), int(spec["size"])])
    return graph


def normalised(graph: Graph, pixels: Value, scale: float, mean: Sequence[float], std: Sequence[float]) -> Value:
    """(pixel * scale - mean) / std in float32 and in this order, as in training."""
    columns = [np.array(values, dtype=np.float32).reshape(3, 1, 1) for values in (mean, std)]
    return (pixels.to(np.float32) * np.float32(scale) - columns[0]) / columns[1]


def resized(graph: Graph, image: Value, size: int, resize: int, interpolation: str) -> Value:
    """(B, H, W, 3) uint8 to (B, 3, size, size) uint8: the shorter side `resize` long, then the crop of the centre."""
    shape = graph.Shape(image)
    height, width = (graph.Gather(shape, axis, axis=0) for axis in (1, 2))
    short = graph.Min(height, width)
    _mark_places(graph, height, width, short, resize, size)
    planes = graph.Transpose(image, perm=[0, 3, 1, 2])
    if interpolation == "nearest":
        for axis, side in ((2, height), (3, width)):
            wanted = new_side(side, short, resize)
            planes = graph.Gather(planes, nearest(graph, side, wanted, size), axis=axis)
        return planes
    turn = columns_first(graph, height, width, short, resize)
    planes = turned(graph, turn, planes)
    sides = graph.Where(turn, width, height), graph.Where(turn, height, width)
    rows, columns = (Taps(graph, side, new_side(side, short, resize), size, interpolation) for side in sides)
    # Rows that the crop leaves out are never resized.
    planes = along_rows(graph, graph.Slice(planes, rows.first, rows.end, [2]), columns, size)
    return turned(graph, turn, along_columns(graph, planes, rows, size))


def _mark_places(graph: Graph, height: Value, width: Value, short: Value, resize: int, size: int) -> None:
    """Where the crop lies, for boxes: a place (x, y) in it is (place + corner) * step in the picture; (2,) float32."""
    new = [new_side(side, short, resize) for side in (width, height)]
    corner = [graph.Reshape(crop_offset(graph, side, size).to(np.float32), [1]) for side in new]
    step = [
        graph.Reshape(old.to(np.float32) / made.to(np.float32), [1])
        for old, made in zip((width, height), new, strict=True)
    ]
    graph.marks = {"corner": graph.Concat(*corner, axis=0), "step": graph.Concat(*step, axis=0)}


def columns_first(graph: Graph, height: Value, width: Value, short: Value, resize: int) -> Value:
    """Whether Pillow resizes along columns first: since 13, where the height shrinks by more than twice the width."""
    if int(need("PIL", "image", "writing its resize into the graph").__version__.partition(".")[0]) < 13:
        return graph.constant(False)
    less = [side - new_side(side, short, resize) for side in (height, width)]
    return graph.And(graph.Greater(less[0], 0), graph.Greater(less[0], less[1] * 2))


def turned(graph: Graph, turn: Value, planes: Value) -> Value:
    """Rows and columns of (B, 3, H, W) exchanged where `turn` says so."""
    branches = []
    for name, perm in (("turn", [0, 1, 3, 2]), ("keep", None)):
        branch = Graph(f"{planes.name}/{name}")
        made = branch.Identity(planes) if perm is None else branch.Transpose(planes, perm=perm)
        branch.output(f"{branch.name}/planes", made, ["batch", 3, None, None])
        branches.append(branch)
    return graph.choose(turn, *branches)


def along_rows(graph: Graph, planes: Value, taps: Taps, size: int) -> Value:
    """(B, 3, H, W) uint8 to (B, 3, H, size) uint8."""
    tiles = graph.Reshape(graph.Gather(planes, taps.index, axis=3), [0, 0, 0, taps.tiles, -1])
    tiles = graph.Transpose(tiles, perm=[3, 0, 1, 2, 4]).to(np.float64)
    made = bytes_of(graph.MatMul(tiles, graph.Unsqueeze(taps.weights, [1, 2])))
    joined = graph.Reshape(graph.Transpose(made, perm=[1, 2, 3, 0, 4]), [0, 0, 0, -1])
    return graph.Slice(joined, [0], [size], [3])


def along_columns(graph: Graph, planes: Value, taps: Taps, size: int) -> Value:
    """(B, 3, H, W) uint8 to (B, 3, size, W) uint8; `taps.index` counts from the first row that is read."""
    tiles = graph.Reshape(graph.Gather(planes, taps.index - taps.first, axis=2), [0, 0, taps.tiles, -1, size])
    weights = graph.Transpose(taps.weights, perm=[0, 2, 1])
    made = bytes_of(graph.MatMul(weights, tiles.to(np.float64)))
    return graph.Slice(graph.Reshape(made, [0, 0, -1, size]), [0], [size], [2])


def bytes_of(sums: Value) -> Value:
    """Resample.c, clip8: rounded to the nearest byte, a half upwards."""
    return sums.graph.Clip(sums + 0.5, np.float64(0.0), np.float64(255.0)).to(np.uint8)


def new_side(side: Value, short: Value, resize: int) -> Value:
    """The side of the resized picture: torchvision's rule, the longer one is cut to a whole pixel. Scalar int64."""
    # The product is whole and below 2^53, so this is the true division of Python.
    return ((side * resize).to(np.float64) / short.to(np.float64)).to(np.int64)


def crop_offset(graph: Graph, side: Value, size: int) -> Value:
    """Where the crop begins: round((side - size) / 2), a half to the even number. Scalar int64."""
    return graph.Round((side - size).to(np.float64) / 2.0).to(np.int64)


def nearest(graph: Graph, side: Value, wanted: Value, size: int) -> Value:
    """(size,) int64, the pixel that each output inside the crop takes.

    Geometry.c, ImagingScaleAffine: the place of each pixel is summed up step by step, rounding errors included.
    """
    step = side.to(np.float64) / wanted.to(np.float64)
    steps = graph.Concat(graph.Reshape(step * 0.5, [1]), graph.Expand(step, graph.Reshape(wanted - 1, [1])), axis=0)
    places = graph.CumSum(steps, graph.constant(0, np.int64)).to(np.int64)
    first = crop_offset(graph, wanted, size)
    return graph.Slice(places, graph.Reshape(first, [1]), graph.Reshape(first + size, [1]), [0])


class Taps:
    """The weights of one pass, for the outputs inside the crop: Resample.c, precompute_coeffs.

    Attributes:
        first, end: (1,) int64, the part of the side that is read.
        index: (tiles * width,) int64, the pixels of all tiles; beyond `end` the last one, with the weight 0.
        weights: (tiles, width, TILE) float64, each a multiple of 2^-22.
        width: scalar int64, pixels per tile.
        tiles: number of tiles.
    """

    def __init__(self, graph: Graph, side: Value, wanted: Value, size: int, interpolation: str) -> None:
        self.graph = graph
        self.tiles = math.ceil(size / TILE)
        length = side.to(np.float64)
        scale = length / wanted.to(np.float64)
        filter_scale = graph.Max(scale, np.float64(1.0))
        support = filter_scale * SUPPORT[interpolation]
        # The last tile may reach beyond the crop: it takes the last output again.
        numbers = np.minimum(np.arange(self.tiles * TILE), size - 1).reshape(self.tiles, 1, TILE)
        first = crop_offset(graph, wanted, size)
        center = ((graph.constant(numbers, np.int64) + first).to(np.float64) + 0.5) * scale
        lowest = graph.Max((center - support + 0.5).to(np.int64), np.int64(0))
        beyond = graph.Min((center + support + 0.5).to(np.int64), side)
        start = graph.Slice(lowest, [0], [1], [2])
        self.width = graph.ReduceMax(graph.Slice(beyond, [TILE - 1], [TILE], [2]) - start, keepdims=0)
        within = graph.Reshape(graph.Range(np.int64(0), self.width, np.int64(1)), [1, -1, 1])
        place = start + within
        distance = (place.to(np.float64) - center + 0.5) * (1.0 / filter_scale)
        inside = graph.And(graph.GreaterOrEqual(place, lowest), graph.Less(place, beyond))
        raw = graph.Where(inside, FILTERS[interpolation](graph, distance), 0.0)
        # A running sum adds in the order of the C loop.
        total = graph.Slice(graph.CumSum(raw, graph.constant(1, np.int64)), [-1], [np.iinfo(np.int64).max], [1])
        fixed = raw / total * float(1 << PRECISION_BITS)
        half = graph.Where(graph.Less(fixed, 0.0), np.float64(-0.5), np.float64(0.5))
        self.weights = (fixed + half).to(np.int64).to(np.float64) / float(1 << PRECISION_BITS)
        self.first = graph.Reshape(graph.ReduceMin(start, keepdims=0), [1])
        self.end = graph.Reshape(graph.ReduceMax(beyond, keepdims=0), [1])
        self.index = graph.Reshape(graph.Min(place, self.end - 1), [-1])


def _bilinear(graph: Graph, x: Value) -> Value:
    return graph.Max(1.0 - graph.Abs(x), 0.0)


def _bicubic(graph: Graph, x: Value) -> Value:
    x = graph.Abs(x)
    near = (x * 1.5 - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return graph.Where(graph.Less(x, 1.0), near, graph.Where(graph.Less(x, 2.0), far, 0.0))


def _lanczos(graph: Graph, x: Value) -> Value:
    within = graph.And(graph.GreaterOrEqual(x, -3.0), graph.Less(x, 3.0))
    return graph.Where(within, _sinc(graph, x) * _sinc(graph, x / 3.0), 0.0)


def _sinc(graph: Graph, x: Value) -> Value:
    zero = graph.Equal(x, 0.0)
    angle = graph.Where(zero, 1.0, x * math.pi)
    return graph.Where(zero, 1.0, graph.Sin(angle) / angle)


FILTERS = {"bilinear": _bilinear, "bicubic": _bicubic, "lanczos": _lanczos}
"""Resample.c: the filters, their operations in the same order."""
