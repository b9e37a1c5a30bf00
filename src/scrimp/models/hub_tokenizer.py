"""What a Hugging Face folder that we write says of its inputs: the tokenizer, or what prepares images.

Each function writes the files and returns what config.json says of special ids. `tokenizer` has `save(folder)`, and
`end` and `decode` for the special tokens; or is None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from scrimp.data.tokenizer import frame_texts
from scrimp.errors import UserError
from scrimp.models.hub_files import write_json

if TYPE_CHECKING:
    from scrimp.models.transformer import TransformerConfig

CLASS: Final = "PreTrainedTokenizerFast"
"""Without a class, transformers takes the family's own and with it another way of splitting text."""
INPUTS: Final = ("input_ids", "attention_mask")


def for_decoder(folder: Path, config: Any, tokenizer: Any, raw: Mapping[str, Any]) -> dict[str, Any]:
    """A decoder's, which sees the end token before every text."""
    own = getattr(tokenizer, "special_ids", lambda: None)
    ids = _ids(folder, tokenizer)
    if ids["eos_token_id"] is None:
        return ids
    if (special := own()) is not None:
        # A tokenizer with a chat template has written all its files, and its texts begin as the template says.
        return ids | {"bos_token_id": None, "eos_token_id": None} | special
    _generation(folder, ids)
    if (folder / "tokenizer.json").is_file():
        frame_texts(folder / "tokenizer.json", tokenizer.end)
        token = tokenizer.decode([tokenizer.end])
        _loading(folder, config.context, {"bos_token": token, "eos_token": token}, INPUTS)
    return ids


def for_whole_texts(
    sections: Mapping[str, Sequence[str]], folder: Path, config: Any, tokenizer: Any, raw: Mapping[str, Any]
) -> dict[str, Any]:
    """That of a model which reads whole texts and sees the end token after each.

    Args:
        sections: where else in config.json the ids of special tokens stand: section, or "" for its top -> keys.
    """
    ids = _ids(folder, tokenizer)
    if ids["eos_token_id"] is None:
        return ids
    ids |= dict.fromkeys(sections.get("", ()), tokenizer.end)
    _generation(folder, ids)
    if (folder / "tokenizer.json").is_file():
        frame_texts(folder / "tokenizer.json", tokenizer.end, after=True)
        token = tokenizer.decode([tokenizer.end])
        roles = {"bos_token": token, "eos_token": token, "pad_token": token}
        _loading(folder, config.context, roles, INPUTS)
    return ids | {name: raw[name] | dict.fromkeys(keys, tokenizer.end) for name, keys in sections.items() if name}


def for_encoder(folder: Path, config: TransformerConfig, tokenizer: Any, raw: Mapping[str, Any]) -> dict[str, Any]:
    """An encoder's, which keeps what it puts around texts; it pads with its own token, where it has one.

    Raises:
        UserError: if a RoBERTa's rows before the positions are not those that its tokenizer's padding asks for, since
            transformers counts the tokens that are no padding, from that id on.
    """
    wanted, pad = config.position_offset - 1, getattr(tokenizer, "pad", None)
    if tokenizer is not None and wanted >= 0 and pad != wanted:
        what = f"a RoBERTa folder needs a tokenizer whose padding has the id {wanted}, not {pad}."
        raise UserError(what, "model.position_offset", "Set it to 0, which makes a BERT of it.")
    if tokenizer is None:
        return {}
    tokenizer.save(folder)
    if (folder / "tokenizer.json").is_file():
        roles = {f"{role}_token": token for role, token in tokenizer.roles().items()}
        # What fills up a batch is never attended, so that any token will do.
        roles.setdefault("pad_token", tokenizer.decode([tokenizer.end]))
        segments = ["token_type_ids"] if config.segments > 1 else []
        _loading(folder, config.context, roles, ["input_ids", *segments, "attention_mask"])
    return {} if config.position_offset or pad is None else {"pad_token_id": pad}


def for_images(folder: Path, config: Any, processor: Any, raw: Mapping[str, Any]) -> dict[str, Any]:
    """What prepares an image model's images."""
    if processor is not None:
        processor.save(folder)
    return {}


def _ids(folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Save a tokenizer; the ids of its special tokens, which are None where it has none."""
    if tokenizer is not None:
        tokenizer.save(folder)
    end = getattr(tokenizer, "end", None)
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None}


def _generation(folder: Path, ids: Mapping[str, Any]) -> None:
    # The padding id is a matter of generation only: in config.json it would make transformers freeze the embedding of
    # the end of text.
    write_json(folder / "generation_config.json", {**ids, "pad_token_id": ids["eos_token_id"]})


def _loading(folder: Path, context: int, tokens: Mapping[str, str], inputs: Sequence[str]) -> None:
    path = folder / "tokenizer_config.json"
    if not path.exists():
        write_json(path, {"tokenizer_class": CLASS, **tokens, "model_max_length": context,
                           "model_input_names": list(inputs), "clean_up_tokenization_spaces": False})  # fmt: skip
