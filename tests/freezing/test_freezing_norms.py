"""The note on pretrained BatchNorm layers that a run would train on few samples."""

from __future__ import annotations

import torch
from torch import nn

from pyft.freezing.norms import batch_norm_note, globs_of, pretrained_batch_norms
from pyft.freezing.plan import freeze


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.downsample = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))


def net(seen: bool = True) -> nn.Sequential:
    model = nn.Sequential(Block(), Block(), nn.BatchNorm2d(3, track_running_stats=False), nn.LayerNorm(3))
    for module in model.modules():
        if seen and isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.fill_(0.1)
    return model


def test_only_layers_that_have_seen_data() -> None:
    assert pretrained_batch_norms(net(seen=False)) == []
    assert pretrained_batch_norms(net()) == ["0.bn1", "0.downsample.1", "1.bn1", "1.downsample.1"]
    assert batch_norm_note(net(seen=False), (), 100, 32) is None


def test_what_the_note_says_silences_it() -> None:
    model = net()
    note = batch_norm_note(model, (), 100, 32)
    assert note is not None
    assert note.startswith("4 pretrained BatchNorm layers")
    assert "batches of 32" in note
    assert note.endswith("freeze=['*bn1', '*downsample.1']")
    plan = freeze(model, ["*bn1", "*downsample.1"])
    assert len(plan.frozen) == 8
    assert batch_norm_note(model, plan.eval_modules, 100, 32) is None
    assert batch_norm_note(model, (), 1_000_000, 32) is None


def test_no_globs_that_name_anything_else() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    model[1].running_mean = torch.ones(3)
    assert globs_of(model, ["1"]) == ["*1"]
    # "*0" would name the tenth layer, too.
    wide = nn.Sequential(nn.BatchNorm1d(3), *[nn.Linear(3, 3) for _ in range(12)])
    wide[0].running_mean = torch.ones(3)
    assert globs_of(wide, ["0"]) == []
    note = batch_norm_note(wide, (), 100, 8)
    assert note is not None
    assert note.endswith("name them in freeze=")
