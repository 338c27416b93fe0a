"""Other people's optimizers for the benches, each as its users run it: torch's clip in front, then its own step.

`peers("adamw")` gives for each name either a function that takes parameters and returns a step to call, or the error
with which it does not install or run here. Nothing is imported before it is asked for, and what is not torch is first
tried in a process of its own: DeepSpeed compiles for minutes, and for the machine that it compiles on.

pip install -e ".[peers]" && python bench/peers.py    # lists what runs here
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Parameters = list[torch.nn.Parameter]
Step = Callable[[], None]
Build = Callable[[Parameters], Step]

MAX_NORM = 1.0
TRY_SECONDS = 600
TRY_STEPS = 3


class ForeachLion:
    """Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2) in `torch._foreach` ops.

    The fewest passes over memory that these ops allow: with a new tensor for the direction, 11 floats are read or
    written for each parameter. With `reuse_gradient` the direction overwrites the gradient, which is the same number
    but allocates nothing, and the moment takes what it needs of the gradient from the direction:
    beta2 m + (1 - beta2) g = m + (1 - beta2) / (1 - beta1) (c - m) where c = beta1 m + (1 - beta1) g.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        reuse_gradient: bool = False,
    ) -> None:
        self.params: list[torch.Tensor] = list(params)
        self.lr, self.betas, self.weight_decay = lr, betas, weight_decay
        self.reuse_gradient = reuse_gradient
        self.moments = [torch.zeros_like(param, requires_grad=False) for param in params]

    @torch.no_grad()
    def step(self) -> None:
        beta1, beta2 = self.betas
        grads = [param.grad for param in self.params if param.grad is not None]
        if self.reuse_gradient:
            torch._foreach_lerp_(grads, self.moments, beta1)
            torch._foreach_lerp_(self.moments, grads, (1 - beta2) / (1 - beta1))
            directions = grads
        else:
            directions = list(torch._foreach_lerp(self.moments, grads, 1 - beta1))
            torch._foreach_lerp_(self.moments, grads, 1 - beta2)
        torch._foreach_sign_(directions)
        if self.weight_decay != 0.0:
            torch._foreach_mul_(self.params, 1 - self.lr * self.weight_decay)
        torch._foreach_add_(self.params, directions, alpha=-self.lr)


@dataclass(frozen=True)
class Peer:
    """An optimizer class of somebody: where it is found, and the options with which it is the family's formula.

    `module`: "" for this file.
    `precise`: it has moments of the parameters' dtype, so it takes the very step that torch takes.
    """

    module: str
    name: str
    options: dict[str, Any]
    precise: bool = True

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    def build(self, params: Parameters, lr: float = 1e-5) -> Step:
        place = importlib.import_module(self.module) if self.module else sys.modules[__name__]
        made = getattr(place, self.name)(params, lr=lr, **self.options)

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
            made.step()

        return step


def _three_paths(name: str, fused: bool = True, **options: Any) -> dict[str, Peer]:
    paths = {"fused": {"fused": True}, "foreach": {"foreach": True}, "for-loop": {"foreach": False}}
    if not fused:
        del paths["fused"]
    return {f"torch clip + {path}": Peer("torch.optim", name, {**options, **how}) for path, how in paths.items()}


def _bitsandbytes(name: str, **options: Any) -> dict[str, Peer]:
    return {
        f"bitsandbytes {name}": Peer("bitsandbytes.optim", name, options),
        f"bitsandbytes {name}8bit": Peer("bitsandbytes.optim", f"{name}8bit", options, precise=False),
    }


def _deepspeed(folder: str, name: str, **options: Any) -> dict[str, Peer]:
    # Moments in the parameters' dtype, as torch has them; DeepSpeed's default is fp32 for all.
    options = {**options, "fp32_optimizer_states": False}
    return {f"DeepSpeed {name}": Peer(f"deepspeed.ops.{folder}", f"DeepSpeed{name}", options)}


def _torchao(*names: str, **options: Any) -> dict[str, Peer]:
    return {f"torchao {name}": Peer("torchao.optim", name, options, precise=False) for name in names}


