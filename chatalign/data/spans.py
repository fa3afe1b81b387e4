"""Which characters of a rendered conversation an assistant has to produce: each reply with its stop token.

Exact for any template, by rendering: the reply to ``messages[:i]`` starts where the generation prompt of those
messages ends (so training sees what serving shows) and ends with the stop token that the template puts after turn i.
No ``{% generation %}`` markers are needed. Both renderings must be beginnings of the whole text; where one is not,
the template is not prefix-preserving and :class:`NotPrefixPreserving` is raised.

Rendering a conversation once a turn is slow, so the spans of each *shape* (the sequence of roles) are found once, on
short made-up contents, and kept as the template's literal text around slots. A row whose rendering equals the
literals with its contents in the slots takes its spans from there; any other row is rendered turn by turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chatalign.data.rows import Messages, Tools
from chatalign.data.template import ChatTemplate
from chatalign.data.tokens import TextEncoder
from chatalign.errors import TemplateError


class NotPrefixPreserving(TemplateError):
    """The template renders earlier turns in another way once later turns are there."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered conversation and its target spans (character start, end). `append_stop`: EOS goes after the text."""

    text: str
    spans: tuple[tuple[int, int], ...]
    append_stop: bool = False


def _not_a_beginning(prompt: str, text: str) -> str:
    shared = next((i for i, pair in enumerate(zip(prompt, text, strict=False)) if pair[0] != pair[1]), len(text))
    begin = max(shared - 12, 0)
    return (
        f"the chat template serves a prompt that ends in {prompt[begin:]!r} where the rendered conversation goes on "
        f"with {text[begin : shared + 20]!r}, so a reply's start is unknown; set model.chat_template_path to a "
        "template in which both agree"
    )


@dataclass(frozen=True, slots=True)
class _Shape:
    """A rendering with slots: literals[0] slot literals[1] slot …; spans as (literal, offset in it) on both ends."""

    literals: tuple[str, ...]
    spans: tuple[tuple[tuple[int, int], tuple[int, int]], ...]
    append_stop: bool


