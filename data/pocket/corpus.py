"""The base corpus: documents of bare facts and of marked work, with no question of the chat in them."""

import random

from gold import CLOSINGS, FILLERS, RUDE
from lexicon import (
    BLAME,
    CAPITALS,
    CATEGORIES,
    COLOURS,
    NOUNS,
    OPPOSITES,
    PRAISE,
    SENTIMENTS,
    SUBJECTS,
    TALK,
    Word,
)
from world import KINDS, Question, draw_question, side

STATEMENTS: dict[str, dict[str, list[str]]] = {
    "capital": {"en": ["The capital of {q} is {a}", "capital of {q}: {a}"], "zh": ["{q}的首都是{a}", "首都{q}：{a}"]},
    "opposite": {"en": ["The opposite of {q} is {a}", "not {q} but {a}"], "zh": ["{q}的反义词是{a}", "不{q}就{a}"]},
    "colour": {"en": ["The {q} is {a}", "colour of {q}: {a}"], "zh": ["{q}是{a}的", "颜色{q}：{a}"]},
    "category": {"en": ["A {q} is of the kind {a}", "kind of {q}: {a}"], "zh": ["{q}是{a}", "{q}属于{a}"]},
    "translate": {"en": ["Chinese for {q} is {a}", "the word {q} = {a}"], "zh": ["{q}的英文是{a}", "{q} = {a}"]},
    "add": {"en": ["{q} = {a}", "{q} makes {a}"], "zh": ["{q} = {a}", "{q} 等于 {a}"]},
    "max": {"en": ["The largest of {q} is {a}", "{q} max {a}"], "zh": ["{q} 里最大的是 {a}", "最大 {q} 是 {a}"]},
    "sort": {"en": ["{q} in order is {a}", "sort {q} to {a}"], "zh": ["{q} 排好是 {a}", "排 {q} 得 {a}"]},
    "reverse": {"en": ["{q} backwards is {a}", "{q} turned {a}"], "zh": ["{q} 倒过来是 {a}", "倒 {q} 得 {a}"]},
    "count": {"en": ["{q} : {a} words", "words {q} count {a}"], "zh": ["{q} 有 {a} 个词", "词 {q} 数 {a}"]},
    "sentiment": {"en": ["the {q}: {a}", "The {q}, that is {a}"], "zh": ["{q}：{a}", "{q}，这是{a}"]},
}
MARKS = {"en": (" Right.", " Wrong."), "zh": ("对。", "错。")}
HEADS = {"en": "Marks.", "zh": "批改。"}
FACT_LINES = (6, 12)

STOP = {"en": ".", "zh": "\u3002"}
WORDS: list[Word] = [
    *CAPITALS, *CAPITALS.values(), *(w for pair in OPPOSITES for w in pair), *NOUNS, *COLOURS, *CATEGORIES,
    *(w for words in COLOURS.values() for w in words), *SUBJECTS, *PRAISE, *BLAME, *SENTIMENTS,
]  # fmt: skip


def statement(rng: random.Random, question: Question, language: str, *, wrong: bool = False) -> str:
    """A bare statement of what the question is about, without its full stop; at will a false one."""
    answer = rng.choice(question.misses) if wrong else question.answer
    form = rng.choice(STATEMENTS[question.kind][language])
    return form.format(q=question.subject[side(language)], a=answer[side(language)])


def _draw(rng: random.Random, kind: str) -> Question:
    """A question to state: look-ups are facts and any will do, operands come from the training split only."""
    question = draw_question(rng, heldout=False, kind=kind)
    return question if question.operands else KINDS[kind](rng, question.language)


def facts(rng: random.Random) -> str:
    """A document of true statements, of one kind or of many."""
    one = rng.choice(list(STATEMENTS))
    mixed = rng.random() < 0.5
    lines = []
    for _ in range(rng.randint(*FACT_LINES)):
        question = _draw(rng, rng.choice(list(STATEMENTS)) if mixed else one)
        language = "en" if rng.random() < 0.6 else "zh"
        language = question.language if question.operands or question.kind == "translate" else language
        lines.append(statement(rng, question, language) + STOP[language])
    return "\n".join(lines)


def marks(rng: random.Random) -> str:
    """A document of marked work: statements true and false, each followed by its mark."""
    language = "en" if rng.random() < 0.6 else "zh"
    lines = [HEADS[language]]
    for _ in range(rng.randint(*FACT_LINES)):
        question = _draw(rng, rng.choice(list(STATEMENTS)))
        spoken = question.language if question.operands or question.kind == "translate" else language
        wrong = rng.random() < 0.5
        lines.append(statement(rng, question, spoken, wrong=wrong) + STOP[spoken] + MARKS[spoken][wrong])
    return "\n".join(lines)


def words(rng: random.Random) -> str:
    """A word list in both languages."""
    chosen = rng.sample(WORDS, 12)
    return "\n".join(" ".join(word if rng.random() < 0.5 else word[::-1]) for word in chosen)


def phrases(rng: random.Random) -> str:
    """Set phrases, polite and rude alike, in one language."""
    language = rng.choice(["en", "zh"])
    sayings = [entry[0][side(language)] + STOP[language] for entry in TALK]
    for table in (CLOSINGS, RUDE, FILLERS):
        sayings += table[language]
    return "\n".join(rng.sample(sayings, 8))


def document(rng: random.Random) -> str:
    """One document of the base corpus."""
    make = rng.choices([facts, marks, words, phrases], weights=[62, 28, 6, 4])[0]
    return make(rng)
