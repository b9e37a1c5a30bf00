"""Plays a chain without a plan: keeps all, and evicts by `eviction.py` when the budget is full.

What comes and goes is a block's pack and its input. The output of a block is made by running it, which makes its pack
anew as well; nothing else is known of the model than the blocks' costs and bytes.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from scrimp.errors import UserError
from scrimp.remat.chain import Piece
from scrimp.remat.eviction import Entry, FullError, Pool
from scrimp.remat.executor import Call, lineage
from scrimp.remat.given import Forward


class Evicting:
    """A policy with a pool of packs and inputs."""

    def __init__(self, pieces: Sequence[Piece], budget: int) -> None:
        # Costs are counted in forward passes of a block, so that staleness is never much less than 1.
        self.unit = max(sum(p.cost for p in pieces) / len(pieces), 1.0)
        self.pieces, self.pool = pieces, Pool(budget)
        self.entries: weakref.WeakKeyDictionary[Call, tuple[Entry, Entry]] = weakref.WeakKeyDictionary()

    def plainly(self, block: int, forward: Forward) -> Forward | None:
        """Never: what is kept now may have to go."""
        return None

    def forward(self, call: Call, x: Tensor) -> Any:
        """Make room, run, keep all."""
        piece, own = self.pieces[call.block], weakref.ref(call)
        source = None if call.source is None else self.entries[call.source][0]
        made = 0.0 if call.source is None else self.pieces[call.source.block].cost / self.unit
        held = Entry(piece.input, made, () if source is None else (source,), lambda: forget(own))
        pack = Entry(piece.pack, piece.again / self.unit, (held,), lambda: drop(own, held))
        self.pool.put(held)
        held.locks += 1
        self._room(piece.full)
        call.input = x.detach()
        out = call.begin(x, keep=True)
        self._keep(pack)
        held.locks -= 1
        self.entries[call] = held, pack
        weakref.finalize(call, self._gone, held, pack).atexit = False
        return out

    def restore(self, call: Call) -> None:
        """Run again from the nearest input that is there, keeping packs on the way."""
        line = lineage(call)
        for before, after in pairwise(line):
            held, _ = self.entries[after]
            x = self._again(before)
            assert x is not None
            after.input = x
            self.pool.put(held)
        self._again(call, stop=True)

    def _again(self, call: Call, stop: bool = False) -> Tensor | None:
        held, pack = self.entries[call]
        held.locks += 1
        self.pool.use(held)
        self._room(self.pieces[call.block].full)
        assert call.input is not None
        out = call.again(call.input, keep=True, stop=stop)
        self._keep(pack)
        held.locks -= 1
        return out

    def _keep(self, pack: Entry) -> None:
        """A pack holds its input as well."""
        if not pack.there:
            self.pool.put(pack)
            pack.parents[0].locks += 1

    def _room(self, size: int) -> None:
        try:
            self.pool.room(size)
        except FullError as error:
            from scrimp.planview import size as written

            needs, given = written(error.args[0]), written(self.pool.budget)
            what = f"a block needs {needs} with what must stay, more than the {given} given."
            raise UserError(what, "techniques.recompute.budget", "Raise it, or lower `batch`.") from None

    def _gone(self, held: Entry, pack: Entry) -> None:
        self.pool.remove(pack)
        self.pool.remove(held)


def forget(own: weakref.ref[Call]) -> None:
    """Let a call's input go."""
    call = own()
    if call is not None:
        call.input = None


def drop(own: weakref.ref[Call], held: Entry) -> None:
    """Let a call's pack go; its input may go after it."""
    held.locks -= 1
    call = own()
    if call is not None:
        call.drop()