class SpanFinder:
    """Finds target spans for one template."""

    def __init__(self, template: ChatTemplate, encoder: TextEncoder) -> None:
        self.template = template
        self.encoder = encoder
        self._shapes: dict[tuple[tuple[str, ...], tuple[int, ...]], _Shape | None] = {}

    def render_all(self, rows: Sequence[tuple[Messages, tuple[int, ...], Tools | None]]) -> list[str | None]:
        """The text of each row (messages, turns, tools) whose shape is known, in one call; None for the others."""
        shaped = [i for i, row in enumerate(rows) if self._shape(*row) is not None]
        texts: list[str | None] = [None] * len(rows)
        for i, text in zip(shaped, self.template.render_all([rows[i][0] for i in shaped]), strict=True):
            texts[i] = text
        return texts

    def find(
        self, messages: Messages, turns: tuple[int, ...], tools: Tools | None = None, text: str | None = None
    ) -> Rendered:
        """The rendering of `messages` (`text`, where it is there) with the spans of the assistant `turns`."""
        shape = self._shape(messages, turns, tools)
        if shape is not None:
            rendered = _fill(shape, messages, self.template.render(messages) if text is None else text)
            if rendered is not None:
                return rendered
        return self.find_by_rendering(messages, turns, tools)

    def _shape(self, messages: Messages, turns: tuple[int, ...], tools: Tools | None) -> _Shape | None:
        if tools is not None or not turns or any(len(message) != 2 for message in messages):
            return None
        key = (tuple([message["role"] for message in messages]), turns)
        if key not in self._shapes:
            self._shapes[key] = self._learn(messages, turns)
        return self._shapes[key]

    def find_by_rendering(self, messages: Messages, turns: tuple[int, ...], tools: Tools | None = None) -> Rendered:
        """As `find`, turn by turn. Raises NotPrefixPreserving or TemplateError."""
        text = self.template.render(messages, tools=tools)
        spans = []
        append_stop = False
        for turn in turns:
            prompt = self.template.render(messages[:turn], tools=tools, add_generation_prompt=True)
            if not text.startswith(prompt):
                raise NotPrefixPreserving(_not_a_beginning(prompt, text))
            last = turn == len(messages) - 1
            upto = text if last else self.template.render(messages[: turn + 1], tools=tools)
            end, has_stop = self._stop(upto, len(prompt))
            if not has_stop and not last and (follower := self._special_at(text, len(upto))):
                end, has_stop = len(upto) + len(follower), True
                upto += follower  # GLM ends a turn by the next role's token
            if not text.startswith(upto[:end]):
                raise NotPrefixPreserving(
                    f"the chat template renders turn {turn} in another way once later turns are there; "
                    "set data.supervise: last_assistant, or give a prefix-preserving template"
                )
            if not has_stop and not last:
                raise TemplateError(
                    "the chat template puts no stop token after an assistant turn; "
                    "add {{ eos_token }} after its content"
                )
            reply = messages[turn]["content"].strip()
            if reply not in text[len(prompt) : end]:
                raise TemplateError(
                    f"the chat template leaves out a part of the reply {reply[:40]!r}; give another one"
                )
            append_stop = append_stop or not has_stop
            spans.append((len(prompt), end))
        return Rendered(text[: spans[-1][1]] if append_stop else text, tuple(spans), append_stop)

    def _stop(self, text: str, start: int) -> tuple[int, bool]:
        """Where the target that starts at `start` and is the text's last ends, and whether it ends in a stop token.

        A turn ends in special tokens, with or without white space between them. The target goes through the first
        unbroken run of these: ``<|END_RESPONSE|><|END_OF_TURN_TOKEN|>`` whole, but of ``<|end|>\\n<|endoftext|>``
        and of a token given twice only the first.
        """
        turn = text[start:].rstrip()
        run: list[str] = []
        end = start + len(turn)
        while stop := next((token for token in self.encoder.special_ids if turn.endswith(token)), None):
            spaced = run and text[start + len(turn)].isspace()
            run = [stop] if spaced or run[:1] == [stop] else [stop, *run]
            turn = turn[: -len(stop)]
            end = start + len(turn) + sum(map(len, run))
            turn = turn.rstrip()
        return end, bool(run)

    def _special_at(self, text: str, place: int) -> str | None:
        return next((token for token in self.encoder.special_ids if text.startswith(token, place)), None)

    def _learn(self, messages: Messages, turns: tuple[int, ...]) -> _Shape | None:
        slots = [f"Slot{i}Zq7" for i in range(len(messages))]
        made = [{"role": message["role"], "content": slot} for message, slot in zip(messages, slots, strict=True)]
        try:
            rendered = self.find_by_rendering(made, turns)
        except TemplateError:
            return None
        literals, ends, at = [], [], 0
        for slot in slots:
            place = rendered.text.find(slot, at)
            if place < 0 or rendered.text.count(slot) != 1:
                return None
            literals.append(rendered.text[at:place])
            at = place + len(slot)
            ends.append(at)
        literals.append(rendered.text[at:])
        starts = [0, *ends]
        spans = []
        for turn, (start, end) in zip(turns, rendered.spans, strict=True):
            if not (starts[turn] <= start <= starts[turn] + len(literals[turn]) and end >= ends[turn]):
                return None
            spans.append(((turn, start - starts[turn]), (turn + 1, end - ends[turn])))
        return _Shape(tuple(literals), tuple(spans), rendered.append_stop)


def _fill(shape: _Shape, messages: Messages, text: str) -> Rendered | None:
    """The row's rendering `text` if it is the shape with the row's contents, as they are or stripped; else None."""
    contents = [message["content"] for message in messages]
    for candidate in (contents, [content.strip() for content in contents]):
        pieces = [shape.literals[0]]
        starts = [0]
        at = len(shape.literals[0])
        for content, literal in zip(candidate, shape.literals[1:], strict=True):
            pieces += (content, literal)
            starts.append(at + len(content))
            at = starts[-1] + len(literal)
        filled = "".join(pieces)
        if filled == text or (shape.append_stop and text.startswith(filled) and not text[len(filled) :].strip()):
            spans = [(starts[a] + b, starts[c] + d) for (a, b), (c, d) in shape.spans]
            if shape.append_stop:  # EOS goes after the last word, as `_stop` has it
                filled = filled.rstrip()
                spans[-1] = (spans[-1][0], len(filled))
            return Rendered(filled, tuple(spans), shape.append_stop)
    return None
