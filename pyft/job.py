"""What is found out about a run before anything is written or trained: every fault in the arguments shows here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pyft.core import transfer
from pyft.data.batches import Batches
from pyft.data.checks import check_data
from pyft.data.sources import load_data
from pyft.errors import ConfigError, need
from pyft.evaluation.predict import evaluate_batches
from pyft.freezing.norms import batch_norm_note
from pyft.freezing.plan import FreezePlan, make_plan
from pyft.models.call import call_model, check_outputs, probing
from pyft.models.head import HeadReport, fit_head
from pyft.models.init import INIT, init_linear
from pyft.models.load import LoadedModel, load_model
from pyft.preprocess import choose_preprocess, features_hint, table_notes, wanted_form
from pyft.run_dir import fingerprint_state, is_run, open_run
from pyft.samples import Batch, Data, Kind
from pyft.target_scale import TargetScale, check_scale_targets, choose_scale
from pyft.training.layout import channels_last, choose_layout, convolution_weights
from pyft.training.objectives import Objective, class_weights, make_loss
from pyft.training.precision import bf16_hardware, choose_precision
from pyft.training.processes import local_gpu
from pyft.training.settings import Settings, resolve
from pyft.training.stages import Stage, make_stages
from pyft.untouched import Untouched, given_back_on_error

# Where data of a kind is looked at before training: enough rows to see shapes, few enough to cost nothing.
EXAMPLE_SIZE = 4
PROBE_BATCH = 16
WORTH_A_PROBE = 500
"""Training samples from which on it pays to find out which precision runs them faster."""
WORTH_A_TRIAL = 2000
"""Samples, over all epochs, from which on it pays to find out which memory layout runs them faster."""
TRIAL_BATCH = 8
SCALE_PROBE = 64
"""Samples that show whether a model gives values in the unit of the targets already."""
EVALUATION_BATCH = 64


@dataclass
class Job:
    """A run that can be started.

    Attributes:
        arguments: the keywords of `finetune`.
        data, model, preprocess: as they will be used; the model is on `device` with its new head.
        loaded: where the model came from.
        spec: the architecture, where the model can be built again from it; else None.
        head: what became of the head.
        settings, objective, stages: as `pyft.training` takes them.
        num_outputs: classes, labels or regression targets.
        batches, val_batches: what is trained and validated on.
        plans: printed plan of each stage, by its name.
        example: a few samples of the training data, on the CPU.
        before: the model as it came.
        forward_precision: "fp32" or "bf16", of passes without gradient during training.
        target_scale: the unit of the model's outputs; None: that of the targets.
        channels_last: whether convolutions are trained with their channels last in memory.
        notes: lines for the user.
    """

    arguments: dict[str, Any]
    data: Data
    model: nn.Module
    loaded: LoadedModel
    spec: dict[str, Any] | None
    preprocess: Any
    head: HeadReport
    settings: Settings
    objective: Objective
    stages: list[Stage]
    num_outputs: int
    device: torch.device
    batches: Batches
    val_batches: Batches | None
    example: Batch
    before: Untouched
    forward_precision: str = "fp32"
    channels_last: bool = False
    target_scale: TargetScale | None = None
    plans: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def task(self) -> str:
        """Kind and problem in the words of the `task` keyword."""
        return f"{'tabular' if self.data.kind == 'array' else self.data.kind}-{self.data.problem}"

    def set_target_scale(self, scale: TargetScale | None) -> None:
        """Train on targets in this unit."""
        self.target_scale = self.objective.target_scale = scale

    def in_own_unit(self, outputs: Any) -> Any:
        """The model's outputs, Tensor or array, in the unit of the targets."""
        return outputs if self.target_scale is None else self.target_scale.unscale(outputs)


