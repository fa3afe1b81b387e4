"""The grammar of the pocket world: twelve kinds of task, each asked in English or Chinese.

A task knows its prompt, the answers that are right, near misses, and the key its split hangs on. The split
is by content hash: for look-ups the key is the bare question, for tasks with operands the operands, so that
a held-out question never occurs in training data in any guise (another greeting, another asked language).
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

from lexicon import (
    BLAME,
    CAPITALS,
    CATEGORIES,
    COLOURS,
    LETTERS,
    NOUNS,
    OPPOSITES,
    PRAISE,
    SENTIMENTS,
    SUBJECTS,
    TALK,
    Word,
)

HELDOUT_PERCENT = 18
LANGUAGES = ("en", "zh")
CROSS_SHARE = 0.12  # prompts that ask for the other language
SYSTEM_SHARE = 0.4  # of those, the ones that ask in a system message

GREETINGS = {"en": ["", "", "Hello! ", "Please tell me: "], "zh": ["", "", "你好！", "请告诉我："]}
# ASK_IN[wanted][spoken]: the wish for a language, in the language of the question.
ASK_IN = {
    "en": {"en": " Answer in English.", "zh": "请用英文回答。"},
    "zh": {"en": " Answer in Chinese.", "zh": "请用中文回答。"},
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """A bare question: kind, text, what it is about, right answer and near misses as (English, Chinese)."""

    kind: str
    language: str
    text: str
    subject: Word
    answer: Word
    misses: list[Word]
    operands: str = ""

    @property
    def heldout(self) -> bool:
        """Whether the question belongs to the held-out split, by the hash of its content."""
        return is_heldout(self.operands or f"{self.kind} {self.text}")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A question as it is put to the assistant: the messages and the language of the wanted reply."""

    question: Question
    messages: list[dict[str, str]]
    language: str

    def row(self) -> dict:
        """What the gold reward needs to know, as the held-out rows carry it."""
        q = self.question
        answers = [q.answer[side(self.language)]] if q.kind in ("translate", "opposite") else list(q.answer)
        return {"kind": q.kind, "language": self.language, "answers": list(dict.fromkeys(answers))}


def is_heldout(key: str) -> bool:
    """Whether the content named by the key is held out."""
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % 100 < HELDOUT_PERCENT


def side(language: str) -> int:
    """Where a language's word is in a (English, Chinese) pair."""
    return LANGUAGES.index(language)


def _same(text: str | int) -> Word:
    return (str(text), str(text))


def _others(rng: random.Random, pool: list[Word], answer: Word, n: int = 3) -> list[Word]:
    return rng.sample([w for w in pool if w != answer], n)


CAPITAL_FORMS = {
    "en": ["What is the capital of {}?", "Which city is the capital of {}?", "Name the capital of {}.",
           "What city is the capital of {}?"],
    "zh": ["{}的首都是哪里？", "{}的首都是什么？", "哪里是{}的首都？", "说出{}的首都。"],
}  # fmt: skip
OPPOSITE_FORMS = {
    "en": ["What is the opposite of {}?", "Which word is the opposite of {}?", "Name the opposite of {}."],
    "zh": ["{}的反义词是什么？", "哪个词是{}的反义词？", "说出{}的反义词。"],
}
COLOUR_FORMS = {
    "en": ["What colour is the {}?", "What is the colour of the {}?", "Name the colour of the {}."],
    "zh": ["{}是什么颜色？", "{}的颜色是什么？", "说出{}的颜色。"],
}
CATEGORY_FORMS = {
    "en": ["What kind of thing is {}?", "What is a {}?", "Which kind of thing is a {}?"],
    "zh": ["{}是什么东西？", "{}是哪一类？", "{}属于什么？"],
}
TRANSLATE_FORMS = {
    "en": ["What is {} in Chinese?", "Say {} in Chinese.", "What is the Chinese word for {}?"],
    "zh": ["{}的英文是什么？", "用英文说{}。", "{}用英文怎么说？"],
}
ADD_FORMS = {
    "en": ["What is {} + {}?", "How much is {} + {}?", "Add {} + {}."],
    "zh": ["{} + {} 是多少？", "{} + {} 等于多少？", "算一算 {} + {}。"],
}
MAX_FORMS = {
    "en": ["Which is the largest: {}?", "What is the largest of {}?", "Name the largest of {}."],
    "zh": ["{} 里最大的是哪个？", "哪个最大：{}？", "说出 {} 里最大的。"],
}
COUNT_FORMS = {
    "en": ["How many words: {}?", "Count the words: {}.", "How many words are in {}?"],
    "zh": ["{} 有几个词？", "数一数：{}。", "有几个词：{}？"],
}
REVERSE_FORMS = {
    "en": ["Reverse {}.", "Say {} backwards.", "What is {} backwards?"],
    "zh": ["把 {} 倒过来。", "倒着说 {}。", "{} 倒过来是什么？"],
}
SORT_FORMS = {
    "en": ["Sort {}.", "Put {} in order.", "What is {} in order?"],
    "zh": ["把 {} 排好。", "给 {} 排序。", "{} 排好是什么？"],
}
SENTIMENT_FORMS = {
    "en": ["Positive or negative: the {} was {}?", "The {} was {}. Positive or negative?"],
    "zh": ["正面还是负面：{}{}？", "{}{}，正面还是负面？"],
}
TALK_FORMS = {
    "en": ["What is your {}?", "Tell me your {}.", "May I know your {}?", "Tell me about your {}.", "And your {}?"],
    "zh": ["你的{}是什么？", "说说你的{}。", "告诉我你的{}。", "你的{}呢？", "我想知道你的{}。"],
}


