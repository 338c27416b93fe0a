"""Parameters spread over processes, DTensors as `fully_shard` makes them: this process's memory, and sums over all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyft.ops.distributed import is_distributed
from pyft.ops.rounding import BLOCK


def local(tensor: Tensor) -> Tensor:
    """The memory of a tensor that this process has: its shard, or the tensor itself.

    The same object each time; `to_local()` makes a new view of a parameter in each call.
    """
    if not is_distributed(tensor):
        return tensor
    held = tensor._local_tensor
    # The result of a collective that may still run.
    return held.wait() if hasattr(held, "wait") else held


def local_gradient(param: Any, grad: Any, name: str = "a parameter") -> Tensor:
    """This process's part of the gradient of a parameter, spread as the parameter is.

    Raises:
        TypeError: only one of the two is a DTensor.
    """
    if is_distributed(param) != is_distributed(grad):
        kinds = [type(one).__name__ for one in (param, grad)]
        raise TypeError(
            f"{name} is a {kinds[0]} but its gradient a {kinds[1]}: both must be DTensors, or neither; run backward "
            "through the module that fully_shard was called on"
        )
    if not is_distributed(grad):
        return grad
    if grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return local(grad)


def summed(grad: Tensor) -> Tensor:
    """A gradient whose parameter is not known, with partial sums added up."""
    if not is_distributed(grad) or not any(placement.is_partial() for placement in grad.placements):
        return grad
    from torch.distributed.tensor import Replicate

    whole = [Replicate() if placement.is_partial() else placement for placement in grad.placements]
    return grad.redistribute(grad.device_mesh, whole)


def like(param: Tensor, key: str, value: Tensor) -> Tensor:
    """`value`, the state under `key` for this process's part of a parameter, spread as the parameter is.

    Scales, (k,) with one for each block of the part, become (parts, k of the largest part): so they cannot be loaded
    for another number of parts, whose blocks are others.
    """
    if not is_distributed(param) or key == "step":
        return value
    from torch.distributed.tensor import Shard

    if not key.endswith("_scale"):
        return _joined(value, param.device_mesh, param.placements, param.shape, param.stride())
    parts, blocks = _shape_of_scales(param)
    padded = torch.nn.functional.pad(value, (0, blocks - value.numel())).view(1, blocks)
    sharded = _sharded_dims(param)
    by_part = [Shard(0) if dim in sharded else placement for dim, placement in enumerate(param.placements)]
    return _joined(padded, param.device_mesh, by_part, torch.Size((parts, blocks)), (blocks, 1))


def _joined(part: Tensor, mesh: Any, placements: Sequence[Any], size: torch.Size, stride: tuple[int, ...]) -> Tensor:
    """A DTensor of this process's part. DTensor.from_local would take what is kept on the CPU to the mesh's GPU."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    spec = DTensorSpec(mesh, tuple(placements), tensor_meta=TensorMeta(size, stride, part.dtype))
    return DTensor(part, spec, requires_grad=False)


