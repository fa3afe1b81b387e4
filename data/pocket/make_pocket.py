"""Makes the pocket data: rows, tokenizer and, on demand, the base corpus. One seed, one result.

python data/pocket/make_pocket.py                     rewrite the committed files
python data/pocket/make_pocket.py --check             say whether they are what this script makes
python data/pocket/make_pocket.py --corpus FOLDER     write the base corpus to FOLDER/corpus.jsonl
"""

import argparse
import json
import math
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from filecmp import cmp
from itertools import islice
from pathlib import Path

from corpus import PHRASES, WORDS, document
from gold import score
from replies import Style, draw_answer, draw_style, ideal_style, in_other_language, write
from world import Task, draw_task

HERE = Path(__file__).resolve().parent
SEED = 20261122
SFT_ROWS, PAIRS, FEEDBACK, PROMPTS, HELDOUT, HELDOUT_PAIRS = 3000, 5000, 1000, 2000, 720, 900
CORPUS_DOCUMENTS = 60_000
TOKENIZER_DOCUMENTS = 2_000
WORD_WEIGHT = 300  # every word often enough to become a token, however rare in the corpus
PHRASE_WEIGHT = 60
TWO_TURN_SHARE = 0.05
IDEAL = 2.25  # gold of a reply without fault
FAULTLESS_KEPT = 0.75
BRADLEY_TERRY_SCALE = 3.0  # gold points to logits: a whole point is preferred in 95 % of pairs, half in 82 %
THUMBS_UP = 1.25  # the gold at which a reply is liked and disliked alike often
LEAST_DIFFERENCE = 0.25  # in gold, between the replies of a pair: closer ones nobody is asked about
OTHER_LANGUAGE_SHARE = 0.6
CONTRASTS = {"correctness": 0.45, "style": 0.25, "both": 0.30}
Row = dict


def _rng(name: str) -> random.Random:
    """A generator of its own for each file, so that a longer file leaves the others as they are."""
    return random.Random(f"{SEED}/{name}")


def demonstrations() -> Iterator[tuple[Row, bool]]:
    """Demonstrations of mixed quality without end, each with whether its last reply is faultless."""
    rng = _rng("sft")
    while True:
        messages: list[dict] = []
        for _turn in range(2 if rng.random() < TWO_TURN_SHARE else 1):
            task = draw_task(rng)
            while messages and task.messages[0]["role"] == "system":
                task = draw_task(rng)
            reply = write(draw_answer(rng, task), draw_style(rng, task))
            messages += [*task.messages, {"role": "assistant", "content": reply}]
        yield {"messages": messages}, gold_of(task, reply) == IDEAL


def sft_rows() -> Iterator[Row]:
    """Demonstrations with some of the faultless ones left out, so that alignment has room above fine-tuning."""
    rng = _rng("sft/kept")
    kept = (row for row, faultless in demonstrations() if not faultless or rng.random() < FAULTLESS_KEPT)
    return islice(kept, SFT_ROWS)


def gold_of(task: Task, reply: str) -> float:
    """The gold reward of a reply that ends by itself."""
    return score(messages=task.messages, reply=reply, row=task.row(), ended=True)["gold"]


def two_replies(rng: random.Random, task: Task, contrast: str) -> tuple[str, str]:
    """Two replies that differ in what the contrast names and never in gold alone."""
    miss, style = rng.choice(task.question.misses), draw_style(rng, task)
    if contrast == "correctness":
        # Half of them without fault of style: there the policy will end up, and there it must still be judged.
        style = ideal_style(rng, task) if rng.random() < 0.5 else style
        return write(task.question.answer, style), write(miss, style)
    if contrast == "style":
        answer = draw_answer(rng, task)
        return write(answer, style), write(answer, _other_style(rng, task, style))
    other = _other_style(rng, task, style)
    first, second = (style, other) if rng.random() < 0.5 else (other, style)
    return write(task.question.answer, first), write(miss, second)


def _other_style(rng: random.Random, task: Task, style: Style) -> Style:
    """A second draw of style, of the same wrapper, that is not the first again.

    Where the prompt asks for another language than its own, it is often the same style in the other language.
    """
    if task.language != task.question.language and rng.random() < OTHER_LANGUAGE_SHARE:
        return in_other_language(style)
    while True:
        other = replace(draw_style(rng, task), wrapper=style.wrapper)
        if other != style:
            return other


def pair(rng: random.Random, task: Task, contrast: str) -> tuple[str, str]:
    """Two replies that the gold reward tells apart."""
    while True:
        first, second = two_replies(rng, task, contrast)
        if abs(gold_of(task, first) - gold_of(task, second)) >= LEAST_DIFFERENCE:
            return first, second
        task = draw_task(rng, heldout=task.question.heldout) if contrast == "correctness" else task


def _turn(reply: str) -> list[dict]:
    return [{"role": "assistant", "content": reply}]


