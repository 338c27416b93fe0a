"""What follows training: metrics on held-out samples, and the file that is proven on them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pyft.cached_features import Call
from pyft.data.batches import Batches
from pyft.errors import ExportError, PyftError
from pyft.evaluation.held_out import HeldOut
from pyft.evaluation.metrics import Metrics
from pyft.evaluation.predict import evaluate_batches
from pyft.export.parity import Known, Parity
from pyft.export_model import Exported, run_metadata, write_onnx
from pyft.freezing.plan import FreezePlan
from pyft.job import EVALUATION_BATCH, Job, autocast, to_device
from pyft.models.call import call_model
from pyft.models.saved import save_model
from pyft.proof import KeptLogits, prove
from pyft.record import held_out_facts
from pyft.result import MAIN_METRICS, Result
from pyft.run_dir import RunDir
from pyft.samples import Batch
from pyft.shared_batches import IndexedBatches, shared_scores
from pyft.training.history import History
from pyft.training.processes import ALONE, Processes
from pyft.training.progress import Progress


def stage_evaluation(
    job: Job, call: Call, batches: IndexedBatches, processes: Processes = ALONE
) -> Callable[[], dict[str, float]]:
    """What the loop calls after each epoch."""

    def evaluate() -> dict[str, float]:
        with autocast(job.device, job.forward_precision):
            values = score(job, call, batches, processes=processes).values
        return {name: value for name, value in values.items() if name in (*MAIN_METRICS, job.settings.metric)}

    return evaluate


def score(
    job: Job,
    call: Call,
    batches: IndexedBatches,
    kept: KeptLogits | None = None,
    noted: HeldOut | None = None,
    processes: Processes = ALONE,
) -> Metrics:
    """Metrics of the model as it is; `kept` keeps the logits, `noted` notes the scores, in the first process."""
    keep = KeptLogits(0) if kept is None else kept

    def logits(inputs: Any) -> Any:
        return call(job.model, to_device(inputs, job.device))

    def evaluate(run: Callable[[Any], Any], made: Iterable[Batch]) -> Metrics:
        return evaluate_batches(
            lambda inputs: job.in_own_unit(keep.put(run(inputs))),
            keep.batches(made),
            job.data.problem,
            job.data.classes,
            None if noted is None else noted.update,
        )

    if processes.several:
        return shared_scores(logits, batches, processes, lambda made: evaluate(lambda known: known, made))
    return evaluate(logits, batches.make(batches.index(0), 0))


def logits_to_keep(job: Job) -> KeptLogits | None:
    """What the proof need not compute again: the logits of the validation set, where the CPU computes them."""
    return KeptLogits(len(job.data.val)) if job.data.val is not None and job.device.type == "cpu" else None


def evaluate_tuned(
    job: Job,
    run: RunDir,
    history: History,
    plan: FreezePlan,
    kept: KeptLogits | None = None,
    processes: Processes = ALONE,
) -> Result:
    """Final metrics in fp32, the precision of the exported file; weights and metrics are on disk afterwards."""
    data = job.data
    job.model.eval()
    with timed(run.seconds, "evaluate"):
        if run.first:
            save_model(run / "model.safetensors", job.model)
        found: dict[str, Metrics] = {}
        for role, samples, keeper in (("val", data.val, kept), ("test", data.test, None)):
            if samples is not None:
                noted = HeldOut(data.problem, data.classes)
                batches = Batches(samples, job.preprocess, EVALUATION_BATCH, shuffle=False)
                found[role] = score(job, call_model, batches, keeper, noted, processes)
                if not run.first:
                    continue
                run.write("held_out.json", held_out_facts(noted, samples, role))
    metrics = {f"{role}_{name}": value for role, scores in found.items() for name, value in scores.values.items()}
    detail = found.get("test", found.get("val"))
    run.write(
        "metrics.json",
        {"metric": history.metric, "best_epoch": history.best_epoch, **{r: s.to_dict() for r, s in found.items()}},
    )
    run.set_state("tuned")
    return Result(
        model=job.model,
        metrics=metrics,
        history=history.rows,
        per_class=[] if detail is None else detail.per_class,
        confusion=None if detail is None else detail.confusion,
        classes=data.classes,
        kind=data.kind,
        problem=data.problem,
        plan=plan,
        run_dir=run.path,
        seconds=run.seconds,
        notes=(*job.notes, *history.notes),
        preprocess=job.preprocess,
        data_source=held_out_source(job),
        columns=data.train.columns,
        target_scale=job.target_scale,
        label_column=job.arguments["label_column"],
    )


def held_out_source(job: Job) -> str | None:
    """Where the samples are that the model was not trained on, if they are in a file or folder of their own."""
    given = job.arguments["data"]
    if isinstance(given, dict):
        named = given.get("test", given.get("val"))
        return str(named) if isinstance(named, (str, Path)) else None
    if job.data.source is None or not Path(job.data.source).is_dir():
        return job.data.source
    places = [Path(job.data.source, role + suffix) for role in ("test", "val") for suffix in ("", ".tsv", ".csv")]
    return str(next((place for place in places if place.exists()), job.data.source))


def export_tuned(job: Job, run: RunDir, result: Result, show: Progress, kept: KeptLogits | None = None) -> None:
    """Write model.onnx and compare it with the model on all held-out samples.

    Raises:
        ExportError: with the place of the tuned weights, which are safe.
    """
    path = run / "model.onnx"
    exported = Exported(
        job.model, job.data.kind, job.data.problem, job.data.classes, job.preprocess, job.target_scale,
        run_metadata(run.path, result.metrics),
    )  # fmt: skip
    job.model.cpu()
    try:
        with timed(run.seconds, "export"):
            write_onnx(exported, job.example.inputs, path)
        with timed(run.seconds, "parity"):
            parity = compare(job, path, run / "parity.json", None if kept is None else kept.known())
    except PyftError as error:
        raise ExportError(
            f"{error}. The tuned model and its metrics are safe: {run / 'model.safetensors'}, {run / 'metrics.json'}; "
            "tune with export=None to do without the ONNX file"
        ) from error
    finally:
        job.model.to(job.device)
    show.note(f"onnx: {parity}")
    result.onnx, result.parity = path, parity.to_dict()


def compare(job: Job, path: Path, report: Path, known: Known | None) -> Parity:
    """The exported file against the model on all validation samples, or training samples where there are none."""
    samples, known = (job.data.train, None) if job.data.val is None else (job.data.val, known)
    return prove(
        path, job.model, samples, job.preprocess, problem=job.data.problem, classes=job.data.classes, report=report,
        known=known, batch_size=EVALUATION_BATCH, to_value=job.in_own_unit,
    )  # fmt: skip


@contextlib.contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Add the time spent inside to `seconds[part]`."""
    begin = time.perf_counter()
    try:
        yield
    finally:
        seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - begin
