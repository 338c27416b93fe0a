"""From raw samples to the inputs of a file: against Pillow, torch and the tokenizers package."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pyft.data.images import ImagePreprocess
from pyft.errors import ConfigError, DataError, ExportError, MissingExtraError
from pyft.export.run import OnnxModel
from pyft.onnx_runtime import feed as feed_module
from pyft.onnx_runtime.feed import feeds

pytest.importorskip("onnx", reason="pip install 'pyft[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'pyft[onnx]'")

from small_graphs import save_graph

B = ["batch"]


@pytest.fixture(scope="module")
def raw_pictures(tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    """Gives the sum of each picture's pixels, for pictures of any size."""
    path = save_graph(
        tmp_path_factory.mktemp("feed") / "pictures.onnx",
        {"image": (np.uint8, [*B, "height", "width", 3])},
        [
            ("Cast", ["image"], ["wide"], {"to": 7}),
            ("ReduceSum", ["wide", "axes"], ["logits"], {"keepdims": 0}),
        ],
        {"logits": (np.int64, B)},
        {"axes": np.array([1, 2, 3])},
        kind="image",
        inputs_form="raw",
        format="2",
    )
    return OnnxModel(path)


@pytest.fixture(scope="module")
def tensor_pictures(tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    """Takes what ImagePreprocess makes."""
    spec = ImagePreprocess(16, 20, interpolation="bicubic").spec()
    path = save_graph(
        tmp_path_factory.mktemp("feed") / "tensors.onnx",
        {"input": (np.float32, [*B, 3, 16, 16])},
        [("Flatten", ["input"], ["logits"])],
        {"logits": (np.float32, [*B, 768])},
        kind="image",
        preprocess=spec,
    )
    return OnnxModel(path)


def pictures(count: int, shapes: tuple[tuple[int, int], ...] = ((20, 30), (33, 17))) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*shapes[n % len(shapes)], 3), dtype=np.uint8) for n in range(count)]


def gathered(model: OnnxModel, raw: Any, batch_size: int = 4) -> tuple[np.ndarray, list[int]]:
    """The logits in the order of the samples, and the sizes of the batches."""
    rows: dict[int, Any] = {}
    sizes = []
    for one in feeds(model, raw, batch_size=batch_size):
        sizes.append(len(one.index))
        assert one.index.dtype == np.int64
        rows |= dict(zip(one.index.tolist(), model.run(one.inputs, ["logits"])["logits"], strict=True))
    assert sorted(rows) == list(range(len(rows)))
    return np.array([rows[number] for number in range(len(rows))]), sizes


