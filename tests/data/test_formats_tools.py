"""Rows with tools: schemas and calls in every form in which files write them, results beside their calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from bad_rows import m
from chat_families import BY_NAME, CHATML_PLAIN, make, tokenizer_of

from chatalign.data.chat import chat_encoder, encode_conversation
from chatalign.data.formats import format_of, normalise
from chatalign.data.rows import BadRow, Conversation
from chatalign.data.sources import read_source
from chatalign.recipe import DatasetSource

ADD = {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
ARGUMENTS = {"a": 1, "名": "x"}
WANTED_CALL = {"type": "function", "function": {"name": "add", "arguments": ARGUMENTS}}


def norm(row: dict[str, Any], kind: Any = "conversation", **source: Any) -> Any:
    made = DatasetSource(path="rows.json", **source)
    return normalise(row, made, format_of(made, row, kind), kind)


def openai_call(name: str, arguments: Any, id_: str | None = None) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return call if id_ is None else {"id": id_, **call}


def with_calls(calls: Any, *results: dict[str, Any], **more: Any) -> dict[str, Any]:
    turn = {"role": "assistant", "content": None, "tool_calls": calls}
    told = [{"role": "tool", **result} for result in results]
    return {"messages": [*m("1 + 2?"), turn, *told, *m("it is 3", first="assistant")], **more}


@pytest.mark.parametrize(
    "tools",
    [
        [ADD],
        ADD,
        json.dumps([ADD]),
        json.dumps(ADD),
        [json.dumps(ADD)],
    ],
)
@pytest.mark.parametrize(
    "row",
    [
        {"messages": m("hi", "yes")},
        {"conversations": m("hi", "yes")},
        {"instruction": "hi", "output": "yes"},
        {"prompt": "hi", "completion": "yes"},
    ],
    ids=lambda row: "+".join(row),
)
def test_tools_in_any_form_beside_any_demonstration(row: dict[str, Any], tools: Any) -> None:
    made = norm({**row, "tools": tools})
    assert made.tools == [ADD]
    assert not made.raw  # plain text has no place for them


@pytest.mark.parametrize("tools", [None, "", " ", "[]", [], "null", {}])
def test_no_tools_in_any_form(tools: Any) -> None:
    assert norm({"messages": m("hi", "yes"), "tools": tools}).tools is None


@pytest.mark.parametrize("tools", [[1], "[1]", 3, False, "3", [[ADD]]])
def test_what_are_no_tools_is_refused(tools: Any) -> None:
    with pytest.raises(BadRow, match=r"tools: is a.*, not a list of tool schemas → write \[\{.name.: …"):
        norm({"messages": m("hi", "yes"), "tools": tools})


@pytest.mark.parametrize(
    "calls",
    [
        [openai_call("add", ARGUMENTS)],
        [openai_call("add", json.dumps(ARGUMENTS))],
        [{"name": "add", "arguments": ARGUMENTS}],
        json.dumps([openai_call("add", json.dumps(ARGUMENTS), "call_1")]),
    ],
)
def test_calls_with_arguments_as_text_or_object(calls: Any) -> None:
    made = norm(with_calls(calls, {"content": "3"}))
    assert made.messages[1] == {"role": "assistant", "content": "", "tool_calls": [WANTED_CALL]}


def test_a_turn_of_calls_needs_no_content() -> None:
    turn = {"role": "assistant", "tool_calls": [openai_call("add", ARGUMENTS)]}
    result = {"role": "tool", "content": "3"}
    made = norm({"messages": [*m("1 + 2?"), turn, result, *m("it is 3", first="assistant")]})
    assert made.messages[1] == {"role": "assistant", "content": "", "tool_calls": [WANTED_CALL]}


def test_calls_without_arguments() -> None:
    made = norm(with_calls([{"name": "now"}, openai_call("now", ""), openai_call("now", None)], {"content": "3"}))
    assert [call["function"] for call in made.messages[1]["tool_calls"]] == [{"name": "now", "arguments": {}}] * 3


def test_parquets_nulls_are_no_arguments_and_no_schemas(tmp_path: Path) -> None:
    def row(name: str, arguments: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
        tool = {"type": "function", "function": {"name": name, "parameters": {"properties": schema}}}
        return with_calls([openai_call(name, arguments)], {"content": "3"}, tools=[tool])

    rows = [row("add", {"a": 1}, {"a": {"type": "integer"}}), row("say", {"b": "x"}, {"b": {"enum": ["x"]}})]
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    kept = [raw for _, raw in read_source(DatasetSource(path=str(file)))]
    assert kept[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"a": 1, "b": None}
    assert [norm(raw) for raw in kept] == [norm(raw) for raw in rows]


def test_nulls_in_json_text_stay() -> None:
    made = norm(with_calls([openai_call("add", '{"a": null}')], {"content": "3"}, tools='[{"name": "f", "x": null}]'))
    assert made.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": None}
    assert made.tools == [{"name": "f", "x": None}]


def test_openais_older_call_is_one_call() -> None:
    turn = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": json.dumps(ARGUMENTS)}}
    result = {"role": "function", "name": "add", "content": "3"}
    made = norm({"messages": [*m("1 + 2?"), turn, result, *m("3", first="assistant")], "functions": [ADD]})
    assert made.messages[1]["tool_calls"] == [WANTED_CALL]
    assert made.messages[2] == {"role": "tool", "content": "3", "name": "add"}
    assert made.tools == [ADD]


def test_parallel_calls_in_one_sharegpt_turn() -> None:
    calls = json.dumps([{"name": "add", "arguments": ARGUMENTS}, {"name": "now", "arguments": {}}])
    turns = [("human", "?"), ("function_call", calls), ("observation", "3"), ("observation", "noon"), ("gpt", "3")]
    made = norm({"conversations": [{"from": role, "value": value} for role, value in turns]})
    assert [call["function"]["name"] for call in made.messages[1]["tool_calls"]] == ["add", "now"]
    assert [turn["content"] for turn in made.messages[2:4]] == ["3", "noon"]


def test_results_by_id_come_in_the_order_of_their_calls() -> None:
    calls = [openai_call("add", {"a": 1}, "x"), openai_call("now", {}, "y")]
    results = [{"content": "noon", "tool_call_id": "y"}, {"content": "3", "tool_call_id": "x"}]
    made = norm(with_calls(calls, *results))
    assert [turn["content"] for turn in made.messages if turn["role"] == "tool"] == ["3", "noon"]
    assert made == norm(with_calls(calls, *reversed(results)))
    assert "id" not in json.dumps(made.messages).replace("tool_call_id", "id")  # templates that ask get their own


@pytest.mark.parametrize("result_ids", [["y", "z"], ["x", "x"], ["x"], ["x", "y", "y"], ["x", None]])
def test_results_that_are_not_one_for_each_call_are_refused(result_ids: list[str | None]) -> None:
    calls = [openai_call("add", {"a": 1}, "x"), openai_call("now", {}, "y")]
    results = [{"content": "3", "tool_call_id": id_} for id_ in result_ids]
    with pytest.raises(BadRow, match=r"messages\[1\]\.tool_calls: calls \['x', 'y'\] are answered by results of \["):
        norm(with_calls(calls, *results))


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (
            with_calls([openai_call("add", "{oops")], {"content": "3"}),
            "messages[1].tool_calls.arguments: is a string of broken JSON",
        ),
        (
            with_calls([openai_call("add", [1])], {"content": "3"}),
            "messages[1].tool_calls.arguments: is a list, not an object → write {",
        ),
        (
            with_calls([openai_call("add", "3")], {"content": "3"}),
            "messages[1].tool_calls.arguments: is an int, not an object → write {",
        ),
        (with_calls([{"arguments": {}}], {"content": "3"}), "messages[1].tool_calls: a tool call has no `name`"),
        (with_calls([openai_call("add", {})]), "messages[2]: an assistant turn after a tool call"),
        (
            {"messages": [{"role": "user", "content": "hi", "tool_calls": [openai_call("add", {})]}, *m("a", "b")[1:]]},
            "messages[0].tool_calls: a user turn with calls → give them the assistant's role",
        ),
    ],
)
def test_broken_calls_are_named(row: dict[str, Any], line: str) -> None:
    with pytest.raises(BadRow) as caught:
        norm(row)
    assert str(caught.value).startswith(line)


def test_calls_in_a_preference_are_replies_too() -> None:
    chosen = {"role": "assistant", "content": "", "tool_calls": [openai_call("add", ARGUMENTS)]}
    made = norm({"prompt": "1 + 2?", "chosen": [chosen], "rejected": m("3", first="assistant")}, "preference")
    assert made.chosen[0]["tool_calls"] == [WANTED_CALL]


def test_thoughts_stay_beside_the_reply() -> None:
    turn = {"role": "assistant", "content": "yes", "reasoning_content": "hm", "thinking": "so"}
    assert norm({"messages": [*m("hi"), turn]}).messages[1] == turn


# --- marks, through the template -------------------------------------------------------------------------------------

MARKED = [*m("a"), {"role": "assistant", "content": "bad", "train": False}, *m("c", "good")]


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma"])
def test_a_reply_that_is_not_learned_is_context(family: str) -> None:
    tokenizer = tokenizer_of(BY_NAME[family])
    marked, whole = encode_conversation(MARKED, tokenizer), encode_conversation(m("a", "bad", "c", "good"), tokenizer)
    assert marked.ids == whole.ids
    assert marked.spans == whole.spans[1:]


def test_the_mark_outlives_calls_written_as_text() -> None:
    tokenizer = tokenizer_of(BY_NAME["gemma"])
    turn = {"role": "assistant", "content": "", "tool_calls": [WANTED_CALL], "train": False}
    turns = [*m("a"), turn, {"role": "tool", "content": "3"}, *m("good", first="assistant")]
    made = encode_conversation(turns, tokenizer, tools=[ADD])
    assert [tokenizer.decode(made.ids[a:b]).strip() for a, b in made.spans] == [f"good{BY_NAME['gemma'].stop}"]


def test_a_mark_under_supervise_all_is_refused() -> None:
    encoder = chat_encoder(tokenizer_of(BY_NAME["chatml"]))
    row = Conversation(messages=MARKED)
    (made,) = encoder.conversations([row], "all")
    assert str(made) == (
        "messages: marks a turn as not to be learned, and supervise: all learns it → "
        "set data.supervise: assistant, or take the marks out"
    )
    assert [len(one) for one in encoder.conversations([row], "last_assistant")] == [1]


def test_a_reply_that_is_not_learned_gets_no_row_of_its_own() -> None:
    """Where the last reply renders in its own way, a conversation becomes a row for each reply that is learned."""
    reply = "m['content'] + '<|im_end|>' }}{{"
    assert reply in CHATML_PLAIN
    template = CHATML_PLAIN.replace(reply, f"('last: ' if loop.last else '') + {reply}")
    encoder = chat_encoder(make(template, "<|im_end|>", special=("<|im_start|>",)))
    turns = m("a", "b", "c", "d", "e", "f")
    turns[3]["train"] = False
    whole, marked = encoder.conversations(
        [Conversation(messages=m("a", "b", "c", "d", "e", "f")), Conversation(messages=turns)], "assistant"
    )
    assert isinstance(whole, list)
    assert marked == [whole[0], whole[2]]
