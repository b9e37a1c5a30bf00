"""The table of docs/tasks.md with a run of every task, from all the files of `evidence/` that hold one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True)
class Entry:
    """What a row says that the evidence does not hold.

    Attributes:
        recipe: its name, also that of its row of evidence.
        file: of `evidence/`.
        data: in words.
        start: from where the weights are.
        metrics: name in the evidence -> name in the table. Those called a share are shown in percent.
    """

    task: str
    recipe: str
    file: str
    data: str
    start: str
    metrics: dict[str, str]


SCRATCH: Final = "from scratch"
MINILM: Final = "MiniLM"
LIBRARY: Final = "Python's library"
FUNCTIONS: Final = "functions of Python's library"
LOSS: Final = {"loss": "loss"}
ACCURACY: Final = {"accuracy": "accuracy %"}
ENTRIES: Final = (
    Entry("causal-lm", "thrifty", "task_runs", LIBRARY, SCRATCH, LOSS),
    Entry("causal-lm, answers", "smollm2-lora", "instruct", FUNCTIONS, "SmolLM2, by LoRA", LOSS),
    Entry("masked-lm", "bert-stdlib", "task_runs", LIBRARY, SCRATCH, LOSS | ACCURACY),
    Entry("seq2seq", "bart-docstrings", "task_runs", FUNCTIONS, SCRATCH, LOSS | ACCURACY),
    Entry("denoise", "bart-denoise", "task_runs", LIBRARY, SCRATCH, ACCURACY | {"gap_accuracy": "of gaps %"}),
    Entry("masked-image", "mae-fashion", "vision", "Fashion-MNIST", SCRATCH, LOSS),
    Entry("contrastive", "clip-emoji", "task_runs", "emoji and their names", SCRATCH,
          {"zero_shot": "zero-shot %", "image_to_text": "recall at 1 %"}),
    Entry("classify, texts", "minilm-sst2", "finetune", "SST-2", MINILM, ACCURACY),
    Entry("classify, texts", "minilm-sst2-lora", "finetune", "SST-2", f"{MINILM}, by LoRA", ACCURACY),
    Entry("classify, texts", "minilm-banking77", "finetune", "BANKING77", MINILM, ACCURACY),
    Entry("classify, images", "vit-fashion", "vision", "Fashion-MNIST", SCRATCH, ACCURACY),
    Entry("regress", "minilm-code-size", "task_runs", FUNCTIONS, MINILM, {"spearman": "Spearman", "loss": "loss"}),
    Entry("embed", "minilm-code-search", "task_runs", FUNCTIONS, MINILM, {"recall_at_1": "recall at 1 %"}),
)  # fmt: skip


def markdown(evidence: Callable[[str], Any]) -> str:
    """The table.

    Args:
        evidence: name of a file of `evidence/` -> its content.
    """
    lines = [
        "| task | recipe | data | weights | steps | before | after | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in ENTRIES:
        row = found(entry, evidence(entry.file))
        if row is None:
            continue
        weights, steps, seconds = row
        before, after = scores(entry, evidence(entry.file), "before"), scores(entry, evidence(entry.file), "after")
        about = f"| {entry.task} | `{entry.recipe}` | {entry.data} | {weights / 1e6:,.1f} M {entry.start}"
        lines.append(f"{about} | {steps:,} | {before} | {after} | {seconds:,.0f} |")
    return "\n".join([*lines, *against(evidence("task_runs")["runs"])])


def rows_of(entry: Entry, content: Any) -> Any:
    """The rows of a file by recipe; one that has a single run is that run."""
    if entry.file == "instruct":
        return {entry.recipe: content}
    return content if entry.file == "finetune" else content["rows" if entry.file == "vision" else "runs"]


def found(entry: Entry, content: Any) -> tuple[int, int, float] | None:
    """Weights, steps and seconds of a run, or None if it was not measured."""
    row = rows_of(entry, content).get(entry.recipe)
    if row is None:
        return None
    if entry.file == "instruct":
        return row["weights"], len(row["losses"]), row["seconds"]["training"]
    return row["parameters"], row["steps"], row["seconds"]


def scores(entry: Entry, content: Any, side: str) -> str:
    """A run's metrics before or after it."""
    row = rows_of(entry, content)[entry.recipe][side]
    parts: list[str] = []
    for key, name in entry.metrics.items():
        share = name.endswith(" %")
        parts.append(f"{name.removesuffix(' %')} {100 * row[key]:.1f} %" if share else f"{name} {row[key]:.3f}")
    return ", ".join(parts)


def against(rows: dict[str, Any]) -> list[str]:
    """What TF-IDF does on the same rows, where that was measured."""
    said = {"minilm-code-size": ("spearman", "a Spearman correlation of {:.3f}"),
            "minilm-code-search": ("recall_at_1", "a recall at 1 of {:.3f}")}  # fmt: skip
    parts = [f"{words.format(rows[name]['tfidf'][key])} where `{name}` is trained"
             for name, (key, words) in said.items() if name in rows]  # fmt: skip
    return ["", f"On the same held-out rows TF-IDF has {' and '.join(parts)}."] if parts else []
