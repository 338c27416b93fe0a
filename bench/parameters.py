"""Shapes of real models, and parameters of these shapes with gradients."""

from __future__ import annotations

import torch

Shapes = list[tuple[int, ...]]


def transformer(vocabulary: int, positions: int, width: int, layers: int) -> Shapes:
    """Shapes of a BERT-like encoder without its pooler."""
    shapes: Shapes = [(vocabulary, width), (positions, width), (2, width), (width,), (width,)]
    for _ in range(layers):
        shapes += [(width, width), (width,)] * 4 + [(width,)] * 4
        shapes += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return shapes


def resnet50() -> Shapes:
    """Shapes of ResNet-50 with 1000 outputs."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions = [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            convolutions += [(4 * width, inputs, 1, 1)] if block == 0 else []
            shapes += [shape for c in convolutions for shape in (c, (c[0],), (c[0],))]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


BERT = transformer(30522, 512, 768, 12)
MINILM = transformer(30522, 512, 384, 6)


def numel(shapes: Shapes) -> int:
    """Elements of all shapes together."""
    return sum(torch.Size(shape).numel() for shape in shapes)


def parameters(shapes: Shapes, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """Parameters with gradients, as large as those of a model in training."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(dtype)) for shape in shapes]
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator) * 1e-3).to(dtype)
    return params
