"""Compilation: each block becomes a few fused kernels.

One block is compiled and reused for all, so that compiling takes as long for 48 layers as for 6.
Paper: Ansel et al., "PyTorch 2", ASPLOS 2024.

Saves: memory traffic of elementwise operations and launches. Costs: a cold start of half a minute or more, and
another order of additions: results differ in the last bits. Not for: short runs, and fp32 on CPUs, where matrix
products take most of a step already. A dry run sees the program before fusion, an upper bound of its memory.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from scrimp.errors import UserError
from scrimp.models.seams import blocks
from scrimp.technique import Card, Technique

if TYPE_CHECKING:
    from collections.abc import Callable

    from scrimp.run import Run
    from scrimp.technique import Evaluate


@dataclass(frozen=True, kw_only=True)
class Compile(Technique):
    """torch.compile, block by block."""

    card = Card(
        paper="Ansel et al., ASPLOS 2024",
        section="Hardware/algorithm co-design",
        saves="memory traffic of elementwise operations",
        costs="a cold start of half a minute or more",
        sets=("compilation",),
        phase={"wrap": "compile"},
        example={"backend": "aot_eager"},
    )
    backend: str = "inductor"
    """torch.compile's backend."""
    mode: str = ""
    """torch.compile's mode, such as max-autotune; empty for the default."""

    def wrap(self, model: nn.Module, run: Run) -> nn.Module:
        """Compile each block in place: names stay, and blocks of one class share the code."""
        if torch._guards.detect_fake_mode() is not None:
            return model
        if self.backend == "inductor" and run.device.type == "cpu" and not _compiler():
            fix = "Install g++ or set CXX, or drop `compile`."
            raise UserError("there is no C++ compiler, which inductor needs on a CPU.", run.where(self), fix)
        for block in blocks(model, run.where(self)).values():
            block.compile(backend=self.backend, mode=self.mode or None)
        return model

    def evaluate(self, evaluate: Evaluate, run: Run) -> Evaluate:
        """Uncompiled: the changing shapes of generation would be compiled again and again."""

        def eager(job: Callable[[nn.Module], Any]) -> Any:
            with torch.compiler.set_stance("force_eager"):
                return evaluate(job)

        return eager


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
