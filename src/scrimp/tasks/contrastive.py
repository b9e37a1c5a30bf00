"""Contrastive learning of images and texts: in a batch, each image belongs to its own text and to no other.

    logits[i, j] = scale * u_i . v_j
    loss = 1/2 sum over i of [ -log softmax(logits[i, :])[i] - log softmax(logits[:, i])[i] ]

Every pair is compared with the whole batch, so that the loss of a batch is not the sum of its parts' losses: what
computes a batch in parts is refused (`decomposes`). Ranks that share a batch gather the embeddings of all.

Paper: Radford et al., arXiv 2103.00020; the loss is InfoNCE of van den Oord et al., arXiv 1807.03748, both ways.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scrimp.data.padding import padded
from scrimp.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from scrimp.lanes import Ranks


@dataclass(frozen=True, kw_only=True)
class Contrastive:
    """Images with texts. Loss: symmetric cross entropy over the batch, summed over its pairs."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}
    needs: ClassVar[tuple[str, ...]] = ("images", "captions")
    models: ClassVar[tuple[str, ...]] = ("two_towers",)
    decomposes: ClassVar[bool] = False
    gathers: ClassVar[bool] = True
    """Whether ranks that see other samples compare theirs with those of all."""
    prompt: str = "{}"
    """Text that stands for a class when images are classified without training for it; {} is the class's name."""

    def __post_init__(self) -> None:
        if "{}" not in self.prompt:
            raise UserError(f"prompt must have a place {{}} for the class's name, unlike `{self.prompt}`.")

    def prepared(self, data: Any) -> PairingTask:
        """The task, with the texts of the classes, where there are any."""
        import numpy as np

        tokenizer, context = data.tokenizer, data.train.context
        texts = [self.prompt.replace("{}", name) for name in getattr(data, "classes", ())]
        rows = [np.array([*tokenizer.encode(text)[: context - 1], tokenizer.end]) for text in texts]
        if not rows:
            return PairingTask()
        prompts, lengths = map(torch.from_numpy, padded(rows, context))
        return PairingTask(prompts, lengths)


@dataclass(frozen=True, eq=False)
class PairingTask:
    """`Contrastive` in use.

    Attributes:
        prompts: ids of the classes' texts, [N, T], or None.
        prompt_length: [N].
        peers: the ranks among which a batch is shared in training, if it is.
    """

    prompts: Tensor | None = None
    prompt_length: Tensor | None = None
    peers: Ranks | None = None

    def among(self, peers: Ranks) -> PairingTask:
        """The task on one of several ranks, each of which has a part of the batch."""
        return replace(self, peers=peers)

    def batch(self, items: dict[str, np.ndarray], sample: np.ndarray) -> dict[str, Tensor]:
        """A batch from `images` [B, K, S, S], `captions` [B, T], `caption_length` [B], perhaps `classes` [B], and the
        samples' numbers [B].
        """
        captions = torch.from_numpy(items["captions"])
        found = {
            "images": torch.from_numpy(items["images"]),
            "tokens": captions,
            "attended": torch.arange(captions.shape[1]) < torch.from_numpy(items["caption_length"])[:, None],
            "sample": torch.from_numpy(sample),
        }
        return found | ({"classes": torch.from_numpy(items["classes"])} if "classes" in items else {})

    def count(self, batch: dict[str, Tensor]) -> Tensor:
        """How many pairs the summed loss sums over: int64, a scalar."""
        return torch.tensor(len(batch["images"]))

    def tokens(self, batch: dict[str, Tensor]) -> Tensor:
        """Tokens of the captions."""
        return batch["attended"].sum()

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The summed loss; of this rank's pairs, among those of all ranks."""
        some = {"kept": batch["kept"]} if "kept" in batch else {}
        images, texts, scale = model(batch["images"], batch["tokens"], batch["attended"], batch["sample"], **some)
        if self.peers is None:
            return paired(images, texts, scale)
        return paired_among(images, texts, scale, self.peers)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
        """Mean loss of a pair within its batch, and over all batches: how often an image's nearest text is its own, a
        text's nearest image, and, where there are classes, an image's nearest class.
        """
        total, images, texts, classes = 0.0, list[Tensor](), list[Tensor](), list[Tensor]()
        for batch in batches:
            seen, read, scale = model(batch["images"], batch["tokens"], batch["attended"])
            total += float(paired(seen, read, scale))
            images.append(seen)
            texts.append(read)
            classes += [batch["classes"]] if "classes" in batch else []
        u, v = torch.cat(images), torch.cat(texts)
        products, own = u @ v.T, torch.arange(len(u), device=u.device)
        found = {
            "loss": total / len(u),
            "image_to_text": share(products.argmax(1) == own),
            "text_to_image": share(products.argmax(0) == own),
        }
        if self.prompts is None or self.prompt_length is None or not classes:
            return found
        labels = torch.cat(classes)
        attended = torch.arange(self.prompts.shape[1]) < self.prompt_length[:, None]
        _, named, _ = model(None, self.prompts.to(u.device), attended.to(u.device))
        right = ((u @ named.T).argmax(1) == labels)[labels >= 0]
        return found | ({"zero_shot": share(right)} if len(right) else {})


def paired(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """The summed loss of pairs: images and texts [B, D], of length 1, at least in float32."""
    logits = scale * images @ texts.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    own = torch.arange(len(logits), device=logits.device)
    rows = F.cross_entropy(logits, own, reduction="sum")
    return (rows + F.cross_entropy(logits.T, own, reduction="sum")) / 2


def paired_among(images: Tensor, texts: Tensor, scale: Tensor, peers: Ranks) -> Tensor:
    """The summed loss of this rank's pairs among those of all ranks: images and texts [B, D] of each rank."""
    own = len(images) * peers.place + torch.arange(len(images), device=images.device)
    losses: list[Tensor] = []
    for mine, others in ((images, peers.rows(texts)), (texts, peers.rows(images))):
        logits = scale * mine @ others.T
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses.append(F.cross_entropy(logits, own, reduction="sum"))
    return (losses[0] + losses[1]) / 2


def share(right: Tensor) -> float:
    """Of true ones."""
    return float(right.double().mean())
