"""No false alarm: recipes that nothing is wrong with are checked, prepared, trained and used, without a word."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from data.chat_families import CHATML_PLAIN, NEXT_ROLE, PLAIN, THINKING, TOOLS, make

from chatalign import evaluate
from chatalign.artifact import load_artifact
from chatalign.chat.window import open_conversation
from chatalign.check import check_recipe, token_findings
from chatalign.data import Kind, prepare
from chatalign.models.tokenizer import load_tokenizer, text_hashes
from chatalign.pipeline import run_stage
from chatalign.recipe import DataSection, EvalRecipe, ModelSection
from mutants.clean_recipes import FAMILIES, RECIPES, clean_recipe, write_models, write_rows

# Llama 2's shape: each round of question and answer has a BOS of its own.
ROUND = (
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'system' %}{{ raise_exception('no system turns') }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_TOKENS = ("<|im_start|>", "<|eor|>")
ROWS_OF_A_KIND: dict[str, Kind] = {
    "turns": "conversation",
    "sharegpt": "conversation",
    "pairs": "preference",
    "conversations": "preference",
    "thumbs": "unpaired",
    "prompts": "prompt",
    "text": "text",
}


def named_templates() -> Any:
    """A tokenizer with a template for chat and one for tools."""
    tokenizer = make.__wrapped__(CHATML_PLAIN, "<|im_end|>", None, ("<|im_start|>",))
    tokenizer.chat_template = {"default": CHATML_PLAIN, "tool_use": TOOLS}
    return tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows, a model for each family, and later the finished runs."""
    folder = tmp_path_factory.mktemp("clean")
    write_rows(folder)
    write_models(folder / "models")
    return folder


@pytest.fixture(autouse=True)
def silent(caplog: pytest.LogCaptureFixture) -> Any:
    """No test here may leave a warning of chatalign's."""
    yield
    ours = [record for record in caplog.get_records("call") if record.name.startswith("chatalign")]
    assert [record.getMessage() for record in ours if record.levelno >= logging.WARNING] == []


def finished(name: str, folder: Path) -> Path:
    """The run of a clean recipe, made first where it isn't there yet, like those that it starts from."""
    recipe: Any = clean_recipe(name, folder)
    for needed in (RECIPES[name].starts_from, RECIPES[name].rewards_by):
        if needed:
            finished(needed, folder)
    if not (Path(recipe.output_dir) / "artifact.json").is_file():
        findings = [*check_recipe(recipe), *token_findings(recipe)]
        assert [str(finding.problem) for finding in findings if finding.problem] == []
        run_stage(recipe)
    return Path(recipe.output_dir)


@pytest.mark.parametrize("name", RECIPES)
def test_a_clean_recipe_is_checked_and_trained(place: Path, name: str) -> None:
    artifact = load_artifact(finished(name, place))
    assert artifact.stage == RECIPES[name].stage
    assert sum(used.used for used in artifact.data) > 0
    assert not any(used.dropped for used in artifact.data)


@pytest.mark.parametrize("rows", ROWS_OF_A_KIND)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "no_template"])
def test_clean_rows_of_every_kind_are_prepared_anew_and_from_what_was_kept(place: Path, family: str, rows: str) -> None:
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(place / "models" / family)), chat=True)
    section = DataSection(datasets=[{"path": str(place / f"{rows}.jsonl")}], max_length=128)
    for _ in range(2):
        prepared = prepare(section, tokenizer, ROWS_OF_A_KIND[rows], seed=0)
        assert [used.dropped for used in prepared.used] == [{}]


# What a user may do to the `data:` section and to a template's file without anything being wrong.
SECTIONS: dict[str, dict[str, Any]] = {
    "held-out share": {"eval_fraction": 0.4},
    "held-out file": {"eval_datasets": [{"path": "other.jsonl"}]},
    "weights": {"datasets": [{"path": "turns.jsonl", "weight": 2}, {"path": "sharegpt.jsonl", "weight": 1}]},
    "system text": {"datasets": [{"path": "strings.jsonl", "system": "You are brief."}]},
    "all tokens": {"supervise": "all"},
    "two processes": {"num_proc": 2},
    "long rows dropped": {"on_overlong": "drop"},
}


