"""ZeRO-Offload: optimizer states, float32 weights and the update itself live on the host; delayed, beside the GPU.

    device     w_k in the model's type, gradients                  g_k = gradient at w_k
    host       float32 weights and moments                         w_{k+1} = A(w_k, g_k)
    delay      the host computes while the device runs step k      w_{k+1} = A(w_k, g_{k-1})

A is the whole update rule with the learning rate of the step that the gradient is from; clipping, unscaling and masks
have happened to it by then. The first `warmup` steps are not delayed, since weights change fast at the start. The last
step of a stage makes both updates, so that no gradient is lost. A step that is skipped, as float16 does, makes only
the update that was still due. A gradient that waits is in the checkpoint; validation measures the weights as they are.

Paper: Ren et al., "ZeRO-Offload", USENIX ATC 2021, arXiv 2101.06840.

Saves: moments and float32 weights in a GPU's memory: of 16 bytes a weight with Adam, 12. Costs: gradients and weights
cross the bus each step, and the host's slower update, which delay hides. Not for: a CPU, where the host is the device:
the numbers are the same, and nothing is saved; a delayed gradient wants a little lower learning rate.
A gradient leaves during the backward pass, as soon as it is whole. Where another technique needs all of them on the
device, to clip, unscale, mask or sum them, they stay until it is done, and leave together.
"""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scrimp.clock import Duration
from scrimp.groups import Several, parts, trainable
from scrimp.plain import is_plain
from scrimp.sharding import cut_of, follow
from scrimp.technique import Card, Technique

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from scrimp.groups import Group
    from scrimp.run import Run
    from scrimp.technique import Backward, Batch, State, Step

RATES: Final = "#rates"
"""Name in memory of the learning rates of the gradients that wait, one a group; no parameter can be called so."""
AFTER: Final = ("rounded", "averaged")
"""Phases of `step` that come after the update, and look at no gradient."""
GIVEN: Final = "#given"
"""Which parameters have a gradient that waits. The gradients have the parameters' names."""
WEIGHT: Final = "#weight."
"""Prefix in memory of the copies of weights."""


@dataclass(frozen=True, kw_only=True)
class ZeroOffload(Technique):
    """Optimizer states and the update on the host, delayed by a step."""

    card = Card(
        paper="arXiv:2101.06840",
        section="Offloading",
        saves="12 of 16 bytes a weight on a GPU, with Adam",
        costs="gradients and weights cross the bus each step",
        sets=("place of optimizer states",),
        phase={"carry": "rewind", "optimizer": "states", "backward": "watched", "step": "delayed"},
        emulated=("cpu",),
        held="the host updates copies of plain tensors.",
        undivided="what it notes of gradients that wait is one list of all weights.",
        example={"delay": True, "warmup": "2 step"},
        neutral={"delay": False},
    )
    delay: bool = False
    """Compute the update of a step while the next one runs: every gradient is used one step late."""
    warmup: str | float = "40 step"
    """Duration from the start of the run without delay."""

    def __post_init__(self) -> None:
        Duration.parse(self.warmup, "warmup")

    def carry(self, state: State, run: Run) -> State:
        """A new stage begins with nothing that waits: its weights may have other shapes."""
        own = f"memory.{run.order.key(self)}"
        fresh = run.clock.position == run.clock.begun
        return {kind: tensors for kind, tensors in state.items() if kind != own or not fresh}

    def optimizer(self, make: Callable[[list[Group]], Optimizer], run: Run) -> Callable[[list[Group]], Optimizer]:
        """The rules, on the host."""
        return lambda groups: HostUpdate(make(groups), run, self)

    def backward(self, backward: Backward, run: Run) -> Backward:
        """The update that is due runs beside it."""
        if not is_plain(backward):
            _optimizer(run).holders += [t.name for t in run.order.slots["backward"] if t is not self]

        def beside(batch: Batch, count: Tensor) -> Tensor:
            _optimizer(run).begin()
            return backward(batch, count)

        return beside

    def step(self, step: Step, run: Run) -> Step:
        """The update that is due comes first, also before a step that is skipped."""
        update = _optimizer(run)
        if not is_plain(step):
            others = [t for t in run.order.slots["step"] if t is not self and t.card.phase.get("step") not in AFTER]
            update.holders += [t.name for t in others if t.name not in update.holders]
        if update.holders and update.copies:
            names = " and ".join(f"`{name}`" for name in update.holders)
            run.remarks.append(f"zero_offload leaves gradients on the device until {names} had all of them.")
        else:
            update.watch()

        def delayed() -> bool:
            update.settle()
            update.stand_in()
            return step()

        return delayed

    def late(self, run: Run) -> tuple[bool, bool]:
        """Whether a gradient may wait from the step before, and whether this step's shall wait for the next."""
        from scrimp.stages import stage_end

        clock, first = run.clock, run.clock.at(self.warmup)
        # Where steps differ in length, the nominal one is the longest, so that the last is not missed.
        last = clock.position + clock.per_step[clock.unit] >= stage_end(run)
        return self.delay and clock.position > first, self.delay and clock.position >= first and not last


