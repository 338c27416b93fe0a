"""stories260K (Karpathy, tinyllamas), a language model of 260,032 parameters, as a transformers Llama."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

EPS = 1e-5


class StoryModel(nn.Module):
    """Token numbers (B, T) to logits (B, T, V)."""

    def __init__(self, llama: nn.Module) -> None:
        super().__init__()
        self.llama = llama

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`input_ids` (B, T) int64."""
        return self.llama(input_ids=input_ids, use_cache=False).logits


def load_story_model(path: Path) -> StoryModel:
    """Read a checkpoint of llama2.c's first format: seven int32, then float32 weights, those of all layers together."""
    import transformers

    content = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack("<7i", content[:28])
    values = torch.from_numpy(np.frombuffer(content, dtype="<f4", offset=28).copy())
    side = dim // heads
    shapes = {
        "embed_tokens": (vocab, dim), "input_layernorm": (layers, dim), "self_attn.q_proj": (layers, dim, dim),
        "self_attn.k_proj": (layers, kv_heads * side, dim), "self_attn.v_proj": (layers, kv_heads * side, dim),
        "self_attn.o_proj": (layers, dim, dim), "post_attention_layernorm": (layers, dim),
        "mlp.gate_proj": (layers, hidden, dim), "mlp.down_proj": (layers, dim, hidden),
        "mlp.up_proj": (layers, hidden, dim), "norm": (dim,),
    }  # fmt: skip
    state: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        tensor, values = values[:count].view(shape), values[count:]
        if name in ("embed_tokens", "norm"):
            state[f"model.{name}.weight"] = tensor
            continue
        for layer, weight in enumerate(tensor):
            turned = halves_apart(weight, side) if name in ("self_attn.q_proj", "self_attn.k_proj") else weight
            state[f"model.layers.{layer}.{name}.weight"] = turned
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=length, rms_norm_eps=EPS,
        tie_word_embeddings=True, attn_implementation="eager",
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config)
    missing, unexpected = llama.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], []), (missing, unexpected)
    return StoryModel(llama.eval())


def halves_apart(weight: torch.Tensor, side: int) -> torch.Tensor:
    """llama2.c turns neighbouring rows of a head together, transformers rows half a head apart."""
    return weight.view(-1, side // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def load_story_tokens(path: Path) -> list[bytes]:
    """The bytes of each token: int32 longest, then for each token float32 score, int32 length, bytes."""
    content = path.read_bytes()
    tokens, place = [], 4
    while place < len(content):
        (count,) = struct.unpack("<i", content[place + 4 : place + 8])
        tokens.append(content[place + 8 : place + 8 + count])
        place += 8 + count
    return tokens


def greedy(call: Any, start: list[int], steps: int) -> list[int]:
    """The likeliest continuation by `call`, from token numbers (1, T) to logits (1, T, V)."""
    tokens = list(start)
    for _ in range(steps):
        tokens.append(int(np.asarray(call(np.array([tokens], dtype=np.int64)))[0, -1].argmax()))
    return tokens


def spelled(text: str, tokens: list[bytes]) -> list[int]:
    """Token numbers of a text, the longest token first; a character that no token begins with is left out."""
    known = {token: number for number, token in enumerate(tokens)}
    longest = max(map(len, tokens))
    numbers, content, place = [], text.encode(), 0
    while place < len(content):
        sizes = range(min(longest, len(content) - place), 0, -1)
        size = next((size for size in sizes if content[place : place + size] in known), 0)
        if size:
            numbers.append(known[content[place : place + size]])
        place += max(size, 1)
    return numbers
