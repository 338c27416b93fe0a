"""What `pyft explain` does with the word it is given."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pyft.cli_predict import READERS, describe_model
from pyft.core.files import write_text
from pyft.errors import ConfigError, DataError


def explanation_lines(
    run: Path, word: str, *, row: int, method: str, target: str | None, html: Path | None
) -> Iterator[str]:
    """The explanation as lines; with `html`, the page it was written to at the end.

    Args:
        word: a text, a file of texts, an image, a table or an array of numbers.
        row: which sample of a file, from 0.
        target: a label; for a model without labels the number of an output.

    Raises:
        ConfigError, DataError: as `pyft.explain`; or there is no sample `row`.
    """
    from pyft.data.raw import counted
    from pyft.report.markup import Html, element, join
    from pyft.run_explain import explain

    kind, classes, columns = describe_model(run)
    _, raw = READERS[kind]([word], columns if kind == "array" else None)
    if not 0 <= row < len(raw):
        raise DataError(f"--row {row}: {word} holds {counted(len(raw), 'sample')}, counted from 0")
    chosen: str | int | None = target
    if target is not None and classes is None and target.isdigit():
        chosen = int(target)
    found = explain(run, raw[row], method, chosen)
    yield str(found)
    if html is not None:
        head = element("head", element("meta", charset="utf-8"),
                       element("meta", name="viewport", content="width=device-width, initial-scale=1"),
                       element("title", f"{run.name}: what a prediction rests on"))  # fmt: skip
        style = (
            "font:16px/1.5 system-ui,sans-serif;max-width:46rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark"
        )
        page = element("html", head, element("body", Html(found.to_html()), style=style), lang="en",
                       style="color-scheme:light dark")  # fmt: skip
        try:
            yield str(write_text(html, join([Html("<!DOCTYPE html>\n"), page, "\n"])))
        except OSError as error:
            raise ConfigError(f"--html {html}: cannot be written ({error.strerror})") from None
