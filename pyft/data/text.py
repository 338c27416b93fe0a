"""Texts to token numbers: the tokenizer of a pretrained model, kept with the model as plain JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyft.errors import ConfigError, DataError, need

if TYPE_CHECKING:
    import torch

DEFAULT_MAX_LENGTH = 512
"""Tokens, where neither the tokenizer nor the model names a limit."""

_OFFSET_POSITIONS = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "mpnet", "data2vec-text"}
"""Models that number positions from pad_id + 1, so that two of `max_position_embeddings` are never used."""


class TextPreprocess:
    """Texts to `input_ids` and `attention_mask`.

    Args:
        tokenizer: content of a `tokenizer.json` (Hugging Face tokenizers format).
        max_length: tokens kept per text, special tokens included; longer texts are cut.
        pad_id: token number that fills short rows.

    Raises:
        ConfigError: `tokenizer` cannot be read, or `max_length` leaves no room for the text.
        MissingExtraError: the package `tokenizers` is not installed.
    """

    def __init__(self, tokenizer: str, max_length: int, pad_id: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = int(max_length)
        self.pad_id = int(pad_id)
        self._tokenizer = _load_tokenizer(tokenizer)
        special = self._tokenizer.num_special_tokens_to_add(False)
        if self.max_length <= special:
            raise ConfigError(
                f"max_length={max_length}: expected more than {special}, the tokens that the tokenizer adds to each "
                f"text"
            )
        # The file may ask for a fixed padding and a shorter cut; both would spoil the buckets.
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length=self.max_length)

    @classmethod
    def from_folder(cls, folder: str | Path, max_length: int | None = None) -> TextPreprocess:
        """Read `tokenizer.json`, and the limits from `tokenizer_config.json` and `config.json`.

        Args:
            max_length: tokens per text; default: the model's limit, or 512 where it names none.

        Raises:
            ConfigError: there is no tokenizer.json, or `max_length` is above the model's limit.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(
                f"{folder}: no tokenizer.json; "
                f"write one with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        configs = [
            _read_json(folder / name) for name in ("tokenizer_config.json", "config.json", "special_tokens_map.json")
        ]
        tokenizer = path.read_text(encoding="utf-8")
        pad_id = _pad_id(json.loads(tokenizer), *configs)
        limit = _position_limit(configs[0], configs[1], pad_id)
        if max_length is not None and limit is not None and max_length > limit:
            raise ConfigError(
                f"max_length={max_length}: the model of {folder.name} takes at most {limit} tokens; "
                f"leave max_length out, or lower it"
            )
        return cls(tokenizer, max_length or limit or DEFAULT_MAX_LENGTH, pad_id)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token numbers of each text: list of int64 (T,), special tokens included, at most `max_length` long."""
        return [np.array(encoding.ids, dtype=np.int64) for encoding in self._encodings(texts)]

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """All token numbers in one int32 array, and the (N + 1,) int64 offsets at which texts begin and end."""
        tokens = [encoding.ids for encoding in self._encodings(texts)]
        offsets = np.zeros(len(tokens) + 1, dtype=np.int64)
        np.cumsum([len(ids) for ids in tokens], out=offsets[1:])
        flat = np.fromiter((number for ids in tokens for number in ids), dtype=np.int32, count=int(offsets[-1]))
        return flat, offsets

    def _encodings(self, texts: Sequence[str]) -> list[Any]:
        try:
            return self._tokenizer.encode_batch_fast(list(texts))
        except (TypeError, ValueError) as error:
            wrong = next((row for row, text in enumerate(texts) if not isinstance(text, str)), None)
            what = "" if wrong is None else f"; row {wrong} is {type(texts[wrong]).__name__}"
            raise DataError(f"texts: expected a list of str{what} ({error})") from None

    def tokens(self, text: str) -> tuple[list[str], list[tuple[int, int]], list[bool]]:
        """The T tokens of one text as `encode` numbers them: as written, (start, end) of each in the text, and whether
        the tokenizer added it, as it adds [CLS]."""
        encoding = self._tokenizer.encode(text)
        return encoding.tokens, encoding.offsets, [bool(one) for one in encoding.special_tokens_mask]

    def collate(self, rows: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask`, both (B, T) int64, padded on the right to the longest row."""
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        return gather_tokens(np.concatenate(rows), offsets, np.arange(len(rows)), self.pad_id)

    def __call__(self, texts: str | Sequence[str]) -> dict[str, torch.Tensor]:
        """`collate(encode(texts))`; one text is a batch of one."""
        return self.collate(self.encode([texts] if isinstance(texts, str) else texts))

    def spec(self) -> dict[str, Any]:
        """All that `from_spec` needs, as JSON values."""
        return {"kind": "text", "tokenizer": self.tokenizer, "max_length": self.max_length, "pad_id": self.pad_id}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> TextPreprocess:
        """The preprocessing that `spec()` described."""
        return cls(spec["tokenizer"], spec["max_length"], spec["pad_id"])


