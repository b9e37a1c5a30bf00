"""The command line: a thin layer over the verbs. torch is imported only by the commands that need it."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from scrimp.arguments import (
    RunPath,
    Words,
    accelerated,
    asked,
    axes_of,
    check_mesh,
    load,
    machine_of,
    numbers,
    out_of,
    within,
)
from scrimp.cli_runs import eval_, export, generate, import_, report, score
from scrimp.errors import LostError, UserError

app = typer.Typer(
    help="Train Transformers on less: less computation, less data, less memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipePath = Annotated[Path | None, typer.Argument(help="A recipe (YAML).", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def main() -> None:
    """Run the command line; a user's error ends it with its message and exit code 2."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"scrimp{rank}: {error}", file=sys.stderr)
        if isinstance(error, LostError):
            # What is left of connections to a rank that has ended may keep this one from ending.
            sys.stdout.flush()
            sys.stderr.flush()
            if rank:
                # What watches the ranks should first see the end of the one that failed.
                time.sleep(1)
            os._exit(error.code)
        raise SystemExit(error.code) from None


@app.command()
def train(
    recipe: RecipePath = None,
    overrides: Words = None,
    resume: Annotated[Path | None, typer.Option(help="Continue this run, or from this checkpoint, exactly.")] = None,
    extend: Annotated[str | None, typer.Option(help="With --resume: go on for `2000 step` more.")] = None,
    start: Annotated[
        Path | None, typer.Option("--from", help="Start a new run from a run's weights, or a peft folder.")
    ] = None,
    mesh: Annotated[
        str | None, typer.Option(help="With --resume: another mesh of ranks, such as `data=2,tensor=2`.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Start even if memory will not suffice.")] = False,
) -> None:
    """Train or fine-tune a recipe, or resume a run."""
    from scrimp.allocator import lean
    from scrimp.launching import end_with_parent, restarted
    from scrimp.progress import Progress

    lean()
    end_with_parent()
    loaded = asked(recipe, overrides, resume, start)
    if (again := restarted(out_of(loaded, resume))) is not None:
        # What was asked for is in the run already, an extension too.
        loaded = start = extend = None
        resume = again
    from scrimp.rules import notes
    from scrimp.training import train as run

    for line in notes(loaded) if loaded is not None and start is None else ():
        typer.echo(line, err=True)
    axes = None if mesh is None else axes_of(mesh)
    # Of several ranks the first one shows what all do.
    first = os.environ.get("RANK", "0") == "0"
    with Progress(sys.stdout) if first else nullcontext(lambda event, fields: None) as view:
        result = run(loaded, resume=resume, extend=extend, mesh=axes, start=start, observe=view, force=force)
    if result.reason == "interrupted":
        ranks = os.environ.get("WORLD_SIZE", "1")
        verb = "train" if ranks == "1" else f"launch --ranks {ranks}"
        typer.echo(f"Saved. Go on with: scrimp {verb} --resume {result.folder}")
        raise typer.Exit(130)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def launch(
    context: typer.Context,
    ranks: Annotated[int, typer.Option(help="Processes to start, each with a device of its own.", min=1)] = 1,
    restarts: Annotated[
        int, typer.Option(help="How often all ranks go on from a checkpoint when one fails.", min=0)
    ] = 0,
    logs: Annotated[Path | None, typer.Option(help="Folder for what ranks other than the first print.")] = None,
) -> None:
    """Train on several devices of this machine: what else is given goes to `scrimp train`."""
    from scrimp.launching import launch as start

    command = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    given = command.make_context("scrimp train", list(context.args)).params
    # What no rank could begin with is said once, before there are any.
    loaded = asked(given["recipe"], given["overrides"], given["resume"], given["start"])
    check_mesh(loaded, given["resume"], given["mesh"], ranks)
    if not start(ranks, context.args, restarts, logs):
        raise typer.Exit(130)


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).")],
    overrides: Words = None,
    machine: Annotated[
        str, typer.Option(help="here, a machine such as A100-80, an accelerator such as elsa.")
    ] = "here",
    kept: Annotated[
        float | None,
        typer.Option(help="Of an accelerator: share of the keys that a query keeps, if the recipe does not say it."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with plots.", show_default=False)] = None,
    ranks: Annotated[int, typer.Option(help="Devices that share each batch.", min=1)] = 1,
    fit: Annotated[str, typer.Option(help="Search what makes it fit into so much memory, such as 16GB.")] = "",
    each: Annotated[bool, typer.Option("--each", help="Plan it with every technique of the catalogue.")] = False,
    layouts: Annotated[bool, typer.Option("--layouts", help="Search how --ranks devices should share it.")] = False,
    json_: AsJson = False,
) -> None:
    """Say what a run will need, before it runs: bytes, FLOPs, seconds."""
    from scrimp import fitting, planview
    from scrimp.limits import size_of
    from scrimp.machines.machine import machine as find
    from scrimp.planning import plan as make

    if layouts and (fit or each or html is not None or accelerated(machine)):
        raise UserError("--layouts goes with --ranks, --machine and --json only.", "plan", "Leave the others out.")
    if layouts and ranks == 1:
        raise UserError("--layouts searches how several devices share a run.", "plan", "Say how many: --ranks 8.")
    if sum((bool(fit), each, html is not None)) > 1 or (ranks > 1 and (fit or each)):
        fix = "Call it once for each."
        raise UserError("--fit, --each and --html do not go together, nor the first two with --ranks.", "plan", fix)
    loaded = load(recipe, overrides)
    if accelerated(machine):
        if fit or each or html is not None:
            raise UserError("--fit, --each and --html know no accelerators.", "--machine", "Leave them out.")
        from scrimp.machines.accelerators import planned
        from scrimp.machines.accelerators.architecture import accelerator

        attended = planned.attention(make(loaded, find("here"), ranks=ranks), accelerator(machine), kept)
        typer.echo(json.dumps(attended.as_json(), indent=1) if json_ else attended.text())
        return
    on = machine_of(machine)
    if kept is not None:
        fix = "Name an accelerator with --machine, such as elsa, or leave it out."
        raise UserError(f"`{machine}` is no accelerator: it computes all keys.", "--kept", fix)
    if fit:
        fitted = fitting.fit(loaded, on, size_of(fit), say=watch)
        typer.echo(json.dumps(planview.fit_json(fitted), indent=1) if json_ else planview.fitted(fitted))
        return
    if layouts:
        from scrimp import layouts as search

        shared = search.search(loaded, on, ranks, say=watch)
        typer.echo(json.dumps(search.as_json(shared), indent=1) if json_ else search.text(shared))
        return
    made = make(loaded, on, ranks=ranks)
    if each:
        rows = fitting.each(loaded, on, say=watch)
        typer.echo(json.dumps(planview.tips_json(rows), indent=1) if json_ else planview.tips(made, rows))
        return
    if html is not None:
        html.write_text(planview.page(made), encoding="utf-8")
    typer.echo(json.dumps(planview.as_json(made), indent=1) if json_ else planview.text(made))


@app.command()
def compare(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).")],
    overrides: Words = None,
    with_: Annotated[str, typer.Option("--with", help="Techniques in question; default: the recipe's own.")] = "",
    everything: Annotated[bool, typer.Option("--all", help="The whole catalogue.")] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A further set, such as lora+recompute.")] = None,
    kinds: Annotated[str, typer.Option(help="Of alone, all, without, set.")] = "alone,all,without,set",
    seeds: Annotated[int, typer.Option(help="Runs of each arm.", min=1)] = 3,
    rates: Annotated[str, typer.Option("--lrs", help="Factors of the learning rate, tried by every arm.")] = "1",
    same_time: Annotated[bool, typer.Option("--same-time", help="Give every arm the baseline's seconds.")] = False,
    until_loss: Annotated[float | None, typer.Option(help="Tell time and tokens to this loss.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; a finished run in it is never repeated.")] = None,
) -> None:
    """Measure techniques on your own model, data and machine: alone, together, and each left out."""
    from scrimp import arms
    from scrimp.compareview import text
    from scrimp.comparing import Comparison, interval

    loaded = interval(load(recipe, overrides))
    sets = [part.split("+") for part in set_ or []]
    named = list(filter(None, with_.split(","))) + [name for part in sets for name in part if with_]
    techniques = arms.in_question(loaded, named, everything)
    made, left_out = arms.arms(loaded, techniques, sets, kinds.split(","))
    folder = out or Path("comparisons") / recipe.stem
    mode = "same-time" if same_time else "same-steps"
    whole = Comparison(folder, made, left_out, range(seeds), numbers(rates), mode, until_loss, typer.echo)
    typer.echo("\n" + text(whole.run()))
    typer.echo(f"\nAll of it is in {folder}; a page of it: scrimp report {folder}")


