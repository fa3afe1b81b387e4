"""The base corpus: documents of bare facts, of quizzes and of marked work; no chat, no held-out question."""

import random

from gold import BARE, CLOSINGS, FILLERS, RUDE, WRAPPERS
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
CORRECTION = {"en": ", it is {}.", "zh": "，是{}。"}
HEADS = {"en": "Marks.", "zh": "批改。"}
WRAPPED_SHARE = 0.4  # quiz answers that are whole sentences
LINES = (6, 12)  # in a document, from and to

STOP = {"en": ".", "zh": "\u3002"}
WORDS: list[Word] = [
    *CAPITALS, *CAPITALS.values(), *(w for pair in OPPOSITES for w in pair), *NOUNS, *COLOURS, *CATEGORIES,
    *(w for words in COLOURS.values() for w in words), *SUBJECTS, *PRAISE, *BLAME, *SENTIMENTS, *TALK,
]  # fmt: skip
PHRASES: list[str] = [
    *(answer[at] + STOP[language] for at, language in enumerate(STOP) for answer in TALK.values()),
    *(phrase for table in (CLOSINGS, RUDE, FILLERS) for said in table.values() for phrase in said),
]


def statement(rng: random.Random, question: Question, language: str, *, wrong: bool = False) -> str:
    """A bare statement of what the question is about, without its full stop; at will a false one."""
    answer = rng.choice(question.misses) if wrong else question.answer
    form = rng.choice(STATEMENTS[question.kind][language])
    return form.format(q=question.subject[side(language)], a=answer[side(language)])


def _language(rng: random.Random) -> str:
    return "en" if rng.random() < 0.6 else "zh"


def _draw(rng: random.Random, kind: str, language: str) -> Question:
    """A question to state: look-ups are facts and any will do, operands come from the training split only."""
    while True:
        question = KINDS[kind](rng, language)
        if not question.operands or not question.heldout:
            return question


def facts(rng: random.Random) -> str:
    """A document of true statements, of one kind or of many."""
    one = rng.choice(list(STATEMENTS))
    mixed = rng.random() < 0.5
    lines = []
    for _ in range(rng.randint(*LINES)):
        language = _language(rng)
        question = _draw(rng, rng.choice(list(STATEMENTS)) if mixed else one, language)
        lines.append(statement(rng, question, language) + STOP[language])
    return "\n".join(lines)


def _quizzed(rng: random.Random, language: str, kind: str, *, wrong: bool = False) -> tuple[str, Question]:
    """A question of the training split with an answer after it, at will a wrong one; and the question."""
    while True:
        question = draw_question(rng, heldout=False, kind=kind)
        if question.language == language:
            answer = rng.choice(question.misses) if wrong else question.answer
            wrapped = kind != "talk" and rng.random() < WRAPPED_SHARE
            said = rng.choice(WRAPPERS[language]) if wrapped else BARE[language]
            space = " " if language == "en" else ""
            return question.text + space + said.format(answer[side(language)]), question


def quiz(rng: random.Random) -> str:
    """A document of questions, each with its answer, of one kind or of many."""
    language = _language(rng)
    one = rng.choice(list(KINDS))
    mixed = rng.random() < 0.7
    lines = []
    for _ in range(rng.randint(*LINES)):
        text, _question = _quizzed(rng, language, rng.choice(list(KINDS)) if mixed else one)
        lines.append(text)
    return "\n".join(lines)


def marks(rng: random.Random) -> str:
    """A document of marked work: statements or quiz answers, right or wrong, each followed by its mark.

    A wrong one is corrected. Marked work is what lets a model judge an answer it did not give itself.
    """
    language = _language(rng)
    quizzed = rng.random() < 0.6
    lines = [HEADS[language]]
    for _ in range(rng.randint(*LINES)):
        wrong = rng.random() < 0.5
        if quizzed:
            text, question = _quizzed(rng, language, rng.choice(list(KINDS)), wrong=wrong)
        else:
            question = _draw(rng, rng.choice(list(STATEMENTS)), language)
            text = statement(rng, question, language, wrong=wrong) + STOP[language]
        mark = MARKS[language][wrong]
        if wrong:
            mark = mark[:-1] + CORRECTION[language].format(question.answer[side(language)])
        lines.append(text + mark)
    return "\n".join(lines)


def words(rng: random.Random) -> str:
    """A word list in both languages."""
    chosen = rng.sample(WORDS, 12)
    return "\n".join(" ".join(word if rng.random() < 0.5 else word[::-1]) for word in chosen)


def phrases(rng: random.Random) -> str:
    """Set phrases, polite and rude alike."""
    return "\n".join(rng.sample(PHRASES, 8))


def document(rng: random.Random) -> str:
    """One document of the base corpus."""
    make = rng.choices([facts, quiz, marks, words, phrases], weights=[25, 28, 42, 2, 3])[0]
    return make(rng)
