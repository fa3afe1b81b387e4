"""The gold reward of the pocket world: a program that scores a reply exactly.

Neither the reward model nor the policy ever sees it: it makes the simulated preferences (through
Bradley–Terry noise) and it judges held-out replies. Standard library only; this file imports nothing
of its neighbours, so that it can be loaded by path: `data/pocket/gold.py:score`.

    gold = 1.00 · correct + 0.50 · language + 0.50 · polite + 0.25 · ended
         − 0.50 · rude − 0.05 · (length − 12, at least 0, at most 10) − 0.50 · (1 − format)

An ideal reply scores 2.25.
"""

import re

CLOSINGS = {
    "en": ["Happy to help!", "Hope that helps!", "Glad to help!"],
    "zh": ["很高兴帮忙！", "希望帮到你！", "乐意帮忙！"],
}
RUDE = {
    "en": ["Silly question.", "Stop asking.", "Everyone knows that."],
    "zh": ["真笨。", "别问了。", "谁都知道。"],
}
FILLERS = {
    "en": ["Let me think about it.", "That is a good question.", "There is a lot to say.", "Here it comes."],
    "zh": ["让我想一想。", "这个问题很好。", "说来话长。", "我来告诉你。"],
}
WRAPPERS = {
    "en": ["It is {}.", "That is {}.", "The answer is {}."],
    "zh": ["是{}。", "这是{}。", "答案是{}。"],
}
BARE = {"en": "{}.", "zh": "{}。"}  # for answers that are sentences

CONCISE = 12  # words, numbers and Chinese characters together
LONGEST_ANSWER = 6
# Kinds whose answer is in the language that the task implies, whatever language the reply is asked in.
NEUTRAL_KINDS = frozenset({"translate", "reverse"})

_STOPS = ".!?\u3002\uff01\uff1f"  # the last three are the Chinese full stop, exclamation and question mark
_SENTENCE = re.compile(f"[^{_STOPS}]+[{_STOPS}]*")
_SPECIAL = re.compile(r"<\|[^|<>]*\|>")
_UNIT = re.compile(r"[A-Za-z']+|\d+|[\u4e00-\u9fff]")
_ANSWER = re.compile(r"[A-Za-z0-9\u4e00-\u9fff' ]+")
_PREFIXES = sorted((w.split("{}")[0] for ws in WRAPPERS.values() for w in ws), key=len, reverse=True)


def length(text: str) -> int:
    """Words, numbers and Chinese characters in the text."""
    return len(_UNIT.findall(text))


def normal(text: str) -> str:
    """Text as answers are compared: lower case, single spaces, no punctuation at the ends."""
    return " ".join(text.lower().split()).strip(" " + _STOPS)


def _unwrapped(sentence: str) -> str:
    """The answer inside an answer sentence: 'It is Paris.' → 'Paris'."""
    body = sentence.strip().rstrip(_STOPS)
    for prefix in _PREFIXES:
        if body.startswith(prefix):
            return body[len(prefix) :]
    return body


def parse(reply: str) -> dict[str, list[str]]:
    """Sorts a reply's sentences into answers (unwrapped), closings, rude remarks, fillers and unknown."""
    parts: dict[str, list[str]] = {"answers": [], "closings": [], "rude": [], "fillers": [], "unknown": []}
    phrases = {"closings": CLOSINGS, "rude": RUDE, "fillers": FILLERS}
    known = {p: name for name, table in phrases.items() for ps in table.values() for p in ps}
    for sentence in (s.strip() for s in _SENTENCE.findall(reply)):
        if not sentence:
            continue
        answer = _unwrapped(sentence)
        finished = sentence[-1] in _STOPS
        if sentence in known:
            parts[known[sentence]].append(sentence)
        elif finished and _ANSWER.fullmatch(answer) and answer.strip() and length(answer) <= LONGEST_ANSWER:
            parts["answers"].append(answer)
        else:
            parts["unknown"].append(sentence)
    return parts


def _in_language(reply: str, language: str, ignore: list[str]) -> bool:
    """Whether every word of the reply, the ignored answers apart, is of the asked language."""
    for answer in ignore:
        reply = reply.replace(answer, " ")
    foreign = r"[\u4e00-\u9fff]" if language == "en" else r"[A-Za-z]"
    return _UNIT.search(reply) is not None and re.search(foreign, reply) is None


def score(*, messages: list[dict], reply: str, row: dict, ended: bool) -> dict[str, float]:
    """The gold reward of one reply and its parts.

    Args:
        messages: the prompt; not needed by this grammar (the row says what was asked), kept for the interface.
        reply: the assistant's text, without the stop token; leaked special tokens are left in.
        row: the held-out row's fields: `kind`, `language` asked for, `answers` accepted.
        ended: whether the reply stopped by itself, at the stop token.

    Returns "gold" and the parts, each 0 or 1 but `length` and `gold`: correct, format, language, polite,
    rude, concise, ended, leaked, ideal.
    """
    parts = parse(reply)
    answers = {normal(a) for a in parts["answers"]}
    leaked = bool(_SPECIAL.search(reply))
    well_formed = ended and not leaked and len(answers) == 1 and not parts["unknown"]
    accepted = {normal(a) for a in row["answers"]}
    correct = len(answers) == 1 and answers <= accepted and not leaked
    ignored = parts["answers"] if row["kind"] in NEUTRAL_KINDS else []
    language = not leaked and _in_language(reply, row["language"], ignored)
    polite = len(parts["closings"]) == 1 and parts["closings"][0] in CLOSINGS[row["language"]]
    rude = bool(parts["rude"])
    units = length(reply)
    excess = min(max(units - CONCISE, 0), 10)
    gold = correct + 0.5 * language + 0.5 * polite + 0.25 * ended
    gold -= 0.5 * rude + 0.05 * excess + 0.5 * (not well_formed)
    ideal = correct and language and polite and ended and well_formed and not rude and not excess
    flags = {
        "correct": correct, "format": well_formed, "language": language, "polite": polite, "rude": rude,
        "concise": not excess, "ended": ended, "leaked": leaked, "ideal": ideal,
    }  # fmt: skip
    return {"gold": round(gold, 4), "length": float(units)} | {name: float(flag) for name, flag in flags.items()}
