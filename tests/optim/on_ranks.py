"""What the processes of the distributed tests run, in a module of its own for them to find."""

from __future__ import annotations

import contextlib
import copy
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import pyft
import pyft.optim
from pyft.errors import NonFiniteError, PyftError

WORLD = 4
BATCH = 8
# What trains of `net` where weights train in part.
PARTS = {"0": [1, 5, 6], "3": slice(0, 4)}
# Of 4 processes some have no part of (2, 3), (1,) and (0, 5), and uneven parts of the others.
SHAPES = [(30, 20), (7,), (5, 3, 2, 2), (0, 5), (257,), (2, 3), (1,), (6, 8)]


def same_values(shapes: Any, seed: int, scale: float = 1.0) -> list[Tensor]:
    """Normal tensors, the same in every process."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * scale for shape in shapes]


_MESHES: dict[Any, DeviceMesh] = {}


def mesh_of(*shape: int) -> DeviceMesh:
    if shape not in _MESHES:
        _MESHES[shape] = init_device_mesh("cpu", shape, mesh_dim_names=tuple("ab"[: len(shape)]))
    return _MESHES[shape]


def spread(tensors: list[Tensor], kind: str) -> list[Any]:
    """The tensors as DTensors, the last as it is: what every process has."""
    made: list[Any] = []
    for number, tensor in enumerate(tensors[:-1]):
        if kind == "shards":
            mesh, placements = mesh_of(WORLD), [Shard(0)]
        elif kind == "copies of shards":
            mesh, placements = mesh_of(2, 2), [Replicate(), Shard(0)]
        else:
            mesh = mesh_of(2, 2)
            second = Shard(1) if tensor.ndim > 1 and number % 2 == 0 else Replicate()
            placements = [Shard(0), second]
        made.append(placed(tensor, mesh, placements))
    return [*made, tensors[-1]]


def placed(tensor: Tensor, mesh: DeviceMesh, placements: list[Any]) -> DTensor:
    """As distribute_tensor of what all processes have, without sending it."""
    part = tensor
    for dim, placement in enumerate(placements):
        if isinstance(placement, Shard):
            cut = part.chunk(mesh.size(dim), placement.dim)
            rank = mesh.get_local_rank(dim)
            part = cut[rank] if rank < len(cut) else cut[0].narrow(placement.dim, 0, 0)
    return DTensor.from_local(
        part.clone(), mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def whole(tensor: Any) -> Tensor:
    if isinstance(tensor, DTensor):
        # Gloo sends no int16.
        narrow = tensor.dtype == torch.int16
        tensor = tensor.int().full_tensor().short() if narrow else tensor.full_tensor()
    return tensor.detach().clone()


def by_given_gradients(
    name: str, options: dict[str, Any], kind: str | None, dtype: torch.dtype = torch.float32, steps: int = 20
) -> dict[str, Any]:
    """Parameters, state and reports after some steps with gradients that are the same for each `kind`; None: whole."""
    values = [value.to(dtype) for value in same_values(SHAPES, 1)]
    placed = values if kind is None else spread(values, kind)
    params = [nn.Parameter(value) for value in placed]
    optimizer = getattr(pyft.optim, name)(
        [{"params": params[:3]}, {"params": params[3:], "weight_decay": 0.1}], **options
    )
    reports = []
    for step in range(steps):
        grads = [grad.to(dtype) for grad in same_values(SHAPES, 100 + step)]
        for param, grad in zip(params, grads if kind is None else spread(grads, kind), strict=True):
            param.grad = grad
        optimizer.step()
        last = optimizer.last_step
        reports.append((last.total_norm, last.clip_coef, last.skipped, last.first_bad))
    state = [{key: whole(value) for key, value in optimizer.state[param].items()} for param in params]
    return {"params": [whole(param) for param in params], "state": state, "reports": reports}


def calls_of_all_reduce(options: dict[str, Any], kind: str, steps: int) -> int:
    counted = 0
    real = torch.distributed.all_reduce

    def count(*args: Any, **kwargs: Any) -> Any:
        nonlocal counted
        counted += 1
        return real(*args, **kwargs)

    torch.distributed.all_reduce = count
    try:
        by_given_gradients("AdamW", options, kind, steps=steps)
    finally:
        torch.distributed.all_reduce = real
    return counted


def one_bad_gradient(kind: str, rank: int, number: int, value: float, policy: str) -> Any:
    """What each process says of a step in which one of them has one value that is not finite, and whether anything was
    written."""
    params = [nn.Parameter(value) for value in spread(same_values(SHAPES, 1), kind)]
    names = [(f"weight {i}", param) for i, param in enumerate(params)]
    optimizer = pyft.optim.AdamW(names, clip_norm=1.0, on_nonfinite=policy)
    for param, grad in zip(params, spread(same_values(SHAPES, 2), kind), strict=True):
        param.grad = grad
    optimizer.step()
    grad = params[number].grad
    part = grad.to_local() if isinstance(grad, DTensor) else grad
    if torch.distributed.get_rank() == rank:
        part.view(-1)[0] = value
    before = [whole(param) for param in params]
    said = None
    try:
        optimizer.step()
    except NonFiniteError as error:
        said = str(error)
    written = any(not torch.equal(old, whole(param)) for old, param in zip(before, params, strict=True))
    counts = {float(optimizer.state[param]["step"]) for param in params}
    last = optimizer.last_step
    return written, counts, said, (last.skipped, last.first_bad, optimizer.skipped_steps)


def clipped(function: str, kind: str | None, owner: str, options: Any) -> tuple[float | None, list[Tensor]]:
    """What one of the clipping functions of pyft or torch gives, and the gradients after it; torch's without the last
    parameter, which is no DTensor."""
    put = (lambda tensors: tensors) if kind is None else (lambda tensors: spread(tensors, kind))
    params = [nn.Parameter(value) for value in put(same_values(SHAPES, 1))]
    for param, grad in zip(params, put(same_values(SHAPES, 2, 3.0)), strict=True):
        param.grad = grad
    of = pyft.optim if owner == "pyft" else nn.utils
    params = params[:-1] if owner == "torch" else params
    norm = getattr(of, function)(params, **options)
    return None if norm is None else float(whole(norm)), [whole(param.grad) for param in params]


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A model of odd sizes."""
    layers = nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.LayerNorm(13), nn.Linear(13, 6), nn.Tanh(), nn.Linear(6, 1))
    params = list(layers.parameters())
    with torch.no_grad():
        for param, value in zip(params, same_values([param.shape for param in params], 5), strict=True):
            param.copy_(value * 0.5)
    return layers.to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x, y = same_values([(BATCH, 7), (BATCH, 1)], 1000 + step, 2.0)
    return x.to(dtype), y.to(dtype)