def gather_tokens(flat: np.ndarray, offsets: np.ndarray, index: np.ndarray, pad_id: int) -> dict[str, torch.Tensor]:
    """`gather_rows` as Tensors."""
    # Here and not above: texts become tokens without torch, too.
    import torch

    return {name: torch.from_numpy(rows) for name, rows in gather_rows(flat, offsets, index, pad_id).items()}


def gather_rows(flat: np.ndarray, offsets: np.ndarray, index: np.ndarray, pad_id: int) -> dict[str, np.ndarray]:
    """The texts `index` (B,) out of flat tokens, as `input_ids` and `attention_mask` (B, T) int64, padded on the right.

    Args:
        flat: token numbers of all texts, one after the other.
        offsets: (N + 1,): text i is `flat[offsets[i]:offsets[i + 1]]`.

    >>> batch = gather_rows(np.array([5, 6, 7]), np.array([0, 2, 3]), np.array([1, 0]), 0)
    >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist()
    ([[7, 0], [5, 6]], [[1, 0], [1, 1]])
    """
    starts = offsets[index]
    lengths = offsets[index + 1] - starts
    steps = np.arange(int(lengths.max(initial=0)))
    mask = steps[None, :] < lengths[:, None]
    places = np.where(mask, starts[:, None] + steps[None, :], 0)
    tokens = np.where(mask, flat[places], pad_id).astype(np.int64)
    return {"input_ids": tokens, "attention_mask": mask.astype(np.int64)}


def _load_tokenizer(content: str) -> Any:
    tokenizers = need("tokenizers", "text", "turning texts into tokens")
    try:
        return tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # tokenizers raises plain Exception
        raise ConfigError(f"the tokenizer cannot be read: {error}; expected the content of a tokenizer.json") from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    return content if isinstance(content, dict) else {}


def _pad_id(
    tokenizer: dict[str, Any], tokenizer_config: dict[str, Any], config: dict[str, Any], special: dict[str, Any]
) -> int:
    """Padding is masked, so where a model has no padding token any number does; 0 exists in every vocabulary."""
    numbers = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    for source in (tokenizer_config, special):
        token = source.get("pad_token")
        content = token.get("content") if isinstance(token, dict) else token
        if content in numbers:
            return int(numbers[content])
    if isinstance(config.get("pad_token_id"), int):
        return int(config["pad_token_id"])
    return int((tokenizer.get("padding") or {}).get("pad_id", 0))


def _position_limit(tokenizer_config: dict[str, Any], config: dict[str, Any], pad_id: int) -> int | None:
    limits = []
    named = tokenizer_config.get("model_max_length")
    # transformers writes 1e30 for "no limit".
    if isinstance(named, int | float) and 0 < named < 1e9:
        limits.append(int(named))
    positions = config.get("max_position_embeddings")
    if isinstance(positions, int) and positions > 0:
        limits.append(positions - pad_id - 1 if config.get("model_type") in _OFFSET_POSITIONS else positions)
    return min(limits, default=None)
