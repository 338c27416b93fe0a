"""The story: inspect, plan, train, evaluate, export. Reads from top to bottom."""

from __future__ import annotations

import inspect as python_inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from pyft import run_dir
from pyft.cached_features import Call, FeatureKeeper
from pyft.core.loader import load_core_for
from pyft.core.memory import resident_memory
from pyft.data.table_preprocess import TablePreprocess
from pyft.describe import describe, describe_source, is_description, repeat_commands
from pyft.errors import CheckpointError, ConfigError, PyftError
from pyft.evaluation.pictures import can_draw, draw_run
from pyft.freezing.plan import FreezePlan, make_plan
from pyft.job import Job, model_fingerprint
from pyft.models.call import call_model
from pyft.models.saved import load_state, save_model
from pyft.plan import recalled, tell_prediction
from pyft.preprocess import spec_of
from pyft.record import add_plans, write_cost, write_page
from pyft.result import Result
from pyft.run_dir import RunDir
from pyft.shared_batches import IndexedBatches, SharedBatches
from pyft.shared_run import check_alike, freeze_together, inspect_together, same_result, start_together
from pyft.training.checkpoint import load_checkpoint
from pyft.training.history import History
from pyft.training.layout import channels_last
from pyft.training.loop import StageSetup, train
from pyft.training.processes import Processes, joined
from pyft.training.progress import Progress, make_progress
from pyft.training.settings import describe as describe_settings
from pyft.training.stages import Stage
from pyft.tuned import evaluate_tuned, export_tuned, logits_to_keep, stage_evaluation, timed
from pyft.untouched import given_back_on_error
from pyft.version import __version__


