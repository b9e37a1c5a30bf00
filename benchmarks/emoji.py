"""1,875 emoji and their names as data for `contrastive`: `python benchmarks/emoji.py FOLDER`.

The pictures are Twitter's, under CC-BY-4.0 (https://github.com/jdecked/twemoji), as the npm package
emoji-datasource-twitter has them (60 MB, fetched by `npm pack`, or given by --package). FOLDER gets emoji.jsonl and
pictures/: each picture of 64 pixels with its name, the same after its category, and with its subcategory; its class is
the category. Skin tones are left out, since they share their names.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

PACKAGE = "emoji-datasource-twitter@15.1.2"
PICTURES = "package/img/twitter/64"


def fetched(folder: Path) -> Path:
    """The package's tarball, by npm."""
    subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, capture_output=True)
    return next(folder.glob("*.tgz"))


def captions(emoji: dict[str, Any]) -> list[str]:
    """What an emoji is called; the first is its name alone."""
    name, group = emoji["name"].lower(), emoji["category"].lower()
    return [name, f"{group}: {name}", f"{name}, {emoji['subcategory'].replace('-', ' ')}"]


def unpack(package: Path, out: Path) -> int:
    """Write the pictures that the package has, and the list of them; returns how many."""
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    with tarfile.open(package) as tar:
        members = {member.name: member for member in tar.getmembers()}

        def content(name: str) -> bytes:
            file = tar.extractfile(members[name])
            assert file is not None
            return file.read()

        for emoji in json.loads(content("package/emoji.json")):
            name = f"{PICTURES}/{emoji['image']}"
            if not emoji["has_img_twitter"] or name not in members:
                continue
            path = out / "pictures" / emoji["image"]
            path.write_bytes(content(name))
            record = {"image": f"pictures/{path.name}", "text": captions(emoji), "class": emoji["category"].lower()}
            lines.append(json.dumps(record))
    (out / "emoji.jsonl").write_text("\n".join(lines) + "\n")
    return len(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--package", type=Path, help="a tarball that was fetched already")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(f"{unpack(given.package or fetched(Path(scratch)), given.folder)} emoji in {given.folder}")


if __name__ == "__main__":
    main()
