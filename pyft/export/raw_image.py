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

TILE = 8


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
    if interpolation == "nearest":
        planes = graph.Transpose(image, perm=[0, 3, 1, 2])
        for axis, side in ((2, height), (3, width)):
            wanted = new_side(side, short, resize)
            planes = graph.Gather(planes, nearest(graph, side, wanted, size), axis=axis)
        return planes
    as_it_is, made = Graph(f"{graph.name}/crop"), Graph(f"{graph.name}/resize")
    first = as_it_is.Concat(
        *(as_it_is.Reshape(crop_offset(as_it_is, side, size), [1]) for side in (height, width)), axis=0
    )
    crop = as_it_is.Slice(image, first, first + size, [1, 2])
    as_it_is.output(f"{as_it_is.name}/planes", as_it_is.Transpose(crop, perm=[0, 3, 1, 2]), ["batch", 3, None, None])
    planes = in_two_passes(made, image, height, width, short, size, resize, interpolation)
    made.output(f"{made.name}/planes", planes, ["batch", 3, None, None])
    # Where no side changes, each pixel has the weight 1 for itself.
    return graph.choose(graph.Equal(short, resize), as_it_is, made)


def in_two_passes(
    graph: Graph, image: Value, height: Value, width: Value, short: Value, size: int, resize: int, interpolation: str
) -> Value:
    """(B, H, W, 3) uint8 to (B, 3, size, size) uint8, along rows and then along columns, or the other way round.

    The weights are worked out once, the pictures are resized one by one: what lies between the passes stays in the
    cache of the processor.
    """
    turn = columns_first(graph, height, width, short, resize)
    sides = graph.Concat(*(graph.Reshape(side, [1]) for side in (width, height)), axis=0)
    sides = graph.Where(turn, graph.Gather(sides, [1, 0], axis=0), sides)
    taps = Taps(graph, sides, new_side(sides, short, resize), size, interpolation)
    body = Graph(f"{graph.name}/picture")
    number = body.input(f"{body.name}/number", np.int64, [])
    body.input(f"{body.name}/condition", np.bool_, [])
    carried = body.input(f"{body.name}/carried", np.int64, [])
    lines = first_lines(body, body.Gather(image, number, axis=0), turn, taps)
    lines = along(body, lines, 0, taps, 0, size)
    planes = along(body, body.Transpose(lines, perm=[1, 2, 0]), 1, taps, 1, size)
    body.output(f"{body.name}/go_on", body.constant(True), [])
    body.output(f"{body.name}/carried_on", carried, [])
    body.output(f"{body.name}/planes", planes, [3, size, size])
    pictures = graph.Squeeze(graph.Slice(graph.Shape(image), [0], [1], [0]), [0])
    _, stacked = graph.loop(pictures, body, graph.constant(0, np.int64))
    return turned(graph, turn, stacked)


def first_lines(graph: Graph, picture: Value, turn: Value, taps: Taps) -> Value:
    """(H, W, 3) to (W, 3, H), or to (H, 3, W) where `turn` says so, without what the crop leaves out."""
    branches = []
    for name, axes, perm in (("columns", [0, 1], [0, 2, 1]), ("rows", [1, 0], [1, 2, 0])):
        branch = Graph(f"{graph.name}/{name}")
        lines = branch.Transpose(branch.Slice(picture, taps.first, taps.end, axes), perm=perm)
        branch.output(f"{branch.name}/lines", lines, [None, 3, None])
        branches.append(branch)
    return graph.choose(turn, *branches)


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


def along(graph: Graph, lines: Value, axis: int, taps: Taps, number: int, size: int) -> Value:
    """One pass along `axis` of (L, 3, K) or (3, L, K) uint8, which becomes `size` long.

    The axis is never the last, so that whole lines of bytes are gathered. Rounding is that of Resample.c, clip8: to the
    nearest byte, a half upwards. The half is one more line, of ones, with the weight one half, so that the sums need
    only be cut to whole numbers.
    """
    padded = graph.Pad(lines, [0] * 3 + [int(place == axis) for place in range(3)], np.uint8(1))
    index, weights = (graph.Gather(value, np.int64(number), axis=0) for value in (taps.index, taps.weights))
    tiles = graph.Gather(padded, index, axis=axis)
    if axis == 0:
        tiles = graph.Reshape(tiles, [0, 0, -1])
    sums = graph.Clip(graph.MatMul(weights, tiles.to(np.float64)), np.float64(0.0), np.float64(255.0))
    length = taps.tiles * TILE
    made = graph.Reshape(sums.to(np.uint8), [length, 3, -1] if axis == 0 else [3, length, -1])
    return made if length == size else graph.Slice(made, [0], [size], [axis])


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
    """The weights of two passes, for the outputs inside the crop: Resample.c, precompute_coeffs.

    Attributes:
        first, end: (2,) int64, the part of each side that is read.
        index: (2, tiles, width) int64, the pixels of all tiles, counted from `first`; the last of each tile is -1, the
            line of ones. Beyond `end` it is the last pixel, with the weight 0.
        weights: (2, tiles, TILE, width) float64, each a multiple of 2^-22.
        tiles: number of tiles.
    """

    def __init__(self, graph: Graph, sides: Value, wanted: Value, size: int, interpolation: str) -> None:
        self.tiles = math.ceil(size / TILE)
        # The last tile may reach beyond the crop: it takes the last output again.
        numbers = np.minimum(np.arange(self.tiles * TILE), size - 1).reshape(1, self.tiles, TILE, 1)
        side, new = (graph.Reshape(value, [2, 1, 1, 1]) for value in (sides, wanted))
        scale = side.to(np.float64) / new.to(np.float64)
        filter_scale = graph.Max(scale, np.float64(1.0))
        support = filter_scale * SUPPORT[interpolation]
        center = ((crop_offset(graph, new, size) + numbers).to(np.float64) + 0.5) * scale
        lowest = graph.Max((center - support + 0.5).to(np.int64), np.int64(0))
        beyond = graph.Min((center + support + 0.5).to(np.int64), side)
        start = graph.Slice(lowest, [0], [1], [2])
        width = graph.ReduceMax(graph.Slice(beyond, [TILE - 1], [TILE], [2]) - start, keepdims=0)
        place = start + graph.Range(np.int64(0), width, np.int64(1))
        distance = (place.to(np.float64) - center + 0.5) * (1.0 / filter_scale)
        inside = graph.And(graph.GreaterOrEqual(place, lowest), graph.Less(place, beyond))
        raw = graph.Where(inside, FILTERS[interpolation](graph, distance), 0.0)
        # A running sum adds in the order of the C loop.
        total = graph.Slice(graph.CumSum(raw, graph.constant(3, np.int64)), [-1], [np.iinfo(np.int64).max], [3])
        fixed = raw / total * float(1 << PRECISION_BITS)
        half = graph.Where(graph.Less(fixed, 0.0), np.float64(-0.5), np.float64(0.5))
        weights = (fixed + half).to(np.int64).to(np.float64) / float(1 << PRECISION_BITS)
        self.weights = graph.Concat(weights, np.full((2, self.tiles, TILE, 1), 0.5), axis=3)
        self.first = graph.ReduceMin(start, [1, 2, 3], keepdims=0)
        self.end = graph.ReduceMax(beyond, [1, 2, 3], keepdims=0)
        pixels = graph.Min(graph.Squeeze(place, [2]), graph.Reshape(self.end - 1, [2, 1, 1]))
        pixels = pixels - graph.Reshape(self.first, [2, 1, 1])
        self.index = graph.Concat(pixels, np.full((2, self.tiles, 1), -1), axis=2)


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
