"""What a run writes down for its report: what it took, and the held-out samples that the model is worst on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from pyft.core.memory import peak_memory
from pyft.data.preview import preview
from pyft.errors import DataError
from pyft.evaluation.held_out import HeldOut
from pyft.report.facts import read_run
from pyft.report.page import render
from pyft.run_dir import RunDir
from pyft.samples import Samples

if TYPE_CHECKING:
    from pyft.freezing.plan import FreezePlan
    from pyft.training.history import History


def held_out_facts(kept: HeldOut, samples: Samples, role: str) -> dict[str, Any]:
    """held_out.json: what was kept of the scores, with the worst samples as they look.

    Args:
        kept: has seen every batch of `samples`.
        role: "test" or "val".
    """
    facts = kept.to_dict()
    for one in facts["worst"]:
        try:
            one.update(preview(samples, one["index"]))
        except DataError as error:  # a picture that was there when it was scored
            one["text"] = str(error)
    return {"role": role, "name": samples.name, **facts}


def add_plans(history: History, plans: Mapping[str, FreezePlan]) -> None:
    """Say of each stage how much of the model it trained; a stage of before an interruption has no plan any more."""
    for stage in history.stages:
        plan = plans.get(stage["name"])
        if plan is not None:
            stage.update(num_trainable=plan.num_trainable, num_total=plan.num_total)


def write_cost(
    run: RunDir, history: History, predicted: Mapping[str, Any] | None, before: int | None, device: torch.device
) -> None:
    """cost.json: stages and memory, and what `pyft.plan` had said of them.

    Args:
        predicted: see `pyft.plan.recalled`.
        before: bytes that the process held when the run began.
    """
    # The kernel counts the two apart, and not quite alike: a run that needed nothing would peak below its beginning.
    peak = max((held for held in (before, peak_memory()) if held is not None), default=None)
    memory = {"before": before, "peak": peak}
    if device.type == "cuda":
        memory["device_peak"] = torch.cuda.max_memory_allocated(device)
    run.write("cost.json", {"stages": history.stages, "memory": memory, "predicted": predicted})


def write_page(run: RunDir) -> None:
    """report.html, from the files of the run."""
    run.write("report.html", render(read_run(run.path)))
