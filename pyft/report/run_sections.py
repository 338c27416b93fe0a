"""What was tuned, how to repeat it, what it took, and how it learned."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pyft.report.facts import RunFacts
from pyft.report.markup import Html, element, foreign, join
from pyft.report.section import (
    Section,
    bar,
    code,
    details,
    facts_list,
    figure,
    paragraph,
    seconds,
    size,
    spoken,
    table,
)
from pyft.report.svg import Series, line_chart, number

SHORT = 12
SHARED_SCALE = ("accuracy", "f1", "precision", "recall", "match")
"""Metrics whose names end like this lie between 0 and 1, and share a diagram."""


def repeat_section(facts: RunFacts) -> Section:
    """What was tuned on what, and the commands that do it again."""
    config, data, model = facts.config, facts.config.get("data", {}), facts.config.get("model", {})
    arguments, head = config.get("arguments", {}), model.get("head", {})
    counts = [
        f"{data[f'num_{role}']:,} {word}"
        for role, word in (("train", "training"), ("val", "validation"), ("test", "test"))
        if data.get(f"num_{role}")
    ]
    pairs = [
        ("model", join([model.get("class"), foreign(model.get("source") or "a module given from Python")], ", ")),
        ("head", _head(head)),
        ("data", _source(arguments.get("data"))),
        ("samples", ", ".join(counts)),
        ("classes", f"{len(facts.classes):,}" if facts.classes else None),
        ("columns", _some(data.get("columns"))),
        ("strategy", _strategy(arguments.get("strategy"))),
        ("seed", _plain(arguments.get("seed"))),
        ("fingerprints", _fingerprints(model.get("fingerprint"), data.get("fingerprint"))),
    ]
    repeat = config.get("repeat", {})
    parts: list[Any] = [facts_list(pairs)]
    if repeat.get("python"):
        parts += [element("h3", "To repeat it in Python"), code(f"import pyft\n\n{repeat['python']}", wrap=True)]
        if repeat.get("shell"):
            parts += [element("h3", "or in the shell"), code(repeat["shell"], wrap=True)]
        elif "<" in repeat["python"]:
            parts.append(paragraph("What stands in angle brackets was given from Python: give the same again.",
                                   class_="quiet"))  # fmt: skip
    # Stages have epochs of their own; those of the settings count for none of them then.
    staged = isinstance(arguments.get("strategy"), list)
    settings = [
        (element("code", name), _plain(value))
        for name, value in config.get("settings", {}).items()
        if not (staged and name == "epochs")
    ]
    settings += [
        (element("code", name), _plain(config.get(name)))
        for name in ("forward_precision", "channels_last")
        if config.get(name) is not None
    ]
    if settings:
        parts.append(details("All training settings", table(("setting", "value"), settings)))
    return Section("repeat", "What was tuned", join(parts))


def _head(head: dict[str, Any]) -> Html | None:
    if not head.get("name"):
        return None
    shape = ", weight (" + ", ".join(map(str, head["new_shape"])) + ")" if head.get("new_shape") else ""
    return join(["layer ", foreign(head["name"]), shape, ", drawn anew" if head.get("replaced") else ""])


def _source(value: Any) -> Html | None:
    if isinstance(value, dict):
        return join([join([f"{role}: ", foreign(part)]) for role, part in value.items()], "; ")
    return None if value is None else foreign(_plain(value))


def _some(names: Any, limit: int = 12) -> Html | None:
    if not names:
        return None
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return join([join([foreign(name) for name in names[:limit]], ", "), more])


def _fingerprints(model: Any, data: Any) -> Html | None:
    words = [f"{what} {value[:SHORT]}" for what, value in (("model", model), ("data", data)) if value]
    return element("code", ", ".join(words)) if words else None


def _strategy(value: Any) -> str:
    """A word, or the stages: 'head: 2 epochs, encoder* frozen; full: 4 epochs, learning rate times 0.01'."""
    if isinstance(value, list) and all(isinstance(stage, dict) and "name" in stage for stage in value):
        return "; ".join(map(_stage, value))
    return _plain(value)


def _stage(stage: dict[str, Any]) -> str:
    parts = []
    if stage.get("epochs") is not None:
        parts.append(f"{stage['epochs']} epoch{'s' * (stage['epochs'] != 1)}")
    if stage.get("freeze") is not None:
        parts.append(f"{_plain(stage['freeze'])} frozen")
    if stage.get("lr_scale", 1.0) != 1.0:
        parts.append(f"learning rate times {stage['lr_scale']}")
    return f"{stage['name']}: {', '.join(parts) or 'all trains'}"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}={_plain(part)}" for key, part in value.items())
    return "none" if value is None else str(value)


# ---------------------------------------------------------------- what trained, and what it took


def cost_section(facts: RunFacts) -> Section:
    """The plan of each stage against what it took."""
    stages = _stages(facts)
    predicted = {one["name"]: one for one in (facts.cost.get("predicted") or {}).get("stages", [])}
    heads = ["stage", "epochs", "trains", "", "learning rate", "took"] + ["predicted"] * bool(predicted)
    rows = []
    for stage in stages:
        trained, total = stage.get("num_trainable"), stage.get("num_total")
        share = trained / total if trained is not None and total else None
        took = sum((stage.get("seconds") or {}).values()) if stage.get("seconds") else None
        row = [
            foreign(stage.get("name", "")),
            (_plain(stage.get("epochs")), stage.get("epochs") or 0),
            (f"{trained:,} of {total:,}" if share is not None else "n/a", trained or 0),
            (join([bar(share), f" {share:.2%}"]) if share is not None else "", share or 0, "left"),
            (number(stage.get("lr")), stage.get("lr") or 0),
            (seconds(took), took or 0),
        ]
        if predicted:
            said = predicted.get(stage.get("name", ""), {}).get("seconds")
            row.append((seconds(said), said or 0))
        rows.append(row)
    parts: list[Any] = [table(heads, rows, caption="Stages")] if rows else []
    parts += [_against_plan(facts), _time(facts), _memory(facts, list(predicted.values()))]
    if facts.plan:
        parts.append(details("The plan, layer by layer", code(facts.plan)))
    return Section("cost", "What trained, and what it took", join(parts))


def _stages(facts: RunFacts) -> list[dict[str, Any]]:
    """What ran; of an older or an unfinished run, what was to run."""
    return facts.cost.get("stages") or facts.config.get("stages") or []


def _against_plan(facts: RunFacts) -> Html | None:
    said = facts.timings.get("predicted")
    if said is None:
        return paragraph(
            element("code", "pyft.plan"), " was not asked before this run, so there is no prediction to compare with.",
            class_="quiet",
        )  # fmt: skip
    took = sum(facts.timings.get(part, 0.0) for part in ("features", "train", "validate"))
    ratio = f", {took / said:.2f} times as long" if said else ""
    return paragraph(
        element("code", "pyft.plan"),
        f" said {seconds(said)} for features, training and validation; it took {seconds(took)}{ratio}.",
    )


def _time(facts: RunFacts) -> Html | None:
    spent = {part: value for part, value in facts.timings.items() if part != "predicted"}
    if not spent:
        return None
    total = sum(spent.values())
    rows: list[tuple[Any, ...]] = [
        (part, (seconds(value), value), (bar(value / total if total else 0.0), value, "left"))
        for part, value in spent.items()
    ]
    rows.append((element("strong", "in all"), (element("strong", seconds(total)), total), ("", total, "left")))
    return table(("part of the run", "time", ""), rows, caption="Time")


def _memory(facts: RunFacts, predicted: list[dict[str, Any]]) -> Html | None:
    memory = facts.cost.get("memory") or {}
    pairs: list[tuple[str, Any]] = []
    if memory.get("peak"):
        pairs.append(("largest memory of the process", f"{size(memory['peak'])}, {size(memory.get('before'))} before"))
    if memory.get("device_peak"):
        pairs.append(("largest memory on the GPU", size(memory["device_peak"])))
    for stage in predicted:
        kept = f", and {size(stage.get('nbytes'))} of stored features" if stage.get("kept") else ""
        pairs.append((f"predicted for '{stage['name']}'", f"{size(stage.get('saved'))} kept for backward{kept}"))
    return facts_list(pairs) if pairs else None


# ---------------------------------------------------------------- curves


def curves_section(facts: RunFacts) -> Section | None:
    """Loss, metrics and learning rate over the epochs."""
    rows = facts.history
    if not rows:
        return None
    epochs = [float(row.get("epoch") or place + 1) for place, row in enumerate(rows)]
    breaks = [epochs[i] - 0.5 for i in range(1, len(rows)) if rows[i].get("stage") != rows[i - 1].get("stage")]
    metrics = [key for key in dict.fromkeys(key for row in rows for key in row) if key.startswith("val_")]
    groups = {"loss": [key for key in ("train_loss", "val_loss") if any(key in row for row in rows)]}
    for key in metrics:
        if key != "val_loss":
            shared = "share" if key.endswith(SHARED_SCALE) else key
            groups.setdefault(shared, []).append(key)
    groups["learning rate"] = ["lr"] if any(row.get("lr") is not None for row in rows) else []
    figures = []
    for title, keys in groups.items():
        series = [
            Series(spoken(key), epochs, [row.get(key) for row in rows], f"c{place % 6}")
            for place, key in enumerate(keys)
        ]
        if series:
            chart = line_chart(series, f"{title} over the epochs", breaks=breaks, from_zero=title == "learning rate")
            figures.append(figure(chart))
    parts: list[Any] = [element("div", *figures, class_="figures"), _best(facts)]
    if breaks:
        parts.append(paragraph("Dotted lines: a new stage begins.", class_="quiet"))
    heads = list(dict.fromkeys(key for row in rows for key in row))
    numbers = [[_number_cell(row.get(key)) for key in heads] for row in rows]
    parts.append(details("The numbers", table([spoken(head) for head in heads], numbers)))
    return Section("curves", "How it learned", join(parts))


def _number_cell(value: Any) -> Any:
    return (number(value), value) if isinstance(value, float) else _plain(value)


def _best(facts: RunFacts) -> Html | None:
    best, metric = facts.metrics.get("best_epoch"), facts.metrics.get("metric")
    if best is None:
        return paragraph("Nothing was held out, so the weights are those of the last epoch.", class_="quiet")
    return paragraph(f"The weights are those of epoch {best}, the best by {spoken(str(metric))} on validation samples.")


# ---------------------------------------------------------------- notes, versions


def notes_section(facts: RunFacts) -> Section | None:
    """What was said about data and model."""
    if not facts.notes:
        return None
    return Section("notes", "Notes on data and model", element("ul", *(element("li", foreign(n)) for n in facts.notes)))


def versions_section(facts: RunFacts) -> Section | None:
    """Versions, machine and files."""
    environment = facts.environment
    if not environment:
        return None
    versions = {name: environment.get(name) for name in ("pyft", "python", "torch")} | environment.get("packages", {})
    commit = environment.get("commit")
    pairs = [
        ("versions", ", ".join(f"{name} {value}" for name, value in versions.items() if value)),
        ("machine", _joined([environment.get("processor"), environment.get("platform")])),
        ("instruction set", environment.get("instruction_set")),
        ("device", environment.get("device")),
        ("threads", f"{environment.get('threads')} of {environment.get('cpu_count')} processors"),
        ("commit", element("code", commit) if commit else None),
        ("started", environment.get("started")),
    ]
    files = [(element("code", foreign(name)), (size(nbytes), nbytes)) for name, nbytes in facts.files]
    return Section("versions", "Versions and files", join([
        facts_list(pairs), details("Files of the run", table(("file", "size"), files)),
    ]))  # fmt: skip


def _joined(words: Iterable[Any]) -> str:
    return ", ".join(str(word) for word in words if word)