def finetune(
    model: nn.Module | str | Path,
    data: Any,
    *,
    task: str = "auto",
    val: float | int | None = 0.2,
    stratify: bool = True,
    class_weight: Literal["balanced"] | Sequence[float] | None = None,
    augment: str | Callable[[torch.Tensor], torch.Tensor] = "none",
    head: str | None = "auto",
    strategy: str | Sequence[Stage] = "gradual",
    freeze: Any = None,
    preprocess: Any = None,
    epochs: int = 5,
    lr: float | Literal["auto"] = "auto",
    batch_size: int = 32,
    accumulate: int = 1,
    optimizer: str = "adamw",
    weight_decay: float = 0.01,
    schedule: str = "cosine",
    warmup: float | int = 0.1,
    clip: float | None = 1.0,
    precision: str = "auto",
    loss: str | Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = "auto",
    label_smoothing: float = 0.0,
    scale_targets: bool | Literal["auto"] = "auto",
    metric: str = "auto",
    patience: int | None = None,
    max_length: int | None = None,
    cache_features: Literal["auto", "ram", "disk", False] = "auto",
    augment_views: int | None = None,
    seed: int = 0,
    out: str | os.PathLike[str] = "runs/auto",
    resume: bool | Literal["auto"] = "auto",
    export: Literal["onnx"] | None = "onnx",
    device: str | torch.device = "auto",
    progress: bool = True,
    text_column: str | None = None,
    label_column: str | None = None,
) -> Result:
    """Tune a model on labelled data, evaluate it, and export it to an ONNX file that is checked against it.

    Every fault in the arguments and the data is found before anything is trained or written. A run that was stopped,
    by Ctrl-C, SIGKILL or a power cut, goes on when the same call is made again with its folder as `out`, and ends
    with the same weights, bit for bit, as if it had not been stopped.

    Under torchrun the processes train one model together, each on its share of every batch, by DistributedDataParallel;
    all make the same call and get the same result, and an error in one is raised in all (docs/distributed.md).

    Args:
        model: "hf:<folder, model package or hub id>", the folder of an earlier run, or any nn.Module, which is tuned
            in place and gets a new head where its outputs do not fit. It is put back as it came if something is wrong
            with the arguments; once training has begun, it is not.
        data: a .tsv or .csv file, a folder of images or of tables, (X, y), a Dataset, a DataLoader, a DataFrame, or a
            dict of these under "train", "val", "test". It is not changed.
        task: "auto", or kind and problem: "text-classification", "image-multilabel", "regression", ...
        val: share (below 1) or number of training samples held out where `data` brings no validation set; 0: none, and
            the last epoch is the best.
        stratify: hold out the same share of each class.
        class_weight: None, "balanced", or one number per class.
        augment: for images "none", "flip", "crop" or "strong", or a function of one sample.
        head: "auto", the name of the layer that gives the outputs, or None to use the model's outputs as they are.
        strategy: "head" trains the head only, "full" everything, "gradual" the head for a third of the epochs and then
            everything; or a list of `pyft.Stage`.
        freeze: what stays frozen, as `pyft.freeze` takes it; with {glob: pyft.Rows(...)} weights train in part, their
            rows chosen on the first training batches when a stage begins.
        preprocess: "table" or a `pyft.TablePreprocess`: numbers scaled and gaps filled, words one-hot, as tables with
            words or gaps get it anyway; a function of one raw sample (PIL image, array or row) that gives a Tensor; or
            an object with a `spec()` such as `pyft.ImagePreprocess`. All but functions are kept with the
            model.
        epochs: passes over the training data, over all stages.
        lr: learning rate; "auto" chooses by model, stage and optimizer, and says so.
        batch_size: samples per batch, of all processes together. accumulate: batches per optimizer step.
        optimizer: "adamw" or "sgd". weight_decay: not applied to biases and norms.
        schedule: "cosine", "linear", "constant" or "plateau". warmup: share or number of steps.
        clip: largest L2 norm of the gradient; None for none.
        precision: "fp32", "bf16", or "auto": bf16 where this machine has it and it is found faster.
        loss: "auto", a name, or a function (logits, targets) that gives the mean.
        label_smoothing: in [0, 1).
        scale_targets: for regression: train on (y - mean) / std of the training targets; predictions and metrics are
            in their own unit. "auto": where the deviation is outside [0.1, 10] or the mean beyond 10.
        metric: picks the best epoch; "auto" is macro_f1, or rmse for regression.
        patience: epochs without improvement that end a stage.
        max_length: tokens per text.
        cache_features: what comes out of the frozen part of the model is computed once per sample and kept in memory,
            or in files of the run where memory is short ("auto"); in memory ("ram"); in files under PYFT_CACHE_DIR,
            which later runs on the same samples find again ("disk"); False computes it anew at each step.
        augment_views: K randomly changed copies of each sample whose features are kept: epoch e takes copy e mod K.
            None: with random changes, nothing is kept.
        seed: of the split, the order, the new head, augmentation and dropout.
        out: folder of the run, new or empty; a last part "auto" becomes <date>-<time>-<task>.
        resume: "auto" continues an unfinished run in `out`, or starts one; True asks for one; False never continues.
            A finished run, and a run of other arguments or data, is never written over.
        export: "onnx" or None.
        device: "auto" is the GPU where there is one; of several processes each takes its own, by LOCAL_RANK.
        progress: show progress on standard error.
        text_column, label_column: names of the columns of a table.

    Returns:
        The tuned model, its metrics, and where everything is; see `pyft.Result`.

    Raises:
        DataError: the data cannot be used.
        ConfigError: an argument, or a combination, is not possible; `out` holds another run; or the processes of
            torchrun make different calls.
        MissingExtraError: a package that is needed is not installed.
        CoreError: the compiled core cannot be used, and `PYFT_CORE=require`.
        CheckpointError: the disk is full, or a checkpoint is damaged. The last good one is kept.
        ExportError: the exported file does not behave like the model. The tuned model is already in the run folder.
    """
    arguments = dict(locals())
    with joined(device) as processes:
        return run_job(arguments, processes)


