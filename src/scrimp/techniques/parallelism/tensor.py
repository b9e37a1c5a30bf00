# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Tensor parallelism: every rank holds a part of each layer, and all see the same samples.

    attention     rank r has heads r H / n ... of qkv (rows) and of proj (columns); the ranks' outputs are summed
    MLP           rank r has hidden units r F / n ... of up (rows) and of down (columns); likewise
    vocabulary    rank r has tokens r V / n ... of embedding, head and loss
    between       rank r has tokens r T / n ... of the residual stream (`sequence`)

Two sums of [B, T, C] a block and pass, into the layers backward and out of them forward; with `sequence` each is a
reduce-scatter and a gather, which send as much. A bias behind a sum is added once. Dropout is keyed by sample and
position, and drops the same activations on any mesh.

Papers: Shoeybi et al., "Megatron-LM", arXiv 1909.08053; Korthikanti et al., "Reducing Activation Recomputation in Large
Transformer Models", arXiv 2205.05198, for `sequence`.

Saves: weights, gradients, states and products of the split layers, to 1/n of them each; with `sequence` also what norms
and residual sums keep. Costs: four exchanges of activations a block and step, on which the ranks wait; so it is for
ranks that are connected fast. Not for: ranks in other machines (`replicate`, `zero`); heads fewer than ranks.

Norms, positions and biases behind sums stay whole on every rank, and are the same there. Where tokens cannot be shared
evenly, as in generation, the stream stays whole too. A token that is gathered is kept whole for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.lanes import Lane, Ranks
from scrimp.models.dropout import Dropout
from scrimp.models.layers import MLP, Attention, CrossAttention, Embedding
from scrimp.models.seams import CrossEntropy, Linear, blocks, wrap_forward
from scrimp.sharding import Cut
from scrimp.technique import Card, Technique
from scrimp.vocabulary import SharedCrossEntropy, looked_up

if TYPE_CHECKING:
    from scrimp.run import Run

ROWS, COLUMNS = 0, 1
"""Dimensions of a weight [outputs, inputs]."""
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, kw_only=True)
class TensorParallel(Technique):
    """Every rank holds a part of each layer."""

    card = Card(
        paper="arXiv:1909.08053",
        section="Parallelism",
        saves="weights, gradients, states and products, to 1/ranks of them each",
        costs="four exchanges of activations a block and step",
        sets=("tensor parallelism",),
        axes=("tensor",),
        phase={"wrap": "shard"},
        example={},
        neutral={},
    )
    sequence: bool = True
    """Share the tokens between layers too, while training."""
    vocabulary: bool = True
    """Share the vocabulary: the embedding, the head and the loss."""

    @property
    def shards(self) -> bool:
        """Ranks hold parts of the weights."""
        return True

    def wrap(self, model: nn.Module, run: Run) -> nn.Module:
        """Cut the layers; a single rank has nothing to share."""
        if run.world.ranks("tensor") == 1:
            return model
        split = Splitting(Ranks.of(run.world), run.where(self))
        split.check_steps(model)
        for stack in split.stacks(model, self.sequence):
            split.stack(*stack)
        for path, owner in model.named_modules() if self.vocabulary else ():
            if isinstance(getattr(owner, "embed", None), Embedding):
                split.vocabulary(path, owner)
        return model


