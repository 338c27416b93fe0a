"""Processes of one gloo group that stay alive between tests, so that a test with several takes milliseconds."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

# A rank that is gone must not hold the others up for the default of half an hour.
TIMEOUT = 30


def _serve(rank: int, world: int, store: str, pipe: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    # A shell's background job ignores it, and so would its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    file = torch.distributed.FileStore(store, world)
    torch.distributed.init_process_group(
        "gloo", store=file, rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT)
    )
    while (work := pipe.recv()) is not None:
        function, arguments = work
        try:
            torch.manual_seed(0)
            pipe.send((True, function(*arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    torch.distributed.destroy_process_group()


class Ranks:
    """`world` spawned processes; calling it runs a function of an importable module in all of them."""

    def __init__(self, world: int, folder: Path) -> None:
        # The server imports what takes seconds, once for all ranks; it runs no threads that a fork could lose.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "pyft.optim"]
        )
        self._pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, str(folder / "store"), theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self.processes.append(process)

    def start(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Begin to run it; its results are asked for by `finish`."""
        for pipe in self._pipes:
            pipe.send((function, arguments))

    def _answer(self, rank: int) -> tuple[bool, Any]:
        return self._pipes[rank].recv() if self._pipes[rank].poll(2 * TIMEOUT) else (False, "it hangs")

    def finish(self, rank: int) -> Any:
        """What the function returned on this rank.

        Raises:
            AssertionError: it raised there, or is not done in time.
        """
        done, result = self._answer(rank)
        assert done, f"rank {rank}: {result}"
        return result

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        self.start(function, *arguments)
        answers = [self._answer(rank) for rank in range(len(self._pipes))]
        for rank, (done, result) in enumerate(answers):
            assert done, f"rank {rank}: {result}"
        return [result for _, result in answers]

    def close(self) -> None:
        """End them all."""
        for pipe in self._pipes:
            if not pipe.closed:
                with contextlib.suppress(OSError):
                    pipe.send(None)
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
