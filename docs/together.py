"""Which techniques go together: from the cards, and from what was measured."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from wording import link, table

from scrimp.arrange import clash, declared, order
from scrimp.registry import Entry
from scrimp.technique import SLOTS, Technique, overrides

EVIDENCE: Final = Path(__file__).resolve().parents[1] / "evidence" / "pairs.json"

NOT_FOLDED: Final = {"stages", "decide", "price"}
"""Slots whose values are collected, so that they have no order."""
ORDERS: Final = {
    "declared, it matters": "the other order would give other numbers or another peak",
    "declared, either would do": "the other order would give the same",
    "declared, the other one fails": "the other order fails",
    "free": "both orders gave the same weights and the same peak",
}
"""What `benchmarks/pairs.py` found of a slot that two techniques share -> words."""
SYMBOLS: Final = {
    "✕": "clash: a recipe with both is refused",
    "▲": "go together; they share a slot, and their cards declare the order in it",
    "●": "go together; they share a slot, and the order does not matter",
    "·": "go together, and share no slot",
}


def stand_in(entry: Entry) -> Technique:
    """A technique with an entry's card, settings and slots, for `scrimp.arrange`: the real one would import torch."""
    settings = {s.name: entry.card.example.get(s.name) if s.default is ... else s.default for s in entry.settings}
    slots = {slot: lambda self, value, run: value for slot in entry.slots}
    return type(entry.name, (Technique,), {"card": entry.card, "__module__": entry.module, **settings, **slots})()


class Pairs:
    """Which techniques go together, from the cards and from what was measured.

    Args:
        known: the techniques.
    """

    def __init__(self, known: Mapping[str, Entry]) -> None:
        self.made = {name: stand_in(entry) for name, entry in known.items()}
        self.evidence: dict[str, Any] = json.loads(EVIDENCE.read_text()) if EVIDENCE.exists() else {"pairs": []}
        self.seen = {frozenset((row["a"], row["b"])): row for row in self.evidence["pairs"]}

    def reason(self, a: str, b: str) -> str:
        """Why two do not go together, or an empty string."""
        found = clash(self.made[a], self.made[b])
        row = self.seen.get(frozenset((a, b)), {})
        return found or (row.get("reason", "") if row.get("verdict") in ("refused", "FAILS") else "")

    def shared(self, a: str, b: str) -> dict[str, str]:
        """Slot that two techniques share -> the order in it, and what was measured of it."""
        one, two = self.made[a], self.made[b]
        found: dict[str, str] = {}
        for slot in SLOTS:
            if slot in NOT_FOLDED or not (overrides(one, slot) and overrides(two, slot)):
                continue
            inner, outer = order(slot, [one, two])
            words = [f"`{outer.name}` around `{inner.name}`" if declared(slot, one, two) else "free"]
            measured = self.seen.get(frozenset((a, b)), {}).get("slots", {}).get(slot, {}).get("order", "")
            found[slot] = ": ".join([*words, *filter(None, [ORDERS.get(measured, "")])])
        return found

    def symbol(self, a: str, b: str) -> tuple[str, str]:
        """A pair's symbol in the table, and what it means here."""
        if a == b:
            twice = self.made[a].card.scope
            return ("2", f"twice with disjoint patterns in {twice}") if twice else ("", "")
        if reason := self.reason(a, b):
            return "✕", reason
        shared = self.shared(a, b)
        free = all(not declared(slot, self.made[a], self.made[b]) for slot in shared)
        return "·" if not shared else "●" if free else "▲", "; ".join(f"{s}: {said}" for s, said in shared.items())


def pairs_page(known: Mapping[str, Entry], pairs: Pairs) -> str:
    """The table of all pairs, every clash with its sentence, and every shared slot with its order."""
    both = list(itertools.combinations(known, 2))
    clashes = [(link(a), link(b), reason) for a, b in both if (reason := pairs.reason(a, b))]
    shared = [(link(a), link(b), f"`{slot}`", said) for a, b in both if not pairs.reason(a, b)
              for slot, said in pairs.shared(a, b).items()]  # fmt: skip
    rows = [(link(a), *(mark(*pairs.symbol(a, b)) for b in known)) for a in known]
    legend = [(symbol, said) for symbol, said in SYMBOLS.items()] + [
        ("2", "may stand twice in a recipe, with disjoint patterns of parameters")
    ]
    return "\n\n".join([
        "# Which go together",
        f"All {len(both)} pairs of the {len(known)} techniques, each with its default settings. A recipe whose "
        "techniques clash is refused before anything else happens, with the sentence below that says which to drop.",
        table(("", "means"), legend),
        f'<div class="pairs" markdown>\n\n{table(("", *(link(b) for b in known)), rows)}\n\n</div>',
        *(("## Clashes", table(("one", "other", "what the recipe is told"), clashes)) if clashes else ()),
        *(("## Shared slots", "\"`a` around `b`\" says that `a` gets what `b` returned, and has the last word.",
           table(("one", "other", "slot", "order"), shared)) if shared else ()),
        *evidence_of(pairs),
    ]) + "\n"  # fmt: skip


def evidence_of(pairs: Pairs) -> list[str]:
    """What was measured of the pairs."""
    rows = [row for key, row in pairs.seen.items() if row["verdict"] == "fits" and key <= pairs.made.keys()]
    if not rows:
        return []
    off = [f"`{row['a']}` with `{row['b']}`" for row in rows if row["planned"] != row["measured"]]
    about = pairs.evidence["about"]
    return [
        "## Where this is from",
        "Clashes and declared orders follow from the cards, and the rest was measured: each pair that goes together "
        f"took two steps on a tiny model, once planned and once real, and in a slot that two share both orders were "
        f"trained for {about['steps']} steps. The planned peak of live bytes was the real one to the byte for "
        f"{len(rows) - len(off)} of {len(rows)} pairs" + (f"; it was not for {', '.join(off)}." if off else "."),
        f"`python benchmarks/pairs.py` repeats it. This is `evidence/pairs.json` of {about['date']}, with torch "
        f"{about['environment']['torch']}.",
    ]


def mark(symbol: str, said: str) -> str:
    """A symbol that says what it means where the pointer rests."""
    words = said.replace("`", "").replace('"', "&quot;")
    return f'<span title="{words}">{symbol}</span>' if words else symbol
