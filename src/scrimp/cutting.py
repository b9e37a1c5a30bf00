# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Cutting the layers of a model, so that this rank holds its part of each, and letting the parts work together.

Attention is cut by heads and an MLP by hidden units: rows of the first projections, columns of the last one. Names of
parameters stay; modules note in `cuts` what was done to theirs.

A module that uses another one's parameters has an attribute `elsewhere`, since `spread` would not know. What is added
to a layer's output may be cut with it, if it says how: `outputs` names its parameters with a row for each output of the
layer, `inputs` those with a column for each input. It must be linear in its input then. What changes a sum of all ranks
and looks at nothing else has an attribute `behind`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from scrimp.errors import UserError
from scrimp.lanes import Lane, Ranks
from scrimp.models.dropout import Dropout
from scrimp.models.layers import MLP, Attention, CrossAttention, Embedding
from scrimp.models.seams import CrossEntropy, Linear, wrap_forward
from scrimp.sharding import Cut
from scrimp.vocabulary import SharedCrossEntropy, looked_up

ROWS, COLUMNS = 0, 1
"""Dimensions of a weight [outputs, inputs]."""
INSIDE = ("qkv", "q", "kv", "q_norm", "k_norm", "core", "up", "gate")
"""Names of what a layer has before its last projection: for each rank's heads or hidden units."""
LAST = ("proj", "down")
"""Names of the projections behind which the ranks' parts are summed."""
Way = Callable[[Tensor], Tensor]


