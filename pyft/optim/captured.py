"""Steps that were captured in CUDA graphs: kept as long as the optimizer, with hyperparameters that can be renewed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyft.optim.device_plan import DevicePlan, is_capturing


class CapturedSteps:
    """The part of an optimizer that knows of graphs."""

    settings: Any
    _captured: list[DevicePlan]
    _group_steps: Callable[[], Any]

    def _note_capture(self, plan: DevicePlan) -> None:
        """Keep a plan whose memory a graph reads, whatever plan the next step needs."""
        if plan.captured_clip is not None and not any(plan is other for other in self._captured):
            self._captured.append(plan)

    def refresh_graph(self) -> None:
        """Give captured steps the hyperparameters that the parameter groups have now.

        A captured step reads lr, betas, eps, momentum, weight decay and the other numbers of each group from a table on
        the GPU. This writes that table, on the current stream and outside of the graph; replays after it take the new
        numbers: `scheduler.step(); optimizer.refresh_graph(); graph.replay()`. Nothing waits, and nothing is copied
        where nothing has changed. A learning rate that is a float32 tensor on the parameters' GPU is read by every
        replay without this. Clipping and the choice of a rule (momentum or none, nesterov, amsgrad) are in the graph
        itself.

        Raises:
            RuntimeError: no step was captured; a graph is captured right now; what has changed is part of the graph; or
                the graph brings its numbers itself, since no step with the same numbers came before the capture.
        """
        if is_capturing():
            raise RuntimeError("refresh_graph is for between replays, and a CUDA graph is captured: call it outside")
        if not self._captured:
            raise RuntimeError("refresh_graph: no step of this optimizer on a GPU was captured in a CUDA graph")
        groups = self._group_steps()
        for plan in self._captured:
            plan.refresh(groups, self.settings)