def my_share(tensor: Tensor) -> Tensor:
    return tensor.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def sharded_net(mesh: DeviceMesh | None = None) -> nn.Sequential:
    model = net()
    for layer in (model[0], model[3]):
        fully_shard(layer, mesh=mesh or mesh_of(WORLD))
    return fully_shard(model, mesh=mesh or mesh_of(WORLD))


def train_shards(name: str, options: dict[str, Any], steps: int = 20) -> dict[str, Any]:
    """A training with fully_shard, each process on its share of the batch."""
    model = sharded_net()
    optimizer = getattr(pyft.optim, name)(model.parameters(), **options)
    norms = train(model, optimizer, range(steps))
    return {"params": [whole(param) for param in model.parameters()], "norms": norms}


def train(model: nn.Module, optimizer: Any, steps: Any) -> list[Any]:
    norms = []
    for step in steps:
        x, y = map(my_share, batch(step))
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        last = getattr(optimizer, "last_step", None)
        norms.append(None if last is None else last.total_norm)
    return norms


def train_copies(name: str, options: dict[str, Any], how: str, steps: int = 20) -> Any:
    """A training with DistributedDataParallel; `how`: "plain", "parts" of weights, gradients that are "accumulated" or
    are "views" of the buckets."""
    model = net()
    frozen = None
    if how == "parts":
        pyft.freeze(model, PARTS)
        frozen = copy.deepcopy(model.state_dict())
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=how == "views")
    optimizer = getattr(pyft.optim, name)([p for p in model.parameters() if p.requires_grad], **options)
    for step in range(steps):
        x, y = map(my_share, batch(step))
        optimizer.zero_grad()
        pieces = len(x) if how == "accumulated" else 1
        for k in range(pieces):
            with ddp.no_sync() if k + 1 < pieces else contextlib.nullcontext():
                ((ddp(x.chunk(pieces)[k]) - y.chunk(pieces)[k]).square().mean() / pieces).backward()
        optimizer.step()
    return {"state": {k: v.clone() for k, v in model.state_dict().items()}, "before": frozen}


