"""Attributions of one output of a model to what it was given, by captum.

Integrated gradients: Sundararajan, Taly, Yan, "Axiomatic Attribution for Deep Networks" (2017): the attributions add up
to the difference between the output for the input and for a baseline. Occlusion: Zeiler, Fergus, "Visualizing and
Understanding Convolutional Networks" (2014): how much the output falls when a part is replaced by the baseline.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pyft.errors import ConfigError, need

METHODS = ("integrated_gradients", "input_gradients", "occlusion")
FIRST_STEPS, MOST_STEPS = 50, 200
AT_ONCE = 32
"""Points of the path, or occluded inputs, that are run as one batch."""
CLOSE = 0.05
"""Integrated gradients take more steps until they add up to within this share of the difference that they explain."""
MOST_ALONE = 1024
"""Numbers of a sequence that are occluded one by one; of more, whole time steps are."""
PATCHES = 14
"""Patches along the shorter side of a picture."""

Call = Callable[[Any], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Attribution:
    """What `attribute` found.

    Attributes:
        values: float64; (T,) for tokens, else of the shape of the sample.
        output: the output that is explained.
        baseline_output: the same for the baseline; None for gradients.
        delta: by how much the sum of the values misses output - baseline_output; None but for integrated gradients.
        steps: points of the path that were used, None but for integrated gradients.
    """

    values: NDArray[np.float64]
    output: float
    baseline_output: float | None = None
    delta: float | None = None
    steps: int | None = None


def attribute(
    call: Call,
    module: nn.Module,
    inputs: torch.Tensor | Mapping[str, torch.Tensor],
    target: int,
    method: str,
    *,
    baseline: torch.Tensor | float = 0,
    keep: torch.Tensor | None = None,
    steps: int | None = None,
    patch: int | None = None,
) -> Attribution:
    """Attribute output `target` for one sample to its parts. The caller has put the module in eval mode.

    Args:
        call: gives the outputs (B, C) or (B,) for inputs.
        module: behind `call`; its embedding layer is looked for.
        inputs: one sample as a batch of one: float (1, ...), or token numbers (1, T), alone or in a mapping.
        target: number of the output.
        method: one of METHODS.
        baseline: what stands for "nothing": a number, or a tensor that fits the sample.
        keep: (T,) bool, tokens that are in the baseline, too.
        steps: of integrated gradients; None: 50, doubled up to 200 until they add up to within 5 %.
        patch: side of the patches that occlusion puts on a picture, pixels; None: a fourteenth of the shorter side.

    Raises:
        ConfigError: an unknown method, a baseline that does not fit, inputs without an embedding layer.
        MissingExtraError: captum is not installed.
    """
    if method not in METHODS:
        raise ConfigError(f"method={method!r}: expected one of {', '.join(METHODS)}")
    for name, value in (("steps", steps), ("patch", patch)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name}={value!r}: expected a whole number of 1 or more, or None")
    attr = need("captum.attr", "explain", f"method={method!r}")
    name, sample = _explained(inputs)
    first = _baseline(sample, baseline)

    def output(value: torch.Tensor, *_: Any) -> torch.Tensor:
        given: Any = value
        if isinstance(inputs, Mapping):
            given = {key: part.expand(len(value), *part.shape[1:]) for key, part in inputs.items()}
            given[name] = value
        logits = call(given)
        return logits if logits.ndim == 1 else logits[:, target]

    # cuDNN has no backward pass for recurrent layers in eval mode.
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False), _quiet():
        if sample.is_floating_point():
            return _of_numbers(attr, output, sample, first, method, steps, patch)
        if keep is not None:
            first = torch.where(keep.to(sample.device)[None], sample, first)
        return _of_tokens(attr, output, module, sample, first, method, steps)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """captum warns that it sets requires_grad of its own copies, and of modules it does not hook."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="captum")
        yield


