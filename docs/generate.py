"""The pages that are generated: one a technique, the catalogue, the table of pairs, and files from outside `docs/`.

    python docs/generate.py        # writes docs/techniques/, docs/contributing.md and docs/changelog.md

All of it is read from cards, docstrings and `evidence/pairs.json`, without importing torch. mkdocs calls the hooks at
the end of this file.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "docs")]

from together import Pairs, pairs_page  # noqa: E402
from wording import docstring, kind, link, listed, mapping, prose, table, value  # noqa: E402

from scrimp.arrange import scope  # noqa: E402
from scrimp.registry import Entry, catalogue, classes  # noqa: E402
from scrimp.technique import SLOTS  # noqa: E402

SECTIONS: Final = (
    "Optimization", "Initialization", "Sparse training", "Overparameterization", "Large batch training",
    "Incremental learning", "Token masking", "Importance sampling", "Parallelism", "Quantized training",
    "Rematerialization", "Offloading", "Parameter-efficient tuning", "Hardware/algorithm co-design",
)  # fmt: skip
"""The sections of the survey, in its order."""


def entries() -> dict[str, Entry]:
    """Our techniques, by section and name; those of packages that happen to be installed are left out."""
    ours = [entry for entry in catalogue().values() if entry.module.startswith("scrimp.techniques.")]
    places = {section: i for i, section in enumerate(SECTIONS)}
    ours.sort(key=lambda e: (places.get(e.card.section, len(places)), e.card.section, e.name))
    return {entry.name: entry for entry in ours}


def sections(known: Mapping[str, Entry]) -> dict[str, list[Entry]]:
    """Section -> its techniques."""
    found: dict[str, list[Entry]] = {}
    for entry in known.values():
        found.setdefault(entry.card.section, []).append(entry)
    return found


# Techniques


def technique_page(entry: Entry, known: Mapping[str, Entry], pairs: Pairs) -> str:
    """One technique: what its card, docstring and settings say, and what it goes with. What is empty is left out."""
    card = entry.card
    first, _, rest = entry.about.partition("\n\n")
    section = f"[{card.section}](index.md#{slug(card.section)})"
    facts = {"Paper": card.paper, "Claim": card.claim, "Saves": card.saves, "Costs": card.costs}
    settings = [(f"`{s.name}`", kind(s), "" if s.default is ... else f"`{value(s.default)}`", prose(s.about))
                for s in entry.settings]  # fmt: skip
    says = slot_docstrings(entry)
    slots = [(f"`{slot}`", SLOTS[slot], card.phase.get(slot, ""), prose(says[slot])) for slot in entry.slots]
    known_facts = table(("Section", section), [(name, prose(said)) for name, said in facts.items() if said])
    parts = {
        "": "\n\n".join([f"# {entry.name}", prose(first), known_facts, in_a_recipe(entry)]),
        "What it does": docstring(rest),
        "Settings": table(("setting", "is", "default", "meaning"), settings),
        "Where it acts": table(("slot", "called", "phase", "what it does there"), slots),
        "With others": with_others(entry, known, pairs),
        "Source and tests": checked(entry),
    }  # fmt: skip
    return "\n\n".join(f"## {title}\n\n{text}" if title else text for title, text in parts.items() if text) + "\n"


def slug(title: str) -> str:
    """The anchor that mkdocs gives a title."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())


def in_a_recipe(entry: Entry) -> str:
    """The technique with its defaults, in a recipe and in Python."""
    given = {s.name: entry.card.example[s.name] if s.default is ... else s.default for s in entry.settings}
    rule = "" if "update rule" in entry.card.sets else "  adamw: {}\n"
    name = next(name for name, known in classes().items() if known == entry.name)
    line = f"  {entry.name}: {mapping(given)}"
    if len(line) > 80:
        line = "\n".join([f"  {entry.name}:", *(f"    {key}: {value(default)}" for key, default in given.items())])
    return (
        f"```yaml\ntechniques:\n{rule}{line}\n```\n\n"
        f"These are its defaults: `{entry.name}: {{}}` is the same, and so is `scrimp.{name}()` in Python."
    )


