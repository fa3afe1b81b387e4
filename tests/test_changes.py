"""An unfinished run that is asked for otherwise: refused key by key, allowed by name, and then under the new inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chatalign import launch
from chatalign.artifact import Artifact, write_json
from chatalign.changes import changes_between, recipe_changes
from chatalign.checkpoint import publish
from chatalign.errors import ChangedRunError, RecipeError
from chatalign.inputs import inputs_fingerprint, recipe_fingerprint, run_inputs
from chatalign.recipe import PpoRecipe, Recipe, SftRecipe, validate_stage
from chatalign.recipe.load import apply_overrides
from chatalign.runs import Run, open_run, status
from chatalign.unfinished import read_run_file, settle


@pytest.fixture
def recipe(tmp_path: Path) -> SftRecipe:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    raw: dict[str, Any] = {
        "stage": "sft",
        "output_dir": str(tmp_path / "run"),
        "model": {"name_or_path": str(tmp_path / "model")},
        "lora": {"r": 4},
        "data": {"datasets": [{"path": str(tmp_path / "rows.jsonl")}]},
        "train": {"learning_rate": 1e-3},
    }
    return SftRecipe.model_validate(raw)


def over(recipe: Any, **changes: Any) -> Any:
    """`over(recipe, train__seed=1)`: the recipe with dotted keys set."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return validate_stage(apply_overrides(recipe.model_dump(mode="json"), dotted), where="a test")


def begin(recipe: Recipe, *, world_size: int = 1) -> Run:
    """A run with a whole checkpoint of step 20."""
    run = open_run(recipe)
    save(run, recipe, world_size=world_size)
    return run


def save(run: Run, recipe: Any, *, step: int = 20, world_size: int = 1) -> Path:
    aside = run.checkpoints / ".saving" / f"checkpoint-{step}"
    aside.mkdir(parents=True)
    (aside / "weights").write_bytes(b"weights")
    return publish(aside, run.run_id, {"tokens": 1}, run.made_from(recipe) | {"world_size": world_size})


# What differs


def test_the_record_of_inputs_is_what_the_fingerprint_is_of(recipe: SftRecipe) -> None:
    run = open_run(recipe)
    begun = read_run_file(run.folder)
    assert begun["inputs"] == run_inputs(recipe)
    assert begun["fingerprint"] == inputs_fingerprint(begun["inputs"]) == recipe_fingerprint(recipe)
    assert [read["key"] for read in begun["inputs"]["data"]] == ["data.datasets.0"]


def test_the_difference_is_shown_key_by_key(recipe: SftRecipe, tmp_path: Path) -> None:
    begin(recipe)
    (tmp_path / "rows.jsonl").write_text('{"text": "b"}\n')
    (tmp_path / "model" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ChangedRunError) as refused:
        settle(over(recipe, train__learning_rate=1e-5), processes=1)
    first, *lines = str(refused.value).split("\n")
    assert first == (
        f"{recipe.output_dir}: train.learning_rate: 0.001 → 1e-05 and 2 more, since its unfinished run (checkpoint-20) "
        f"was begun → `--allow-change train.learning_rate,model.weights,data.datasets.0.contents` goes on with it, "
        f"`--force` begins it anew and moves this run to {recipe.output_dir}.previous"
    )
    # printf 'b' … | sha256sum; the weights' hash is of their names and hashes
    assert lines[0] == "  train.learning_rate: 0.001 → 1e-05"
    assert lines[1].startswith("  model.weights: sha256 ")
    rows = f"  data.datasets.0.contents ({tmp_path}/rows.jsonl): sha256 f5b6b0e0ae94 → sha256 "
    assert lines[2].startswith(rows[:30])
    assert read_run_file(tmp_path / "run") == read_run_file(Path(recipe.output_dir))


def test_one_change_is_one_line(recipe: SftRecipe) -> None:
    begin(recipe)
    with pytest.raises(ChangedRunError, match=r"train.weight_decay: 0.0 → 0.1, since its unfinished run") as refused:
        open_run(over(recipe, train__weight_decay=0.1))  # by the Python API too
    assert "\n" not in str(refused.value)


def test_a_parent_that_is_another_run_is_named_by_run(recipe: SftRecipe, tmp_path: Path) -> None:
    parent = begin(over(recipe, output_dir=str(tmp_path / "parent")))
    artifact = Artifact(stage="sft", kind="model", run_id="aaaa", fingerprint="1" * 64)
    artifact.save(parent.folder)
    child = over(recipe, model__name_or_path=str(parent.folder))
    begin(child)
    artifact.model_copy(update={"run_id": "bbbb", "fingerprint": "2" * 64}).save(parent.folder)
    with pytest.raises(ChangedRunError, match=r"model\.run: run aaaa \(111111111111\) → run bbbb \(222222222222\)"):
        settle(child, processes=1)
    elsewhere = over(child, model__name_or_path=str(tmp_path / "model"))
    changes = {change.key: str(change) for change in changes_between(run_inputs(child), run_inputs(elsewhere))}
    path = "model.name_or_path: run bbbb (222222222222) → "
    assert changes["model.name_or_path"].startswith(path)
    assert "model.run" in changes
    line = settle(child, processes=1, made_here=[str(parent.folder)])
    assert line == f"{tmp_path}/run: moved to {tmp_path}/run.previous, since it was begun otherwise (model.run)"


