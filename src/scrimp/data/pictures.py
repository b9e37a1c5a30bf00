"""Where images come from: folders of pictures, .npz arrays, MNIST's IDX files, parquet with encoded pictures.

A source is named by a path. What is in it is read lazily: labels at once, pictures one at a time.
"""

from __future__ import annotations

import glob
import gzip
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import numpy as np

from scrimp.data.documents import open_parquet
from scrimp.errors import UserError, did_you_mean

PICTURES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
TABLES: Final = (".npz", ".parquet")
IMAGES, LABELS = "images-idx3", "labels-idx1"
"""What tells MNIST's files apart by name."""
INSTALL: Final = "pip install 'scrimp[data]'."

Raw = np.ndarray | bytes | Path
Label = int | str | None


class UnreadableError(Exception):
    """A picture that cannot be decoded; its text says why."""


@dataclass(frozen=True)
class Source:
    """Some pictures with their labels, in one order."""

    labels: list[Label]
    pictures: Callable[[], Iterator[tuple[str, Raw]]]
    """Name, for errors, and what is decoded: an array [H, W] or [H, W, channels], encoded bytes, or a file."""


def find(source: str) -> list[Path]:
    """The files of a source, sorted; of IDX images also their labels.

    Args:
        source: a file, a folder (pictures, .npz and .parquet, read recursively without hidden files), or a glob.
    Raises:
        UserError: if there are none.
    """
    place = Path(source).expanduser()
    if source and place.is_dir():
        files = [p for p in place.rglob("*") if p.suffix.lower() in (*PICTURES, *TABLES) and p.is_file()]
        files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(place).parts)]
        if not files and any(IMAGES in p.name for p in place.iterdir()):
            fix = "Name the file of training images, and those of testing in `data.validation`."
            raise UserError(f"`{source}` holds several IDX files.", "data.source", fix)
    elif place.is_file():
        files = [place]
    else:
        files = [Path(p) for p in glob.glob(str(place), recursive=True) if Path(p).is_file()] if source else []
    if not files:
        fix = "Give a folder with a folder of pictures a class, an .npz, .parquet or IDX file, or a glob."
        raise UserError(f"`{source}` has no images.", "data.source", fix)
    return sorted({*files, *(labels for p in files if (labels := _labels_file(p)) is not None)})


def _labels_file(path: Path) -> Path | None:
    if IMAGES not in path.name:
        return None
    found = path.with_name(path.name.replace(IMAGES, LABELS))
    return found if found.is_file() else None


def sources(source: str, field: str, label: str) -> list[Source]:
    """What a source holds.

    Args:
        field: column of .parquet, or array of .npz, with the pictures; of .npz, `x` if there is none.
        label: with the labels; of .npz, `y` if there is none.
    Raises:
        UserError: if a file is damaged, has another form, or pictures and labels do not match.
    """
    files = [path for path in find(source) if LABELS not in path.name]
    found: list[Source] = []
    pictures = [path for path in files if path.suffix.lower() in PICTURES]
    if pictures:
        found.append(_folder(pictures, Path(source).expanduser()))
    for path in files:
        if path.suffix.lower() == ".npz":
            found.append(_npz(path, field, label))
        elif path.suffix.lower() == ".parquet":
            found.append(_parquet(path, field, label))
        elif path.suffix.lower() not in PICTURES:
            found.append(_idx(path))
    labeled = {label is not None for part in found for label in part.labels}
    if len(labeled) > 1:
        fix = "Put every picture into the folder of its class, or all beside each other for no labels."
        raise UserError("some images have labels and some have none.", source, fix)
    return found


def _folder(files: list[Path], root: Path) -> Source:
    """Pictures whose label is the first folder below the root."""
    parts = [path.relative_to(root).parts if root.is_dir() else (path.name,) for path in files]
    labels: list[Label] = [names[0] if len(names) > 1 else None for names in parts]
    return Source(labels, lambda: ((str(path), path) for path in files))


def _arrays(path: Path, x: np.ndarray, y: np.ndarray | None) -> Source:
    """Pictures that are an array of bytes, [items, H, W] or [items, H, W, channels]."""
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in (1, 3)):
        what = f"images must be uint8 [items, H, W] or [items, H, W, 1 or 3], not {x.dtype} {list(x.shape)}."
        raise UserError(what, str(path), "Scale the values to 0 to 255.")
    if y is not None and (y.shape != x.shape[:1] or y.dtype.kind not in "iuU"):
        what = f"labels must be whole numbers or texts [{len(x)}], not {y.dtype} {list(y.shape)}."
        raise UserError(what, str(path))
    labels: list[Label] = [None] * len(x) if y is None else y.tolist()
    return Source(labels, lambda: ((f"{path}, image {i}", image) for i, image in enumerate(x)))


