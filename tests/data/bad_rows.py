"""Rows that can't be trained on, each with the line that its reader sees."""
# ruff: noqa: E501 - a table reads best with a row a line
# fmt: off

from __future__ import annotations

from typing import Any


def m(*contents: str, first: str = "user") -> list[dict[str, Any]]:
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def sharegpt(*contents: str) -> list[dict[str, Any]]:
    return [{"from": ("human", "gpt")[i % 2], "value": content} for i, content in enumerate(contents)]


A, U = "assistant", "user"
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("conversation", {"messages": []}, "messages: has no turns → add at least one user turn"),
    (
        "conversation",
        {"messages": "hello"},
        'messages: is a str, not a list of turns → write [{"role": "user", "content": "…"}, …]',
    ),
    ("conversation", {"messages": ["hi"]}, 'messages[0]: is a str, not a turn → write {"role": …, "content": …}'),
    (
        "conversation",
        {"messages": [{"content": "x"}]},
        "messages[0]: has no `role` → add `role` (or `from`): user, assistant, system or tool",
    ),
    (
        "conversation",
        {"messages": [{"role": "boss", "content": "x"}]},
        "messages[0].role: 'boss' is not a known role → use user, assistant, system or tool, or say `roles: {boss: user}` (assistant, system, tool, function_call)",
    ),
    (
        "conversation",
        {"messages": m("hi", " ")},
        "messages[1].content: is empty → write the text, or take the turn out",
    ),
    (
        "conversation",
        {"messages": [*m("hi"), {"role": A}]},
        "messages[1].content: is missing, not text → write a string",
    ),
    (
        "conversation",
        {"messages": [*m("hi"), {"role": A, "content": 3}]},
        "messages[1].content: is an int, not text → write a string",
    ),
    (
        "conversation",
        {"messages": [*m("hi"), {"role": A, "content": [{"type": "image"}]}]},
        "messages[1].content: has a part of type 'image' → take the row out, or keep text parts only",
    ),
    ("conversation", {"messages": m("hi")}, "messages: has no assistant turn to learn from → add the reply"),
    (
        "conversation",
        {"messages": m("yes", first=A)},
        "messages[0]: the first turn is the assistant's → start with a user turn",
    ),
    (
        "conversation",
        {"messages": [*m("hi", "a"), *m("b", first=A)]},
        "messages[2]: two assistant turns in a row → merge them, or add the turn between them",
    ),
    (
        "conversation",
        {"messages": [*m("hi"), *m("hi", "a")]},
        "messages[1]: two user turns in a row → merge them, or add the turn between them",
    ),
    (
        "conversation",
        {"messages": [*m("hi"), {"role": "system", "content": "s"}]},
        "messages[1]: a system turn that isn't first → keep one system turn, at the start",
    ),
    (
        "conversation",
        {"messages": [{"role": "system", "content": "s"}] * 2},
        "messages[1]: a second system turn → keep one system turn, at the start",
    ),
    (
        "conversation",
        {"messages": [*m("hi"), {"role": "tool", "content": "3"}]},
        "messages[1]: a tool result after a user turn → put the assistant's tool call before it",
    ),
    (
        "conversation",
        {"conversations": [*sharegpt("hi"), {"from": "function_call", "value": "{oops"}]},
        "conversations[1].value: is a string of broken JSON → mend it (Expecting property name enclosed in double quotes at character 1)",
    ),
    (
        "conversation",
        {"conversations": [*sharegpt("hi"), {"from": "function_call", "value": "{}"}]},
        'conversations[1].value: a tool call has no `name` → write {"name": …, "arguments": {…}}',
    ),
    (
        "conversation",
        {"conversations": sharegpt("hi", "a"), "tools": "[1]"},
        'tools: is a list, not a list of tool schemas → write [{"name": …, "parameters": …}]',
    ),
    ("conversation", {"instruction": "x", "output": ""}, "output: is empty → write the text, or take the row out"),
    (
        "conversation",
        {"instruction": "x", "output": "y", "input": 3},
        "input: is an int, not text → write a string, or leave it out",
    ),
    (
        "conversation",
        {"instruction": "x", "output": "y", "history": [["a"]]},
        'history[0]: is not a pair → write ["instruction", "reply"]',
    ),
    (
        "conversation",
        {"prompt": "x", "completion": 3},
        'completion: is an int, not a list of turns → write [{"role": "user", "content": "…"}, …]',
    ),
    (
        "preference",
        {"prompt": "x", "chosen": "a", "rejected": "a"},
        "rejected: is the same as chosen → give two different replies, or take the row out",
    ),
    (
        "preference",
        {"prompt": "x", "chosen": "a", "rejected": " "},
        "rejected: is empty → write the text, or take the row out",
    ),
    (
        "preference",
        {"chosen": "a", "rejected": "b"},
        "prompt: is missing → add the prompt, or put whole conversations in chosen and rejected",
    ),
    (
        "preference",
        {"chosen": m("x", "a"), "rejected": m("y", "b")},
        "rejected: starts with another prompt than chosen → give both sides one prompt",
    ),
    (
        "preference",
        {"chosen": m("x", "a"), "rejected": m("b", first=A)},
        "rejected: holds other turns than chosen → give whole conversations or replies on both sides",
    ),
    (
        "preference",
        {"chosen": m("x", "a", "y", "b"), "rejected": m("x", "c", "y", "d")},
        "chosen: parts from rejected before its last turn → cut both sides after their turn 1, so that they differ in the last reply only",
    ),
    (
        "preference",
        {"prompt": m("x", "y"), "chosen": "a", "rejected": "b"},
        "prompt[1]: the last turn is the assistant's → end it before the assistant's reply",
    ),
    ("preference", {"prompt": "x", "chosen": [], "rejected": m("b", first=A)}, "chosen: has no turns → add the reply"),
    (
        "unpaired",
        {"prompt": "x", "completion": "a", "label": "good"},
        "label: 'good' is not a thumb up or down → write true or false",
    ),
    ("unpaired", {"messages": m("a"), "label": True}, "messages[0]: the last turn is the user's → add the reply"),
    ("text", {"text": "\n"}, "text: is empty → write the text, or take the row out"),
    ("text", {"text": 3}, "text: is an int, not text → write a string"),
    ("prompt", {"prompt": ""}, "prompt: is empty → write the text, or take the row out"),
]