def refused(action: str) -> str:
    """What is said about what cannot be done."""
    try:
        getattr(_Refused, action)()
    except (TypeError, ValueError, RuntimeError, PyftError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class _Refused:
    @staticmethod
    def adafactor() -> None:
        pyft.optim.Adafactor(sharded_net().parameters())

    @staticmethod
    def cut_rows() -> None:
        param = nn.Parameter(distribute_tensor(torch.ones(4, 8), mesh_of(WORLD), [Shard(1)]))
        param.grad = distribute_tensor(torch.ones(4, 8), mesh_of(WORLD), [Shard(1)])
        pyft.optim.AdamW([param], clip_norm=0.01, clip_mode="agc").step()

    @staticmethod
    def cut_rows_clipped() -> None:
        param = nn.Parameter(distribute_tensor(torch.ones(4, 8), mesh_of(WORLD), [Shard(1)]))
        param.grad = distribute_tensor(torch.ones(4, 8), mesh_of(WORLD), [Shard(1)])
        pyft.optim.clip_grad_agc_([param])

    @staticmethod
    def two_meshes() -> None:
        params = [nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)])) for mesh in (mesh_of(WORLD),)]
        params += [nn.Parameter(distribute_tensor(torch.ones(4), mesh_of(2, 2), [Shard(0), Replicate()]))]
        for param in params:
            param.grad = torch.ones_like(param)
        pyft.optim.SGD(params, lr=0.1).step()
        pyft.optim.SGD(params, lr=0.1, clip_norm=1.0).step()

    @staticmethod
    def partial_sums() -> None:
        from torch.distributed.tensor import Partial

        pyft.optim.SGD([nn.Parameter(DTensor.from_local(torch.ones(3), mesh_of(WORLD), [Partial()]))], lr=0.1)

    @staticmethod
    def whole_state() -> None:
        model, other = sharded_net(), net()
        optimizer, before = pyft.optim.AdamW(model.parameters()), pyft.optim.AdamW(other.parameters())
        other(batch(0)[0]).sum().backward()
        before.step()
        optimizer.load_state_dict(before.state_dict())

    @staticmethod
    def sharded_parts() -> None:
        model = net()
        pyft.freeze(model, PARTS)
        fully_shard(model, mesh=mesh_of(WORLD))(batch(0)[0])
        model.state_dict()

    @staticmethod
    def whole_gradient() -> None:
        param = nn.Parameter(distribute_tensor(torch.ones(4), mesh_of(WORLD), [Shard(0)]))
        optimizer = pyft.optim.SGD([param], lr=0.1)
        param.grad = torch.ones(4)
        optimizer.step()

    @staticmethod
    def norms_of_copies() -> None:
        pyft.optim.AdamW(DistributedDataParallel(net()).parameters(), clip_norm=1.0, norm_in_backward=True)

    @staticmethod
    def steps_of_copies() -> None:
        pyft.optim.AdamW(DistributedDataParallel(net()).parameters(), step_in_backward=True)


