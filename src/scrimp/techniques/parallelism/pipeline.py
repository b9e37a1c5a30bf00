# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Pipeline parallelism: ranks hold consecutive blocks, and the parts of a batch go from one to the next.

    g = sum over micro-batches of grad(summed loss of the micro-batch) / count of the whole batch

The gradient is that of one process with the whole batch, to float error, in every order but `2bw`: the denominator is
the whole batch's, and dropout is keyed by sample and layer. Hidden states go forward between ranks, and their gradients
back. With p ranks, m micro-batches and v stages a rank, orders differ in what idles and in what is kept:

    order        idle share of the time      activations that rank i keeps, in micro-batches of one of its stages
    gpipe        (p - 1) / (m + p - 1)       m
    1f1b         (p - 1) / (m + p - 1)       min(m, p - i)
    interleaved  (p - 1) / (v m + p - 1)     more than 1f1b's by about (p - 1) / (p v)
    zero_bubble  less: gradients of weights, which nobody waits for, fill what would be idle
    zbv          least: two stages a rank, there and back, so that the first rank holds the last stage as well
    2bw          next to none, and each gradient is used one step late: W(t+1) = W(t) - lr grad f(W(t-1))

Blocks are dealt out so that the heaviest stage is as light as it can be, head included; `split` overrides it. A tied
embedding lies on the first and on the last stage, and its gradients are summed between them.

Papers: Huang et al., "GPipe", arXiv 1811.06965. Narayanan et al., "PipeDream", arXiv 1806.03377 (1f1b), and
"Memory-Efficient Pipeline-Parallel DNN Training", arXiv 2006.09503 (2bw). Narayanan et al., "Efficient Large-Scale
Language Model Training on GPU Clusters", arXiv 2104.04473 (interleaved). Qi et al., "Zero Bubble Pipeline
Parallelism", arXiv 2401.10241. The engine is torch's, but for 2bw.

Saves: weights, gradients and states, to 1/p of theirs. Costs: idle ranks as above; buffers for the states of all
micro-batches; with 2bw two copies of the weights. Not for: few blocks or small batches, where idling wins; losses that
compare all items of a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from scrimp.errors import UserError
from scrimp.pipelined import Pipeline as Engine
from scrimp.pipelined import micro_batches
from scrimp.stagedry import DryRelay, planned, valueless
from scrimp.stagewise import Relay, Stages, balanced, check_model, empty, holders, parts_of, placed, work
from scrimp.stashing import Stashed
from scrimp.technique import Card, Cost, Technique, at_least
from scrimp.timetable import SINGLE, actions, idle, timed
from scrimp.world import SAMPLES

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Backward, Evaluate, State


