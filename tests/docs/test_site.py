"""The documentation's site: what is generated covers every technique, and every link and page is there."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import scrimp
from scrimp.arrange import clash, declared, order
from scrimp.reading import Loader
from scrimp.recipe import Recipe
from scrimp.registry import Entry, technique_class

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SPEC = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
assert SPEC and SPEC.loader
generate = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(generate)

ENTRIES: dict[str, Entry] = generate.entries()
MADE: dict[str, str] = generate.pages()
WRITTEN = {str(path.relative_to(DOCS)): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
PAGES = WRITTEN | MADE
CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(text: str) -> set[str]:
    """The anchors of a page's titles."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {generate.slug(title.replace("`", "")) for title in titles}


def places(nav: Any) -> list[str]:
    """Every page that a navigation names."""
    if isinstance(nav, str):
        return [nav]
    return [page for item in (nav if isinstance(nav, list) else nav.values()) for page in places(item)]


def test_every_technique_has_a_page() -> None:
    assert set(ENTRIES) == {path.stem for path in (ROOT / "src/scrimp/techniques").glob("*/[!_]*.py")}
    assert {f"techniques/{name}.md" for name in ENTRIES} <= set(MADE)
    assert all(f"[`{name}`]({name}.md)" in MADE["techniques/index.md"] for name in ENTRIES)


@pytest.mark.parametrize("name", ENTRIES)
def test_a_page_says_what_card_and_settings_say(name: str) -> None:
    entry, page = ENTRIES[name], MADE[f"techniques/{name}.md"]
    assert all(f"| `{setting.name}` |" in page for setting in entry.settings)
    assert all(f"| `{slot}` |" in page for slot in entry.slots)
    for label, said in {"Claim": entry.card.claim, "Saves": entry.card.saves, "Costs": entry.card.costs}.items():
        assert (f"| {label} | " in page) == bool(said)
    assert not re.search(r"^## .*\n\n(##|$)", page, re.MULTILINE), "a title without a text"


@pytest.mark.parametrize("name", ENTRIES)
def test_what_a_docstring_indents_is_on_the_page_as_it_is(name: str) -> None:
    page = MADE[f"techniques/{name}.md"]
    indented = [line for line in ENTRIES[name].about.splitlines() if line.startswith("    ")]
    code = "\n".join(re.findall(r"^```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    assert [line.strip() for line in indented] == [line.strip() for line in code.splitlines() if line.strip()]


@pytest.mark.parametrize("name", ENTRIES)
def test_the_recipe_on_a_page_is_the_default(name: str) -> None:
    block = re.search(r"```yaml\n(.*?)```", MADE[f"techniques/{name}.md"], re.DOTALL)
    assert block
    raw = yaml.load(block[1], Loader=Loader)
    made = next(t for t in Recipe.read(raw).techniques if t.name == name)
    required = {s.name for s in ENTRIES[name].settings if s.default is ...}
    assert set(made.settings()) <= required


def test_the_table_has_every_pair() -> None:
    page = MADE["techniques/pairs.md"]
    rows = re.search(r'<div class="pairs" markdown>\n\n(.*?)\n\n</div>', page, re.DOTALL)
    assert rows
    lines = [line.strip("| ").split(" | ") for line in rows[1].splitlines()[2:]]
    assert [line[0] for line in lines] == [f"[`{name}`]({name}.md)" for name in ENTRIES]
    marks = [[re.sub("<[^>]*>", "", cell) for cell in line[1:]] for line in lines]
    assert "`adam` and `adamw` both set the update rule." in page
    for i, row in enumerate(marks):
        assert all(cell in "✕▲●·" for j, cell in enumerate(row) if j != i)


def test_stand_ins_clash_as_the_techniques_do() -> None:
    """The table is made without importing techniques; the real ones say the same."""
    pairs = generate.Pairs(ENTRIES)
    real = {n: technique_class(n)(**{s.name: e.card.example[s.name] for s in e.settings if s.default is ...})
            for n, e in ENTRIES.items()}  # fmt: skip
    for a, one in real.items():
        for b, two in real.items():
            assert clash(one, two) == clash(pairs.made[a], pairs.made[b])
            for slot in ENTRIES[a].slots:
                fakes = [pairs.made[a], pairs.made[b]]
                assert [t.name for t in order(slot, [one, two])] == [t.name for t in order(slot, fakes)]
                assert declared(slot, one, two) == declared(slot, *fakes)


def test_every_page_of_the_navigation_is_there_and_every_page_is_in_it() -> None:
    named = places(CONFIG["nav"]) + places(generate.navigation(ENTRIES))
    assert set(named) == set(PAGES)


def test_generated_pages_are_not_committed() -> None:
    patterns = tuple(line for line in (ROOT / ".gitignore").read_text().split() if line.startswith("docs/"))
    assert all(f"docs/{page}".startswith(patterns) for page in MADE)


@pytest.mark.parametrize("page", PAGES)
def test_links_within_the_site_resolve(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(PAGES[page])):
        if target.startswith(("http://", "https://")):
            continue
        place, _, anchor = target.partition("#")
        found = (DOCS / page).parent.joinpath(place).resolve().relative_to(DOCS) if place else Path(page)
        assert str(found) in PAGES or (DOCS / found).is_file(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(PAGES[str(found)]), f"{page}: {target}"


def test_every_public_name_is_in_the_reference() -> None:
    assert all(f"::: scrimp.{name}\n" in WRITTEN["api.md"] for name in scrimp.__all__)
    for name in re.findall(r"^::: ([\w.]+)$", WRITTEN["api.md"], re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_the_site_needs_no_network() -> None:
    assert CONFIG["theme"]["font"] is False
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8") + (DOCS / "assets/site.css").read_text(encoding="utf-8")
    assert not re.search(r"https?://", text)