def one_bad_rank_of_copies(value: float) -> Any:
    """DistributedDataParallel where one process has an input that is not finite."""
    model = net()
    ddp = DistributedDataParallel(model)
    optimizer = pyft.optim.AdamW(model.named_parameters(), clip_norm=1.0, on_nonfinite="skip")
    x, y = map(my_share, batch(0))
    if torch.distributed.get_rank() == 2:
        x[0, 0] = value
    (ddp(x) - y).square().mean().backward()
    before = [whole(param) for param in model.parameters()]
    optimizer.step()
    written = any(not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    return written, optimizer.last_step.skipped, optimizer.last_step.first_bad, optimizer.skipped_steps


def saved_and_loaded(folder: str, options: dict[str, Any], saver: str) -> Any:
    """Four steps, saved by torch.distributed.checkpoint, loaded into another model and optimizer, four more; and eight
    without a stop. `saver`: "pyft" or "torch", whose AdamW takes the first four steps."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def first(model: nn.Module) -> Any:
        return (
            pyft.optim.AdamW(model.parameters(), **options)
            if saver == "pyft"
            else torch.optim.AdamW(model.parameters(), lr=options["lr"])
        )

    straight = sharded_net()
    train(straight, pyft.optim.AdamW(straight.parameters(), **options), range(8))
    model = sharded_net()
    optimizer = first(model)
    train(model, optimizer, range(4))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    again = sharded_net()
    with torch.no_grad():
        for param in again.parameters():
            param.zero_()
    later = pyft.optim.AdamW(again.parameters(), **options)
    weights, state = get_state_dict(again, later)
    loaded = {"model": weights, "optimizer": state}
    # Groups of torch have no decay_to_init.
    planner = dcp.DefaultLoadPlanner(allow_partial_load=saver == "torch")
    dcp.load(loaded, checkpoint_id=folder, planner=planner)
    set_state_dict(again, later, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    train(again, later, range(4, 8))
    placed = [
        value.placements == param.placements
        for param in again.parameters()
        for key, value in later.state[param].items()
        if key != "step"
    ]
    return [whole(p) for p in straight.parameters()], [whole(p) for p in again.parameters()], all(placed)


def whole_state_of_shards(steps: int, given: dict[str, Any] | None) -> Any:
    """The state of a sharded optimizer as that of a whole model, after `given` was loaded the same way."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    model = sharded_net()
    optimizer = pyft.optim.AdamW(model.parameters(), lr=0.01)
    as_whole = StateDictOptions(full_state_dict=True)
    if given is not None:
        set_optimizer_state_dict(model, optimizer, given, options=as_whole)
    train(model, optimizer, range(steps))
    return get_optimizer_state_dict(model, optimizer, options=as_whole)


def rounded_at_random(kind: str) -> tuple[Tensor, Tensor]:
    """This process's part of a bfloat16 parameter that was moved by less than a rounding, and the whole."""
    value = torch.ones(4096, dtype=torch.bfloat16)
    [param, _] = [nn.Parameter(one) for one in spread([value, torch.ones(1)], kind)]
    [param.grad, _] = spread([torch.full((4096,), 1.0, dtype=torch.bfloat16), torch.ones(1)], kind)
    pyft.optim.SGD([param], lr=2.0**-9, weights="stochastic").step()
    return param.to_local().detach().clone(), whole(param)


def sums_known_in_backward() -> int:
    """For how many gradients the norm was taken in backward."""
    model = sharded_net()
    optimizer = pyft.optim.AdamW(model.parameters(), clip_norm=1.0, norm_in_backward=True)
    train(model, optimizer, range(2))
    x, y = map(my_share, batch(2))
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    norms = optimizer.norm_in_backward
    assert norms is not None
    known = norms.sums([param.grad._local_tensor for param in model.parameters()], None)
    return sum(value == value for value in known)


def leave_in_the_middle() -> str:
    """The second of two processes goes away in front of the sum over both."""
    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    param.grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    optimizer = pyft.optim.AdamW([param], clip_norm=1.0)
    optimizer.step()
    if torch.distributed.get_rank() == 1:
        os._exit(3)
    before = param.to_local().clone()
    try:
        for _ in range(3):
            optimizer.step()
    except RuntimeError:
        assert torch.equal(before, param.to_local())
        return "an error"
    return "nothing"


_EMULATION: list[Any] = []


def on_emulated_gpus(order: str, function: Any, *arguments: Any) -> Any:
    """The same with the CUDA kernels, emulated, and the plans of a GPU."""
    from emulated_core import load

    from pyft.core.loader import load_cuda_core
    from pyft.optim import device_plan

    if not _EMULATION:
        _EMULATION.append(load(order)[1])
        device_plan.device_core = lambda param: load_cuda_core()
    return function(*arguments)


def step_without_waiting(kind: str, options: dict[str, Any]) -> tuple[dict[str, int], Any, list[str]]:
    """What one step does on the emulated GPU, its report, and where anything was waited for."""
    params = [nn.Parameter(value) for value in spread(same_values(SHAPES, 1), kind)]
    optimizer = pyft.optim.AdamW(params, **options)
    for param, grad in zip(params, spread(same_values(SHAPES, 2), kind), strict=True):
        param.grad = grad
    optimizer.step()
    waits: list[str] = []
    held = {name: getattr(Tensor, name) for name in ("cpu", "item", "tolist", "numpy", "__float__", "__bool__")}
    for name, real in held.items():
        setattr(Tensor, name, lambda *a, real=real, name=name: (waits.append(name), real(*a))[1])
    _EMULATION[0].reset()
    try:
        optimizer.step()
    finally:
        for name, real in held.items():
            setattr(Tensor, name, real)
    counters = _EMULATION[0].counters()
    last = optimizer.last_step
    return counters, (last.total_norm, last.clip_coef, last.skipped, last.first_bad), waits