@dataclass(frozen=True, kw_only=True)
class Pipeline(Technique):
    """Ranks hold consecutive blocks, and micro-batches go from one to the next."""

    card = Card(
        paper="arXiv:1811.06965",
        section="Parallelism",
        saves="weights and states, to 1/ranks of them",
        costs="ranks that idle while it fills and drains, for (p - 1)/(m + p - 1) of the time",
        sets=("pipeline",),
        replaces=("backward",),
        axes=("pipeline",),
        cuts=True,
        refuses={"parts of a batch": "a pipeline cuts each batch into micro-batches itself."},
        micro_batches=True,
        phase={"wrap": "shard", "backward": "summed"},
        example={},
        neutral={},
    )
    order: Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv", "2bw"] = "1f1b"
    """In which order a rank computes."""
    micro_batches: int = 0
    """Parts of a batch that are on their way at once; 0 for twice the stages, or the most that divide the batch."""
    stages_per_rank: int = 0
    """Stages that each rank holds; 0 stands for 2 with `interleaved` and `zbv`, 1 with the others."""
    split: tuple[int, ...] = ()
    """Blocks of each stage; empty to balance their work."""

    def __post_init__(self) -> None:
        at_least(0, self, "micro_batches", "stages_per_rank")
        if any(count < 1 for count in self.split):
            raise UserError("each stage needs at least one block.", "split")
        if self.order in SINGLE and self.stages_per_rank > 1:
            raise UserError(f"{self.order} has one stage a rank.", "stages_per_rank", "Set order to interleaved.")
        if self.order == "zbv" and self.stages_per_rank not in (0, 2):
            raise UserError("zbv has two stages a rank.", "stages_per_rank", "Leave it out.")

    def wrap(self, model: nn.Module, run: Run) -> nn.Module:
        """Take out what other ranks run."""
        if run.world.ranks("pipeline") == 1:
            return model
        where = run.where(self)
        self._check_whole(run)
        net = check_model(model, where)
        stages = self._stages(net, run)
        self._check_tokens(len(stages.of(run.world.place("pipeline"))), run)
        run.plans[self.name] = stages
        run.elsewhere = empty(net, [stages.parts[stage] for stage in stages.of(run.world.place("pipeline"))])
        return net

    def backward(self, backward: Backward, run: Run) -> Backward:
        """Through the stages in micro-batches; a single rank changes nothing."""
        if run.world.ranks("pipeline") == 1:
            return backward
        for technique in run.order.slots["loss"]:
            if technique.card.phase.get("loss") != "scaled":
                what = f"the loss that `{technique.name}` computes needs the whole model, of which a rank holds a part."
                raise UserError(what, run.where(self), f"Drop `{technique.name}`, or `pipeline`.")
        if valueless(run.model):
            return planned(run, run.plans[self.name], self.order, self.micro_batches, run.where(self))
        shared, here = holders(run.model, run.world), run.world.place("pipeline")
        run.repeated = frozenset(name for name, ranks in shared.items() if ranks[0] < here)
        if self.order == "2bw":
            self._check_beside(run)
            return Stashed(run, run.plans[self.name], shared, run.memory(self), self.micro_batches, run.where(self))
        return Engine(run, run.plans[self.name], shared, self.order, self.micro_batches, run.where(self))

    def evaluate(self, evaluate: Evaluate, run: Run) -> Evaluate:
        """Hidden states are handed on, and every rank gets what the last stage says."""
        if run.world.ranks("pipeline") == 1:
            return evaluate
        stages: Stages = run.plans[self.name]

        def relayed(job: Callable[[nn.Module], Any]) -> Any:
            relay = DryRelay if valueless(run.model) else Relay
            return evaluate(lambda model: job(relay(check_model(model, run.where(self)), stages, run.world)))

        return relayed

    def price(self, cost: Cost, run: Run) -> Cost:
        """Ranks wait while the pipeline fills and drains, as if all stages were as fast as this rank's."""
        ranks = run.world.ranks("pipeline")
        if ranks == 1 or self.order == "2bw":
            return cost
        stages, size = len(run.plans[self.name].parts), run.recipe.batch // run.world.ranks(*SAMPLES)
        parts = micro_batches(self.micro_batches, size, stages, run.world, self.order, run.where(self))
        return replace(cost, idle=idle(timed(actions(self.order, ranks, parts, stages // ranks))))

    def _check_whole(self, run: Run) -> None:
        """Whether others shard the weights that stages are made of, or finish gradients that this order splits."""
        for other in run.order.techniques:
            if other.shards and "data parallelism" in other.card.sets and run.world.ranks(*SAMPLES) > 1:
                what = f"`{other.name}` gathers its shards for every pass, and each micro-batch is one."
                raise UserError(what, run.where(other), "Set its `stage` to 1, or take `replicate`.")
            if "head loss" in other.card.sets and self.order in ("zero_bubble", "zbv"):
                what = f"`{other.name}` finishes all gradients in one pass, which {self.order} splits in two."
                raise UserError(what, f"{run.where(self)}.order", f"Choose another order, or drop `{other.name}`.")

    def _check_tokens(self, held: int, run: Run) -> None:
        """Whether others share the tokens between a rank's first and last block, as if all between were here."""
        for other in run.order.techniques:
            shares = "tensor parallelism" in other.card.sets and getattr(other, "sequence", False)
            if held > 1 and shares and run.world.ranks("tensor") > 1:
                what = f"it shares tokens from a rank's first block to its last, and here a rank has {held} stages."
                raise UserError(what, f"{run.where(other)}.sequence", "Set it to false, or have one stage a rank.")

    def _check_beside(self, run: Run) -> None:
        """Whether others would take a gradient of the batch before for this one's."""
        for other in run.order.slots["backward"]:
            if other is not self and "data parallelism" not in other.card.sets:
                what = f"`{other.name}` needs the gradient of this step's batch, and 2bw has that of the one before."
                raise UserError(what, f"{run.where(self)}.order", f"Choose another order, or drop `{other.name}`.")

    def carry(self, state: State, run: Run) -> State:
        """With 2bw, a new stage begins with nothing that waits: its weights may have other shapes."""
        own, fresh = f"memory.{run.order.key(self)}", run.clock.position == run.clock.begun
        return {kind: tensors for kind, tensors in state.items() if kind != own or not fresh}

    def _stages(self, model: Any, run: Run) -> Stages:
        """How the model is cut."""
        ranks = run.world.ranks("pipeline")
        each = self.stages_per_rank or (2 if self.order in ("interleaved", "zbv") else 1)
        count, where = ranks * each, run.where(self)
        blocks, before, behind = work(model)
        if len(blocks) < count:
            what = f"{len(blocks)} blocks cannot be cut into {count} stages."
            raise UserError(what, where, "Use fewer ranks along the pipeline, or a deeper model.")
        if self.split and (len(self.split) != count or sum(self.split) != len(blocks)):
            what = f"split must give {count} stages {len(blocks)} blocks in all, not {list(self.split)}."
            raise UserError(what, f"{where}.split")
        counts = self.split or balanced(blocks, before, behind, count)
        return Stages(parts_of(model, counts), placed(count, ranks, self.order == "zbv"))
