"""A Llama in a GGUF file becomes a Hugging Face folder: the same model, the same tokenizer; damage is told."""

from __future__ import annotations

import json
import struct
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scrimp.data.chat import open_tokenizer
from scrimp.data.tokenizer import Tokenizer, train_bpe
from scrimp.errors import UserError
from scrimp.models.gguf import Gguf
from scrimp.models.gguf_llama import import_gguf, unpermuted
from scrimp.models.hub import loaded, read_config
from scrimp.models.hub_names import FAMILIES
from scrimp.models.transformer import Transformer, TransformerConfig
from scrimp.weights import initialize

WIDTH, HEADS, KV, HIDDEN, LAYERS = 64, 4, 2, 96, 2
TEXTS = [
    "The cat sat on the mat in 1984. " * 20,
    "Ein Satz, für 12 Leute! " * 20,
    "def f(x):\n    return x + 10\n" * 20,
]
TEMPLATE = "{% for m in messages %}{{ '<s>' + m.role + '\n' + m.content + '</s>' }}{% endfor %}"
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "model.layers": "blk",
}  # fmt: skip


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(given: Any) -> bytes:
    """A value of the metadata with its type."""
    if isinstance(given, bool):
        return struct.pack("<IB", 7, given)
    if isinstance(given, str):
        return struct.pack("<I", 8) + text(given)
    if isinstance(given, int):
        return struct.pack("<II", 4, given)
    if isinstance(given, float):
        return struct.pack("<If", 6, given)
    inner = 8 if isinstance(given[0], str) else 5
    items = b"".join(text(x) if inner == 8 else struct.pack("<i", x) for x in given)
    return struct.pack("<IIQ", 9, inner, len(given)) + items


def gguf(metadata: dict[str, Any], tensors: dict[str, tuple[int, tuple[int, ...], bytes]], version: int = 3) -> bytes:
    """A file, as llama.cpp writes it."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(text(key) + value(given) for key, given in metadata.items())
    body = b""
    for name, (kind, shape, raw) in tensors.items():
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += text(name) + dims + struct.pack("<IQ", kind, len(body))
        body += raw + bytes(-len(raw) % 32)
    return head + bytes(-len(head) % 32) + body


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def words() -> Tokenizer:
    """A trained BPE with special tokens of its own, cut as SmolLM's is."""
    from tokenizers import pre_tokenizers

    made = train_bpe(iter(TEXTS), 300)
    made.inner.add_special_tokens(["<s>", "</s>"])
    made.inner.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return made


VOCAB = words().vocab


