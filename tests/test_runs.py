"""Run folders and artifacts: fingerprints, freshness, what is moved aside."""

from __future__ import annotations

import json
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from chatalign.artifact import Artifact, fingerprint, hash_files, load_artifact, verify_files, write_json
from chatalign.errors import ArtifactError, RecipeError
from chatalign.inputs import recipe_fingerprint
from chatalign.recipe import SftRecipe
from chatalign.runs import finished, locked, open_run, status


@pytest.fixture
def recipe(tmp_path: Path) -> SftRecipe:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    return SftRecipe.model_validate(
        {
            "stage": "sft",
            "output_dir": str(tmp_path / "run"),
            "model": {"name_or_path": str(tmp_path / "model")},
            "data": {"datasets": [{"path": str(tmp_path / "rows.jsonl")}]},
        }
    )


def finish(recipe: SftRecipe, **fields: Any) -> Artifact:
    run = open_run(recipe)
    run.model_folder.mkdir(exist_ok=True)
    (run.model_folder / "model.safetensors").write_bytes(b"trained")
    artifact = Artifact(
        stage="sft",
        kind="model",
        run_id=run.run_id,
        fingerprint=run.fingerprint,
        parents=run.parents,
        files=hash_files(run.folder),
        **fields,
    )
    artifact.save(run.folder)
    return artifact


def changed(recipe: SftRecipe, **update: Any) -> SftRecipe:
    return SftRecipe.model_validate(recipe.model_dump() | update)


def test_life_of_a_run(recipe: SftRecipe) -> None:
    mark = recipe_fingerprint(recipe)
    assert status(recipe.output_dir, mark) == "new"
    run = open_run(recipe)
    assert status(recipe.output_dir, mark) == "resumable"
    assert open_run(recipe).run_id == run.run_id  # going on keeps the id
    artifact = finish(recipe)
    assert finished(recipe) == artifact
    assert artifact.run_id == run.run_id


def test_fingerprint_follows_recipe_data_and_model(recipe: SftRecipe, tmp_path: Path) -> None:
    mark = recipe_fingerprint(recipe)
    assert recipe_fingerprint(changed(recipe, output_dir="elsewhere", tracking="wandb")) == mark
    assert recipe_fingerprint(changed(recipe, train={"max_hours": 8, "dataloader_num_workers": 2})) == mark
    assert recipe_fingerprint(changed(recipe, data={**recipe.data.model_dump(), "num_proc": 2})) == mark
    assert recipe_fingerprint(changed(recipe, train={"seed": 1})) != mark
    (tmp_path / "rows.jsonl").write_text('{"text": "b"}\n')
    after_data = recipe_fingerprint(recipe)
    assert after_data != mark
    (tmp_path / "model" / "model.safetensors").write_bytes(b"other")
    assert recipe_fingerprint(recipe) != after_data


def test_fingerprint_follows_every_file_of_a_folder_of_rows(recipe: SftRecipe, tmp_path: Path) -> None:
    """Files of one name in two folders, too: the one once hid the other."""
    for split in ("old", "new"):
        (tmp_path / "rows" / split).mkdir(parents=True)
        (tmp_path / "rows" / split / "part.jsonl").write_text(f'{{"text": "{split}"}}\n')
    folder = changed(recipe, data={"datasets": [{"path": str(tmp_path / "rows")}]})
    marks = [recipe_fingerprint(folder)]
    for split in ("old", "new"):
        (tmp_path / "rows" / split / "part.jsonl").write_text('{"text": "changed"}\n')
        marks.append(recipe_fingerprint(folder))
    assert len(set(marks)) == 3