def inspect(arguments: Mapping[str, Any]) -> Job:
    """Load data and model, fit the head, try every stage; the model is given back as it came if anything is wrong.

    Raises:
        DataError: the data cannot be used.
        ConfigError: an argument, or a combination of arguments and data, is not possible.
        MissingExtraError: a package that an argument asks for is not installed.
    """
    arguments = dict(arguments)
    device = choose_device(arguments["device"])
    check_export(arguments["export"])
    check_cache(arguments["cache_features"], arguments["augment_views"])
    check_scale_targets(arguments["scale_targets"])
    data = load_data(
        arguments["data"],
        task=arguments["task"],
        val=arguments["val"],
        stratify=arguments["stratify"],
        seed=arguments["seed"],
        text_column=arguments["text_column"],
        label_column=arguments["label_column"],
        form=wanted_form(arguments["preprocess"], arguments["model"]),
    )
    settings = resolve(_settings(arguments), data.problem, data.kind)
    check_patience(settings, data)
    notes = [*data.notes, *check_data(data)]
    num_outputs = count_outputs(data)
    weights = class_weights(settings.class_weight, data.train.targets, data.problem, num_outputs)  # type: ignore[arg-type]
    objective = make_loss(data.problem, settings.loss, weights, settings.label_smoothing).to(device)
    loaded, earlier = load_any_model(arguments["model"], num_outputs, settings.seed)
    check_kind(loaded, data.kind)
    before = Untouched(loaded.module)
    with given_back_on_error(before):
        loaded.module.to(device)
        preprocess, note = choose_preprocess(
            arguments["preprocess"], loaded, data.kind, arguments["max_length"], earlier, data.train
        )
        notes += [*([note] if note else []), *table_notes(preprocess, data)]
        batches, val_batches = make_batches(data, preprocess, arguments, settings.seed)
        example = first_batch(data, preprocess)
        head = prepare_head(
            loaded, arguments["head"], num_outputs, example, device, settings.seed, earlier, data.classes,
            features_hint(preprocess),
        )  # fmt: skip
        notes.append(head.message)
        logits = try_forward(loaded.module, example, device)
        check_outputs(logits, data.problem, num_outputs, example)
        scale, note = target_scale(arguments["scale_targets"], data, loaded.module, batches, device, head, earlier)
        notes += [note] if note else []
        check_example_loss(objective, logits, example, device)
        check_metric(settings, data, logits, example)
        make_plan(
            loaded.module, arguments["freeze"], draft=True
        )  # a name without a match is told, whatever the strategy
        stages = choose_stages(arguments, head, notes)
        plans = try_plans(loaded.module, stages)
        kept = plans[stages[-1].name].eval_modules
        printed = {name: str(plan) for name, plan in plans.items()}
        note = batch_norm_note(loaded.module, kept, len(data.train), arguments["batch_size"])
        notes += [note] if note else []
        last, note = choose_memory_layout(loaded.module, data, preprocess, settings, stages, device)
        notes += [note] if note else []
        with channels_last(loaded.module, last):
            precision, note = choose_forward_precision(loaded.module, data, preprocess, settings, stages, device)
        notes += [note] if note else []
    job = Job(
        arguments=arguments, data=data, model=loaded.module, loaded=loaded, spec=architecture(loaded.module),
        preprocess=preprocess, head=head, settings=settings, objective=objective, stages=stages,
        num_outputs=num_outputs, device=device, batches=batches, val_batches=val_batches,
        example=example, forward_precision=precision, channels_last=last, plans=printed, notes=notes, before=before,
    )  # fmt: skip
    job.set_target_scale(scale)
    return job


def _settings(arguments: Mapping[str, Any]) -> Settings:
    names = [name for name in Settings.__dataclass_fields__ if name in arguments]
    return Settings(**{name: arguments[name] for name in names})


def choose_device(device: Any) -> torch.device:
    """The device of a word: "auto" is a CUDA device where there is one, that of this process, else the CPU.

    Raises:
        ConfigError: not a device, or one that this machine does not have.
    """
    if device == "auto":
        return local_gpu() if torch.cuda.is_available() else torch.device("cpu")
    try:
        chosen = local_gpu() if device == "cuda" and torch.cuda.is_available() else torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"device={device!r}: expected 'auto', 'cpu', or a device of this machine ({reason})"
        ) from None
    return chosen


def check_export(export: Any) -> None:
    """Refuse an unknown export format, and one whose packages are missing, before time is spent on training."""
    if export is None:
        return
    if export != "onnx":
        raise ConfigError(f"export={export!r}: expected 'onnx', or None for no export")
    for module in ("onnx", "onnxscript", "onnxruntime"):
        need(module, "onnx", "export='onnx' (export=None does without)")


def check_cache(cache_features: Any, augment_views: Any) -> None:
    """Refuse what is no way to keep features."""
    if cache_features not in ("auto", "ram", "disk") and cache_features is not False:
        raise ConfigError(f"cache_features={cache_features!r}: expected 'auto', 'ram', 'disk' or False")
    number = isinstance(augment_views, int) and not isinstance(augment_views, bool) and augment_views >= 1
    if augment_views is not None and not number:
        raise ConfigError(f"augment_views={augment_views!r}: expected a whole number of 1 or more, or None")


def check_patience(settings: Settings, data: Data) -> None:
    """Early stopping needs something to watch."""
    if settings.patience is not None and data.val is None:
        raise ConfigError(
            f"patience={settings.patience} needs validation samples: give val=0.2, or val data, or patience=None"
        )


def check_kind(loaded: LoadedModel, kind: Kind) -> None:
    """Refuse texts for an image model and the like."""
    if loaded.kind is not None and loaded.kind != kind:
        raise ConfigError(f"model={loaded.source!r} takes {loaded.kind} inputs, the data holds {kind} inputs")


