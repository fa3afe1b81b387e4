"""The self-check of encoded conversations: decoded targets are the replies with their stop tokens, and no more.

Run on the first rows of every preparation (and on all rows in the tests), so that a template or tokenizer on which
the method fails stops the run instead of training on wrong targets.
"""

from __future__ import annotations

import unicodedata

from chatalign.data.spans import Rendered
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
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise TemplateError("the text starts with two BOS tokens; take one out of the chat template")
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


def _loose(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
