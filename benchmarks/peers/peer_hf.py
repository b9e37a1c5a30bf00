"""Hugging Face: GPT2LMHeadModel under `transformers.Trainer`, its defaults but for the common settings."""

from __future__ import annotations

from typing import Any

import torch
from measure import Recorder
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from windows import Windows
from workloads import BETAS, CLIP, LEARNING_RATE, WEIGHT_DECAY, Job, read_job


class Examples(Dataset[dict[str, Tensor]]):
    """Windows in the form the model takes; it shifts the labels itself."""

    def __init__(self, job: Job) -> None:
        self.windows = Windows(job)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = self.windows[i][:-1]
        return {"input_ids": ids, "labels": ids}


class Marks(TrainerCallback):
    """Tells the recorder of every step."""

    def __init__(self, record: Recorder) -> None:
        self.record = record

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.record.mark()


def main() -> None:
    """Train."""
    job = read_job()
    w = job.workload
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=w.vocab, n_positions=w.context, n_embd=w.width, n_layer=w.blocks, n_head=w.heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=w.vocab - 1, eos_token_id=w.vocab - 1,
    )  # fmt: skip
    arguments = TrainingArguments(
        output_dir=job.scratch, max_steps=job.steps, per_device_train_batch_size=w.batch, use_cpu=True,
        optim="adamw_torch_fused", learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY,
        adam_beta1=BETAS[0], adam_beta2=BETAS[1], max_grad_norm=CLIP, lr_scheduler_type="constant",
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    callbacks: list[Any] = [Marks(Recorder(job.lines))]
    Trainer(model=model, args=arguments, train_dataset=Examples(job), callbacks=callbacks).train()


if __name__ == "__main__":
    main()