def described(made: Tokenizer) -> dict[str, Any]:
    """A tokenizer as GGUF's metadata."""
    raw = json.loads(made.inner.to_str())
    table = made.inner.get_vocab(with_added_tokens=True)
    tokens = [word for word, _ in sorted(table.items(), key=lambda item: item[1])]
    special = {entry["content"] for entry in raw["added_tokens"]}
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in raw["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if word in special else 1 for word in tokens],
        "tokenizer.ggml.merges": merges, "tokenizer.ggml.bos_token_id": table["<s>"],
        "tokenizer.ggml.eos_token_id": table["</s>"], "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }  # fmt: skip


def metadata() -> dict[str, Any]:
    return {
        "general.architecture": "llama", "llama.block_count": LAYERS, "llama.context_length": 64,
        "llama.embedding_length": WIDTH, "llama.feed_forward_length": HIDDEN, "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV, "llama.rope.freq_base": 10000.0, "llama.rope.dimension_count": 16,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, **described(words()),
    }  # fmt: skip


def model(tied: bool = True) -> Transformer:
    config = TransformerConfig(
        vocab=VOCAB, context=64, layers=LAYERS, width=WIDTH, heads=HEADS, kv_heads=KV, hidden=HIDDEN, norm="rmsnorm",
        positions="rotary", activation="swiglu", bias=False, tied=tied, init_std=0.2,
    )  # fmt: skip
    made = config.build()
    initialize(made, 0)
    return made.eval()


def tensors(made: Transformer, kind: int = 0) -> dict[str, tuple[int, tuple[int, ...], bytes]]:
    """A model's weights as a file has them; matrices in float32 or as Q8_0."""
    found: dict[str, tuple[int, tuple[int, ...], bytes]] = {}
    named = {name: p.detach() for name, p in made.named_parameters()}
    for name, tensor in FAMILIES["llama"].write(named, made.config).items():
        array = tensor.numpy()
        if ".q_proj." in name or ".k_proj." in name:
            array = permuted(array, HEADS if ".q_proj." in name else KV)
        for long, short in NAMES.items():
            name = name.replace(long, short)
        used = kind if array.ndim == 2 else 0
        found[name] = used, array.shape, array.tobytes() if used == 0 else q8(array)
    return found


def q8(array: np.ndarray) -> bytes:
    blocks = array.reshape(-1, 32)
    scale = (np.abs(blocks).max(1, keepdims=True) / 127).astype(np.float16)
    ints = np.round(blocks / scale.astype(np.float32)).astype(np.int8)
    return np.concatenate([scale.view(np.uint8), ints.view(np.uint8)], 1).tobytes()


def written(tmp_path: Path, tied: bool = True, kind: int = 0, **changes: Any) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf({**metadata(), **changes}, tensors(model(tied), kind)))
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_the_imported_model_is_the_model(tmp_path: Path, tied: bool) -> None:
    made = import_gguf(written(tmp_path, tied), tmp_path / "out")
    ids = torch.arange(20)[None] * 7 % VOCAB
    assert torch.equal(loaded(tmp_path / "out").eval()(ids), model(tied)(ids))
    assert made.weights == sum(p.numel() for p in model(tied).parameters())
    options = read_config(tmp_path / "out")
    assert (options["norm_eps"], options["rope_base"], options["tied"]) == (1e-5, 10000.0, tied)


def test_rounded_weights_are_near(tmp_path: Path) -> None:
    made = import_gguf(written(tmp_path, kind=8), tmp_path / "out", "bfloat16")
    ids = torch.arange(20)[None] * 7 % VOCAB
    off = (loaded(tmp_path / "out").eval()(ids) - model()(ids)).abs().max() / model()(ids).std()
    assert 1e-4 < off < 0.2
    assert made.types == {"Q8_0": 15, "F32": 5}


def test_transformers_reads_the_folder_and_the_file_alike(tmp_path: Path) -> None:
    transformers = import_module("transformers")
    import_module("gguf")
    import_gguf(written(tmp_path, kind=8), tmp_path / "out")
    ids = torch.arange(20)[None] * 7 % VOCAB
    kind = transformers.AutoModelForCausalLM
    ours = kind.from_pretrained(tmp_path / "out").eval()
    theirs = kind.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours(ids).logits, loaded(tmp_path / "out").eval()(ids), rtol=1e-4, atol=1e-4)
    words_of = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    talk = [{"role": "user", "content": "The cat in 1984?"}]
    assert words_of.apply_chat_template(talk, tokenize=False) == open_tokenizer(str(tmp_path / "out")).chat.text(talk)
    assert words_of.eos_token == "</s>" and words_of("The cat").input_ids == words().encode("The cat")
    assert ours.config.eos_token_id == words_of.eos_token_id


def test_the_tokenizer_is_the_one_described(tmp_path: Path) -> None:
    import_gguf(written(tmp_path), tmp_path / "out")
    made, origin = open_tokenizer(str(tmp_path / "out")), words()
    for sample in [*TEXTS, "<s>user</s> 2024 nötig\n\n  x", "\t日本 🙂"]:
        assert made.encode(sample) == origin.encode(sample)
        assert made.decode(made.encode(sample)) == sample
    assert made.chat.end == "</s>" and made.chat.template == TEMPLATE


