"""The forms of layers that train in part, how a layer becomes one, and plain again. See `pyft.freezing.parts`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyft.freezing.backward_index import conv_index, kept_blocks, token_places
from pyft.freezing.entries import Entries
from pyft.freezing.lean.swap import plain_class
from pyft.freezing.parts import PARTS, SUFFIX, Part, refresh_layer, stamp, watch_steps
from pyft.ops.partial import partial_embedding, partial_linear
from pyft.ops.partial_conv import channels_of_blocks, partial_conv

SAME_ROWS = "_pyft_same_rows"
INDEX = "_pyft_index"


class Partial:
    """Beside a layer: its parts, and weights that are never stale."""

    _parameters: dict[str, Any]

    def _whole(self, name: str) -> Any:
        """The whole parameter with the values of its part in place; it has no gradient."""
        if name not in self._parameters:
            raise AttributeError(name)
        full = self._parameters[name]
        part = self.__dict__.get(PARTS, {}).get(name)
        # While exporting, tensors have no memory; the values were brought up to date by state_dict before.
        if part is not None and full is not None and not torch.compiler.is_compiling():
            part.agree(full, self._parameters[name + SUFFIX])
        return full

    weight = property(lambda self: self._whole("weight"))
    bias = property(lambda self: self._whole("bias"))

    def _values(self, name: str) -> Any:
        """What forward computes with, without gradient for the part."""
        full = self._whole(name)
        record = self.__dict__[PARTS].get(name)
        if record is None or record.view or not torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return full
        # A compiled graph cannot ask what has changed, and writing in it would break a second pass before backward.
        return record.entries.put(full, self._parameters[name + SUFFIX].detach())

    def _composed(self, name: str) -> Any:
        """The same, and the gradient reaches the part through plain indexing: for tensors of one dimension."""
        record = self.__dict__[PARTS].get(name)
        if record is None or self._learning(name) is None:
            return self._parameters[name] if record is None else self._values(name)
        return record.entries.put(self._whole(name).detach(), self._parameters[name + SUFFIX])

    def _learning(self, name: str) -> Any:
        """The part where it takes a gradient now, else None."""
        part = self._parameters.get(name + SUFFIX)
        learns = part is not None and torch.is_grad_enabled() and part.requires_grad
        return part if learns and not torch.compiler.is_exporting() else None

    def _index(self, key: str, device: torch.device) -> Any:
        """An index tensor of the weight's part on `device`."""
        found = self.__dict__[INDEX][key]
        if found is not None and found.device != device:
            found = self.__dict__[INDEX][key] = found.to(device)
        return found

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name in self.__dict__[PARTS]:
            self._whole(name)
        with _without_parts(self):
            super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]

    def _load_from_state_dict(self, *args: Any, **keywords: Any) -> None:
        with _without_parts(self):
            super()._load_from_state_dict(*args, **keywords)  # type: ignore[misc]
        refresh_layer(self)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for name in self.__dict__[PARTS]:
            self._whole(name)
        super()._apply(fn, recurse)  # type: ignore[misc]
        for name, part in self.__dict__[PARTS].items():
            part.lay(self._parameters[name], self._parameters[name + SUFFIX])
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        # A copy or a pickle holds weight and part apart, with version numbers that start again.
        for part in self.__dict__[PARTS].values():
            part.view, part.seen = False, None
        watch_steps()

    def extra_repr(self) -> str:
        """As the layer's own, and what trains of it."""
        parts = [f"{name}: {part.entries} train" for name, part in self.__dict__[PARTS].items()]
        return ", ".join([super().extra_repr(), *parts])  # type: ignore[misc]


class _without_parts:  # noqa: N801 (used as a function)
    """Inside, the layer has the parameters of the plain one."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __enter__(self) -> None:
        self.records = self.layer.__dict__[PARTS]
        self.parts = {name + SUFFIX: self.layer._parameters.pop(name + SUFFIX) for name in self.records}
        self.layer.__dict__[PARTS] = {}

    def __exit__(self, *error: object) -> None:
        self.layer._parameters.update(self.parts)
        self.layer.__dict__[PARTS] = self.records


def _bias(layer: Any) -> tuple[Any, Any]:
    """The bias for the op, and its part where that has the weight's rows, so that one selection serves both."""
    part = layer._learning("bias")
    if part is not None and layer.__dict__[SAME_ROWS]:
        return layer._values("bias"), part
    return layer._composed("bias"), None


class PartialLinear(Partial, nn.Linear):
    """A Linear layer of whose weight or bias a part trains."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`."""
        weight_part = self._learning("weight")
        if weight_part is None:
            return F.linear(input, self._values("weight"), self._composed("bias"))
        device = input.device
        bias, bias_part = _bias(self)
        return partial_linear(
            input,
            self._values("weight"),
            bias,
            weight_part,
            bias_part,
            rows=self._index("rows", device),
            row_start=self.__dict__[INDEX]["row_start"],
            columns=self._index("channels", device),
            blocks=self._index("blocks", device),
            block_size=self.__dict__[INDEX]["block_size"],
        )


