"""finetune in several processes: the run of one process, in all of them, and ended together whatever happens."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import finetune_on_ranks as on_ranks
import numpy as np
import pytest
import torch
from finetune_on_ranks import WORLD
from ranks import Ranks
from torch import nn

import pyft
from pyft.errors import ConfigError
from pyft.training.data_parallel import share_of
from pyft.training.processes import several_processes

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Three processes in one gloo group."""
    started = Ranks(WORLD, tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two small layers, without dropout, whose draws would differ."""
    transformers = pytest.importorskip("transformers", reason="pip install 'pyft[text]'")
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "i", "want", "to", "a", "please"]
    words += ["cash", "bank", "soup", "eat", "ball", "team"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config.save_pretrained(folder)
    save_file(transformers.BertModel(config, add_pooling_layer=False).state_dict(), folder / "model.safetensors")
    return folder


def assert_as_one(several: list[Any], one: dict[str, Any], atol: float = 2e-5) -> None:
    """The same in all processes to the bit, and as in one up to rounding."""
    first = several[0]
    for other in several[1:]:
        assert other["metrics"] == first["metrics"]
        assert [other[name] for name in ("rows", "confusion", "run", "onnx")] == [
            first[name] for name in ("rows", "confusion", "run", "onnx")
        ]
        assert all(torch.equal(value, first["weights"][name]) for name, value in other["weights"].items())
    assert len(first["rows"]) == len(one["rows"])
    for ours, theirs in zip(first["rows"], one["rows"], strict=True):
        assert ours.pop("stage") == theirs.pop("stage")
        assert ours == pytest.approx(theirs, rel=2e-5, abs=1e-6)
    assert first["metrics"] == pytest.approx(one["metrics"], rel=2e-5, abs=1e-6)
    assert first["confusion"] == one["confusion"]
    for name, value in one["weights"].items():
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("name", on_ranks.CASES)
def test_the_run_of_one_process(ranks: Ranks, one_thread: None, tmp_path: Path, name: str) -> None:
    one = on_ranks.case(name, tmp_path / "one")
    assert_as_one(ranks(on_ranks.case, name, tmp_path / "three"), one)
    files = [sorted(path.name for path in (tmp_path / who / name).iterdir()) for who in ("one", "three")]
    assert files[0] == files[1]
    if name == "stopped":
        assert len(one["rows"]) < on_ranks.CASES[name]["epochs"]


def test_regression(ranks: Ranks, one_thread: None, tmp_path: Path) -> None:
    assert_as_one(ranks(on_ranks.regression, tmp_path / "three"), on_ranks.regression(tmp_path / "one"))


def test_what_nothing_uses_stays(ranks: Ranks, tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = on_ranks.Net().spare.weight
    [first, *_] = ranks(on_ranks.whole, tmp_path)
    assert torch.equal(first["weights"]["spare.weight"], before)


def test_the_mean_of_uneven_shares_against_float64(ranks: Ranks, tmp_path: Path) -> None:
    """One step on 7 samples of 3 processes by plain SGD, against autograd on the whole batch."""
    x, y = (part[:7] for part in on_ranks.arrays())
    options = {"epochs": 1, "batch_size": 7, "val": 0, "optimizer": "sgd", "clip": None, "lr": 0.5, "warmup": 0}
    options |= {"weight_decay": 0.0, "schedule": "constant", "class_weight": [0.5, 1.0, 3.0], "data": (x, y)}
    [first, *_] = ranks(on_ranks.tuned, tmp_path, options)
    torch.manual_seed(0)
    net = on_ranks.Net().double()
    weights = torch.tensor([0.5, 1.0, 3.0]).double()
    nn.functional.cross_entropy(net(torch.tensor(x).double()), torch.tensor(y), weights).backward()
    for name, parameter in net.named_parameters():
        moved = parameter if parameter.grad is None else parameter - 0.5 * parameter.grad
        torch.testing.assert_close(first["weights"][name].double(), moved, rtol=1e-6, atol=1e-7)


def test_batch_norm_of_last_batches_of_two(ranks: Ranks, tmp_path: Path) -> None:
    first, *others = ranks(on_ranks.normed, tmp_path)
    assert first["weights"]["body.1.num_batches_tracked"] == 27
    for other in others:
        assert all(torch.equal(value, first["weights"][name]) for name, value in other["weights"].items())


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_each_sample_is_computed_once(ranks: Ranks, one_thread: None, tmp_path: Path, cache: str) -> None:
    alone, _, one = on_ranks.cached(tmp_path / "one", cache)
    several = ranks(on_ranks.cached, tmp_path / "three", cache)
    assert_as_one([facts for _, _, facts in several], one)
    total = on_ranks.SAMPLES + on_ranks.VALIDATION
    probes = alone - total
    assert 0 <= probes < 20
    assert sum(computed for computed, _, _ in several) == total + WORLD * probes
    assert {stored for _, stored, _ in several} == {int(cache == "disk")}


def test_texts(ranks: Ranks, one_thread: None, tmp_path: Path, small_encoder: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "three").mkdir()
    one = on_ranks.texts(tmp_path / "one", str(small_encoder))
    several = ranks(on_ranks.texts, tmp_path / "three", str(small_encoder))
    # The bias of the keys has no gradient but roundings, which AdamW makes steps of.
    assert_as_one(several, one, atol=5e-4)


# ---------------------------------------------------------------- ended together


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ("nan", "NonFiniteError: stage 'full', epoch 2, step 14: the loss is nan"),
        ("raise", "ValueError: no such day"),
        ("raise in backward", "ValueError: no way back"),
        ("disk", "CheckpointError: cannot write"),
    ],
)
def test_all_end_with_the_error_of_one(ranks: Ranks, tmp_path: Path, action: str, words: str) -> None:
    began = time.monotonic()
    answers = ranks(on_ranks.at_step, tmp_path, action)
    for said, kept in answers:
        assert said.startswith(words), answers
        assert kept
    if action.startswith("raise"):
        assert [said.endswith("(in process 1 of 3, counted from 0)") for said, _ in answers] == [True, False, True]
    assert time.monotonic() - began < 20


def test_ctrl_c_in_one_stops_all_and_the_run_goes_on(ranks: Ranks, tmp_path: Path) -> None:
    straight, *_ = ranks(on_ranks.whole, tmp_path / "straight")
    for said, kept in ranks(on_ranks.at_step, tmp_path, "interrupt"):
        assert said.startswith("KeyboardInterrupt: interrupted at stage 'full', epoch 2, step 15")
        assert kept
    first, *others = ranks(on_ranks.whole, tmp_path)
    assert first["run"] == tmp_path / "run"
    for one in (first, *others):
        assert all(torch.equal(value, straight["weights"][name]) for name, value in one["weights"].items())
        assert one["rows"] == straight["rows"]


def test_ctrl_c_while_the_model_is_scored(ranks: Ranks, tmp_path: Path) -> None:
    for said in ranks(on_ranks.interrupted_evaluation, tmp_path):
        assert said.startswith("KeyboardInterrupt: interrupted at stage 'full', epoch 1")
    again = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert again["position"]["batch"] == 9


def test_one_process_goes_on_with_what_several_began(ranks: Ranks, tmp_path: Path) -> None:
    ranks(on_ranks.at_step, tmp_path, "interrupt")
    straight = on_ranks.whole(tmp_path / "straight")
    torch.manual_seed(0)
    again = on_ranks.whole(tmp_path)
    assert any("resumed with processes 1, begun with 3" in note for note in again["notes"])
    for name, value in straight["weights"].items():
        torch.testing.assert_close(again["weights"][name], value, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ("other_data", ["ConfigError", "process 1 of 3", "has another data than process 0"]),
        ("other_model", ["ConfigError", "process 2 of 3", "has another model than process 0"]),
        ("other_arguments", ["ConfigError", "process 1 of 3", "has another argument lr than process 0"]),
        ("small_batches", ["ConfigError", "batch_size=2", "give batch_size=3 or more"]),
        ("one_bad_argument", ["ConfigError", "schedule", "moon", "(in process 2 of 3"]),
        ("used_folder", ["ConfigError", "holds files that are not of a run"]),
    ],
)
def test_what_is_refused(ranks: Ranks, tmp_path: Path, action: str, words: list[str]) -> None:
    answers = ranks(on_ranks.refused, action, tmp_path)
    for said, files in answers:
        assert all(word in said for word in words), said
        assert files == (["run"] if action == "used_folder" else [])


def test_a_process_that_is_gone(tmp_path: Path) -> None:
    two = Ranks(2, tmp_path)
    try:
        two.start(on_ranks.at_step, tmp_path, "kill")
        said, kept = two.finish(0)
    finally:
        two.close()
    assert said.startswith("ProcessLostError: one of 2 processes that train together is gone")
    assert kept


# ---------------------------------------------------------------- started by torchrun


@pytest.mark.parametrize("count", ["1", "", "many"])
def test_one_process_is_none_of_several(count: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", count)
    assert not several_processes()


def test_an_environment_without_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE=2 in the environment, but no RANK, MASTER_ADDR, MASTER_PORT"):
        pyft.finetune(nn.Linear(3, 2), (np.zeros((8, 3), np.float32), [0, 1] * 4), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyft.training.processes import local_gpu

    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert local_gpu() == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"2 processes on a machine with 1 GPUs.*--nproc-per-node 1"):
        local_gpu()


@pytest.mark.parametrize("size", range(1, 14))
@pytest.mark.parametrize("least", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_are_the_batch(size: int, least: int, count: int) -> None:
    index = np.arange(100, 100 + size)
    shares = [share_of(index, rank, count, least) for rank in range(count)]
    counted = [share for share, counts in shares if counts]
    assert sorted(np.concatenate(counted)) == index.tolist()
    sizes = [len(share) for share in counted]
    assert max(sizes) - min(sizes) <= 1
    assert all(len(share) >= min(least, size) for share, _ in shares)


def test_the_command(tmp_path: Path, environment: dict[str, str], small_encoder: Path) -> None:
    """Ctrl-C to torchrun, then `pyft resume`: one process speaks, and the run is finished."""
    data = tmp_path / "data.tsv"
    data.write_text("text\tlabel\n" + "i want cash\tmoney\nplease eat soup\tfood\nteam ball\tsport\n" * 12)
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "pyft"]
    words = ["train", f"hf:{small_encoder}", str(data), "--epochs", "40", "--batch-size", "4", "--strategy", "full"]
    words += ["--out", "run", "--device", "cpu", "--export", "none"]
    environment["CUDA_VISIBLE_DEVICES"] = ""
    process = subprocess.Popen([*run, *words], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = next(line for line in process.stderr if "full epoch 1:" in line)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert said.count("To go on: pyft resume") == 1, said
    done = subprocess.run([*run, "resume", "run"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("val_accuracy") == 1
    assert done.stderr.count("seconds: load") == 1
    assert not re.search(r"find_unused_parameters|Traceback|Warning", done.stderr), done.stderr
    assert (tmp_path / "run" / "report.html").is_file()
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 41
