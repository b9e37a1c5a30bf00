"""Which tensor to evict when a budget of bytes is full, and a simulator that counts what has to be computed again.

    h(t) = (cost(t) + cost of the evicted neighborhood of t) / (size(t) * staleness(t))

The tensor with the least h goes: large, long unused, cheap to make again. The neighborhood is what would have to be
computed with it: neighbors that are evicted are merged into classes with a running sum of costs, by union-find, which
are never split. `paper` is h as written; `local` leaves the neighborhood out; `eq`, the default, takes the square root
of the staleness. With h as written, a long chain under a tight budget evicts its old inputs, which are dear, for fresh
ones, which are cheap, and computes the same segments over and over.

Paper: Kirisame et al., "Dynamic Tensor Rematerialization", ICLR 2021, arXiv 2006.09616.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

Heuristic = Literal["eq", "paper", "local"]


@dataclass(eq=False)
class Entry:
    """A tensor, or several that come and go together."""

    size: int
    cost: float
    """Of making it from its parents."""
    parents: tuple[Entry, ...] = ()
    evict: Callable[[], None] = lambda: None
    """Frees its memory."""
    children: list[Entry] = field(default_factory=list["Entry"])
    last: float = 0.0
    """Time of its last use."""
    there: bool = False
    locks: int = 0
    gone: bool = False
    """Whether nobody will ever ask for it again."""
    lost: Class | None = None
    """The class it joined when it was evicted last."""


@dataclass(eq=False)
class Class:
    """A node in the union-find forest of evicted neighbors."""

    cost: float
    """Of all of the class, where this is its root."""
    parent: Class | None = None

    def root(self) -> Class:
        """What stands for the class; shortens the way there."""
        top = self
        while top.parent is not None:
            top = top.parent
        node = self
        while node.parent is not None:
            node.parent, node = top, node.parent
        return top


class FullError(Exception):
    """Nothing is left that could be evicted."""


class Pool:
    """Tensors under a budget.

    Args:
        budget: bytes.
    Attributes:
        live: bytes that are there.
        time: costs of all that was computed so far.
    """

    def __init__(self, budget: int, heuristic: Heuristic = "eq") -> None:
        self.budget, self.heuristic, self.live, self.time = budget, heuristic, 0, 0.0
        self._there: dict[Entry, None] = {}

    def room(self, size: int) -> None:
        """Evict until so many bytes fit.

        Raises:
            FullError: if they cannot.
        """
        while self.live + size > self.budget:
            free = [e for e in self._there if not e.locks and (e.parents or e.gone)]
            if not free:
                raise FullError(self.live + size)
            self.evict(min(free, key=self.score))

    def score(self, entry: Entry) -> float:
        """h: the least goes first."""
        around = 0.0 if self.heuristic == "local" else self.around(entry)
        stale = self.time - entry.last + 1
        stale = stale**0.5 if self.heuristic == "eq" else stale
        return (entry.cost + around) / (max(entry.size, 1) * stale)

    def around(self, entry: Entry) -> float:
        """Cost of the evicted classes next to an entry."""
        return sum(root.cost for root in self._classes(entry))

    def _classes(self, entry: Entry) -> set[Class]:
        near = (e.lost for e in (*entry.parents, *entry.children) if not e.there and not e.gone)
        return {lost.root() for lost in near if lost is not None}

    def put(self, entry: Entry) -> None:
        """An entry was made, for the first time or again."""
        if entry.there:
            return
        if entry.lost is not None:
            entry.lost.root().cost -= entry.cost
            entry.lost = None
        for parent in entry.parents:
            if entry not in parent.children:
                parent.children.append(entry)
        self.time += entry.cost
        entry.there, entry.last = True, self.time
        self._there[entry] = None
        self.live += entry.size

    def use(self, entry: Entry) -> None:
        """An entry was read."""
        entry.last = self.time

    def evict(self, entry: Entry) -> None:
        """Take an entry out; it may be made again."""
        self._out(entry)
        mine = Class(entry.cost)
        for other in self._classes(entry):
            other.parent, mine.cost = mine, mine.cost + other.cost
        entry.lost = mine
        entry.evict()

    def remove(self, entry: Entry) -> None:
        """Nobody will ask for an entry again."""
        if entry.there:
            self._out(entry)
        entry.gone = True
        for parent in entry.parents:
            if entry in parent.children:
                parent.children.remove(entry)

    def _out(self, entry: Entry) -> None:
        del self._there[entry]
        entry.there = False
        self.live -= entry.size


@dataclass(frozen=True)
class Operator:
    """A line of a program: it makes one tensor of others, named by their lines."""

    inputs: tuple[int, ...]
    cost: float = 1.0
    size: int = 1


def feed_forward(count: int) -> list[Operator]:
    """A chain of so many operators, and its backward pass: each gradient needs the next and an input."""
    forward = [Operator((i - 1,) if i else ()) for i in range(count)]
    backward = [Operator((count + i - 1, count - i - 1) if i else (count - 1,)) for i in range(count)]
    return forward + backward


def simulate(program: Sequence[Operator], budget: int, heuristic: Heuristic = "eq") -> tuple[float, int]:
    """(cost of all that ran, most bytes) of a program under a budget. A tensor is let go after its last use.

    Raises:
        FullError: if an operator and its inputs do not fit.
    """
    pool, entries, most = Pool(budget, heuristic), list[Entry](), 0
    last = {i: line for line, op in enumerate(program) for i in op.inputs}
    for line, op in enumerate(program):
        parents = tuple(entries[i] for i in op.inputs)
        entries.append(Entry(op.size, op.cost, parents))
        most = max(most, make(pool, entries[line]))
        for i in set(op.inputs):
            if last[i] == line and not any(not c.there and not c.gone for c in entries[i].children):
                pool.remove(entries[i])
    return pool.time, most


def make(pool: Pool, entry: Entry) -> int:
    """Make an entry, and before it whatever it needs; returns the most bytes that were there."""
    most, stack, held = pool.live, [entry], list[Entry]()
    while stack:
        top = stack[-1]
        missing = [p for p in top.parents if not p.there]
        if missing:
            stack.append(missing[0])
            continue
        stack.pop()
        if top.there:
            continue
        for parent in top.parents:
            parent.locks += 1
            pool.use(parent)
        pool.room(top.size)
        pool.put(top)
        most = max(most, pool.live)
        for parent in top.parents:
            parent.locks -= 1
        if stack:
            top.locks += 1
            held.append(top)
            if all(p.there for p in stack[-1].parents):
                for one in [h for h in held if h in stack[-1].parents]:
                    one.locks -= 1
                    held.remove(one)
    return most