def test_lists_of_sections_differ_entry_by_entry() -> None:
    one = {"data": {"datasets": [{"path": "a", "weight": 1}], "roles": ["x"]}}
    other = {"data": {"datasets": [{"path": "a", "weight": 2}, {"path": "b"}], "roles": ["x", "y"]}, "hub": 1}
    assert [(c.key, c.before, c.now) for c in recipe_changes(one, other)] == [
        ("data.datasets.0.weight", 1, 2),
        ("data.datasets.1", None, {"path": "b"}),
        ("data.roles", ["x"], ["x", "y"]),
    ]


def test_templates_functions_and_the_version_are_keys(recipe: SftRecipe, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("a")
    (tmp_path / "reward.py").write_text("a = 1")
    raw = recipe.model_dump(mode="json") | {
        "stage": "ppo",
        "ppo": {"rewards": [{"function": f"{tmp_path}/reward.py:f"}]},
    }
    raw.pop("engine")
    ppo = over(PpoRecipe.model_validate(raw), model__chat_template_path=str(template))
    before = run_inputs(ppo)
    template.write_text("b")
    (tmp_path / "reward.py").write_text("a = 2")
    found = changes_between(before, run_inputs(ppo) | {"chatalign": "9.9"})
    assert [(change.key, change.of) for change in found] == [
        ("model.chat_template_path.contents", str(template)),
        ("ppo.rewards.0.function.contents", f"{tmp_path}/reward.py"),
        ("chatalign", None),
    ]


# Refused, allowed, moved


def test_nothing_to_lose_begins_anew(recipe: SftRecipe) -> None:
    first = open_run(recipe)
    second = over(recipe, train__learning_rate=1e-5)
    assert settle(second, processes=1) is None
    assert open_run(second).run_id != first.run_id


def test_force_moves_an_unfinished_run_aside(recipe: SftRecipe) -> None:
    first = begin(recipe)
    second = over(recipe, train__weight_decay=0.1)
    line = settle(second, processes=1, force=True)
    assert (
        line == f"{first.folder}: moved to {first.folder}.previous, since it was begun otherwise (train.weight_decay)"
    )
    assert open_run(second).run_id != first.run_id
    assert (Path(f"{first.folder}.previous") / "checkpoints" / "checkpoint-20").is_dir()


@pytest.mark.parametrize("named", ["train.learning_rate", "train"])
def test_an_allowed_change_goes_on_with_the_run(recipe: SftRecipe, named: str) -> None:
    first = begin(recipe)
    second = over(recipe, train__learning_rate=1e-5)
    line = settle(second, processes=1, allow=[named])
    assert line == f"{first.folder}: goes on from checkpoint-20 with train.learning_rate: 0.001 → 1e-05"
    assert settle(second, processes=1) is None  # the next plain command, after a kill
    run = open_run(second)
    assert (run.run_id, run.fingerprint) == (first.run_id, recipe_fingerprint(second))
    assert run.earlier == {first.fingerprint}
    assert status(first.folder, first.fingerprint) == "resumable"  # until the checkpoint is loaded, both are
    run.take_allowed(second, step=20)
    begun = read_run_file(run.folder)
    assert begun["fingerprint"] == run.fingerprint
    assert begun["inputs"] == run_inputs(second)
    change = {"key": "train.learning_rate", "before": 0.001, "now": 1e-05, "of": None}
    assert begun["changes"] == [change | {"step": 20, "fingerprint": first.fingerprint}]
    assert "allowed" not in begun
    assert settle(second, processes=1, allow=[named]) is None  # the same command again
    with pytest.raises(ChangedRunError, match=r"train.learning_rate: 1e-05 → 0.001"):
        settle(recipe, processes=1)
    settle(recipe, processes=1, allow=["train.learning_rate"])
    back = open_run(recipe)
    assert back.earlier == {run.fingerprint}


def test_a_second_change_joins_the_one_that_waits(recipe: SftRecipe) -> None:
    raw = recipe.model_dump(mode="json") | {"stage": "ppo", "ppo": {"rewards": [{"function": "reward.py:f"}]}}
    raw.pop("engine")
    ppo = PpoRecipe.model_validate(raw)
    begin(ppo, world_size=2)
    second = over(ppo, train__learning_rate=1e-5)
    settle(second, processes=None, allow=["train.learning_rate"])  # before a launch of unknown size
    settle(second, processes=1, allow=["processes"])
    run = open_run(second)
    assert run.allowed_processes == 1
    run.take_allowed(second, step=20)
    changes = read_run_file(run.folder)["changes"]
    assert [(change["key"], change["now"]) for change in changes] == [("train.learning_rate", 1e-5), ("processes", 1)]


def test_a_change_that_was_not_taken_up_is_forgotten(recipe: SftRecipe) -> None:
    begin(recipe)
    second = over(recipe, train__learning_rate=1e-5)
    settle(second, processes=1, allow=["train.learning_rate"])
    open_run(recipe)  # as before after all
    with pytest.raises(ChangedRunError):
        settle(second, processes=1)


def test_a_key_that_did_not_change_is_refused_with_what_did(recipe: SftRecipe) -> None:
    begin(recipe)
    second = over(recipe, train__learning_rate=1e-5)
    with pytest.raises(ChangedRunError, match=r"train\.seed: that didn't change in .*; what did:\n  train\.lea"):
        settle(second, processes=1, allow=["train.learning_rate", "train.seed"])
    third = over(second, train__weight_decay=0.1)
    with pytest.raises(ChangedRunError, match=r"run: train\.weight_decay: 0\.0 → 0\.1, since"):
        settle(third, processes=1, allow=["train.learning_rate"])


def test_allowing_what_nobody_changed_is_said_and_goes_on(recipe: SftRecipe) -> None:
    assert settle(recipe, processes=1, allow=["train"]) is None  # no run yet
    begin(recipe)
    assert (settle(recipe, processes=1, allow=["train"]) or "").endswith(
        "run: nothing changed since its unfinished run was begun, so that --allow-change allows nothing"
    )
    second = over(recipe, train__learning_rate=1e-5)
    settle(second, processes=1, allow=["train"])
    assert settle(second, processes=1, allow=["train"]) is None  # waits
    open_run(second).take_allowed(second, step=20)
    assert settle(second, processes=1, allow=["train"]) is None  # taken up


def test_a_finished_run_can_not_be_changed(recipe: SftRecipe) -> None:
    run = begin(recipe)
    Artifact(stage="sft", kind="model", run_id=run.run_id, fingerprint=run.fingerprint).save(run.folder)
    assert settle(recipe, processes=1, allow=["train"]) is None
    with pytest.raises(ChangedRunError, match="its run is finished, and --allow-change goes on with an unfinished one"):
        settle(over(recipe, train__learning_rate=1e-5), processes=1, allow=["train"])


def test_another_number_of_processes_is_a_change(recipe: SftRecipe) -> None:
    begin(recipe, world_size=2)
    assert settle(recipe, processes=2) is None
    with pytest.raises(ChangedRunError, match=r"processes: 2 → 1.* a step would have 0\.5 times the rows"):
        settle(recipe, processes=1, allow=["processes"])
    same_rows = over(recipe, train__gradient_accumulation_steps=2)
    with pytest.raises(ChangedRunError, match=r"train.gradient_accumulation_steps: 1 → 2 and 1 more"):
        settle(same_rows, processes=1)
    assert settle(same_rows, processes=1, allow=["processes", "train"]) is not None
    assert settle(same_rows, processes=1) is None
    run = open_run(same_rows)
    assert run.allowed_processes == 1
    run.take_allowed(same_rows, step=20)
    assert settle(same_rows, processes=1) is None
    with pytest.raises(ChangedRunError, match="processes: 2 → 4"):
        settle(same_rows, processes=4)


def test_a_run_of_an_older_chatalign_is_named_as_such(recipe: SftRecipe) -> None:
    run = begin(recipe)
    begun = read_run_file(run.folder)
    del begun["inputs"]
    write_json(run.folder / "run.json", begun)
    with pytest.raises(
        ChangedRunError, match=r"run: train\.learning_rate: 0\.001 → 1e-05, .*older chatalign kept no record"
    ):
        settle(over(recipe, train__learning_rate=1e-5), processes=1, allow=["train.learning_rate"])
    assert settle(recipe, processes=1) is None
    open_run(recipe)
    assert read_run_file(run.folder)["inputs"] == run_inputs(recipe)  # unchanged, so that they are known now


# The command


def test_the_option_takes_a_list_or_comes_again() -> None:
    words, keys = launch.take_option("--allow-change", ["r.yaml", "--allow-change", "a,b", "x=1", "--allow-change=c"])
    assert (words, launch.allowed_keys(keys, force=False)) == (["r.yaml", "x=1"], ["a", "b", "c"])
    with pytest.raises(RecipeError, match="name what may change"):
        launch.allowed_keys([""], force=False)
    with pytest.raises(RecipeError, match="give one of the two"):
        launch.allowed_keys(["a"], force=True)
