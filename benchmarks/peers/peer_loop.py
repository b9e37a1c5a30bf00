"""The plain loop: a GPT and its training as one writes them by hand. Full logits, fused AdamW, eager or compiled."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from measure import Recorder
from torch import Tensor, nn
from windows import loader
from workloads import BETAS, CLIP, LEARNING_RATE, WEIGHT_DECAY, Workload, read_job


class Block(nn.Module):
    """Pre-norm attention and MLP. x [B, T, C] -> [B, T, C]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Ids and targets [B, T] -> mean loss."""

    def __init__(self, w: Workload) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(w.vocab, w.width), nn.Embedding(w.context, w.width)
        self.blocks = nn.ModuleList(Block(w.width, w.heads) for _ in range(w.blocks))
        self.norm, self.head = nn.LayerNorm(w.width), nn.Linear(w.width, w.vocab, bias=False)
        self.head.weight = self.embed.weight
        for name, p in self.named_parameters():
            if p.ndim == 2:
                residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * w.blocks) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """Fused AdamW; vectors do not decay."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)


def main() -> None:
    """Train."""
    job = read_job()
    torch.manual_seed(0)
    model = GPT(job.workload)
    optimizer = adamw(model)
    step = torch.compile(model) if job.options.get("compile") else model
    record = Recorder(job.lines)
    for i, batch in enumerate(loader(job), 1):
        loss = step(batch[:, :-1], batch[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(f"step {i} loss {loss.item():.4f}", flush=True)
        record.mark()
        if i == job.steps:
            break


if __name__ == "__main__":
    main()
