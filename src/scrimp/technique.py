"""What a technique is: a frozen dataclass whose fields are its settings and whose slots are all that it changes.

Every slot has one shape: it gets what the trainer would have used and returns what it should use. A run is a
fixed pipeline of slots, and composing techniques is a fold over each slot. `run.py` folds, `arrange.py` orders.

A technique holds no state. What it must remember between steps lives in the model's buffers, in the optimizer's
state or in `run.memory(self)`, all of which are checkpointed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, Final

from scrimp.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from scrimp.groups import Group, Multipliers
    from scrimp.run import Run

    Batch = dict[str, Tensor]
    State = dict[str, Mapping[str, Tensor]]
    """`{kind: {name: tensor}}`: kinds are "model", "optimizer.<moment>" and "memory.<technique>"."""
    Loss = Callable[[nn.Module, Batch], Tensor]
    """(model, batch) -> the loss summed over what `task.count(batch)` counts."""
    Backward = Callable[[Batch, Tensor], Tensor]
    """(batch, count) -> the mean loss; leaves the gradient of the summed loss over count in `.grad`."""
    Step = Callable[[], bool]
    """() -> whether the weights were updated."""
    Evaluate = Callable[[Callable[[nn.Module], Any]], Any]
    """(job) -> job(model), run as validation, sampling and export of metrics must run."""


SLOTS: Final[dict[str, str]] = {
    "stages": "once",
    "decide": "a stage",
    "model": "a stage",
    "wrap": "a stage",
    "init": "a stage",
    "carry": "a stage",
    "groups": "a stage",
    "optimizer": "a stage",
    "schedule": "a stage",
    "items": "a stage",
    "batch": "a stage",
    "loss": "a step",
    "backward": "a step",
    "step": "a step",
    "evaluate": "a step",
    "export": "after",
    "price": "plan",
}
"""Every slot and when it is called."""

PHASES: Final[dict[str, tuple[str, ...]]] = {
    "model": ("sizes", "architecture", "beside", "seams", "frozen"),
    "wrap": ("tokens", "precision", "recompute", "saved", "compile", "elastic", "dropped", "shard"),
    "init": ("fill", "scale", "packed", "measured"),
    "carry": ("decoded", "rewind", "grow", "widen", "masked", "packed", "measured"),
    "optimizer": ("rule", "states", "sharded"),
    "schedule": ("shape", "warm-up", "time", "rounds"),
    "items": ("filter", "sample"),
    "batch": ("length", "resolution", "augment"),
    "loss": ("items", "auxiliary", "scaled"),
    "backward": ("summed", "micro-batch", "accumulated", "measured", "masked", "perturbed", "unscaled", "watched"),
    "step": ("rounded", "averaged", "updated", "clipped", "masked", "unscaled", "delayed"),
    "evaluate": ("masked", "averaged"),
    "export": ("whole", "folded", "collapsed", "gated", "merged", "scaled", "averaged", "packed"),
}
"""The order within a slot, innermost first: a later phase wraps an earlier one.

