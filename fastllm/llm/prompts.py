"""Conversations as prompts: the chat template that a tokenizer comes with, or a plain one.

A template writes special tokens (`<|im_start|>` and the like) between the messages. What users write is never read as
one, so that nobody can end their own turn and speak as someone else.
"""

import datetime
import json
import re
from pathlib import Path

from fastllm.llm import require

ROLES = ("system", "user", "assistant")
PLAIN = """{%- for message in messages -%}
{{ message.role | capitalize }}: {{ message.content | trim }}
{% endfor -%}
{%- if add_generation_prompt -%}Assistant:{%- endif -%}"""
PLAIN_STOP = ("\nUser:", "\nSystem:")  # where a model that was not trained on this template would go on by itself
MARK = "\ue000{}\ue001"  # of the private use area: stands for a special token that is text, until the tokens are made


class ChatTemplate:
    """Messages, each {"role": "system" | "user" | "assistant", "content": text}, to a prompt.

    `source` is a Jinja template as Hugging Face has them, None the plain one. `stop` are strings that end an answer.
    Raises ValueError for a template that is not one.
    """

    def __init__(self, tokenizer, source=None):
        self.tokenizer, self.source, self.plain = tokenizer, source, source is None
        self.stop = PLAIN_STOP if self.plain else ()
        sandbox = require("jinja2.sandbox", "jinja2")  # a template comes with a model from anywhere
        loops = ["jinja2.ext.loopcontrols"]
        environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=loops)
        environment.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(PLAIN if self.plain else source)
        except require("jinja2").TemplateError as problem:
            raise ValueError(f"chat template: {problem}") from None
        self._names = {f"{role}_token": token for role, token in tokenizer.special.items()}
        spelt = [] if self.plain else sorted(special_tokens(tokenizer), key=len, reverse=True)
        self._spelt = re.compile("|".join(map(re.escape, spelt)) or r"(?!)")

    @classmethod
    def load(cls, folder, tokenizer):
        """That of a model's folder, in chat_template.jinja or in tokenizer_config.json; else the plain one."""
        folder = Path(folder)
        if (path := folder / "chat_template.jinja").exists():
            return cls(tokenizer, path.read_text("utf-8"))
        path = folder / "tokenizer_config.json"
        found = json.loads(path.read_text("utf-8")).get("chat_template") if path.exists() else None
        if isinstance(found, list):  # several, by name
            found = next((one["template"] for one in found if one.get("name") == "default"), None)
        return cls(tokenizer, found)

    def save(self, folder):
        """For `load`; nothing for the plain one."""
        if not self.plain:
            (Path(folder) / "chat_template.jinja").write_text(self.source, "utf-8")

    def render(self, messages, *, answer=True) -> str:
        """The text; with `answer`, up to where the assistant's begins. Raises ValueError for what is no conversation,
        or for an order of roles that the template refuses."""
        return "".join(text for text, _ in self._pieces(messages, answer))

    def encode(self, messages, *, answer=True) -> list[int]:
        """The tokens of `render`, with special tokens where the template has them and nowhere else."""
        ids = []
        for n, (text, special) in enumerate(self._pieces(messages, answer)):
            ids += self.tokenizer.encode(text, add_special_tokens=self.plain and n == 0, parse_special=special)
        return ids

    def _pieces(self, messages, answer):
        """[(text, whether special tokens in it are some)]: what a message has that is spelt like one is none."""
        check_messages(messages)
        spelt = []

        def mark(found):
            spelt.append(found[0])
            return MARK.format(len(spelt) - 1)

        marked = [{**m, "content": self._spelt.sub(mark, re.sub("[\ue000\ue001]", "", m["content"]))} for m in messages]
        try:
            text = self._template.render(messages=marked, add_generation_prompt=answer, **self._names)
        except require("jinja2").TemplateError as problem:
            raise ValueError(f"chat template: {problem}") from None
        parts = re.split("\ue000(\\d+)\ue001", text)
        pieces = [(spelt[int(x)], False) if n % 2 else (x, not self.plain) for n, x in enumerate(parts)]
        return [piece for piece in pieces if piece[0]]


def _refuse(why):
    raise ValueError(f"chat template: {why}")


def special_tokens(tokenizer) -> set[str]:
    """How the tokens are spelt that `encode(..., parse_special=True)` reads in a text."""
    added = tokenizer.backend.get_added_tokens_decoder().values()
    return {token.content for token in added if token.special} - {""}


def check_messages(messages):
    """Raises ValueError unless this is a list of messages, with at least one that is not the system's."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list of at least one message")
    for n, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"messages[{n}] must have a role, one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"messages[{n}] must have a content that is text")
