"""Streaming kernels of 4 reads and 3 writes, compiled for the bench that compares the update with them."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

# Chunk, places of a chunk that are worked on in turn, elements at each place.
VARIANTS = {
    "stream 16 K": (16384, 1, 0),
    "stream 128 K": (131072, 1, 0),
    "stream 128 K, 2 x 256": (131072, 2, 256),
    "stream 128 K, 4 x 256": (131072, 4, 256),
    "stream 256 K, 2 x 256": (262144, 2, 256),
}


@functools.cache
def _library() -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    target = Path(tempfile.mkdtemp(prefix="pyft-bench-"), "stream.so")
    source = Path(__file__).with_name("stream.cpp")
    flags = ["-std=c++20", "-O3", "-fPIC", "-shared", "-pthread"]
    subprocess.run([compiler, *flags, str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def fastest_stream(elements: int, threads: int) -> dict[str, Callable[[], object]]:
    """Calls of all variants by name, over four arrays of so many fp32 elements; the caller takes the fastest."""
    arrays = [torch.full((elements,), 1e-3) for _ in range(4)]
    library = _library()

    def call(chunk: int, streams: int, block: int) -> Callable[[], object]:
        pointers = [ctypes.c_void_p(array.data_ptr()) for array in arrays]
        sizes = (ctypes.c_int64(elements), threads, ctypes.c_int64(chunk), streams, ctypes.c_int64(block))
        # The arrays live as long as the call.
        return lambda keep=arrays: library.stream(*pointers, *sizes)

    return {name: call(*variant) for name, variant in VARIANTS.items()}
