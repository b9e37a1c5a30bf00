"""Images from every kind of file, how they are split, normalized and changed, and what is done about bad ones."""

from __future__ import annotations

import gzip
import io
import json
import struct
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scrimp.data.images import ImageData, Images, moments
from scrimp.data.pictures import UnreadableError, decoded
from scrimp.data.pixels import Pixels, changed
from scrimp.errors import UserError

Image = import_module("PIL.Image")
X = np.random.default_rng(0).integers(0, 256, (40, 6, 6), dtype=np.uint8)
Y = np.arange(40) % 4


def opened(source: Path | str, **settings: Any) -> Images:
    return ImageData(source=str(source), **{"holdout": 0.25, **settings}).open()


def raw(split: Pixels) -> np.ndarray:
    """The bytes of a split, [items, channels, H, W]."""
    images = split.read(np.arange(len(split)))["images"]
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (split.mean, split.std))
    return np.rint((images * std + mean) * 255).astype(np.uint8)


def pairs(data: Images) -> set[tuple[bytes, str]]:
    """Every image with the name of its class, over both splits."""
    found: set[tuple[bytes, str]] = set()
    for split in (data.train, data.validation):
        labels = split.read(np.arange(len(split)))["labels"]
        found |= {(x.tobytes(), data.meta["classes"][y]) for x, y in zip(raw(split), labels, strict=True)}
    return found


def wanted(names: str = "0123") -> set[tuple[bytes, str]]:
    return {(x.tobytes(), names[y]) for x, y in zip(X, Y, strict=True)}


def png(x: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(x).save(out, "PNG")
    return out.getvalue()


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def folder(root: Path, names: str = "abcd") -> Path:
    for i, (x, y) in enumerate(zip(X, Y, strict=True)):
        place = root / names[y]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.png").write_bytes(png(x))
    return root


def test_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=X, y=Y)
    data = opened(tmp_path / "d.npz")
    assert pairs(data) == wanted()
    assert data.sizes == {"image": 6, "channels": 1, "classes": 4} and data.gives == ("images", "labels")
    assert len(data.train) + len(data.validation) == 40 and len(data.validation) > 2
    batch = data.train.read(np.array([3, 0]))
    assert batch["images"].dtype == np.float32 and batch["images"].shape == (2, 1, 6, 6)
    assert batch["labels"].dtype == np.int64
    np.savez(tmp_path / "named.npz", image=X, label=np.array(list("pqrs"))[Y])
    assert pairs(opened(tmp_path / "named.npz")) == wanted("pqrs")


def test_folders_name_the_classes(tmp_path: Path) -> None:
    data = opened(folder(tmp_path / "d"))
    assert data.meta["classes"] == list("abcd") and pairs(data) == wanted("abcd")


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_and_a_source_of_their_own_for_testing(zipped: bool, tmp_path: Path) -> None:
    end, pack = (".gz", gzip.compress) if zipped else ("", bytes)
    for name, part in (("train", slice(0, 30)), ("t10k", slice(30, 40))):
        (tmp_path / f"{name}-images-idx3-ubyte{end}").write_bytes(pack(idx(X[part])))
        (tmp_path / f"{name}-labels-idx1-ubyte{end}").write_bytes(pack(idx(Y[part])))
    train, test = (tmp_path / f"{name}-images-idx3-ubyte{end}" for name in ("train", "t10k"))
    data = opened(train, validation=str(test))
    assert (len(data.train), len(data.validation)) == (30, 10) and pairs(data) == wanted()
    assert np.array_equal(raw(data.validation)[:, 0], X[30:])
    with pytest.raises(UserError, match="holds several IDX files"):
        opened(tmp_path)


@pytest.mark.parametrize("wrapped", [False, True])
def test_parquet(wrapped: bool, tmp_path: Path) -> None:
    pyarrow = import_module("pyarrow")
    from pyarrow import parquet

    images = [{"bytes": png(x), "path": None} if wrapped else png(x) for x in X]
    parquet.write_table(pyarrow.table({"image": images, "label": Y}), tmp_path / "d.parquet")
    assert pairs(opened(tmp_path / "d.parquet")) == wanted()
    with pytest.raises(UserError, match="has no column `picture`"):
        opened(tmp_path / "d.parquet", field="picture")


def test_images_without_labels(tmp_path: Path) -> None:
    for i, x in enumerate(X):
        (tmp_path / f"{i}.png").write_bytes(png(x))
    data = opened(tmp_path)
    assert data.gives == ("images",) and "classes" not in data.sizes
    assert data.train.read(np.array([0])).keys() == {"images"}
    folder(tmp_path)
    with pytest.raises(UserError, match="some images have labels and some have none"):
        opened(tmp_path)


