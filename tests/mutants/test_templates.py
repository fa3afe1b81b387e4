"""Failures 1 to 7 and 13: what a chat template or a tokenizer does to the targets, planted and named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from data.chat_families import BY_NAME, CHATML_PLAIN, MISTRAL, make, tokenizer_of
from tiny import make_llama
from tokenizers.processors import TemplateProcessing

from chatalign.chat.window import open_conversation
from chatalign.data import encode_conversation, prepare
from chatalign.data.chat import ChatEncoder
from chatalign.data.rows import Conversation
from chatalign.data.spans import Rendered, SpanFinder
from chatalign.data.tokens import TextEncoder
from chatalign.errors import ChatalignError, TemplateError
from chatalign.models.adapters import save_model
from chatalign.models.tokenizer import load_tokenizer, stop_token_ids, text_hashes
from chatalign.pipeline import run_stage
from chatalign.recipe import EvalRecipe, ModelSection
from data import chat_families as families
from mutants.guard_table import named, says
from mutants.planted import (
    CHAT,
    CHATS,
    PAIRS,
    TWO_REPLIES,
    chatml,
    launch,
    problem_found,
    recipe_of,
    refusal,
    refused,
)

PROMPTS = [{"prompt": "hello world"}, {"prompt": "1 + 2"}]
# --- 1: double BOS -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "rows"), [("sft", CHATS), ("dpo", PAIRS), ("ppo", PROMPTS)])
def test_1_a_template_that_gives_bos_twice(stage: str, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    tokenizer = chatml("{{ bos_token + bos_token }}" + CHATML_PLAIN, bos="<s>")
    says(1, refusal(recipe_of(tmp_path, stage, rows=rows, tokenizer=tokenizer)))


def test_1_a_tokenizer_that_adds_bos_to_rendered_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where `add_special_tokens=False` is forgotten, or a library no longer heeds it (trl 1400)."""
    tokenizer = chatml("{{ bos_token }}" + CHATML_PLAIN, bos="<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    recipe: Any = recipe_of(tmp_path, tokenizer=tokenizer)
    assert problem_found(recipe) is None
    monkeypatch.setattr(
        TextEncoder,
        "encode",
        lambda self, texts, *, guarded=False: self.tokenizer.backend_tokenizer.encode_batch(texts),
    )
    says(1, refusal(recipe))


def test_1_rows_that_are_rendered_already(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"<|im_start|>user\n1 + {i}<|im_end|>\n<|im_start|>assistant\n", "completion": f"{1 + i}<|im_end|>"}
        for i in range(20)
    ]
    (tmp_path / "twice").mkdir()
    twice = recipe_of(tmp_path / "twice", rows=rows)
    assert "holds the chat template's own text (<|im_start|> … <|im_end|>) already" in str(problem_found(twice))
    refused(twice, "rows.jsonl:1: messages: holds the chat template's own text")
    (tmp_path / "once").mkdir()
    once: Any = recipe_of(tmp_path / "once", rows=rows, data={"apply_chat_template": False})
    assert problem_found(once) is None
    tokenizer = load_tokenizer(once.model)
    made = prepare(once.data, tokenizer, "conversation", seed=0).train[0]["input_ids"]
    assert tokenizer.decode(made).startswith("<|im_start|>user\n1 + 0<|im_end|>\n<|im_start|>assistant\n1<|im_end|>")


# --- 2: EOS missing or doubled -------------------------------------------------------------------------------------


def test_2_a_template_without_a_stop_token_between_turns(tmp_path: Path) -> None:
    tokenizer = make(families.NO_STOP, "<|end|>")
    says(2, refusal(recipe_of(tmp_path, rows=[{"messages": TWO_REPLIES}], tokenizer=tokenizer)))


def test_2_replies_that_end_in_a_stop_token_of_their_own(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "completion": f"the answer is {i}<|im_end|>"} for i in range(20)]
    refused(recipe_of(tmp_path, rows=rows), "holds the chat template's own text (<|im_start|> … <|im_end|>) already")


def test_2_a_stop_token_given_twice_is_learned_once(tmp_path: Path) -> None:
    tokenizer = chatml(CHATML_PLAIN.replace("<|im_end|>' }}", "<|im_end|><|im_end|>' }}"))
    encoded = encode_conversation(CHAT, tokenizer)
    learned = [token for token, target in zip(encoded.ids, encoded.supervised, strict=True) if target]
    assert tokenizer.decode(learned) == "thank you!<|im_end|>"


