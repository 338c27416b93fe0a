"""A run in several processes: all find out the same, the first one writes, all give back the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pyft.errors import ConfigError
from pyft.freezing.plan import FreezePlan, make_from, make_plan
from pyft.freezing.selection import Selection
from pyft.job import Job, inspect
from pyft.result import Result
from pyft.run_dir import FREE_ARGUMENTS, RunDir, fingerprint_state
from pyft.stage_rows import freeze_for
from pyft.training.processes import Processes
from pyft.training.stages import Stage


def inspect_together(arguments: Mapping[str, Any], processes: Processes) -> Job:
    """What `inspect` gives in this process, once all have the same; with an error in one, all raise it.

    Raises:
        ConfigError: the processes were given other arguments, data or models, or batches too small to be cut.
        As `inspect`.
    """
    jobs: list[Job] = []
    try:
        processes.together(lambda: jobs.append(inspect(arguments)))
        if processes.several:
            _check_batch_size(arguments["batch_size"], processes.count)
    except BaseException:
        for job in jobs:
            job.before.put_back()
        raise
    return jobs[0]


def _check_batch_size(batch_size: int, count: int) -> None:
    if batch_size < count:
        raise ConfigError(
            f"batch_size={batch_size} is that of all processes together, and cannot be cut over {count} of them: "
            f"give batch_size={count} or more, or start fewer processes"
        )


def check_alike(job: Job, config: Mapping[str, Any], processes: Processes) -> None:
    """Refuse processes that would train on something else.

    Raises:
        ConfigError: all that differs is named.
    """
    if not processes.several:
        return
    free = (*FREE_ARGUMENTS, "device", "model", "data")
    facts = {f"argument {name}": value for name, value in config["arguments"].items() if name not in free}
    facts |= {"data": config["data"]["fingerprint"], "model": fingerprint_state(job.model, values=False)}
    everyone = processes.all_gather(facts)
    for rank, other in enumerate(everyone):
        differing = [name for name, value in everyone[0].items() if other[name] != value]
        if differing:
            raise ConfigError(
                f"process {rank} of {len(everyone)}, counted from 0, has another {', '.join(differing)} than process "
                "0: give all of them the same; finetune cuts each batch over the processes by itself"
            )


def start_together(begin: Callable[[], RunDir], job: Job, processes: Processes) -> RunDir:
    """The folder of the run, claimed by the first process, with its weights and what it has decided by timing."""
    runs: list[RunDir] = []

    def started() -> tuple[Any, ...]:
        runs.append(begin())
        return runs[0].path, job.forward_precision, job.channels_last, job.target_scale

    path, precision, last, scale = processes.on_first(started)
    if not processes.first:
        job.forward_precision, job.channels_last = precision, last
        job.set_target_scale(scale)
        runs.append(RunDir(path, None, first=False))
    processes.share((*job.model.parameters(), *job.model.buffers()))
    return runs[0]


def freeze_together(job: Job, stage: Stage, run: RunDir, processes: Processes) -> FreezePlan:
    """Freeze the model for a stage; rows that train are those that the first process has chosen."""
    if not processes.several or not isinstance(stage.freeze, Mapping):
        return freeze_for(job, stage, run.path if run.first else None)
    plans: list[FreezePlan] = []

    def choose() -> dict[str, Any]:
        plans.append(freeze_for(job, stage, run.path))
        return plans[0].parts

    parts = processes.on_first(choose)
    if processes.first:
        return plans[0]
    draft = make_plan(job.model, stage.freeze, draft=True)
    return make_from(job.model, Selection(draft.names, frozenset(draft.named_modules)), parts).apply(job.model)


def same_result(conclude: Callable[[], Result], own: Result, processes: Processes) -> Result:
    """What the first process makes of its result; the others get it with their own model."""
    if not processes.several:
        return conclude()
    concluded: list[Result] = []

    def bare() -> Result:
        concluded.append(conclude())
        return replace(concluded[0], model=None, plan=None, preprocess=None)  # type: ignore[arg-type]

    given = processes.on_first(bare)
    if processes.first:
        return concluded[0]
    return replace(given, model=own.model, plan=own.plan, preprocess=own.preprocess)
