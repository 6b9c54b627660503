"""Transformers' rows of benchmarks.trainers."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from benchmarks import trainers
from fbopt.integrations.transformers import WeightedTrainer

LANGUAGE = {"tokens, Llama": "llama", "tokens, GPT-2": "gpt2"}
LLAMA = "bfloat16 parameters, Llama"
MORE = (*LANGUAGE, trainers.BFLOAT16, LLAMA)


class Module(nn.Module):
    """Returns its mean loss, as models did before `num_items_in_batch`."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.network = trainers.model(case)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": trainers.loss_fn(self.network(x), labels)}


class FirstGradient(TrainerCallback):
    """Notes the error of the only step's gradient."""

    def __init__(self, measure: Callable[[Any], float]) -> None:
        self.measure, self.error = measure, 0.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.error = self.measure(kwargs["model"])


def run(case: str, ours: bool) -> float:
    """Train with ``gradient_accumulation_steps``, and return the error."""
    transformers.logging.set_verbosity_error()
    if case in LANGUAGE:
        return _language(LANGUAGE[case], ours)
    if case == LLAMA:
        return _bfloat16(ours)
    windows, model = trainers.windows(case), Module(case)
    data = [{"x": x, "labels": labels} for window in windows for x, labels in window]
    callback = FirstGradient(lambda model: trainers.gradient_error(model.network, case))
    if case == trainers.BFLOAT16:
        _train(model, data, len(windows[0]), ours, callbacks=[callback])
        return callback.error
    _train(model, data, len(windows[0]), ours)
    return trainers.error(model.network, case)


def _train(model: nn.Module, data: list[Any], steps: int, ours: bool, **options: Any) -> None:
    """Train for an epoch; a sample of the data is a whole batch."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=1,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=steps,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = (WeightedTrainer if ours else transformers.Trainer)(
            model,
            arguments,
            train_dataset=data,
            data_collator=lambda samples: samples[0],
            optimizers=(torch.optim.SGD(model.parameters(), lr=trainers.LR), None),
            **options,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


def _language_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    special = {"vocab_size": 37, "bos_token_id": 0, "eos_token_id": 0}
    if name == "gpt2":
        sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**special, **sizes, **dropout))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**special, **sizes, num_attention_heads=2)
    return transformers.LlamaForCausalLM(config)


def _sequences(count: int) -> list[Tensor]:
    """Return sequences of 3 to 20 tokens."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 21, (count,), generator=draw).tolist()
    return [torch.randint(1, 37, (1, n), generator=draw) for n in lengths]


def _backward(model: nn.Module, window: list[Tensor]) -> None:
    """Add the gradient of the mean loss over all tokens of a window."""
    count = sum(t.numel() - 1 for t in window)
    for t in window:
        (model(input_ids=t, labels=t).loss * (t.numel() - 1) / count).backward()


def _language(name: str, ours: bool) -> float:
    """Return the error after three windows of three sequences, in float32."""
    model = _language_model(name)
    wide, tokens = copy.deepcopy(model).double(), _sequences(9)
    _train(model, [{"input_ids": t, "labels": t} for t in tokens], 3, ours)
    optimizer = torch.optim.SGD(wide.parameters(), lr=trainers.LR)
    for i in range(0, len(tokens), 3):
        optimizer.zero_grad()
        _backward(wide, tokens[i : i + 3])
        optimizer.step()
    pairs = zip(model.parameters(), wide.parameters(), strict=True)
    return max((p.detach() - q.detach()).abs().max().item() for p, q in pairs)


def _bfloat16(ours: bool) -> float:
    """Return the relative error of the gradient of 512 sequences, one at a time."""
    model = _language_model("llama").bfloat16()
    wide, tokens = copy.deepcopy(model).double(), _sequences(512)
    _backward(wide, tokens)
    expected = torch.cat([p.grad.flatten() for p in wide.parameters()])

    def measure(model: nn.Module) -> float:
        found = torch.cat([p.grad.double().flatten() for p in model.parameters()])
        return ((found - expected).norm() / expected.norm()).item()

    callback, data = FirstGradient(measure), [{"input_ids": t, "labels": t} for t in tokens]
    _train(model, data, len(tokens), ours, callbacks=[callback])
    return callback.error
