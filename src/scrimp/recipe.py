"""A recipe: everything a run is, as YAML or as a frozen dataclass.

Reading gathers every fault of a recipe and raises them together, each with its path, the nearest valid names and
what to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, cast

import yaml

from scrimp import rules
from scrimp.errors import RecipeError, UserError, did_you_mean
from scrimp.models.presets import kind_of
from scrimp.reading import Loader, dump_techniques, not_yaml, override, plain, read_techniques, validated
from scrimp.registry import BUILT_IN, component, component_name, modules
from scrimp.technique import Technique

GROUPS: Final = {"model": "models", "data": "datasets", "task": "tasks"}
"""Sections of a recipe that name a part, and where such parts are registered."""
STRICT: Final[dict[str, Any]] = {"extra": "forbid", "use_attribute_docstrings": True}


@dataclass(frozen=True, kw_only=True)
class Validate:
    """When and on how much the held-out loss is measured."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    every: str | float = 0.1
    """Interval; 0 for never."""
    batches: int = 8
    """Batches of the fixed validation set; 0 for none."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When snapshots are written and which are kept."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    every: str | float = 0.25
    """Interval; 0 for only at the end."""
    keep: int = 2
    """How many of the newest are kept."""
    best: bool = False
    """Also keep the one with the lowest validation loss."""
    adapter_only: bool = False
    """Leave frozen weights out; they are read again from the folder that `model.from` names."""


@dataclass(frozen=True, kw_only=True)
class Log:
    """Where metrics go besides metrics.jsonl."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    tensorboard: bool = True
    """Write TensorBoard events into the run folder."""
    wandb: str = ""
    """Weights & Biases project; empty for none."""


@dataclass(frozen=True, kw_only=True)
class Stop:
    """When to stop before the end."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    patience: int = 0
    """Validations without a lower loss before stopping; 0 for never."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What is generated when a run ends."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    prompt: str = ""
    """Start of the text."""
    tokens: int = 64
    """How many tokens are generated; 0 for none."""
    temperature: float = 0.8
    """0 takes the likeliest token."""