def test_copies_are_held_out_together(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.concatenate([X, X, X]), y=np.tile(Y, 3))
    data = opened(tmp_path / "d.npz")
    assert len(data.validation) % 3 == 0
    train, held = ({x.tobytes() for x in raw(split)} for split in (data.train, data.validation))
    assert not train & held and len(train | held) == 40


def test_normalization_is_that_of_the_training_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=X, y=Y)
    data = opened(tmp_path / "d.npz")
    images = data.train.read(np.arange(len(data.train)))["images"]
    assert abs(images.mean()) < 1e-5 and abs(images.std() - 1) < 1e-5
    bytes_ = raw(data.train) / 255
    assert data.meta["mean"] == pytest.approx([bytes_.mean()]) and data.meta["std"] == pytest.approx([bytes_.std()])
    given = opened(tmp_path / "d.npz", mean=[0.0], std=[1.0])
    assert given.train.read(np.array([0]))["images"].max() <= 1
    assert moments(np.full((2, 1, 3, 3), 51, np.uint8)) == ([0.2], [1 / 255])
    with pytest.raises(UserError, match="has 3 values for 1 channels"):
        opened(tmp_path / "d.npz", mean=[0.5, 0.5, 0.5])


def test_crops_and_flips_are_functions_of_the_sample(tmp_path: Path) -> None:
    x = np.arange(1, 17, dtype=np.uint8).reshape(1, 1, 4, 4)
    seen = {changed(x, np.array([s]), 1, True).tobytes() for s in range(200)}
    around = np.pad(x[0, 0], 1)
    possible = {
        around[i : i + 4, j : j + 4][:, ::step].tobytes() for i in range(3) for j in range(3) for step in (1, -1)
    }
    assert seen == possible and len(possible) == 18
    both = changed(np.concatenate([x, x]), np.array([5, 9]), 1, True)
    assert np.array_equal(both[1:], changed(x, np.array([9]), 1, True))
    assert np.array_equal(changed(x, np.array([5]), 0, False), x)
    np.savez(tmp_path / "d.npz", x=X, y=Y)
    data = opened(tmp_path / "d.npz", crop=2, flip=True)
    ids, sample = np.arange(8), np.arange(8) + 50
    plain, drawn = data.train.read(ids), data.train.read(ids, sample)
    assert np.array_equal(plain["labels"], drawn["labels"]) and not np.array_equal(plain["images"], drawn["images"])
    assert np.array_equal(drawn["images"], data.train.read(ids, sample)["images"])
    assert np.array_equal(data.validation.read(ids[:2], sample[:2])["images"], data.validation.read(ids[:2])["images"])


def test_pictures_are_brought_to_one_size() -> None:
    wide = np.zeros((10, 20), np.uint8)
    wide[:, 5:15] = 200  # the middle square
    assert np.array_equal(decoded(png(wide), 0, 0), np.full((1, 10, 10), 200))
    # Bicubic: next to the cut there is a trace of what was cut off.
    assert np.abs(decoded(wide, 5, 1)[:, :, 1:-1].astype(int) - 200).max() <= 2
    color = np.dstack([np.full((8, 8), v, np.uint8) for v in (255, 0, 0)])
    assert decoded(png(color), 0, 0).shape == (3, 8, 8)
    assert decoded(color, 0, 0)[:, 0, 0].tolist() == [255, 0, 0]
    assert decoded(color, 0, 1)[0, 0, 0] == 76  # 0.299 of red
    assert decoded(wide, 10, 3).shape == (3, 10, 10)
    for bad in (b"", b"no picture", png(color)[:40]):
        with pytest.raises(UnreadableError):
            decoded(bad, 0, 0)
    with pytest.raises(UnreadableError, match="more than 8 bits"):
        decoded(png(np.full((4, 4), 1000, np.uint16)), 0, 0)


def test_unreadable_images_are_counted_named_and_limited(tmp_path: Path) -> None:
    root = folder(tmp_path / "d")
    (root / "a" / "0.png").write_bytes(b"broken")
    (root / "b" / "1.png").write_bytes(png(X[1])[:-30])
    with pytest.raises(UserError) as error:
        opened(root)
    assert "2 of 40 items are faulty" in str(error.value) and "a/0.png" in str(error.value)
    data = opened(root, skip=0.05)
    assert data.meta["skipped"]["count"] == 2 and "b/1.png" in data.meta["skipped"]["first"][1]
    assert len(data.train) + len(data.validation) == 38


