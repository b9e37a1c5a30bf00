"""torch.compile, block by block.

Each repeated block is compiled by itself; blocks of one class share the compiled code. Compiling takes seconds to
minutes once, much less than for the whole model. A model without blocks is compiled whole. Only training runs compiled:
the changing shapes of validation and generation would be compiled again and again.

Paper: Ansel et al., "PyTorch 2: Faster Machine Learning Through Dynamic Python Bytecode Transformation and Graph
Compilation", ASPLOS 2024.

Saves: time and memory traffic of chains of small operators (norms, activations, residuals), and on CUDA kernel
launches. Costs: the compilation, at every stage of the run; a C++ compiler. Not for: short runs, nor CPUs, where
matrix products are most of the time and the gain is small. Sums are fused and reordered, so that results agree to
rounding only.

A plan does not compile: it counts memory as without, which is more.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch._guards import detect_fake_mode

from scrimp.errors import UserError
from scrimp.models.seams import blocks, wrap_forward
from scrimp.technique import Card, Cost, Technique

if TYPE_CHECKING:
    from scrimp.run import Run


@dataclass(frozen=True, kw_only=True)
class Compile(Technique):
    """torch.compile, block by block."""

    card = Card(
        paper="ASPLOS 2024",
        section="Hardware/algorithm co-design",
        saves="time and memory traffic of small operators",
        costs="seconds to minutes of compilation at every stage",
        sets=("compilation",),
        phase={"wrap": "compile"},
        example={"backend": "aot_eager"},
    )
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    """torch.compile's mode, for inductor."""
    backend: Literal["inductor", "aot_eager", "eager"] = "inductor"
    """inductor generates code; the others only trace, for finding faults."""

    def wrap(self, model: nn.Module, run: Run) -> nn.Module:
        """Compile every block in place."""
        if detect_fake_mode() is not None:
            return model
        inductor = self.backend == "inductor"
        if inductor and compiler() is None:
            fix = "Install g++ or clang++, or set CXX to a C++ compiler."
            raise UserError("inductor needs a C++ compiler, and there is none.", run.where(self, "backend"), fix)
        try:
            parts = list(blocks(model).values())
        except UserError:
            parts = [model]
        for part in parts:
            wrap_forward(part, lambda forward: self._compiled(forward, inductor))
        return model

    def price(self, cost: Cost, run: Run) -> Cost:
        """Neighboring memory-bound operators become one, where the backend is a compiler."""
        return replace(cost, fused=cost.fused or self.backend == "inductor")

    def _compiled(self, forward: Callable[..., object], inductor: bool) -> Callable[..., object]:
        compiled = torch.compile(forward, mode=self.mode if inductor else None, backend=self.backend)

        def either(*args: Any, **kwargs: Any) -> object:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            # Numbers of layers (dropout's site) must not be constants, or every block is compiled anew.
            with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
                return compiled(*args, **kwargs)

        return either


def compiler() -> str | None:
    """Path of a C++ compiler."""
    known = (os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl")
    return next((path for path in map(shutil.which, filter(None, known)) if path), None)
