"""What `chatalign inspect` prints of rows, lengths and drops; and that the self-check would notice wrong targets.

Snapshots lie in tests/golden/preview; ``CHATALIGN_RECORD=1 python -m pytest tests/data/test_preview.py`` records.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from chat_families import BY_NAME, CHATML, TOOLS, make, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from chatalign.commands import app
from chatalign.data import prepare
from chatalign.data.chat import ChatEncoder, chat_encoder
from chatalign.data.rows import Conversation
from chatalign.data.spans import Rendered
from chatalign.data.verify import verify
from chatalign.errors import RecipeError, TemplateError
from chatalign.preview import preview, print_preview
from chatalign.preview.tokens import TokenTexts, segments
from chatalign.recipe import DataSection

ROOT = Path(__file__).resolve().parent.parent.parent
GOLDEN = ROOT / "tests" / "golden" / "preview"
TOKENIZER = tokenizer_of(BY_NAME["chatml"])
ROW = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
HARD = "你好 👩‍🚀 <|im_end|> a\u200bb\u202eevil\x1b[31m\u00a0\tשלום ⟦x⟧"  # every kind of text that hides or pretends
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
WITH_TOOLS = [
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "content": "3"},
    {"role": "assistant", "content": "it is 3"},
]
KINDS: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "conversation": (
        "conversation",
        [
            {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": HARD}, ROW[1]]},
            {"messages": [ROW[0], {"role": "assistant", "content": "yes " * 100}]},
            {"messages": [ROW[0]]},
        ],
    ),
    "tools": ("conversation", [{"messages": WITH_TOOLS, "tools": [{"name": "add", "parameters": {}}]}]),
    "text": ("text", [{"text": "hello world\n\n你好"}, {"text": "the answer " * 60}]),
    "preference": (
        "preference",
        [
            {"prompt": "hello " * 80, "chosen": "yes", "rejected": "no"},
            {"prompt": "hi", "chosen": "a", "rejected": "a"},
        ],
    ),
    "prompt": ("prompt", [{"prompt": "hi"}, {"prompt": "what is " * 60}]),
    "unpaired": (
        "unpaired",
        [{"prompt": "hi", "completion": "yes", "label": True}, {"prompt": "hi", "completion": "no", "label": False}],
    ),
}


def printed(
    path: Path, rows: list[dict[str, Any]], kind: Any, *, colour: bool = False, tokens: bool = False, **asked: Any
) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    data = {"max_length": 128, "on_bad_row": "drop"} | asked.pop("data", {})
    section = DataSection(datasets=[{"path": str(path)}], **data)
    tokenizer = asked.pop("tokenizer", TOKENIZER)
    shown = preview(prepare(section, tokenizer, kind, seed=0), section, tokenizer, kind, **asked)
    out = io.StringIO()
    system: Any = "standard" if colour else None
    console = Console(file=out, width=110, force_terminal=colour, color_system=system, no_color=False)
    print_preview(shown, console, tokens=tokens, supervise=section.supervise)
    return out.getvalue()


def trimmed(text: str) -> str:
    return "".join(line.rstrip() + "\n" for line in text.splitlines())


def same_as_golden(text: str, name: str) -> None:
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("CHATALIGN_RECORD"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(trimmed(text), "utf-8")
    assert trimmed(text) == path.read_text("utf-8")


@pytest.mark.parametrize("name", KINDS)
def test_rows_of_each_kind(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kind, rows = KINDS[name]
    asked: dict[str, Any] = {}
    if name == "tools":
        asked = {"tokenizer": make(TOOLS, "<|im_end|>", special=("<|im_start|>",)), "data": {"max_length": 256}}
    same_as_golden(printed(Path("rows.jsonl"), rows, kind, **asked), name)


def test_each_token_with_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kind, rows = KINDS["conversation"]
    text = printed(Path("rows.jsonl"), rows, kind, tokens=True, count=1)
    same_as_golden(text, "tokens")
    ids = chat_encoder(TOKENIZER).conversation(Conversation(messages=rows[0]["messages"]), "assistant").ids
    shown = [cell.rpartition(" ")[2].strip("⟦⟧\n") for cell in text.split("\nlengths")[0].split("│")[1:]]
    assert [int(id_) for cell in shown for id_ in cell.split("+")] == ids


def test_targets_special_tokens_and_lengths_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    text = printed(path, [{"messages": ROW}] * 3, "conversation", count=1)
    assert "<|im_start|>user⏎\nhi<|im_end|>⏎\n<|im_start|>assistant⏎\n⟦yes<|im_end|>⟧⏎\n" in text
    encoded = chat_encoder(TOKENIZER).conversation(Conversation(messages=ROW), "assistant")
    length, targets = len(encoded.ids), sum(encoded.supervised)
    filled = f"packed, 1 bin of 128 tokens, {3 * length / 128:.1%} full"
    assert f"{targets / length:.0%} of the tokens are targets; {filled}" in text
    assert "3 rows to train on, 0 to evaluate on" in text
    coloured = printed(path, [{"messages": ROW}] * 3, "conversation", colour=True)
    assert "\x1b[32myes" in coloured
    assert "⟦" not in coloured


def test_both_sides_of_a_pair_and_labels_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    text = printed(path, [{"prompt": "hi", "chosen": "yes", "rejected": "no"}], "preference")
    assert "chosen: ⟦yes<|im_end|>⟧" in text
    assert "rejected: ⟦no<|im_end|>⟧" in text
    assert "label: thumb down" in printed(path, [{"prompt": "hi", "completion": "x", "label": 0}], "unpaired")


@pytest.mark.parametrize(
    ("prompt", "chosen", "where"),
    [
        ("hello " * 60, "yes", "at the prompt's start"),
        ("hi", "yes " * 60, "at a reply's end"),
        ("hello " * 60, "yes " * 60, "at the prompt's start and a reply's end"),
    ],
)
def test_a_pair_says_where_it_was_cut(prompt: str, chosen: str, where: str, tmp_path: Path) -> None:
    text = printed(tmp_path / "rows.jsonl", [{"prompt": prompt, "chosen": chosen, "rejected": "no"}], "preference")
    assert re.search(rf"^cut from \d+ to 128 tokens, {where}$", text, flags=re.M)


def test_brackets_stand_in_for_colour_wherever_it_is_turned_off(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": ROW}))
    section = DataSection(datasets=[{"path": str(path)}])
    shown = preview(prepare(section, TOKENIZER, "conversation", seed=0), section, TOKENIZER, "conversation")
    console = Console(file=(out := io.StringIO()), force_terminal=True, color_system="standard", no_color=True)
    print_preview(shown, console)
    assert "⟦" in out.getvalue()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(max_size=40))
def test_no_text_hides_or_reaches_the_terminal(text: str) -> None:
    """Controls, formats and private-use characters become signs; the rest is what it was."""
    made = segments(text)
    assert "".join(part.text for part in made if not part.sign) == "".join(
        char for char in text if not any(part.sign for part in segments(char))
    )
    for char in "".join(part.text for part in made):
        assert char == "\n" or unicodedata.category(char) not in ("Cc", "Cf", "Co", "Cs", "Zl", "Zp")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("你好👩‍🚀é \n")), max_size=30))
@pytest.mark.parametrize("family", ["chatml", "mistral", "mistral_legacy"])
def test_characters_stay_whole(family: str, text: str) -> None:
    """Pieces end where characters end, in byte-level and byte-fallback tokenizers, and lose nothing."""
    tokenizer = tokenizer_of(BY_NAME[family])
    ids = ChatEncoder(tokenizer).text.ids("x" + text)
    pieces = TokenTexts(tokenizer).pieces(ids, [0] * len(ids), [0] * len(ids))
    assert [id_ for piece in pieces for id_ in piece.ids] == ids
    joined = "".join(piece.text for piece in pieces)
    assert joined.removeprefix(" " * (family != "chatml")) == "x" + text


def test_an_emoji_of_several_tokens_is_one_piece_and_a_cut_one_is_marked() -> None:
    ids = ChatEncoder(TOKENIZER).text.ids("a👩b")
    texts = TokenTexts(TOKENIZER)
    whole = texts.pieces(ids, [0] * len(ids), [0] * len(ids))
    assert [piece.text for piece in whole] == ["a", "👩", "b"]
    assert len(whole[1].ids) > 1
    cut = texts.pieces(ids[:-2], [0] * (len(ids) - 2), [0] * (len(ids) - 2))
    assert [piece.text for piece in cut] == ["a", "�"]


def test_a_certain_row_of_a_certain_split(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i}", "completion": f"{i} is it"} for i in range(30)]
    path = tmp_path / "rows.jsonl"
    text = printed(path, rows, "conversation", data={"eval_fraction": 0.4}, split="eval", row=2)
    assert "row 2 of " in text
    assert "row 1 of " not in text
    place = int(text.split("rows.jsonl:")[1].split(" ")[0])
    assert f"⟦{place - 1} is it<|im_end|>⟧" in text
    with pytest.raises(RecipeError, match="there is no row 99; give a number from 1 to "):
        printed(path, rows, "conversation", data={"eval_fraction": 0.4}, split="eval", row=99)
    with pytest.raises(RecipeError, match=r"no rows to evaluate on; set `data\.eval_fraction`"):
        printed(path, rows, "conversation", split="eval")


def call(*arguments: str) -> tuple[int, str]:
    outcome = CliRunner().invoke(app, ["inspect", *arguments])
    assert outcome.exception is None or isinstance(outcome.exception, SystemExit), outcome.exception
    return outcome.exit_code, outcome.output


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (None, "⟦我一天大。<|im_end|>⟧"),  # the first stage that trains is sft
        ("reward", "rejected: ⟦"),
        ("ppo", "no targets, and batched by the rollout"),
    ],
)
def test_stages_of_a_pipeline_that_never_ran(
    stage: str | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their model isn't there yet: the tokenizer is that of the model where the pipeline starts."""
    monkeypatch.chdir(ROOT)
    few = [f"{name}.data.datasets.0.max_rows=20" for name in ("sft", "reward", "ppo")]
    code, text = call(
        "recipes/quickstart.yaml", f"output_dir={tmp_path}", *few, "--rows", "1", *(["--stage", stage] if stage else [])
    )
    assert code == 0, text
    assert words in text
    assert "row 1 of 20" in text