class PartialConv(Partial):
    """A convolution of whose weight or bias a part trains."""

    def _conv_forward(self, input: Tensor, weight: Any, bias: Any) -> Tensor:
        # nn.Conv's forward hands over self.weight and self.bias: values without a gradient.
        layer: Any = self
        weight_part = self._learning("weight")
        if weight_part is None:
            return super()._conv_forward(input, self._values("weight"), self._composed("bias"))  # type: ignore[misc]
        dims = len(layer.kernel_size)
        padding = layer.padding
        if layer.padding_mode != "zeros" or padding == "same":
            mode = layer.padding_mode if layer.padding_mode != "zeros" else "constant"
            input = F.pad(input, layer._reversed_padding_repeated_twice, mode=mode)
            padding = (0,) * dims
        padding = (0,) * dims if padding == "valid" else padding
        lone = input.ndim == dims + 1
        device = input.device
        bias, bias_part = _bias(self)
        output = partial_conv(
            input.unsqueeze(0) if lone else input,
            self._values("weight"),
            bias,
            weight_part,
            bias_part,
            rows=self._index("rows", device),
            row_start=self.__dict__[INDEX]["row_start"],
            channels=self._index("channels", device),
            real=self._index("real", device),
            part_groups=self.__dict__[INDEX]["groups"],
            blocks=self.__dict__[INDEX]["block_places"],
            block_channels=self._index("block_channels", device),
            block_size=self.__dict__[INDEX]["block_size"],
            stride=layer.stride,
            padding=padding,
            dilation=layer.dilation,
            groups=layer.groups,
        )
        return output.squeeze(0) if lone else output


class PartialConv1d(PartialConv, nn.Conv1d):
    """A Conv1d of whose weight or bias a part trains."""


class PartialConv2d(PartialConv, nn.Conv2d):
    """A Conv2d of whose weight or bias a part trains."""


class PartialConv3d(PartialConv, nn.Conv3d):
    """A Conv3d of whose weight or bias a part trains."""


class PartialEmbedding(Partial, nn.Embedding):
    """An Embedding of whose tokens, or columns, a part trains."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Embedding`."""
        weight_part = self._learning("weight")
        if weight_part is None:
            return F.embedding(input, self._values("weight"), self.padding_idx)
        places, columns = self._index("places", input.device), self._index("channels", input.device)
        return partial_embedding(self._values("weight"), input, weight_part, places, columns, self.scale_grad_by_freq)


class PartialLayerNorm(Partial, nn.LayerNorm):
    """A LayerNorm of whose weight or bias a part trains."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.LayerNorm`."""
        return F.layer_norm(input, self.normalized_shape, self._composed("weight"), self._composed("bias"), self.eps)


class PartialRMSNorm(Partial, nn.RMSNorm):
    """An RMSNorm of whose weight a part trains."""

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.RMSNorm`."""
        return F.rms_norm(x, self.normalized_shape, self._composed("weight"), self.eps)


class PartialGroupNorm(Partial, nn.GroupNorm):
    """A GroupNorm of whose weight or bias a part trains."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.GroupNorm`."""
        return F.group_norm(input, self.num_groups, self._composed("weight"), self._composed("bias"), self.eps)


class PartialBatchNorm(Partial):
    """A BatchNorm of whose weight or bias a part trains. Its statistics are those of a BatchNorm that trains."""

    def forward(self, input: Tensor) -> Tensor:
        """As the layer's own."""
        layer: Any = self
        layer._check_input_dim(input)
        momentum = 0.0 if layer.momentum is None else layer.momentum
        if layer.training and layer.track_running_stats and layer.num_batches_tracked is not None:
            layer.num_batches_tracked.add_(1)
            if layer.momentum is None:
                momentum = 1.0 / float(layer.num_batches_tracked)
        own = layer.running_mean is not None or layer.running_var is not None
        tracked = not layer.training or layer.track_running_stats
        return F.batch_norm(
            input,
            layer.running_mean if tracked else None,
            layer.running_var if tracked else None,
            self._composed("weight"),
            self._composed("bias"),
            layer.training or not own,
            momentum,
            layer.eps,
        )


class PartialBatchNorm1d(PartialBatchNorm, nn.BatchNorm1d):
    """A BatchNorm1d of whose weight or bias a part trains."""


class PartialBatchNorm2d(PartialBatchNorm, nn.BatchNorm2d):
    """A BatchNorm2d of whose weight or bias a part trains."""


class PartialBatchNorm3d(PartialBatchNorm, nn.BatchNorm3d):
    """A BatchNorm3d of whose weight or bias a part trains."""


FORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: PartialLinear,
    nn.Conv1d: PartialConv1d,
    nn.Conv2d: PartialConv2d,
    nn.Conv3d: PartialConv3d,
    nn.Embedding: PartialEmbedding,
    nn.LayerNorm: PartialLayerNorm,
    nn.RMSNorm: PartialRMSNorm,
    nn.GroupNorm: PartialGroupNorm,
    nn.BatchNorm1d: PartialBatchNorm1d,
    nn.BatchNorm2d: PartialBatchNorm2d,
    nn.BatchNorm3d: PartialBatchNorm3d,
}
PLAIN = {form: plain for plain, form in FORMS.items()}


def refusal(module: nn.Module, key: str, entries: Entries) -> str | None:
    """Why this parameter of this module cannot train in part; None where it can."""
    own = plain_class(type(module))
    plain = PLAIN.get(own, own)
    kind = own.__name__
    if plain not in FORMS:
        names = ", ".join(form.__name__ for form in FORMS)
        return f"it belongs to a {kind}, and parts can be trained of exactly {names}"
    if key not in ("weight", "bias"):
        return f"it is the '{key}' of a {kind}, and parts can be trained of weight and bias"
    if "forward" in module.__dict__:
        return "the forward method of its module has been replaced"
    parameter = module._parameters[key]
    assert parameter is not None
    if parameter.is_inference():
        return "it was made under torch.inference_mode"
    if not (parameter.is_floating_point() and parameter.layout == torch.strided):
        return f"it is {parameter.dtype}, {parameter.layout}"
    if isinstance(module, nn.Embedding):
        if module.sparse:
            return "its Embedding has sparse=True: make it with sparse=False, the part's gradient is small by itself"
        if module.max_norm is not None:
            return "its Embedding has max_norm, which rewrites rows that are to stay frozen: make it with max_norm=None"
        if entries.blocks is not None:
            return "blocks of an Embedding are not possible: give rows= and columns="
    if entries.blocks is not None and getattr(module, "groups", 1) != 1:
        return "blocks need a convolution with groups=1: give rows= and columns="
    return None


def attach(holders: Iterable[tuple[nn.Module, str]], entries: Entries) -> None:
    """Let only `entries` of one parameter train: `holders` are all (module, key) that hold it, none of them refused."""
    holders = list(holders)
    full: Any = holders[0][0]._parameters[holders[0][1]]
    full.requires_grad_(False)
    full.grad = None
    part = Part(entries)
    start = entries.run
    values = None if start is None else full.detach().narrow(0, start, entries.part_shape[0])
    part.view = values is not None and _is_dense(values)
    parameter = nn.Parameter(values if part.view and values is not None else entries.take(full.detach()))
    part.seen = stamp(full, parameter)
    if not part.view:
        watch_steps()
    for module, key in holders:
        module._parameters[key + SUFFIX] = parameter
        module.__dict__.setdefault(PARTS, {})[key] = part
        if type(module) in FORMS:
            module.__class__ = FORMS[type(module)]
        _note_indices(module)


def detach(module: nn.Module, key: str) -> None:
    """Make one parameter of a layer plain again, with the values of its part. It stays without gradient."""
    layer: Any = module
    layer._whole(key)
    del module.__dict__[PARTS][key]
    del module._parameters[key + SUFFIX]
    if module.__dict__[PARTS]:
        _note_indices(module)
        return
    for name in (PARTS, SAME_ROWS, INDEX):
        module.__dict__.pop(name, None)
    module.__class__ = PLAIN[type(module)]


def _note_indices(module: nn.Module) -> None:
    """What forward needs to know of the parts of a layer."""
    parts = module.__dict__[PARTS]
    weight, bias = parts.get("weight"), parts.get("bias")
    rows = None if weight is None or weight.entries.blocks is not None else weight.entries.rows
    module.__dict__[SAME_ROWS] = rows is not None and bias is not None and torch.equal(rows, bias.entries.rows)
    module.__dict__.pop(INDEX, None)
    if weight is not None:
        entries = weight.entries
        padding_idx = module.padding_idx if isinstance(module, nn.Embedding) else None
        places = token_places(entries, padding_idx) if isinstance(module, nn.Embedding) else None
        index = vars(conv_index(entries, getattr(module, "groups", 1)))
        blocks = kept_blocks(entries)
        block_places = None if blocks is None else blocks.flatten().tolist()
        module.__dict__[INDEX] = {
            **index,
            "blocks": blocks,
            "block_size": entries.block_size,
            "block_places": block_places,
            "block_channels": None if block_places is None else channels_of_blocks(block_places, entries.block_size[1]),
            "places": places,
        }


def _is_dense(values: Tensor) -> bool:
    """Whether a view leaves no gaps in memory, as optimizers like it."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    formatted = values.ndim in formats and values.is_contiguous(memory_format=formats[values.ndim])
    return values.is_contiguous() or formatted
