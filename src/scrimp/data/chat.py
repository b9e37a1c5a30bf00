"""Conversations as text: by the chat template of a tokenizer's folder, or plainly.

A template is a Jinja program that came with a model, hence it runs in Jinja's sandbox, which lets it build text and
nothing else. It gets no clock, so that the same conversation is the same text every day; those that ask for today's
date then fall back to a fixed one. Plainly, a conversation is

    <end>User: question\\n\\nAssistant: answer<end>

where <end> is the end-of-text token, and a system's message comes first as `System: ...`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from scrimp.data.tokenizer import Tokenizer, bytes_tokenizer
from scrimp.errors import UserError

Messages = Sequence[Mapping[str, str]]
"""Each with `role` (system, user, assistant or another that the template knows) and `content`."""
SPECIAL: Final = ("bos_token", "eos_token", "unk_token", "pad_token")
JINJA: Final = "chat_template.jinja"
CONFIG: Final = "tokenizer_config.json"


class CannotRenderError(ValueError):
    """A conversation that the template refuses, or whose answers cannot be found in its text."""


@dataclass(frozen=True)
class Chat:
    """How conversations become text.

    Attributes:
        end: text of the end-of-text token.
        template: Jinja; the plain form when empty.
        special: texts of the special tokens that a template may name, such as `bos_token`.
    """

    end: str
    template: str = ""
    special: Mapping[str, str] = field(default_factory=dict[str, str])

    def text(self, messages: Messages, ask: bool = False) -> str:
        """The text of a conversation.

        Args:
            ask: end it where an assistant's answer begins.
        Raises:
            CannotRenderError: if the template refuses it.
        """
        if not self.template:
            return self._plainly(messages, ask)
        template = self._compiled
        from jinja2 import TemplateError

        try:
            return template.render(
                messages=list(messages), add_generation_prompt=ask, tools=None, documents=None, **self.special
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise CannotRenderError(f"the chat template refuses it: {error}") from None

    def answers(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        """The text, and from where to where the assistant's answers are in it, with what ends each.

        Raises:
            CannotRenderError: if there is none, or the template writes earlier turns otherwise once later ones follow.
        """
        whole = self.text(messages)
        found: list[tuple[int, int]] = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before, through = self.text(messages[:i], ask=True), self.text(messages[: i + 1])
                if not (whole.startswith(through) and through.startswith(before)):
                    raise CannotRenderError("the chat template changes earlier turns, so its answers cannot be told")
                found.append((len(before), len(through)))
        if not found:
            raise CannotRenderError("has no answer of an assistant")
        return whole, found

    def _plainly(self, messages: Messages, ask: bool) -> str:
        parts: list[str] = []
        for message in messages:
            answer = message["role"] == "assistant"
            parts.append(f"{message['role'].capitalize()}: {message['content']}" + (self.end if answer else "\n\n"))
        return self.end + "".join(parts) + ("Assistant:" if ask else "")

    @cached_property
    def _compiled(self) -> Any:
        """The template, compiled as `transformers` does.

        Raises:
            UserError: if Jinja is not installed, or the template is no template.
        """
        try:
            from jinja2 import TemplateError, TemplateSyntaxError, nodes
            from jinja2.ext import Extension, loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise UserError("jinja2 is not installed.", "data.template", "pip install 'scrimp[data]'.") from None

        class Generation(Extension):
            """`{% generation %}` marks answers; here they are found otherwise, and it is just its content."""

            tags = {"generation"}  # noqa: RUF012

            def parse(self, parser: Any) -> Any:
                line = next(parser.stream).lineno
                body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
                return nodes.Scope(body, lineno=line)

        def refuse(message: str) -> None:
            raise TemplateError(message)

        made = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        made.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
        made.globals["raise_exception"] = refuse
        try:
            return made.from_string(self.template)
        except TemplateSyntaxError as error:
            raise UserError(f"the chat template is not one: {error}.", "data.template", "Use `plain`.") from None


@dataclass(frozen=True)
class ChatTokenizer(Tokenizer):
    """A tokenizer that knows how conversations are written."""

    chat: Chat = field(default_factory=lambda: Chat(""))

    def prompted(self, text: str) -> list[int]:
        """Ids with which an answer to a user's message begins."""
        return self.encode(self.chat.text([{"role": "user", "content": text}], ask=True))

    def special_ids(self) -> dict[str, int] | None:
        """Ids of the special tokens, as config.json calls them; None where texts begin with our end-of-text token."""
        if not self.chat.template:
            return None
        found: dict[str, int] = {}
        for name in ("bos_token", "eos_token"):
            i = self.inner.token_to_id(self.chat.special.get(name, ""))
            if i is not None:
                found[f"{name}_id"] = i
        return found

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, and what else `AutoTokenizer` needs."""
        super().save(folder)
        special = self.chat.special
        if self.chat.template:
            (folder / JINJA).write_text(self.chat.template, encoding="utf-8")
        else:
            special = {"bos_token": self.chat.end, "eos_token": self.chat.end}
        # Without a class, transformers takes the family's own and with it another way of splitting text.
        said = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                "model_input_names": ["input_ids", "attention_mask"], **special}  # fmt: skip
        (folder / CONFIG).write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def open_tokenizer(place: str, end: str = "", template: str = "") -> ChatTokenizer:
    """A tokenizer with its chat template.

    Args:
        place: `bytes`, a tokenizer.json, or a folder that has one.
        end: the end-of-text token; when empty, that which the folder's tokenizer_config.json names, or a usual one.
        template: `plain`, the path of a Jinja file, or empty for the folder's own, if it has one.
    Raises:
        UserError: if there is no such tokenizer or template.
    """
    if place == "bytes":
        plain = bytes_tokenizer()
        found = ChatTokenizer(plain.inner, plain.end, plain.raw)
        said: dict[str, Any] = {}
        folder = None
    else:
        path = Path(place).expanduser()
        folder = path if path.is_dir() else path.parent
        said = _said(folder / CONFIG)
        special = _special(said)
        found = ChatTokenizer.read(path, end or special.get("eos_token", ""))
        assert isinstance(found, ChatTokenizer)
    word = str(found.inner.id_to_token(found.end))
    text = _template(folder, said, template)
    return replace(found, chat=Chat(word, text, _special(said) | {"eos_token": word}))


def prompted(tokenizer: Any, text: str) -> list[int]:
    """Ids with which a text begins that a model shall continue: an answer, where the tokenizer knows conversations."""
    begin = getattr(tokenizer, "prompted", None)
    return begin(text) if begin is not None and text else [tokenizer.end, *tokenizer.encode(text)]


def _said(path: Path) -> dict[str, Any]:
    """What a tokenizer_config.json says."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"is not valid JSON: {error}.", str(path)) from None
    return found if isinstance(found, dict) else {}


def _special(said: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens, which stand there as texts or as `{"content": text}`."""
    given = {name: said.get(name) for name in SPECIAL}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in given.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str) and text}


def _template(folder: Path | None, said: Mapping[str, Any], wanted: str) -> str:
    if wanted == "plain":
        return ""
    if wanted:
        path = Path(wanted).expanduser()
        if not path.is_file():
            raise UserError(f"there is no template `{wanted}`.", "data.template", "Use plain, or a Jinja file.")
        return path.read_text(encoding="utf-8")
    if folder is not None and (folder / JINJA).is_file():
        return (folder / JINJA).read_text(encoding="utf-8")
    given = said.get("chat_template")
    if isinstance(given, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
        given = named.get("default")
    return given if isinstance(given, str) else ""
