"""Batches: every sample once, the same for the same seed and epoch, resumable, with little padding."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyft.data import inputs as inputs_module
from pyft.data.batches import Batches
from pyft.data.images import ImagePreprocess
from pyft.data.sources import load_data
from pyft.data.text import TextPreprocess
from pyft.errors import ConfigError, DataError
from pyft.samples import Samples


def numbers(count: int) -> Samples:
    return Samples("array", torch.arange(2.0 * count).view(count, 2), torch.arange(count))


class Letters:
    """Texts to one number per letter: a preprocessing of a user's own."""

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in texts]

    def collate(self, rows: list[np.ndarray]) -> torch.Tensor:
        longest = max(len(row) for row in rows)
        return torch.from_numpy(np.stack([np.pad(row, (0, longest - len(row))) for row in rows]))


def words(count: int, seed: int = 0) -> Samples:
    lengths = np.random.default_rng(seed).integers(1, 60, count)
    return Samples("text", ["x" * int(length) for length in lengths], torch.arange(count))


def index_of(batches: Batches, epoch: int, start: int = 0) -> list[list[int]]:
    return [batch.index.tolist() for batch in batches.epoch(epoch, start)]


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 300), st.integers(1, 40), st.booleans(), st.booleans(), st.integers(-5, 2**63), st.integers(0, 99)
)
def test_every_sample_once(count: int, batch_size: int, shuffle: bool, texts: bool, seed: int, epoch: int) -> None:
    samples, preprocess = (words(count), Letters()) if texts else (numbers(count), None)
    batches = Batches(samples, preprocess, batch_size, seed=seed, shuffle=shuffle)
    index = index_of(batches, epoch)
    assert len(index) == batches.num_batches == len(batches)
    assert sorted(number for batch in index for number in batch) == list(range(count))
    sizes = sorted(map(len, index))
    single = count % batch_size == 1 and count > batch_size > 1
    if shuffle and single:
        assert sizes == [batch_size] * (count // batch_size - 1) + [batch_size + 1]
    else:
        rest = [count % batch_size] if count % batch_size else []
        assert sizes == sorted([batch_size] * (count // batch_size) + rest)
    if shuffle and count > 1 and batch_size > 1:
        assert sizes[0] > 1


def test_rows_belong_to_their_numbers() -> None:
    for batch in Batches(numbers(50), None, 8).epoch(2):
        assert torch.equal(batch.inputs[:, 0], batch.index * 2.0)  # type: ignore[index]
        assert torch.equal(batch.targets, batch.index)  # type: ignore[arg-type]
    texts = words(50)
    for batch in Batches(texts, Letters(), 8).epoch(2):
        assert (batch.inputs > 0).sum(1).tolist() == [len(texts.inputs[n]) for n in batch.index.tolist()]  # type: ignore[operator]
    bare = Samples("array", torch.zeros(3, 1), None)
    assert next(Batches(bare, None, 2).epoch(0)).targets is None


@pytest.mark.parametrize("samples", [numbers(100), words(100)])
def test_order_is_a_function_of_seed_and_epoch(samples: Samples) -> None:
    preprocess = Letters() if samples.kind == "text" else None
    batches = Batches(samples, preprocess, 8, seed=4)
    first = index_of(batches, 3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    torch.manual_seed(1)
    assert index_of(Batches(samples, preprocess, 8, seed=4), 3) == first
    torch.set_rng_state(before[0])
    list(batches.epoch(3))
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1], before[2]) == (np.random.get_state()[1].tolist(), random.getstate())
    for other in (index_of(batches, 4), index_of(Batches(samples, preprocess, 8, seed=5), 3)):
        assert other != first
        # Not only another order of the same batches.
        assert {frozenset(batch) for batch in other} != {frozenset(batch) for batch in first}


def test_fixed_order() -> None:
    assert index_of(Batches(numbers(5), None, 2, shuffle=False), 7) == [[0, 1], [2, 3], [4]]
    samples = Samples("text", ["ccc", "a", "bb", "dddd", "e"], None)
    assert index_of(Batches(samples, Letters(), 2, shuffle=False), 0) == [[1, 4], [2, 0], [3]]
    assert index_of(Batches(samples, Letters(), 2, shuffle=False, bucket=False), 0) == [[0, 1], [2, 3], [4]]


def test_drop_last() -> None:
    index = index_of(Batches(numbers(10), None, 4, drop_last=True), 0)
    assert list(map(len, index)) == [4, 4]
    assert len({number for batch in index for number in batch}) == 8
    dropped = {
        number
        for epoch in range(30)
        for number in set(range(10))
        - {n for b in index_of(Batches(words(10), Letters(), 4, drop_last=True), epoch) for n in b}
    }
    assert len(dropped) == 10
    # Rather one small batch than none.
    assert index_of(Batches(numbers(3), None, 4, drop_last=True, shuffle=False), 0) == [[0, 1, 2]]


@pytest.mark.parametrize("start", [0, 1, 6, 12, 13])
def test_resume_gives_the_rest_of_the_epoch(start: int) -> None:
    for samples, preprocess, augment in ((words(100), Letters(), "none"), (numbers(100), None, torch.rand_like)):
        batches = Batches(samples, preprocess, 8, seed=1, augment=augment)  # type: ignore[arg-type]
        whole = list(batches.epoch(2))[start:]
        rest = list(Batches(samples, preprocess, 8, seed=1, augment=augment).epoch(2, start))  # type: ignore[arg-type]
        assert len(rest) == len(whole) == 13 - start
        for a, b in zip(whole, rest, strict=True):
            assert torch.equal(a.index, b.index)
            assert torch.equal(a.inputs, b.inputs)  # type: ignore[arg-type]


def test_resume_does_no_skipped_work() -> None:
    calls: list[float] = []

    def preprocess(x: torch.Tensor) -> torch.Tensor:
        calls.append(float(x[0]))
        return x

    batches = Batches(numbers(20), preprocess, 4)
    list(batches.epoch(0, 3))
    assert len(calls) == 8
    with pytest.raises(ConfigError, match="start=6: expected 0 to 5 batches"):
        batches.epoch(0, 6)


def padded(samples_lengths: np.ndarray, index: list[np.ndarray]) -> int:
    return int(sum(len(batch) * samples_lengths[batch].max() for batch in index))


def test_padding_is_near_the_least_possible(minilm_dir: Path, shared_data: Path) -> None:
    data = load_data(shared_data / "banking77" / "train.tsv", val=0)
    preprocess = TextPreprocess.from_folder(minilm_dir)
    for samples in (data.train.subset(range(0, 10000, 5)), data.train):
        batches = Batches(samples, preprocess, 32, seed=1)
        lengths = np.array([len(row) for row in preprocess.encode(list(samples.inputs))])
        ordered = np.sort(lengths)
        least = sum(len(part) * int(part.max()) for part in np.split(ordered, range(32, len(ordered), 32)))
        epochs = [batches.index(epoch) for epoch in range(3)]
        assert all(padded(lengths, index) <= 1.25 * least for index in epochs)
        # The batch itself holds no more than that.
        assert padded(lengths, epochs[0]) == sum(batch.inputs["input_ids"].numel() for batch in batches.epoch(0))  # type: ignore[call-overload]
        first, second = ([set(batch.tolist()) for batch in epochs[epoch]] for epoch in (0, 1))
        overlap = np.mean([max(len(batch & other) for other in second) / len(batch) for batch in first])
        assert overlap < 0.5


def test_buckets_against_plain_batches() -> None:
    lengths = np.array([len(text) for text in words(2000).inputs])
    least = padded(lengths, np.array_split(np.argsort(lengths), 2000 // 16))
    plain = Batches(words(2000), Letters(), 16, bucket=False).index(0)
    assert padded(lengths, plain) > 1.6 * least
    assert padded(lengths, Batches(words(2000), Letters(), 16).index(0)) < 1.25 * least
    # Batches come in no order of length.
    longest = [lengths[batch].max() for batch in Batches(words(2000), Letters(), 16).index(0)]
    assert abs(np.corrcoef(np.arange(len(longest)), longest)[0, 1]) < 0.3


def test_text_is_tokenised_once() -> None:
    calls = []

    class Counting(Letters):
        def encode(self, texts: list[str]) -> list[np.ndarray]:
            calls.append(len(texts))
            return super().encode(texts)

    batches = Batches(words(30), Counting(), 4)
    list(batches.epoch(0))
    list(batches.epoch(1))
    assert calls == [30]


def test_a_function_cannot_spoil_the_samples() -> None:
    samples = numbers(6)
    for _ in range(2):
        list(Batches(samples, lambda x: x.mul_(0), 3).epoch(0))
    assert torch.equal(samples.inputs, torch.arange(12.0).view(6, 2))  # type: ignore[arg-type]


def test_a_function_runs_in_the_calling_thread() -> None:
    threads = set()

    def preprocess(x: torch.Tensor) -> torch.Tensor:
        threads.add(threading.current_thread().name)
        return x + torch.rand(())

    first = {
        int(n): row
        for b in Batches(numbers(9), preprocess, 2).epoch(1)
        for n, row in zip(b.index, b.inputs, strict=True)
    }
    second = {
        int(n): row
        for b in Batches(numbers(9), preprocess, 5).epoch(1)
        for n, row in zip(b.index, b.inputs, strict=True)
    }
    assert threads == {threading.current_thread().name}
    assert all(torch.equal(first[number], second[number]) for number in range(9))


@pytest.fixture(scope="module")
def flowers(shared_data: Path) -> Samples:
    pytest.importorskip("PIL", reason="pip install 'pyft[image]'")
    return load_data(shared_data / "flowers5" / "train", val=0).train.subset(range(0, 800, 40))


@pytest.mark.parametrize("room", [1 << 40, 0])
def test_images_kept_or_decoded_again_are_the_same(
    flowers: Samples, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs_module, "free_memory", lambda: room)
    preprocess = ImagePreprocess(64, 72)
    expected = torch.stack([preprocess(path) for path in flowers.inputs])
    batches = Batches(flowers, preprocess, 6)
    for epoch in range(2):
        for batch in batches.epoch(epoch):
            assert torch.equal(batch.inputs, expected[batch.index])  # type: ignore[arg-type]
    own = Batches(flowers, lambda image: torch.from_numpy(np.array(image.resize((8, 8)))).permute(2, 0, 1) / 255, 6)
    first = {tuple(batch.index.tolist()): batch.inputs for batch in own.epoch(0)}
    assert all(torch.equal(first[tuple(batch.index.tolist())], batch.inputs) for batch in own.epoch(0))  # type: ignore[arg-type]
    assert next(own.epoch(0)).inputs.shape == (6, 3, 8, 8)  # type: ignore[union-attr]


def test_images_are_decoded_once_when_kept(flowers: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[Any] = []
    original = ImagePreprocess.pixels

    def counting(self: ImagePreprocess, image: Any) -> torch.Tensor:
        decoded.append(image)
        return original(self, image)

    monkeypatch.setattr(ImagePreprocess, "pixels", counting)
    batches = Batches(flowers, ImagePreprocess(16), 6)
    list(batches.epoch(0, 2))
    assert len(decoded) == 8
    list(batches.epoch(0))
    list(batches.epoch(1))
    assert sorted(decoded) == sorted(flowers.inputs)


def test_random_transform_of_images_differs_by_epoch(flowers: Samples) -> None:
    def preprocess(image: Any) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image.resize((4, 4)), dtype=np.float32)) * torch.rand(())

    def epoch(number: int, batch_size: int) -> torch.Tensor:
        rows = torch.zeros(20, 4, 4, 3)
        for batch in Batches(flowers, preprocess, batch_size, seed=2).epoch(number):
            rows[batch.index] = batch.inputs  # type: ignore[assignment]
        return rows

    assert torch.equal(epoch(0, 6), epoch(0, 7))
    assert all(not torch.equal(a, b) for a, b in zip(epoch(0, 6), epoch(1, 6), strict=True))


def test_threads_end_with_the_epoch(flowers: Samples) -> None:
    before = {thread.name for thread in threading.enumerate()}
    epoch = Batches(flowers, ImagePreprocess(16), 4).epoch(0)
    next(epoch)
    epoch.close()  # type: ignore[attr-defined]
    list(Batches(flowers, ImagePreprocess(16), 4).epoch(0))
    left = [thread for thread in threading.enumerate() if thread.name not in before]
    for thread in left:
        thread.join(5)
    assert not any(thread.is_alive() for thread in left)


def test_bad_image_stops_the_epoch(flowers: Samples, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_text("no image")
    samples = Samples("image", [*flowers.inputs[:3], tmp_path / "bad.jpg"], None)
    with pytest.raises(DataError, match=r"bad\.jpg: not an image"):
        list(Batches(samples, ImagePreprocess(16), 2).epoch(0))


@pytest.mark.parametrize(
    ("samples", "preprocess", "options", "expected"),
    [
        (numbers(4), None, {"batch_size": 0}, "batch_size=0"),
        (numbers(4), None, {"batch_size": 2.5}, "batch_size=2.5"),
        (numbers(4), None, {"batch_size": 2, "augment": "twist"}, "augment='twist'"),
        (numbers(4), "resize", {"batch_size": 2}, "expected a function of one sample, got str"),
        (words(4), None, {"batch_size": 2}, r"texts need TextPreprocess\.from_folder"),
        (words(4), Letters(), {"batch_size": 2, "augment": "flip"}, "texts cannot be changed"),
        (Samples("image", [Path("x.png")], None), None, {"batch_size": 2}, "images need pyft.ImagePreprocess"),
    ],
)
def test_what_does_not_fit(samples: Samples, preprocess: Any, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        Batches(samples, preprocess, **options)


def test_what_fails_in_a_batch() -> None:
    with pytest.raises(DataError, match="there is no sample"):
        Batches(Samples("array", torch.zeros(0, 2), None), None, 2)
    with pytest.raises(DataError, match="expected a Tensor for each sample, got list"):
        next(Batches(numbers(4), lambda x: x.tolist(), 2).epoch(0))
    with pytest.raises(DataError, match="samples of one batch have the shapes"):
        list(Batches(numbers(4), lambda x: x[: 1 + int(x[0]) % 4 // 2], 4).epoch(0))


def test_image_augmentation_is_the_sample_s_own(flowers: Samples) -> None:
    def epoch(batch_size: int, number: int) -> torch.Tensor:
        rows = torch.zeros(20, 3, 24, 24)
        for batch in Batches(flowers, ImagePreprocess(24), batch_size, seed=3, augment="strong").epoch(number):
            rows[batch.index] = batch.inputs  # type: ignore[assignment]
        return rows

    assert torch.equal(epoch(4, 0), epoch(7, 0))
    assert all(not torch.equal(a, b) for a, b in zip(epoch(4, 0), epoch(4, 1), strict=True))