def _optimizer(run: Run) -> HostUpdate:
    assert isinstance(run.optimizer, HostUpdate)
    return run.optimizer


class HostUpdate(Several):
    """Update rules on weights in the host's memory. Between steps their groups and states are those of the model's.

    `run.memory` keeps float32 copies of weights that are not float32 on the host, and gradients that wait.

    Attributes:
        left: gradients of this step that are on the host already.
        holders: techniques that need all gradients on the device.
        alone: whether updates need nothing of other ranks, and may run beside the next step.
    """

    def __init__(self, rule: Optimizer, run: Run, technique: ZeroOffload) -> None:
        super().__init__(parts(rule))
        self.run, self.technique, self.memory = run, technique, run.memory(technique)
        self.names = trainable(run.model)
        self.copies = {n: _copy(p) for n, p in self.names.items() if not at_home(p)}
        self.versions: dict[str, int] = {}
        self.left: dict[str, Tensor] = {}
        self.holders: list[str] = []
        self.pool = ThreadPoolExecutor(1, "zero-offload")
        self.work: Future[None] | None = None
        self.moved: torch.cuda.Event | None = None
        self.rest: list[tuple[Optimizer, Any]] = []
        self.memory.update({f"{WEIGHT}{n}": follow(copy.data, copy) for n, copy in self.copies.items()})
        # What rules send to other ranks must not cross what the next step sends.
        self.alone = all(cut_of(p) is None for p in self.names.values())
        if technique.delay:
            self.memory.update({n: near(p).zero_() for n, p in self.names.items()})
            self.memory[GIVEN] = torch.zeros(len(self.names), dtype=torch.bool, device="cpu")
            self.memory[RATES] = torch.zeros(len(self.param_groups), dtype=torch.float64, device="cpu")

    def watch(self) -> None:
        """Let each gradient leave in the backward pass, once it is whole."""

        def leave(name: str, p: Tensor) -> None:
            assert p.grad is not None
            self.left[name] = near(p).copy_(p.grad, non_blocking=True)
            p.grad = None

        for name in self.copies:
            self.names[name].register_post_accumulate_grad_hook(partial(leave, name))

    def stand_in(self) -> None:
        """What has left is still a gradient for those who ask whether there is one: a single number in its shape."""
        self._note_moves()
        for name in self.left:
            p = self.names[name]
            p.grad = p.new_zeros(()).expand(p.shape)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """This step's update, or its delay."""
        grads = {n: self.left.get(n, p.grad) for n, p in self.names.items()}
        rates = [float(group["lr"]) for group in self.param_groups]
        if not self.technique.late(self.run)[1]:
            self._update({n: g.to("cpu", self.copies[n].dtype) if g is not None and n in self.copies else g
                          for n, g in grads.items()}, rates)  # fmt: skip
            self._back()
            self.left = {}
            return
        for n, grad in grads.items():
            if n in self.left:
                self.memory[n] = self.left[n]
            elif grad is not None:
                self.memory[n].copy_(grad, non_blocking=True)
        self.left = {}
        self._note_moves()
        self.memory[GIVEN].copy_(torch.tensor([g is not None for g in grads.values()], device="cpu"))
        self.memory[RATES].copy_(torch.tensor(rates, dtype=torch.float64, device="cpu"))

    def settle(self) -> None:
        """Make the update that is due, or wait for it."""
        if self._due():
            if not self.rest:
                self._late_update(beside=False)
            self._back()
            self.memory[GIVEN].zero_()

    def begin(self) -> None:
        """Begin the update that is due, where the device computes on other memory."""
        if self.alone and self.copies and not self.rest and self._due():
            self._late_update(beside=True)

    def _due(self) -> bool:
        if not self.technique.late(self.run)[0]:
            return False
        return self.run.read(self.memory[GIVEN].any().double(), worst=1.0) > 0

    @torch.no_grad()
    def _late_update(self, beside: bool) -> None:
        read = self.run.read
        given = {n: read(flag.double(), worst=1.0) > 0 for n, flag in zip(self.names, self.memory[GIVEN], strict=True)}
        rates = [read(r, worst=float(g["lr"])) for r, g in zip(self.memory[RATES], self.param_groups, strict=True)]
        self._update({n: self.memory[n] if given[n] else None for n in self.names}, rates, beside)

    def _update(self, grads: Mapping[str, Tensor | None], rates: list[float], beside: bool = False) -> None:
        """Give the rules the host's weights in place of the model's, and let them work."""
        if self.moved is not None:
            self.moved.synchronize()
        for n, copy in self.copies.items():
            copy.data = self.memory[f"{WEIGHT}{n}"]
            self._follow(n, copy)
        hosts = {id(p): self.copies.get(n, p) for n, p in self.names.items()}
        self.rest = [(rule, (rule.param_groups, rule.state)) for rule in self.parts]
        left = iter(rates)
        for rule in self.parts:
            rule.param_groups = [
                {**g, "lr": next(left), "params": [hosts[id(p)] for p in g["params"]]} for g in rule.param_groups
            ]
            rule.state = defaultdict(dict, {
                hosts[id(p)]: {k: v.to("cpu") for k, v in s.items()} for p, s in rule.state.items()
            })  # fmt: skip
        self.grads = {n: p.grad for n, p in self.names.items()}
        for n, p in self.names.items():
            self.copies.get(n, p).grad = grads[n]
        if beside:
            self.work = self.pool.submit(self._rules)
        else:
            self._rules()

    def _rules(self) -> None:
        for rule in self.parts:
            rule.step()

    def _back(self) -> None:
        """Wait for the rules; their groups and states become the model's again, and so do the weights."""
        if self.work is not None:
            self.work.result()
            self.work = None
        models = {id(self.copies.get(n, p)): p for n, p in self.names.items()}
        for rule, (groups, _) in self.rest:
            for group, used in zip(groups, rule.param_groups, strict=True):
                group.update({k: v for k, v in used.items() if k not in ("params", "lr")})
            rule.param_groups = groups
            rule.state = defaultdict(dict, {models[id(p)]: s for p, s in rule.state.items()})
        self.rest = []
        with torch.no_grad():
            for n, p in self.names.items():
                if n in self.copies:
                    self.copies[n].grad = None
                    p.copy_(self.copies[n], non_blocking=True)
                    self.versions[n] = p._version
                else:
                    p.grad = self.grads[n]
        self.grads = {}
        self._note_moves()

    def _follow(self, n: str, copy: nn.Parameter) -> None:
        """Take over what others have written into a weight since, such as a mask."""
        p = self.names[n]
        if self.versions.get(n) != p._version:
            now = p.detach().to("cpu")
            copy.data.copy_(torch.where(now == copy.data.to(p.dtype), copy.data, now.to(copy.dtype)))

    def _note_moves(self) -> None:
        """What was copied to or from a GPU must have arrived before the host changes it."""
        if self.run.device.type == "cuda":
            self.moved = torch.cuda.Event()
            self.moved.record()


def at_home(p: Tensor) -> bool:
    """Whether a weight is on the host, in at least float32: it needs no copy to be updated there."""
    return p.device.type == "cpu" and torch.promote_types(p.dtype, torch.float32) == p.dtype


def _copy(p: Tensor) -> nn.Parameter:
    """A weight on the host, cut between ranks as the model's is."""
    copy = nn.Parameter(near(p).copy_(p.detach()))
    follow(copy, p)
    return copy


def near(p: Tensor) -> Tensor:
    """Memory of the host for a tensor like this, in at least float32; pinned beside a GPU."""
    wide = torch.promote_types(p.dtype, torch.float32)
    return torch.empty(p.shape, dtype=wide, device="cpu", pin_memory=p.device.type == "cuda")