def slot_docstrings(entry: Entry) -> dict[str, str]:
    """Slot -> what the technique's method says of itself."""
    tree = ast.parse((ROOT / "src" / f"{entry.module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    kind = next(name for name, known in classes().items() if known == entry.name)
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind)
    return {n.name: ast.get_docstring(n) or "" for n in body if isinstance(n, ast.FunctionDef) and n.name in SLOTS}


def with_others(entry: Entry, known: Mapping[str, Entry], pairs: Pairs) -> str:
    """Clashes, shared slots, and what the model must offer."""
    card, others = entry.card, [name for name in known if name != entry.name]
    clashes = [f"- {link(other)}: {reason}" for other in others if (reason := pairs.reason(entry.name, other))]
    shared = [(link(other), f"`{slot}`", said) for other in others if not pairs.reason(entry.name, other)
              for slot, said in pairs.shared(entry.name, other).items()]  # fmt: skip
    made = pairs.made[entry.name]
    lines = [
        f"Needs a model with {listed(card.needs)}." if card.needs else "",
        f"Trains only {listed(card.trains)}, and what other tuning methods train; the rest is frozen."
        if card.trains else "",
        f"May stand twice in a recipe when the patterns in `{card.scope}` are disjoint (default `{scope(made)}`)."
        if card.scope else "",
        "Clashes with:\n\n" + "\n".join(clashes) if clashes else "",
        "Shares a slot with:\n\n" + table(("technique", "slot", "order"), shared) if shared else "",
        "It goes with all others; see [which go together](pairs.md)." if len(clashes) < len(others) else "",
    ]  # fmt: skip
    return "\n\n".join(line for line in lines if line)


def checked(entry: Entry) -> str:
    """What tests hold, and when a plan proposes it."""
    card, test = entry.card, f"tests/maths/test_{entry.name}.py"
    lines = [
        f"With `{mapping(card.neutral)}` a run equals one without it, bit for bit." if card.neutral is not None else "",
        f"On {listed(card.emulated)} it is emulated: right numbers, no time saved." if card.emulated else "",
        "`scrimp plan --fit` proposes it when memory does not suffice"
        + (f", with {' or '.join(f'`{mapping(r)}`' for r in card.remedies)}." if any(card.remedies) else ".")
        if card.remedies else "",
        f"Its source is `src/{entry.module.replace('.', '/')}.py`"
        + (f", and its mathematics is tested in `{test}`." if (ROOT / test).exists() else "."),
    ]  # fmt: skip
    return " ".join(line for line in lines if line)


def catalogue_page(known: Mapping[str, Entry]) -> str:
    """All techniques by the survey's sections."""
    found = sections(known)
    parts = [
        "# The catalogue",
        f"The {len(known)} techniques, by the sections of [A Survey on Efficient Training of Transformers]"
        "(https://arxiv.org/abs/2302.01107). [Which go together](pairs.md) has all pairs.",
    ]
    for section, members in found.items():
        rows = [(link(e.name), prose(e.about.split("\n", 1)[0].rstrip(".")), prose(e.card.saves), prose(e.card.costs),
                 prose(e.card.paper)) for e in members]  # fmt: skip
        parts += [f"## {section}", table(("technique", "is", "saves", "costs", "paper"), rows)]
    empty = [section for section in SECTIONS if section not in found]
    if empty:
        parts.append(f"These sections of the survey have no technique yet: {', '.join(empty)}.")
    return "\n\n".join(parts) + "\n"


# All of it


def outside(name: str) -> str:
    """A file of the repository's root as a page, with its links into `docs/` as a page has them."""
    return (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")


def pages() -> dict[str, str]:
    """Path in `docs/` -> text."""
    known = entries()
    pairs = Pairs(known)
    fixed = {
        "techniques/index.md": catalogue_page(known),
        "techniques/pairs.md": pairs_page(known, pairs),
        "contributing.md": outside("CONTRIBUTING.md"),
        "changelog.md": outside("CHANGELOG.md"),
    }
    return fixed | {f"techniques/{name}.md": technique_page(entry, known, pairs) for name, entry in known.items()}


def write(docs: Path) -> None:
    """Write what changed, and delete pages of techniques that are gone."""
    made = pages()
    for path in (docs / "techniques").glob("*.md"):
        if f"techniques/{path.name}" not in made:
            path.unlink()
    for name, text in made.items():
        path = docs / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def navigation(known: Mapping[str, Entry]) -> list[Any]:
    """The techniques' part of the navigation."""
    by_section = [{title: [{e.name: f"techniques/{e.name}.md"} for e in members]}
                  for title, members in sections(known).items()]  # fmt: skip
    return [{"The catalogue": "techniques/index.md"}, {"Which go together": "techniques/pairs.md"}, *by_section]


def on_config(config: Any) -> Any:
    """mkdocs: put every technique into the navigation."""
    made = navigation(entries())
    config["nav"] = [{"Techniques": made} if "Techniques" in item else item for item in config["nav"]]
    return config


def on_pre_build(config: Any) -> None:
    """mkdocs: write the pages before it looks for them."""
    write(Path(config["docs_dir"]))


def on_post_build(config: Any) -> None:
    """mkdocs: say how much was built."""
    site = Path(config["site_dir"])
    print(f"{len([p for p in site.rglob('*.html') if p.name != '404.html'])} pages in {site}")


if __name__ == "__main__":
    write(ROOT / "docs")
