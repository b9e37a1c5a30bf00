"""Windows of the token stream, for the peers that take a torch data set."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from workloads import Job


class Windows(Dataset[Tensor]):
    """Non-overlapping windows of context + 1 ids: int64, [context + 1]."""

    def __init__(self, job: Job) -> None:
        self.ids = np.memmap(job.tokens, dtype=np.uint16, mode="r")
        self.context = job.workload.context

    def __len__(self) -> int:
        return (len(self.ids) - 1) // self.context

    def __getitem__(self, i: int) -> Tensor:
        start = i * self.context
        return torch.from_numpy(self.ids[start : start + self.context + 1].astype(np.int64))


def loader(job: Job) -> DataLoader[Tensor]:
    """Batches [batch, context + 1], in the stream's order."""
    return DataLoader(Windows(job), batch_size=job.workload.batch, drop_last=True)
