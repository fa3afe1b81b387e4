"""What holds for every row: how its columns are laid out changes nothing, and no JSON value brings a reader down."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from bad_rows import m, sharegpt
from hypothesis import given, settings
from hypothesis import strategies as st
from peer_rows import PEER_ROWS

from chatalign.data.formats import SCHEMA_COLUMNS, format_of, normalise, recognise
from chatalign.data.rows import BadRow, Kind
from chatalign.errors import DataError
from chatalign.recipe import DatasetSource
from chatalign.recipe.sections import Format

FEW = settings(max_examples=100, deadline=None, derandomize=True)
RECOGNISED = [row for row in PEER_ROWS if row.says is None]
OPTIONAL = ["system", "tools", "history", "input", "images", "video", "audios", "functions", "chat_template_kwargs"]
SOURCE = DatasetSource(path="rows.json")
MAPPED = DatasetSource(
    path="rows.json",
    columns={"prompt": "question", "completion": "answer", "role": "speaker", "content": "text"},
    roles={"Alice": "user", "Bob": "assistant", "call": "function_call"},
)
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=12)
WORDS = TEXT.filter(lambda text: text.strip())

# Names that readers look for, so that made-up rows get past their first checks.
KEYS = st.sampled_from(
    [
        *("role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "id", "type", "text"),
        *("train", "weight", "tool_call_id", "function_call", "speaker", "images"),
    ]
)
NAMES = st.sampled_from(
    [*SCHEMA_COLUMNS, *OPTIONAL, "kto_tag", "completions", "labels", "segments", "question", "answer", "speaker"]
)
BAD_VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    0.5,
    10**40,
    float("nan"),
    "",
    " ",
    "hi",
    "true",
    "[[",
    "[1, 2]",
    "NaN",
]
BAD_VALUES += ['[{"role": "user", "content": "hi"}]', '{"name": "f"}', "\n\nHuman: a", "\n\nHuman: a\n\nAssistant: b"]
BAD_VALUES += [[], {}, [None], [[]], [{}], [0], ["hi"], [["a", "b"]], {"role": []}, {"role": "user"}, {"name": "f"}]
BAD_VALUES += [m("hi"), m("hi", "yes"), sharegpt("hi", "yes"), [{"role": "user", "content": [{"type": "image"}]}]]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from(BAD_VALUES)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | TEXT, inner, max_size=3),
    max_leaves=6,
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool", "system"]) | JSON, "content": WORDS | JSON},
        optional={"tool_calls": JSON, "train": JSON, "tool_call_id": JSON},
    ),
    max_size=5,
)
ROWS = st.dictionaries(NAMES, JSON | TURNS, max_size=6)


def norm(row: dict[str, Any], kind: Any, source: DatasetSource = SOURCE) -> Any:
    return normalise(row, source, format_of(source, row, kind), kind)


def survives(row: dict[str, Any], source: DatasetSource, kind: Any) -> None:
    """A stage reads the row, or says in one line why it can't; the row is left as it is."""
    before, said = repr(row), ""
    try:
        norm(row, kind, source)
    except BadRow as bad:
        said = f"{bad.problem}{bad.mend}"
    except DataError as error:
        said = str(error)
    assert "\n" not in said
    assert repr(row) == before


@FEW
@given(st.data())
def test_order_absent_and_further_columns_change_nothing(data: st.DataObject) -> None:
    example = data.draw(st.sampled_from(RECOGNISED))
    row = {name: example.row[name] for name in data.draw(st.permutations(list(example.row)))}
    for name in data.draw(st.sets(st.sampled_from(OPTIONAL))):
        row.setdefault(name, None)  # what parquet and csv hold where a row has no such column
    further = data.draw(st.dictionaries(WORDS.map(lambda name: f"x {name}"), JSON, max_size=2))
    assert recognise({**further, **row}) == recognise(example.row)
    if example.kind != "prompt":  # prompts keep further columns
        assert norm({**further, **row}, example.kind) == example.wanted
    dropped = {name: value for name, value in row.items() if value is not None}
    assert norm(dropped, example.kind) == example.wanted


@FEW
@given(WORDS, WORDS, WORDS, WORDS)
def test_text_of_any_script_comes_through_every_format(system: str, prompt: str, reply: str, column: str) -> None:
    turns, name = m(prompt, reply), f"x{column}"
    before = [{"role": "system", "content": system}]
    assert norm({"messages": turns, "system": system}, "conversation").messages == [*before, *turns]
    assert norm({"conversations": sharegpt(prompt, reply)}, "conversation").messages == turns
    assert norm({"instruction": prompt, "output": reply}, "conversation").messages == turns
    assert norm({"prompt": prompt, "chosen": reply, "rejected": f"{reply}."}, "preference").chosen == turns[1:]
    source = DatasetSource(path="rows.json", columns={"prompt": name, "completion": "y"}, roles={system: "user"})
    assert norm({name: prompt, "y": reply}, "conversation", source).messages == turns


@FEW
@given(st.lists(WORDS, min_size=2, max_size=2, unique=True))
def test_any_two_role_names_can_be_mapped(names: list[str]) -> None:
    turns = [{"role": name, "content": content} for name, content in zip(names, ("hi", "yes"), strict=True)]
    source = DatasetSource(path="rows.json", roles=dict(zip(names, ("user", "assistant"), strict=True)))
    assert norm({"messages": turns}, "conversation", source).messages == m("hi", "yes")


@FEW
@given(ROWS, st.sampled_from(get_args(Kind)))
def test_any_json_under_known_columns_is_read_or_refused(row: dict[str, Any], kind: Any) -> None:
    survives(row, SOURCE, kind)
    survives(row, MAPPED, kind)


@pytest.mark.parametrize("name", get_args(Format))
def test_a_format_that_the_recipe_forces_is_read_or_refused(name: Any) -> None:
    source = DatasetSource(path="rows.json", format=name, system="be kind")
    for example in PEER_ROWS:
        survives(example.row, source, example.kind)
        for bad in BAD_VALUES:
            survives(dict.fromkeys(SCHEMA_COLUMNS, bad), source, example.kind)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a value with each of its keys or places."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def test_a_good_row_with_any_one_value_replaced_is_read_or_refused() -> None:
    for example in PEER_ROWS:
        row = copy.deepcopy(example.row)
        for container, key in list(places(row)):
            good = container[key]
            for bad in BAD_VALUES:
                container[key] = bad
                survives(row, SOURCE, example.kind)
            container[key] = good


def test_a_good_row_with_any_value_in_any_other_column_is_read_or_refused() -> None:
    for example in PEER_ROWS:
        for name in [*SCHEMA_COLUMNS, *OPTIONAL, "kto_tag"]:
            for bad in BAD_VALUES:
                survives({**example.row, name: bad}, SOURCE, example.kind)