What happens to gradients therefore reads backwards in `step`: they are unscaled, masked and clipped on their way in
to the update. A technique that declares no phase must commute with all others that do not; `tests/pairs` checks it.
"""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a technique says of itself. Written with literals only, so that it can be read without importing torch."""

    paper: str
    """arXiv number or venue of the paper it follows."""
    section: str
    """Section of the survey it belongs to."""
    claim: str = ""
    """The number its paper is known for, with its source; empty when no source was read."""
    saves: str = ""
    """What it saves, in a phrase."""
    costs: str = ""
    """What it costs, in a phrase."""
    sets: tuple[str, ...] = ()
    """Exclusive things it sets, such as "update rule": two techniques that set the same thing clash."""
    scope: str = ""
    """The setting that holds a pattern of parameters: two techniques with disjoint scopes do not clash."""
    needs: tuple[str, ...] = ()
    """Seams the model must offer, by name (`scrimp.models.seams`)."""
    trains: tuple[str, ...] = ()
    """Patterns of the parameters a tuning method trains; tuning methods unite them and freeze the rest. Settings may
    add to them: see `Technique.trained`."""
    replaces: tuple[str, ...] = ()
    """Slots whose incoming value it discards: folded first in its phase, and two of them clash."""
    refuses: Mapping[str, str] = field(default_factory=dict[str, str])
    """What others set (`sets`) that it cannot stand beside -> why, as a sentence. "frozen weights" is what every tuning
    method sets."""
    axes: tuple[str, ...] = ()
    """Axes of the mesh of ranks whose ranks it has train together."""
    whole: str = ""
    """Why each rank needs the whole weights for it, as a sentence; empty where its part of them suffices. Techniques
    that shard weights are refused beside it."""
    held: str = ""
    """Why a rank must hold what it has of the weights all the time for it, as a sentence; techniques that shard them
    over the axis `data`, and gather them for a pass, are refused beside it."""
    undivided: str = ""
    """Why all blocks must be on one rank for it, as a sentence; empty where each rank's own suffice. Techniques that
    cut the model into stages are refused beside it."""
    entire: str = ""
    """Why a rank must see whole samples for it, as a sentence; empty where some of their tokens do. Techniques that
    share the tokens of a sample between ranks are refused beside it."""
    breaks: bool = False
    """Whether ranks share the tokens of each sample."""
    shards: bool = False
    """Whether each rank holds only a part of each weight; settings may decide it: see `Technique.shards`."""
    cuts: bool = False
    """Whether each rank runs only some of the blocks."""
    alone: str = ""
    """Why it cannot go with several ranks at all, as a sentence; empty where it can."""
    micro_batches: bool = False
    """Whether it computes a batch in parts, which a task whose loss compares all items of a batch forbids."""
    phase: Mapping[str, str] = field(default_factory=dict[str, str])
    """slot -> its phase in `PHASES`."""
    emulated: tuple[str, ...] = ()
    """Kinds of devices that lack its hardware: it computes the right numbers there and saves no time. Plans, runs and
    reports say so."""
    example: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Settings for the contract and pair tests."""
    remedies: tuple[Mapping[str, Any], ...] = ()
    """Settings to propose when memory does not suffice, the mildest first."""
    neutral: Mapping[str, Any] | None = None
    """Settings with which it must equal the baseline bitwise; None where there are none."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a dry run cannot see of a step."""

    seconds: float = 0.0
    """On top of its operators."""
    bytes: int = 0
    """Held during steps, on top of live tensors."""
    fused: bool = False
    """Whether a compiler joins neighboring memory-bound operators of a block."""
    idle: float = 0.0
    """Share of forward and backward passes in which a rank waits for others."""


