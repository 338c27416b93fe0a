"""From a ModelProto to a file that holds every weight once, is valid, and appears whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pyft.core.files import sync_directory, write_atomic
from pyft.errors import ExportError, need
from pyft.export.graph import graphs
from pyft.export.run import OnnxModel, first_line

MAX_BYTES = 2**31 - 2**20
"""A protobuf message holds less than 2 GiB; weights beyond that go to a file beside it."""

LARGE = 1024
"""Bytes of a tensor from which on it is worth being stored once, or in the file of weights."""

ALIGNMENT = 4096
"""Of each weight in the file of weights, so that a runtime can map it into memory."""


class OnnxFile:
    """A checked ModelProto as it will be on disk, not yet in its place.

    Args:
        proto: is emptied of its weights where they need a file of their own.
        path: where it is to go.

    Attributes:
        model: the file, opened in onnxruntime.

    Raises:
        ExportError: it is not valid ONNX, or onnxruntime cannot open it.
    """

    def __init__(self, proto: Any, path: Path) -> None:
        self.path = path
        self.folder: Path | None = None
        self.content = b""
        if _size(proto) <= MAX_BYTES:
            check(proto)
            self.content = proto.SerializeToString(deterministic=True)
            self.model = OnnxModel(self.content)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            with open(self.folder / weights_name(path), "wb") as file:
                move_weights(proto, file, weights_name(path))
                _synced(file)
            with open(self.folder / path.name, "wb") as file:
                file.write(proto.SerializeToString(deterministic=True))
                _synced(file)
            check(str(self.folder / path.name))
            self.model = OnnxModel(self.folder / path.name)
        except BaseException:
            self.discard()
            raise

    def put(self) -> Path:
        """Put it in its place: each file whole or not at all, the weights first."""
        if self.folder is None:
            return write_atomic(self.path, lambda file: file.write(self.content))
        umask = os.umask(0)
        os.umask(umask)
        for name in (weights_name(self.path), self.path.name):
            os.chmod(self.folder / name, 0o666 & ~umask)
            os.replace(self.folder / name, self.path.with_name(name))
        sync_directory(self.path.parent)
        self.discard()
        return self.path

    def discard(self) -> None:
        """Remove what is not in its place."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def weights_name(path: Path) -> str:
    """Name of the file that holds the weights of a model of 2 GiB and more: model.onnx.data."""
    return f"{path.name}.data"


def check(proto: Any) -> None:
    """`onnx.checker` with shape inference, on a ModelProto, or on a path where weights are in a file of their own.

    Raises:
        ExportError: it is not valid.
    """
    try:
        need("onnx.checker", "onnx", "exporting to ONNX").check_model(proto, full_check=True)
    except Exception as error:
        raise ExportError(f"the exported graph is not valid ONNX: {first_line(error)}") from error


def move_weights(proto: Any, file: BinaryIO, name: str) -> None:
    """Write large weights to `file` and leave their places in it, relative to the model, in the proto."""
    helper = need("onnx.external_data_helper", "onnx", "exporting to ONNX")
    for tensor in proto.graph.initializer:
        content = _bytes_of(tensor)
        if len(content) < LARGE:
            continue
        file.write(b"\0" * (-file.tell() % ALIGNMENT))
        offset = file.tell()
        file.write(content)
        tensor.raw_data = b""
        helper.set_external_data(tensor, name, offset, len(content))
        for field in ("raw_data", "float_data", "int32_data", "int64_data", "double_data"):
            tensor.ClearField(field)


def store_once(proto: Any) -> None:
    """Keep one copy of weights that are the same, also of one that the exporter has transposed.

    A tied embedding is otherwise stored a second time for the output layer.
    """
    helper = need("onnx.helper", "onnx", "exporting to ONNX")
    seen: dict[tuple[Any, ...], str] = {}
    kept, same, turned = [], {}, {}
    for tensor in proto.graph.initializer:
        array = _large_array(tensor)
        if array is None:
            kept.append(tensor)
            continue
        mirror = seen.get(_digest(array.T)) if array.ndim == 2 else None
        first = seen.setdefault(_digest(array), tensor.name)
        if first != tensor.name:
            same[tensor.name] = first
        elif mirror is not None:
            turned[tensor.name] = mirror
        else:
            kept.append(tensor)
    for graph in graphs(proto.graph) if same else ():
        for node in graph.node:
            node.input[:] = [same.get(name, name) for name in node.input]
    if same or turned:
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(kept)
    for name, first in turned.items():
        proto.graph.node.insert(0, helper.make_node("Transpose", [first], [name], name=f"{name}/turned", perm=[1, 0]))


def _large_array(tensor: Any) -> NDArray[Any] | None:
    """A weight worth storing once, or None."""
    if tensor.data_type == need("onnx", "onnx", "exporting to ONNX").TensorProto.STRING:
        return None
    array = need("onnx.numpy_helper", "onnx", "exporting to ONNX").to_array(tensor)
    return None if array.nbytes < LARGE else array


def _digest(array: NDArray[Any]) -> tuple[Any, ...]:
    return array.shape, str(array.dtype), hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).digest()


def _bytes_of(tensor: Any) -> bytes:
    onnx = need("onnx", "onnx", "exporting to ONNX")
    if tensor.data_type == onnx.TensorProto.STRING:
        return b""
    return tensor.raw_data or onnx.numpy_helper.to_array(tensor).tobytes()


def _size(proto: Any) -> int:
    """Bytes of the message; counted from the weights where protobuf cannot say it."""
    weights = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    return weights if weights > MAX_BYTES else proto.ByteSize()


def _synced(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
