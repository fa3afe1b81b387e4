"""The self-check of encoded conversations: decoded targets are the replies with their stop tokens, and no more.

Run on the first rows of every preparation (and on all rows in the tests), so that a template or tokenizer on which
the method fails stops the run instead of training on wrong targets.
"""

from __future__ import annotations

import unicodedata

from chatalign.data.rows import Messages, Tools
from chatalign.data.spans import Rendered, SpanFinder
from chatalign.data.tokens import TextEncoder
from chatalign.errors import TemplateError


def verify(
    rendered: Rendered,
    ids: list[int],
    spans: tuple[tuple[int, int], ...],
    encoder: TextEncoder,
    *,
    guarded: bool,
) -> None:
    """Raise TemplateError unless ids and spans are what `rendered` asks for.

    `spans` are token places (first, last + 1). Held: at most one BOS; each span decodes to its text; each ends in a
    special token that occurs once in it; the first span's prompt, encoded alone as serving does, is what precedes
    it. Text is compared without white space, case and compatibility forms, which some tokenizers don't keep.
    """
    tokenizer = encoder.tokenizer
    _refuse_two_bos(ids, encoder)
    if len(spans) != len(rendered.spans):
        raise TemplateError(f"{len(rendered.spans)} replies were rendered and {len(spans)} are marked as targets")
    for (first, last), (start, end) in zip(spans, rendered.spans, strict=True):
        wanted = encoder.unguard(rendered.text[start:end])
        target = ids[first:last]
        if not target or target[-1] not in encoder.special_ids.values() or target.count(target[-1]) != 1:
            raise TemplateError(f"the reply {wanted[-40:]!r} doesn't end in exactly one stop token; mend the template")
        append = (last - first) > 0 and rendered.append_stop and last == len(ids)
        found = tokenizer.decode(target[:-1] if append else target, skip_special_tokens=False)
        if tokenizer.unk_token_id not in target and _loose(found) != _loose(wanted):
            raise TemplateError(
                f"the targets decode to {found[:60]!r} and not to {wanted[:60]!r}; report this template"
            )
    first, start = spans[0][0], rendered.spans[0][0]
    prompt = encoder.encode([rendered.text[:start]], guarded=guarded)[0].ids  # the tokenizer's own, without the memo
    if prompt != ids[:first]:
        tail = encoder.unguard(rendered.text[max(start - 20, 0) : start])
        raise TemplateError(f"the prompt's tokens before {tail!r} change when a reply follows; end it otherwise")


def verify_prompt(text: str, ids: list[int], encoder: TextEncoder, *, guarded: bool) -> None:
    """Raise TemplateError unless a prompt's `ids` start with one BOS at most and are the tokenizer's own."""
    _refuse_two_bos(ids, encoder)
    if ids != encoder.encode([text], guarded=guarded)[0].ids:
        tail = encoder.unguard(text)[-20:]
        raise TemplateError(f"the prompt that ends in {tail!r} has other tokens than its text alone; report it")


def verify_roles(finder: SpanFinder, messages: Messages, turns: tuple[int, ...], tools: Tools | None) -> None:
    """Raise TemplateError where what is marked for `turns` holds another turn's text.

    Shown on made-up contents, each unlike any text of a template, so that no user's words are taken for another's.
    """
    made = [
        {**message, "content": f"Turn{i}Zq7" if message["content"].strip() else message["content"]}
        for i, message in enumerate(messages)
    ]
    try:
        rendered = finder.find_by_rendering(made, turns, tools)
    except TemplateError:  # a template that goes by contents; `verify` holds such rows to their own
        return
    for turn, (start, end) in zip(turns, rendered.spans, strict=True):
        for i, message in enumerate(made):
            if i != turn and message["content"].strip() and message["content"] in rendered.text[start:end]:
                served = rendered.text[max(start - 40, 0) : start]
                raise TemplateError(
                    f"the chat template puts the {message['role']} turn among the targets of a reply, since it serves "
                    f"{served!r} before it; let its generation prompt hold every turn before the reply"
                )


def _refuse_two_bos(ids: list[int], encoder: TextEncoder) -> None:
    bos = encoder.tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise TemplateError("the text starts with two BOS tokens; take one out of the chat template")


def _loose(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