@dataclass(frozen=True, kw_only=True)
class Technique:
    """The base of all techniques. A subclass is frozen, has a `card`, and overrides the slots it changes."""

    card: ClassVar[Card]
    name: ClassVar[str] = ""
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}

    def __init_subclass__(cls) -> None:
        """The name is the file's name: it is the recipe's key and the command line's word."""
        cls.name = cls.__module__.rpartition(".")[2]
        own: Any = vars(cls).get("__post_init__")
        if own is not None:
            # What a technique checks itself may then compare and iterate without checking types first.
            cls.__post_init__ = lambda self: _checked(self, own)  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        """Check the settings. A subclass' own checks run after those of the types, and need not say where they are."""
        _checked(self, lambda technique: None)

    @property
    def trained(self) -> tuple[str, ...]:
        """Patterns of the parameters that it trains with its settings, where it freezes all others."""
        return self.card.trains

    @property
    def shards(self) -> bool:
        """Whether each rank holds only a part of each weight with its settings."""
        return self.card.shards

    def stages(self) -> tuple[str | float, ...]:
        """Durations from the start at which the run must be rebuilt, at the latest."""
        return ()

    def decide(self, last: Run) -> dict[str, Any]:
        """A small JSON that shapes of the next stage depend on, from the stage that ends."""
        return {}

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """Surgery, on meta tensors. Parameters may be added; none that stays is renamed."""
        return model

    def wrap(self, model: nn.Module, run: Run) -> nn.Module:
        """Another execution of the same parameters."""
        return model

    def init(self, model: nn.Module, run: Run) -> nn.Module:
        """Fill weights; those that a checkpoint gives are overwritten afterwards."""
        return model

    def carry(self, state: State, run: Run) -> State:
        """The last stage's weights and moments (or a checkpoint's) -> those of this stage."""
        return state

    def groups(self, groups: dict[str, Multipliers], run: Run) -> dict[str, Multipliers]:
        """pattern of parameters -> multipliers of learning rate and decay."""
        return groups

    def optimizer(self, make: Callable[[list[Group]], Optimizer], run: Run) -> Callable[[list[Group]], Optimizer]:
        """groups -> optimizer."""
        return make

    def schedule(self, factor: Callable[[float], float], run: Run) -> Callable[[float], float]:
        """progress in [0, 1] -> factor of the learning rate."""
        return factor

    def items(self, index: np.ndarray, run: Run) -> np.ndarray:
        """Which items of the training set there are: int64, shape [items]."""
        return index

    def batch(self, batch: Callable[[int], Batch], run: Run) -> Callable[[int], Batch]:
        """step -> batch, a function of (seed, step)."""
        return batch

    def loss(self, loss: Loss, run: Run) -> Loss:
        """(model, batch) -> summed loss."""
        return loss

    def backward(self, backward: Backward, run: Run) -> Backward:
        """(batch, count) -> mean loss, leaving gradients."""
        return backward

    def step(self, step: Step, run: Run) -> Step:
        """() -> whether it updated. A skipped update is all gradients None; the clock still ticks."""
        return step

    def evaluate(self, evaluate: Evaluate, run: Run) -> Evaluate:
        """job -> job(model), as validation must run."""
        return evaluate

    def export(self, named: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        """Trained weights -> plain weights of the original architecture. Folded in reverse."""
        return named

    def price(self, cost: Cost, run: Run) -> Cost:
        """What a dry run cannot see, on top of what other techniques said."""
        return cost

    def settings(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


KINDS: Final[dict[str, tuple[tuple[type, ...], str]]] = {
    "float": ((Real,), "a number"),
    "int": ((Integral,), "a whole number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "a text"),
    "str | float": ((str, Real), "a duration"),
}
"""Annotation of a setting -> what it may be, in Python and in words."""


def _checked(technique: Technique, own: Callable[[Technique], None]) -> None:
    """Run a technique's own checks after those of its settings' types; a fault says in which technique it is."""
    place = f"techniques.{technique.name}"
    for f in fields(technique):
        value = getattr(technique, f.name)
        kinds, words = KINDS.get(str(getattr(f.type, "__name__", f.type)), ((object,), ""))
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds and object not in kinds):
            fix = "" if f.default is MISSING else f"Give for example {f.default!r}."
            raise UserError(f"must be {words}, not {value!r}.", f"{place}.{f.name}", fix)
    try:
        own(technique)
    except UserError as error:
        if error.where.startswith(place):
            raise
        raise UserError(error.what, f"{place}.{error.where}" if error.where else place, error.fix) from None


def at_least(least: float, technique: Technique, *settings: str) -> None:
    """Check numbers among a technique's settings; no number is less than all.

    Raises:
        UserError: naming the first that is not.
    """
    _each(technique, settings, lambda value: value >= least, f"at least {least}")


def below_one(technique: Technique, *settings: str) -> None:
    """Check shares among a technique's settings: at least 0 and less than 1. Raises as `at_least`."""
    _each(technique, settings, lambda value: 0 <= value < 1, "at least 0 and less than 1")


def above_zero(technique: Technique, *settings: str) -> None:
    """Check shares that may be the whole: above 0 and at most 1. Raises as `at_least`."""
    _each(technique, settings, lambda value: 0 < value <= 1, "above 0 and at most 1")


def _each(technique: Technique, settings: Sequence[str], fits: Callable[[float], bool], words: str) -> None:
    for name in settings:
        value = getattr(technique, name)
        if not fits(value):
            raise UserError(f"{name} must be {words}, not {value}.")


def overrides(technique: Technique | type[Technique], slot: str) -> bool:
    """Whether a technique changes a slot."""
    kind = technique if isinstance(technique, type) else type(technique)
    return getattr(kind, slot) is not getattr(Technique, slot)