@pytest.mark.parametrize("lost", [1, 2])
def test_2_targets_that_end_before_their_stop_token(lost: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a library's offsets leave the last token out."""
    right = TextEncoder.encode_spans

    def shortened(self: TextEncoder, texts: Any, spans: Any = None) -> Any:
        return [(ids, [(a, b - lost) for a, b in found]) for ids, found in right(self, texts, spans)]

    monkeypatch.setattr(TextEncoder, "encode_spans", shortened)
    refused(recipe_of(tmp_path), "doesn't end in exactly one stop token")


# --- 3: pad = EOS --------------------------------------------------------------------------------------------------


def test_3_pad_is_eos_and_nothing_else_can_be_pad(tmp_path: Path) -> None:
    tokenizer = make_eos_only()
    says(3, refusal(recipe_of(tmp_path, tokenizer=tokenizer)))


def test_3_pad_is_the_templates_stop_token(tmp_path: Path) -> None:
    """EOS is another token: the stop token would be masked as pad, and generation would never stop at it."""
    tokenizer = chatml(CHATML_PLAIN, "<|endoftext|>")
    tokenizer.eos_token, tokenizer.pad_token = "<|endoftext|>", "<|im_end|>"
    recipe: Any = recipe_of(tmp_path, tokenizer=tokenizer)
    loaded = load_tokenizer(recipe.model)
    assert loaded.pad_token == "<pad>"
    assert loaded.convert_tokens_to_ids("<|im_end|>") in stop_token_ids(loaded)
    row = prepare(recipe.data, loaded, "conversation", seed=0).train[0]
    assert loaded.pad_token_id not in row["input_ids"]
    assert row["supervised"][row["input_ids"].index(loaded.convert_tokens_to_ids("!"))] == 1


def make_eos_only() -> Any:
    """A tokenizer whose only special token is EOS, which pads too, as in GPT-2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator([], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = families.PLAIN
    return tokenizer


# --- 4: other roles in the loss ------------------------------------------------------------------------------------

# Renders nothing where a generation prompt is asked for: a reply seems to start at the first character.
NO_PROMPT = "{% if not add_generation_prompt %}" + MISTRAL + "{% endif %}"


@pytest.mark.parametrize("turns", [CHAT, TWO_REPLIES])
def test_4_a_template_whose_prompt_lacks_the_user_turn(turns: Any, tmp_path: Path) -> None:
    tokenizer = make(NO_PROMPT, "</s>", "<s>")
    says(4, refusal(recipe_of(tmp_path, rows=[{"messages": turns}], tokenizer=tokenizer)))


def test_4_spans_that_start_too_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the finder of spans itself is at fault."""
    right = SpanFinder.find_by_rendering

    def early(*arguments: Any) -> Rendered:
        found = right(*arguments)
        return Rendered(found.text, tuple((0, end) for _, end in found.spans), found.append_stop)

    monkeypatch.setattr(SpanFinder, "find_by_rendering", early)
    says(4, refusal(recipe_of(tmp_path, tokenizer=make(MISTRAL, "</s>", "<s>"))))


# --- 5: no target is found -----------------------------------------------------------------------------------------


def test_5_a_template_that_leaves_the_reply_out(tmp_path: Path) -> None:
    misspelt = CHATML_PLAIN.replace("m['content'] + '<|im_end|>' }}\n", "").replace(
        "{{ m['content'] + '<|im_end|>' }}{{ '\n' }}", "{{ m['contents'] }}{{ '<|im_end|>\n' }}"
    )
    assert misspelt != CHATML_PLAIN
    says(5, refusal(recipe_of(tmp_path, tokenizer=chatml(misspelt))))


def test_5_no_generation_markers_are_needed(tmp_path: Path) -> None:
    recipe: Any = recipe_of(tmp_path)
    assert "generation %}" not in CHATML_PLAIN
    assert problem_found(recipe) is None
    made = prepare(recipe.data, load_tokenizer(recipe.model), "conversation", seed=0)
    assert all(any(row["supervised"]) for row in made.train)


def test_5_marks_that_get_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = TextEncoder.encode_spans
    monkeypatch.setattr(TextEncoder, "encode_spans", lambda *arguments: [(ids, []) for ids, _ in right(*arguments)])
    refused(recipe_of(tmp_path), "replies were rendered and 0 are marked as targets")


# --- 6: not prefix-preserving --------------------------------------------------------------------------------------


def test_6_a_generation_prompt_that_rendered_replies_lack(tmp_path: Path) -> None:
    says(6, refusal(recipe_of(tmp_path, tokenizer=chatml(families.OPENED))))


@pytest.mark.parametrize("stage", ["dpo", "reward", "kto"])
def test_6_in_every_stage(stage: str, tmp_path: Path) -> None:
    rows = [{"prompt": "1", "completion": "2", "label": True}] if stage == "kto" else PAIRS
    says(6, refusal(recipe_of(tmp_path, stage, rows=rows, tokenizer=chatml(families.OPENED))))


def test_6_what_a_row_a_reply_makes_exact_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "split").mkdir()
    recipe: Any = recipe_of(tmp_path / "split", tokenizer=chatml(families.THINKING))
    assert problem_found(recipe) is None
    assert len(prepare(recipe.data, load_tokenizer(recipe.model), "conversation", seed=0).train) == 1 + 2
    (tmp_path / "whole").mkdir()
    whole = recipe_of(tmp_path / "whole", tokenizer=chatml(families.THINKING), data={"supervise": "all"})
    refused(whole, "renders turn 1 in another way once later turns are there")


# --- 7: the boundary between prompt and reply moves ----------------------------------------------------------------