class Splitting:
    """Cuts layers for one rank.

    Args:
        where: the technique's path in the recipe, for errors.
    """

    def __init__(self, ranks: Ranks, where: str) -> None:
        self.ranks, self.where = ranks, where
        self.cut: dict[nn.Parameter, nn.Parameter] = {}
        """A whole parameter -> its part: layers may share parameters."""

    def stacks(self, model: nn.Module, sequence: bool) -> list[tuple[Lane, dict[str, nn.Module]]]:
        """Blocks by name, each stack with a lane of its own.

        Raises:
            UserError: if the model has no layers that can be split.
        """
        found: dict[str, dict[str, nn.Module]] = {}
        for name, block in blocks(model, self.where).items():
            found.setdefault(name.rpartition(".")[0], {})[name] = block
        if not any(isinstance(m, Attention | MLP) for m in model.modules()):
            what = f"{type(model).__name__} has none of the layers that it splits."
            raise UserError(what, self.where, "Use one of Scrimp's own models, or `zero`.")
        return [(Lane(self.ranks, sequence), stack) for stack in found.values()]

    def stack(self, lane: Lane, stack: dict[str, nn.Module]) -> None:
        """Split the layers of a stack of blocks, and its tokens between them."""
        members = list(stack.values())
        lane.dropouts += [m for block in members for m in block.modules() if isinstance(m, Dropout)]
        members[0].register_forward_pre_hook(lane.enter)
        members[-1].register_forward_hook(lane.leave)
        for name, block in stack.items():
            after: set[nn.Module] = set()
            inside: set[nn.Module] = set()
            for path, layer in block.named_modules():
                if isinstance(layer, Attention | CrossAttention | MLP):
                    last = self.layer(f"{name}.{path}", layer, lane)
                    after |= set(last.modules())
                    inside |= set(layer.modules())
            for module in block.modules():
                if not hasattr(module, "cuts") and any(True for _ in module.parameters(recurse=False)):
                    spread(module, lane, always=module in inside - after)

    def layer(self, path: str, layer: Attention | CrossAttention | MLP, lane: Lane) -> Linear:
        """Split one layer; returns its last projection, behind which the ranks' parts are summed."""
        if isinstance(layer, MLP):
            self.even(path, "hidden units", layer.up.weight.shape[0])
            for child in (layer.up, layer.gate):
                if child is not None:
                    self.rows(child)
            last = layer.down
            wrap_forward(layer, lambda forward: lambda x: forward(lane.into(x)))
        else:
            self.heads(path, layer)
            last = layer.proj
            if isinstance(layer, Attention):
                wrap_forward(layer, lambda forward: lambda x, *more: forward(lane.into(x), *more))
            else:
                spread_states = self.ranks.spread
                wrap_forward(
                    layer, lambda forward: lambda x, states, mask: forward(lane.into(x), spread_states(states), mask)
                )
        self.columns(last, lane)
        return last

    def heads(self, path: str, layer: Attention | CrossAttention) -> None:
        """Split queries, keys and values by heads."""
        self.even(path, "heads", layer.heads)
        self.even(path, "key/value heads", layer.kv_heads)
        queries, keys = layer.heads * layer.width, layer.kv_heads * layer.width
        if isinstance(layer, Attention):
            self.rows(layer.qkv, (queries, keys, keys))
        else:
            self.rows(layer.q)
            self.rows(layer.kv, (keys, keys))
        layer.heads //= self.ranks.count
        layer.kv_heads //= self.ranks.count

    def vocabulary(self, path: str, owner: Any) -> None:
        """Split a table of tokens, and the head and the loss of a model of language."""
        embed: Embedding = owner.embed
        self.even(f"{path}.embed".lstrip("."), "tokens", len(embed.weight), "Set `vocabulary: false`, or `mesh.tensor`")
        head = getattr(owner, "head", None)
        if isinstance(head, Linear) and hasattr(owner, "head_loss"):
            self.head(owner, head)
        self.take(embed, "weight", ROWS, (len(embed.weight),))
        wrap_forward(embed, lambda forward: lambda ids: looked_up(embed, ids, self.ranks))

    def head(self, owner: Any, head: Linear) -> None:
        """Logits come together where somebody wants them; the loss does without."""
        self.rows(head)
        inner: Product = head.product
        head.product = lambda x, weight, bias: inner(self.ranks.spread(x), weight, bias)
        part: Callable[[Tensor], Tensor] = head.forward
        wrap_forward(head, lambda forward: lambda x: self.ranks.beside(part(x), -1))
        if type(owner.head_loss) is CrossEntropy and "forward" not in vars(owner.head_loss):
            owner.head_loss = SharedCrossEntropy(part, self.ranks)

    def rows(self, layer: Linear, sections: tuple[int, ...] = ()) -> None:
        """Split a layer's outputs."""
        sections = sections or (layer.weight.shape[0],)
        self.take(layer, "weight", ROWS, sections)
        if layer.bias is not None:
            self.take(layer, "bias", ROWS, sections)

    def columns(self, layer: Linear, lane: Lane) -> None:
        """Split a layer's inputs; its outputs are summed over ranks, and the bias is added once."""
        self.take(layer, "weight", COLUMNS, (layer.weight.shape[1],))
        inner: Product = layer.product

        def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            y = lane.out(inner(x, weight, None))
            if bias is None:
                return y
            return y + (self.ranks.spread(bias) if lane.split else bias)

        layer.product = product

    def take(self, module: nn.Module, name: str, dim: int, sections: tuple[int, ...]) -> None:
        """Leave a module its part of a parameter."""
        cut = Cut(dim, sections, self.ranks.count, self.ranks.place, self.ranks.group)
        p = module.get_parameter(name)
        if p not in self.cut:
            self.cut[p] = nn.Parameter(cut.part(p.detach()), p.requires_grad)
        module.register_parameter(name, self.cut[p])
        cuts: dict[str, Cut] = vars(module).setdefault("cuts", {})
        cuts[name] = cut

    def even(self, path: str, things: str, count: int, fix: str = "Choose another `mesh.tensor`") -> None:
        """Whether the ranks can share something evenly.

        Raises:
            UserError: if not.
        """
        if count % self.ranks.count:
            what = f"`{path}` has {count} {things}, which {self.ranks.count} ranks cannot share evenly."
            raise UserError(what, self.where, f"{fix}, a divisor of {count}.")

    def check_steps(self, model: nn.Module) -> None:
        """Whether other techniques leave split layers as they are.

        Raises:
            UserError: naming the layer and what is added to it.
        """
        for path, layer in model.named_modules():
            if not isinstance(layer, Attention | CrossAttention | MLP):
                continue
            for name, child in layer.named_children():
                if not isinstance(child, Linear):
                    continue
                steps = child.on_input + child.on_weight + child.on_bias
                # What is done behind a sum is done to the whole.
                steps += [] if name in ("proj", "down") else child.on_output
                if steps:
                    what = f"`{steps[0][1]}` is added to the whole of `{path}.{name}`, of which ranks hold parts."
                    raise UserError(what, self.where, "Train it with `replicate` or `zero` instead.")


def spread(module: nn.Module, lane: Lane, always: bool) -> None:
    """Sum the gradients of a module's own parameters over ranks that see other tokens or other heads.

    Args:
        always: whether they see other heads; otherwise they see other tokens while the lane is split.
    """
    names = [name for name, _ in module.named_parameters(recurse=False)]

    def around(forward: Callable[..., object]) -> Callable[..., object]:
        def inner(*args: Any, **kwargs: Any) -> object:
            if not (always or lane.split):
                return forward(*args, **kwargs)
            # In the instance's own dictionary they come before the parameters.
            vars(module).update({name: lane.ranks.spread(module.get_parameter(name)) for name in names})
            try:
                return forward(*args, **kwargs)
            finally:
                for name in names:
                    del vars(module)[name]

        return inner

    wrap_forward(module, around)