def run_job(arguments: dict[str, Any], processes: Processes) -> Result:
    """The story of `finetune`, in one process or in each of several."""
    seconds: dict[str, float] = {}
    memory = resident_memory()
    unfinished = processes.on_first(lambda: run_dir.look_at(arguments["out"], arguments["resume"]))
    with timed(seconds, "load"):
        job = inspect_together(arguments, processes)
        config = make_config(job)
    with given_back_on_error(job.before):
        check_alike(job, config, processes)
        with timed(seconds, "core"):  # the first use on a machine compiles it
            load_core_for(job.device.type)
        run = start_together(lambda: start(job, config, unfinished, processes.count), job, processes)
    run.seconds = seconds
    show = make_progress(arguments["progress"] and processes.first)
    try:
        for line in [*job.notes, *plan_lines(job), f"run: {run.path}{', continued' * bool(unfinished)}"]:
            show.note(line)
        history, plan = train_stages(job, run, show, processes, resumed=unfinished is not None)
        kept = logits_to_keep(job) if arguments["export"] is not None else None
        result = evaluate_tuned(job, run, history, plan, kept, processes)

        def conclude() -> Result:
            if arguments["export"] is not None:
                export_tuned(job, run, result, show, kept)
            if (predicted := tell_prediction(config, run.seconds)) is not None:
                result.notes = (*result.notes, predicted)
                show.note(predicted)
            write_cost(run, history, recalled(config), memory, job.device)
            finish(run, result)
            return result

        result = same_result(conclude, result, processes)
        show.note("seconds: " + ", ".join(f"{part} {spent:.1f}" for part, spent in run.seconds.items()))
        return result
    except Exception as error:
        if run.first and unfinished is None and not isinstance(error, CheckpointError) and nothing_trained(run):
            run.discard()
        raise
    finally:
        show.close()
        run.release()


def resume(path: str | os.PathLike[str], *, progress: bool = True) -> Result:
    """Continue the unfinished run in the folder `path` with what its config.json says.

    Raises:
        ConfigError: not a run, a finished one, or one whose model, data or functions only the caller has.
        As `finetune`.
    """
    if run_dir.is_run(path) and run_dir.read_state(path) == "finished":
        raise ConfigError(f"{os.fspath(path)} is finished: there is nothing to resume; see its report.html")
    arguments = run_dir.stored_arguments(path)
    if isinstance(arguments["strategy"], list):
        arguments["strategy"] = [Stage(**stage) for stage in arguments["strategy"]]
    arguments.update(out=path, resume=True, progress=progress)
    return finetune(**arguments)


# ---------------------------------------------------------------- plan


def plan_lines(job: Job) -> list[str]:
    """The stages, and what trains in each."""
    lines = []
    for stage in job.stages:
        lines += [f"stage '{stage.name}', {stage.epochs} epoch{'s' * (stage.epochs != 1)}:", job.plans[stage.name]]
    return lines


def make_config(job: Job) -> dict[str, Any]:
    """config.json: all that says what this run is, and how to repeat it."""
    data, defaults = job.data, keyword_defaults()
    arguments = {name: describe(value) for name, value in job.arguments.items()}
    for name in ("model", "data"):
        arguments[name] = describe_source(job.arguments[name])
    if isinstance(job.arguments["preprocess"], TablePreprocess):
        arguments["preprocess"] = job.arguments["preprocess"].spec()
    return {
        "pyft": __version__,
        "task": job.task,
        "arguments": arguments,
        "model": {
            "class": type(job.model).__qualname__,
            "source": job.loaded.source,
            "fingerprint": model_fingerprint(job),
            "head": asdict(job.head),
            "num_outputs": job.num_outputs,
            "spec": job.spec,
        },
        "data": {
            "kind": data.kind,
            "problem": data.problem,
            "fingerprint": data.fingerprint,
            "num_train": len(data.train),
            "num_val": 0 if data.val is None else len(data.val),
            "num_test": 0 if data.test is None else len(data.test),
            "columns": data.train.columns and list(data.train.columns),
        },
        "classes": data.classes,
        "settings": describe_settings(job.settings),
        "stages": [describe(stage) for stage in job.stages],
        "forward_precision": job.forward_precision,
        "channels_last": job.channels_last,
        "repeat": repeat_commands(arguments, defaults),
    }


def keyword_defaults() -> dict[str, Any]:
    """The defaults of `finetune`."""
    parameters = python_inspect.signature(finetune).parameters.values()
    return {item.name: item.default for item in parameters if item.default is not item.empty}


