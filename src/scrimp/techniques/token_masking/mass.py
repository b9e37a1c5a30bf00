"""MASS: the decoder works on the fragment that it predicts, and not on the rest of the text.

    without:  decoder(all places; inputs outside the fragment are masked out of attention and loss)
    with:     decoder(places of the fragment, each with its original position)

Paper: Song et al., "MASS: Masked Sequence to Sequence Pre-training for Language Generation", ICML 2019,
arXiv 1905.02450. What is predicted and what the encoder reads is the task `fragment`; see there.

Outputs and gradients are those of the whole decoder, up to rounding, as long as nothing is dropped out: dropout counts
places, of which there are fewer.

Saves: time and activations of the decoder and of the head, to the share of the fragment, attention to its square.
Costs: nothing but a gathering of ids. Not for: models without an encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scrimp.errors import UserError
from scrimp.models.subsets import gathered
from scrimp.technique import Card, Technique

if TYPE_CHECKING:
    from scrimp.run import Run
    from scrimp.technique import Batch

IGNORED = -100
"""Target that does not count."""


@dataclass(frozen=True, kw_only=True)
class Mass(Technique):
    """The decoder works on the fragment that it predicts."""

    card = Card(
        paper="arXiv:1905.02450",
        section="Token masking",
        saves="time and activations of the decoder, to the share of the fragment",
        costs="a gathering of ids",
        sets=("tokens that are read",),
        phase={"batch": "augment"},
        neutral={"remove": False},
    )
    remove: bool = True
    """Whether other places are left out; false changes nothing, for comparisons."""

    def batch(self, batch: Callable[[int], Batch], run: Run) -> Callable[[int], Batch]:
        """Take the places outside the fragment out of what the decoder gets."""
        if not getattr(run.task, "fragments", False):
            what = "the task predicts no fragment, so that the decoder has nothing to leave out."
            raise UserError(what, run.where(self), "Use the task `fragment`, or drop it.")
        if not self.remove:
            return batch
        return lambda step: shortened(batch(step))


def shortened(batch: Batch) -> Batch:
    """A batch of the task `fragment` without what is not written.

    Rows may write different numbers of tokens, as where a sequence was cut off: the shorter ones are filled up, after
    their end, where no other token sees it and nothing is asked.
    """
    written = batch["written"]
    count = max(1, int(written.sum(1).max()))
    order = (~written).long().argsort(dim=1, stable=True)[:, :count]
    real = gathered(written, order)
    out = {name: value for name, value in batch.items() if name != "written"}
    return out | {
        "decoder_tokens": gathered(batch["decoder_tokens"], order),
        "targets": gathered(batch["targets"], order).masked_fill(~real, IGNORED),
        "places": gathered(batch["places"], order),
    }
