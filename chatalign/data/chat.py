"""Conversations to token ids and target marks: the one place where a chat template is applied.

Every stage, the chat window and evaluation come through here, so that training and serving see the same tokens.
A *target* is a token that the model has to produce: a reply from the end of its generation prompt through its stop
token. The ids of a whole conversation are those of the template's own tokenization, but where a token would cross
from the prompt into the reply: there the text is encoded piece by piece, since serving cuts it there too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, Literal

from chatalign.data.rows import BadRow, Conversation, Message, Messages, Preference, Tools
from chatalign.data.spans import NotPrefixPreserving, Rendered, SpanFinder
from chatalign.data.template import ChatTemplate
from chatalign.data.tokens import TextEncoder
from chatalign.data.verify import verify, verify_prompt, verify_roles
from chatalign.errors import TemplateError

VERIFIED_ROWS = 64
RENDERED_ROWS = 8  # so many rows in a row that all hold the template's text are no coincidence
SAME_REPLIES_MEND = "give two different replies, or take the row out"
Supervise = Literal["assistant", "last_assistant", "all"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids, and for each token 1 where it is a target. `spans` are the targets' (first, last + 1) tokens."""

    ids: list[int]
    supervised: list[int]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A preference as ids; both replies end in the template's stop token and are targets throughout."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclass(frozen=True, slots=True)
class _Asked:
    """A conversation as the template takes it, and the turns that are targets."""

    messages: Messages
    tools: Tools | None
    turns: tuple[int, ...]
    guarded: bool


@dataclass(frozen=True, slots=True)
class _Job:
    """A rendered conversation that waits for its tokens."""

    rendered: Rendered
    asked: _Asked


def render(
    messages: Messages, tokenizer: Any, *, tools: Tools | None = None, add_generation_prompt: bool = False
) -> str:
    """The text that the template makes of `messages`, adapted to what it takes (see ChatTemplate.adapt)."""
    template = chat_encoder(tokenizer).template
    messages, tools, _ = template.adapt(messages, tools=tools)
    return template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt)


def encode_conversation(
    messages: Messages,
    tokenizer: Any,
    *,
    tools: Tools | None = None,
    supervise: Supervise = "assistant",
    first_supervised: int = 0,
) -> Encoded:
    """Ids and target marks of one conversation.

    Messages before `first_supervised` are context. Raises TemplateError where no exact marks exist in one
    rendering (the template is not prefix-preserving); ``prepare`` makes such rows into one row a reply.
    """
    row = Conversation(messages=messages, tools=tools, first_supervised=first_supervised)
    return chat_encoder(tokenizer).conversation(row, supervise)


def encode_prompt(messages: Messages, tokenizer: Any, *, tools: Tools | None = None) -> list[int]:
    """The ids of `messages` and the generation prompt: what the model is served."""
    ids = chat_encoder(tokenizer).prompts([(messages, tools)])[0]
    if isinstance(ids, BadRow):
        raise ids
    return ids


def template_stop_ids(tokenizer: Any) -> list[int]:
    """The ids of the tokens that the template ends a reply with (generation must stop at them)."""
    probe: Messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
    encoded = encode_conversation(probe, tokenizer)
    return [encoded.ids[encoded.spans[-1][1] - 1]]


def chat_encoder(tokenizer: Any) -> ChatEncoder:
    """The encoder of a tokenizer with its present template; kept, since finding out about a template costs time."""
    template = tokenizer.chat_template
    if not template:
        raise TemplateError("the tokenizer has no chat template; give model.chat_template_path")
    return _encoder(tokenizer, str(template), tuple(tokenizer.all_special_tokens), len(tokenizer))


@lru_cache(maxsize=8)
def _encoder(tokenizer: Any, template: str, special: tuple[str, ...], size: int) -> ChatEncoder:
    return ChatEncoder(tokenizer)