def count_outputs(data: Data) -> int:
    """C classes or labels; K targets for regression."""
    if data.classes is not None:
        return len(data.classes)
    targets = data.train.targets
    return 1 if targets is None or targets.ndim == 1 else targets.shape[1]


def load_any_model(model: Any, num_outputs: int, seed: int) -> tuple[LoadedModel, Any]:
    """The model of an argument; and the earlier run it comes from, or None.

    Raises:
        ConfigError: nothing of that name, or a run whose model cannot be built again.
    """
    if not isinstance(model, nn.Module) and isinstance(model, (str, Path)) and is_run(model):
        run = open_run(model)
        return LoadedModel(run.module, str(model), None, run.kind), run
    return load_model(model, num_outputs=num_outputs, seed=seed), None


def architecture(module: nn.Module) -> dict[str, Any] | None:
    """What the module can be built from again, where it can tell."""
    from pyft.models.text import TextClassifier

    return module.spec() if isinstance(module, TextClassifier) else None


def make_batches(
    data: Data, preprocess: Any, arguments: Mapping[str, Any], seed: int
) -> tuple[Batches, Batches | None]:
    """The batches to train on, and those to validate on."""
    augment = arguments["augment"]
    batches = Batches(data.train, preprocess, arguments["batch_size"], seed=seed, augment=augment)
    if augment != "none":
        next(iter(batches.epoch(0)))
    val = None if data.val is None else Batches(data.val, preprocess, EVALUATION_BATCH, shuffle=False)
    return batches, val


def first_batch(data: Data, preprocess: Any, size: int = EXAMPLE_SIZE) -> Batch:
    """A few training samples as one batch, on the CPU."""
    few = data.train.subset(range(min(size, len(data.train))))
    return next(iter(Batches(few, preprocess, size, shuffle=False, bucket=False).epoch(0)))


def _mend(model: nn.Module, inputs: Any) -> str:
    """What to do about a model that fails on inputs, said more exactly where it is a matter of element types."""
    weights = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
    if weights:
        named = ", ".join(sorted(map(str, weights)))
        return f"The model has weights in {named}: call model.float() first (precision= chooses how it is trained)."
    if isinstance(inputs, torch.Tensor) and not inputs.is_floating_point():
        return "For numbers give X.astype('float32'); for indices a model that begins with an embedding."
    return "Give a model for such inputs, or preprocess= to make others."


def try_forward(model: nn.Module, batch: Batch, device: torch.device, hint: str = "") -> torch.Tensor:
    """The logits of one batch, no trace left in the model. `hint` says more of the inputs where the model fails.

    Raises:
        ConfigError: the model fails on it, or gives NaN or inf.
    """
    try:
        with probing(model):
            logits = call_model(model, to_device(batch.inputs, device))
    except ConfigError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"model: {type(model).__name__} fails on a batch of the data, {describe_inputs(batch.inputs)}: {reason}. "
            f"{_mend(model, batch.inputs)}{hint}"
        ) from error
    if not torch.isfinite(logits).all():
        raise ConfigError(
            f"model: {type(model).__name__} gives NaN or inf for the first samples of the data, before any training: "
            "check its weights, and the scale of the inputs"
        )
    return logits


def describe_inputs(inputs: Any) -> str:
    """Names, shapes and types of a batch."""
    if isinstance(inputs, Mapping):
        return ", ".join(f"{name} {tuple(value.shape)} {_dtype(value)}" for name, value in inputs.items())
    return f"input {tuple(inputs.shape)} {_dtype(inputs)}"


