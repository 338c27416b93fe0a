"""What stored values depend on, as one number: with anything of it changed, they are computed again."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import nn

from pyft.core.loader import load_core
from pyft.freezing.fingerprint import fingerprint
from pyft.freezing.prefix_cache_cut import Cut
from pyft.ops.packed_linear import packing_pays
from pyft.version import __version__

_SCALARS = (type(None), bool, int, float, str)


def prefix_key(model: nn.Module, cut: Cut, dtype: torch.dtype | None, autocast: str) -> str:
    """Hexadecimal SHA-256, 32 digits, over everything but the samples.

    Weights and buffers of the replayed modules, bit for bit, and those that reach them by plain code; the source of
    their classes and their plain attributes; which values are stored; memory layout of the weights; precision;
    versions of torch and pyft; processor and number of threads, which may change the last bits.

    Args:
        dtype: in which values are stored, None as they are computed. autocast: the autocast state in words.
    """
    digest = hashlib.sha256()
    # Products with packed weights and the core's attention have other last bits.
    kernels = f"{packing_pays()} {load_core() is not None}"
    threads = f"{torch.get_num_threads()} {torch.backends.cpu.get_cpu_capability()}"
    _add(digest, __version__, torch.__version__, kernels, threads, str(dtype), autocast, *_floats())
    script = cut.script
    for key in script.needed:
        _add(digest, str(key), str(script.leaf(key)))
    for name, _ in script.ops:
        _add(digest, name)
    _add(digest, *cut.constants)
    for name in sorted({name for name, _ in script.sites}):
        module = model.get_submodule(name)
        for inner_name, inner in module.named_modules():
            _add(digest, f"{name}.{inner_name}", *_description(inner))
        for tensor_name, tensor in _tensors(module):
            _add_tensor(digest, f"{name}.{tensor_name}", tensor)
    named = dict(_tensors(model))
    for name in sorted(cut.origins & named.keys()):
        _add_tensor(digest, name, named[name])
    return digest.hexdigest()[:32]


def autocast_state(device: torch.device) -> str:
    """Whether autocast is on for a device, and to what."""
    on = torch.is_autocast_enabled(device.type)
    return str(torch.get_autocast_dtype(device.type)).removeprefix("torch.") if on else "off"


def _floats() -> Iterator[str]:
    """Settings that change how float32 products are computed."""
    yield torch.get_float32_matmul_precision()
    yield str(torch.backends.mkldnn.enabled)
    yield str(torch.are_deterministic_algorithms_enabled())


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _add_tensor(digest: Any, name: str, tensor: torch.Tensor) -> None:
    found = fingerprint(tensor)
    strides = tensor.stride() if tensor.layout == torch.strided else ()
    _add(digest, name, str(found.shape), found.dtype, found.digest.hex(), str(strides), str(tensor.device.type))


def _description(module: nn.Module) -> Iterator[str]:
    yield _source(type(module))  # type: ignore[arg-type]
    yield str(module.training)
    yield module.extra_repr()
    for name, value in sorted(vars(module).items()):
        if isinstance(value, _SCALARS) or (isinstance(value, tuple | list) and _plain(value)):
            yield f"{name}={value!r}"
        elif name == "config" and callable(getattr(value, "to_dict", None)):
            yield json.dumps(value.to_dict(), sort_keys=True, default=str)
            yield str(getattr(value, "_attn_implementation", None))
        elif callable(value) and not isinstance(value, nn.Module) and name[:1] != "_":
            yield f"{name}={getattr(value, '__qualname__', type(value).__qualname__)}"


def _plain(values: Any) -> bool:
    return all(isinstance(value, _SCALARS) for value in values)


@cache
def _source(kind: type) -> str:
    name = f"{kind.__module__}.{kind.__qualname__}"
    try:
        return name + hashlib.sha256(inspect.getsource(kind).encode()).hexdigest()
    except (OSError, TypeError):
        return name


def _add(digest: Any, *texts: str) -> None:
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
