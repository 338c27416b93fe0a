"""The processes that train one model together: what they tell each other, and how they end together."""

from __future__ import annotations

import base64
import contextlib
import os
import pickle
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from pyft.errors import ConfigError, PyftError

T = TypeVar("T")

LOOK_EVERY = timedelta(seconds=1)
"""Who waits for the others looks this often whether one of them has failed."""
LONGEST_WAIT = timedelta(hours=6)
"""For what one process does alone, as the proof of a large exported file. One that is gone is noticed at once."""

_joins = 0


def several_processes() -> bool:
    """Whether this is one of several: of an initialised torch.distributed, or of those that torchrun started."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size() > 1
    count = os.environ.get("WORLD_SIZE", "1")
    return count.isdigit() and int(count) > 1


def speaks() -> bool:
    """Whether this process prints: the first of several, or the only one."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    return not several_processes() or os.environ.get("RANK", "0") == "0"


def local_gpu() -> torch.device:
    """The GPU of this process: "cuda" alone, cuda:LOCAL_RANK of several.

    Raises:
        ConfigError: more processes on this machine than GPUs.
    """
    if not several_processes():
        return torch.device("cuda")
    gpus = torch.cuda.device_count()
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    place = int(os.environ.get("LOCAL_RANK", rank % max(gpus, 1)))
    processes = max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), place + 1)
    if processes > gpus:
        raise ConfigError(
            f"device='cuda': {processes} processes on a machine with {gpus} GPUs, of which each needs one: "
            f"start torchrun with --nproc-per-node {max(gpus, 1)}, or give device='cpu'"
        )
    return torch.device("cuda", place)


class ProcessLostError(PyftError, RuntimeError):
    """Another of the processes that train together has ended without a word."""