def test_the_cache_is_keyed_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, x=X, y=Y)
    first = opened(path, cache=str(tmp_path / "cache"))
    again = opened(path, cache=str(tmp_path / "cache"), crop=1, flip=True, mean=[0.1])
    assert again.meta["key"] == first.meta["key"]
    assert opened(path, cache=str(tmp_path / "cache"), image=3).meta["key"] != first.meta["key"]
    monkeypatch.chdir(tmp_path)
    settings = ImageData(source="d.npz", cache="cache", holdout=0.25)
    assert settings.open().meta["key"] == first.meta["key"]
    assert settings.anchored().source == str(path) and settings.found()
    np.savez(path, x=X[::-1], y=Y)
    assert opened(path, cache=str(tmp_path / "cache")).meta["key"] != first.meta["key"]


def test_an_outline_has_the_sizes_and_reads_nothing(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=X, y=Y)
    settings = ImageData(source=str(tmp_path / "d.npz"), holdout=0.25, cache=str(tmp_path / "cache"))
    before = settings.outline()
    assert before.note and not list((tmp_path / "cache/images").glob("*/train.bin"))
    built = settings.open()
    assert before.sizes == built.sizes and before.gives == built.gives
    assert len(before.train) + len(before.validation) == 40
    zeros = before.train.read(np.array([0, 5]))
    assert zeros["images"].shape == (2, 1, 6, 6) and zeros["labels"].tolist() == [0, 0]
    assert settings.outline().note == ""


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": X.astype(np.float32), "y": Y}, "images must be uint8"),
        ({"x": X[:, :, :, None].repeat(2, 3), "y": Y}, "images must be uint8"),
        ({"x": X, "y": Y[:-1]}, "labels must be whole numbers or texts [40]"),
        ({"x": X, "y": Y - 1}, "the label -1 is negative"),
        ({"z": X}, "has no array `image`"),
        ({"x": X[:1], "y": Y[:1]}, "there is only one item"),
        ({"x": X, "y": Y + 2**40}, "is no number of a class"),
    ],
)
def test_what_is_no_set_of_images_is_refused(arrays: dict[str, np.ndarray], said: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(UserError) as error:
        opened(tmp_path / "d.npz")
    assert said in str(error.value)


def test_other_mistakes_say_what_to_do(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X, y=Y)
    np.savez(tmp_path / "b.npz", x=X, y=Y + 1)
    np.save(tmp_path / "f.npy", X)
    (tmp_path / "f.npy").rename(tmp_path / "f.npz")
    (tmp_path / "c.idx").write_bytes(b"\0\0\x0d\x03")
    (tmp_path / "e-images-idx3-ubyte").write_bytes(idx(X)[:-1])
    for source, more, said in (
        ("none", {}, "`none` has no images"),
        (tmp_path / "a.npz", {"validation": str(tmp_path / "b.npz")}, "of classes that training does not have: 4"),
        (tmp_path / "c.idx", {}, "is no kind of file with images that is known"),
        (tmp_path / "e-images-idx3-ubyte", {}, "holds 1439 values instead of 1440"),
        (tmp_path / "f.npz", {}, "is not a file of arrays"),
        (tmp_path / "a.npz", {"labels": ("0", "1")}, "of classes that `labels` does not have: 2, 3"),
        (tmp_path / "a.npz", {"crop": 6}, "crop must be below the images' 6 pixels"),
    ):
        with pytest.raises(UserError) as error:
            opened(source, **more)
        assert said in str(error.value)
    for settings, said in (({"holdout": 0}, "holdout must be"), ({"channels": 2}, "channels must be 1, 3"),
                           ({"skip": 2}, "skip must be"), ({"std": [0.0]}, "std must be above 0")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            ImageData(**{"source": "x", **settings})


def test_meta_is_json(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=X, y=Y)
    meta = opened(tmp_path / "d.npz").meta
    assert json.loads(json.dumps(meta)) == meta
    assert meta["images"]["train"] * 36 == meta["files"]["train.bin"]


@pytest.mark.parametrize("count", [2, 5])
def test_of_few_images_one_is_held_out(count: int, tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=X[:count], y=Y[:count])
    data = opened(tmp_path / "d.npz", holdout=1e-6)
    assert (len(data.train), len(data.validation)) == (count - 1, 1)


def test_named_classes_keep_their_numbers(tmp_path: Path) -> None:
    data = opened(folder(tmp_path / "few"), labels=("z", "d", "c", "b", "a"))
    assert data.sizes["classes"] == 5 and data.labels[0] == "z"
    assert pairs(data) == wanted("abcd")
