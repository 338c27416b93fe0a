"""A text encoder with one pooled vector per text and a linear head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from pyft.errors import ConfigError
from pyft.models.hf import encoder_from_config, load_encoder, read_config
from pyft.models.init import init_linear

Pooling = Literal["mean", "cls"]


def build_text_classifier(folder: str | Path, num_outputs: int, seed: int = 0) -> TextClassifier:
    """A `TextClassifier` on the encoder of a transformers folder, in eval mode.

    The encoder is the base model also where the folder holds a `...ForSequenceClassification`: its old classifier
    belongs to other labels. Pooling is what `1_Pooling/config.json` says, or the mean over tokens.

    Args:
        folder: config.json, *.safetensors, and for sentence-transformers models 1_Pooling/config.json.
        num_outputs: C classes, or K targets.
        seed: of the head's initial values.

    Raises:
        ConfigError: the folder cannot be loaded; see `pyft.models.hf.load_encoder`.
    """
    folder = Path(folder)
    read_config(folder)
    pooling = read_pooling(folder)
    return TextClassifier(load_encoder(folder), num_outputs, pooling=pooling, seed=seed).eval()


def read_pooling(folder: Path) -> Pooling:
    """The pooling that a sentence-transformers folder asks for; "mean" where it does not say."""
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    try:
        modes = json.loads(path.read_text(encoding="utf-8"))
        chosen = [key for key, value in modes.items() if key.startswith("pooling_mode") and value]
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"model: {path} cannot be read: {error}") from error
    if chosen in (["pooling_mode_mean_tokens"], []):
        return "mean"
    if chosen == ["pooling_mode_cls_token"]:
        return "cls"
    raise ConfigError(f"model: {path} asks for {', '.join(chosen)}: only mean and cls pooling are supported")


class TextClassifier(nn.Module):
    """Encoder, pooling over tokens, and a linear head.

    The pooled vector is scaled to unit root mean square (its direction is what sentence-transformers' normalised
    embedding keeps), so that one learning rate fits the head of any encoder.

    Attributes:
        encoder: called as `encoder(input_ids=..., attention_mask=...)`, gives `.last_hidden_state` (B, T, H).
        pooling: "mean" over the tokens that the mask keeps, or "cls", the first token.
        dropout: on the pooled vector while training; 0 unless asked for.
        head: `nn.Linear(H, num_outputs)`.
    """

    def __init__(
        self, encoder: nn.Module, num_outputs: int, pooling: Pooling = "mean", dropout: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__()
        if pooling not in ("mean", "cls"):
            raise ConfigError(f'pooling={pooling!r}: "mean" or "cls" is expected')
        config: Any = encoder.config
        self.encoder = encoder
        self.pooling: Pooling = pooling
        self.dropout = nn.Dropout(dropout)
        self.head = nn.utils.skip_init(nn.Linear, config.hidden_size, num_outputs)
        init_linear(self.head, seed)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits (B, num_outputs) of token ids (B, T) int64, with 1 in `attention_mask` (B, T) for real tokens."""
        return self.head(self.dropout(self.features(input_ids, attention_mask)))

    def features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Pooled vectors (B, H) of unit root mean square, at least float32; what the head takes."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        # Sums over tokens and channels lose too much in bfloat16.
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1.0)
        return pooled * torch.rsqrt(pooled.square().mean(-1, keepdim=True) + 1e-12)

    def spec(self) -> dict[str, Any]:
        """Everything but the weights, as JSON; `TextClassifier.from_spec` builds the same architecture again."""
        config: Any = self.encoder.config
        return {
            "architecture": "TextClassifier",
            "encoder": json.loads(json.dumps(config.to_dict(), default=str)),
            "num_outputs": self.head.out_features,
            "pooling": self.pooling,
            "dropout": self.dropout.p,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> TextClassifier:
        """The architecture that `spec` describes, with random weights: fill it by `pyft.models.saved.load_state`."""
        encoder = encoder_from_config(spec["encoder"])
        return cls(encoder, spec["num_outputs"], pooling=spec["pooling"], dropout=spec["dropout"]).eval()