def capital(rng: random.Random, language: str) -> Question:
    """The capital of a country."""
    country = rng.choice(list(CAPITALS))
    answer = CAPITALS[country]
    text = rng.choice(CAPITAL_FORMS[language]).format(country[side(language)])
    misses = _others(rng, list(CAPITALS.values()), answer)
    return Question(kind="capital", language=language, text=text, subject=country, answer=answer, misses=misses)


def opposite(rng: random.Random, language: str) -> Question:
    """The opposite of a word."""
    pair = rng.choice(OPPOSITES)
    word, answer = pair if rng.random() < 0.5 else pair[::-1]
    text = rng.choice(OPPOSITE_FORMS[language]).format(word[side(language)])
    misses = [word, *_others(rng, [w for p in OPPOSITES for w in p if w != word], answer, 2)]
    return Question(kind="opposite", language=language, text=text, subject=word, answer=answer, misses=misses)


def colour(rng: random.Random, language: str) -> Question:
    """The colour of a thing."""
    answer = rng.choice(list(COLOURS))
    thing = rng.choice(COLOURS[answer])
    text = rng.choice(COLOUR_FORMS[language]).format(thing[side(language)])
    misses = _others(rng, list(COLOURS), answer)
    return Question(kind="colour", language=language, text=text, subject=thing, answer=answer, misses=misses)


def category(rng: random.Random, language: str) -> Question:
    """The category of a thing."""
    answer = rng.choice(list(CATEGORIES))
    thing = rng.choice(CATEGORIES[answer])
    text = rng.choice(CATEGORY_FORMS[language]).format(thing[side(language)])
    misses = _others(rng, list(CATEGORIES), answer)
    return Question(kind="category", language=language, text=text, subject=thing, answer=answer, misses=misses)


def translate(rng: random.Random, language: str) -> Question:
    """A noun in the other language: asked in English it goes to Chinese, asked in Chinese to English."""
    noun = rng.choice(NOUNS)
    here, there = side(language), 1 - side(language)
    text = rng.choice(TRANSLATE_FORMS[language]).format(noun[here])
    misses = [_same(w[there]) for w in _others(rng, NOUNS, noun)]
    answer = _same(noun[there])
    return Question(
        kind="translate", language=language, text=text, subject=_same(noun[here]), answer=answer, misses=misses
    )


def add(rng: random.Random, language: str) -> Question:
    """A small sum; the table of sums is a look-up, so the split is by the question."""
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    text = rng.choice(ADD_FORMS[language]).format(a, b)
    misses = [_same(a + b + d) for d in rng.sample([-2, -1, 1, 2], 3) if a + b + d > 0]
    subject, answer = _same(f"{a} + {b}"), _same(a + b)
    return Question(kind="add", language=language, text=text, subject=subject, answer=answer, misses=misses)


def _on_operands(kind: str, language: str, form: str, operands: str, answer: str, misses: list[Word]) -> Question:
    """A question that is split by its operands."""
    return Question(
        kind=kind, language=language, text=form.format(operands), subject=_same(operands),
        answer=_same(answer), misses=misses, operands=operands,
    )  # fmt: skip


def _digits(rng: random.Random) -> list[str]:
    return [str(d) for d in rng.sample(range(1, 10), rng.choice([3, 4]))]