class Processes:
    """This process among those that train together; alone, every method is the plain thing.

    Objects are sent pickled, as torch.distributed sends them: the processes of a job trust each other.

    Args:
        rank: of this process, from 0.
        count: of processes.
        gradients: backend that adds up gradients: "gloo", "nccl".

    Attributes:
        first: whether this one writes and prints.
        gradients: the process group of DistributedDataParallel; None alone.
        on_this_machine: how many share its memory.
    """

    def __init__(self, rank: int = 0, count: int = 1, gradients: str = "gloo") -> None:
        self.rank, self.count, self.first = rank, count, rank == 0
        self.gradients: Any = None
        self.on_this_machine = min(int(os.environ.get("LOCAL_WORLD_SIZE", count)), count)
        self._told: Any = None
        self._wrapped: list[Any] = []
        if count == 1:
            return
        global _joins
        _joins += 1
        self._key = f"pyft/{_joins}/failed"
        self._store = distributed.distributed_c10d._get_default_store()
        self._told = distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
        self.gradients = distributed.new_group(backend=gradients)

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return self.count > 1

    # What one does for all, and what all do

    def on_first(self, work: Callable[[], T]) -> T:
        """What `work` gives in the first process; all get it, or the error that it raises."""
        if not self.several:
            return work()
        answer: tuple[bool, Any] = (True, None)
        if self.first:
            answer = _tried(work)
        good, value = self.of_first(answer)
        if not good:
            # The first process keeps its own traceback.
            raise answer[1] if self.first else value
        return answer[1] if self.first else value

    def together(self, work: Callable[[], T]) -> T:
        """What `work` gives in this process, once all have done it; where one fails, all raise its error."""
        if not self.several:
            return work()
        good, value = _tried(work)
        self.raise_first(None if good else value)
        return value

    def raise_first(self, error: BaseException | None) -> None:
        """Every process tells its error, or None; all raise that of the lowest rank."""
        if not self.several:
            if error is not None:
                raise error
            return
        self.raise_any(self.all_gather(error))

    def raise_any(self, values: Sequence[Any]) -> None:
        """Raise the first error among the values of all processes, given in the order of ranks."""
        for rank, value in enumerate(values):
            if isinstance(value, BaseException):
                raise self._of(value, rank)

    # What they send

    def of_first(self, value: T) -> T:
        """The first process's value, in all."""
        if not self.several:
            return value
        data = _packed(value) if self.first else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([len(data)])
        self._broadcast(size)
        if not self.first:
            data = torch.empty(int(size), dtype=torch.uint8)
        self._broadcast(data)
        return value if self.first else pickle.loads(data.numpy().tobytes())

    def all_gather(self, value: T) -> list[T]:
        """The values of all processes, in all, in the order of ranks."""
        if not self.several:
            return [value]
        data = _packed(value)
        sizes = self._gathered(torch.tensor([len(data)]))
        longest = int(max(sizes))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = data
        everyone = self._gathered(padded)
        return [
            value if rank == self.rank else pickle.loads(one[: int(size)].numpy().tobytes())
            for rank, (one, size) in enumerate(zip(everyone, sizes, strict=True))
        ]

    def gather(self, value: T) -> list[T] | None:
        """The values of all processes, in the order of ranks, in the first; None in the others."""
        if not self.several:
            return [value]
        data = _packed(value)
        sizes = self._gathered(torch.tensor([len(data)]))
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
        padded[: len(data)] = data
        parts = [torch.empty_like(padded) for _ in sizes] if self.first else None
        self._wait(distributed.gather(padded, parts, dst=0, group=self._told, async_op=True))
        if parts is None:
            return None
        return [
            value if rank == 0 else pickle.loads(part[: int(size)].numpy().tobytes())
            for rank, (part, size) in enumerate(zip(parts, sizes, strict=True))
        ]

    def add(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, in float64."""
        if not self.several:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        self._wait(distributed.all_reduce(sums, group=self._told, async_op=True))
        return sums.tolist()

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        return self.add([float(flag)])[0] > 0 if self.several else flag

    def all(self, flag: bool) -> bool:
        """Whether it is true in every process."""
        return not self.any(not flag)

    def share(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give all processes the values of the first, in place."""
        if not self.several:
            return
        with torch.no_grad():
            for tensor in tensors:
                flat = tensor.detach().to("cpu").contiguous().reshape(-1)
                self._broadcast(flat.view(torch.uint8))
                if not self.first:
                    tensor.copy_(flat.view(tensor.shape))

    def _broadcast(self, tensor: torch.Tensor) -> None:
        if tensor.numel():
            self._wait(distributed.broadcast(tensor, src=0, group=self._told, async_op=True))

    def _gathered(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        self._wait(distributed.all_gather(parts, tensor, group=self._told, async_op=True))
        return parts

    def _wait(self, work: Any) -> None:
        """Wait for the others, unless one of them has failed."""
        while True:
            over = work.is_completed()
            try:
                work.wait(LOOK_EVERY)
                return
            except RuntimeError:
                # One that was over before the wait has not just run out of time.
                if over:
                    raise self._gone() from None
                failure = None if work.is_completed() else self._failure()
                if failure is not None:
                    raise failure from None

    # How they end

    def keep(self, wrapped: Any) -> Any:
        """A DistributedDataParallel that is let go of when this process fails, so that the others are not kept."""
        self._wrapped.append(wrapped)
        return wrapped

    def let_go(self) -> None:
        """Undo what `keep` was given: gradients are not averaged any more."""
        for wrapped in self._wrapped:
            # Its hooks hold the group, and a group that is held keeps the connection, on which the others wait.
            with contextlib.suppress(AttributeError, RuntimeError):
                wrapped._remove_autograd_hooks()
            wrapped.reducer = wrapped.logger = wrapped.process_group = None
        self._wrapped.clear()

    def fail(self, error: BaseException) -> BaseException:
        """Tell the others that this process has failed, and with what; returns the error that it is to raise."""
        plain = isinstance(error, RuntimeError) and not isinstance(error, PyftError)
        lost = isinstance(error, ProcessLostError) or (plain and _says_lost(error))
        first = self._failure() if plain or lost else None
        if first is not None or lost:
            return first or self._gone()
        record = base64.b64encode(pickle.dumps((self.rank, _sendable(error)))).decode()
        with contextlib.suppress(Exception):
            self._store.compare_set(self._key, "", record)
        return error

    def _failure(self) -> BaseException | None:
        """The first error that another process has told of."""
        try:
            if not self._store.check([self._key]):
                return None
            rank, error = pickle.loads(base64.b64decode(self._store.get(self._key)))
        except Exception:  # the process with the store is gone, too
            return None
        return None if rank == self.rank else self._of(error, rank)

    def _gone(self) -> BaseException:
        return self._failure() or ProcessLostError(
            f"one of {self.count} processes that train together is gone (killed, or out of memory), so the others "
            "ended; what the run has written is kept: start all of them again with its folder as out to go on"
        )

    def _of(self, error: BaseException, rank: int) -> BaseException:
        """The error of a process; the name of one that is not the first is said."""
        if rank == 0 or isinstance(error, KeyboardInterrupt):
            return error
        if len(error.args) == 1 and isinstance(error.args[0], str):
            error.args = (f"{error.args[0]} (in process {rank} of {self.count}, counted from 0)",)
        return error

    def close(self, own: bool) -> None:
        """Leave the groups; `own`: torch.distributed as well."""
        groups, self.gradients, self._told = [self.gradients, self._told], None, None
        self.let_go()
        with contextlib.suppress(Exception):
            if own:
                distributed.destroy_process_group()
            else:
                for group in groups:
                    distributed.destroy_process_group(group)


ALONE = Processes()


@contextlib.contextmanager
def joined(device: Any) -> Iterator[Processes]:
    """This process among those that train together, with the same errors in all; `ALONE` where it is the only one.

    torch.distributed is used as it is where it is initialised; else it is initialised from the environment, with
    gloo for the CPU and nccl for GPUs, and left again at the end.

    Args:
        device: the keyword of `finetune`.

    Raises:
        ConfigError: the environment is not that of torchrun, or two processes would share a GPU under nccl.
    """
    if not several_processes():
        yield ALONE
        return
    chosen = _own_device(device)
    own = not distributed.is_initialized()
    if own:
        _check_environment()
        distributed.init_process_group("gloo")
    # A group of gloo alone is somebody's choice, for GPUs as well.
    gloo = not own and distributed.get_backend() == "gloo"
    backend = "gloo" if gloo else distributed.get_default_backend_for_device(chosen.type)
    with torch.cuda.device(chosen) if chosen.type == "cuda" else contextlib.nullcontext():
        processes = Processes(distributed.get_rank(), distributed.get_world_size(), backend)
        try:
            _check_gpus(processes, chosen, backend)
            yield processes
            processes.any(False)
        except BaseException as error:
            told = processes.fail(error)
            told.of_all_processes = True  # type: ignore[attr-defined]
            if told is error:
                raise
            raise told from error
        finally:
            processes.close(own)


def _own_device(device: Any) -> torch.device:
    if device in ("auto", "cuda"):
        return local_gpu() if torch.cuda.is_available() else torch.device("cpu")
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        return torch.device("cpu")  # `finetune` says what is wrong with it


def _check_environment() -> None:
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} in the environment, but no {', '.join(missing)}: start several "
            "processes with torchrun, or unset WORLD_SIZE to run in one"
        )


