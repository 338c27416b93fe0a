"""The command `pyft`: train, plan, eval, compare, export, predict, report, explain, resume, doctor, quickstart.

`pyft --help` loads little.

Exit codes: 0 done; 1 `doctor` found that the core cannot be built; 2 something is wrong with the command, the data or
the files (one line on standard error); 130 stopped by Ctrl-C. With PYFT_TRACEBACK=1 errors come with their traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pyft.cli_arguments import in_typed_words, make_parser, option_names, options
from pyft.errors import PyftError

TRACEBACK = "PYFT_TRACEBACK"
INTERRUPTED = "interrupted; a run that had begun goes on with: pyft resume RUN"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process) and give the exit code."""
    parser = make_parser()
    words = sys.argv[1:] if argv is None else argv
    if not words:
        parser.print_help(sys.stderr)
        return 2
    arguments = parser.parse_args(words)
    try:
        code = COMMANDS[arguments.command](arguments)
        sys.stdout.flush()
        return code
    except PyftError as error:
        if os.environ.get(TRACEBACK) == "1":
            raise
        _tell(error, in_typed_words(str(error), option_names(arguments)))
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            # The reader (`head`, a pager) has gone; what is left in the buffer must not be flushed to it at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if os.environ.get(TRACEBACK) == "1" or error.filename is None:
            raise
        _tell(error, f"{error.filename}: {error.strerror}")
        return 2
    except KeyboardInterrupt as error:
        _tell(error, str(error) or INTERRUPTED, "")
        return 130


def _tell(error: BaseException, text: str, kind: str = "error: ") -> None:
    """Say on standard error why the command ends; what all of several processes raise is said by the first."""
    if os.environ.get("RANK", "0") == "0" or not getattr(error, "of_all_processes", False):
        print(f"pyft: {kind}{' '.join(text.split())}", file=sys.stderr)


def train(arguments: argparse.Namespace) -> int:
    """`pyft train MODEL DATA`."""
    from pyft.finetune import finetune

    data, keywords = _job(arguments)
    _print(finetune(arguments.model, data, **keywords))
    return 0


def _print(result: Any) -> None:
    """Print a result, in one of several processes."""
    from pyft.training.processes import speaks

    if speaks():
        print(result)


def plan(arguments: argparse.Namespace) -> int:
    """`pyft plan MODEL DATA`."""
    from pyft.plan import plan as plan_run

    data, keywords = _job(arguments)
    print(plan_run(arguments.model, data, **keywords))
    return 0


def _job(arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Data and keywords of `pyft.finetune`."""
    given = vars(arguments)
    keywords = {option.name: given[option.name] for option in options() if option.name in given}
    for name in ("export", "preprocess"):
        if keywords.get(name) == "none":
            keywords[name] = None
    data: Any = arguments.data
    sets = {"val": keywords.get("val"), "test": arguments.test}
    sets = {role: value for role, value in sets.items() if isinstance(value, str)}
    if sets:
        data = {"train": data, **sets}
        if "val" in sets:
            del keywords["val"]
    return data, keywords


def evaluate(arguments: argparse.Namespace) -> int:
    """`pyft eval RUN_OR_ONNX DATA`."""
    from pyft.evaluate import evaluate as evaluate_model
    from pyft.export.run import CPU

    metrics = evaluate_model(
        arguments.model,
        arguments.data,
        batch_size=arguments.batch_size,
        text_column=arguments.text_column,
        label_column=arguments.label_column,
        provider=arguments.provider or CPU,
    )
    print(json.dumps(metrics.to_dict(), ensure_ascii=False) if arguments.json else metrics)
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """`pyft compare A B DATA`."""
    from pyft.export.run import CPU
    from pyft.onnx_runtime import compare as compare_files

    comparison = compare_files(
        arguments.a,
        arguments.b,
        arguments.data,
        metric=arguments.metric.split(",") if "," in arguments.metric else arguments.metric,
        resamples=arguments.resamples,
        confidence=arguments.confidence,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        text_column=arguments.text_column,
        label_column=arguments.label_column,
        provider=arguments.provider or CPU,
    )
    print(json.dumps(comparison.to_dict(), ensure_ascii=False) if arguments.json else comparison)
    return 0


def export(arguments: argparse.Namespace) -> int:
    """`pyft export RUN`."""
    from pyft.cli_export import export_run

    words = {name: getattr(arguments, name) for name in ("inputs", "precision", "opset", "max_drop")}
    for line in export_run(Path(arguments.run), None if arguments.output is None else Path(arguments.output), **words):
        print(line)
    return 0


def predict(arguments: argparse.Namespace) -> int:
    """`pyft predict RUN_OR_ONNX INPUT...`."""
    from pyft.cli_predict import prediction_lines

    lines = prediction_lines(
        Path(arguments.model),
        arguments.inputs,
        text_column=arguments.text_column,
        batch_size=arguments.batch_size,
        as_json=arguments.json,
        provider=arguments.provider,
    )
    for line in lines:
        print(line)
    return 0


def report(arguments: argparse.Namespace) -> int:
    """`pyft report RUN`."""
    from pyft.run_report import report as write_report

    print(write_report(arguments.run, arguments.output, explain=arguments.explain, data=arguments.data))
    return 0


def explain(arguments: argparse.Namespace) -> int:
    """`pyft explain RUN INPUT`."""
    from pyft.cli_explain import explanation_lines

    lines = explanation_lines(
        Path(arguments.run), arguments.input, row=arguments.row, method=arguments.method, target=arguments.target,
        html=None if arguments.html is None else Path(arguments.html),
    )  # fmt: skip
    for line in lines:
        print(line)
    return 0


def resume(arguments: argparse.Namespace) -> int:
    """`pyft resume RUN`."""
    from pyft.finetune import resume as resume_run

    _print(resume_run(arguments.run, progress=arguments.progress))
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    """`pyft doctor`."""
    from pyft.core.doctor import doctor as examine

    return examine()


def quickstart(arguments: argparse.Namespace) -> int:
    """`pyft quickstart`."""
    from pyft.quickstart import quickstart as run_quickstart

    keywords = {name: value for name, value in vars(arguments).items() if name != "command" and value is not None}
    run_quickstart(**keywords)
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": train,
    "plan": plan,
    "eval": evaluate,
    "compare": compare,
    "export": export,
    "predict": predict,
    "report": report,
    "explain": explain,
    "resume": resume,
    "doctor": doctor,
    "quickstart": quickstart,
}
