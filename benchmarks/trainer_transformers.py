"""Transformers' rows of benchmarks.trainers."""

from __future__ import annotations

import tempfile
from functools import partial

import transformers
from transformers import Trainer, TrainingArguments

from benchmarks.trainers import Task
from fbopt.integrations.transformers import FullBatchTrainer, WeightedTrainer


def train(kind: type[Trainer], task: Task) -> None:
    """Train with ``gradient_accumulation_steps``; a sample of the data is a whole batch."""
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=task.case.epochs,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=task.window,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = kind(
            task.model,
            arguments,
            train_dataset=task.batches,
            data_collator=lambda samples: samples[0],
            optimizers=(task.optimizer, None),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


WAYS = {
    "Transformers": partial(train, Trainer),
    "WeightedTrainer": partial(train, WeightedTrainer),
    "FullBatchTrainer": partial(train, FullBatchTrainer),
}
