"""What `chatalign inspect` shows of rows, lengths and drops; and that the self-check would notice wrong targets."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from chat_families import BY_NAME, CHATML, make, tokenizer_of
from rich.console import Console

from chatalign.data.chat import ChatEncoder, chat_encoder
from chatalign.data.preview import inspect_rows
from chatalign.data.rows import Conversation
from chatalign.data.spans import Rendered
from chatalign.data.verify import verify
from chatalign.errors import TemplateError
from chatalign.recipe import DataSection

TOKENIZER = tokenizer_of(BY_NAME["chatml"])
ROW = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def shown(tmp_path: Path, row: dict[str, object], kind: object, *, colour: bool = False) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps(row) + "\n") * 3)
    section = DataSection(datasets=[{"path": str(path)}], max_length=64)
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=colour, color_system="standard" if colour else None)
    inspect_rows(section, TOKENIZER, kind, rows=1, console=console)  # type: ignore[arg-type]
    return out.getvalue()


def test_targets_special_tokens_and_lengths_are_shown(tmp_path: Path) -> None:
    text = shown(tmp_path, {"messages": ROW}, "conversation")
    assert "<|im_start|>user⏎\nhi<|im_end|>⏎\n<|im_start|>assistant⏎\n⟦yes<|im_end|>⟧⏎\n" in text
    encoded = chat_encoder(TOKENIZER).conversation(Conversation(messages=ROW), "assistant")
    length, targets = len(encoded.ids), sum(encoded.supervised)
    bins = 1 if 3 * length <= 64 else 2 if 2 * length <= 64 else 3
    filled = f"packed, {bins} bins of 64 tokens, {3 * length / (64 * bins):.1%} full"
    assert f"{targets / length:.0%} of the tokens are targets; {filled}" in text
    assert "3 rows to train on, 0 to evaluate on" in text
    coloured = shown(tmp_path, {"messages": ROW}, "conversation", colour=True)
    assert "\x1b[32myes" in coloured
    assert "⟦" not in coloured


def test_both_sides_of_a_pair_and_labels_are_shown(tmp_path: Path) -> None:
    text = shown(tmp_path, {"prompt": "hi", "chosen": "yes", "rejected": "no"}, "preference")
    assert "chosen: ⟦yes<|im_end|>⟧" in text
    assert "rejected: ⟦no<|im_end|>⟧" in text
    assert "label: thumb down" in shown(tmp_path, {"prompt": "hi", "completion": "x", "label": 0}, "unpaired")


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
