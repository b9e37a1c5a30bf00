"""Tables of README and docs, from `evidence/` and from the code. `python benchmarks/tables.py` writes them; a test
compares."""

from __future__ import annotations

import importlib
import json
import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).parents[1]
PAGES = (
    ROOT / "README.md",
    *(page for place in ("", "guides") for page in sorted((ROOT / "docs" / place).glob("*.md"))),
)
FOLDERS: Final = {
    "gpt2": ("GPT-2", "transformer"), "llama": ("Llama", "transformer"), "mistral": ("Mistral", "transformer"),
    "qwen2": ("Qwen2", "transformer"), "qwen3": ("Qwen3", "transformer"), "bert": ("BERT", "transformer"),
    "roberta": ("RoBERTa", "transformer"), "xlm-roberta": ("XLM-RoBERTa", "transformer"),
    "vit-mae": ("ViTMAE", "masked_autoencoder"), "vit": ("ViT", "vision"), "bart": ("BART", "encoder_decoder"),
    "clip": ("CLIP", "two_towers"),
}  # fmt: skip
"""Beginning of a case -> the folder, and the model that it is read as."""
MARK = re.compile(r"<!-- ([a-z0-9-]+)-table -->\n(.*?)<!-- /\1-table -->", re.DOTALL)


def evidence(name: str) -> Any:
    """A file of `evidence/`."""
    return json.loads((ROOT / "evidence" / f"{name}.json").read_text())


