"""Items that cannot be used: a few are left out, counted and named; more than a share of them is an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from scrimp.errors import UserError

NAMED: Final = 5
"""Items that are named; the others are only counted."""
PROBE: Final = 100
"""First items after which a source of nothing but faults is given up."""


@dataclass
class Faults:
    """Items that were left out."""

    share: float
    """Of all items that may be faulty."""
    where: str = "data.source"
    """The key of the recipe that names the source."""
    total: int = 0
    """Items seen, the faulty ones too."""
    count: int = 0
    first: list[str] = field(default_factory=list[str])
    """Where and why, of a few."""

    def add(self, place: str, reason: str) -> None:
        """An item that is left out.

        Raises:
            UserError: if the first hundred items are all faulty.
        """
        self.count += 1
        if len(self.first) < NAMED:
            self.first.append(f"{place}: {reason.rstrip('.')}")
        if self.count == self.total == PROBE:
            self.check()

    def check(self) -> None:
        """End of the items.

        Raises:
            UserError: if there was none that can be used, or too many were faulty.
        """
        if self.total == self.count:
            raise UserError(f"no item can be used. {self._named()}".strip(), self.where, "Give some that can.")
        if self.count > self.share * self.total:
            what = f"{self.count} of {self.total} items are faulty, more than {self.share:.3g} of them: {self._named()}"
            raise UserError(what, self.where, "Mend or remove them, or raise `data.skip`.")

    def told(self) -> str:
        """A sentence on what was left out, or nothing."""
        return f"{self.count:,} of {self.total:,} items were left out: {self._named()}" if self.count else ""

    def meta(self) -> dict[str, Any]:
        """What is kept beside built data."""
        return {"total": self.total, "count": self.count, "first": self.first}

    @classmethod
    def kept(cls, share: float, meta: Mapping[str, Any]) -> Faults:
        """What was left out when data were built, which may now be too much."""
        return cls(share, **meta)

    def _named(self) -> str:
        more = f"; and {self.count - len(self.first)} more" if self.count > len(self.first) else ""
        return f"{'; '.join(self.first)}{more}." if self.first else ""
