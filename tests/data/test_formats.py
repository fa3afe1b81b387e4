"""Every format is recognised by its columns and brought to the one schema; every bad row is one line."""

from __future__ import annotations

from typing import Any

import pytest
from bad_rows import BAD, m, sharegpt
from hypothesis import given, settings
from hypothesis import strategies as st

from chatalign.data.formats import format_of, normalise, recognise
from chatalign.data.readers import read_label
from chatalign.data.rows import BadRow, Conversation, Preference, Prompt, Text, Unpaired
from chatalign.errors import DataError
from chatalign.recipe import DatasetSource

SOURCE = DatasetSource(path="rows.json")


def norm(row: dict[str, Any], kind: Any, **source: Any) -> Any:
    made = DatasetSource(path="rows.json", **source)
    return normalise(row, made, format_of(made, row, kind), kind)


EXAMPLES: list[tuple[str, str, dict[str, Any], Any]] = [
    ("messages", "conversation", {"messages": m("hi", "yes")}, Conversation(messages=m("hi", "yes"))),
    (
        "sharegpt",
        "conversation",
        {"conversations": [{"from": "system", "value": "s"}, *sharegpt("hi", "yes")]},
        Conversation(messages=[{"role": "system", "content": "s"}, *m("hi", "yes")]),
    ),
    ("sharegpt", "conversation", {"conversations": m("hi", "yes")}, Conversation(messages=m("hi", "yes"))),
    (
        "alpaca",
        "conversation",
        {"instruction": "add", "input": "1 2", "output": "3", "history": [["a", "b"]], "system": "s"},
        Conversation(messages=[{"role": "system", "content": "s"}, *m("a", "b", "add\n1 2", "3")]),
    ),
    (
        "alpaca",
        "conversation",
        {"instruction": "add", "input": "", "output": "3"},
        Conversation(messages=m("add", "3")),
    ),
    (
        "prompt_completion",
        "conversation",
        {"prompt": "hi", "completion": "yes"},
        Conversation(messages=m("hi", "yes"), first_supervised=1, raw=True),
    ),
    (
        "prompt_completion",
        "conversation",
        {"prompt": m("a", "b", "c"), "completion": m("d", first="assistant")},
        Conversation(messages=m("a", "b", "c", "d"), first_supervised=3),
    ),
    (
        "preference",
        "preference",
        {"chosen": m("hi", "yes"), "rejected": m("hi", "no")},
        Preference(prompt=m("hi"), chosen=m("yes", first="assistant"), rejected=m("no", first="assistant")),
    ),
    (
        "preference",
        "preference",
        {"prompt": "hi", "chosen": m("hi", "yes"), "rejected": m("hi", "no"), "score_chosen": 3.0},
        Preference(prompt=m("hi"), chosen=m("yes", first="assistant"), rejected=m("no", first="assistant")),
    ),
    (
        "preference",
        "preference",
        {"prompt": m("hi"), "chosen": m("yes", first="assistant"), "rejected": m("no", first="assistant")},
        Preference(prompt=m("hi"), chosen=m("yes", first="assistant"), rejected=m("no", first="assistant")),
    ),
    (
        "preference",
        "preference",
        {"prompt": "hi", "chosen": "yes", "rejected": "no"},
        Preference(prompt=m("hi"), chosen=m("yes", first="assistant"), rejected=m("no", first="assistant"), raw=True),
    ),
    (
        "preference",
        "preference",
        {
            "conversations": sharegpt("a", "b", "c"),
            "chosen": {"from": "gpt", "value": "yes"},
            "rejected": [{"from": "gpt", "value": "no"}],
        },
        Preference(prompt=m("a", "b", "c"), chosen=m("yes", first="assistant"), rejected=m("no", first="assistant")),
    ),
    (
        "hh",
        "preference",
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: yes",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: no",
        },
        Preference(prompt=m("a", "b", "c"), chosen=m("yes", first="assistant"), rejected=m("no", first="assistant")),
    ),
    (
        "unpaired",
        "unpaired",
        {"messages": m("a", "b", "c", "d"), "label": "true"},
        Unpaired(prompt=m("a", "b", "c"), completion=m("d", first="assistant"), label=True),
    ),
    (
        "unpaired",
        "unpaired",
        {"prompt": "a", "completion": "b", "label": 0},
        Unpaired(prompt=m("a"), completion=m("b", first="assistant"), label=False, raw=True),
    ),
    ("text", "text", {"text": "a document"}, Text(text="a document")),
    ("prompt", "prompt", {"prompt": "a", "answer": 3}, Prompt(prompt=m("a"), extra={"answer": 3}, raw=True)),
    (
        "messages",
        "prompt",
        {"messages": m("a", "b", "c", "d"), "id": 7},
        Prompt(prompt=m("a", "b", "c"), extra={"id": 7}),
    ),
    (
        "preference",
        "prompt",
        {"prompt": "a", "chosen": "x", "rejected": "y"},
        Prompt(prompt=m("a"), extra={}, raw=True),
    ),
]