@dataclass(frozen=True, kw_only=True)
class GroupRule:
    """Multipliers for the parameters that a pattern matches."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    lr: float = 1.0
    """Multiplier of the learning rate; 0 freezes."""
    decay: float = 1.0
    """Multiplier of the weight decay."""


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """How many ranks stand along each axis, where several train together."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    data: int = 0
    """Share the samples of a batch; 0 for all ranks that other axes leave."""
    context: int = 1
    """Share the tokens of each sample."""
    tensor: int = 1
    """Share each layer."""
    pipeline: int = 1
    """Share the blocks."""
    replica: int = 1
    """Groups of `data` ranks that each hold all weights, where `zero` shards over `data`."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a run is. `(recipe, stage, decisions) -> run` is a function."""

    model: Any = "gpt-4m"
    """A preset, or a mapping: `preset`, `from` (a Hugging Face folder), `name` (somebody's own), and options."""
    data: Any = field(default_factory=dict[str, Any])
    """The data set: `name` (default text) and its settings."""
    task: Any = "causal-lm"
    """The task, or a mapping with `name` and its settings."""
    techniques: tuple[Technique, ...] = ()
    """What is trained with. Order does not matter."""
    batch: int = 16
    """Samples a step, over all ranks and micro-batches."""
    duration: str = "1000 step"
    """How long: steps, tokens, samples or epochs."""
    seed: int = 0
    """Weights, data order and dropout follow from it."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "float32"
    """Of weights: float32, float64 or bfloat16."""
    mesh: Mesh = field(default_factory=Mesh)
    """How many ranks share what, under `scrimp launch` or `torchrun`."""
    groups: dict[str, GroupRule] = field(default_factory=dict[str, GroupRule])
    """pattern of parameters -> multipliers of learning rate and decay."""
    validate: Validate = field(default_factory=Validate)
    """When and on how much the held-out loss is measured."""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    """When snapshots are written and which are kept."""
    log: Log = field(default_factory=Log)
    """Where metrics go besides metrics.jsonl."""
    stop: Stop = field(default_factory=Stop)
    """When to stop before the end."""
    sample: Sample = field(default_factory=Sample)
    """What is generated when a run ends."""
    out: str = "runs"
    """Folder in which the run's own folder is made."""
    name: str = ""
    """Of the run's folder, which is numbered when it is taken; `run-` and the update rules when empty."""

    def __post_init__(self) -> None:
        """Resolve names and mappings; raise every fault at once."""
        faults: list[UserError] = []
        values = _resolve(self, faults)
        if faults:
            raise RecipeError(faults)
        for key, value in (values | {"techniques": tuple(self.techniques)}).items():
            object.__setattr__(self, key, value)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a YAML file, with `key=value` overrides.

        Raises:
            UserError: if the file cannot be read.
            RecipeError: with every fault of its content.
        """
        path = Path(path)
        try:
            raw: Any = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
        except OSError as error:
            fix = "The recipe's file comes first, then what is changed in it." if "=" in path.name else ""
            raise UserError(f"cannot read the recipe: {error.strerror}.", str(path), fix) from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise not_yaml(error, path) from None
        if not isinstance(raw, dict):
            raise UserError("is not a recipe: the top level must be a mapping.", str(path), "Write `key: value` lines.")
        return cls.read(words(cast(Any, raw)), overrides)

    @classmethod
    def read(cls, raw: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
        """From a mapping as YAML gives it, with `key=value` overrides."""
        values, faults = override(raw, overrides)
        known = [f.name for f in fields(cls)]
        for key in set(values) - set(known):
            hint = did_you_mean(key, [*known, "steps", *modules()], listed=0)
            if key in modules():
                hint = f"`{key}` is a technique: put it under `techniques:`."
            faults.append(UserError(f"unknown key `{key}`.", key, hint))
            del values[key]
        techniques, more = read_techniques(values.get("techniques", {}))
        faults += more
        values["techniques"] = techniques
        try:
            recipe = cls(**values)
        except RecipeError as error:
            # A technique that could not be read may well have been the update rule.
            faults += [f for f in error.faults if not (more and f.what == rules.NO_RULE)]
            recipe = None
        if recipe is None or faults:
            raise RecipeError(faults)
        return recipe

    def dump(self) -> dict[str, Any]:
        """As a mapping that `read` reads back to an equal recipe."""
        out: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "techniques":
                out[f.name] = dump_techniques(value)
            elif f.name in ("model", "task", "data"):
                out[f.name] = {"name": component_name(GROUPS[f.name], value), **plain(value)}
            elif f.name == "groups":
                out[f.name] = {pattern: plain(rule) for pattern, rule in value.items()}
            else:
                out[f.name] = plain(value)
        return out

    def yaml(self) -> str:
        """As YAML text."""
        return yaml.safe_dump(self.dump(), sort_keys=False, allow_unicode=True)


def _resolve(recipe: Recipe, faults: list[UserError]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, group in GROUPS.items():
        values[key] = _component(group, key, getattr(recipe, key), faults)
    for f in fields(Recipe):
        value = getattr(recipe, f.name)
        if f.name in values or f.name == "techniques":
            continue
        kind = {"groups": dict[str, GroupRule], "validate": Validate, "checkpoint": Checkpoint, "log": Log,
                "stop": Stop, "sample": Sample, "mesh": Mesh, "batch": int, "seed": int}.get(f.name, str)  # fmt: skip
        if f.name == "duration" and isinstance(value, int | float):
            value = f"{value} step" if float(value).is_integer() else str(value)
        values[f.name] = validated(kind, value, f.name, faults)
    faults += rules.broken(values, recipe.techniques)
    return values


def words(mapping: Mapping[Any, Any]) -> dict[str, Any]:
    """A mapping whose keys are words, as YAML does not promise."""
    return {str(key): value for key, value in mapping.items()}


def _component(group: str, where: str, value: Any, faults: list[UserError]) -> Any:
    if is_dataclass(value):
        return value
    word = value if isinstance(value, str) else ""
    if word:
        value = {"preset" if group == "models" else "name": word}
    if not isinstance(value, Mapping):
        faults.append(UserError(f"must be a name or a mapping, not {value!r}.", where))
        return None
    settings = words(cast(Any, value))
    given = dict(settings)
    try:
        name = kind_of(settings, where) if group == "models" else str(settings.get("name", next(iter(BUILT_IN[group]))))
        settings.pop("name", None)
        kind = component(group, name, where)
        expand = getattr(kind, "expand", None)
        if expand is not None:
            settings = expand(settings, where)
    except UserError as error:
        found = error.faults if isinstance(error, RecipeError) else [error]
        faults += [_hinted(_placed(fault, where, given), where, word) for fault in found]
        return None
    return validated(kind, settings, where, faults)


def _placed(error: UserError, where: str, given: Mapping[str, Any]) -> UserError:
    """An error about a file that a part names: its place in the recipe, and the file."""
    if error.where == where or error.where.startswith(f"{where}."):
        return error
    texts = {key: value for key, value in given.items() if isinstance(value, str) and value}
    # A path may have been cleaned since: ./folder is folder.
    named = [key for key, text in texts.items() if error.where.startswith((text, str(Path(text))))]
    place = ".".join([where, *named[:1]])
    return UserError(error.what, f"{place} ({error.where})" if error.where else place, error.fix)


def _hinted(error: UserError, where: str, word: str) -> UserError:
    """An error about an unknown name: the name may have been meant as a path."""
    key = {"data": "source", "model": "from"}.get(where)
    if key is None or not word or not ("/" in word or Path(word).expanduser().exists()):
        return error
    return UserError(error.what, error.where, f"For a path write `{where}: {{{key}: {word}}}`.")
