"""Pictures with captions: crops and captions by sample, copies held out together, faults left out."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scrimp.data.image_text import ImageTextData
from scrimp.data.pictures import decoded
from scrimp.errors import UserError

Image: Any = import_module("PIL.Image")
PLAIN: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "deviation": (1.0, 1.0, 1.0)}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SCRIMP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "image_text"


def png(seed: int, side: int = 20) -> bytes:
    """A picture whose pixels all differ."""
    out = io.BytesIO()
    array = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(array).save(out, "png")
    return out.getvalue()


def items(count: int = 30) -> list[dict[str, Any]]:
    return [{"image": f"pictures/{i}.png", "text": [f"first {i}", f"second {i}"], "class": "ab"[i % 2]}
            for i in range(count)]  # fmt: skip


def listing(folder: Path, records: list[Any], seeds: list[int] | None = None) -> Path:
    (folder / "pictures").mkdir(exist_ok=True)
    for i, seed in enumerate(seeds or range(len(records))):
        (folder / f"pictures/{i}.png").write_bytes(png(seed))
    path = folder / "list.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def settings(source: Path, **changes: Any) -> ImageTextData:
    base = ImageTextData(source=str(source), image=16, kept=20, tokenizer="bytes", context=16, holdout=0.2, **PLAIN)
    return replace(base, **changes)


def texts(data: Any, found: dict[str, np.ndarray]) -> list[str]:
    rows = zip(found["captions"], found["caption_length"], strict=True)
    return [data.tokenizer.decode(row[: n - 1].tolist()) for row, n in rows]


def pixels(seed: int) -> np.ndarray:
    return decoded(png(seed), 20, 3).astype(np.float32) / 255


def test_held_out_pictures_are_the_middle_with_the_first_caption(tmp_path: Path) -> None:
    data = settings(listing(tmp_path, items())).open()
    assert data.gives == ("images", "captions") and data.classes == ("a", "b")
    assert data.sizes == {"vocab": 257, "context": 16, "image": 16, "channels": 3}
    assert len(data.train) + len(data.validation) == 30 and 1 <= len(data.validation) <= 12
    for split in (data.train, data.validation):
        found = split.read(np.arange(len(split)))
        for text, image, label in zip(texts(data, found), found["images"], found["classes"], strict=True):
            word, number = text.split()
            assert word == "first" and label == int(number) % 2
            np.testing.assert_allclose(image, pixels(int(number))[:, 2:18, 2:18], atol=1e-6)


def test_crops_flips_and_captions_are_a_function_of_the_sample(tmp_path: Path) -> None:
    data = settings(listing(tmp_path, items())).open()
    ids, sample = np.zeros(64, dtype=np.int64), np.arange(64)
    found = data.train.read(ids, sample)
    again = data.train.read(ids[40:41], sample[40:41])
    assert np.array_equal(found["images"][40], again["images"][0]) and texts(data, again) == texts(data, found)[40:41]
    number = int(texts(data, found)[0].split()[1])
    windows = {}
    for top in range(5):
        for left in range(5):
            cut = pixels(number)[:, top : top + 16, left : left + 16]
            windows |= {
                cut.tobytes(): (top, left, False),
                np.ascontiguousarray(cut[:, :, ::-1]).tobytes(): (top, left, True),
            }
    seen = [windows[image.tobytes()] for image in found["images"]]
    assert {m for _, _, m in seen} == {True, False} and len({(t, x) for t, x, _ in seen}) > 15
    assert {text.split()[0] for text in texts(data, found)} == {"first", "second"}
    still = settings(tmp_path / "list.jsonl", flip=False).open().train.read(ids, sample)
    assert not any(windows[image.tobytes()][2] for image in still["images"])


def test_images_are_normalized(tmp_path: Path) -> None:
    path = listing(tmp_path, items())
    plain = settings(path).open()
    shifted = settings(path, mean=(0.5, 0.25, 0.0), deviation=(0.5, 1.0, 2.0)).open()
    assert shifted.meta["key"] == plain.meta["key"]  # what is kept is bytes
    a, b = plain.train.read(np.arange(3))["images"], shifted.train.read(np.arange(3))["images"]
    shift, scale = (np.array(v, dtype=np.float32)[:, None, None] for v in ((0.5, 0.25, 0.0), (0.5, 1.0, 2.0)))
    np.testing.assert_allclose(b, (a - shift) / scale, atol=1e-6)


def test_copies_of_a_picture_are_held_out_together(tmp_path: Path) -> None:
    data = settings(listing(tmp_path, items(40), seeds=[i % 20 for i in range(40)])).open()
    numbers = [{int(t.split()[1]) % 20 for t in texts(data, s.read(np.arange(len(s))))}
               for s in (data.train, data.validation)]  # fmt: skip
    assert not numbers[0] & numbers[1]


def shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as out:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return path


def test_shards_hold_the_same_as_a_list(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i, item in enumerate(items()):
        members |= {f"x.y/{i}.png": png(i), f"x.y/{i}.txt": "\n".join(item["text"]).encode()}
        members |= {f"x.y/{i}.cls": item["class"].encode(), f"x.y/{i}.seg.npy": b"other"}
    a = settings(shard(tmp_path / "s.tar", members)).open()
    b = settings(listing(tmp_path, items())).open()
    for split in ("train", "validation"):
        left, right = (getattr(d, split).read(np.arange(len(getattr(d, split)))) for d in (a, b))
        assert all(np.array_equal(left[name], right[name]) for name in right)
    told = {f"{i}.{kind}": content for i in range(30) for kind, content in (
        ("jpg", png(i)), ("json", json.dumps({"text": f"t {i}", "class": "c"}).encode()))}  # fmt: skip
    data = settings(shard(tmp_path / "t.tar", told)).open()
    assert data.classes == ("c",) and texts(data, data.train.read(np.arange(1)))[0][:2] == "t "


def test_faulty_items_are_counted_named_and_left_out(tmp_path: Path) -> None:
    records = [*items(), {"image": "none.png", "text": "x"}, {"image": "pictures/broken.png", "text": "x"},
               {"image": "pictures/0.png", "text": []}, "{"]  # fmt: skip
    path = listing(tmp_path, records, seeds=list(range(30)))
    (tmp_path / "pictures/broken.png").write_bytes(png(1)[:200])
    data = settings(path, skip=0.2).open()
    assert len(data.train) + len(data.validation) == 30 and data.meta["skipped"]["count"] == 4
    said = data.note
    for words in ("4 of 34 items were left out", "line 31: its image cannot be read", "line 32: its image is broken",
                  "line 33: its field `text` is not text", "line 34: is not JSON"):  # fmt: skip
        assert words in said
    with pytest.raises(UserError, match="4 of 34 items are faulty"):
        settings(path).open()


def test_a_shard_that_breaks_off_is_an_error(tmp_path: Path) -> None:
    path = shard(
        tmp_path / "s.tar", {f"{i}.{k}": png(i) if k == "png" else b"x" for i in range(9) for k in ("png", "txt")}
    )
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="is not a whole tar file"):
        settings(path).open()


def test_transparency_is_white_and_pictures_are_fitted() -> None:
    out = io.BytesIO()
    array = np.zeros((10, 30, 4), dtype=np.uint8)
    array[:, :, 3] = np.repeat([255, 0, 255], 10)
    Image.fromarray(array).save(out, "png")
    found = decoded(out.getvalue(), 10, 3)
    assert found.shape == (3, 10, 10) and found.dtype == np.uint8
    assert (found[:, :, 3:7] == 255).all()  # the transparent middle third
    grey = io.BytesIO()
    Image.fromarray(np.full((8, 8), 77, dtype=np.uint8)).save(grey, "png")
    assert (decoded(grey.getvalue(), 4, 3) == 77).all()


def test_a_cache_follows_the_pictures(tmp_path: Path, cache: Path) -> None:
    path = listing(tmp_path, items())
    first = settings(path).open().meta["key"]
    assert settings(path).open().meta["key"] == first
    (tmp_path / "pictures/3.png").write_bytes(png(99))
    assert settings(path).open().meta["key"] != first


def test_an_outline_has_the_sizes_without_the_pictures(tmp_path: Path, cache: Path) -> None:
    made = settings(listing(tmp_path, items()), tokenizer="bpe", vocab=300)
    outline = made.outline()
    assert not list(cache.glob("*/meta.json")) and "estimate" in outline.note
    assert outline.sizes["vocab"] == 300 and outline.train.read(np.arange(2))["images"].shape == (2, 3, 16, 16)
    data = made.open()
    assert not made.outline().note
    data.tokenizer.save(tmp_path)
    assert made.used(tmp_path, {}).sizes == data.sizes


@pytest.mark.parametrize("changes", [{"kept": 15}, {"deviation": (1.0, 0.0, 1.0)}, {"holdout": 0.0}], ids=str)
def test_bad_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(changes))):
        ImageTextData(source="x", image=16, **changes)


def filled(path: Path, mode: Any, more: dict[str, bytes] | None = None) -> Path:
    held = {f"{i}.{kind}": content for i in range(12) for kind, content in (("png", png(i)), ("txt", b"a text"))}
    with tarfile.open(path, mode) as file:
        for name, content in (held | (more or {})).items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def test_what_cannot_be_read_of_shards_and_lists_is_told(tmp_path: Path) -> None:
    whole = filled(tmp_path / "gz.tar", "w:gz").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a whole tar file"):
        settings(tmp_path / "cut.tar").open()
    deep = filled(tmp_path / "deep.tar", "w", {"x.png": png(99), "x.json": b"[" * 100_000})
    assert settings(deep, skip=0.5).open().meta["skipped"]["count"] == 1
    long = listing(tmp_path, [*items(12), {"image": "y" * 5000, "text": "no file has such a name"}])
    assert settings(long, skip=0.5).open().meta["skipped"]["count"] == 1
