"""Weights stored once, large ones in a file beside the model, and files that are whole or not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

onnx = pytest.importorskip("onnx", reason="pip install 'pyft[onnx]'")
runtime = pytest.importorskip("onnxruntime", reason="pip install 'pyft[onnx]'")
pytest.importorskip("onnxscript", reason="pip install 'pyft[onnx]'")

from pyft.errors import ExportError  # noqa: E402
from pyft.export.onnx import export_module  # noqa: E402
from pyft.export.run import OnnxModel  # noqa: E402

VOCABULARY, WIDTH = 60, 16


class Tied(nn.Module):
    """An output layer that is the embedding, and one that is not."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids):
        return self.head(self.embed(input_ids).mean(1))


def large_weights(path: Path) -> list[bytes]:
    """The bytes of each weight of the file of 1 KB and more."""
    return [t.raw_data for t in onnx.load(path).graph.initializer if len(t.raw_data) >= 1024]


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_stored_once(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied(tied).eval()
    ids = torch.randint(0, VOCABULARY, (3, 5))
    path = export_module(model, {"input_ids": ids}, tmp_path / "m.onnx")
    stored = large_weights(path)
    assert len(stored) == (1 if tied else 2)
    assert model.embed.weight.detach().numpy().tobytes() in stored
    one = VOCABULARY * WIDTH * 4
    assert path.stat().st_size < (1.6 if tied else 2.6) * one
    np.testing.assert_allclose(OnnxModel(path)({"input_ids": ids}), model(ids).detach().numpy(), atol=1e-6)


def test_large_weights_go_to_a_file_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 3)).eval()
    x = torch.randn(2, 40)
    whole = export_module(model, x, tmp_path / "whole.onnx", classes=["a", "b", "c"])
    monkeypatch.setattr("pyft.export.onnx_file.MAX_BYTES", 4000)
    path = export_module(model, x, tmp_path / "m.onnx", classes=["a", "b", "c"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data", "whole.onnx"]
    proto = onnx.load(path, load_external_data=False)
    [outside] = [t for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    entry = {item.key: item.value for item in outside.external_data}
    assert (outside.name, entry["location"], entry["length"]) == ("0.weight", "m.onnx.data", str(40 * 50 * 4))
    assert int(entry["offset"]) % 4096 == 0
    data = (tmp_path / "m.onnx.data").read_bytes()
    assert data[int(entry["offset"]) :][: 40 * 50 * 4] == model[0].weight.detach().numpy().tobytes()
    assert len(path.read_bytes()) < 4000 + 2000
    onnx.checker.check_model(str(path), full_check=True)
    np.testing.assert_array_equal(OnnxModel(path)(x), OnnxModel(whole)(x))
    # Both move together, and the model does not run without its weights.
    (tmp_path / "there").mkdir()
    moved = path.rename(tmp_path / "there" / "m.onnx")
    with pytest.raises(ExportError, match="cannot be opened"):
        OnnxModel(moved)


def test_a_failure_leaves_the_files_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyft.export.onnx_file.MAX_BYTES", 4000)
    for name in ("m.onnx", "m.onnx.data"):
        (tmp_path / name).write_bytes(b"before")

    def refuse(proto: object) -> None:
        raise ExportError("not valid")

    monkeypatch.setattr("pyft.export.onnx_file.check", refuse)
    with pytest.raises(ExportError, match="not valid"):
        export_module(nn.Linear(40, 50), torch.randn(2, 40), tmp_path / "m.onnx")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"m.onnx": b"before", "m.onnx.data": b"before"}