def test_fingerprint_follows_template_and_tokenizer(recipe: SftRecipe, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("a")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    section = recipe.model.model_dump() | {
        "chat_template_path": str(template),
        "tokenizer_name_or_path": str(tmp_path / "tokenizer"),
    }
    marks = [recipe_fingerprint(changed(recipe, model=section))]
    template.write_text("b")
    marks.append(recipe_fingerprint(changed(recipe, model=section)))
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{ }")
    marks.append(recipe_fingerprint(changed(recipe, model=section)))
    assert len(set(marks)) == 3


def test_child_follows_its_parents_fingerprint_not_its_place(recipe: SftRecipe, tmp_path: Path) -> None:
    finish(recipe)
    child = changed(recipe, model={"name_or_path": recipe.output_dir}, output_dir=str(tmp_path / "child"))
    mark = recipe_fingerprint(child)
    Path(recipe.output_dir).rename(tmp_path / "moved")
    assert recipe_fingerprint(changed(child, model={"name_or_path": str(tmp_path / "moved")})) == mark
    raw = json.loads((tmp_path / "moved" / "artifact.json").read_text())
    write_json(tmp_path / "moved" / "artifact.json", raw | {"fingerprint": "0" * 64})
    assert recipe_fingerprint(changed(child, model={"name_or_path": str(tmp_path / "moved")})) != mark


def test_stale_run_is_moved_aside_not_deleted(recipe: SftRecipe) -> None:
    first = finish(recipe)
    second = open_run(changed(recipe, train={"seed": 1}))
    assert second.run_id != first.run_id
    assert load_artifact(f"{recipe.output_dir}.previous").run_id == first.run_id


def test_missing_model_file_makes_a_finished_run_stale(recipe: SftRecipe) -> None:
    finish(recipe)
    (Path(recipe.output_dir) / "model" / "model.safetensors").unlink()
    assert finished(recipe) is None


def test_a_folder_with_other_files_is_left_alone(recipe: SftRecipe) -> None:
    Path(recipe.output_dir).mkdir()
    (Path(recipe.output_dir) / "thesis.tex").write_text("mine")
    with pytest.raises(RecipeError, match="holds files that are no chatalign run"):
        open_run(recipe)
    assert (Path(recipe.output_dir) / "thesis.tex").read_text() == "mine"


def test_two_runs_in_one_folder_are_refused(recipe: SftRecipe) -> None:
    with (
        locked(recipe.output_dir),
        pytest.raises(RecipeError, match="another chatalign run"),
        locked(recipe.output_dir),
    ):
        pass
    with locked(recipe.output_dir):  # free again afterwards
        pass


def test_artifact_survives_a_round_trip_and_names_what_is_wrong(recipe: SftRecipe, tmp_path: Path) -> None:
    artifact = finish(recipe, metrics={"loss": 1.5}, tokens_seen=10)
    assert load_artifact(recipe.output_dir) == artifact
    assert verify_files(recipe.output_dir, artifact.files) == []
    (Path(recipe.output_dir) / "model" / "model.safetensors").write_bytes(b"trainee")
    assert verify_files(recipe.output_dir, artifact.files) == [
        f"{recipe.output_dir}/model/model.safetensors: altered since it was written"
    ]
    with pytest.raises(ArtifactError, match="is no finished run"):
        load_artifact(tmp_path)
    (tmp_path / "artifact.json").write_text('{"stage": "sft"')
    with pytest.raises(ArtifactError, match="can't be read"):
        load_artifact(tmp_path)


def test_fingerprint_is_of_content_not_of_order() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    # A golden value: printf '{"a":1}' | sha256sum
    assert fingerprint({"a": 1}).startswith("015abd7f5cc57a2dd94b7590f04ad808")


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def write_often(path: Path) -> None:
    for number in range(100):
        write_json(path, {"a": number})


def test_two_processes_write_a_file_whole_each(tmp_path: Path) -> None:
    """As a report that is asked for while a run writes it."""
    writers = [get_context("fork").Process(target=write_often, args=(tmp_path / "x.json",)) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if (tmp_path / "x.json").exists():
            assert "a" in json.loads((tmp_path / "x.json").read_text())
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_parent_that_was_altered_is_refused_before_anything_is_written(recipe: SftRecipe, tmp_path: Path) -> None:
    artifact = finish(recipe)
    child = changed(recipe, output_dir=str(tmp_path / "child"), model={"name_or_path": recipe.output_dir})
    assert open_run(child).parents[0].run_id == artifact.run_id
    weights = Path(recipe.output_dir) / "model" / "model.safetensors"
    weights.write_bytes(b"Trained")
    for again in (child, changed(child, output_dir=str(tmp_path / "other"))):  # begun, and new
        with pytest.raises(ArtifactError, match=r"model\.safetensors: altered since it was written; restore it, or"):
            open_run(again)
    assert not (tmp_path / "other").exists()
    weights.unlink()
    with pytest.raises(ArtifactError, match=r"model\.safetensors: missing; restore it, or make .*run again by its"):
        open_run(child)
