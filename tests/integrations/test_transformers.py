"""Transformers' Trainer with right weights: every step is that of one batch."""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
import trainer_ranks
from conftest import bits
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks import tiny_language as tiny
from fbopt import FullBatchClosure, FullBatchGD, GradientPenalty
from fbopt.integrations.transformers import FullBatchTrainer, WeightedTrainer

pytestmark = pytest.mark.usefixtures("one_thread")
DATA = tiny.sequences(26)  # seven micro-batches of at most 4


def train(
    cls: type[Trainer],
    model: nn.Module,
    folder: Path,
    *,
    steps: int = 3,
    resume: str | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    data: Any = DATA,
    options: dict[str, Any] | None = None,
    **arguments: Any,
) -> Trainer:
    defaults = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
    }
    trainer = cls(
        model,
        TrainingArguments(
            str(folder),
            max_steps=steps,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            **(defaults | arguments),
        ),
        data_collator=tiny.collate,
        train_dataset=data,
        optimizers=(optimizer or torch.optim.SGD(model.parameters(), lr=tiny.LR), None),
        **(options or {}),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def windows(size: int, count: int) -> list[list[Any]]:
    """Return the samples of each step: `size` at a time, and what is left at the end."""
    epoch = [DATA[i : i + size] for i in range(0, len(DATA), size)]
    return (epoch * count)[:count]


def smoothed(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    flat, labels = logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    return nn.functional.cross_entropy(flat, labels, label_smoothing=0.1)


@pytest.mark.parametrize("name", tiny.MODELS)
@pytest.mark.parametrize(("cls", "size"), [(WeightedTrainer, 12), (FullBatchTrainer, 26)])
@pytest.mark.parametrize("backward", [False, True])
def test_a_step_is_that_of_one_batch(name, cls, size, backward, tmp_path):
    model = tiny.language_model(name)
    expected = tiny.one_batch(model, windows(size, 4))
    arguments: dict[str, Any] = {"options": {"backward": backward}}
    if backward:
        reentrant = {"use_reentrant": True}
        arguments |= {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": reentrant,
        }
    trainer = train(cls, model, tmp_path, steps=4, **arguments)
    assert tiny.distance(model, expected) < 1e-6
    assert trainer.state.global_step == trainer.closure.step == 4


def test_label_smoothing_and_loss_functions_are_weighed_too(tmp_path):
    model = tiny.language_model("gpt2")
    expected = tiny.one_batch(model, windows(12, 3), smoothed)
    by_function = copy.deepcopy(model)
    train(WeightedTrainer, model, tmp_path, label_smoothing_factor=0.1)
    assert tiny.distance(model, expected) < 1e-6

    def total(outputs: Any, labels: Any, num_items_in_batch: Any) -> torch.Tensor:
        flat, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        loss = nn.functional.cross_entropy(flat, labels, label_smoothing=0.1, reduction="sum")
        return loss / num_items_in_batch

    train(WeightedTrainer, by_function, tmp_path, options={"compute_loss_func": total})
    assert tiny.distance(by_function, expected) < 1e-6


class Tagger(nn.Module):
    """Takes any keyword, and its loss is a mean whatever `num_items_in_batch` is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(tiny.VOCABULARY, 8), nn.Linear(8, 37))

    def forward(self, input_ids: Any, labels: Any, **kwargs: Any) -> dict[str, Any]:
        logits = self.layers(input_ids)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


class Classifier(Tagger):
    """One label for a sequence, a loss without keywords."""

    def forward(self, input_ids: Any, labels: Any, attention_mask: Any = None) -> dict[str, Any]:
        logits = self.layers(input_ids)[:, 0]
        return {"loss": nn.functional.cross_entropy(logits, labels[:, 1])}


@pytest.mark.parametrize("kind", [Tagger, Classifier])
def test_models_that_take_their_own_mean(kind, tmp_path, monkeypatch):
    model = kind()

    def loss_of(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        return model(batch["input_ids"], batch["labels"])["loss"]

    if kind is Classifier:  # whose mean is over sequences
        monkeypatch.setattr(WeightedTrainer, "chunk_weight", lambda self, x: len(x["labels"]))
    expected = tiny.one_batch(model, windows(12, 3), loss_of)
    train(WeightedTrainer, model, tmp_path)
    assert tiny.distance(model, expected) < 1e-6


def test_bfloat16_parameters_keep_their_sums_in_float32(tmp_path):
    model = tiny.language_model("llama").bfloat16()
    parts = [gradients(model, [sample]) for sample in DATA]  # as bfloat16, and not rounded again
    weights = [len(sample["labels"]) - 1 for sample in DATA]
    expected = [
        sum(w * g for w, g in zip(weights, of_one, strict=True)) / sum(weights)
        for of_one in zip(*parts, strict=True)
    ]
    errors = {}
    for cls in (Trainer, WeightedTrainer):
        kept: list[torch.Tensor] = []
        small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": len(DATA)}
        options = {"callbacks": [Keep(kept)]}
        train(cls, copy.deepcopy(model), tmp_path, steps=1, options=options, **small)
        errors[cls] = relative(kept, expected)
    assert errors[WeightedTrainer] < 2**-9  # one rounding
    assert errors[Trainer] > 2 * errors[WeightedTrainer]


def gradients(model: nn.Module, samples: list[Any]) -> list[torch.Tensor]:
    """Return the gradient of the samples as one batch, in float64 once it is made."""
    loss = model(**tiny.collate(samples)).loss
    return [g.double() for g in torch.autograd.grad(loss, list(model.parameters()))]


def relative(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    off = math.fsum(float((f.double() - e).square().sum()) for f, e in pairs)
    return math.sqrt(off / math.fsum(float(e.square().sum()) for e in expected))


class Keep(TrainerCallback):
    """Keeps the gradient of the last step."""

    def __init__(self, kept: list[torch.Tensor]) -> None:
        self.kept = kept

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kept[:] = [p.grad.clone() for p in kwargs["model"].parameters()]


def strength(step: int) -> float:
    return 0.05 * (step + 1)


def by_closure(model: nn.Module, steps: int, **options: Any) -> nn.Module:
    """Return a copy after steps of FullBatchGD on a closure over the same chunks."""
    model = copy.deepcopy(model)
    optimizer = FullBatchGD(model.parameters(), lr=tiny.LR, momentum=0.9)
    closure = FullBatchClosure(
        model,
        chunks=[tiny.collate(DATA[i : i + 4]) for i in range(0, len(DATA), 4)],
        evaluate=lambda model, chunk: model(**chunk).loss,
        weight=tiny.targets,
        optimizer=optimizer,
        **options,
    )
    for _ in range(steps):
        optimizer.step(closure)
    return model


def momentum(model: nn.Module) -> FullBatchGD:
    return FullBatchGD(model.parameters(), lr=tiny.LR, momentum=0.9)


def test_penalty_and_resume_to_the_bit(tmp_path):
    model = tiny.language_model("llama")
    options = {"penalty": GradientPenalty(coefficient=strength), "accumulation": "exact"}
    expected = by_closure(model, 4, **options)
    whole, resumed = copy.deepcopy(model), copy.deepcopy(model)
    saving = {"save_strategy": "steps", "save_steps": 2}
    arguments = {"steps": 4, "options": options} | saving
    train(FullBatchTrainer, whole, tmp_path, optimizer=momentum(whole), **arguments)
    assert tiny.distance(whole, expected) < 1e-6
    assert tiny.distance(whole, by_closure(model, 4)) > 1e-4
    shutil.rmtree(tmp_path / "checkpoint-4")
    checkpoint = str(tmp_path / "checkpoint-2")
    arguments |= {"optimizer": momentum(resumed), "resume": checkpoint}
    trainer = train(FullBatchTrainer, resumed, tmp_path, **arguments)
    assert trainer.closure.step == 4
    assert bits(resumed) == bits(whole)


def test_frozen_parameters_and_micro_batches_without_targets(tmp_path):
    model = tiny.language_model("llama")
    model.model.embed_tokens.requires_grad_(False)
    before = bits(model.model.embed_tokens)
    nothing = {name: torch.full_like(t, -100 * (name == "labels")) for name, t in DATA[0].items()}
    data = [nothing] * 4 + DATA[:8]
    expected = tiny.one_batch(model, [DATA[:8]])
    trainer = train(WeightedTrainer, model, tmp_path, steps=1, data=data)
    assert tiny.distance(model, expected) < 1e-6 and bits(model.model.embed_tokens) == before
    assert math.isfinite(trainer.state.log_history[0]["loss"])


class Count(TrainerCallback):
    def __init__(self) -> None:
        self.seen = {"step": 0, "substep": 0, "optimizer": 0}

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seen["step"] += 1

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.seen["substep"] += 1

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.seen["optimizer"] += 1


def test_logs_clipping_schedules_and_callbacks_are_the_trainers(tmp_path):
    model, count = tiny.language_model("llama"), Count()
    norm = math.sqrt(math.fsum(float(g.square().sum()) for g in gradients(model, DATA)))
    loss = model(**tiny.collate(DATA)).loss.item()
    optimizer = torch.optim.SGD(model.parameters(), lr=tiny.LR)
    before = [p.detach().clone() for p in model.parameters()]
    trainer = train(
        FullBatchTrainer,
        model,
        tmp_path,
        steps=2,
        optimizer=optimizer,
        max_grad_norm=0.01,
        lr_scheduler_type="linear",
        options={"callbacks": [count]},
    )
    first, second = trainer.state.log_history[:2]
    assert first["loss"] == pytest.approx(loss, rel=1e-6)
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert (first["learning_rate"], second["learning_rate"]) == (tiny.LR, tiny.LR / 2)
    moved = relative([p.detach() for p in model.parameters()], before) * math.sqrt(
        math.fsum(float(b.square().sum()) for b in before)
    )
    assert moved == pytest.approx(0.01 * tiny.LR * 1.5, rel=0.05)
    assert count.seen == {"step": 2, "substep": 12, "optimizer": 2}


class Streamed(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return iter(DATA)


def test_the_last_samples_of_a_stream_make_a_step_of_their_own(tmp_path):
    model = tiny.language_model("llama")
    expected = tiny.one_batch(model, windows(12, 4))
    train(WeightedTrainer, model, tmp_path, steps=4, data=Streamed())
    assert tiny.distance(model, expected) < 1e-6


class Scaled(WeightedTrainer):
    """As with fp16=True, which Accelerate refuses on the CPU."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu")


@pytest.mark.parametrize(
    ("cls", "change", "message"),
    [
        (WeightedTrainer, {"optim": "lomo"}, "steps during the backward pass"),
        (Scaled, {}, "bf16=True"),
    ],
)
def test_what_would_be_wrong_is_refused(cls, change, message, tmp_path):
    model = tiny.language_model("llama")
    before = bits(model)
    with pytest.raises(ValueError, match=message):
        train(cls, model, tmp_path, **change)
    assert bits(model) == before


def test_a_version_without_the_overridden_methods_is_refused(monkeypatch, tmp_path):
    monkeypatch.delattr(Trainer, "set_initial_training_values")
    with pytest.raises(ValueError, match="no set_initial_training_values any more"):
        train(FullBatchTrainer, tiny.language_model("llama"), tmp_path)


# --- two processes --------------------------------------------------------------------------------

SHARED = {
    "weighted": (WeightedTrainer, {"gradient_accumulation_steps": 2}, 16, DATA),
    "whole": (FullBatchTrainer, {}, 26, DATA),
    "exact": (FullBatchTrainer, {"options": {"accumulation": "exact"}}, 26, DATA),
    "shuffled": (
        FullBatchTrainer,
        {"train_sampling_strategy": "random", "include_num_input_tokens_seen": "all"},
        26,
        DATA,
    ),
    "one batch for two": (FullBatchTrainer, {}, 3, DATA[:3]),
}


def on_each_rank(rank: int, folder: Path) -> dict[str, Any]:
    found = {}
    for case, (cls, options, _, data) in SHARED.items():
        model = tiny.language_model("gpt2")
        options = copy.deepcopy(options) | {"data": data, "max_grad_norm": 0.5}
        trainer = train(cls, model, folder, steps=3, **options)
        found[case] = dict(model.named_parameters()), trainer.state.log_history
    with pytest.raises(ValueError, match="train_dataset is iterable"):
        train(WeightedTrainer, model, folder, data=Streamed())
    found["resumed"] = resumed(folder)
    return found


def resumed(folder: Path) -> list[Any]:
    """Return the bits after four steps, and after two of them again."""
    options = {"penalty": GradientPenalty(coefficient=strength), "accumulation": "exact"}
    arguments = {"options": options, "save_strategy": "steps", "save_steps": 2, "steps": 4}
    found = []
    for resume in (None, str(folder / "checkpoint-2")):
        model = tiny.language_model("llama")
        arguments |= {"optimizer": momentum(model), "resume": resume}
        train(FullBatchTrainer, model, folder, **arguments)
        found.append(bits(model))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return trainer_ranks.together(
        on_each_rank, tmp_path_factory.mktemp("ranks"), "transformers.trainer"
    )


@pytest.mark.parametrize("case", SHARED)
def test_two_processes_find_what_one_batch_gives(found, case, tmp_path):
    _, _, size, data = SHARED[case]
    model = tiny.language_model("gpt2")
    batches = [data[i : i + size] for i in range(0, len(data), size)]
    expected = tiny.one_batch(model, (batches * 3)[:3], max_norm=0.5)
    (params, log), (others, other_log) = (one[case] for one in found)
    assert bits(params) == bits(others)
    model.load_state_dict(params, strict=False)
    assert tiny.distance(model, expected) < 1e-6
    assert log[0]["loss"] == other_log[0]["loss"]
    start = tiny.language_model("gpt2")
    assert log[0]["loss"] == pytest.approx(start(**tiny.collate(batches[0])).loss.item(), rel=1e-6)


def test_two_processes_resume_to_the_bit(found):
    (whole, again), (other, _) = (one["resumed"] for one in found)
    assert whole == again == other