def _check_gpus(processes: Processes, device: torch.device, backend: str) -> None:
    where = processes.all_gather((socket.gethostname(), str(device)))
    if backend == "nccl" and len(set(where)) < len(where):
        raise ConfigError(
            f"device={str(device)!r}: several processes of a machine with the same GPU, which nccl does not do: "
            "give device='cuda', each then takes that of its LOCAL_RANK"
        )


def _tried(work: Callable[[], T]) -> tuple[bool, Any]:
    try:
        return True, work()
    except Exception as error:
        return False, error


def _packed(value: Any) -> torch.Tensor:
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], BaseException):
        value = (value[0], _sendable(value[1]))
    elif isinstance(value, BaseException):
        value = _sendable(value)
    return torch.frombuffer(bytearray(pickle.dumps(value, protocol=5)), dtype=torch.uint8)


def _sendable(error: BaseException) -> BaseException:
    """The error without its traceback; as a PyftError where it cannot be pickled."""
    with contextlib.suppress(Exception):
        again = pickle.loads(pickle.dumps(error))
        if type(again) is type(error):
            return again
    return PyftError(f"{type(error).__name__}: {error}")


def _says_lost(error: BaseException) -> bool:
    words = ("closed by peer", "gloo", "NCCL", "Broken pipe", "Connection reset", "Socket", "process group")
    return any(word in str(error) for word in words)