def test_7_a_token_that_crosses_into_the_reply(tmp_path: Path) -> None:
    rows = [{"messages": [CHAT[0], {"role": "assistant", "content": "\nyes"}]}]
    says(7, refusal(recipe_of(tmp_path, rows=rows, tokenizer=tokenizer_of(BY_NAME["zephyr"]))))


@pytest.mark.parametrize("late", [False, True], ids=["first rows", "later rows"])
def test_7_a_prompt_whose_last_tokens_change(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut where serving cuts it, on every row; were it not, the first rows would tell."""
    tokenizer = make(families.LLAMA3, "<|eot_id|>", "<|begin_of_text|>")  # GPT-2's words: \n\n is one at the end only
    row = CHAT
    encoder = ChatEncoder(tokenizer)
    served = encoder.prompts([(row[:1], None)])[0]
    whole = tokenizer(encoder.template.render(row), add_special_tokens=False)["input_ids"]
    assert whole[: len(served)] != served, "the failure is there"
    if late:
        encoder.verify_rows = 0
    assert encoder.conversation(Conversation(messages=row), "assistant").ids[: len(served)] == served
    monkeypatch.setattr(ChatEncoder, "_moves", lambda *_: False)
    with pytest.raises(TemplateError, match="change when a reply follows"):
        ChatEncoder(tokenizer).conversation(Conversation(messages=row), "assistant")


# --- 13: trained with one template, served with another ------------------------------------------------------------


@pytest.fixture(scope="module", params=[None, {"r": 4}], ids=["full", "lora"])
def sft_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one step."""
    folder = tmp_path_factory.mktemp("sft")
    recipe: Any = recipe_of(folder, lora=request.param, train={"max_steps": 1, "save_strategy": "no"})
    tokenizer = load_tokenizer(recipe.model)
    make_llama(len(tokenizer), pad_token_id=tokenizer.pad_token_id).save_pretrained(folder / "model")
    run_stage(recipe)
    return folder / "run"


@pytest.fixture
def altered(sft_run: Path, tmp_path: Path) -> Path:
    """The run with another template in its model folder, as an editor or a newer upload leaves it."""
    run = tmp_path / "altered"
    shutil.copytree(sft_run, run)
    template = run / "model" / "chat_template.jinja"
    assert template.read_text() == CHATML_PLAIN
    template.write_text(families.THINKING)
    return run


def test_13_the_next_stage(altered: Path, tmp_path: Path) -> None:
    dpo = recipe_of(tmp_path, "dpo", rows=PAIRS, model={"name_or_path": str(altered)})
    says(13, refusal(dpo))


def test_13_chat_and_evaluation(altered: Path, tmp_path: Path) -> None:
    with named(13):
        open_conversation(str(altered), temperature=0.0, top_p=1.0, max_new_tokens=4, seed=0)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "hello"}) + "\n")
    raw = {
        "stage": "eval",
        "output_dir": str(tmp_path / "eval"),
        "models": {"sft": {"name_or_path": str(altered)}},
        "eval": {"prompts": {"path": str(tmp_path / "prompts.jsonl")}, "max_new_tokens": 4},
    }
    with named(13):
        launch(EvalRecipe.model_validate(raw))


def test_13_a_template_that_is_gone_or_given(altered: Path, sft_run: Path) -> None:
    section = ModelSection(name_or_path=str(altered), chat_template_path="chatml")
    assert load_tokenizer(section).chat_template, "a recipe that names the template means it"
    (altered / "model" / "chat_template.jinja").unlink()
    with named(13):
        load_tokenizer(ModelSection(name_or_path=str(altered)))
    assert load_tokenizer(ModelSection(name_or_path=str(sft_run))).chat_template == CHATML_PLAIN


def test_13_a_tokenizer_that_was_altered(sft_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "altered"
    shutil.copytree(sft_run, run)
    file = run / "model" / "tokenizer.json"
    state = json.loads(file.read_text("utf-8"))
    first, second = list(state["model"]["vocab"])[-2:]
    vocab = state["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file.write_text(json.dumps(state), "utf-8")
    with pytest.raises(ChatalignError, match=r"tokenizer.json: altered since run \w+ was trained with it"):
        load_tokenizer(ModelSection(name_or_path=str(run)))


def test_13_a_template_that_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a library writes an older template beside the weights."""
    tokenizer = chatml()
    other = chatml(families.THINKING)
    model = make_llama(len(tokenizer))
    monkeypatch.setattr(tokenizer, "save_pretrained", other.save_pretrained, raising=False)
    save_model(model, tokenizer, tmp_path)
    with pytest.raises(TemplateError, match="is not the one that was trained with"):
        text_hashes(tokenizer, tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        CHATML_PLAIN + "\n",
        CHATML_PLAIN.replace("{% if", "\r\n{% if"),
        {"default": CHATML_PLAIN, "tool_use": families.TOOLS},
    ],
    ids=["line break", "CRLF", "named"],
)
def test_13_a_template_that_is_saved_as_it_was(template: Any, tmp_path: Path) -> None:
    tokenizer = chatml()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    assert text_hashes(tokenizer, tmp_path)["chat_template_sha256"]
