"""The exported file: its comparison with the model, and what other precisions cost."""

from __future__ import annotations

from typing import Any

from pyft.report.facts import RunFacts
from pyft.report.markup import Html, element, foreign, join
from pyft.report.section import Section, details, facts_list, paragraph, size, table
from pyft.report.svg import number


def parity_section(facts: RunFacts) -> Section | None:
    """Parity of the ONNX file, and the table of precisions where there is one."""
    parity = facts.parity
    if not parity:
        return None
    passed = parity.get("passed")
    verdict = (
        "On the samples compared, the ONNX file gives what the model gives." if passed else parity.get("failure") or ""
    )
    worst = parity.get("worst_sample") or {}
    pairs = [
        ("samples compared", f"{parity.get('num_samples', 0):,}"),
        ("same predictions", _share(parity.get("agreement"))),
        ("largest difference", f"{_small(parity.get('max_abs'))}, relative {_small(parity.get('max_rel'))}"),
        ("mean difference", _small(parity.get("mean_abs"))),
        ("allowed, relative", _small(parity.get("tolerance"))),
        ("worst sample", _worst(worst)),
        ("undecided within that", f"{parity['num_ties']:,}" if parity.get("num_ties") else None),
        ("batch sizes run", ", ".join(map(str, parity.get("batch_sizes") or [])) or None),
        ("run by", parity.get("provider")),
        ("file", _file(facts)),
    ]
    mark = element("strong", "Passed. " if passed else "Failed. ", class_="good" if passed else "bad")
    parts: list[Any] = [paragraph(mark, foreign(verdict)), facts_list(pairs)]
    if parity.get("ties"):
        rows = [
            ((str(tie.get("index")), tie.get("index") or 0), str(tie.get("torch")), str(tie.get("onnx")))
            for tie in parity["ties"]
        ]
        parts.append(details("Ties", table(("sample", "PyTorch", "ONNX"), rows)))
    parts.append(_precision(parity.get("precision") or []))
    return Section("onnx", "The ONNX file", join(parts))


def _small(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1e}"


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2%}"


def _worst(worst: dict[str, Any]) -> str | None:
    if not worst:
        return None
    values = f"{number(worst.get('torch'))} in PyTorch, {number(worst.get('onnx'))} in ONNX"
    return f"sample {worst.get('index')}, output {worst.get('output')}: {values}"


def _file(facts: RunFacts) -> str | None:
    sizes = dict(facts.files)
    return f"model.onnx, {size(sizes['model.onnx'])}" if "model.onnx" in sizes else None


def _precision(rows: list[dict[str, Any]]) -> Html | None:
    """Size, latency and metric of each precision that was tried."""
    if not rows:
        return None
    cells = []
    for row in rows:
        name = foreign(row.get("name", ""))
        cells.append([
            join([name, element("span", " kept", class_="good")]) if row.get("kept") else name,
            (size(row.get("bytes")), row.get("bytes") or 0),
            (_milliseconds(row.get("p50_ms")), row.get("p50_ms") or 0),
            (_milliseconds(row.get("p95_ms")), row.get("p95_ms") or 0),
            (number(row.get("metric")), row.get("metric") or 0),
            (number(row.get("drop")), row.get("drop") or 0),
        ])  # fmt: skip
    heads = ("precision", "size", "latency, median", "95 of 100", "metric", "drop")
    return table(heads, cells, caption="Precisions tried")


def _milliseconds(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f} ms"