def demo() -> str:
    """What `scrimp demo` measured."""
    found = evidence("demo")
    lines = [
        "| | techniques | held-out loss | training s | tokens | tokens/s | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["runs"]:
        lines.append(
            f"| {row['name']} | {', '.join(row['techniques'])} | {row['loss']:.3f} | {row['training_seconds']:.0f} "
            f"| {row['tokens']:,} | {row['tokens_per_second']:,.0f} | {row['peak_bytes'] / 2**20:,.0f} MiB |"
        )
    machine = f"{found['environment']['processor']}, {found['environment']['threads']} threads"
    return "\n".join(
        [*lines, "", f"One run of `scrimp demo` on {machine}, torch {found['environment']['torch']}, one seed."]
    )


def peers(workload: str) -> str:
    """What `make bench-peers` measured."""
    sys.path.insert(0, str(ROOT / "benchmarks" / "peers"))
    from table import markdown  # pyright: ignore[reportMissingImports]

    return markdown(evidence("peers")[workload]["rows"])


def keys(properties: dict[str, Any], prefix: str = "") -> list[str]:
    """A line of a table for each setting of a JSON schema: key, default, meaning."""
    lines: list[str] = []
    for name, found in properties.items():
        default = json.dumps(found["default"]) if found.get("default") not in (None, "") else ""
        about = " ".join(found.get("description", "").split()).replace("|", "\\|")
        choices = ", ".join(found.get("enum", ()))
        if choices and not any(choice in about for choice in found["enum"]):
            about = f"{about} One of {choices}.".strip()
        lines.append(f"| `{prefix}{name}` | {default and f'`{default}`'.replace('|', chr(92) + '|')} | {about} |")
    return lines


def recipe_keys() -> str:
    """Every key of a recipe."""
    from scrimp.schema import schema

    lines = ["| key | default | meaning |", "|---|---|---|"]
    for name, found in schema()["properties"].items():
        lines += keys({name: {**found, "default": found.get("default") if "properties" not in found else None}})
        lines += keys(found.get("properties", {}), f"{name}.")
        if name == "groups":
            lines += keys(found["additionalProperties"]["properties"], "groups.PATTERN.")
    return "\n".join(lines)


def part_keys(key: str, group: str) -> str:
    """Every setting of our own models, tasks or data sets: first what all have, then a table for each."""
    from scrimp.registry import BUILT_IN
    from scrimp.schema import schema

    found = [each["properties"] for each in schema()["properties"][key]["anyOf"][1:]]
    rows = {name: keys(settings, f"{key}.") for name, settings in zip(BUILT_IN[group], found, strict=True)}
    common = [row for row in next(iter(rows.values())) if all(row in others for others in rows.values())]
    head = ["| key | default | meaning |", "|---|---|---|"]
    parts = ["\n".join([f"All {group}:", "", *head, *common])]
    for name, own in rows.items():
        rest = [row for row in own if row not in common]
        parts.append("\n".join([f"`{name}`:", "", *head, *rest] if rest else [f"`{name}` has no others."]))
    return "\n\n".join(parts)


def instruct() -> str:
    """What tuning on instructions did to a small model that was rounded to 4 bits once."""
    found = evidence("instruct")
    before, after, data = found["before"], found["after"], found["data"]
    lines = ["| held-out answers | loss, nats a token | perplexity |", "|---|---|---|"]
    for name, score in (("before", before), ("after", after)):
        lines.append(f"| {name} | {score['loss']:.3f} | {score['perplexity']:.1f} |")
    steps, tokens = len(found["losses"]), found["recipe"]["batch"] * found["recipe"]["data"]["context"]
    minutes = found["seconds"]["training"] / 60
    machine = f"{found['about']['environment']['processor']}, {found['threads']} thread"
    about = (
        f"{steps} steps of {tokens:,} tokens, {minutes:.1f} minutes on {machine} that others used too; one seed, "
        f"{data['held_out_targets']:,} held-out tokens. {found['about']['model']}"
    )
    return "\n".join([*lines, "", about])


def parity() -> str:
    """How far outputs are from those of transformers, at most, over the cases of a family."""
    found = evidence("parity")
    families: dict[str, list[dict[str, float]]] = {}
    for case, row in found["rows"].items():
        family = next(name for name in FOLDERS if case.startswith(name))
        families.setdefault(family, []).append(row)
    lines = ["| folder | model here | cases | read | written |", "|---|---|---|---|---|"]
    for family, rows in families.items():
        read, written = (max(row[key] for row in rows) for key in ("read", "written"))
        lines.append(f"| {FOLDERS[family][0]} | `{FOLDERS[family][1]}` | {len(rows)} | {read:.1e} | {written:.1e} |")
    about = (
        f"Largest difference of outputs, float32, small models with random weights in every part; "
        f"transformers {found['about']['transformers']}, torch {found['about']['environment']['torch']}."
    )
    return "\n".join([*lines, "", about])


def pairs() -> str:
    """What the recipes for pairs learned."""
    lines = ["| recipe | weights | held out | metric | before | after |", "|---|---|---|---|---|---|"]
    rows = evidence("task_runs")["runs"]
    for name in ("bart-docstrings", "bart-denoise", "clip-emoji"):
        row = rows[name]
        for metric, before in row["before"].items():
            about = f"| `{name}` | {row['parameters']:,} | {row['held_out']:,} | {metric}"
            lines.append(f"{about} | {before:.3f} | {row['after'][metric]:.3f} |")
    return "\n".join(lines)


def task_runs() -> str:
    """A run of every task."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from task_rows import markdown  # pyright: ignore[reportMissingImports]

    return markdown(evidence)


def presets() -> str:
    """Every preset and what it sets."""
    from scrimp.models.presets import PRESETS

    lines = [f"| `{name}` | {', '.join(f'{k} {v}' for k, v in set_.items())} |" for name, set_ in PRESETS.items()]
    return "\n".join(["| preset | sets |", "|---|---|", *lines])


def parameters() -> str:
    """The names of the parameters of our Transformer, blocks written as `*`."""
    from scrimp.models.presets import PRESETS
    from scrimp.models.transformer import TransformerConfig

    lines = ["| presets | parameters |", "|---|---|"]
    for kind in ("gpt-1m", "llama-1m"):
        model = TransformerConfig(**{**PRESETS[kind], "vocab": 8, "context": 8}).build()
        names = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name, _ in model.named_parameters())
        lines.append(f"| `{kind.split('-')[0]}-...` | {', '.join(f'`{name}`' for name in names)} |")
    return "\n".join(lines)


def names() -> str:
    """The public names of the library."""
    import scrimp
    from scrimp.registry import classes

    lines = ["| name | is |", "|---|---|"]
    for name in scrimp.__all__:
        lines.append(f"| `{name}` | {getattr(scrimp, name).__doc__.strip().splitlines()[0]} |")
    return "\n".join([*lines, f"| {', '.join(f'`{name}`' for name in sorted(classes()))} | The techniques. |"])


def plans() -> str:
    """How far plans were from runs."""
    rows = evidence("plan")["rows"].values()
    lines = ["| | recipes | median error | 90th percentile | largest |", "|---|---|---|---|---|"]
    names = {"live": "live tensors", "resident": "resident memory", "step": "seconds of a step"}
    for key, name in names.items():
        sound = [row for row in rows if key != "step" or row["clean"] >= 2]
        lines.append(line(name, [row["planned"][key] / row[key] for row in sound]))
    for other in ("deepspeed", "accelerate"):
        lines.append(line(f"{other}'s estimate of memory", [row["others"][other] / row["live"] for row in rows]))
    return "\n".join(lines)


def line(name: str, ratios: list[float]) -> str:
    """A row of errors, in percent."""
    off = sorted(100 * abs(ratio - 1) for ratio in ratios)
    most = off[min(len(off) - 1, round(0.9 * len(off)))]
    return f"| {name} | {len(off)} | {statistics.median(off):.2f} % | {most:.2f} % | {off[-1]:.2f} % |"


def catalogue() -> str:
    """What a comparison of the whole catalogue found."""
    found = evidence("catalogue")
    lines = ["| | planned memory, time | measured memory, time | loss | verdict |", "|---|---|---|---|---|"]
    base = found["arms"][0]
    for arm in found["arms"]:
        planned, seen = arm["planned"], arm["summary"]
        memory, time = (planned[key] / base["planned"][key] for key in ("memory", "seconds"))
        change = f"{seen['difference']:+.3f} ± {(seen['interval'][1] - seen['interval'][0]) / 2:.3f}"
        loss = f"{seen['loss']:.3f}" if arm is base else change
        measured = f"{seen['memory']:.2f}, {seen['time']:.2f} | {loss} | {seen['verdict']}"
        lines.append(f"| `{arm['name']}` | {memory:.2f}, {time:.2f} | {measured} |")
    seeds = len(found["seeds"])
    steps = found["recipe"]["duration"]
    about = f"{seeds} seeds, {steps}s, {', '.join(base['techniques'])} as the baseline; ratios to it."
    return "\n".join([*lines, "", about])


def sections() -> str:
    """The techniques by section of the survey."""
    from scrimp.registry import catalogue

    found: dict[str, list[str]] = {}
    for entry in catalogue().values():
        found.setdefault(entry.card.section, []).append(f"`{entry.name}`")
    lines = [f"| {section} | {', '.join(sorted(names))} |" for section, names in sorted(found.items())]
    return "\n".join(["| section of the survey | techniques |", "|---|---|", *lines])


def tasks() -> str:
    """What every technique does on every task; reasons are numbered."""
    rows = evidence("tasks")["rows"]
    columns, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("task", "technique"))
    found = {(row["technique"], row["task"]): row for row in rows}
    reasons: dict[str, int] = {}

    def cell(name: str, task: str) -> str:
        row = found[name, task]
        if row["verdict"] == "trains":
            return "✓"
        reason = row["reason"] if row["verdict"] == "refused" else f"Fails: {row['reason']}"
        return f"{'no' if row['verdict'] == 'refused' else '✗'} {reasons.setdefault(reason, len(reasons) + 1)}"

    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    lines += [f"| `{name}` | " + " | ".join(cell(name, task) for task in columns) + " |" for name in names]
    return "\n".join([*lines, "", *(f"{number}. {reason}" for reason, number in reasons.items())]).rstrip()


def thrifty() -> str:
    """What the thrifty recipe reached, and what its parts did."""
    from scrimp.significance import paired

    found = evidence("thrifty")
    runs = {"AdamW loop": found["base"], "thrifty recipe": found["thrifty"]}
    lines = ["| | tokens | held-out loss | bits a byte | seconds | peak memory |", "|---|---|---|---|---|---|"]
    for name, seeds in runs.items():
        loss, bits, seconds, memory = (statistics.fmean(run[key] for run in seeds)
                                       for key in ("loss", "bits_per_byte", "seconds", "peak_bytes"))  # fmt: skip
        low, high = (edge(run["loss"] for run in seeds) for edge in (min, max))
        tokens = seeds[0].get("tokens") or seeds[0]["curve"][-1][0]
        lines.append(f"| {name} | {tokens:,} | {loss:.3f} ({low:.3f} - {high:.3f}) | {bits:.3f} | {seconds:.0f} "
                     f"| {memory / 1e6:.0f} MB |")  # fmt: skip
    ratio, live, machine = found["ratio"], found["live_bytes"], found["environment"]
    off = paired(*([run["loss"] for run in found[side]] for side in ("thrifty", "base")))
    lines += [
        "",
        f"{len(found['base'])} seeds each, {machine['processor']}, {machine['threads']} threads, "
        f"torch {machine['torch']}, "
        f"bfloat16 products, SCRIMP_ALLOCATOR=default. Paired, the losses differ by {off.mean:+.3f} "
        f"[{off.low:+.3f}, {off.high:+.3f}]{'' if off.seen else ': no difference seen'}. "
        f"The recipe takes {1 / ratio['seconds']:.2f} of the time "
        f"({ratio['seconds']:.1f} times sooner). Its live tensors take {ratio['live']:.2f} of the memory "
        f"({live['thrifty'] / 1e6:.0f} of {live['loop'] / 1e6:.0f} MB). Its process takes {ratio['process']:.2f}, most "
        f"of which is torch itself: an idle process has {found['idle_bytes'] / 1e6:.0f} MB, and of what lies beyond "
        f"it takes {ratio['beyond_idle']:.2f}.",
    ]
    own = found["thrifty"][0]
    lines += ["", "| left out | held-out loss | seconds | peak memory |", "|---|---|---|---|"]
    for name, run in {"nothing": own, **found["without"]}.items():
        lines.append(f"| {name} | {run['loss']:.3f} | {run['seconds']:.0f} | {run['peak_bytes'] / 1e6:.0f} MB |")
    about = "One seed each, with as many tokens. Everything: the AdamW loop. Muon: AdamW at the best of three rates."
    return "\n".join([*lines, "", about])


def vision() -> str:
    """What `benchmarks/vision.py` measured."""
    lines = [
        "| run | weights | before | after | steps | images | seconds | of the processor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = evidence("vision")["rows"]
    for name, row in rows.items():
        before, after = (f"{100 * x['accuracy']:.1f} %" if "accuracy" in x else f"loss {x['loss']:.3f}"
                         for x in (row["before"], row["after"]))  # fmt: skip
        seconds = f"{row['seconds']:.0f} | {row['processor_seconds']:.0f}"
        lines.append(f"| {name} | {row['parameters']:,} | {before} | {after} | {row['steps']} | {row['images']:,} "
                     f"| {seconds} |")  # fmt: skip
    machine = next(iter(rows.values()))["about"]["environment"]
    about = f"Accuracy or loss on held-out images, one seed, one thread of {machine['processor']}"
    return "\n".join([*lines, "", f"{about}, torch {machine['torch']}."])


def finetune() -> str:
    """What fine-tuning a small encoder reached."""
    lines = [
        "| recipe | trained weights | steps | seconds | accuracy before | after | TF-IDF and logistic regression |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = evidence("finetune")
    for name, row in rows.items():
        shares = [f"{100 * found['accuracy']:.1f} %" for found in (row["before"], row["after"], row["linear"])]
        lines.append(
            f"| `{name}` | {row['trained']:,} | {row['steps']} | {row['seconds']:,.0f} | {' | '.join(shares)} |"
        )
    machine = next(iter(rows.values()))["environment"]
    about = f"One run each on {machine['processor']}, threads: {machine['threads']}, beside other work."
    return "\n".join([*lines, "", f"{about} `benchmarks/finetune.py` measures them."])


def other(file: str, name: str) -> str:
    """A table whose writer is in a file beside this one."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    return getattr(importlib.import_module(file), name)()


WRITERS: Final[dict[str, Callable[[], str]]] = {
    "demo": demo, "recipe": recipe_keys, "model": lambda: part_keys("model", "models"),
    "data": lambda: part_keys("data", "datasets"), "task": lambda: part_keys("task", "tasks"), "presets": presets,
    "parameters": parameters, "names": names, "plan": plans, "catalogue": catalogue, "thrifty": thrifty,
    "tasks": tasks, "instruct": instruct, "pairs": pairs, "parity": parity, "finetune": finetune,
    "sections": sections, "vision-results": vision, "task-runs": task_runs,
    **{name: partial(other, "tables_data", name) for name in ("pruning", "crossing", "importance", "flip", "mae")},
    **{name: partial(other, "tables_computation", name.replace("-", "_"))
       for name in ("computation", "optimizers", "deep", "sparsity", "slimming", "growth", "autoprog", "together",
                    "token-masking")},
    **{name: partial(other, "tables_attention", name.replace("-", "_"))
       for name in ("attention", "attention-chart", "attention-machines", "attention-memory")},
    **{name: partial(other, "tables_memory", name) for name in ("memory", "largest", "offloading")},
    **{name: partial(other, "tables_sparse", name.replace("-", "_")) for name in ("spgemm", "two-four")},
    **{name: partial(other, "tables_machines", name) for name in ("machines", "accelerators")},
    **{name: partial(other, "tables_parallel", name.replace("-", "_"))
       for name in ("parallel", "parallel-memory", "parallel-clusters", "parallel-killed", "pipeline",
                    "pipeline-charts")},
}  # fmt: skip


def rendered(text: str) -> str:
    """A page with every marked table written anew."""

    def table(match: re.Match[str]) -> str:
        name = match[1]
        body = WRITERS[name]() if name in WRITERS else peers({"a16k": "A16k"}.get(name, name))
        return f"<!-- {name}-table -->\n{body}\n<!-- /{name}-table -->"

    return MARK.sub(table, text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rendered(page.read_text()))
