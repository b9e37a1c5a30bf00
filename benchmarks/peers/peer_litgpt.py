"""LitGPT: its GPT under `litgpt.pretrain.setup`, the function behind `litgpt pretrain`.

What differs from the other peers, because LitGPT has no option for it: rotary positions (on its default quarter of
each head) instead of learned ones, AdamW not fused on a CPU, weight decay on vectors too, torch.compile always on, and
a validation of up to two batches (one here) before the first step. Only the data module is ours: LitGPT's own ones
read text through litdata.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from litgpt import Config  # pyright: ignore[reportMissingImports]
from litgpt.args import EvalArgs, TrainArgs  # pyright: ignore[reportMissingImports]
from litgpt.data import DataModule  # pyright: ignore[reportMissingImports]
from litgpt.pretrain import setup  # pyright: ignore[reportMissingImports]
from measure import Recorder
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset
from windows import Windows
from workloads import BETAS, CLIP, LEARNING_RATE, WEIGHT_DECAY, Job, read_job


class Marked(IterableDataset[Tensor]):
    """Windows in order. The loop asks for a batch when it is done with the one before, and that ends a step."""

    def __init__(self, job: Job) -> None:
        self.job, self.windows = job, Windows(job)

    def __iter__(self) -> Iterator[Tensor]:
        record = Recorder(self.job.lines)
        for i in range(len(self.windows)):
            done, rest = divmod(i, self.job.workload.batch)
            if rest == 0 and 0 < done <= self.job.steps:
                record.mark()
            yield self.windows[i]


class Data(DataModule):
    """The common token stream."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job

    def connect(self, *args: Any, **kwargs: Any) -> None:
        """The sizes are the workload's."""

    def train_dataloader(self) -> Any:
        """Batches, marked."""
        return DataLoader(Marked(self.job), batch_size=self.job.workload.batch)

    def val_dataloader(self) -> Any:
        """One batch."""
        size = self.job.workload.batch
        return DataLoader(Subset(Windows(self.job), range(size)), batch_size=size)


def main() -> None:
    """Train."""
    job = read_job()
    w = job.workload
    config = Config(
        name="bench", block_size=w.context, n_layer=w.blocks, n_embd=w.width, n_head=w.heads, vocab_size=w.vocab,
        padded_vocab_size=w.vocab, parallel_residual=False, bias=True, mlp_class_name="GptNeoxMLP",
    )  # fmt: skip
    train = TrainArgs(
        save_interval=None, log_interval=1, global_batch_size=w.batch, micro_batch_size=w.batch,
        max_tokens=job.steps * w.tokens, lr_warmup_steps=None, max_norm=CLIP, min_lr=LEARNING_RATE, tie_embeddings=True,
    )  # fmt: skip
    sys.argv[1:] = ["bench"]  # its checkpoint reads the command line again, for the name of the model
    settings = {"lr": LEARNING_RATE, "betas": list(BETAS), "weight_decay": WEIGHT_DECAY}
    setup(
        "bench", model_config=config, out_dir=Path(job.scratch), precision="32-true", data=Data(job), train=train,
        eval=EvalArgs(interval=10**9, max_iters=1, initial_validation=False, final_validation=False),
        optimizer={"class_path": "torch.optim.AdamW", "init_args": settings}, devices=1, logger_name="csv",
    )  # fmt: skip


if __name__ == "__main__":
    main()