@pytest.mark.parametrize(("format_", "kind", "row", "wanted"), EXAMPLES)
def test_each_format(format_: str, kind: Any, row: dict[str, Any], wanted: Any) -> None:
    assert recognise(row) == format_
    assert norm(row, kind) == wanted


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_recognition_minds_neither_order_nor_absent_columns(data: st.DataObject) -> None:
    format_, kind, row, wanted = data.draw(st.sampled_from(EXAMPLES))
    names = data.draw(st.permutations(list(row)))
    shuffled = {name: row[name] for name in names}
    for name in data.draw(st.sets(st.sampled_from(["system", "tools", "history", "input", "images", "source"]))):
        shuffled.setdefault(name, None)  # what parquet and csv hold where a row has no such column
    assert recognise(shuffled) == format_
    if kind != "prompt":
        assert norm(shuffled, kind) == wanted


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1).filter(lambda text: text.strip())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(WORDS, WORDS, WORDS)
def test_text_of_any_script_comes_through_unchanged(prompt: str, chosen: str, rejected: str) -> None:
    assert norm({"messages": m(prompt, chosen)}, "conversation").messages == m(prompt, chosen)
    assert norm({"text": prompt}, "text") == Text(text=prompt)
    row = {"conversations": sharegpt(prompt), "chosen": sharegpt("", chosen)[1], "rejected": sharegpt("", rejected)[1]}
    if chosen == rejected:
        with pytest.raises(BadRow, match="same as chosen"):
            norm(row, "preference")
    else:
        assert norm(row, "preference").chosen == m(chosen, first="assistant")


def test_tool_turns() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "1 + 2?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "it is 3"},
        ],
        "tools": '[{"name": "add", "parameters": {}}]',
    }
    made = norm(row, "conversation")
    assert [turn["role"] for turn in made.messages] == ["user", "assistant", "tool", "assistant"]
    assert made.messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    assert made.tools == [{"name": "add", "parameters": {}}]


def test_csv_cells_hold_turns_as_json() -> None:
    row = {"messages": '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]', "label": "+1"}
    assert norm(row, "unpaired").label is True


def test_columns_map_and_format_override() -> None:
    row = {"question": "1 + 1?", "answer": "2"}
    made = norm(row, "conversation", columns={"prompt": "question", "completion": "answer"})
    assert made.messages == m("1 + 1?", "2")
    both = {"prompt": "a", "messages": m("a", "b"), "chosen": m("a", "x"), "rejected": m("a", "y")}
    assert norm(both, "conversation", format="messages").messages == m("a", "b")


def test_the_sources_system_text_comes_first_where_a_row_has_none() -> None:
    made = norm({"prompt": "a", "completion": "b"}, "conversation", system="be kind")
    assert made.messages[0] == {"role": "system", "content": "be kind"}
    assert made.first_supervised == 2
    own = {"messages": [{"role": "system", "content": "own"}, *m("a", "b")]}
    assert norm(own, "conversation", system="be kind").messages[0]["content"] == "own"


