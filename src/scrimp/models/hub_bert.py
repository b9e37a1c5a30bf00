"""Hugging Face's encoders BERT, RoBERTa and XLM-RoBERTa: how they call options and tensors, and their heads.

The trunk is the Transformer's with norms after the sums. The heads:

    none      BertModel:                        pooled = tanh(W x[0] + b), if the folder has a pooler
    mlm       BertForMaskedLM:                  logits = E norm(gelu(W x + b)) + b', with E the embedding when tied
    classes   BertForSequenceClassification:    logits = W' tanh(W x[0] + b) + b'

RoBERTa has the same under other names, keeps `pad_token_id + 1` unused rows before its positions, and its class head
holds the layer that BERT calls its pooler. A folder without the head that is asked for, or with one of other sizes, is
read without it: a fine-tuned task begins with a new head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from scrimp.errors import UserError, did_you_mean
from scrimp.models.hub_formats import Format
from scrimp.models.hub_shared import activation_from, activation_to, required
from scrimp.models.hub_tokenizer import for_encoder

if TYPE_CHECKING:
    from scrimp.models.transformer import TransformerConfig

CLASSES: Final = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}
NEEDED: Final = ("vocab_size", "max_position_embeddings", "num_hidden_layers", "hidden_size", "num_attention_heads",
                 "intermediate_size")  # fmt: skip
HEADS: Final = {"Model": "none", "ForMaskedLM": "mlm", "ForPreTraining": "mlm", "ForSequenceClassification": "classes"}
"""Ending of an architecture -> the head that it has."""
KNOWN_HEADS: Final = ("cls.", "lm_head.", "classifier.", "qa_outputs.", "pooler.", "bert.pooler.", "roberta.pooler.",
                      "score.")  # fmt: skip
"""Prefixes of the tensors that belong to some head, and are left out when it is not the one asked for."""
WANTS: Final = {
    "norm": "layernorm", "positions": "learned", "norm_at": "post", "causal": False, "bias": True, "qk_norm": False,
    "embed_norm": True, "embed_width": 0,
}  # fmt: skip
INNER: Final = {
    "attention.output.dense": "attention.proj", "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "mlp.up", "output.dense": "mlp.down", "output.LayerNorm": "mlp_norm",
}  # fmt: skip
OUTER: Final = {
    "embeddings.word_embeddings": "embed", "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings": "segments", "embeddings.LayerNorm": "embed_norm",
}  # fmt: skip
BERT_MLM: Final = {"cls.predictions.transform.dense": "head_transform.dense",
                   "cls.predictions.transform.LayerNorm": "head_transform.norm"}  # fmt: skip
ROBERTA_MLM: Final = {"lm_head.dense": "head_transform.dense", "lm_head.layer_norm": "head_transform.norm"}


def options_from(family: str, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """config.json -> our options, without the head, which the task chooses.

    Raises:
        UserError: for what the Transformer does not do, and for what a file does not say.
    """
    required(raw, NEEDED, where)
    activation = activation_from(raw.get("hidden_act", "gelu"), where)
    kind = raw.get("position_embedding_type") or "absolute"
    for bad, what in (
        (kind != "absolute", f"positions of type `{kind}`"),
        (raw.get("is_decoder") or raw.get("add_cross_attention"), "a decoder's attention"),
        (raw.get("embedding_size", raw["hidden_size"]) != raw["hidden_size"], "factorized embeddings"),
    ):
        if bad:
            raise UserError(f"the model needs {what}, which the Transformer does not have.", where)
    offset = 0 if family == "bert" else _pad(raw, 1) + 1
    return {
        "vocab": raw["vocab_size"], "context": raw["max_position_embeddings"] - offset, "position_offset": offset,
        "layers": raw["num_hidden_layers"], "width": raw["hidden_size"], "heads": raw["num_attention_heads"],
        "hidden": raw["intermediate_size"], "norm": "layernorm", "norm_at": "post", "embed_norm": True,
        "norm_eps": raw.get("layer_norm_eps", 1e-12 if family == "bert" else 1e-5), "positions": "learned",
        "segments": raw.get("type_vocab_size", 2), "activation": activation, "causal": False,
        "bias": True, "tied": bool(raw.get("tie_word_embeddings", True)), "pooler": True,
        "init_std": raw.get("initializer_range", 0.02),
    }  # fmt: skip


def head_from(raw: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The options of the head that a folder holds.

    Args:
        names: of the folder's tensors.
    """
    stems = [name.removeprefix(stem) for name in raw.get("architectures") or [] for stem in CLASSES.values()]
    head = next((HEADS[stem] for stem in stems if stem in HEADS), "none")
    if head == "classes":
        return {"head": head, "classes": len(raw.get("id2label") or ()) or int(raw.get("num_labels") or 2)}
    return {"head": head, "pooler": head == "none" and any("pooler." in name for name in names)}