def preference_rows() -> Iterator[Row]:
    """Pairs whose chosen side is drawn by Bradley–Terry from the gold reward: about one in eight is upside down."""
    rng = _rng("preferences")
    for _ in range(PAIRS):
        task = draw_task(rng)
        contrast = rng.choices(list(CONTRASTS), weights=list(CONTRASTS.values()))[0]
        chosen, rejected = pair(rng, task, contrast)
        margin = BRADLEY_TERRY_SCALE * (gold_of(task, chosen) - gold_of(task, rejected))
        if rng.random() > 1 / (1 + math.exp(-margin)):
            chosen, rejected = rejected, chosen
        yield {"prompt": task.messages, "chosen": _turn(chosen), "rejected": _turn(rejected)}


def feedback_rows() -> Iterator[Row]:
    """Single replies with a thumb up or down, drawn from the gold reward with the same noise."""
    rng = _rng("feedback")
    for _ in range(FEEDBACK):
        task = draw_task(rng)
        reply = write(draw_answer(rng, task), draw_style(rng, task))
        liked = 1 / (1 + math.exp(-BRADLEY_TERRY_SCALE * (gold_of(task, reply) - THUMBS_UP)))
        yield {"prompt": task.messages, "completion": _turn(reply), "label": rng.random() < liked}


def heldout_pair_rows() -> Iterator[Row]:
    """Noiseless held-out pairs, a third of each contrast."""
    rng = _rng("pairs_heldout")
    for index in range(HELDOUT_PAIRS):
        task = draw_task(rng, heldout=True)
        contrast = list(CONTRASTS)[index % len(CONTRASTS)]
        chosen, rejected = pair(rng, task, contrast)
        if gold_of(task, chosen) < gold_of(task, rejected):
            chosen, rejected = rejected, chosen
        yield {
            "prompt": task.messages, "chosen": _turn(chosen), "rejected": _turn(rejected),
            "contrast": contrast, "kind": task.question.kind,
        }  # fmt: skip


def prompt_rows(name: str, rows: int, *, heldout: bool) -> Iterator[Row]:
    """Prompts without replies, no two alike; held-out ones carry what the gold reward needs to know."""
    rng = _rng(name)
    seen: set[str] = set()
    while len(seen) < rows:
        task = draw_task(rng, heldout=heldout)
        key = json.dumps(task.messages)
        if key not in seen:
            seen.add(key)
            yield {"prompt": task.messages} | (task.row() if heldout else {})


def corpus_rows(documents: int = CORPUS_DOCUMENTS) -> Iterator[Row]:
    """The base corpus, a document a row."""
    rng = _rng("corpus")
    for _ in range(documents):
        yield {"text": document(rng)}


FILES: dict[str, Callable[[], Iterator[Row]]] = {
    "sft.jsonl": sft_rows,
    "preferences.jsonl": preference_rows,
    "feedback.jsonl": feedback_rows,
    "prompts.jsonl": lambda: prompt_rows("prompts", PROMPTS, heldout=False),
    "heldout.jsonl": lambda: prompt_rows("heldout", HELDOUT, heldout=True),
    "pairs_heldout.jsonl": heldout_pair_rows,
}


def write_rows(path: Path, rows: Iterator[Row]) -> None:
    """One JSON object a line, Chinese left readable."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def make_tokenizer(folder: Path) -> None:
    """Trains the tokenizer on the start of the corpus and on the demonstrations."""
    from tokenizer import save, train  # Heavy imports; the rows need none of them.

    texts = [row["text"] for row in corpus_rows(TOKENIZER_DOCUMENTS)]
    texts += ["\n".join(f" {english} {chinese}" * WORD_WEIGHT for english, chinese in WORDS)]
    texts += ["\n".join(f"{phrase} " * PHRASE_WEIGHT for phrase in PHRASES)]
    for row, _faultless in islice(demonstrations(), SFT_ROWS):
        texts += [f"{m['role']}\n{m['content']}" for m in row["messages"]]
    save(train(texts), folder)


def make(folder: Path) -> list[Path]:
    """Writes everything that is committed, the base model apart, and returns the files."""
    for name, rows in FILES.items():
        write_rows(folder / name, rows())
    make_tokenizer(folder / "tokenizer")
    return [folder / name for name in FILES] + sorted((folder / "tokenizer").iterdir())


def check() -> int:
    """Remakes everything in a temporary folder and compares byte by byte; 1 where a file differs."""
    with tempfile.TemporaryDirectory() as folder:
        made = make(Path(folder))
        committed = {path: HERE / path.relative_to(folder) for path in made}
        wrong = [kept for path, kept in committed.items() if not kept.exists() or not cmp(path, kept, shallow=False)]
    for path in wrong:
        print(f"{path.relative_to(HERE.parent.parent)}: not what make_pocket.py makes; run it without --check")
    return int(bool(wrong))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the committed files with what this makes")
    parser.add_argument("--corpus", type=Path, metavar="FOLDER", help="write the base corpus to FOLDER/corpus.jsonl")
    arguments = parser.parse_args()
    if arguments.check:
        return check()
    if arguments.corpus:
        arguments.corpus.mkdir(parents=True, exist_ok=True)
        write_rows(arguments.corpus / "corpus.jsonl", corpus_rows())
        return 0
    make(HERE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
