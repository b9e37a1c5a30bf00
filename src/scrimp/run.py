# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""A run, and how it is built: every slot folded over the techniques, and what crosses a stage.

`build` is the same for training, resuming, planning and comparing. It holds no earlier model: what crosses a stage
is named tensors, on the host or on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from scrimp.agree import configured, prepared
from scrimp.arrange import Arrangement, arrange, emulated, scope
from scrimp.clock import Clock
from scrimp.errors import RecipeError, UserError
from scrimp.fits import check_needs, check_ranks
from scrimp.groups import (
    Group,
    Multipliers,
    Several,
    assign,
    load_moments,
    moments,
    partition,
    trainable,
)
from scrimp.peers import among
from scrimp.plain import batches, constant, plain_backward, plain_evaluate, plain_step, share
from scrimp.sharding import follow, gradient_norm, like, mark, shape, whole
from scrimp.stopwatch import Stopwatch
from scrimp.technique import Technique
from scrimp.weights import freeze, initialize, load_weights, materialize, on_meta, persistent, renewable
from scrimp.world import ALONE, World

if TYPE_CHECKING:
    from scrimp.recipe import Recipe
    from scrimp.technique import Backward, Batch, Evaluate, Loss, State, Step


@dataclass
class Run:
    """What a stage trains with. Techniques get it in every slot; fields fill up in the order of `build`."""

    recipe: Recipe
    order: Arrangement
    clock: Clock
    data: Any
    device: torch.device
    seed: int = 0
    world: World = ALONE
    """The ranks that train together."""
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    """Of this rank's own work in a step, in which it waits for no other."""
    memories: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]])
    decisions: dict[str, Any] = field(default_factory=dict[str, Any])
    task: Any = None
    """The task, prepared for the data: batch, count, loss, evaluate."""
    model: nn.Module = field(default_factory=nn.Module)
    base: frozenset[str] = frozenset()
    """Names of the parameters before any surgery."""
    elsewhere: frozenset[str] = frozenset()
    """Names of the parameters and buffers that only other ranks hold; checkpoints have them, this rank does not."""
    repeated: frozenset[str] = frozenset()
    """Names of the parameters that an earlier rank holds as well, so that sums over ranks must not count them again."""
    plans: dict[str, Any] = field(default_factory=dict[str, Any])
    """What techniques work out in one slot for another, by technique."""
    optimizer: Optimizer | None = None
    factor: Callable[[float], float] = lambda _: 1.0
    index: np.ndarray = field(default_factory=lambda: np.arange(0))
    batch: Callable[[int], Batch] = lambda _: {}
    loss: Loss | None = None
    backward: Backward | None = None
    more_parts: bool = False
    """Whether more parts of the batch follow the one whose gradient is computed: ranks need not sum it yet."""
    step: Step | None = None
    gauges: dict[str, float] = field(default_factory=dict[str, float])
    """Numbers of techniques, such as a density, that each step's line in metrics.jsonl shows."""
    remarks: list[str] = field(default_factory=list[str])
    """What techniques say to the user when a stage begins; a sentence each."""
    findings: dict[str, str] = field(default_factory=dict[str, str])
    """What techniques have found out, by technique, a sentence each; the user reads it when the run ends."""
    signals: list[str] = field(default_factory=list[str])
    """Reasons of techniques to end the stage after this step; the cut is recorded like any other."""
    evaluate: Evaluate | None = None
    closing: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])
    """What techniques finish when the stage ends, on all ranks at once."""

    def fold(self, slot: str, value: Any) -> Any:
        """What the trainer would use -> what it shall use.

        Raises:
            TypeError: if a technique returns nothing.
        """
        for technique in self.order.slots[slot]:
            try:
                value = getattr(technique, slot)(value, self)
            except UserError as error:
                if error.where or isinstance(error, RecipeError):
                    raise
                raise UserError(error.what, self.where(technique), error.fix) from error
            if value is None:
                raise TypeError(f"{technique.name}.{slot} returned None; it must return what shall be used.")
        return value

    def memory(self, technique: Technique) -> dict[str, Tensor]:
        """A technique's named tensors, checkpointed and carried like weights."""
        return self.memories.setdefault(self.order.key(technique), {})

    def where(self, technique: Technique, setting: str = "") -> str:
        """A technique's path in the recipe, for errors."""
        return f"techniques.{technique.name}" + (f".{setting}" if setting else "")

    def log(self, technique: Technique, **values: float) -> None:
        """Show numbers in each step's line from now on, as `<technique>_<name>`."""
        key = self.order.key(technique)
        self.gauges.update({f"{key}_{name}": value for name, value in values.items()})

    def read(self, value: Tensor, worst: float) -> float:
        """A scalar's value; `worst` while planning, when tensors have none."""
        return worst if isinstance(value, FakeTensor) else float(value)

    def norm(self, weights: Iterable[nn.Parameter]) -> Tensor:
        """The norm of the gradients of some parameters together, with those that other stages of a pipeline hold."""
        stages, again = self.world.ranks("pipeline") > 1, set[int]()
        if stages:
            again = {id(p) for name, p in self.model.named_parameters() if name in self.repeated}
        norm = gradient_norm([p for p in weights if id(p) not in again])
        if not stages:
            return norm
        # A stage without gradients has a zero of torch's choice: sums need one type, on one device.
        square = norm.to(self.device, torch.float64).square()
        return self.world.total(square, "pipeline").sqrt().to(torch.promote_types(norm.dtype, torch.float32))

    def close(self) -> None:
        """The stage ends."""
        for job in self.closing:
            job()

    def set_lr(self) -> float:
        """Set every group's learning rate for the current progress; returns the largest."""
        assert self.optimizer is not None
        factor = self.factor(self.clock.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        return max((float(g["lr"]) for g in self.optimizer.param_groups), default=0.0)

    def state(self, only_trained: bool = False) -> State:
        """Everything that a checkpoint holds. Tensors are not copied."""
        parameters = dict(self.model.named_parameters())
        weights: dict[str, Tensor] = {
            n: p for n, p in parameters.items() if p.requires_grad or not only_trained
        } | persistent(self.model)
        state: State = {"model": weights}
        if self.optimizer is not None:
            state |= moments(self.optimizer, parameters)
        state |= {f"memory.{key}": tensors for key, tensors in self.memories.items() if tensors}
        for tensors in state.values():
            for name, tensor in tensors.items():
                follow(tensor, parameters.get(name))
        return state


def build(
    recipe: Recipe,
    data: Any,
    clock: Clock,
    last: State | None = None,
    source: State | None = None,
    decisions: Mapping[str, Any] | None = None,
    order: Arrangement | None = None,
    world: World = ALONE,
) -> Run:
    """A run, ready to train.

    Args:
        data: what `recipe.data.open()` gave.
        clock: where the run is; its stage selects what techniques do.
        last: the finished stage, or the checkpoint that is resumed.
        source: weights that a new run starts from; what techniques add may be missing in it, and a task's head.
        decisions: what earlier stages decided, by technique.
        order: the order of the slots instead of the cards' own; for tests of order.
        world: the ranks that build it together.
    Raises:
        UserError: if techniques do not fit the model, or weights do not fit it.
    """
    run = Run(recipe, order or arrange(recipe.techniques), clock, data, device_of(recipe), recipe.seed, world)
    check_ranks(run)
    run.decisions, run.task = dict(decisions or {}), among(prepared(recipe, data), world)
    run.remarks += emulated({t.name: t.card for t in recipe.techniques}, run.device.type)
    with on_meta(getattr(torch, recipe.dtype)):
        config = configured(recipe, data)
        model = config.build()
        run.base = frozenset(name for name, _ in model.named_parameters())
        run.model = model
        check_needs(model, run)
        model = run.fold("model", model)
    freeze(model, run.order.techniques, getattr(run.task, "trains", ()))
    run.model = materialize(run.fold("wrap", model), run.device)
    mark(run.model)
    initialize(run.model, run.seed)
    run.model = run.fold("init", run.model)
    state = own(run.fold("carry", last if last is not None else source or {}), run.elsewhere)
    if "model" in state:
        fresh = renewable(config)
        load_weights(run.model, state["model"],
                     lambda name: last is not None or (name in run.base and not name.startswith(fresh)))  # fmt: skip
    run.optimizer = make_optimizer(run)
    run.factor = run.fold("schedule", constant)
    run.index = run.fold("items", np.arange(len(data.train)))
    run.batch = share(run, run.fold("batch", batches(run)))
    run.loss = run.fold("loss", run.task.loss)
    run.backward = run.fold("backward", plain_backward(run))
    run.step = run.fold("step", plain_step(run))
    run.evaluate = run.fold("evaluate", plain_evaluate(run))
    if last is not None:
        load_rest(run, state)
    return run


def own(state: State, elsewhere: Collection[str]) -> State:
    """What this rank holds of a state: without the tensors that belong to other ranks only."""
    if not elsewhere:
        return state
    return {kind: {n: t for n, t in tensors.items() if n not in elsewhere} for kind, tensors in state.items()}


def device_of(recipe: Recipe) -> torch.device:
    """Where a recipe trains."""
    if recipe.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device is available.", "device", "Set it to cpu or auto.")
    return torch.device(recipe.device)


def load_rest(run: Run, state: State) -> None:
    """Moments and memories of a state into the run.

    Raises:
        UserError: if something belongs to no parameter or technique of the run.
    """
    assert run.optimizer is not None
    kinds = {kind: tensors for kind, tensors in state.items() if kind.startswith("optimizer.")}
    parameters = dict(run.model.named_parameters())
    load_moments(run.optimizer, parameters, kinds)
    keys = set(run.order.keys.values())
    for kind, tensors in state.items():
        if kind.startswith("memory."):
            key = kind.removeprefix("memory.")
            if key not in keys:
                raise UserError(f"the checkpoint has memory of `{key}`, which the recipe lacks.", "checkpoint")
            kept = run.memories.setdefault(key, {})
            for name, tensor in kept.items():
                follow(tensor, parameters.get(name))
            off = [n for n in tensors if n not in kept or shape(kept[n]) != tensors[n].shape] + [
                n for n in kept if n not in tensors
            ]
            if off:
                raise UserError(f"the memory of `{key}` does not fit: {', '.join(off[:6])}.", "checkpoint")
            for name, value in tensors.items():
                kept[name] = like(kept[name], value)


def make_optimizer(run: Run) -> Optimizer:
    """The update rules over their groups, then what wraps them."""
    names = trainable(run.model)
    table: dict[str, Multipliers] = {}
    for pattern, rule in run.recipe.groups.items():
        table[pattern] = table.get(pattern, Multipliers()).times(Multipliers(rule.lr, rule.decay))
    table = run.fold("groups", table)
    rules = {run.order.key(t): t for t in run.order.slots["optimizer"] if "update rule" in t.card.sets}
    owned = partition(names, {key: scope(t) for key, t in rules.items()}, run.elsewhere)

    def make(groups: list[Group]) -> Optimizer:
        made: list[Optimizer] = []
        for key, technique in rules.items():
            mine = [Group({n: p for n, p in g.params.items() if n in owned[key]}, g.lr, g.decay) for g in groups]
            # Other ranks may hold all that a rule trains.
            if any(g.params for g in mine) or not run.elsewhere:
                made.append(technique.optimizer(make, run)([g for g in mine if g.params]))
        return made[0] if len(made) == 1 else Several(made)

    wrapped: Callable[[list[Group]], Optimizer] = make
    for technique in run.order.slots["optimizer"]:
        if technique not in rules.values():
            wrapped = technique.optimizer(wrapped, run)
    return wrapped(assign(names, table, run.elsewhere))


def exported(run: Run) -> dict[str, Tensor]:
    """Plain weights of the original architecture: every technique's `export`, outermost first."""
    named: dict[str, Tensor] = {n: whole(p) for n, p in run.model.named_parameters()} | persistent(run.model)
    for technique in reversed(run.order.slots["export"]):
        named = technique.export(named, run)
    return named