class ChatEncoder:
    """Encodes rows in batches for one tokenizer and its template."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer)
        self.text = TextEncoder(tokenizer, self.template.control_tokens)
        self.finder = SpanFinder(self.template, self.text)
        self.verify_rows = VERIFIED_ROWS  # how many conversations are still checked; set anew by each preparation

    def conversation(self, row: Conversation, supervise: Supervise) -> Encoded:
        """One row in one rendering; raises BadRow or TemplateError."""
        asked = self._ask(row, supervise)
        encoded = self._encode([self._job(asked, None)], supervise)[0]
        if isinstance(encoded, BadRow):
            raise encoded
        return encoded

    def conversations(self, rows: Sequence[Conversation], supervise: Supervise) -> list[list[Encoded] | BadRow]:
        """For each row its encodings: one, or one a reply where the template is not prefix-preserving."""
        asked = [self._ask(row, supervise) for row in rows]
        texts = self.finder.render_all([(one.messages, one.turns, one.tools) for one in asked])
        jobs: list[_Job] = []
        slots: list[range | BadRow] = []
        for row, one, text in zip(rows, asked, texts, strict=True):
            start = len(jobs)
            try:
                jobs += self._jobs(row, one, text, supervise)
                slots.append(range(start, len(jobs)))
            except BadRow as refused:
                slots.append(refused)
        encoded = self._encode(jobs, supervise)
        made: list[list[Encoded] | BadRow] = []
        for slot in slots:
            parts = [slot] if isinstance(slot, BadRow) else [encoded[i] for i in slot]
            bad = next((part for part in parts if isinstance(part, BadRow)), None)
            made.append(bad or [part for part in parts if isinstance(part, Encoded)])
        return made

    def pairs(self, rows: Sequence[Preference]) -> list[EncodedPair | BadRow]:
        """For each preference its prompt's and both replies' ids; the prompt's are the same on both sides."""
        sides = [
            Conversation(messages=[*row.prompt, *reply], first_supervised=len(row.prompt), tools=row.tools)
            for row in rows
            for reply in (row.chosen, row.rejected)
        ]
        encoded = self.conversations(sides, "last_assistant")
        pairs: list[EncodedPair | BadRow] = []
        for chosen, rejected in zip(encoded[::2], encoded[1::2], strict=True):
            if isinstance(chosen, BadRow) or isinstance(rejected, BadRow):
                pairs.append(chosen if isinstance(chosen, BadRow) else rejected)  # type: ignore[arg-type]
                continue
            (prompt, chosen_ids), (other_prompt, rejected_ids) = _cut(chosen[0]), _cut(rejected[0])
            if prompt != other_prompt:
                pairs.append(BadRow("chosen", "tokens cross from the prompt into the reply", "start it without spaces"))
            elif chosen_ids == rejected_ids:
                pairs.append(BadRow("rejected", "is the same as chosen in the chat template", SAME_REPLIES_MEND))
            else:
                pairs.append(EncodedPair(prompt, chosen_ids, rejected_ids))
        return pairs

    def prompts(self, prompts: Sequence[tuple[Messages, Tools | None]]) -> list[list[int] | BadRow]:
        """The ids of each prompt with its generation prompt."""
        texts: list[tuple[str, bool] | BadRow] = []
        for messages, tools in prompts:
            messages, tools, guarded = self._guarded(*self.template.adapt(messages, tools=tools)[:2])
            try:
                texts.append((self.template.render(messages, tools=tools, add_generation_prompt=True), guarded))
            except TemplateError as error:
                texts.append(BadRow("prompt", *_halves(error)))
        rendered = [text for text in texts if not isinstance(text, BadRow)]
        encoded = [ids for ids, _ in self.text.encode_spans(rendered)]
        for (text, guarded), ids in zip(rendered[: self.verify_rows], encoded, strict=False):
            verify_prompt(text, ids, self.text, guarded=guarded)
        self.verify_rows -= len(rendered[: self.verify_rows])
        found = iter(encoded)
        return [text if isinstance(text, BadRow) else next(found) for text in texts]

    def rendered_before(self, rows: Sequence[Sequence[Message]]) -> BadRow | None:
        """What is wrong with rows that all hold the template's own text: rendered again, it would stand there twice.

        A row does where its first turn starts with the token that the template starts with, or its last ends in the
        stop token. One such row is a user's words; all of at least `RENDERED_ROWS` are a file of rendered text.
        """
        opening, stop = self._own_ends
        held = [token for token in (opening, stop) if token]
        for turns in rows:
            starts = bool(opening) and turns[0]["content"].lstrip().startswith(opening)
            ends = bool(stop) and turns[-1]["content"].rstrip().endswith(stop)
            if not (starts or ends):
                return None
        if not held or len(rows) < RENDERED_ROWS:
            return None
        mend = "give the turns without it, or set data.apply_chat_template: false"
        return BadRow("messages", f"holds the chat template's own text ({' … '.join(held)}) already", mend)

    @cached_property
    def _own_ends(self) -> tuple[str, str]:
        """The special token that the template starts with and the one that ends its replies; empty where none does."""
        probe: Messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
        try:
            rendered = self.finder.find_by_rendering(probe, (1,))
        except TemplateError:
            return "", ""
        first, last = rendered.spans[0]
        target = rendered.text[first:last].rstrip()
        return self.text.special_at_start(rendered.text), self.text.special_at_end(target)

    def _guarded(self, messages: Messages, tools: Tools | None) -> tuple[Messages, Tools | None, bool]:
        if not (self.text.has_special(messages) or self.text.has_special(tools)):
            return messages, tools, False
        return self.text.guard(messages), self.text.guard(tools), True

    def _ask(self, row: Conversation, supervise: Supervise) -> _Asked:
        adapted, tools, first = self.template.adapt(
            row.messages, tools=row.tools, first_supervised=row.first_supervised
        )
        turns = _target_turns(adapted, first, supervise)
        if any("train" in turn for turn in adapted):  # our own mark, which is no template's business
            adapted = [{key: value for key, value in turn.items() if key != "train"} for turn in adapted]
        messages, tools, guarded = self._guarded(adapted, tools)
        return _Asked(messages, tools, turns, guarded)

    def _job(self, asked: _Asked, text: str | None) -> _Job:
        if not asked.turns:
            raise BadRow("messages", "has no assistant turn to learn from", "add the reply")
        return _Job(self.finder.find(asked.messages, asked.turns, asked.tools, text), asked)

    def _jobs(self, row: Conversation, asked: _Asked, text: str | None, supervise: Supervise) -> list[_Job]:
        if supervise == "all" and any("train" in turn for turn in row.messages):
            mend = "set data.supervise: assistant, or take the marks out"
            raise BadRow("messages", "marks a turn as not to be learned, and supervise: all learns it", mend)
        try:
            return [self._job(asked, text)]
        except NotPrefixPreserving as error:
            replies = _target_turns(row.messages, row.first_supervised, supervise)
            if supervise == "all" or (len(replies) == 1 and replies[0] == len(row.messages) - 1):
                raise BadRow("messages", *_halves(error)) from None
        except TemplateError as error:
            raise BadRow("messages", *_halves(error)) from None
        jobs = []
        for reply in replies:
            alone = Conversation(messages=row.messages[: reply + 1], tools=row.tools, first_supervised=reply)
            jobs += self._jobs(alone, self._ask(alone, "last_assistant"), None, "last_assistant")
        return jobs

    def _encode(self, jobs: Sequence[_Job], supervise: Supervise) -> list[Encoded | BadRow]:
        texts = [(job.rendered.text, job.asked.guarded) for job in jobs]
        found = self.text.encode_spans(texts, [job.rendered.spans for job in jobs])
        return [self._mark(job, ids, spans, supervise) for job, (ids, spans) in zip(jobs, found, strict=True)]

    def _mark(
        self, job: _Job, ids: list[int], spans: list[tuple[int, int]] | None, supervise: Supervise
    ) -> Encoded | BadRow:
        rendered, guarded = job.rendered, job.asked.guarded
        if spans is None or any(self._moves(rendered.text, start, guarded) for start, _ in rendered.spans):
            if not self.text.splits_anywhere:
                return BadRow("messages", "a token crosses from a prompt into its reply", "start it without spaces")
            ids, spans = self._by_pieces(job)
        if rendered.append_stop:
            ids.append(self.tokenizer.eos_token_id)
            spans[-1] = (spans[-1][0], len(ids))
        if self.verify_rows > 0:
            self.verify_rows -= 1
            self._verify(job, ids, tuple(spans))
        supervised = [int(supervise == "all")] * len(ids)
        for first, last in spans:
            supervised[first:last] = [1] * (last - first)
        return Encoded(ids, supervised, tuple(spans))

    def _verify(self, job: _Job, ids: list[int], spans: tuple[tuple[int, int], ...]) -> None:
        asked = job.asked
        verify_roles(self.finder, asked.messages, asked.turns, asked.tools)
        verify(job.rendered, ids, spans, self.text, guarded=asked.guarded)
        if self.finder.find_by_rendering(asked.messages, asked.turns, asked.tools) != job.rendered:
            raise TemplateError("the chat template renders a row in another way than rows of its shape; report it")

    def _moves(self, text: str, start: int, guarded: bool) -> bool:
        """Whether the prompt's last tokens change once the reply stands behind them (only near white space)."""
        before, after = text[max(start - 24, 0) : start], text[start : start + 8]
        if not (after[:1].isspace() or (before[-1:].isspace() and before[-2:-1].isspace())):
            return False
        alone = self.text.ids(before, guarded=guarded)
        return self.text.ids(before + after, guarded=guarded)[: len(alone)] != alone

    def _by_pieces(self, job: _Job) -> tuple[list[int], list[tuple[int, int]]]:
        """The conversation encoded apart at the start of each target, as serving does."""
        text = job.rendered.text
        cuts = sorted({0, len(text), *(place for span in job.rendered.spans for place in span)})
        pieces = [text[a:b] for a, b in pairwise(cuts)]
        encoded = [encoding.ids for encoding in self.text.encode(pieces, guarded=job.asked.guarded)]
        at, places = 0, {0: 0}
        for cut, piece in zip(cuts[1:], encoded, strict=True):
            at += len(piece)
            places[cut] = at
        return [id_ for piece in encoded for id_ in piece], [(places[a], places[b]) for a, b in job.rendered.spans]


def _target_turns(messages: Sequence[Message], first_supervised: int, supervise: Supervise) -> tuple[int, ...]:
    replies = (i for i, turn in enumerate(messages) if turn["role"] == "assistant" and "train" not in turn)
    turns = tuple(i for i in replies if i >= first_supervised)
    return turns[-1:] if supervise == "last_assistant" else turns


def _halves(error: TemplateError) -> tuple[str, str]:
    """A template's error as a row's problem and mend."""
    problem, _, mend = str(error).rpartition("; ")
    return problem, mend


def _cut(encoded: Encoded) -> tuple[list[int], list[int]]:
    first, last = encoded.spans[-1]
    return encoded.ids[:first], encoded.ids[first:last]