def _explained(inputs: torch.Tensor | Mapping[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
    """The tensor that is explained, and its name."""
    if isinstance(inputs, torch.Tensor):
        return "", inputs.detach().clone()
    names = [key for key, value in inputs.items() if value.ndim == 2 and value.dtype == torch.int64]
    if not names:
        raise ConfigError(f"x: expected token numbers (1, T) int64 among the model's inputs, got {', '.join(inputs)}")
    name = "input_ids" if "input_ids" in names else names[0]
    return name, inputs[name].detach().clone()


def _baseline(sample: torch.Tensor, baseline: torch.Tensor | float) -> torch.Tensor:
    values = torch.as_tensor(baseline, dtype=sample.dtype, device=sample.device)
    try:
        return values.expand_as(sample).clone()
    except RuntimeError:
        raise ConfigError(
            f"baseline: expected a number, or the shape {tuple(sample.shape[1:])} of the sample as the model takes it, "
            f"got {tuple(values.shape)}"
        ) from None


def _float(value: torch.Tensor) -> float:
    return float(value.detach().reshape(-1)[0])


def _of_numbers(
    attr: Any, output: Any, sample: torch.Tensor, first: torch.Tensor, method: str, steps: int | None, patch: int | None
) -> Attribution:
    with torch.no_grad():
        found, base = _float(output(sample)), _float(output(first))
    if method == "input_gradients":
        values = attr.Saliency(output).attribute(sample, abs=False)
        return Attribution(_numpy(values[0]), found)
    if method == "integrated_gradients":
        integrated = attr.IntegratedGradients(output)
        values, used = _integrate(integrated, sample, first, found - base, steps)
        return _added_up(values[0], found, base, used)
    with torch.no_grad():
        values = _occluded(attr, output, sample, first, patch)
    return Attribution(_numpy(values[0]), found, base)


def _occluded(attr: Any, output: Any, sample: torch.Tensor, first: torch.Tensor, patch: int | None) -> torch.Tensor:
    if sample.ndim == 4:
        side = patch or max(min(sample.shape[2:]) // PATCHES, 1)
        side = min(side, *sample.shape[2:])
        window = (sample.shape[1], side, side)
        values = attr.Occlusion(output).attribute(
            sample, window, strides=window, baselines=first, perturbations_per_eval=AT_ONCE
        )
        # captum gives every channel what the whole patch is worth.
        return values / sample.shape[1]
    mask = torch.arange(sample[0].numel(), device=sample.device).reshape(sample.shape)
    share = 1
    if sample.ndim == 3 and mask.numel() > MOST_ALONE:
        share = sample.shape[2]
        mask = mask.div(share, rounding_mode="floor")
    values = attr.FeatureAblation(output).attribute(
        sample, baselines=first, feature_mask=mask, perturbations_per_eval=AT_ONCE
    )
    return values / share


def _of_tokens(
    attr: Any, output: Any, module: nn.Module, sample: torch.Tensor, first: torch.Tensor, method: str, steps: int | None
) -> Attribution:
    with torch.no_grad():
        found, base = _float(output(sample)), _float(output(first))
    if method == "occlusion":
        with torch.no_grad():
            values = attr.FeatureAblation(output).attribute(sample, baselines=first, perturbations_per_eval=AT_ONCE)
        return Attribution(_numpy(values[0]), found, base)
    layer = embedding_of(module, lambda: output(sample), sample)
    if method == "input_gradients":
        values = attr.LayerGradientXActivation(output, layer).attribute(sample)
        return Attribution(_numpy(values[0].sum(-1)), found)
    integrated = attr.LayerIntegratedGradients(output, layer)
    values, used = _integrate(integrated, sample, first, found - base, steps)
    return _added_up(values[0].sum(-1), found, base, used)


def _integrate(
    integrated: Any, sample: torch.Tensor, first: torch.Tensor, difference: float, steps: int | None
) -> tuple[torch.Tensor, int]:
    """The attributions, and with how many steps."""
    count = steps or FIRST_STEPS
    while True:
        values = integrated.attribute(sample, baselines=first, n_steps=count, internal_batch_size=AT_ONCE)
        missed = abs(float(values.detach().double().sum()) - difference)
        close = CLOSE * abs(difference) + 1e-5
        if steps is not None or missed <= close or count * 2 > MOST_STEPS:
            return values, count
        count *= 2


def _added_up(values: torch.Tensor, found: float, base: float, steps: int) -> Attribution:
    numbers = _numpy(values)
    return Attribution(numbers, found, base, float(numbers.sum() - (found - base)), steps)


def _numpy(values: torch.Tensor) -> NDArray[np.float64]:
    return values.detach().cpu().double().numpy()


def embedding_of(module: nn.Module, run: Callable[[], Any], tokens: torch.Tensor) -> nn.Embedding:
    """The embedding layer that is given `tokens` when `run` is called.

    Raises:
        ConfigError: none is.
    """
    seen: list[nn.Embedding] = []

    def look(layer: nn.Module, given: Any) -> None:
        value = given[0] if given else None
        if isinstance(value, torch.Tensor) and value.shape == tokens.shape and torch.equal(value, tokens):
            seen.append(layer)  # type: ignore[arg-type]

    layers = [layer for layer in module.modules() if isinstance(layer, nn.Embedding)]
    handles = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise ConfigError(
            f"model: no nn.Embedding of {type(module).__name__} takes the token numbers as they are, so gradients end "
            "there: give method='occlusion'"
        )
    return seen[0]