def test_the_page_on_data_shows_what_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "100")
    section = (ROOT / "docs" / "data.md").read_text("utf-8").split("\n## Looking at rows\n")[1].split("\n## ")[0]
    whole, by_token = re.findall(r"^```text\n(.*?)^```", section, flags=re.M | re.S)
    given = shlex.split(re.search(r"`chatalign inspect (recipes/sft\.yaml .+?)`", section)[1])  # type: ignore[index]
    code, text = call(*given)
    assert (code, trimmed(text)) == (0, whole)
    assert by_token in trimmed(call(*given, "--tokens")[1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["recipes/quickstart.yaml", "--stage", "rewards"], "has no stage `rewards`; did you mean `reward`?"),
        (["recipes/quickstart.yaml", "--stage", "zzz"], "it has base, sft, reward, dpo, ppo, eval"),
        (["recipes/quickstart.yaml", "--stage", "eval"], "no training rows to inspect; these have: sft, reward"),
        (["recipes/eval.yaml"], "without training rows has nothing to inspect"),
        (["recipes/sft.yaml", "--html", "README.md/x.html", "data.datasets.0.max_rows=5"], "can't be written"),
    ],
)
def test_what_cannot_be_shown_gets_one_line(arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    code, text = call(*arguments, *(["data.eval_fraction=0"] if arguments[0].endswith("sft.yaml") else []))
    assert code == 2, text
    assert words in text
    assert len(text.strip().splitlines()) == 1


def planted() -> tuple[Rendered, list[int], tuple[int, int]]:
    encoder = chat_encoder(TOKENIZER)
    rendered = encoder.finder.find(ROW, (1,))
    encoded = encoder.conversation(Conversation(messages=ROW), "assistant")
    return rendered, encoded.ids, encoded.spans[0]


def test_the_self_check_passes_right_targets() -> None:
    rendered, ids, span = planted()
    verify(rendered, ids, (span,), chat_encoder(TOKENIZER).text, guarded=False)


@pytest.mark.parametrize(
    ("shift", "problem"),
    [
        ((0, -1), "exactly one stop token"),
        ((1, 0), "the targets decode to"),
        ((-3, 0), "exactly one stop token|decode to"),
        ((0, 1), "exactly one stop token"),
    ],
)
def test_the_self_check_notices_targets_that_are_off(shift: tuple[int, int], problem: str) -> None:
    rendered, ids, (first, last) = planted()
    with pytest.raises(TemplateError, match=problem):
        verify(rendered, ids, ((first + shift[0], last + shift[1]),), chat_encoder(TOKENIZER).text, guarded=False)


def test_the_self_check_notices_a_moved_boundary_and_a_missing_span() -> None:
    rendered, ids, (first, last) = planted()
    encoder = chat_encoder(TOKENIZER).text
    with pytest.raises(TemplateError, match="change when a reply follows"):
        verify(rendered, [ids[0], *ids], ((first + 1, last + 1),), encoder, guarded=False)
    with pytest.raises(TemplateError, match="1 replies were rendered and 0"):
        verify(rendered, ids, (), encoder, guarded=False)


def test_two_bos_tokens_stop_the_run() -> None:
    twice = make("{{ bos_token + bos_token }}" + CHATML, "<|im_end|>", "<s>", ("<|im_start|>",))
    with pytest.raises(TemplateError, match="two BOS tokens"):
        ChatEncoder(twice).conversations([Conversation(messages=ROW)], "assistant")


@pytest.mark.parametrize(
    ("ending", "target"),
    [
        ("<|im_end|><|im_end|>", "<|im_end|>"),  # doubled
        ("<|im_end|>\\n<|eos|>", "<|im_end|>"),  # like Phi-3
        ("<|eor|><|im_end|>", "<|eor|><|im_end|>"),  # like Command R7B
        (" <|im_end|>", " <|im_end|>"),  # like Llama-2
    ],
)
def test_turns_that_end_in_more_than_one_token(ending: str, target: str) -> None:
    template = CHATML.replace("m['content'] + '<|im_end|>' }}{% endgen", f"m['content'] + '{ending}' }}}}{{% endgen")
    tokenizer = make(template, "<|im_end|>", special=("<|im_start|>", "<|eos|>", "<|eor|>"))
    encoded = ChatEncoder(tokenizer).conversation(Conversation(messages=ROW), "assistant")
    marked = [id_ for id_, mark in zip(encoded.ids, encoded.supervised, strict=True) if mark]
    assert tokenizer.decode(marked) == f"yes{target}"


def test_a_template_that_changes_rows_by_their_content_is_noticed_or_followed() -> None:
    """A reply that the template cuts is refused; one that it trims is followed."""
    cutting = CHATML.replace("m['content'] + '<|im_end|>' }}{% endgen", "m['content'][:3] + '<|im_end|>' }}{% endgen")
    tokenizer = make(cutting, "<|im_end|>", special=("<|im_start|>",))
    row = [ROW[0], {"role": "assistant", "content": "yes, I do"}]
    (made,) = ChatEncoder(tokenizer).conversations([Conversation(messages=row)], "assistant")
    assert "leaves out a part of the reply 'yes, I do'" in str(made)
