"""The models that every peer trains, and the job that a peer's script is given. Standard library only."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

LEARNING_RATE: Final = 3e-4
BETAS: Final = (0.9, 0.95)
WEIGHT_DECAY: Final = 0.1
CLIP: Final = 1.0


@dataclass(frozen=True)
class Workload:
    """A GPT-2 shaped decoder and its batch: learned positions, GELU, LayerNorm, biases, tied head, no dropout."""

    blocks: int
    width: int
    heads: int
    vocab: int
    context: int
    batch: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.context

    @property
    def flops(self) -> float:
        """Algorithmic FLOPs of one training token: 6 a weight of a matrix product, and the causal half of attention."""
        weights = 12 * self.blocks * self.width**2 + self.vocab * self.width
        return 6 * weights + 6 * self.blocks * self.width * self.context


WORKLOADS: Final = {
    "A16k": Workload(blocks=6, width=384, heads=6, vocab=16384, context=256, batch=16),
    "gpt2-small": Workload(blocks=12, width=768, heads=12, vocab=50257, context=512, batch=4),
    "tiny": Workload(blocks=2, width=64, heads=2, vocab=512, context=32, batch=4),
}


@dataclass(frozen=True)
class Job:
    """What one process does."""

    workload: Workload
    steps: int
    """All steps, the first included, which is never counted."""
    data: str
    """Folder written by `corpus.build`."""
    lines: str
    """File for the measured lines."""
    scratch: str
    """Empty folder for whatever else the peer writes."""
    options: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def tokens(self) -> Path:
        """The token ids, uint16."""
        return Path(self.data) / "tokens.bin"

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


def read_job() -> Job:
    """The job whose file is the script's only argument."""
    raw = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return Job(**{**raw, "workload": Workload(**raw["workload"])})