@app.command()
def validate(
    what: Annotated[str, typer.Argument(help="machines: the simulator of accelerators.")] = "machines",
    json_: AsJson = False,
) -> None:
    """Compare the simulator of accelerators with what was published; exit 1 if a row is off that should not be."""
    if what != "machines":
        raise UserError(f"there is nothing to validate for `{what}`.", "validate", "Known: machines.")
    from scrimp.machines.accelerators.validation import validate as run

    rows = run()
    if json_:
        typer.echo(json.dumps({"rows": [row.as_json() for row in rows]}, indent=1))
    else:
        from rich.console import Console

        from scrimp.machines.accelerators.views import validation

        screen = Console()
        Console(width=max(screen.width, 150), highlight=False).print(validation(rows))
    if failed := [row.reference.name for row in rows if row.failed]:
        typer.echo(f"Outside of what is allowed, and should not be: {', '.join(failed)}.", err=True)
        raise typer.Exit(1)


@app.command()
def simulate(
    run: RunPath,
    machine: Annotated[str, typer.Option(help="An accelerator by name, such as elsa, or its description: a YAML.")],
    baseline: Annotated[str, typer.Option(help="Another one to compare with, such as v100.")] = "",
    sequences: Annotated[int, typer.Option(help="Held-out sequences, one after another.", min=1)] = 4,
    json_: AsJson = False,
) -> None:
    """Run a trained model's attention through a simulated accelerator: cycles, bytes, energy."""
    from scrimp.machines.accelerators.architecture import accelerator

    on, over = accelerator(machine), accelerator(baseline) if baseline else None
    from scrimp.machines.accelerators.collect import collected
    from scrimp.machines.accelerators.report import simulate as simulated
    from scrimp.machines.accelerators.views import simulation

    traces = collected(run, sequences)
    report, other = simulated(traces, on), simulated(traces, over) if over else None
    if json_:
        found = {"report": report.as_json(), "baseline": other.as_json() if other else None}
        typer.echo(json.dumps(found | {"speedup": report.speedup(other) if other else None}, indent=1))
        return
    kept = sum(trace.kept for trace in traces) / sum(t.heads * t.queries * t.keys for t in traces)
    asked = f"{len(traces)} attention layers of {sequences} held-out sequences, {kept:.1%} of the scores kept,"
    typer.echo(simulation(report, other, asked))


