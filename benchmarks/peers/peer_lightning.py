"""Lightning: the plain loop's model and optimizer under `lightning.Trainer`."""

from __future__ import annotations

from typing import Any

import lightning as L  # pyright: ignore[reportMissingImports]
import torch
from measure import Recorder
from peer_loop import GPT, adamw
from torch import Tensor
from windows import loader
from workloads import CLIP, Workload, read_job


class Module(L.LightningModule):
    """The model with its loss and optimizer."""

    def __init__(self, w: Workload) -> None:
        super().__init__()
        self.gpt = GPT(w)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.gpt(batch[:, :-1], batch[:, 1:])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self.gpt)


class Marks(L.Callback):
    """Prints the loss and tells the recorder of every step."""

    def __init__(self, record: Recorder) -> None:
        self.record = record

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        print(f"step {index + 1} loss {outputs['loss'].item():.4f}", flush=True)
        self.record.mark()


def main() -> None:
    """Train."""
    job = read_job()
    torch.manual_seed(0)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, precision="32-true", max_steps=job.steps, gradient_clip_val=CLIP,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=job.scratch, callbacks=[Marks(Recorder(job.lines))],
    )  # fmt: skip
    trainer.fit(Module(job.workload), loader(job))


if __name__ == "__main__":
    main()
