"""The command `pyft`: words, messages, exit codes, and the way from words to keywords."""

from __future__ import annotations

import doctest
import importlib
import inspect
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyft import cli, cli_arguments
from pyft.cli import main
from pyft.errors import ConfigError

DATA = Path(__file__).resolve().parents[1] / "pyft" / "quickstart_data"
COMMANDS = (
    *("train", "plan", "eval", "compare", "export", "predict", "report", "explain", "resume", "doctor"),
    "quickstart",
)


# ---------------------------------------------------------------- words and help


def test_help_and_version_import_nothing_heavy(environment: dict[str, str]) -> None:
    code = (
        "import sys, contextlib\nfrom pyft.cli import main\n"
        "for words in (['--version'], ['--help'], ['train', '--help'], ['quickstart', '--help'], ['train']):\n"
        "    with contextlib.suppress(SystemExit): main(words)\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'onnxruntime', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_module_is_the_command(shell: Callable[..., Any]) -> None:
    from pyft.version import __version__

    done = shell("--version")
    assert (done.returncode, done.stdout) == (0, f"pyft {__version__}\n")


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)], ids=["pyft", *COMMANDS])
def test_help_fits_80_columns(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        main([*words, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines()) <= 80
    if not words:
        assert all(name in shown for name in COMMANDS)


def test_options_are_the_keywords_of_finetune() -> None:
    from pyft.finetune import finetune

    parameters = dict(inspect.signature(finetune).parameters)
    for name in ("model", "data"):
        del parameters[name]
    assert {option.name: option.default for option in cli_arguments.options()} == {
        name: parameter.default for name, parameter in parameters.items()
    }


def test_quickstart_options_are_its_keywords() -> None:
    from pyft.quickstart import quickstart

    keywords = vars(cli_arguments.make_parser().parse_args(["quickstart"]))
    assert set(keywords) - {"command"} <= set(inspect.signature(quickstart).parameters)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--lr", "3e-4"], 3e-4),
        (["--lr", "auto"], "auto"),
        (["--val", "0.1"], 0.1),
        (["--val", "50"], 50),
        (["--val", "none"], None),
        (["--stratify", "false"], False),
        (["--freeze", "encoder.*"], "encoder.*"),
        (["--freeze", "encoder.*,head.bias"], ["encoder.*", "head.bias"]),
        (["--freeze", "-2"], -2),
        (["--freeze", "none"], None),
        (["--clip", "none"], None),
        (["--class-weight", "balanced"], "balanced"),
        (["--class-weight", "1,2.5"], [1.0, 2.5]),
        (["--warmup", "0.25"], 0.25),
        (["--warmup", "100"], 100),
        (["--patience", "3"], 3),
        (["--max-length", "none"], None),
        (["--resume", "auto"], "auto"),
        (["--resume", "true"], True),
        (["--text-column", "message"], "message"),
    ],
)
def test_values_reach_finetune(words: list[str], value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = capture_finetune(monkeypatch)
    assert main(["train", "M", "D", *words]) == 0
    name = words[0].removeprefix("--").replace("-", "_")
    assert seen == {"model": "M", "data": "D", name: value}
    assert type(seen[name]) is type(value)


def capture_finetune(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    import pyft.finetune  # noqa: F401

    seen: dict[str, object] = {}

    def finetune(model: object, data: object, **keywords: object) -> str:
        seen.update(model=model, data=data, **keywords)
        return "done"

    monkeypatch.setattr(sys.modules["pyft.finetune"], "finetune", finetune)
    return seen


def test_export_none_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = capture_finetune(monkeypatch)
    assert main(["train", "M", "D", "--export", "none"]) == 0
    assert seen["export"] is None


def test_files_for_val_and_test(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = capture_finetune(monkeypatch)
    assert main(["train", "M", "D", "--val", str(DATA / "train.tsv"), "--test", "T"]) == 0
    assert seen == {"model": "M", "data": {"train": "D", "val": str(DATA / "train.tsv"), "test": "T"}}


def test_repeat_command_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What config.json says about repeating the run is understood by the parser, with the same keywords."""
    from pyft.finetune import keyword_defaults
    from pyft.run_dir import repeat_commands

    arguments = {**keyword_defaults(), "model": "hf:x", "data": "a b.tsv"}
    arguments |= {"freeze": "enc*", "clip": None, "stratify": False, "val": 30, "lr": 2e-5, "export": None}
    typed = repeat_commands(arguments, keyword_defaults())["shell"]
    assert typed is not None
    seen = capture_finetune(monkeypatch)
    assert main(shlex.split(typed)[1:]) == 0
    assert seen == {
        "model": "hf:x", "data": "a b.tsv", "freeze": "enc*", "clip": None, "stratify": False, "val": 30, "lr": 2e-5,
        "export": None,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["pyft.cli_arguments", "pyft.cli_predict"])
def test_docstring_examples(name: str) -> None:
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.attempted > 0
    assert outcome.failed == 0


# ---------------------------------------------------------------- messages and exit codes


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["trane"], "'trane'"),
        (["train", "M"], "DATA"),
        (["train", "M", "D", "--epochs", "two"], "--epochs: expected a whole number, got 'two'"),
        (["train", "M", "D", "--lr", "fast"], "--lr: expected a number or auto, got 'fast'"),
        (["train", "M", "D", "--val", "gone.tsv"], "--val: expected a share, a count, none, or a file that exists"),
        (["train", "M", "D", "--stratify", "perhaps"], "expected true or false"),
        (["train", "M", "D", "--strategy", "all"], "expected one of head, full, gradual, got 'all'"),
        (["train", "M", "D", "--nonsense"], "--nonsense"),
    ],
)
def test_wrong_words_give_one_line(words: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    shown = capsys.readouterr()
    assert caught.value.code == 2
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("pyft: error: ")
    assert part in shown.err


def test_no_words_at_all_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "pyft quickstart" in shown.err
    assert all(name in shown.err for name in COMMANDS)


@pytest.mark.parametrize(
    ("message", "typed"),
    [
        ("name it with label_column=", "name it with --label-column"),
        ("val=0.2: 2 samples; give a 'val' set, or val=0", "--val 0.2: 2 samples; give a 'val' set, or --val 0"),
        ("lr=-1.5: (lr=auto)", "--lr -1.5: (--lr auto)"),
        *[(one, one) for one in ("a/val=3.tsv: xval=3, epoch=3", "freeze=['a'], loss=call(x)")],
        ("say task='image-classification', patience=None", "say --task image-classification, --patience none"),
    ],
)  # fmt: skip
def test_errors_speak_of_options(
    message: str, typed: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYFT_TRACEBACK", raising=False)
    monkeypatch.setitem(cli.COMMANDS, "train", raising(ConfigError(message)))
    assert main(["train", "M", "D"]) == 2
    assert capsys.readouterr().err == f"pyft: error: {typed}\n"


def test_errors_name_only_options_of_their_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYFT_TRACEBACK", raising=False)
    monkeypatch.setitem(cli.COMMANDS, "eval", raising(ConfigError("model=3 val=3 text_column='x'")))
    assert main(["eval", "M", "D"]) == 2
    assert capsys.readouterr().err == "pyft: error: model=3 val=3 --text-column x\n"


def test_a_file_that_cannot_be_written_gives_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYFT_TRACEBACK", raising=False)
    monkeypatch.setitem(cli.COMMANDS, "doctor", raising(OSError(30, "Read-only file system", "/mnt/x")))
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "pyft: error: /mnt/x: Read-only file system\n"


def raising(error: BaseException) -> object:
    def command(arguments: object) -> int:
        raise error

    return command


def test_errors_of_pyft_give_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYFT_TRACEBACK", raising=False)
    monkeypatch.setitem(cli.COMMANDS, "doctor", raising(ConfigError("first line\n  second line")))
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == "pyft: error: first line second line\n"


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYFT_TRACEBACK", "1")
    monkeypatch.setitem(cli.COMMANDS, "doctor", raising(ConfigError("wrong")))
    with pytest.raises(ConfigError, match="wrong"):
        main(["doctor"])


def test_faults_of_pyft_itself_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "doctor", raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


@pytest.mark.parametrize("told", ["at step 3. To go on: pyft resume runs/x", ""])
def test_interrupt_is_130(told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "doctor", raising(KeyboardInterrupt(told)))
    assert main(["doctor"]) == 130
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "pyft resume" in shown


@pytest.mark.parametrize("code", [0, 1])
def test_doctor_gives_its_exit_code(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyft.core.doctor  # noqa: F401

    monkeypatch.setattr(sys.modules["pyft.core.doctor"], "doctor", lambda: code)
    assert main(["doctor"]) == code


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "nowhere", "test.tsv"],
        ["eval", "nowhere.onnx", "test.tsv"],
        ["predict", "nowhere", "a text"],
        ["predict", "nowhere.onnx", "a text"],
        ["export", "nowhere"],
        ["resume", "nowhere"],
        ["train", "nowhere", str(DATA / "train.tsv"), "--progress", "false", "--export", "none"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_missing_things_are_named(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if words[1].endswith(".onnx"):
        pytest.importorskip("onnxruntime", reason="pip install 'pyft[onnx]'")
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert "nowhere" in shown.err
    assert list(tmp_path.iterdir()) == []