def _npz(path: Path, field: str, label: str) -> Source:
    try:
        with np.load(path, allow_pickle=False) as held:
            x, y = (name if name in held.files else usual for name, usual in ((field, "x"), (label, "y")))
            if x not in held.files:
                fix = f"{did_you_mean(field, held.files)} Set `data.field`."
                raise UserError(f"has no array `{field}`.", str(path), fix)
            return _arrays(path, held[x], held[y] if y in held.files else None)
    except (ValueError, TypeError, OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"is not a file of arrays: {error}.", str(path)) from None


def _idx(path: Path) -> Source:
    labels = _labels_file(path)
    images = _idx_array(path)
    if images.ndim != 3:
        raise UserError(f"an IDX file of images has 3 dimensions, not {images.ndim}.", str(path))
    return _arrays(path, images, None if labels is None else _idx_array(labels))


def _idx_array(path: Path) -> np.ndarray:
    """An IDX file, gzipped or not: two zeros, a type (8 is bytes), how many dimensions, each big-endian, the values."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, gzip.BadGzipFile, ValueError) as error:
        raise UserError(f"cannot be read: {error}.", str(path)) from None
    if raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * raw[3]:
        fix = f"Known: {', '.join((*PICTURES, *TABLES))} and IDX files of bytes."
        raise UserError("is no kind of file with images that is known.", str(path), fix)
    shape = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    if len(values) != int(np.prod(shape)):
        raise UserError(f"holds {len(values)} values instead of {int(np.prod(shape))}.", str(path), "Fetch it again.")
    return values.reshape(shape)


def _parquet(path: Path, field: str, label: str) -> Source:
    with open_parquet(path) as file:
        names, rows = file.schema_arrow.names, file.metadata.num_rows
        if field not in names:
            fix = f"{did_you_mean(field, names)} Set `data.field`."
            raise UserError(f"has no column `{field}`.", str(path), fix)
        try:
            labels = file.read([label]).column(0).to_pylist() if label in names else [None] * rows
        except (OSError, ValueError) as error:  # pyarrow's faults of content are ValueErrors
            raise UserError(f"is damaged: {error}.", str(path)) from None
    if label in names and not all(isinstance(value, int | str) and not isinstance(value, bool) for value in labels):
        raise UserError(f"its column `{label}` is neither whole numbers nor texts.", str(path), "Set `data.label`.")

    def pictures() -> Iterator[tuple[str, Raw]]:
        with open_parquet(path) as file:
            batches = file.iter_batches(batch_size=64, columns=[field])
            for i, value in enumerate(value for part in batches for value in part.column(0).to_pylist()):
                # Hugging Face's data sets keep {bytes, path}.
                raw = value.get("bytes") if isinstance(value, dict) else value
                yield f"{path}, row {i}", raw if isinstance(raw, bytes) else b""

    return Source(labels, pictures)


def decoded(raw: Raw, image: int, channels: int) -> np.ndarray:
    """A picture as uint8 [channels, image, image]: turned as its camera says, white where transparent, its shorter side
    made to fit, and the middle cut out.

    Args:
        image: side in pixels; 0 takes the picture's shorter side. channels: 1, 3, or 0 for the picture's own.
    Raises:
        UnreadableError: if it is damaged, or its values have more than 8 bits.
        UserError: if Pillow is needed and not installed.
    """
    if isinstance(raw, np.ndarray):
        own = 1 if raw.ndim == 2 else raw.shape[2]
        if raw.shape[0] == raw.shape[1] and raw.shape[0] == (image or raw.shape[0]) and own == (channels or own):
            return np.ascontiguousarray(raw.reshape(*raw.shape[:2], own).transpose(2, 0, 1))
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise UserError("Pillow is not installed, which decodes and resizes images.", "data.source", INSTALL) from None
    try:
        picture = _picture(raw, Image)
        if picture.mode.startswith(("I", "F")):
            raise UnreadableError(f"has values of more than 8 bits (mode {picture.mode})")
        picture = ImageOps.exif_transpose(picture)
        channels = channels or (1 if picture.mode in ("1", "L", "LA") else 3)
        if picture.has_transparency_data:
            plain = Image.new("RGBA", picture.size, (255, 255, 255, 255))
            picture = Image.alpha_composite(plain, picture.convert("RGBA"))
        picture = picture.convert("L" if channels == 1 else "RGB")
        side = image or min(picture.size)
        if picture.size != (side, side):
            picture = ImageOps.fit(picture, (side, side), Image.Resampling.BICUBIC)
        found = np.asarray(picture, dtype=np.uint8)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UnreadableError(str(error)) from None
    return np.ascontiguousarray(found.reshape(side, side, channels).transpose(2, 0, 1))


def _picture(raw: Raw, module: Any) -> Any:
    if isinstance(raw, np.ndarray):
        return module.fromarray(raw[..., 0] if raw.ndim == 3 and raw.shape[2] == 1 else raw)
    # Read whole, since Pillow leaves a damaged file open.
    return module.open(BytesIO(raw if isinstance(raw, bytes) else raw.read_bytes()))