def _pad(raw: Mapping[str, Any], usual: int) -> int:
    found = raw.get("pad_token_id")
    return usual if found is None else int(found)


def holds(c: TransformerConfig) -> bool:
    """Whether a model is an encoder of this kind, as far as one can see."""
    return not c.causal and c.norm_at == "post"


def family_of(c: TransformerConfig, family: str = "") -> str:
    """The family that can hold a model.

    Args:
        family: the one that is wished, or empty.
    Raises:
        UserError: naming the options that it lacks.
    """
    own = family or ("roberta" if c.position_offset else "bert")
    if own not in CLASSES:
        raise UserError(f"an encoder is not of the family `{family}`.", "family", did_you_mean(family, CLASSES))
    off = {key: getattr(c, key) for key, value in WANTS.items() if getattr(c, key) != value}
    for key, bad in (("activation", c.activation == "swiglu"), ("kv_heads", c.kv_heads not in (0, c.heads)),
                     ("head_width", c.head_dim * c.heads != c.width), ("qkv_bias", c.qkv_bias is False),
                     ("segments", c.segments < 1), ("position_offset", (own == "bert") != (c.position_offset == 0)),
                     ("head", c.head not in HEADS.values()), ("pooler", c.head == "classes" and not c.pooler),
                     ("pooling", c.head == "classes" and c.pooling not in ("", "first")),
                     ("activation", own != "bert" and c.head == "mlm" and c.activation != "gelu")):  # fmt: skip
        if bad:
            off[key] = getattr(c, key)
    if off:
        options = ", ".join(f"`{key}: {value}`" for key, value in off.items())
        raise UserError(f"a {CLASSES[own]} folder cannot hold a model with {options}.", f"model.{next(iter(off))}")
    return own


def options_to(family: str, c: TransformerConfig, labels: Sequence[str] = ()) -> dict[str, Any]:
    """Our options -> config.json.

    Args:
        labels: names of the classes; those that transformers makes up when empty.
    """
    ending = next(ending for ending, head in HEADS.items() if head == c.head)
    raw = {
        "architectures": [CLASSES[family] + ending], "model_type": family, "vocab_size": c.vocab,
        "max_position_embeddings": c.context + c.position_offset, "num_hidden_layers": c.layers,
        "hidden_size": c.width, "num_attention_heads": c.heads, "intermediate_size": c.mlp,
        "hidden_act": activation_to(c.activation), "layer_norm_eps": c.norm_eps,
        "type_vocab_size": c.segments, "tie_word_embeddings": c.tied, "initializer_range": c.init_std,
        "hidden_dropout_prob": c.dropout, "attention_probs_dropout_prob": 0.0, "position_embedding_type": "absolute",
    }  # fmt: skip
    # What a BERT has for padding is a matter of its tokenizer; transformers would take 0, and freeze its embedding.
    raw["pad_token_id"] = None if family == "bert" else c.position_offset - 1
    if c.head == "classes":
        given = list(labels) or [f"LABEL_{i}" for i in range(c.classes)]
        if len(given) != c.classes:
            raise UserError(f"there are {len(given)} names for {c.classes} classes.", "labels", "Give one each.")
        raw |= {"id2label": {str(i): name for i, name in enumerate(given)},
                "label2id": {name: i for i, name in enumerate(given)}}  # fmt: skip
        raw |= {"problem_type": "regression"} if c.classes == 1 else {}
    return raw


