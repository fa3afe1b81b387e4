"""The evaluation stage on tiny models, against quantities recomputed one sequence at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from chatalign.artifact import load_artifact, verify_files
from chatalign.errors import NonFiniteError, RecipeError
from chatalign.evaluate import run
from chatalign.evaluate.policy import opened, perplexity
from chatalign.recipe import ModelSection, validate_stage
from chatalign.runs import finished


def recipe_of(world: Path, folder: Path, **changes: Any) -> Any:
    raw: dict[str, Any] = {
        "stage": "eval",
        "output_dir": str(folder / "eval"),
        "models": {name: {"name_or_path": str(world / name)} for name in ("b", "a", "adapter")},
        "reward_model": {"name_or_path": str(world / "rm")},
        "eval": {
            "baseline": "a",
            "prompts": {"path": str(world / "prompts.jsonl")},
            "pairs": {"path": str(world / "pairs.jsonl")},
            "texts": {"path": str(world / "texts.txt")},
            "gold": f"{world / 'gold.py'}:score",
            "temperature": 0.8,
            "max_new_tokens": 6,
            "batch_size": 3,
            "samples": 3,
        },
    }
    raw["eval"] |= changes.pop("eval", {})
    return validate_stage(raw | changes, where="test")


@pytest.fixture(scope="module")
def evaluated(
    world: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    """One full evaluation: its folder, eval.json and the lines of replies.jsonl."""
    recipe = recipe_of(world, tmp_path_factory.mktemp("full"))
    run(recipe)
    assert finished(recipe) is not None
    folder = Path(recipe.output_dir)
    lines = [json.loads(line) for line in (folder / "replies.jsonl").read_text("utf-8").splitlines()]
    return folder, json.loads((folder / "eval.json").read_text("utf-8")), lines


def test_the_shape_that_the_pipeline_reads(evaluated: Any) -> None:
    folder, results, lines = evaluated
    assert list(results["models"]) == ["b", "a", "adapter"]
    assert results["models"]["a"]["baseline"] is True
    assert results["models"]["a"]["win_rate"] is None  # the keys are the same for every model
    row = results["models"]["b"]
    assert {"n", "win_rate", "win_rate_ci", "gold_mean", "kl", "format_rate", "accuracy", "perplexity"} <= set(row)
    assert {"rm_score", "rm_win_rate", "length", "ended_rate"} <= set(row)
    assert row["n"] == 8 == len(lines)
    low, high = row["win_rate_ci"]
    assert 0 <= low <= row["win_rate"] <= high <= 1
    assert [set(sample["replies"]) for sample in results["samples"]] == [{"b", "a", "adapter"}] * 3
    assert results["samples"][0]["prompt"] == "What is 0 + 1?"
    assert set(results["reward_model"]) >= {"accuracy", "style_accuracy", "correctness_accuracy", "n"}
    artifact = load_artifact(folder)
    assert artifact.kind == "evaluation"
    assert artifact.metrics["b.kl"] == pytest.approx(row["kl"])
    assert verify_files(folder, artifact.files) == []
    assert [used.rows for used in artifact.data] == [8, 6, 3]


def test_means_and_win_rates_are_those_of_the_replies(evaluated: Any) -> None:
    _, results, lines = evaluated
    ours, theirs = ([line["replies"][name]["gold"] for line in lines] for name in ("b", "a"))
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(ours, theirs, strict=True)]
    row = results["models"]["b"]
    assert row["gold_mean"] == pytest.approx(sum(ours) / 8)
    assert row["win_rate"] == pytest.approx(sum(wins) / 8)
    assert row["gold_gain"] == pytest.approx((sum(ours) - sum(theirs)) / 8)
    assert row["length"] == pytest.approx(sum(line["replies"]["b"]["tokens"] for line in lines) / 8)
    assert row["format_rate"] == pytest.approx(row["ended_rate"])
    assert "kind" not in row["gold_parts"]


def logp_alone(policy: Any, prompt: list[int], reply: list[int], temperature: float) -> float:
    """log π(reply | prompt) by one plain forward pass of one sequence."""
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([[*prompt, *reply]]), use_cache=False).logits[0]
    logps = (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
    return float(logps.gather(1, torch.tensor(reply)[:, None]).sum())


def test_kl_is_the_log_ratio_of_the_sampled_replies(world: Path, evaluated: Any) -> None:
    _, results, lines = evaluated
    from chatalign.evaluate.heldout import read_questions
    from chatalign.evaluate.policy import answer
    from chatalign.recipe import DatasetSource

    recipe = recipe_of(world, world)
    questions, _ = read_questions(DatasetSource(path=str(world / "prompts.jsonl")))
    with opened(recipe.models["adapter"], None) as policy:
        answers = answer(policy, questions, recipe.eval, lambda n: None)
        pairs = list(zip(answers.prompt_ids, answers.response_ids, strict=True))
        ours = [logp_alone(policy, prompt, reply, 0.8) for prompt, reply in pairs]
    with opened(recipe.models["a"], None) as policy:
        theirs = [logp_alone(policy, prompt, reply, 0.8) for prompt, reply in pairs]
    assert answers.texts == [line["replies"]["adapter"]["text"] for line in lines]
    assert ours == pytest.approx([line["replies"]["adapter"]["logp"] for line in lines], abs=1e-4)
    expected = sum(a - b for a, b in zip(ours, theirs, strict=True)) / len(pairs)
    assert results["models"]["adapter"]["kl"] == pytest.approx(expected, abs=1e-4)
    assert abs(expected) > 0.01  # the adapter is on
    assert results["models"]["a"]["kl"] == 0.0


def test_perplexity_is_that_of_single_documents(world: Path, evaluated: Any) -> None:
    _, results, _ = evaluated
    with opened(ModelSection(name_or_path=str(world / "b")), None) as policy:
        total, tokens = 0.0, 0
        for text in (world / "texts.txt").read_text("utf-8").splitlines():
            ids = policy.tokenizer(text)["input_ids"] + [policy.tokenizer.eos_token_id]
            for start in range(0, len(ids), 1024):
                piece = ids[start : start + 1024]
                total += logp_alone(policy, piece[:1], piece[1:], 1.0)
                tokens += len(piece) - 1
        assert perplexity(policy, [], lambda n: None) != perplexity(policy, [], lambda n: None)  # NaN of no text
    assert results["models"]["b"]["perplexity"] == pytest.approx(math.exp(-total / tokens), rel=1e-4)


def test_reward_scores_are_those_of_the_model_alone(world: Path, evaluated: Any, tiny_tokenizer: Any) -> None:
    _, results, lines = evaluated
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(world / "rm", num_labels=1)

    def score(messages: list[dict[str, str]], reply: str) -> float:
        messages = [*messages, {"role": "assistant", "content": reply}]
        text = tiny_tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([tiny_tokenizer(text)["input_ids"]])).last_hidden_state
        return float(model.score(hidden[0, -1]))

    rows = [json.loads(line) for line in (world / "pairs.jsonl").read_text("utf-8").splitlines()]
    margins = {}
    for row in rows:
        prompt = [{"role": "user", "content": row["prompt"]}]
        margins[row["prompt"]] = score(prompt, row["chosen"]) - score(prompt, row["rejected"])
    assert results["reward_model"]["accuracy"] == pytest.approx(sum(m > 0 for m in margins.values()) / 6)
    assert results["reward_model"]["margin"] == pytest.approx(sum(margins.values()) / 6, abs=1e-4)
    style = [margins[row["prompt"]] > 0 for row in rows if row["contrast"] == "style"]
    assert results["reward_model"]["style_accuracy"] == pytest.approx(sum(style) / 3)
    assert results["reward_model"]["style_n"] == 3
    ended = [(line["row"]["prompt"], line["replies"]["b"]) for line in lines if line["replies"]["b"]["ended"]]
    for prompt, reply in ended:
        assert reply["rm_score"] == pytest.approx(score(prompt, reply["text"]), abs=1e-4)


def test_the_same_seed_gives_the_same_replies_whatever_the_batches(world: Path, evaluated: Any, tmp_path: Path) -> None:
    _, _, lines = evaluated
    recipe = recipe_of(world, tmp_path, reward_model=None, eval={"batch_size": 8, "pairs": None, "texts": None})
    run(recipe)
    again = [json.loads(line) for line in (tmp_path / "eval/replies.jsonl").read_text("utf-8").splitlines()]
    for name in ("a", "b"):
        assert [r["replies"][name]["text"] for r in again] == [r["replies"][name]["text"] for r in lines]
    other = recipe_of(world, tmp_path / "2", reward_model=None, eval={"seed": 1, "pairs": None, "texts": None})
    run(other)
    third = [json.loads(line) for line in (tmp_path / "2/eval/replies.jsonl").read_text("utf-8").splitlines()]
    assert [r["replies"]["a"]["text"] for r in third] != [r["replies"]["a"]["text"] for r in lines]


def test_pairs_alone_measure_a_reward_model(world: Path, tmp_path: Path) -> None:
    recipe = recipe_of(
        world, tmp_path, models={}, eval={"prompts": None, "texts": None, "baseline": None, "gold": None}
    )
    artifact = run(recipe)
    assert artifact.metrics["reward_model.n"] == 6
    assert json.loads((tmp_path / "eval/eval.json").read_text("utf-8"))["models"] == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval": {"prompts": None, "pairs": None, "texts": None}}, "measures nothing"),
        ({"eval": {"baseline": "c"}}, r"`eval.baseline: c` is none of `models` \(b, a, adapter\)"),
        ({"models": {}}, "`models` is empty"),
        ({"reward_model": None, "eval": {"prompts": None, "texts": None}}, "give `reward_model`"),
    ],
)
def test_what_cannot_be_measured_is_refused(world: Path, tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        run(recipe_of(world, tmp_path, **changes))
    assert not (tmp_path / "eval").exists()


def test_several_processes_are_refused(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="one process"):
        run(recipe_of(world, tmp_path))


def test_a_gold_function_that_gives_no_number(world: Path, tmp_path: Path) -> None:
    from chatalign.evaluate.gold import gold_scores, load_gold

    call: dict[str, Any] = {"messages": [{}], "reply": "x", "row": {}, "ended": True}
    assert gold_scores(load_gold(f"{world / 'gold.py'}:number"), "n", **call) == {"gold": 1.0}
    with pytest.raises(RecipeError, match="a dict with `gold`"):
        gold_scores(load_gold(f"{world / 'gold.py'}:broken"), "b", **call)
    with pytest.raises(NonFiniteError):
        gold_scores(lambda **_: math.nan, "n", **call)
    with pytest.raises(RecipeError, match="has no function `none`"):
        load_gold(f"{world / 'gold.py'}:none")
    with pytest.raises(RecipeError, match="is no Python file"):
        load_gold(f"{world / 'prompts.jsonl'}:score")


def test_the_numbers_go_to_the_tracker(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    only_pairs = {"prompts": None, "texts": None, "baseline": None, "gold": None}
    artifact = run(recipe_of(world, tmp_path, models={}, tracking="tensorboard", eval=only_pairs))
    events = EventAccumulator(str(tmp_path / "eval/tensorboard"))
    events.Reload()
    logged = events.Scalars("reward_model.accuracy")
    assert [event.value for event in logged] == pytest.approx([artifact.metrics["reward_model.accuracy"]])


@pytest.mark.slow
def test_the_numbers_go_to_wandb(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    only_pairs = {"prompts": None, "texts": None, "baseline": None, "gold": None}
    artifact = run(recipe_of(world, tmp_path, models={}, tracking="wandb", eval=only_pairs))
    logged = list((tmp_path / "eval/wandb").glob(f"offline-run-*/run-{artifact.run_id}.wandb"))
    assert len(logged) == 1