def _shape_of_scales(param: Any) -> tuple[int, int]:
    parts, sizes = 1, list(param.shape)
    for dim in _sharded_dims(param):
        along, processes = param.placements[dim].dim, param.device_mesh.size(dim)
        sizes[along] = -(-sizes[along] // processes)
        parts *= processes
    return parts, -(-math.prod(sizes) // BLOCK)


def local_gradients(members: Sequence[Any], spread: Sequence[int], grads: list[Tensor]) -> list[Tensor] | None:
    """The gradients of the members of a plan, of those in `spread` this process's parts; None where one of these has
    other memory by now."""
    for i in spread:
        if not members[i].is_where_it_was():
            return None
        grads[i] = local_gradient(members[i].param, grads[i], f"parameter {members[i].number}")
    return grads


def local_state(param: Tensor, of_one: dict[str, Any]) -> dict[str, Any]:
    """The state of a parameter, with this process's part of each tensor.

    Raises:
        ValueError: a tensor is not spread as the parameter is.
    """
    if not is_distributed(param):
        return of_one
    return {key: _local_entry(param, key, value) for key, value in of_one.items()}


def _local_entry(param: Any, key: str, value: Any) -> Any:
    if not isinstance(value, Tensor) or key == "step":
        return value
    if not is_distributed(value) or value.device_mesh != param.device_mesh:
        raise ValueError(
            f"state '{key}' of shape {tuple(value.shape)} is not spread over processes as its parameter of shape "
            f"{tuple(param.shape)} is; load it with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict, "
            "with full_state_dict=True if it is that of a whole model"
        )
    if key.endswith("_scale"):
        if value.shape != _shape_of_scales(param):
            raise ValueError(
                f"state '{key}' has shape {tuple(value.shape)}, expected {_shape_of_scales(param)}: 8-bit state is for "
                "the number of processes that saved it; save with state_dtype='float32' to change that"
            )
        return local(value).reshape(-1)[: -(-local(param).numel() // BLOCK)]
    if value.shape != param.shape:
        raise ValueError(f"state '{key}' has shape {tuple(value.shape)}, its parameter {tuple(param.shape)}")
    if value.placements != param.placements:
        value = value.redistribute(param.device_mesh, param.placements)
    return local(value)


def write_back(param: Tensor, of_one: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> None:
    """Put what was changed in `local_state(param, of_one)`, from `before` to `after`, into `of_one`, spread again."""
    for key in before:
        if key not in after:
            del of_one[key]
    for key, value in after.items():
        if before.get(key) is not value:
            of_one[key] = like(param, key, value)


def _sharded_dims(param: Any) -> list[int]:
    """The dimensions of the mesh over which the elements of a DTensor are spread."""
    return [dim for dim, placement in enumerate(param.placements) if not placement.is_replicate()]


def cut_dims(param: Tensor) -> list[int]:
    """The dimensions of a parameter that are cut over more than one process."""
    if not is_distributed(param):
        return []
    mesh = param.device_mesh
    return sorted({param.placements[dim].dim for dim in _sharded_dims(param) if mesh.size(dim) > 1})


def has_cut_row(param: Tensor) -> bool:
    """Whether a row of adaptive clipping lies on several processes: a tensor of one dimension is one row."""
    return param.ndim == 1 and bool(cut_dims(param))


def part_number(param: Tensor) -> int:
    """The number of this process's part of a parameter; the same for all copies of the same part."""
    if not is_distributed(param):
        return 0
    mesh, number = param.device_mesh, 0
    for dim in _sharded_dims(param):
        number = number * mesh.size(dim) + mesh.get_local_rank(dim)
    return number


def check_placements(tensor: Tensor, name: str) -> None:
    """Refuse what has no memory of its own here.

    Raises:
        TypeError: partial sums, or a mesh that this process is not in.
    """
    if not is_distributed(tensor):
        return
    if any(placement.is_partial() for placement in tensor.placements):
        raise TypeError(
            f"{name} is a DTensor of partial sums, {tensor.placements}; redistribute() it to Shard or Replicate first"
        )
    if tensor.device_mesh.get_coordinate() is None:
        raise TypeError(f"{name} is spread over {tensor.device_mesh}, which this process is not in; leave it out here")


class Shards:
    """The processes over which the parameters of one step are spread.

    Each process adds what it alone has: a parameter that several hold counts for the first of them. So every process
    gets the same bits, and comes to the same decision.

    Attributes:
        counted: for each parameter, 1.0 where this process adds its sums, else 0.0.
    """

    def __init__(self, params: Sequence[Tensor], mesh: Any, dims: Sequence[int]) -> None:
        self._groups = [mesh.get_group(dim) for dim in dims]
        # Where the mesh can add: NCCL adds on GPUs only, whereas parameters may be kept on the CPU.
        self.device = torch.device(mesh.device_type)
        if self.device.type != "cpu":
            current = torch.get_device_module(self.device).current_device()
            self.device = torch.device(self.device.type, current)
        self.counted = []
        for param in params:
            mine = _sharded_dims(param) if is_distributed(param) else []
            self.counted.append(float(all(dim in mine or mesh.get_local_rank(dim) == 0 for dim in dims)))
        self._processes, self._place = 1, 0
        for dim in dims:
            self._processes = self._processes * mesh.size(dim)
            self._place = self._place * mesh.size(dim) + mesh.get_local_rank(dim)
        self._weights = torch.tensor(self.counted, dtype=torch.float64, device=self.device)
        self._all_mine = all(self.counted)

    def add_up_(self, values: Tensor) -> None:
        """Sum over all processes, in place; `values` on `device`. Waits for nothing where the backend does not."""
        for group in self._groups:
            torch.distributed.all_reduce(values, group=group)

    def count_(self, values: Tensor) -> Tensor:
        """Leave to this process what it adds: (..., parameters) float64. What is not finite stays so."""
        return values if self._all_mine else values.mul_(self._weights)

    def totals(self, sums: list[list[float]]) -> list[list[float]]:
        """Sums of each parameter over all processes, of several kinds at once: (kinds, parameters)."""
        values = self.count_(torch.tensor(sums, dtype=torch.float64, device=self.device))
        self.add_up_(values)
        return values.tolist()

    def norm(self, of_mine: Tensor, norm_type: float) -> Tensor:
        """The p-norm of all gradients from () that of the counted ones of each process: () float64 on `device`."""
        of_each = torch.zeros(self._processes, dtype=torch.float64, device=self.device)
        of_each[self._place] = of_mine
        self.add_up_(of_each)
        # Large powers overflow; nothing here may wait for a GPU.
        largest = of_each.amax()
        unit = torch.where((largest > 0.0) & largest.isfinite(), largest, 1.0)
        return torch.linalg.vector_norm(of_each / unit, norm_type) * unit


def shards_of(params: Sequence[Tensor], by_rows: bool, name: Callable[[int], str]) -> Shards | None:
    """The processes over which the norms of these parameters are to be added; None where each has all of them.

    Args:
        params: the parameters.
        by_rows: norms of rows are taken, too.
        name: of the parameter with this place in `params`.

    Raises:
        ValueError: the parameters are spread over several meshes, so that it is not known whose sums belong together;
            or rows of more than one dimension are cut.
    """
    mesh, first, dims = None, 0, set[int]()
    for i, param in enumerate(params):
        if not is_distributed(param):
            continue
        if mesh is None:
            mesh, first = param.device_mesh, i
        elif param.device_mesh != mesh:
            raise ValueError(
                f"{name(i)} is spread over {param.device_mesh}, {name(first)} over {mesh}: whose norms "
                "belong together is not known; give each mesh an optimizer of its own, or do not clip"
            )
        if by_rows and any(dim > 0 for dim in cut_dims(param)):
            raise ValueError(
                f"{name(i)} is spread as {param.placements}, which cuts the rows that adaptive clipping "
                "scales; shard it on dimension 0, or clip by another norm"
            )
        dims |= {dim for dim in _sharded_dims(param) if mesh.size(dim) > 1}
    return Shards(params, mesh, sorted(dims)) if dims else None