@pytest.mark.parametrize("name", SECTIONS)
def test_clean_sections_are_prepared(place: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    raw: dict[str, Any] = {"datasets": [{"path": "turns.jsonl"}], "max_length": 256} | SECTIONS[name]
    Path("other.jsonl").write_text('{"prompt": "What is the answer?", "completion": "Paris"}\n')
    recipe: Any = clean_recipe("sft", place).model_copy(update={"data": DataSection.model_validate(raw)})
    assert [finding.problem for finding in check_recipe(recipe) if finding.problem] == []
    assert [finding.problem for finding in token_findings(recipe) if finding.problem] == []
    prepare(recipe.data, load_tokenizer(recipe.model), "conversation", seed=0)


# Templates with a trait that a guard might take for a fault, each exact all the same.
TRAITS = {
    "thoughts on the last reply only": make(THINKING, "<|im_end|>", None, ("<|im_start|>",)),
    "a turn ends where the next role begins": make(NEXT_ROLE, "<|endoftext|>", None, ("<|user|>", "<|assistant|>")),
    "tools": make(TOOLS, "<|im_end|>", None, ("<|im_start|>",)),
    "a space before the reply": make(PLAIN, "<|end|>"),
    "two stop tokens": make(CHATML_PLAIN.replace("<|im_end|>", "<|eor|><|im_end|>"), "<|im_end|>", None, _TOKENS),
    "BOS in each round": make("{% for m in messages %}" + ROUND, "</s>", "<s>", metaspace="first"),
    "several by name": named_templates(),
}


@pytest.mark.parametrize("rows", ["turns", "pairs", "prompts"])
@pytest.mark.parametrize("trait", TRAITS)
def test_templates_with_a_trait_are_clean(place: Path, tmp_path: Path, trait: str, rows: str) -> None:
    TRAITS[trait].save_pretrained(tmp_path)
    tokenizer = load_tokenizer(ModelSection(tokenizer_name_or_path=str(tmp_path)), chat=True)
    data = DataSection(datasets=[{"path": str(place / f"{rows}.jsonl")}], max_length=256)
    assert [used.dropped for used in prepare(data, tokenizer, ROWS_OF_A_KIND[rows], seed=0).used] == [{}]
    assert text_hashes(tokenizer, tmp_path)["chat_template_sha256"]


@pytest.mark.parametrize("name", ["sft", "dpo-on-its-adapter", "sft-last-reply", "ppo-by-function", "ppo-by-model"])
def test_a_clean_run_is_talked_to(place: Path, name: str) -> None:
    run = str(finished(name, place))
    conversation = open_conversation(run, temperature=1.0, top_p=1.0, max_new_tokens=4, seed=0)
    conversation.turns.append({"role": "user", "content": "hello"})
    "".join(conversation.stream())
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"]


def test_clean_runs_are_evaluated(place: Path) -> None:
    models = {name: {"name_or_path": str(finished(name, place))} for name in ("sft", "dpo-from-sft")}
    raw = {
        "stage": "eval",
        "output_dir": str(place / "runs" / "eval"),
        "models": models,
        "eval": {"prompts": {"path": str(place / "prompts.jsonl")}, "max_new_tokens": 4, "baseline": "sft"},
    }
    recipe = EvalRecipe.model_validate(raw)
    assert [finding.problem for finding in check_recipe(recipe) if finding.problem] == []
    assert evaluate.run(recipe).metrics


def test_a_clean_run_that_was_stopped_goes_on(place: Path, tmp_path: Path) -> None:
    recipe: Any = clean_recipe("sft-lora", place)
    train = recipe.train.model_copy(update={"save_strategy": "steps", "save_steps": 1})
    recipe = recipe.model_copy(update={"output_dir": str(tmp_path / "run"), "train": train})
    first = run_stage(recipe)
    (tmp_path / "run" / "artifact.json").unlink()
    (newest,) = (tmp_path / "run" / "checkpoints").glob("checkpoint-2")
    newest.rename(tmp_path / "gone")
    again = run_stage(recipe)
    assert again.run_id == first.run_id
    assert again.files == first.files
