"""The tokenizer that a GGUF file's metadata describe, as a tokenizer.json.

Only byte-level BPE as GPT-2 has it (`tokenizer.ggml.model: gpt2`): ids, merges, and which tokens are special are in the
file. How text is cut before it is merged is not: the file only names it, and llama.cpp has the rule; ours are those
of the names below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from scrimp.data.chat import Chat, ChatTokenizer
from scrimp.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from scrimp.models.gguf import Gguf

LLAMA_3: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS: Final = {"gpt-2": "", "smollm": "digits", "llama-bpe": LLAMA_3}
"""Name of a way of cutting -> nothing but GPT-2's, each digit alone before it, or a pattern instead of it."""
CONTROL: Final = 3
"""Type of special tokens, which are matched whole."""
USER: Final = 4
"""Type of tokens that somebody added, which are matched whole too."""
NAMES: Final = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer(file: Gguf) -> ChatTokenizer:
    """The tokenizer of a file, with its chat template.

    Raises:
        UserError: if it is of another kind, or its parts do not belong together.
    """
    kind = file.get("tokenizer.ggml.model")
    if kind != "gpt2":
        fix = "Import a file with a byte-level BPE, or take the model's own folder."
        raise UserError(f"its tokenizer is of kind `{kind}`, which is not read.", str(file.path), fix)
    tokens, merges = file.get("tokenizer.ggml.tokens"), file.get("tokenizer.ggml.merges")
    types = list(file.get("tokenizer.ggml.token_type", [1] * len(tokens)))
    special = _special(file, tokens)
    inner = _bpe(file, tokens, merges)
    from tokenizers import AddedToken

    inner.add_tokens([AddedToken(t, normalized=False) for t, n in zip(tokens, types, strict=True) if n == USER])
    inner.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, n in zip(tokens, types, strict=True) if n == CONTROL]
    )
    if file.metadata.get("tokenizer.ggml.add_bos_token", False) and "bos_token" in special:
        _begin(inner, special["bos_token"])
    if "eos_token" not in special:
        raise UserError("does not say which token ends a text.", str(file.path), "Convert the model again.")
    template = str(file.metadata.get("tokenizer.chat_template", ""))
    end = special["eos_token"]
    return ChatTokenizer(inner, inner.token_to_id(end), chat=Chat(end, template, special))


def _special(file: Gguf, tokens: list[str]) -> dict[str, str]:
    ids = {name: file.metadata.get(f"tokenizer.ggml.{theirs}_token_id") for name, theirs in NAMES.items()}
    return {name: tokens[i] for name, i in ids.items() if i is not None and 0 <= i < len(tokens)}


def _bpe(file: Gguf, tokens: list[str], merges: list[str]) -> Any:
    """A byte-level BPE that cuts text as the file's name for it says."""
    import tokenizers
    from tokenizers import Regex, decoders, models, pre_tokenizers

    name = str(file.metadata.get("tokenizer.ggml.pre", "gpt-2"))
    if name not in CUTS:
        what = f"its tokenizer cuts text as `{name}` does, which is not known."
        raise UserError(what, str(file.path), did_you_mean(name, CUTS))
    pairs = [tuple(merge.split(" ")) for merge in merges]
    vocab = {token: i for i, token in enumerate(tokens)}
    whole = CUTS[name] == LLAMA_3
    """Llama 3 takes a word that is a token as it is, however it would be merged."""
    try:
        bpe = models.BPE(vocab=vocab, merges=pairs, ignore_merges=whole)  # pyright: ignore[reportArgumentType]
        inner = tokenizers.Tokenizer(bpe)
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"its tokenizer is damaged: {error}.", str(file.path), "Fetch it again.") from None
    if len(vocab) < len(tokens):
        raise UserError("its tokenizer has a token twice.", str(file.path), "Fetch it again.")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=CUTS[name] in ("", "digits"))
    first: list[Any] = []
    if CUTS[name] == "digits":
        first = [pre_tokenizers.Digits(individual_digits=True)]
    elif CUTS[name]:
        first = [pre_tokenizers.Split(Regex(CUTS[name]), behavior="isolated")]
    inner.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return inner


def _begin(inner: Any, token: str) -> None:
    """Put a token before every text, where special tokens are asked for."""
    from tokenizers import processors

    known = [{"id": "begin", "ids": [inner.token_to_id(token)], "tokens": [token]}]
    inner.post_processor = processors.TemplateProcessing(
        single="begin $A", pair="begin $A begin:1 $B:1", special_tokens=known
    )