def largest(rng: random.Random, language: str) -> Question:
    """The largest of three or four digits; split by the digits in their order."""
    digits = _digits(rng)
    answer = max(digits)
    misses = [_same(d) for d in rng.sample([d for d in digits if d != answer], 2)]
    return _on_operands("max", language, rng.choice(MAX_FORMS[language]), " ".join(digits), answer, misses)


def sort(rng: random.Random, language: str) -> Question:
    """Three or four digits in order; split by the digits in their order."""
    digits = _digits(rng)
    right = sorted(digits)
    if digits == right:
        digits = digits[::-1]
    swapped = right.copy()
    at = rng.randrange(len(right) - 1)
    swapped[at], swapped[at + 1] = swapped[at + 1], swapped[at]
    misses = [_same(" ".join(w)) for w in (swapped, digits, right[::-1]) if w != right]
    form = rng.choice(SORT_FORMS[language])
    return _on_operands("sort", language, form, " ".join(digits), " ".join(right), misses)


def reverse(rng: random.Random, language: str) -> Question:
    """Three letters backwards; split by the letters in their order."""
    letters = rng.sample(LETTERS, 3)
    right = letters[::-1]
    swapped = right.copy()
    at = rng.randrange(len(right) - 1)
    swapped[at], swapped[at + 1] = swapped[at + 1], swapped[at]
    misses = [_same(" ".join(w)) for w in (swapped, letters)]
    form = rng.choice(REVERSE_FORMS[language])
    return _on_operands("reverse", language, form, " ".join(letters), " ".join(right), misses)


def count(rng: random.Random, language: str) -> Question:
    """How many words there are, two to five; split by the words in their order."""
    n = rng.randint(2, 5)
    words = " ".join(w[side(language)] for w in rng.sample(NOUNS, n))
    misses = [_same(m) for m in (n - 1, n + 1)]
    return _on_operands("count", language, rng.choice(COUNT_FORMS[language]), words, str(n), misses)


def sentiment(rng: random.Random, language: str) -> Question:
    """Whether a short review is positive or negative."""
    good = rng.random() < 0.5
    subject, word = rng.choice(SUBJECTS), rng.choice(PRAISE if good else BLAME)
    text = rng.choice(SENTIMENT_FORMS[language]).format(subject[side(language)], word[side(language)])
    review = (f"{subject[0]} was {word[0]}", subject[1] + word[1])
    answer, miss = SENTIMENTS if good else SENTIMENTS[::-1]
    return Question(kind="sentiment", language=language, text=text, subject=review, answer=answer, misses=[miss])


def talk(rng: random.Random, language: str) -> Question:
    """Small talk about the assistant itself; each topic has one right answer."""
    topic = rng.choice(list(TALK))
    text = rng.choice(TALK_FORMS[language]).format(topic[side(language)])
    misses = _others(rng, list(TALK.values()), TALK[topic])
    return Question(kind="talk", language=language, text=text, subject=topic, answer=TALK[topic], misses=misses)


KINDS: dict[str, Callable[[random.Random, str], Question]] = {
    "capital": capital, "opposite": opposite, "colour": colour, "category": category, "translate": translate,
    "add": add, "max": largest, "sort": sort, "reverse": reverse, "count": count, "sentiment": sentiment,
    "talk": talk,
}  # fmt: skip
CROSSABLE = frozenset(KINDS) - {"translate", "reverse", "opposite"}


def draw_question(rng: random.Random, *, heldout: bool, kind: str | None = None) -> Question:
    """A question of the wanted split, 60 % in English."""
    make = KINDS[kind or rng.choice(list(KINDS))]
    while True:
        question = make(rng, "en" if rng.random() < 0.6 else "zh")
        if question.heldout == heldout:
            return question


def put(rng: random.Random, question: Question) -> Task:
    """The question as messages: perhaps a greeting, perhaps a wish for the other language."""
    asked = question.language
    text = rng.choice(GREETINGS[question.language]) + question.text
    messages = []
    if question.kind in CROSSABLE and rng.random() < CROSS_SHARE:
        asked = "zh" if asked == "en" else "en"
        wish = ASK_IN[asked][question.language]
        if rng.random() < SYSTEM_SHARE:
            messages.append({"role": "system", "content": wish.strip()})
        else:
            text += wish
    messages.append({"role": "user", "content": text})
    return Task(question=question, messages=messages, language=asked)


def draw_task(rng: random.Random, *, heldout: bool = False, kind: str | None = None) -> Task:
    """A task of the wanted split."""
    return put(rng, draw_question(rng, heldout=heldout, kind=kind))