@pytest.mark.parametrize(
    ("value", "label"),
    [(True, True), (False, False), ("True", True), ("false", False), (1, True), (0, False), (-1, False), ("+1", True)],
)
def test_labels(value: Any, label: bool) -> None:
    assert read_label(value) is label


@pytest.mark.parametrize("value", [2, 0.5, "good", "", None, [], "yes"])
def test_labels_that_are_no_thumb_are_refused(value: Any) -> None:
    with pytest.raises(BadRow, match="not a thumb up or down → write true or false"):
        read_label(value)


@pytest.mark.parametrize(("kind", "row", "line"), BAD)
def test_each_bad_row_is_one_line(kind: Any, row: dict[str, Any], line: str) -> None:
    with pytest.raises(BadRow) as caught:
        norm(row, kind)
    assert str(caught.value) == line
    assert "\n" not in line


def test_a_thumb_that_the_first_row_lacks_is_not_passed_over() -> None:
    first, second = {"messages": m("a", "b"), "label": None}, {"messages": m("a", "b"), "label": False}
    found = format_of(SOURCE, first, "conversation")
    assert normalise(first, SOURCE, found, "conversation") == Conversation(messages=m("a", "b"))
    with pytest.raises(BadRow) as caught:
        normalise(second, SOURCE, found, "conversation")
    assert str(caught.value) == (
        "label: is about the reply, and the source's first row has none → "
        "say `format: messages` where every reply is to be learned, or take the row out"
    )
    forced = DatasetSource(path="rows.json", format="messages")
    assert normalise(second, forced, found, "conversation") == Conversation(messages=m("a", "b"))


def test_ambiguous_columns_are_not_guessed() -> None:
    with pytest.raises(DataError) as caught:
        format_of(SOURCE, {"question": "1 + 1?", "answer": "2"}, "conversation")
    assert str(caught.value) == (
        "rows.json: no format has the columns `question`, `answer`; "
        "say `columns: {prompt: question, completion: answer}`"
    )


def test_wrong_kind_of_data_is_named() -> None:
    with pytest.raises(
        DataError, match=r"needs preference pairs \(chosen and rejected\), and the file holds alpaca rows"
    ):
        format_of(SOURCE, {"instruction": "x", "output": "y"}, "preference")


def test_chats_are_documents_only_where_the_recipe_says_so() -> None:
    row = {"messages": m("Hi", "Hello!")}
    named = DatasetSource(path="rows.jsonl", format="messages", system="Be kind.")
    format_ = format_of(named, row, "text")
    assert normalise(row, named, format_, "text") == Text(text="Be kind.\nHi\nHello!")
    with pytest.raises(DataError, match="needs plain text"):
        format_of(DatasetSource(path="rows.jsonl"), row, "text")
    with pytest.raises(DataError, match="needs plain text"):
        format_of(DatasetSource(path="rows.jsonl", format="preference"), row, "text")
    call = {"function": {"name": "add", "arguments": {}}}
    tools = {"messages": [*m("1 + 2?"), {"role": "assistant", "tool_calls": [call]}]}
    with pytest.raises(BadRow, match="have no place in plain text"):
        normalise(tools, named, "messages", "text")


def test_misspelt_columns_are_named() -> None:
    with pytest.raises(DataError, match=r"`columns\.promt` is not a name of the schema; did you mean `prompt`\?"):
        format_of(DatasetSource(path="rows.json", columns={"promt": "q"}), {"q": "x"}, "prompt")
    with pytest.raises(
        BadRow, match=r"qestion: `columns\.prompt` names a column that isn't there → did you mean `question`\?"
    ):
        norm({"question": "x"}, "prompt", columns={"prompt": "qestion"})
