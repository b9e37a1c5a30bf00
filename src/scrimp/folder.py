"""A run's folder: recipe.yaml, tokenizer.json, environment.json, metrics.jsonl, TensorBoard events, checkpoints."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from scrimp import checkpoint
from scrimp.errors import UserError
from scrimp.lock import lock
from scrimp.recipe import Recipe
from scrimp.world import ALONE, World

if TYPE_CHECKING:
    from scrimp.technique import State


@dataclass
class RunFolder:
    """Where a run writes. Nothing in it is needed to compute; everything in it is needed to resume or to report."""

    path: Path
    world: World = ALONE
    """The ranks that write into it. All save checkpoints together; the first writes all else."""
    held: TextIO | None = None
    """The file whose lock keeps other writers out."""
    metrics: TextIO | None = None
    board: Any = None
    wandb: Any = None
    began: float = field(default_factory=time.time)
    step: int = 0

    @classmethod
    def create(cls, recipe: Recipe, tokenizer: Any = None, world: World = ALONE) -> RunFolder:
        """A new folder under `recipe.out`, numbered when the name is taken. The first rank makes it for all.

        Args:
            tokenizer: of the data; kept in the folder if it can be saved, so that text is generated without the corpus.
        """
        if not world.first:
            return cls(Path(world.told(None)), world)
        name = recipe.name or "-".join(["run", *(t.name for t in recipe.techniques if "update rule" in t.card.sets)])
        root = Path(recipe.out)
        for i in range(1, 100_000):
            path = root / (name if i == 1 else f"{name}-{i}")
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                raise UserError(f"cannot make the run's folder: {reason}.", str(path), "Set `out`.") from None
            folder = cls(path, world)
            if hasattr(tokenizer, "save"):
                with _writing(path / "tokenizer.json"):
                    tokenizer.save(path)
            folder.write_text("recipe.yaml", anchored(recipe).yaml())
            world.told(str(path))
            return folder
        raise UserError("there are too many runs of that name.", str(root), "Set `name`.")

    @classmethod
    def reopen(cls, place: str | Path) -> tuple[RunFolder, Recipe, State, dict[str, Any]]:
        """A run's folder, or one of its checkpoints -> folder, recipe, state, meta of the checkpoint.

        Raises:
            UserError: if there is no run or no checkpoint, or the newest one is damaged.
        """
        chosen = cls.newest(place)
        path = chosen.parent.parent
        recipe = Recipe.load(path / "recipe.yaml")
        state, meta = checkpoint.load(chosen)
        return cls(path), recipe, state, meta

    @staticmethod
    def newest(place: str | Path) -> Path:
        """The newest checkpoint of a run's folder; a checkpoint is its own.

        Raises:
            UserError: if there is no run or no checkpoint.
        """
        place = Path(place)
        if place.resolve().parent.name == "checkpoints":
            return place.resolve()
        if not (place / "recipe.yaml").is_file():
            inside = sorted(found.parent.name for found in place.glob("*/recipe.yaml"))
            fix = f"Runs in it: {', '.join(inside[:8])}." if inside else ""
            if (place / "config.json").is_file():
                fix = f"It is a Hugging Face folder: write `model: {{from: {place}}}` in a recipe."
            raise UserError("is not a run's folder: it has no recipe.yaml.", str(place), fix)
        found = checkpoint.snapshots(place / "checkpoints")
        if not found:
            raise UserError("has no checkpoint to resume from.", str(place), "Start the run again.")
        return found[-1]

    def lock(self) -> None:
        """Become the run's only writer until `close`. Readers need no lock: what they read appears whole.

        Raises:
            UserError: if another process writes into it.
        """
        if self.held is None and self.world.first:
            with _writing(self.path / "lock"):
                self.held = lock(self.path)

    def open(self, step: int, recipe: Recipe) -> None:
        """Begin writing after `step`: what an earlier process logged or saved beyond it is cut off.

        Raises:
            UserError: if another process writes into it, or the disk is full.
        """
        self.lock()
        # Others may still be reading what is cut off here.
        self.world.wait()
        if not self.world.first:
            return
        saved = self.path / "checkpoints"
        for snapshot in checkpoint.snapshots(saved):
            if snapshot.name > f"step-{step:09d}":
                checkpoint.remove(snapshot)
        # What a killed process left between two saves; a run that is at its end has no next save to remove it.
        with _writing(saved):
            checkpoint.clear(saved)
        checkpoint.prune(saved, recipe.checkpoint.keep)
        self.step = step
        path = self.path / "metrics.jsonl"
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= step]
        self.write_text("environment.json", json.dumps(environment(), indent=1))
        partial = path.with_suffix(".partial")
        with _writing(path):
            partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            os.replace(partial, path)
            self.metrics = path.open("a", encoding="utf-8")
        if recipe.log.wandb:
            self.wandb = _wandb(recipe, self.path)
        self._tensorboard = recipe.log.tensorboard

    def write(self, fields: dict[str, Any]) -> None:
        """A line of metrics, also to TensorBoard and W&B."""
        if not self.world.first:
            return
        assert self.metrics is not None
        with _writing(self.path / "metrics.jsonl"):
            self.metrics.write(json.dumps({**fields, "time": time.time() - self.began}) + "\n")
            self.metrics.flush()
        if self._tensorboard and self.board is None:
            # Imported after the first step, so that it delays no start.
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.path / "tensorboard"), purge_step=self.step + 1)
        scalars = {k: v for k, v in fields.items() if k != "step" and isinstance(v, int | float)}
        if self.board is not None:
            with _writing(self.path / "tensorboard"):
                for key, value in scalars.items():
                    self.board.add_scalar(key, value, fields["step"])
        if self.wandb is not None:
            self.wandb.log(scalars, step=fields["step"])

    def write_text(self, name: str, text: str) -> None:
        """A small file of the run."""
        if not self.world.first:
            return
        with _writing(self.path / name):
            (self.path / name).write_text(text, encoding="utf-8")

    def save(self, state: State, meta: dict[str, Any], step: int, keep: int, name: str = "") -> Path:
        """A checkpoint; older ones beyond `keep` are deleted once it is safe."""
        root = self.path / "checkpoints"
        path = checkpoint.save(root / (name or f"step-{step:09d}"), state, meta, self.world)
        if self.world.first:
            checkpoint.prune(root, keep)
        self.world.wait()
        return path

    def close(self) -> None:
        """Close what is open. All that matters was flushed, so that a full disk is no error any more."""
        for log in (self.metrics, self.board, self.held):
            if log is not None:
                with suppress(OSError):
                    log.close()
        if self.wandb is not None:
            self.wandb.finish()


def anchored(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths, so that its run is resumed and used from any working directory."""
    data, model = recipe.data, recipe.model
    source = getattr(model, "source", "")
    if hasattr(data, "anchored"):
        data = data.anchored()
    if source and Path(source).exists():
        model = replace(model, source=str(Path(source).absolute()))
    techniques = tuple(t.anchored() if hasattr(t, "anchored") else t for t in recipe.techniques)  # type: ignore[attr-defined]
    return replace(recipe, data=data, model=model, techniques=techniques)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A full or broken disk as a user's error."""
    try:
        yield
    except OSError as error:
        fix = "Checkpoints are intact. Free some space, then use --resume, or set `out` to another disk."
        raise UserError(f"cannot be written: {error.strerror or error}.", str(path), fix) from error


def _lines(path: Path) -> list[str]:
    """Complete lines of a log; a killed process may have left half a line."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [line for line in text.split("\n")[:-1] if re.fullmatch(r"\{.*\}", line)]


def _wandb(recipe: Recipe, path: Path) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "Weights & Biases is not installed.", "log.wandb", "pip install wandb, or leave it empty."
        ) from None
    return wandb.init(
        project=recipe.log.wandb, dir=str(path), name=path.name, config=recipe.dump(), id=path.name, resume="allow"
    )


def environment() -> dict[str, Any]:
    """What a report needs to know of the machine and the versions."""
    return {
        "scrimp": version("scrimp"),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "command": sys.argv,
    }


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
