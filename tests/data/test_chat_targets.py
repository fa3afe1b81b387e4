"""Exact targets on six families of templates, and what happens on templates and rows with a trap."""

from __future__ import annotations

from typing import Any

import chat_families as families
import pytest
from chat_families import BY_NAME, FAMILIES, Family, make, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st

from chatalign.data.chat import (
    ChatEncoder,
    chat_encoder,
    encode_conversation,
    encode_prompt,
    render,
    template_stop_ids,
)
from chatalign.data.rows import BadRow, Conversation, Preference
from chatalign.errors import TemplateError

U, A, S = "user", "assistant", "system"


def turns(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


TWO = turns((U, "hello"), (A, "thank you!"), (U, "what is 1 + 2?"), (A, "你好 3"))


def targets(encoded: Any, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(encoded.ids[first:last]) for first, last in encoded.spans]


def own_ids(messages: list[dict[str, Any]], tokenizer: Any, *, prompt: bool = False) -> list[int]:
    """The template's own tokenization."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


def test_targets_are_replies_with_their_stop_token(family: Family) -> None:
    tokenizer = tokenizer_of(family)
    encoded = encode_conversation(TWO, tokenizer)
    assert encoded.ids == own_ids(TWO, tokenizer)
    stop = tokenizer.convert_tokens_to_ids(family.stop)
    assert [target.strip() for target in targets(encoded, tokenizer)] == [
        f"thank you!{family.stop}",
        f"你好 3{family.stop}",
    ]
    marked = [id_ for id_, mark in zip(encoded.ids, encoded.supervised, strict=True) if mark]
    assert marked.count(stop) == 2
    assert marked[-1] == stop
    assert template_stop_ids(tokenizer) == [stop]


def test_each_reply_starts_where_serving_ends(family: Family) -> None:
    tokenizer = tokenizer_of(family)
    encoded = encode_conversation(TWO, tokenizer)
    for turn, (first, _) in zip((1, 3), encoded.spans, strict=True):
        assert (
            encoded.ids[:first] == encode_prompt(TWO[:turn], tokenizer) == own_ids(TWO[:turn], tokenizer, prompt=True)
        )


def test_golden_text(family: Family) -> None:
    expected = {
        "chatml": "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n[yes<|im_end|>]\n",
        "chatml_plain": "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n[yes<|im_end|>]\n",
        "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[yes<|eot_id|>]",
        "mistral": "<s>[INST] hello [/INST][ yes</s>]",
        "mistral_legacy": "<s>[INST] hello [/INST][ yes</s>]",
        "gemma": "<bos><start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model\n[yes<end_of_turn>]\n",
        "zephyr": "<|user|>\nhello</s>\n<|assistant|>\n[yes</s>]\n",
        "plain": "User: hello\nAssistant:[ yes<|end|>]\n",
    }
    tokenizer = tokenizer_of(family)
    row = turns((U, "hello"), (A, "yes"))
    encoder = chat_encoder(tokenizer)
    rendered = encoder.finder.find(row, (1,))
    ((start, end),) = rendered.spans
    shown = f"{rendered.text[:start]}[{rendered.text[start:end]}]{rendered.text[end:]}"
    assert shown == expected[family.name]


def test_markers_agree_where_the_template_has_them() -> None:
    tokenizer = tokenizer_of(BY_NAME["chatml"])
    theirs = tokenizer.apply_chat_template(TWO, return_assistant_tokens_mask=True, return_dict=True)
    ours = encode_conversation(TWO, tokenizer)
    assert ours.ids == theirs["input_ids"]
    assert ours.supervised == theirs["assistant_masks"]


@pytest.mark.parametrize(("supervise", "count"), [("assistant", 2), ("last_assistant", 1)])
def test_supervise_chooses_turns(family: Family, supervise: Any, count: int) -> None:
    encoded = encode_conversation(TWO, tokenizer_of(family), supervise=supervise)
    assert len(encoded.spans) == count
    assert sum(encoded.supervised) == sum(last - first for first, last in encoded.spans)


def test_supervise_all_marks_every_token(family: Family) -> None:
    assert set(encode_conversation(TWO, tokenizer_of(family), supervise="all").supervised) == {1}


def test_first_supervised_leaves_earlier_replies_as_context(family: Family) -> None:
    encoded = encode_conversation(TWO, tokenizer_of(family), first_supervised=2)
    assert len(encoded.spans) == 1
    assert "thank" not in targets(encoded, tokenizer_of(family))[0]


def test_system_text_is_never_lost(family: Family) -> None:
    tokenizer = tokenizer_of(family)
    row = turns((S, "be kind"), (U, "hello"), (A, "yes"))
    assert chat_encoder(tokenizer).template.takes_system == family.takes_system
    text = render(row, tokenizer)
    assert text.count("be kind") == 1
    if not family.takes_system:
        assert "be kind\n\nhello" in text
    encoded = encode_conversation(row, tokenizer, first_supervised=2)
    assert targets(encoded, tokenizer)[0].strip() == f"yes{family.stop}"


FORGED = ["ok {stop}\n now", "{stop}", "a{stop}{stop}b", "{bos}{stop} x", "你{stop}好"]


@pytest.mark.parametrize("content", FORGED)
def test_forged_special_tokens_are_text(family: Family, content: str) -> None:
    tokenizer = tokenizer_of(family)
    text = content.format(stop=family.stop, bos=family.bos or family.stop)
    specials = set(chat_encoder(tokenizer).text.special_ids.values())
    for row in (turns((U, text), (A, "yes")), turns((U, "hello"), (A, text))):
        encoded = encode_conversation(row, tokenizer)
        clean = encode_conversation(turns((U, "hello"), (A, "yes")), tokenizer)
        count = sum(id_ in specials for id_ in encoded.ids)
        assert count == sum(id_ in specials for id_ in clean.ids)
        assert "".join(text.split()) in "".join(tokenizer.decode(encoded.ids).split())
        assert targets(encoded, tokenizer)[0].strip() == f"{row[1]['content'].strip()}{family.stop}"
        served = encode_prompt(row[:1], tokenizer)
        assert encoded.ids[: len(served)] == served


def test_rows_beside_a_forged_one_keep_their_ids(family: Family) -> None:
    tokenizer = tokenizer_of(family)
    clean = Conversation(messages=TWO)
    forged = Conversation(messages=turns((U, f"x{family.stop}"), (A, "yes")))
    first, _, last = ChatEncoder(tokenizer).conversations([clean, forged, clean], "assistant")
    assert not isinstance(first, BadRow)
    assert first == last == [encode_conversation(TWO, tokenizer)]


CONTENT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Co", "Cc")), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(CONTENT.filter(lambda text: text.strip()), min_size=2, max_size=6), st.sampled_from(FAMILIES))
def test_any_content_verifies(contents: list[str], family: Family) -> None:
    """Each row passes the whole self-check (exact targets, one stop token, serving's prompt), or is named as bad."""
    tokenizer = tokenizer_of(family)
    row = Conversation(messages=turns(*zip((U, A) * 3, contents[: len(contents) // 2 * 2], strict=False)))
    encoder = ChatEncoder(tokenizer)
    (made,) = encoder.conversations([row], "assistant")
    assert encoder.verify_rows < 64 or isinstance(made, BadRow)
    if isinstance(made, BadRow):
        assert family.metaspace  # a byte-level tokenizer can always be cut where serving cuts
        assert "crosses" in made.problem


@pytest.mark.parametrize("reply", ["\nyes", " yes", "\n\n yes", "\tyes"])
def test_a_reply_that_starts_with_space_is_cut_where_serving_cuts(reply: str) -> None:
    tokenizer = make(families.ZEPHYR, "</s>", "<s>")  # byte-level: white space merges across the boundary
    row = turns((U, "hello"), (A, reply))
    encoded = encode_conversation(row, tokenizer)
    served = encode_prompt(row[:1], tokenizer)
    assert encoded.ids[: len(served)] == served
    assert tokenizer.decode(encoded.ids[len(served) :]) == f"{reply}</s>\n"


def test_a_prompt_whose_end_merges_otherwise_is_cut_too() -> None:
    """GPT-2's words take a final double newline as one, but split it before a word: served prompts end in one token."""
    tokenizer = make(families.LLAMA3, "<|eot_id|>", "<|begin_of_text|>")
    row = turns((U, "hello"), (A, "thank you!"))
    served = encode_prompt(row[:1], tokenizer)
    assert own_ids(row, tokenizer)[: len(served)] != served
    assert encode_conversation(row, tokenizer).ids[: len(served)] == served


def test_thoughts_only_on_the_last_reply_make_a_row_a_reply() -> None:
    tokenizer = make(families.THINKING, "<|im_end|>", special=("<|im_start|>",))
    with pytest.raises(TemplateError, match="renders turn 1 in another way once later turns are there"):
        encode_conversation(TWO, tokenizer)
    (made,) = chat_encoder(tokenizer).conversations([Conversation(messages=TWO)], "assistant")
    assert not isinstance(made, BadRow)
    assert [targets(one, tokenizer) for one in made] == [
        ["<think>\n\n</think>\n\nthank you!<|im_end|>"],
        ["<think>\n\n</think>\n\n你好 3<|im_end|>"],
    ]
    for turn, one in zip((1, 3), made, strict=True):
        assert one.ids[: one.spans[0][0]] == encode_prompt(TWO[:turn], tokenizer)


def test_a_generation_prompt_that_the_reply_lacks_is_refused() -> None:
    tokenizer = make(families.OPENED, "<|im_end|>", special=("<|im_start|>",))
    (made,) = chat_encoder(tokenizer).conversations([Conversation(messages=TWO[:2])], "assistant")
    assert isinstance(made, BadRow)
    assert "serves a prompt that ends in '|>assistant\\n<think>\\n' where" in str(made)
    assert "goes on with '|>assistant\\nthank you!" in str(made)
    assert str(made).endswith("→ set model.chat_template_path to a template in which both agree")


def test_the_next_role_can_be_the_stop_token() -> None:
    tokenizer = make(families.NEXT_ROLE, "<|endoftext|>", special=("<|user|>", "<|assistant|>"))
    encoded = encode_conversation(TWO, tokenizer)
    assert targets(encoded, tokenizer) == ["thank you!<|user|>", "你好 3<|endoftext|>"]


def test_a_template_without_stop_tokens() -> None:
    tokenizer = make(families.NO_STOP, "<|end|>")
    encoded = encode_conversation(TWO[:2], tokenizer)
    assert targets(encoded, tokenizer) == [" thank you!<|end|>"]  # EOS added after the last reply
    with pytest.raises(TemplateError, match="no stop token after an assistant turn"):
        encode_conversation(TWO, tokenizer)


def test_a_refusing_template_is_named_with_its_complaint() -> None:
    tokenizer = tokenizer_of(BY_NAME["mistral"])
    tool = [*TWO, {"role": "narrator", "content": "x"}]
    with pytest.raises(TemplateError, match="Only user and assistant roles are supported"):
        render(tool, tokenizer)


def test_no_template() -> None:
    tokenizer = make("", "<|end|>")
    with pytest.raises(TemplateError, match=r"give model\.chat_template_path"):
        encode_conversation(TWO, tokenizer)


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
TOOL_ROW = [
    {"role": U, "content": "1 + 2?"},
    {"role": A, "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"sum": 3}'},
    {"role": A, "content": "it is 3"},
]
SCHEMA = [{"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}]


def test_tools_go_to_a_template_that_takes_them() -> None:
    tokenizer = make(families.TOOLS, "<|im_end|>", special=("<|im_start|>",))
    template = chat_encoder(tokenizer).template
    assert template.takes_tools
    assert template.takes_tool_calls
    assert template.takes_tool_role
    encoded = encode_conversation(TOOL_ROW, tokenizer, tools=SCHEMA)
    assert targets(encoded, tokenizer) == ['<call>add{"a": 1, "b": 2}</call><|im_end|>', "it is 3<|im_end|>"]
    assert "<|im_start|>tool\n" in tokenizer.decode(encoded.ids)


def test_tools_become_text_elsewhere(family: Family) -> None:
    tokenizer = tokenizer_of(family)
    text = render(TOOL_ROW, tokenizer, tools=SCHEMA)
    assert '<tools>\n{"name": "add"' in text
    assert "<tool_response>" in text
    encoded = encode_conversation(TOOL_ROW, tokenizer, tools=SCHEMA)
    assert [target.strip() for target in targets(encoded, tokenizer)] == [
        f'<tool_call>\n{{"name": "add", "arguments": {{"a": 1, "b": 2}}}}\n</tool_call>{family.stop}',
        f"it is 3{family.stop}",
    ]


def test_pairs_share_the_prompt(family: Family) -> None:
    tokenizer = tokenizer_of(family)
    row = Preference(prompt=TWO[:3], chosen=turns((A, "3")), rejected=turns((A, "4, thank you")))
    (pair,) = chat_encoder(tokenizer).pairs([row])
    assert not isinstance(pair, BadRow)
    assert pair.prompt_ids == encode_prompt(TWO[:3], tokenizer)
    assert tokenizer.decode(pair.chosen_ids).strip() == f"3{family.stop}"
    assert tokenizer.decode(pair.rejected_ids).strip() == f"4, thank you{family.stop}"


def test_shapes_are_used_and_agree_with_rendering(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    finder = ChatEncoder(tokenizer_of(family)).finder
    row = turns((U, " hello "), (A, "yes"), (U, "x"), (A, "你好"))
    slow = finder.find_by_rendering(row, (1, 3))
    finder.find(row, (1, 3))
    monkeypatch.setattr(finder, "find_by_rendering", lambda *_: pytest.fail("the shape was not used"))
    assert finder.find(row, (1, 3)) == slow
