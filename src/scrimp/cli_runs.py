"""Commands of the command line about data and runs that are there: they train nothing for good."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from scrimp.arguments import RunPath, Words, load, within
from scrimp.errors import UserError


def export(
    run: RunPath,
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[str, typer.Option(help="Format: hf (a Hugging Face folder), or peft (its adapters alone).")] = "hf",
) -> None:
    """Write a trained run as a folder that other libraries load."""
    if to not in ("hf", "peft"):
        raise UserError(f"there is no format `{to}`.", "--to", "Known: hf, peft.")
    from scrimp import inference

    write = inference.export if to == "hf" else inference.export_adapters
    typer.echo(f"Wrote {write(run, out)}")


def import_(
    file: Annotated[Path, typer.Argument(help="A .gguf file that holds a Llama.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Write a GGUF file as a Hugging Face folder, for recipes to start from."""
    from scrimp.models.gguf_llama import import_gguf

    made = import_gguf(file, out, dtype)
    types = ", ".join(f"{count} of {name}" for name, count in made.types.most_common())
    typer.echo(f"Wrote {made.folder}: {made.weights:,} weights; tensors were {types}.")
    typer.echo("What quantization rounded away does not come back.")


def score(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML); its duration is that of each run.")],
    overrides: Words = None,
    by: Annotated[str, typer.Option(help="el2n, grand, forgetting, prototypes or perplexity.")] = "el2n",
    runs: Annotated[int, typer.Option(help="Short runs that are averaged.", min=1)] = 1,
    start: Annotated[Path | None, typer.Option("--from", help="A trained run to score by, or to begin with.")] = None,
    clusters: Annotated[int, typer.Option(help="Of prototypes; 0 chooses.", min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="Parquet file; runs it has are not repeated.")] = None,
) -> None:
    """Score every item of the training set once, for `prune` to choose by."""
    import numpy as np

    from scrimp.progress import Progress
    from scrimp.scoring.score import score as make

    path = out or Path(f"{recipe.stem}.{by}.parquet")
    with Progress(sys.stdout) as view:
        made = make(load(recipe, overrides), by, path, runs, start, clusters, typer.echo, view)
    low, middle, high = np.quantile(made.mean, (0, 0.5, 1))
    typer.echo(f"Wrote {path}: {made.runs.shape[1]:,} items, {len(made.runs)} runs; lowest {low:.4g}, median "
               f"{middle:.4g}, highest {high:.4g}.\nTrain on a part: prune.scores={path} prune.keep=0.7")  # fmt: skip


def eval_(
    run: RunPath,
    batches: Annotated[int, typer.Option(help="0 for the whole held-out set.")] = 0,
    data: Annotated[list[str] | None, typer.Option(help="Other data: a path, or key=value of data settings.")] = None,
) -> None:
    """Measure a run on its held-out data, or on all of other data."""
    within("--batches", batches, "0 is the whole held-out set.")
    from scrimp.inference import evaluate

    for key, value in evaluate(run, batches, data or ()).items():
        typer.echo(f"{key}: {value:.6g}")


def generate(
    run: RunPath,
    prompt: Annotated[str, typer.Option(help="Start of the text.")] = "",
    tokens: Annotated[int, typer.Option(help="How many tokens to add.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
) -> None:
    """Generate text with a run."""
    within("--tokens", tokens)
    within("--temperature", temperature, "0 takes the likeliest token.")
    within("--seed", seed)
    from scrimp.inference import continue_text

    typer.echo(continue_text(run, prompt, tokens, temperature, seed))


def report(
    paths: Annotated[list[Path], typer.Argument(help="Folders of runs and of comparisons.", metavar="FOLDER")],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("report.html"),
) -> None:
    """Write one HTML page about runs and comparisons: tables, plots, recipes."""
    from scrimp.report import report as write

    typer.echo(f"Wrote {write(paths, out)}")