class TestPictures:
    def test_one_size_shares_a_batch(self, raw_pictures: OnnxModel) -> None:
        found, sizes = gathered(raw_pictures, pictures(13))
        assert found.tolist() == [int(one.sum()) for one in pictures(13)]
        assert sorted(sizes) == [2, 3, 4, 4]

    def test_paths_and_pictures_are_turned_upright(self, raw_pictures: OnnxModel, tmp_path: Path) -> None:
        one = Image.fromarray(pictures(1)[0])
        exif = Image.Exif()
        exif[0x0112] = 6
        one.save(tmp_path / "turned.png", exif=exif)
        made = list(feeds(raw_pictures, [tmp_path / "turned.png", str(tmp_path / "turned.png"), one]))
        by_number = {n: picture for f in made for n, picture in zip(f.index, f.inputs["image"], strict=True)}
        np.testing.assert_array_equal(by_number[0], np.asarray(one.transpose(Image.Transpose.ROTATE_270)))
        np.testing.assert_array_equal(by_number[1], by_number[0])
        np.testing.assert_array_equal(by_number[2], np.asarray(one))

    def test_what_waits_is_bounded(self, raw_pictures: OnnxModel, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(feed_module, "HELD_BYTES", 20_000)
        shapes = tuple((10 + n, 10) for n in range(100))
        waiting = 0
        total = sum(h * w * 3 for h, w in shapes)
        for number, one in enumerate(feeds(raw_pictures, pictures(100, shapes), batch_size=8)):
            waiting = max(waiting, sum(h * w * 3 for h, w in shapes) - total)
            total -= one.inputs["image"].nbytes
            assert number > 0 or one.index[0] < 30
        assert total == 0

    def test_the_bits_of_the_training_preprocessing(self, tensor_pictures: OnnxModel) -> None:
        raw = [Image.fromarray(one) for one in pictures(9)]
        found, sizes = gathered(tensor_pictures, raw)
        made = ImagePreprocess(16, 20, interpolation="bicubic")
        expected = torch.stack([made(one) for one in raw]).flatten(1).numpy()
        np.testing.assert_array_equal(found, expected)
        assert sizes == [4, 4, 1]
        np.testing.assert_array_equal(gathered(tensor_pictures, pictures(9))[0], expected)
        same_size = np.stack(pictures(5, ((20, 30),)))
        np.testing.assert_array_equal(
            gathered(tensor_pictures, same_size)[0], gathered(tensor_pictures, list(same_size))[0]
        )

    def test_normalisation_is_torchs(self) -> None:
        from pyft.data.pictures import normalised

        pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(3, 1)
        mean, std, scale = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 1 / 255
        shape = (3, 1, 1)
        expected = (
            torch.from_numpy(pixels).float().mul_(scale).sub_(torch.tensor(mean).view(shape))
            .div_(torch.tensor(std).view(shape))
        )  # fmt: skip
        np.testing.assert_array_equal(normalised(pixels, mean, std, scale), expected.numpy())

    def test_tensors_go_in_as_they_are(self, tensor_pictures: OnnxModel) -> None:
        x = np.random.default_rng(0).random((5, 3, 16, 16), dtype=np.float32)
        np.testing.assert_array_equal(gathered(tensor_pictures, x)[0], x.reshape(5, -1))

    def test_a_picture_that_cannot_be_read_ends_the_threads(self, raw_pictures: OnnxModel, tmp_path: Path) -> None:
        (tmp_path / "bad.png").write_bytes(b"\x89PNG nothing")
        with pytest.raises(DataError, match=r"bad\.png: not an image"):
            list(feeds(raw_pictures, [*pictures(3), tmp_path / "bad.png"]))
        with pytest.raises(DataError, match=r"uint8 array \(H, W, 3\), got float32"):
            list(feeds(raw_pictures, [np.zeros((4, 4, 3), np.float32)]))
        given_up = feeds(raw_pictures, pictures(50), batch_size=2)
        next(given_up)
        given_up.close()  # type: ignore[attr-defined]
        assert not [
            t for t in threading.enumerate() if t.name.startswith("pyft-feed") and not t.join(5) and t.is_alive()
        ]

    def test_pictures_are_decoded_a_few_ahead(self, raw_pictures: OnnxModel, monkeypatch: pytest.MonkeyPatch) -> None:
        decoded = []
        upright = feed_module.upright
        monkeypatch.setattr(feed_module, "upright", lambda image: decoded.append(1) or upright(image))
        next(feeds(raw_pictures, [Image.fromarray(one) for one in pictures(200, ((8, 8),))], batch_size=16))
        assert len(decoded) <= 16 + 2 * feed_module.THREADS + 1

    def test_without_pillow(self, raw_pictures: OnnxModel, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
        assert len(list(feeds(raw_pictures, pictures(2)))) == 2
        with pytest.raises(MissingExtraError, match=r"pyft\[image\]"):
            list(feeds(raw_pictures, [Path("x.png")]))


TEXTS = ["a", "a b c d e", "b b", "c", "d e a b", "zzz"]


def tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers", reason="pip install 'pyft[text]'")
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *"abcde"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return made


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    spec = {"kind": "text", "tokenizer": tokenizer().to_str(), "max_length": 4, "pad_id": 0}
    path = save_graph(
        tmp_path_factory.mktemp("feed") / "tokens.onnx",
        {"input_ids": (np.int64, [*B, "sequence"])},
        [("ReduceSum", ["input_ids", "axes"], ["logits"], {"keepdims": 0})],
        {"logits": (np.int64, B)},
        {"axes": np.array([1])},
        kind="text",
        inputs_form="raw",
        preprocess=spec,
    )
    return OnnxModel(path)


class TestTexts:
    def test_tokens_are_those_of_the_package(self, token_file: OnnxModel) -> None:
        expected = [encoding.ids[:4] for encoding in tokenizer().encode_batch(TEXTS)]
        made = list(feeds(token_file, TEXTS, batch_size=2))
        for one in made:
            for row, number in zip(one.inputs["input_ids"], one.index, strict=True):
                ids = expected[number]
                assert row.tolist() == ids + [0] * (len(row) - len(ids))
        lengths = [len(expected[number]) for one in made for number in one.index]
        assert lengths == sorted(lengths)
        assert all(one.inputs["input_ids"].shape[1] == max(len(expected[n]) for n in one.index) for one in made)
        assert gathered(token_file, TEXTS)[0].tolist() == [sum(ids) for ids in expected]

    def test_texts_are_tokenised_in_parts(self, token_file: OnnxModel, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = [one.inputs["input_ids"].tolist() for one in feeds(token_file, TEXTS, batch_size=2)]
        monkeypatch.setattr(feed_module, "ENCODED", 4)
        assert [one.inputs["input_ids"].tolist() for one in feeds(token_file, TEXTS, batch_size=2)] == whole

    def test_masks_where_the_file_takes_them(self, tmp_path: Path) -> None:
        names = ("input_ids", "attention_mask", "token_type_ids")
        path = save_graph(
            tmp_path / "masked.onnx",
            {name: (np.int64, [*B, "sequence"]) for name in names},
            [("Concat", list(names), ["logits"], {"axis": 1})],
            {"logits": (np.int64, [*B, "all"])},
            kind="text",
            preprocess={"kind": "text", "tokenizer": tokenizer().to_str(), "max_length": 9, "pad_id": 0},
        )
        (one,) = feeds(OnnxModel(path), ["b a", "c"])
        assert one.index.tolist() == [1, 0]
        assert {name: one.inputs[name].tolist() for name in names} == {
            "input_ids": [[4, 0], [3, 2]],
            "attention_mask": [[1, 0], [1, 1]],
            "token_type_ids": [[0, 0], [0, 0]],
        }

    def test_strings(self, tmp_path: Path) -> None:
        pytest.importorskip("onnxruntime_extensions", reason="pip install 'pyft[text-graph]'")
        path = save_graph(
            tmp_path / "strings.onnx",
            {"text": (np.object_, B)},
            [("StringUpper", ["text"], ["logits"], {"domain": "ai.onnx.contrib"})],
            {"logits": (np.object_, B)},
            kind="text",
            inputs_form="strings",
        )
        assert gathered(OnnxModel(path), TEXTS, 4)[0].tolist() == [text.upper() for text in TEXTS]

    def test_strings_without_the_extensions(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = save_graph(
            tmp_path / "strings.onnx",
            {"text": (np.object_, B)},
            [("StringUpper", ["text"], ["logits"], {"domain": "ai.onnx.contrib"})],
            {"logits": (np.object_, B)},
            inputs_form="strings",
        )
        monkeypatch.setitem(__import__("sys").modules, "onnxruntime_extensions", None)
        with pytest.raises(MissingExtraError, match=r"pyft\[text-graph\]"):
            OnnxModel(path)

    def test_without_tokenizers(self, token_file: OnnxModel, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
        with pytest.raises(MissingExtraError, match=r"pyft\[text\]"):
            list(feeds(token_file, TEXTS))


@pytest.fixture(scope="module")
def table_file(tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    """Two columns of numbers, one of words; gives the numbers' difference and the words as they came."""
    path = save_graph(
        tmp_path_factory.mktemp("feed") / "table.onnx",
        {"the age": (np.float32, B), "x/y": (np.float32, B), "town": (np.object_, B)},
        [("Sub", ["the age", "x/y"], ["logits"]), ("Identity", ["town"], ["words"])],
        {"logits": (np.float32, B), "words": (np.object_, B)},
        kind="array",
        inputs_form="raw",
        columns=["the age", "x/y", "town"],
    )
    return OnnxModel(path)


class TestTables:
    def test_columns_by_name_with_what_is_missing(self, table_file: OnnxModel) -> None:
        raw = {
            "town": ["Rome", None, float("nan"), "Oslo", ""],
            "unused": [0] * 5,
            "x/y": ["1", "2.5", " ", "4", None],
            "the age": np.array([1, 2, 3, 4, 5]),
        }
        found, words = [], []
        for one in feeds(table_file, raw, batch_size=2):
            outputs = table_file.run(one.inputs)
            found += outputs["logits"].tolist()
            words += outputs["words"].tolist()
        np.testing.assert_array_equal(found, [0, -0.5, np.nan, 0, np.nan])
        assert words == ["Rome", "", "", "Oslo", ""]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"town": None}, "takes the column 'town', which is missing"),
            ({"the age": ["1", "old"]}, "column 'the age' holds 'old' in row 1, expected a number"),
            ({"town": ["a"]}, "columns must have one length, got the age: 2"),
        ],
    )
    def test_columns_that_do_not_fit(self, table_file: OnnxModel, change: dict[str, Any], message: str) -> None:
        raw = {"the age": [1, 2], "x/y": [1.0, 2.0], "town": ["a", "b"], **change}
        with pytest.raises(DataError, match=message):
            list(feeds(table_file, {name: values for name, values in raw.items() if values is not None}))

    def test_named_columns_of_a_file_with_one_input(self, tmp_path: Path) -> None:
        path = save_graph(
            tmp_path / "matrix.onnx",
            {"input": (np.float32, [*B, 2])},
            [("Identity", ["input"], ["logits"])],
            {"logits": (np.float32, [*B, 2])},
            kind="array",
            columns=["b", "a"],
        )
        model = OnnxModel(path)
        raw = {"a": [1, 2, 3], "c": ["x", "y", "z"], "b": ["4", "5", "6"]}
        assert gathered(model, raw, 2)[0].tolist() == [[4, 1], [5, 2], [6, 3]]
        with pytest.raises(DataError, match="takes the column 'b', which is missing"):
            list(feeds(model, {"a": [1], "c": [2]}))
        np.testing.assert_array_equal(gathered(model, np.eye(2))[0], np.eye(2, dtype=np.float32))
        assert list(feeds(model, [])) == []
        assert list(feeds(model, np.empty((0, 2)))) == []


class TestFiles:
    @pytest.mark.parametrize(
        ("raw", "message"),
        [("one text", "got one text"), (3, "got int"), (iter([1]), "got list_iterator")],
    )
    def test_what_is_no_set_of_samples(self, table_file: OnnxModel, raw: Any, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            feeds(table_file, raw)

    @pytest.mark.parametrize("size", [0, -1, 2.0, True])
    def test_batch_size(self, table_file: OnnxModel, size: Any) -> None:
        with pytest.raises(ConfigError, match="batch_size"):
            feeds(table_file, [[1.0]], batch_size=size)

    def test_a_file_of_another_exporter(self, tmp_path: Path) -> None:
        path = save_graph(
            tmp_path / "plain.onnx",
            {"x": (np.float32, [*B, 2])},
            [("Identity", ["x"], ["y"])],
            {"y": (np.float32, [*B, 2])},
        )
        model = OnnxModel(path)
        (one,) = feeds(model, np.ones((3, 2)))
        assert one.inputs["x"].dtype == np.float32
        (named,) = feeds(model, {"x": np.ones((3, 2))})
        np.testing.assert_array_equal(model(named.inputs), model(one.inputs))
        with pytest.raises(ConfigError, match=r"does not say what it takes"):
            feeds(model, ["a text"])

    def test_what_the_file_says(self, tmp_path: Path) -> None:
        path = save_graph(
            tmp_path / "said.onnx",
            {"x": (np.float32, B)},
            [("Identity", ["x"], ["logits"])],
            {"logits": (np.float32, B)},
            inputs_form="raw",
            precision="int8",
            weights_hash="ab",
            data_hash="cd",
            metrics={"accuracy": 0.5},
        )
        model = OnnxModel(path)
        meta = model.meta
        assert (meta.inputs_form, meta.precision, meta.weights_hash, meta.data_hash) == ("raw", "int8", "ab", "cd")
        assert meta.metrics == {"accuracy": 0.5}
        with pytest.raises(ConfigError, match="gives the outputs logits, not scores"):
            model.run({"x": np.ones(2, np.float32)}, ["scores"])
        save_graph(tmp_path / "odd.onnx", {"x": (np.float32, B)}, [("Identity", ["x"], ["y"])],
                   {"y": (np.float32, B)}, inputs_form="future")  # fmt: skip
        with pytest.raises(ExportError, match=r"pyft\.inputs_form is 'future', expected raw, tensor, strings"):
            OnnxModel(tmp_path / "odd.onnx")
