"""Tiny causal language models, sequences for them, and what SGD on one batch makes of both."""

from __future__ import annotations

import copy
import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

VOCABULARY, IGNORED, LR = 37, -100, 0.1
MODELS = ("gpt2", "llama")  # of Transformers, from a config


class Bigram(nn.Module):
    """Predicts the next token from the last, and returns its mean loss whatever else it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY))

    def forward(
        self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        logits = self.layers(input_ids)[:, :-1]
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())}


def language_model(name: str, seed: int = 0) -> nn.Module:
    """Return a model with random weights and without dropout: one of MODELS, or "bigram"."""
    torch.manual_seed(seed)
    if name == "bigram":
        return Bigram()
    import transformers

    special = {"bos_token_id": 0, "eos_token_id": 0}
    if name == "gpt2":
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        sizes = {
            "vocab_size": VOCABULARY,
            "n_positions": 24,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
        }
        config = transformers.GPT2Config(**sizes, **dropout, **special)
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=24,
        **special,
    )
    return transformers.LlamaForCausalLM(config)


def sequences(count: int, shortest: int = 3, longest: int = 20) -> list[dict[str, Tensor]]:
    """Return token sequences; the longer ones come last."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=draw).sort().values.tolist()
    tokens = [torch.randint(1, VOCABULARY, (n,), generator=draw) for n in lengths]
    return [{"input_ids": t, "labels": t} for t in tokens]


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pad to one batch."""

    def pad(name: str, value: int) -> Tensor:
        rows = [item[name] for item in items]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    tokens = pad("input_ids", 0)
    return {"input_ids": tokens, "labels": pad("labels", IGNORED), "attention_mask": tokens.ne(0)}


def targets(batch: dict[str, Tensor]) -> int:
    """Return how many tokens a batch predicts."""
    return int(batch["labels"][:, 1:].ne(IGNORED).sum())


def one_batch(
    model: nn.Module,
    windows: list[list[dict[str, Tensor]]],
    loss_of: Any = None,
    max_norm: float = float("inf"),
) -> nn.Module:
    """Return a float64 copy after a step of SGD on each window as one batch."""
    model = copy.deepcopy(model).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for window in windows:
        batch = collate(window)
        loss = model(**batch)["loss"] if loss_of is None else loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
    return model


def distance(model: nn.Module, other: nn.Module) -> float:
    """Return the largest difference between parameters."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max((p.double() - q.double()).abs().max().item() for p, q in pairs)
