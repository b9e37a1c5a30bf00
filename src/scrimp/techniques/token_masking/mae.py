"""MAE: hidden patches never enter the encoder of a masked autoencoder.

    without:  states = encoder(all patches, hidden ones as mask tokens)      predictions = decoder(W states + b)
    with:     states = encoder(visible patches)       predictions = decoder(W [states, mask tokens] + b, each in place)

Paper: He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv 2111.06377.

Without it, masked image modeling is that of BEiT (arXiv 2106.08254) and SimMIM (arXiv 2111.09886): the encoder works on
all places. The mask token keeps its name and width, and enters where the encoder's states do, so that no weight is
added. That is the paper's model, whose token of the decoder's width is here W m + b; `drop: true` of the model has it
literally, in which case this technique has nothing left to do and says so.

Saves: computation and activations of the encoder, to the visible share: a quarter of the tokens at a ratio of 0.75.
Costs: the decoder must be deep enough to do without an encoder that knows where it is asked. Not for: a decoder as
large as the encoder, where less than half of the work is left to save; models whose blocks mix neighboring patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from scrimp.errors import UserError
from scrimp.technique import Card, Technique

if TYPE_CHECKING:
    from scrimp.run import Run


@dataclass(frozen=True, kw_only=True)
class MAE(Technique):
    """Hidden patches never enter the encoder."""

    card = Card(
        paper="arXiv:2111.06377",
        section="Token masking",
        saves="computation and activations of the encoder, to the visible share",
        costs="the decoder must be deep enough to do without mask tokens in the encoder",
        sets=("tokens that are read",),
        phase={"model": "architecture"},
        neutral={"drop": False},
    )
    drop: bool = True
    """Whether hidden patches are left out; false changes nothing, for comparisons."""

    def model(self, model: nn.Module, run: Run) -> nn.Module:
        """Let the encoder see visible patches only."""
        parts: Any = model
        task = getattr(run.recipe.task, "needs", ())
        if "images" not in task or not hasattr(model, "drop") or not hasattr(model, "decoder"):
            what = "the run predicts no hidden patches that the encoder could do without."
            fix = "Use the task `masked-image` and the model `masked_autoencoder`, or drop it."
            raise UserError(what, run.where(self), fix)
        if parts.drop:
            what = "the model leaves hidden patches out already, so that there is nothing to compare with."
            raise UserError(what, run.where(self), "Set `model.drop: false`, or drop the technique.")
        if not len(parts.decoder.blocks):
            what = "the decoder has no blocks, so that hidden patches would see nothing of the visible ones."
            raise UserError(what, run.where(self), "Set `model.decoder_layers` to 1 or more.")
        parts.drop = self.drop
        return model
