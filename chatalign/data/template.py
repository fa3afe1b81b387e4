"""What a chat template can take, and rendering through it; found by rendering, never by the model's name.

A template without a place for system messages, tools or tool results gets them as text, so that nothing is lost
silently: the system text before the first user turn, the tools' JSON in the system message, calls as
``<tool_call>`` text of the assistant, results as ``<tool_response>`` text of the user (the Hermes convention).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jinja2

from chatalign.data.rows import Message, Messages, Tools
from chatalign.errors import TemplateError

_PROBE = "Probe7Zq"
_BRACKETED = re.compile(r"<.+>|\[.+\]")
_REFUSALS = (jinja2.TemplateError, TypeError, KeyError, ValueError)


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, with what rendering showed that it takes."""

    tokenizer: Any

    @property
    def source(self) -> str:
        """The Jinja text; of several named templates the default one."""
        template = self.tokenizer.chat_template
        return template.get("default", "") if isinstance(template, dict) else str(template)

    def render_all(self, conversations: Sequence[Messages]) -> Sequence[str | None]:
        """The texts of conversations without tools, in one call; None for each where one of them is refused."""
        if not conversations:
            return []
        try:
            return self.tokenizer.apply_chat_template(list(conversations), tokenize=False)
        except _REFUSALS:
            return [None] * len(conversations)

    def render(self, messages: Messages, *, tools: Tools | None = None, add_generation_prompt: bool = False) -> str:
        """The text of `messages`; raises TemplateError with the template's own complaint."""
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=add_generation_prompt, tokenize=False
            )
        except _REFUSALS as error:
            roles = ", ".join(message["role"] for message in messages)
            raise TemplateError(f"the chat template refuses turns of {roles}: {error}; change the rows or it") from None

    def _shows(self, messages: Messages, tools: Tools | None = None) -> bool:
        try:
            return _PROBE in self.render(messages, tools=tools)
        except TemplateError:
            return False

    @cached_property
    def control_tokens(self) -> frozenset[str]:
        """The added tokens that the template writes around a system or user turn: who may write one makes turns.

        Bracketed ones only: some tokenizers have white space and line breaks as added tokens.
        """
        turns: Messages = [{"role": "system", "content": _PROBE}, {"role": "user", "content": _PROBE}]
        try:
            text = self.render(turns if self.takes_system else turns[1:])
        except TemplateError:
            return frozenset()
        added = (token.content for token in self.tokenizer.added_tokens_decoder.values())
        return frozenset(token for token in added if _BRACKETED.fullmatch(token) and token in text)

    @cached_property
    def takes_system(self) -> bool:
        """Whether a system message is in the rendered text."""
        return self._shows([{"role": "system", "content": _PROBE}, {"role": "user", "content": "x"}])

    @cached_property
    def takes_tools(self) -> bool:
        """Whether tools are in the rendered text."""
        schema = {"name": _PROBE, "description": "x", "parameters": {"type": "object", "properties": {}}}
        tool = {"type": "function", "function": schema}
        return bool(re.search(r"\btools\b", self.source)) and self._shows([{"role": "user", "content": "x"}], [tool])

    @cached_property
    def takes_tool_calls(self) -> bool:
        """Whether an assistant's tool calls are in the rendered text."""
        if "tool_calls" not in self.source:
            return False
        call = {"type": "function", "id": "call00001", "function": {"name": _PROBE, "arguments": {}}}
        turns: Messages = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        return self._shows(turns)

    @cached_property
    def takes_tool_role(self) -> bool:
        """Whether the template names the tool role and shows a tool's result."""
        if not re.search(r"""['"](tool|ipython)['"]""", self.source):
            return False
        call = {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": {}}}
        turns: Messages = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": _PROBE, "name": "f", "tool_call_id": "call00001"},
        ]
        return self._shows(turns)

    def adapt(
        self, messages: Messages, *, tools: Tools | None = None, first_supervised: int = 0
    ) -> tuple[Messages, Tools | None, int]:
        """Messages, tools and first supervised index in the form that this template takes."""
        calls = any("tool_calls" in message or message["role"] == "tool" for message in messages)
        native_calls = not calls or (self.takes_tool_calls and self.takes_tool_role)
        if tools and not (self.takes_tools and native_calls):
            messages, first_supervised = _into_system(messages, _tools_text(tools), first_supervised)
            tools = None
        elif tools:
            tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
        if calls:
            messages, first_supervised = (
                (_with_call_ids(messages), first_supervised)
                if native_calls
                else _calls_as_text(messages, first_supervised)
            )
        if messages[0]["role"] == "system" and not self.takes_system:
            messages, first_supervised = _system_into_user(messages), max(first_supervised - 1, 0)
        return messages, tools, first_supervised


def _tools_text(tools: Tools) -> str:
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        f"You can call these tools:\n<tools>\n{listed}\n</tools>\n"
        'To call one, answer with <tool_call>\n{"name": …, "arguments": {…}}\n</tool_call>.'
    )


def _into_system(messages: Messages, text: str, first_supervised: int) -> tuple[Messages, int]:
    if messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]], first_supervised
    shifted = first_supervised + 1 if first_supervised else 0
    return [{"role": "system", "content": text}, *messages], shifted


def _system_into_user(messages: Messages) -> Messages:
    system, user, *rest = messages
    return [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]


def _calls_as_text(messages: Messages, first_supervised: int) -> tuple[Messages, int]:
    """Tool calls as text of the assistant's turn; results, and a user turn right after them, as one user turn."""
    made: Messages = []
    first = 0
    for i, message in enumerate(messages):
        if i == first_supervised:
            first = len(made)
        content, role = message["content"], message["role"]
        if "tool_calls" in message:
            calls = [json.dumps(call["function"], ensure_ascii=False) for call in message["tool_calls"]]
            texts = [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
            content = "\n".join(([content] if content.strip() else []) + texts)
        elif role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        if role == "user" and made and made[-1]["role"] == "user":
            made[-1] = {"role": "user", "content": f"{made[-1]['content']}\n{content}"}
        else:
            mark = {"train": False} if "train" in message else {}
            made.append({"role": role, "content": content, **mark})
    return made, first


def _with_call_ids(messages: Messages) -> Messages:
    """Calls and results numbered (nine characters, as Mistral's templates ask), in order."""
    made: Messages = []
    open_ids: list[str] = []
    number = 0
    for message in messages:
        turn: Message = dict(message)
        if "tool_calls" in message:
            calls = []
            for call in message["tool_calls"]:
                number += 1
                calls.append({**call, "id": f"call{number:05d}"})
            turn["tool_calls"] = calls
            open_ids = [call["id"] for call in calls]
        elif message["role"] == "tool":
            turn["tool_call_id"] = open_ids.pop(0) if open_ids else f"call{number:05d}"
        made.append(turn)
    return made
