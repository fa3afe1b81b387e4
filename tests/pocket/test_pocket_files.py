"""The committed pocket files: made by their script, clean of held-out prompts, small, loadable."""

import json
import random
import subprocess
import sys

import pytest

TRAINING = ("sft.jsonl", "preferences.jsonl", "feedback.jsonl", "prompts.jsonl")
HELDOUT = ("heldout.jsonl", "pairs_heldout.jsonl")
MEBIBYTE = 2**20


def rows(pocket, name):
    return [json.loads(line) for line in (pocket.folder / name).read_text(encoding="utf-8").splitlines()]


def questions(row):
    """What the user says in a row, in whichever field it stands."""
    messages = row.get("messages") or row["prompt"]
    return [m["content"] for m in messages if m["role"] == "user"]


def test_committed_files_are_what_the_script_makes(pocket):
    command = [sys.executable, str(pocket.folder / "make_pocket.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_heldout_prompts_never_occur_in_training_rows(pocket):
    heldout = {text for name in HELDOUT for r in rows(pocket, name) for text in questions(r)}
    trained = {text for name in TRAINING for r in rows(pocket, name) for text in questions(r)}
    assert len(heldout) > 600
    assert not heldout & trained


def test_split_holds_in_every_guise_and_in_the_corpus(pocket):
    """The bare question of a held-out prompt is in no training text, whatever greeting or wish stands round it."""
    rng = random.Random(0)
    bare = {q.text for q in (pocket.world.draw_question(rng, heldout=True) for _ in range(2000))}
    operands = {q.operands for q in (pocket.world.draw_question(rng, heldout=True) for _ in range(2000))} - {""}
    trained = {text for name in TRAINING for r in rows(pocket, name) for text in questions(r)}
    wishes = ["", *(wish for table in pocket.world.ASK_IN.values() for wish in table.values())]
    greetings = {g for table in pocket.world.GREETINGS.values() for g in table}
    assert not trained & {g + b + w for g in greetings for b in bare for w in wishes}
    lines = {line for r in pocket.make_pocket.corpus_rows(3000) for line in r["text"].splitlines()}
    assert not [x for x in lines if any(x.startswith(b) for b in bare)]
    worked = {line.split(" backwards")[0] for line in lines if " backwards is" in line}
    assert worked
    assert not worked & operands


def test_sizes(pocket):
    jsonl = sum(path.stat().st_size for path in pocket.folder.glob("*.jsonl"))
    base = sum(path.stat().st_size for path in (pocket.folder / "base").iterdir())
    assert jsonl <= 2.5 * MEBIBYTE
    assert base <= 4 * MEBIBYTE


def test_row_shapes(pocket):
    heldout = rows(pocket, "heldout.jsonl")
    assert len(heldout) >= 600
    assert {r["kind"] for r in heldout} == set(pocket.world.KINDS)
    assert {"prompt", "kind", "language", "answers"} == set(heldout[0])
    assert {r["contrast"] for r in rows(pocket, "pairs_heldout.jsonl")} == {"style", "correctness", "both"}
    assert all(r["chosen"] != r["rejected"] for r in rows(pocket, "preferences.jsonl"))
    assert rows(pocket, "sft.jsonl")[0]["messages"][-1]["role"] == "assistant"


@pytest.fixture(scope="module")
def tokenizer(pocket):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(pocket.folder / "base")


def test_tokenizer_keeps_every_text(tokenizer):
    texts = ["It is Paris. Happy to help!", "答案是巴黎。很高兴帮忙！", "12 + 9 = 21", "龘 é 🙂 ß\n\ttab  two spaces"]
    for text in texts:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_stop_pad_and_document_end_are_distinct(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"])
    assert len(set(ids)) == 4
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token == "<|pad|>"


def test_template_marks_what_the_assistant_says_with_its_stop_token(tokenizer):
    messages = [
        {"role": "system", "content": "Answer in Chinese."},
        {"role": "user", "content": "Hello! What is 3 + 4?"},
        {"role": "assistant", "content": "是7。乐意帮忙！"},
    ]
    made = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    said = [i for i, kept in zip(made["input_ids"], made["assistant_masks"], strict=True) if kept]
    assert tokenizer.decode(said) == "是7。乐意帮忙！<|im_end|>"
    opened = tokenizer.apply_chat_template(messages[:2], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole.startswith(opened)


def test_base_loads_with_its_tokenizer_and_stops(pocket, tokenizer):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(pocket.folder / "base")
    assert base.num_parameters() <= 1_000_000
    assert base.config.vocab_size == len(tokenizer)
    assert base.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert base.generation_config.pad_token_id == tokenizer.pad_token_id
    committed = (pocket.folder / "tokenizer" / "tokenizer.json").read_bytes()
    assert (pocket.folder / "base" / "tokenizer.json").read_bytes() == committed