class Cutter:
    """Cuts layers for one rank.

    Args:
        where: the technique's path in the recipe, for errors.
    """

    def __init__(self, ranks: Ranks, where: str) -> None:
        self.ranks, self.where = ranks, where
        self.parts: dict[nn.Parameter, nn.Parameter] = {}
        """A whole parameter -> its part: layers may share parameters."""

    def stack(self, stack: dict[str, nn.Module], lane: Lane) -> None:
        """Cut the layers of a stack of blocks, by name, and share the tokens between them."""
        members = list(stack.values())
        lane.dropouts += [m for block in members for m in block.modules() if isinstance(m, Dropout)]
        members[0].register_forward_pre_hook(lane.enter)
        members[-1].register_forward_hook(lane.leave)
        for name, block in stack.items():
            inside: set[nn.Module] = set()
            for path, layer in block.named_modules():
                if isinstance(layer, Attention | CrossAttention | MLP):
                    self.layer(f"{name}.{path}", layer, lane)
                    inside |= {m for n, child in layer.named_children() if n in INSIDE for m in child.modules()}
            for module in block.modules():
                spread(module, lane, always=module in inside or hasattr(module, "cuts"))

    def layer(self, path: str, layer: Attention | CrossAttention | MLP, lane: Lane) -> None:
        """Cut one layer."""
        if isinstance(layer, MLP):
            self._even(path, "hidden units", layer.up.weight.shape[0])
            for child in (layer.up, layer.gate):
                if child is not None:
                    self._rows(child)
            _behind(layer, lane.into)
        else:
            self._heads(path, layer)
            _behind(layer, lane.into, *([self.ranks.spread] if isinstance(layer, CrossAttention) else []))
        last = layer.get_submodule(_last(layer))
        assert isinstance(last, Linear)
        self._columns(last, lane)

    def vocabulary(self, owner: Any) -> None:
        """Cut a table of tokens, and the head and the loss of a model of language.

        A stage of a pipeline may have one of the two: where they are not tied, the table is on the first, the head on
        the last, and None elsewhere.
        """
        embed: Embedding | None = owner.embed
        head: Linear | None = owner.head if hasattr(owner, "head_loss") else None
        table = head if embed is None else embed
        if table is None:
            return
        vocab = len(table.weight)
        if vocab <= -(-vocab // self.ranks.count) * (self.ranks.count - 1):
            what = f"a vocabulary of {vocab} tokens is too small to be shared by {self.ranks.count} ranks."
            raise UserError(what, self.where, "Set `vocabulary: false`.")
        if head is not None:
            self._head(owner, head, vocab)
        if embed is not None:
            self._table(embed, vocab)

    def _table(self, embed: Embedding, vocab: int) -> None:
        """Each rank looks up the tokens that it has."""
        self._take(embed, "weight", ROWS, (vocab,))

        def around(forward: Callable[..., object]) -> Callable[..., object]:
            return lambda ids: looked_up(embed, ids, self.ranks)  # pyright: ignore[reportUnknownLambdaType]

        wrap_forward(embed, around)

    def _head(self, owner: Any, head: Linear, vocab: int) -> None:
        """Logits come together where somebody wants them; the loss does without."""
        self._rows(head)
        product, inner = head.product, head.forward
        head.product = lambda x, weight, bias: product(self.ranks.spread(x), weight, bias)
        own = min(vocab - self.ranks.place * len(head.weight), len(head.weight))

        def part(x: Tensor) -> Tensor:
            return inner(x)[..., :own]

        def around(forward: Callable[..., object]) -> Callable[..., object]:
            return lambda x: self.ranks.beside(inner(x), -1)[..., :vocab]  # pyright: ignore[reportUnknownLambdaType]

        wrap_forward(head, around)
        if type(owner.head_loss) is CrossEntropy and "forward" not in vars(owner.head_loss):
            owner.head_loss = SharedCrossEntropy(part, vocab, self.ranks)

    def _heads(self, path: str, layer: Attention | CrossAttention) -> None:
        """Cut queries, keys and values by heads."""
        self._even(path, "heads", layer.heads)
        self._even(path, "key/value heads", layer.kv_heads)
        queries, keys = layer.heads * layer.width, layer.kv_heads * layer.width
        if isinstance(layer, Attention):
            self._rows(layer.qkv, (queries, keys, keys))
        else:
            self._rows(layer.q)
            self._rows(layer.kv, (keys, keys))
        layer.heads //= self.ranks.count
        layer.kv_heads //= self.ranks.count

    def _rows(self, layer: Linear, sections: tuple[int, ...] = ()) -> None:
        """Cut a layer's outputs."""
        sections = sections or (layer.weight.shape[0],)
        for module, names in ((layer, ("weight", "bias")), *((step, step.outputs) for step in _cuttable(layer))):
            for name in names:
                if getattr(module, name) is not None:
                    self._take(module, name, ROWS, sections)

    def _columns(self, layer: Linear, lane: Lane) -> None:
        """Cut a layer's inputs; its outputs are summed over ranks, and the bias is added once."""
        steps, sections = _cuttable(layer), (layer.weight.shape[1],)
        for module, names in ((layer, ("weight",)), *((step, step.inputs) for step in steps)):
            for name in names:
                self._take(module, name, COLUMNS, sections)
        # What is added before the sum costs no sum of its own.
        layer.on_output = [(phase, name) for phase, name in layer.on_output if layer.get_submodule(name) not in steps]
        inner = layer.product

        def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            y = inner(x, weight, None)
            for step in steps:
                y = step(x, y)
            y = lane.out(y)
            if bias is None:
                return y
            return y + (self.ranks.spread(bias) if lane.split else bias)

        layer.product = product

    def _take(self, module: nn.Module, name: str, dim: int, sections: tuple[int, ...]) -> None:
        """Leave a module its part of a parameter."""
        cut = Cut(dim, sections, self.ranks.count, self.ranks.place, self.ranks.group)
        p = module.get_parameter(name)
        if p not in self.parts:
            self.parts[p] = nn.Parameter(cut.part(p.detach()), p.requires_grad)
        module.register_parameter(name, self.parts[p])
        cuts: dict[str, Cut] = vars(module).setdefault("cuts", {})
        cuts[name] = cut

    def _even(self, path: str, things: str, count: int) -> None:
        """Whether the ranks can share something evenly.

        Raises:
            UserError: if not.
        """
        if count % self.ranks.count:
            what = f"`{path}` has {count} {things}, which {self.ranks.count} ranks cannot share evenly."
            raise UserError(what, self.where, f"Let `mesh.tensor` be a divisor of {count}.")


def check(model: nn.Module, sequence: bool, vocabulary: bool, where: str) -> None:
    """Whether a model's layers can be cut, and other techniques leave them as they are.

    Raises:
        UserError: naming what is in the way.
    """
    layers = {p: m for p, m in model.named_modules() if isinstance(m, Attention | CrossAttention | MLP)}
    if not layers:
        fix = "Use one of Scrimp's own models, or `zero`."
        raise UserError(f"{type(model).__name__} has none of the layers that it cuts.", where, fix)
    fix = "Train it with `replicate` or `zero` instead."
    heads = {p: m for p, m in model.named_modules() if hasattr(m, "head_loss") and vocabulary}
    for path, owner in {**layers, **heads}.items():
        for place, child in _added(path, owner):
            what = f"`{child}` changes the whole of `{place}`, of which ranks hold parts."
            raise UserError(what, where, fix)
    for path, layer in layers.items():
        if getattr(layer, "prefix", None) is not None:
            raise UserError(f"the prefix of `{path}` has keys of all heads, of which ranks hold some.", where, fix)
    for path, module in model.named_modules() if sequence else ():
        if getattr(module, "side", None) is not None or hasattr(module, "token_subset"):
            what = "another technique sees the tokens between blocks, of which ranks would hold some."
            raise UserError(what, where, "Set `sequence: false`.")
        if hasattr(module, "elsewhere"):
            what = f"`{path}` uses another module's parameters, whose gradients ranks would hold in part."
            raise UserError(what, where, "Set `sequence: false`.")


def _added(path: str, owner: nn.Module) -> Iterator[tuple[str, str]]:
    """(place, name) of what other techniques have added to a layer, or to a model's head, that cannot be cut."""
    head = hasattr(owner, "head_loss")
    for name, child in owner.named_children():
        place = f"{path}.{name}".lstrip(".")
        if isinstance(child, Linear) and name in (("head",) if head else (*INSIDE, *LAST)):
            steps = _cuttable(child)
            for step, module in child.named_children():
                if module not in steps and not (name in LAST and hasattr(module, "behind")):
                    yield place, step
        elif not head and name not in INSIDE and not hasattr(child, "behind") and any(True for _ in child.parameters()):
            yield path, name


def spread(module: nn.Module, lane: Lane, always: bool) -> None:
    """Sum the gradients of a module's own whole parameters over ranks that see other tokens or other heads.

    Args:
        always: whether they see other heads; otherwise they see other tokens while the lane is split.
    """
    cuts = getattr(module, "cuts", {})
    names = [name for name, _ in module.named_parameters(recurse=False) if name not in cuts]
    if not names or (isinstance(module, Linear) and cuts):
        return

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


def _behind(layer: nn.Module, *ways: Way) -> None:
    """Let a layer's first arguments come over exchanges."""

    def around(forward: Callable[..., object]) -> Callable[..., object]:
        def inner(*args: Any) -> object:
            return forward(*(way(x) for way, x in zip(ways, args, strict=False)), *args[len(ways) :])

        return inner

    wrap_forward(layer, around)


def _last(layer: nn.Module) -> str:
    """The name of a layer's last projection."""
    return "down" if isinstance(layer, MLP) else "proj"


def _cuttable(layer: Linear) -> list[Any]:
    """What is added to a layer's output and can be cut with it."""
    return [layer.get_submodule(name) for _, name in layer.on_output if hasattr(layer.get_submodule(name), "outputs")]
