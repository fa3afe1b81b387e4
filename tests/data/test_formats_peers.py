"""Files made for TRL, LLaMA-Factory, Axolotl and the alignment-handbook: recognised, or the error names the one key."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from bad_rows import m, sharegpt
from peer_rows import PEER_ROWS, REFUSED, PeerRow

from chatalign.data.formats import format_of, normalise
from chatalign.data.rows import BadRow, Conversation
from chatalign.errors import DataError
from chatalign.recipe import DatasetSource


def norm(row: dict[str, Any], kind: Any, **source: Any) -> Any:
    made = DatasetSource(path="rows.json", **source)
    return normalise(row, made, format_of(made, row, kind), kind)


def written(key: str) -> dict[str, Any]:
    """What a key that an error names, put into a source as it stands, gives."""
    return yaml.safe_load("{" + key.strip("`") + "}")


def ids(row: PeerRow) -> str:
    return f"{row.peer}-{row.kind}-{'+'.join(row.row)}"


@pytest.mark.parametrize("row", [row for row in PEER_ROWS if row.says is None], ids=ids)
def test_a_peers_row_is_recognised(row: PeerRow) -> None:
    assert norm(row.row, row.kind) == row.wanted


@pytest.mark.parametrize("row", [row for row in PEER_ROWS if row.says is not None], ids=ids)
def test_what_could_mean_several_things_names_the_key_that_settles_it(row: PeerRow) -> None:
    with pytest.raises(DataError) as caught:
        norm(row.row, row.kind)
    assert row.says is not None
    assert row.says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert norm(row.row, row.kind, **written(row.says)) == row.wanted


@pytest.mark.parametrize(("kind", "row", "line"), REFUSED)
def test_what_no_key_makes_readable_is_refused_by_name(kind: Any, row: dict[str, Any], line: str) -> None:
    with pytest.raises(DataError, match=re.escape(line)):
        format_of(DatasetSource(path="rows.json"), row, kind)


def test_stepwise_rows_still_have_prompts() -> None:
    assert norm({"prompt": "2 + 2?", "completions": ["a"], "labels": [True]}, "prompt").prompt == m("2 + 2?")


def test_roles_and_turn_keys_of_the_files_own() -> None:
    dialogue = [{"who": "Alice", "says": "hi"}, {"who": "Al B.", "says": "yes"}]
    source = {
        "columns": {"messages": "dialogue", "role": "who", "content": "says"},
        "roles": {"Alice": "user", "Al B.": "assistant"},
    }
    assert norm({"dialogue": dialogue}, "conversation", **source).messages == m("hi", "yes")
    with pytest.raises(BadRow) as caught:
        norm({"dialogue": dialogue}, "conversation", columns=source["columns"])
    assert 'say `roles: {Alice: user, "Al B.": assistant}`' in str(caught.value)
    row = {"dialogue": str(dialogue).replace("'", '"')}  # as a CSV file holds it
    assert norm(row, "conversation", format="messages", **source).messages == m("hi", "yes")


def test_llama_factorys_tags_are_roles_and_columns() -> None:
    row = {
        "dialog": [
            {"speaker": "Q", "text": "1 + 2?"},
            {"speaker": "CALL", "text": '{"name": "add", "arguments": {"a": 1}}'},
            {"speaker": "RESULT", "text": "3"},
            {"speaker": "A", "text": "it is 3"},
        ]
    }
    roles = {"Q": "user", "A": "assistant", "CALL": "function_call", "RESULT": "tool"}
    made = norm(row, "conversation", columns={"messages": "dialog", "role": "speaker", "content": "text"}, roles=roles)
    assert [turn["role"] for turn in made.messages] == ["user", "assistant", "tool", "assistant"]
    assert made.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}


def test_marks_and_thoughts_under_the_files_own_keys() -> None:
    turns = [*m("a"), {"role": "assistant", "content": "b", "learn": 0, "cot": "hm"}, *m("c", "d")]
    made = norm({"messages": turns}, "conversation", columns={"train": "learn", "reasoning_content": "cot"})
    wanted = {"role": "assistant", "content": "b", "reasoning_content": "hm", "train": False}
    assert made.messages == [*m("a"), wanted, *m("c", "d")]
    with pytest.raises(BadRow) as caught:
        norm({"messages": turns}, "conversation", columns={"train": "lern"})
    assert str(caught.value).startswith("lern: `columns.train` names a key that no turn has → the turns' are `")


def test_the_map_leaves_plain_prompts_alone() -> None:
    source = {"columns": {"role": "who", "content": "says"}, "roles": {"Alice": "user"}}
    assert norm({"prompt": "[Alice] hi", "completion": "{yes}"}, "conversation", **source) == Conversation(
        messages=m("[Alice] hi", "{yes}"), first_supervised=1, raw=True
    )


def test_role_names_are_the_schemas() -> None:
    with pytest.raises(ValueError, match=r"'system', 'user', 'assistant', 'tool' or 'function_call'"):
        DatasetSource(path="rows.json", roles={"Alice": "human"})


@pytest.mark.parametrize("name", ["on", "null", "No", "a b", "1", "名", 'a"b', "x:y", "- x", ""])
def test_a_name_in_an_error_is_read_back_by_yaml_as_itself(name: str) -> None:
    row = {"messages": [{"role": name, "content": "hi"}, *m("yes", first="assistant")]}
    with pytest.raises(BadRow) as caught:
        norm(row, "conversation")
    told = re.search(r"`(roles: \{.*\})`", str(caught.value))
    assert told is not None
    assert norm(row, "conversation", **written(told[1])).messages == m("hi", "yes")


# --- what a turn says about its own training -------------------------------------------------------------------------


def marked(key: str, *marks: Any) -> list[dict[str, Any]]:
    turns = m("a", "b", "c", "d")
    return [turn if mark is ... else {**turn, key: mark} for turn, mark in zip(turns, marks, strict=True)]


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss", "loss_scale"])
@pytest.mark.parametrize("no", [False, 0, 0.0])
def test_a_reply_marked_as_not_to_be_learned_is_marked_so(key: str, no: Any) -> None:
    made = norm({"messages": marked(key, ..., no, no, True)}, "conversation")
    assert made.messages == [*m("a"), {**m("b", first="assistant")[0], "train": False}, *m("c", "d")]


@pytest.mark.parametrize(
    ("messages", "line"),
    [
        (marked("weight", 1, 1, 0, 1), "messages[0].weight: asks to learn a user turn → write false"),
        (marked("weight", ..., 0.5, ..., 1), "messages[1].weight: 0.5 is neither true nor false → write true (1)"),
        (marked("train", ..., "no", ..., 1), "messages[1].train: 'no' is neither true nor false → write true (1)"),
        (marked("train", ..., 0, ..., 0), "messages: has no assistant turn to learn from → add the reply"),
        (
            marked("train_detail", ..., [{"begin_offset": 0}], ..., ...),
            "messages[1].train_detail: marks parts of a turn",
        ),
        ([{**turn, "train": True, "weight": 0} for turn in m("a", "b")], "messages[0]: train and weight contradict"),
        (
            [*m("a"), {"role": "assistant", "content": [{"type": "text", "text": "b", "train": False}]}],
            "messages[1].content: marks parts of a turn → learn the turn whole",
        ),
    ],
)
def test_marks_that_cannot_be_kept_are_refused(messages: list[dict[str, Any]], line: str) -> None:
    with pytest.raises(BadRow) as caught:
        norm({"messages": messages}, "conversation")
    assert str(caught.value).startswith(line)


def test_marks_do_not_reach_prompts_and_replies_need_none() -> None:
    conversation = marked("train", ..., False, ..., True)
    assert norm({"messages": conversation}, "prompt").prompt == m("a", "b", "c")
    assert norm({"messages": conversation, "label": True}, "unpaired").prompt == m("a", "b", "c")
    sides = {"chosen": [*conversation[:3], *m("x", first="assistant")], "rejected": conversation}
    assert norm(sides, "preference").prompt == m("a", "b", "c")
    sides["rejected"] = [*conversation[:3], {"role": "assistant", "content": "d", "train": False}]
    with pytest.raises(BadRow, match="rejected: is marked as not to be learned → take the mark out, or the row"):
        norm(sides, "preference")


# --- what isn't text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (
            {"messages": m("hi", "yes"), "images": ["a.png"]},
            "images: holds images, and only text is trained on → take the row out, or `images` where its text is",
        ),
        ({"instruction": "hi", "output": "yes", "audios": ["a.wav"]}, "audios: holds sound, and only text is"),
        ({"conversations": sharegpt("hi", "yes"), "video": "a.mp4"}, "video: holds videos, and only text is"),
        (
            {"messages": [{"role": "user", "content": "hi", "images": ["a.png"]}, *m("yes", first="assistant")]},
            "messages[0].images: holds images, and only text is trained on",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
                    *m("yes", first="assistant"),
                ]
            },
            "messages[0].content: has a part of type 'image_url' → take the row out, or keep text parts only",
        ),
        (
            {"messages": m("hi", "yes"), "chat_template_kwargs": {"enable_thinking": False}},
            "chat_template_kwargs: are a row's own template arguments, which aren't passed on → take the column out",
        ),
    ],
)
def test_what_training_would_leave_out_is_refused_by_name(row: dict[str, Any], line: str) -> None:
    with pytest.raises(BadRow) as caught:
        norm(row, "conversation")
    assert str(caught.value).startswith(line)


# --- preferences over several turns ----------------------------------------------------------------------------------


def test_a_conversation_before_the_replies_is_the_prompt() -> None:
    chosen, rejected = m("a", "b", "c", "d", "e", "yes"), m("a", "b", "c", "d", "e", "no")
    made = norm({"chosen": chosen, "rejected": rejected}, "preference")
    assert (made.prompt, made.chosen, made.rejected) == (chosen[:5], chosen[5:], rejected[5:])


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (
            {"chosen": m("a", "b", "c", "d"), "rejected": m("a", "x", "c", "y")},
            "chosen: parts from rejected before its last turn → cut both sides after their turn 1, so that they",
        ),
        (
            {"chosen": m("a", "b"), "rejected": m("a", "b", "c", "d")},
            "rejected: parts from chosen before its last turn → cut both sides after their turn 1, so that they",
        ),
        (
            {"prompt": "a", "chosen": m("b", "c", "d", first="assistant"), "rejected": m("x", first="assistant")},
            "chosen: is not one assistant turn (assistant, user, assistant) → let both sides differ in the last",
        ),
        (
            {"prompt": m("z"), "chosen": m("a", "b"), "rejected": m("a", "c")},
            "prompt: is not what chosen and rejected begin with → make it the turns before the replies",
        ),
        (
            {"chosen": "a", "rejected": "b"},
            "prompt: is missing → add the prompt, or put whole conversations in chosen and rejected",
        ),
    ],
)
def test_sides_that_are_no_two_replies_to_one_prompt(row: dict[str, Any], line: str) -> None:
    with pytest.raises(BadRow) as caught:
        norm(row, "preference")
    assert str(caught.value).startswith(line)


def test_a_prompt_of_turns_may_repeat_the_beginning() -> None:
    row = {"prompt": m("a", "b", "c"), "chosen": m("a", "b", "c", "d"), "rejected": m("a", "b", "c", "e")}
    assert norm(row, "preference").prompt == m("a", "b", "c")


def test_system_text_given_twice_alike_stands_once() -> None:
    messages = [{"role": "system", "content": "s"}, *m("a", "b")]
    assert norm({"messages": messages, "system": "s"}, "conversation").messages == messages
    with pytest.raises(BadRow, match="system: a second system turn → keep the column or the turn in messages"):
        norm({"messages": messages, "system": "t"}, "conversation")
    with pytest.raises(BadRow, match="system: is a list, not text → write a string, or leave it out"):
        norm({"messages": m("a", "b"), "system": ["s"]}, "conversation")