def _dtype(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def to_device(inputs: Any, device: torch.device) -> Any:
    """A batch's inputs on `device`."""
    if isinstance(inputs, Mapping):
        return {name: transfer.to_device(value, device) for name, value in inputs.items()}
    return transfer.to_device(inputs, device)


def prepare_head(
    loaded: LoadedModel,
    head: str | None,
    num_outputs: int,
    example: Batch,
    device: torch.device,
    seed: int,
    earlier: Any,
    classes: list[str] | None,
    hint: str = "",
) -> HeadReport:
    """Fit the head; draw it anew where it was trained for other classes."""
    try_forward(loaded.module, example, device, hint)
    if head is None:
        return HeadReport(None, None, None, "", False, "head=None: the model's own outputs are used")
    inputs = to_device(example.inputs, device)
    report = fit_head(loaded.module, num_outputs, inputs, head=head, seed=seed)
    if report.replaced or report.name is None:
        return report
    if earlier is not None and earlier.classes == classes:
        return report
    if earlier is None and loaded.kind != "text":
        return report
    layer = loaded.module.get_submodule(report.name)
    init_linear(layer, seed)
    why = "new" if earlier is None else "drawn anew, the earlier run had other classes"
    message = f"head '{report.name}' is {why}: weight {report.new_shape}, {INIT}"
    return HeadReport(report.name, report.old_shape, report.new_shape, INIT, True, message)


def target_scale(
    wanted: Any, data: Data, model: nn.Module, batches: Batches, device: torch.device, head: HeadReport, earlier: Any
) -> tuple[TargetScale | None, str | None]:
    """The unit in which a regression model is to give its outputs, and a note; see `choose_scale`."""
    if data.problem != "regression":
        return None, None
    assert data.train.targets is not None
    few = batches.make([np.arange(min(SCALE_PROBE, len(data.train)))], 0)
    return choose_scale(
        wanted, data.train.targets, lambda: try_forward(model, next(few), device).float().cpu(),
        earlier=None if earlier is None else earlier.target_scale,
        continues=earlier is not None and earlier.problem == "regression" and not head.replaced,
    )  # fmt: skip


def check_example_loss(objective: Objective, logits: torch.Tensor, example: Batch, device: torch.device) -> None:
    """A loss that does not fit shows before training."""
    assert example.targets is not None
    objective(logits, example.targets.to(device))


def check_metric(settings: Settings, data: Data, logits: torch.Tensor, example: Batch) -> None:
    """Refuse a metric that the evaluation of this problem does not give."""
    values = evaluate_batches(lambda _: logits, [example], data.problem, data.classes).values
    if data.val is not None and settings.metric not in values:
        raise ConfigError(f"metric={settings.metric!r}: expected one of {', '.join(values)} for {data.problem}")


def choose_stages(arguments: Mapping[str, Any], head: HeadReport, notes: list[str]) -> list[Stage]:
    """The stages of the strategy; "gradual" is "full" for a model without a layer that is the head."""
    strategy = arguments["strategy"]
    if head.name is None and strategy == "gradual":
        notes.append("strategy 'gradual' is 'full' here: no layer was found that is the head")
        strategy = "full"
    return make_stages(strategy, arguments["epochs"], head.name, arguments["freeze"])


def try_plans(model: nn.Module, stages: list[Stage]) -> dict[str, FreezePlan]:
    """The plan of every stage. Nothing is frozen yet.

    Raises:
        ConfigError: a name that matches nothing, or a stage in which nothing trains.
    """
    plans = {}
    for stage in stages:
        plan = make_plan(model, stage.freeze, draft=True)
        if not plan.num_trainable:
            raise ConfigError(
                f"freeze{'' if callable(stage.freeze) else f'={stage.freeze!r}'}: "
                f"all parameters are frozen in stage '{stage.name}', so nothing can train; "
                "freeze fewer"
            )
        plans[stage.name] = plan
    return plans


def model_fingerprint(job: Job) -> str:
    """Weights and names for a model that is loaded by name; names and shapes for one that the user builds."""
    return fingerprint_state(job.model, values=job.loaded.source is not None)


def choose_forward_precision(
    model: nn.Module, data: Data, preprocess: Any, settings: Settings, stages: list[Stage], device: torch.device
) -> tuple[str, str | None]:
    """The precision of passes without gradient (frozen features, validation), and a note where bf16 was found faster.

    "auto" tries a real batch where there are enough such passes to win back the time.
    """
    if settings.precision != "auto":
        return settings.precision, None
    passes = data.val is not None or any(stage.kind == "head" for stage in stages)
    if not passes or len(data.train) < WORTH_A_PROBE or bf16_hardware(device) is None:
        return "fp32", None
    inputs = to_device(first_batch(data, preprocess, PROBE_BATCH).inputs, device)

    def probe(precision: str) -> None:
        with torch.inference_mode(), autocast(device, precision):
            call_model(model, inputs)

    with probing(model):
        precision, reason = choose_precision("auto", device, probe)
    return precision, f"passes without gradient: {reason}" if precision == "bf16" else None


def choose_memory_layout(
    model: nn.Module, data: Data, preprocess: Any, settings: Settings, stages: list[Stage], device: torch.device
) -> tuple[bool, str | None]:
    """Whether to train with channels last, tried on a few samples where the job is long enough to win the time back."""
    samples = len(data.train) * sum(stage.epochs for stage in stages)
    if samples < WORTH_A_TRIAL or not convolution_weights(model):
        return False, None
    batch = first_batch(data, preprocess, TRIAL_BATCH)
    inputs = to_device(batch.inputs, device)

    def forward() -> torch.Tensor:
        with autocast(device, settings.precision):
            return call_model(model, inputs)

    return choose_layout(model, forward, device, samples // TRIAL_BATCH)


@contextlib.contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """bf16 autocast on `device` where the precision is "bf16"; nothing otherwise."""
    if precision != "bf16":
        yield
        return
    with torch.autocast(device.type, dtype=torch.bfloat16):
        yield
