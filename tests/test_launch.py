"""Starting a stage from the shell: finished runs, the Hub asked for in the recipe, and a Hub that is down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_server import HubServer

from chatalign.artifact import load_artifact
from chatalign.errors import Interrupted, RecipeError
from chatalign.launch import EXIT_INTERRUPTED, EXIT_REFUSED, guarded

pytestmark = pytest.mark.slow
TOKEN = "hf_" + "y" * 34


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_folder: Path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"{i} + 1?"}, {"role": "assistant", "content": str(i + 1)}]}
        for i in range(16)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {
        "stage": "sft",
        "output_dir": str(tmp_path / "run"),
        "model": {"name_or_path": str(tiny_model_folder)},
        "data": {"datasets": [{"path": str(tmp_path / "rows.jsonl")}], "max_length": 128},
        "train": {"max_steps": 2, "per_device_train_batch_size": 1, "logging_steps": 1},
        "hub": {"push": True, "repo": "me/tiny"},
    }
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def launch(recipe: Path, hub: HubServer, *words: str) -> subprocess.CompletedProcess[str]:
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "chatalign.sft", str(recipe), *words]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)


def test_a_run_goes_to_the_hub_that_its_recipe_names_and_outlives_one_that_is_down(recipe: Path) -> None:
    folder = recipe.parent / "run"
    with HubServer(fail_with=500) as down:
        done = launch(recipe, down)
    assert done.returncode == 0, done.stderr
    assert f"the run is finished and kept, `chatalign push --pending {folder}` uploads it" in done.stderr
    assert "Traceback" not in done.stderr
    run_id = load_artifact(folder).run_id  # finished and kept
    with HubServer() as hub:
        again = launch(recipe, hub)
        assert "already finished" in again.stdout
        assert {"model.safetensors", "artifact.json"} <= set(hub.files)  # what waited
        hub.files.clear()
        assert "pushed" not in launch(recipe, hub).stdout
        assert not hub.files
        forced = launch(recipe, hub, "--force")
        assert forced.returncode == 0, forced.stderr
        assert {"model.safetensors", "tokenizer.json", "README.md", "artifact.json"} <= set(hub.files)
    assert load_artifact(folder).run_id != run_id
    assert load_artifact(f"{folder}.previous").run_id == run_id
    written = [path for path in recipe.parent.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()], "the token is in a file"


@pytest.mark.parametrize(
    ("error", "status"), [(Interrupted("saved"), EXIT_INTERRUPTED), (RecipeError("wrong"), EXIT_REFUSED)]
)
def test_errors_have_their_exit_status(error: Exception, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise error

    assert guarded(work) == status
    assert capsys.readouterr().err == f"chatalign: {error}\n"
