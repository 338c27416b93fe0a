"""The sources parse as the oldest Python that pyft supports, and the versions named agree."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    [*(REPOSITORY / "pyft").rglob("*.py"), *(REPOSITORY / "examples").glob("*.py"), REPOSITORY / "setup.py"]
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_parses_as_python_3_10(path: Path) -> None:
    ast.parse(path.read_text(encoding="utf-8"), filename=str(path), feature_version=(3, 10))


def test_classifiers_name_every_supported_version() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text()
    assert 'requires-python = ">=3.10"' in text
    assert re.findall(r"Python :: (3\.\d+)", text) == ["3.10", "3.11", "3.12", "3.13"]
