"""Prompt tuning: trained vectors before the embedded tokens, the model itself frozen.

    x = [P, embed(tokens)]    P [length, C] trained; cut off again before the head
    P = V                     encoder: none, prompt tuning
    P = MLP(V)                encoder: mlp, P-tuning: linear, ReLU, linear, ReLU, linear

Papers: Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", EMNLP 2021, arXiv 2104.08691;
P-tuning: Liu et al., "GPT Understands, Too", arXiv 2103.10385, whose other encoder, an LSTM, is not here. The encoder
only helps training: export drops it and keeps P.

Saves: gradients and states of all weights of the model, and disk: length * C numbers are all that a task needs. Costs:
`length` more tokens in every block, and steps: prompts learn slowly and like learning rates of 0.1 and more. Not for:
small models, where it stays behind LoRA; memory taken by activations, which stay, as gradients go through all blocks.

Tokens see the prompts in all layers, and those of several packed documents see the same ones. With `shift`, tokens
stand `length` places further right, as other libraries have it; without, they keep the places that the model knows them
at. Rotary positions are relative, so that both are one and the same there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.draws import generator
from scrimp.errors import UserError
from scrimp.models.seams import Linear
from scrimp.sharding import put, whole
from scrimp.technique import Card, Technique, at_least

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import State

TABLE = "prompts.weight"
"""Name of the trained vectors, V."""


@dataclass(frozen=True, kw_only=True)
class Prompt(Technique):
    """Trained vectors before the tokens."""

    card = Card(
        paper="arXiv:2104.08691",
        section="Parameter-efficient tuning",
        saves="gradients and states of the model's weights, and disk",
        costs="`length` more tokens in every block; slow learning",
        sets=("prompts",),
        trains=("*prompts.*",),
        refuses={"tokens of a layer": "It may leave out prompts, which stand among the tokens."},
        phase={"model": "seams", "init": "measured", "carry": "grow", "export": "merged"},
        example={"length": 2},
    )
    length: int = 20
    """How many vectors."""
    start: Literal["random", "vocabulary", "text"] = "vocabulary"
    """First values: random ones, rows of the embedding drawn at random, or those of `text`."""
    text: str = ""
    """What the prompts say at first with `start: text`; repeated or cut to `length` tokens."""
    std: float = 0.5
    """Standard deviation of random first values."""
    shift: bool = False
    """Whether tokens stand `length` places further right; learned positions must have rows for that."""
    encoder: Literal["none", "mlp"] = "none"
    """mlp: the prompts are outputs of a network that is dropped after training (P-tuning)."""
    hidden: int = 0
    """Width of the encoder's hidden layers; 0 means the model's."""

    def __post_init__(self) -> None:
        at_least(1, self, "length")
        at_least(0, self, "hidden", "std")
        if (self.start == "text") != bool(self.text):
            raise UserError("`start: text` and a `text` belong together.", "text", "Give both or neither.")
        if self.hidden and self.encoder == "none":
            raise UserError("`hidden` is of the encoder, and there is none.", "hidden", "Set `encoder: mlp`.")

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """Put the vectors before the tokens."""
        net = self._reader(model, run)
        rows: nn.Parameter = net.embed.weight
        room = net.config.context - getattr(getattr(run.data, "train", None), "context", 0)
        if self.shift and net.positions is not None and room < self.length:
            what = f"the learned positions have room for {max(room, 0)} prompts beside the data's tokens."
            fix = "Lower `data.context`, raise `model.context`, or set `shift: false`."
            raise UserError(what, run.where(self, "shift"), fix)
        width = net.config.width
        net.prompts = Prompts(rows.new_empty(self.length, width), self.std, self._encoder(width))
        net.prepended, net.shift = self.length, self.length if self.shift else 0
        return model

    def init(self, model: nn.Module, run: Run) -> nn.Module:
        """First values from the embedding, where it is not loaded later."""
        net = self._reader(model, run)
        if self.start != "random" and net.prompts is not None:
            with torch.no_grad():
                put(net.prompts.weight, net.embed_scale(net.embed_project(self._rows(net.embed.weight, run))))
        return model

    def carry(self, state: State, run: Run) -> State:
        """First values from the embedding that the run starts from, which has no prompts yet."""
        names = {n for n, _ in run.model.named_parameters()}
        table = next((n for n in names if n.endswith(TABLE)), "")
        if not table:
            return state  # Another rank has the prompts.
        reader, given = table.removesuffix(TABLE), state.get("model", {})
        if self.start == "random" or table in given or f"{reader}embed.weight" not in given:
            return state
        rows, project = self._rows(given[f"{reader}embed.weight"], run), given.get(f"{reader}embed_project.weight")
        rows = rows if project is None else F.linear(rows, project)
        return {**state, "model": {**given, table: self._reader(run.model, run).embed_scale(rows)}}

    def export(self, named: dict[str, Tensor], run: Run) -> dict[str, Tensor]:
        """The vectors that the encoder gives, without it."""
        net = self._reader(run.model, run)
        table = next(n for n in named if n.endswith(TABLE))
        inside = table.removesuffix("weight") + "encoder."
        with torch.no_grad():
            return {n: t for n, t in named.items() if not n.startswith(inside)} | {table: net.prompts().detach()}

    def _reader(self, model: nn.Module, run: Run) -> Any:
        """The part of a model that embeds tokens and has a place for prompts.

        Raises:
            UserError: if there is none.
        """
        for module in model.modules():
            if hasattr(module, "prompts") and hasattr(module, "shift"):
                return module
        what = f"{type(model).__name__} has no place for prompts before its tokens."
        raise UserError(what, run.where(self), "Use a `transformer`, or `vpt` on models of images.")

    def _rows(self, embedding: Tensor, run: Run) -> Tensor:
        """Rows [length, E] of an embedding [V, E]."""
        if self.start == "text":
            tokenizer = getattr(run.data, "tokenizer", None)
            said = tokenizer.encode(self.text) if tokenizer is not None else []
            if not said:
                raise UserError("there is no tokenizer, or no token in the text.", run.where(self, "text"))
            ids = (said * self.length)[: self.length]
        else:
            ids = torch.randint(len(embedding), (self.length,), generator=generator(run.seed, f"{self.name}/rows"))
        return whole(embedding)[torch.as_tensor(ids, device=embedding.device)]

    def _encoder(self, width: int) -> nn.Module | None:
        if self.encoder == "none":
            return None
        hidden = self.hidden or width
        return Encoder(width, hidden)


class Encoder(nn.Module):
    """Linear, ReLU, linear, ReLU, linear. Shapes: [..., C] -> [..., C]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        sizes = ((width, hidden), (hidden, hidden), (hidden, width))
        self.layers = nn.ModuleList(Linear(a, b, std=a**-0.5) for a, b in sizes)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.layers
        return third(F.relu(second(F.relu(first(x)))))


class Prompts(nn.Module):
    """() -> the vectors [length, C].

    Args:
        like: of their shape, type and device.
        encoder: what makes them of the trained table; None for the table itself.
    """

    def __init__(self, like: Tensor, std: float, encoder: nn.Module | None) -> None:
        super().__init__()
        self.std, self.weight, self.encoder = std, nn.Parameter(like), encoder

    def initialize(self, name: str, value: Tensor, generator: torch.Generator) -> None:
        """Normal."""
        value.normal_(0.0, self.std, generator=generator)

    def forward(self) -> Tensor:
        return self.weight if self.encoder is None else self.encoder(self.weight)