def test_a_begin_token_is_put_where_the_file_says_so(tmp_path: Path) -> None:
    import_gguf(written(tmp_path, **{"tokenizer.ggml.add_bos_token": True}), tmp_path / "out")
    inner = open_tokenizer(str(tmp_path / "out")).inner
    assert inner.encode("The cat").tokens[0] == "<s>"


def test_rows_come_back_in_order() -> None:
    rows = np.arange(24.0).reshape(12, 2)
    assert np.array_equal(unpermuted(permuted(rows, 2), 6), rows)
    assert unpermuted(np.array([[0], [10], [1], [11]]), 4)[:, 0].tolist() == [0, 1, 10, 11]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "falcon"}, "architecture `falcon`"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer is of kind `llama`"),
        ({"tokenizer.ggml.pre": "smolm"}, "cuts text as `smolm`.*Did you mean smollm"),
        ({"llama.rope.scaling.type": "yarn"}, "stretched rotary positions"),
        ({"llama.rope.dimension_count": 8}, "on 8 of 16 numbers"),
        ({"llama.expert_count": 4}, "experts"),
        ({"split.count": 2}, "several files"),
        ({"llama.attention.head_count_kv": [2, 2]}, "not a number"),
        ({"llama.block_count": 3}, r"not a whole Llama: model.layers.2.*and 3 more"),
        ({"llama.feed_forward_length": 32}, r"blk.0.ffn_down.weight is \[64, 96\] instead of \[64, 32\]"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        import_gguf(written(tmp_path, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    whole = written(tmp_path).read_bytes()
    path = tmp_path / "bad.gguf"
    for bad, message in (
        (b"", "cut off"), (b"GGML" + whole[4:], "not a GGUF file"), (whole[:1000], "cut off"),
        (whole[:-40], "not whole"), (whole[:4] + struct.pack("<I", 1) + whole[8:], "version 1"),
        (whole[:4] + struct.pack(">I", 3) + whole[8:], "little-endian"),
        (whole[:16] + struct.pack("<Q", 2**60) + whole[24:], "damaged|cut off"),
    ):  # fmt: skip
        path.write_bytes(bad)
        with pytest.raises(UserError, match=message):
            Gguf.open(path)
    path.write_bytes(gguf({}, {"x": (16, (256,), bytes(66))}))
    with pytest.raises(UserError, match="type IQ2_XXS.*Q4_K"):
        Gguf.open(path)
    with pytest.raises(UserError, match="no such file"):
        Gguf.open(tmp_path / "none.gguf")


def test_metadata_of_every_kind(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf({"a": "ü", "b": True, "c": 7, "d": 0.5, "e": ["x", "yz"], "f": [1, -2]}, {}))
    found = Gguf.open(path).metadata
    assert found["f"].tolist() == [1, -2]
    assert {key: found[key] for key in "abcde"} == {"a": "ü", "b": True, "c": 7, "d": 0.5, "e": ["x", "yz"]}


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("gpt-2", ["I", "'ll", "Ġsee", "Ġ12345", "Ġ", "Ġx"]),
        ("smollm", ["I", "'ll", "Ġsee", "Ġ", "1", "2", "3", "4", "5", "Ġ", "Ġx"]),
        ("llama-bpe", ["I", "'ll", "Ġsee", "Ġ", "123", "45", "Ġ", "Ġx"]),
    ],
)
def test_text_is_cut_as_the_name_says(tmp_path: Path, name: str, pieces: list[str]) -> None:
    changes: dict[str, Any] = {"tokenizer.ggml.pre": name}
    import_gguf(written(tmp_path, **changes), tmp_path / "out")
    inner = open_tokenizer(str(tmp_path / "out")).inner
    assert inner.pre_tokenizer is not None
    assert [piece for piece, _ in inner.pre_tokenizer.pre_tokenize_str("I'll see 12345  x")] == pieces