def start(job: Job, config: dict[str, Any], unfinished: Path | None, processes: int = 1) -> RunDir:
    """Claim the folder of the run: a new one, or that of the run to continue, whose first weights are put back."""
    if unfinished is not None:
        stored = run_dir.check_same(unfinished, config)
        run = run_dir.claim_unfinished(unfinished)
        if (run / "start.safetensors").exists():
            load_state(run / "start.safetensors", job.model)
        # What a timing decided then must not be decided otherwise now.
        job.forward_precision = stored["forward_precision"]
        job.channels_last = stored.get("channels_last", False)
        job.set_target_scale(run_dir.read_target_scale(unfinished))
        return run
    run = run_dir.create(job.arguments["out"], job.task)
    try:
        run.write("config.json", config)
        run.write("environment.json", run_dir.environment(str(job.device), processes))
        run.write("plan.txt", "\n".join(plan_lines(job)) + "\n")
        run.write("notes.txt", "".join(f"{note}\n" for note in job.notes))
        run.write("preprocess.json", spec_of(job.preprocess))
        if job.target_scale is not None:
            run.write("target_scale.json", job.target_scale.to_dict())
        if job.loaded.source is None:
            save_model(run / "start.safetensors", job.model)
        run.set_state("started")
    except PyftError:
        run.discard()
        raise
    return run


# ---------------------------------------------------------------- train


def train_stages(
    job: Job, run: RunDir, show: Progress, processes: Processes, *, resumed: bool
) -> tuple[History, FreezePlan]:
    """Train all stages. Afterwards the model holds the best weights, nothing is frozen any more, all is verified."""
    plans: dict[str, FreezePlan] = {}
    keeper = FeatureKeeper(job, run.path, show, processes)

    def prepare(stage: Stage) -> StageSetup:
        plan = freeze_together(job, stage, run, processes)
        plans[stage.name] = plan
        call: Call = call_model
        trained: IndexedBatches = job.batches
        scored: IndexedBatches | None = job.val_batches
        features = keeper.prepare(plan, stage.name, run.seconds)
        if features is not None:
            call, trained = features.call, features.batches("train", job.batches)
            if job.val_batches is not None:
                scored = features.batches("val", job.val_batches)
        return StageSetup(
            trainable=[(name, value) for name, value in job.model.named_parameters() if value.requires_grad],
            batches=SharedBatches(trained, processes, job.model) if processes.several else trained,
            call=call,
            evaluate=None if scored is None else stage_evaluation(job, call, scored, processes),
            finish=lambda: plan.verify(job.model),
        )

    last = run / "last.pt"
    continued = processes.of_first(resumed and last.exists())
    try:
        with channels_last(job.model, job.channels_last):
            history = train(
                job.model, job.stages, prepare, job.settings, job.objective,
                directory=run.path, device=job.device, progress=show, resume_from=last if continued else None,
                resume_hint=resume_hint(job, run), processes=processes,
            )  # fmt: skip
    finally:
        keeper.close()
        for plan in plans.values():
            plan.release(job.model)
    add_plans(history, plans)
    kept = job.stages[-1] if history.best_row is None else named_stage(job, history.best_row["stage"])
    run.seconds["train"] = sum(stage["seconds"]["train"] for stage in history.stages)
    run.seconds["validate"] = sum(stage["seconds"]["evaluate"] for stage in history.stages)
    return history, plans.get(kept.name) or make_plan(job.model, kept.freeze, draft=True)


def named_stage(job: Job, name: str) -> Stage:
    """The stage of that name."""
    return next(stage for stage in job.stages if stage.name == name)


def nothing_trained(run: RunDir) -> bool:
    """Whether the run has not made a step yet, so that its folder is worth nothing."""
    last = run / "last.pt"
    return not last.exists() or load_checkpoint(last)["position"]["step"] == 0


def resume_hint(job: Job, run: RunDir) -> str:
    """How the user continues the run."""
    given = [describe_source(job.arguments[name]) for name in ("model", "data")]
    if any(map(is_description, [*given, describe(job.arguments)])):
        return f"make the same call with out={str(run.path)!r}"
    return f"pyft resume {run.path}"


# ---------------------------------------------------------------- finish


def finish(run: RunDir, result: Result) -> None:
    """Write what was learned last; nothing is left that only an unfinished run needs."""
    run.write("notes.txt", "".join(f"{note}\n" for note in result.notes))
    if can_draw():
        draw_run(run.path, result.history, result.confusion, result.classes)
    run.write("timings.json", {part: round(spent, 3) for part, spent in run.seconds.items()})
    (run / "start.safetensors").unlink(missing_ok=True)
    write_page(run)
    run.set_state("finished")