def tensors(family: str, c: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Their names and shapes, with the head's."""
    root = _root(family)
    shapes: dict[str, tuple[int, ...]] = {
        f"{root}embeddings.word_embeddings.weight": (c.vocab, c.width),
        f"{root}embeddings.position_embeddings.weight": (c.context + c.position_offset, c.width),
        f"{root}embeddings.token_type_embeddings.weight": (c.segments, c.width),
    } | _norm(f"{root}embeddings.LayerNorm", c.width)
    for i in range(c.layers):
        h = f"{root}encoder.layer.{i}"
        for part in ("query", "key", "value"):
            shapes |= _linear(f"{h}.attention.self.{part}", c.width, c.width)
        shapes |= _linear(f"{h}.attention.output.dense", c.width, c.width)
        shapes |= _norm(f"{h}.attention.output.LayerNorm", c.width)
        shapes |= _linear(f"{h}.intermediate.dense", c.mlp, c.width) | _linear(f"{h}.output.dense", c.width, c.mlp)
        shapes |= _norm(f"{h}.output.LayerNorm", c.width)
    names = heads(family, c)
    for theirs, ours in names.items():
        if ours in ("pooler", "head_transform.dense"):
            shapes |= _linear(theirs, c.width, c.width)
        elif ours == "head_transform.norm":
            shapes |= _norm(theirs, c.width)
        elif ours == "head" and c.head == "classes":
            shapes |= _linear(theirs, c.classes, c.width)
    if c.head == "mlm":
        stem = _mlm(family)
        shapes |= {f"{stem}.bias": (c.vocab,)} if c.tied else _linear(f"{stem}.decoder", c.vocab, c.width)
    return shapes


def _root(family: str) -> str:
    return "bert." if family == "bert" else "roberta."


def _mlm(family: str) -> str:
    return "cls.predictions" if family == "bert" else "lm_head"


def _linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def heads(family: str, c: TransformerConfig) -> dict[str, str]:
    """Their names of the head's layers -> ours."""
    bert = family == "bert"
    if c.head == "mlm":
        return BERT_MLM if bert else ROBERTA_MLM
    pooler = {"bert.pooler.dense" if bert else "roberta.pooler.dense": "pooler"} if c.pooled else {}
    if c.head != "classes":
        return pooler
    if bert:
        return {**pooler, "classifier": "head"}
    return {"classifier.dense": "pooler", "classifier.out_proj": "head"}


def _read(theirs: dict[str, Tensor], c: TransformerConfig) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    known = OUTER | BERT_MLM | ROBERTA_MLM | {"pooler.dense": "pooler", "classifier.dense": "pooler"}
    known |= {"classifier": "head", "classifier.out_proj": "head", "cls.predictions.decoder": "head",
              "lm_head.decoder": "head", "cls.predictions": "head", "lm_head": "head"}  # fmt: skip
    for name, tensor in theirs.items():
        stem, _, part = name.removeprefix("bert.").removeprefix("roberta.").rpartition(".")
        if stem in known:
            out[f"{known[stem]}.{part}"] = tensor
            continue
        _, _, layer, *rest = stem.split(".")
        inner = ".".join(rest)
        if inner == "attention.self.query":
            parts = [tensor, *(theirs[name.replace(".query.", f".{x}.")] for x in ("key", "value"))]
            out[f"blocks.{layer}.attention.qkv.{part}"] = torch.cat(parts)
        elif not inner.startswith("attention.self."):
            out[f"blocks.{layer}.{INNER[inner]}.{part}"] = tensor
    return out


def _write(family: str, ours: dict[str, Tensor], c: TransformerConfig) -> dict[str, Tensor]:
    # The bare model is saved without the root that stands before its parts in others.
    root = "" if c.head == "none" else _root(family)
    outer = {mine: f"{root}{theirs}" for theirs, mine in OUTER.items()}
    outer |= {mine: theirs if root else theirs.partition(".")[2] for theirs, mine in heads(family, c).items()}
    inner = {mine: theirs for theirs, mine in INNER.items()}
    out: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        stem, _, part = name.rpartition(".")
        if stem in outer:
            out[f"{outer[stem]}.{part}"] = tensor
        elif stem == "head":
            out[f"{_mlm(family)}{'' if c.tied else '.decoder'}.{part}"] = tensor
            if part == "bias" and not c.tied:
                # transformers 5 has the bias twice where nothing is tied, and adds that of the decoder.
                out[f"{_mlm(family)}.bias"] = tensor.clone()
        elif stem.endswith(".attention.qkv"):
            layer = stem.split(".")[1]
            for x, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                out[f"{root}encoder.layer.{layer}.attention.self.{x}.{part}"] = piece
        else:
            _, layer, rest = stem.split(".", 2)
            out[f"{root}encoder.layer.{layer}.{inner[rest]}.{part}"] = tensor
    return out


def _format(family: str) -> Format:
    return Format(
        root=_root(family),
        options_from=partial(options_from, family),
        options_to=partial(options_to, family),
        head_from=head_from,
        tensors=partial(tensors, family),
        read=_read,
        write=partial(_write, family),
        copies=lambda c: (f"{_mlm(family)}.decoder.weight",) if c.tied else (),
        heads=KNOWN_HEADS,
        inputs=for_encoder,
    )


FORMATS: Final = {family: _format(family) for family in CLASSES}