@app.command()
def probe() -> None:
    """Measure this machine once, for plans. Takes about a minute; best on an idle machine."""
    from scrimp.allocator import lean
    from scrimp.probing import probe as measure

    lean()
    rates = measure(lambda what: typer.echo(f"measuring {what} ..."))
    typer.echo("\n".join(f"{dtype:9} products {rate / 1e9:8,.0f} GFLOP/s" for dtype, rate in rates.flops().items()))
    typer.echo(
        f"bandwidth {rates.bandwidth() / 1e9:.1f} GB/s; an operator {rates.overhead * 1e6:.1f} us; "
        f"a step takes {rates.factor:.2f} of the sum of its operators"
    )


@app.command("list")
def list_(json_: AsJson = False) -> None:
    """List all techniques by section."""
    from scrimp.listing import described, sections
    from scrimp.registry import catalogue

    entries = catalogue().values()
    typer.echo(json.dumps([described(entry) for entry in entries], indent=1) if json_ else sections(entries))


@app.command()
def show(name: Annotated[str, typer.Argument(help="A technique's name.")], json_: AsJson = False) -> None:
    """Show what a technique does, costs, claims, sets and needs, and its settings."""
    from scrimp.listing import described, whole
    from scrimp.registry import entry as find

    entry = find(name)
    typer.echo(json.dumps(described(entry), indent=1) if json_ else whole(entry))


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from scrimp.schema import schema as build

    typer.echo(json.dumps(build(), indent=1))


for name, command in {"export": export, "import": import_, "score": score, "eval": eval_, "generate": generate,
                      "report": report}.items():  # fmt: skip
    app.command(name)(command)


@app.command()
def demo(
    steps: Annotated[int, typer.Option(help="Steps of the plain run; 0 chooses for this machine.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the runs and the plot.")] = Path("runs/demo"),
) -> None:
    """Train a small GPT twice, plainly and thriftily, and compare. Slower machines take fewer steps."""
    within("--steps", steps, "0 chooses for this machine.")
    from scrimp.demo import demo as run

    run(out, steps)


def watch(what: str) -> None:
    """Show on a terminal what is planned now."""
    if sys.stderr.isatty():
        print(f"\r\033[Kplanning {what[:100]}\033[K", end="\r", file=sys.stderr, flush=True)
