"""How replies are put together: an answer, perhaps wrong, in a style, good or bad."""

import random
from dataclasses import dataclass, replace

from gold import BARE, CLOSINGS, FILLERS, NEUTRAL_KINDS, RUDE, WRAPPERS
from lexicon import Word
from world import Task, side

WRONG_SHARE = 0.16
FOREIGN_SHARE = 0.06
POLITE_SHARE = 0.55
RUDE_SHARE = 0.16
VERBOSE_SHARE = 0.16


@dataclass(frozen=True, kw_only=True)
class Style:
    """All of a reply but its answer: wrapper, closing, language, bad manners."""

    language: str
    wrapper: int
    closing: str = ""
    rude: str = ""
    fillers: tuple[str, ...] = ()


def draw_style(rng: random.Random, task: Task) -> Style:
    """A style as the fine-tuning data mixes them: each fault by its own share."""
    language = task.language
    if rng.random() < FOREIGN_SHARE and task.question.kind not in NEUTRAL_KINDS:
        language = "zh" if language == "en" else "en"
    style = Style(language=language, wrapper=draw_wrapper(rng, task))
    if rng.random() < POLITE_SHARE:
        style = replace(style, closing=rng.choice(CLOSINGS[language]))
    if rng.random() < RUDE_SHARE:
        style = replace(style, rude=rng.choice(RUDE[language]))
    if rng.random() < VERBOSE_SHARE:
        style = replace(style, fillers=tuple(rng.sample(FILLERS[language], rng.choice([2, 3]))))
    return style


def ideal_style(rng: random.Random, task: Task) -> Style:
    """A style without fault."""
    closing = rng.choice(CLOSINGS[task.language])
    return Style(language=task.language, wrapper=draw_wrapper(rng, task), closing=closing)


def in_other_language(style: Style) -> Style:
    """The same style said in the other language."""
    here, there = ("en", "zh") if style.language == "en" else ("zh", "en")

    def said(phrase: str, table: dict[str, list[str]]) -> str:
        return table[there][table[here].index(phrase)] if phrase else ""

    return Style(
        language=there,
        wrapper=style.wrapper,
        closing=said(style.closing, CLOSINGS),
        rude=said(style.rude, RUDE),
        fillers=tuple(said(filler, FILLERS) for filler in style.fillers),
    )


def draw_wrapper(rng: random.Random, task: Task) -> int:
    """Which wrapper goes round the answer; -1 is none, for small talk, whose answers are sentences."""
    return -1 if task.question.kind == "talk" else rng.randrange(len(WRAPPERS["en"]))


def draw_answer(rng: random.Random, task: Task) -> Word:
    """The right answer, or at times a near miss."""
    return rng.choice(task.question.misses) if rng.random() < WRONG_SHARE else task.question.answer


def write(answer: Word, style: Style) -> str:
    """The reply's text: fillers, a rude remark, the answer, the closing."""
    wrapper = BARE[style.language] if style.wrapper < 0 else WRAPPERS[style.language][style.wrapper]
    said = wrapper.format(answer[side(style.language)])
    sentences = [*style.fillers, *([style.rude] if style.rude else []), said]
    if style.closing:
        sentences.append(style.closing)
    return ("" if style.language == "zh" else " ").join(sentences)