FAMILIES: dict[str, dict[str, Peer]] = {
    "adamw": {
        **_three_paths("AdamW", weight_decay=1e-2),
        **_bitsandbytes("AdamW", weight_decay=1e-2),
        **_deepspeed("adam", "CPUAdam", weight_decay=1e-2),
        **_torchao("AdamW8bit", "AdamWFp8", "AdamW4bit", weight_decay=1e-2),
    },
    "adam": {
        **_three_paths("Adam"),
        # bitsandbytes on the CPU decays as AdamW does whatever the class; without decay the two are the same.
        **_bitsandbytes("Adam"),
        **_deepspeed("adam", "CPUAdam", adamw_mode=False),
        **_torchao("Adam8bit", "AdamFp8", "Adam4bit"),
    },
    "sgd": {**_three_paths("SGD", momentum=0.9), **_bitsandbytes("SGD", momentum=0.9)},
    "rmsprop": {**_three_paths("RMSprop", fused=False), **_bitsandbytes("RMSprop")},
    "adagrad": {
        **_three_paths("Adagrad"),
        **_bitsandbytes("Adagrad"),
        **_deepspeed("adagrad", "CPUAdagrad"),
    },
    "adafactor": _three_paths("Adafactor", fused=False),
    "lion": {
        "torch clip + foreach ops": Peer("", "ForeachLion", {}),
        "torch clip + foreach ops on the gradient": Peer("", "ForeachLion", {"reuse_gradient": True}),
        **_bitsandbytes("Lion"),
        **_deepspeed("lion", "CPULion", betas=(0.9, 0.99)),
    },
}


def peers(family: str, dtype: torch.dtype = torch.float32) -> dict[str, Build | str]:
    """For each peer of "adamw", "adam", "sgd", "rmsprop", "adagrad", "adafactor" or "lion": what builds its step for
    a list of parameters with gradients, or the error that it gives here for parameters of `dtype`."""
    return {name: error_of(family, name, dtype) or peer.build for name, peer in FAMILIES[family].items()}


def versions() -> dict[str, str]:
    """Installed versions of the packages that the peers come from."""
    packages = {peer.package for family in FAMILIES.values() for peer in family.values()} - {""}
    return {name: importlib.metadata.version(name) for name in sorted(packages) if importlib.util.find_spec(name)}


@functools.cache
def error_of(family: str, name: str, dtype: torch.dtype = torch.float32) -> str | None:
    """The last line of what goes wrong when a peer takes a few steps on its own; None if all is well."""
    package = FAMILIES[family][name].package
    if package in ("", "torch"):
        try:
            try_peer(family, name, dtype)
        except RuntimeError as error:
            return f"RuntimeError: {error}"
        return None
    if importlib.util.find_spec(package) is None:
        return f"not installed: {package}"
    command = [sys.executable, __file__, family, name, str(dtype).removeprefix("torch.")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TRY_SECONDS)
    except subprocess.TimeoutExpired:
        return f"not ready after {TRY_SECONDS} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines() or ["no message"]
    return f"killed by signal {-done.returncode}" if done.returncode < 0 else lines[-1]


def try_peer(family: str, name: str, dtype: torch.dtype) -> None:
    """Take a few steps beside torch's for-loop in fp32, or the first of a family that torch does not have.

    Raises:
        RuntimeError: the two part by more than the number formats explain.
    """
    of_family = FAMILIES[family]
    peer, judge = of_family[name], of_family.get("torch clip + for-loop", next(iter(of_family.values())))
    generator = torch.Generator().manual_seed(0)
    # Small values, so that a step is well above the rounding of bf16.
    begin = [(0.01 * torch.randn(shape, generator=generator)).to(dtype) for shape in ((64, 128), (7,))]
    ours = [torch.nn.Parameter(value.clone()) for value in begin]
    right = [torch.nn.Parameter(value.to(torch.float32, copy=True)) for value in begin]
    steps = [(ours, peer.build(ours, lr=0.05)), (right, judge.build(right, lr=0.05))]
    for _ in range(TRY_STEPS):
        grads = [torch.randn(value.shape, generator=generator).to(dtype) for value in begin]
        for params, step in steps:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.to(param.dtype, copy=True)
            step()
    apart = distance(ours, right) / distance(right, begin)
    allowed = 1e-4 if peer.precise and dtype == torch.float32 else 0.25
    if not apart <= allowed:
        raise RuntimeError(f"a wrong step, off by {apart:.0%} of its length")


def distance(one: list[Any], other: list[Any]) -> float:
    """L1 distance of two lists of tensors."""
    return sum(float((a.detach().float() - b.detach().float()).abs().sum()) for a, b in zip(one, other, strict=True))


def main() -> None:
    if len(sys.argv) == 4:
        try:
            try_peer(sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3]))
        except Exception as failure:
            cause: BaseException = failure
            while cause.__cause__ is not None:
                cause = cause.__cause__
            sys.exit(f"{type(cause).__name__}: {cause}".splitlines()[0])
        return
    print(*(f"{name} {version}" for name, version in versions().items()), sep=", ")
    for family, of_family in FAMILIES.items():
        for name in of_family:
            for dtype in (torch.float32, torch.bfloat16):
                error = error_of(family, name, dtype) or "runs"
                print(f"{family:10} {name:42} {str(dtype).removeprefix('torch.'):9} {error}", flush=True)


if __name__ == "__main__":
    main()
