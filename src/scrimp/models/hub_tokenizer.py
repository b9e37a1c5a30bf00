"""The tokenizer of a Hugging Face folder that we write, and how it is to be loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from scrimp.data.tokenizer import begin_texts
from scrimp.errors import UserError

if TYPE_CHECKING:
    from scrimp.models.transformer import TransformerConfig

CLASS: Final = "PreTrainedTokenizerFast"
"""Without a class, transformers takes the family's own and with it another way of splitting text."""


def special(folder: Path, config: TransformerConfig, tokenizer: Any) -> dict[str, Any]:
    """Write the tokenizer, and how to load and generate with it; returns the special ids of config.json.

    Args:
        tokenizer: with `save(folder)`, and with `end` and `decode` for the special tokens; or None.
    """
    if not config.causal:
        return _encoder(folder, config, tokenizer)
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if tokenizer is None:
        return ids
    tokenizer.save(folder)
    end = getattr(tokenizer, "end", None)
    if end is None:
        return ids
    own = getattr(tokenizer, "special_ids", lambda: None)()
    if own is not None:
        # A tokenizer with a chat template has written all its files, and its texts begin as the template says.
        return ids | own
    ids |= {"bos_token_id": end, "eos_token_id": end}
    # The padding id is a matter of generation only: in config.json it would make transformers freeze the embedding of
    # the end of text.
    write_json(folder / "generation_config.json", ids | {"pad_token_id": end})
    if (folder / "tokenizer.json").is_file():
        begin_texts(folder / "tokenizer.json", end)
        token = tokenizer.decode([end])
        _loading(folder, config, {"bos_token": token, "eos_token": token}, ["input_ids", "attention_mask"])
    return ids


def _encoder(folder: Path, config: TransformerConfig, tokenizer: Any) -> dict[str, Any]:
    """An encoder's tokenizer keeps what it puts around texts; it pads with its own token, where it has one."""
    if tokenizer is None:
        return {}
    tokenizer.save(folder)
    if (folder / "tokenizer.json").is_file():
        roles = {f"{role}_token": token for role, token in tokenizer.roles().items()}
        # What fills up a batch is never attended, so that any token will do.
        roles.setdefault("pad_token", tokenizer.decode([tokenizer.end]))
        segments = ["token_type_ids"] if config.segments > 1 else []
        _loading(folder, config, roles, ["input_ids", *segments, "attention_mask"])
    pad = getattr(tokenizer, "pad", None)
    return {} if config.position_offset or pad is None else {"pad_token_id": pad}


def check_padding(config: TransformerConfig, tokenizer: Any) -> None:
    """Whether a RoBERTa's rows before the positions are those that its tokenizer's padding asks for.

    transformers counts the tokens that are no padding, from that id on.

    Raises:
        UserError: if not.
    """
    wanted, found = config.position_offset - 1, getattr(tokenizer, "pad", None)
    if not config.causal and tokenizer is not None and wanted >= 0 and found != wanted:
        what = f"a RoBERTa folder needs a tokenizer whose padding has the id {wanted}, not {found}."
        raise UserError(what, "model.position_offset", "Set it to 0, which makes a BERT of it.")


def _loading(folder: Path, config: TransformerConfig, tokens: dict[str, str], inputs: list[str]) -> None:
    path = folder / "tokenizer_config.json"
    if not path.exists():
        write_json(path, {"tokenizer_class": CLASS, **tokens, "model_max_length": config.context,
                           "model_input_names": inputs, "clean_up_tokenization_spaces": False})  # fmt: skip


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A file of JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
