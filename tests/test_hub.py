"""Pushing over HTTP to a stand-in Hub, by the real client in a process of its own; what arrived is what counts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import HubServer

from chatalign import hub
from chatalign.artifact import Artifact, BaseModelRef, DataUsed, hash_files
from chatalign.errors import ArtifactError, HubError
from chatalign.hub import contents_to_push, pending, push, push_pending
from chatalign.launch import catch_up, hand_out
from chatalign.recipe import SftRecipe

TOKEN = "hf_" + "x" * 34
_PUSH = """
import sys
from chatalign.errors import HubError
from chatalign.hub import push
try:
    print(push(sys.argv[1], "me/pocket", private=sys.argv[2] == "private"))
except HubError as error:
    sys.exit(f"HubError: {error}")
"""


@pytest.fixture
def run_folder(tmp_path: Path, tiny_model_folder: Path) -> Path:
    """A finished run with everything that must stay at home beside what is published."""
    folder = tmp_path / "runs" / "dpo"
    shutil.copytree(tiny_model_folder, folder / "model")
    model = folder / "model"
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/home/me/models/base"}))
    for private in ("training_args.bin", "optimizer.pt", "notes.txt", "pytorch_model.bin"):
        (model / private).write_bytes(b"private")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "model.safetensors").write_bytes(b"private")
    artifact = Artifact(
        stage="dpo",
        kind="adapter",
        run_id="r1",
        fingerprint="f",
        base_model=BaseModelRef(name_or_path="org/base-1b", revision="main", sha256="abc"),
        data=[
            DataUsed(path="org/pairs", sha256="0", format="preference", rows=1, used=1),
            DataUsed(path="/home/me/secret/pairs.jsonl", sha256="0", format="preference", rows=1, used=1),
        ],
        recipe={"output_dir": str(folder), "hub": {"license": "apache-2.0"}},
        metrics={"eval_loss": 0.5},
        files=hash_files(folder),
    )
    artifact.save(folder)
    return folder


def hub_environment(server_url: str, folder: Path) -> dict[str, str]:
    settings = {"HF_ENDPOINT": server_url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    return os.environ | settings | {"HF_HOME": str(folder.parent / "hf"), "NO_PROXY": "127.0.0.1"}


def run_push(server_url: str, folder: Path, visibility: str = "private") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _PUSH, str(folder), visibility]
    environment = hub_environment(server_url, folder)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_what_arrives(run_folder: Path) -> None:
    with HubServer() as hub:
        done = run_push(hub.url, run_folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.url}/me/pocket"
    assert [(repo["organization"], repo["name"], repo["private"]) for repo in hub.repos] == [("me", "pocket", True)]
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert len(hub.commits) == 1
    model = run_folder / "model"
    assert hub.files["model.safetensors"] == (model / "model.safetensors").read_bytes()
    assert hub.files["tokenizer.json"] == (model / "tokenizer.json").read_bytes()
    assert sorted(hub.files) == [
        "README.md", "adapter_config.json", "artifact.json", "chat_template.jinja", "config.json",
        "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    for name, content in hub.files.items():
        assert b"private" not in content, name
        assert b"/home/me" not in content, name
        assert str(run_folder).encode() not in content, name
        assert TOKEN.encode() not in content, name


def test_card_and_lineage(run_folder: Path) -> None:
    with HubServer() as hub:
        assert run_push(hub.url, run_folder, "public").returncode == 0
    assert hub.repos[0]["private"] is False
    _, metadata, text = hub.files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "base_model": "org/base-1b",
        "datasets": ["org/pairs"],
        "library_name": "peft",
        "license": "apache-2.0",
        "model_name": "pocket",
        "pipeline_tag": "text-generation",
        "tags": ["chatalign", "dpo", "lora"],
    }
    assert "| eval_loss | 0.5 |" in text
    lineage = Artifact.model_validate(json.loads(hub.files["artifact.json"]))
    assert lineage.run_id == "r1"
    assert lineage.data[1].path == "pairs.jsonl"
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "base"


@pytest.mark.parametrize(("status", "mend"), [(401, "hf auth login"), (403, "write permission"), (500, "try again")])
def test_refusals_are_one_line(status: int, mend: str, run_folder: Path) -> None:
    with HubServer(fail_with=status) as hub:
        done = run_push(hub.url, run_folder)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("HubError")]
    assert len(lines) == 1
    assert str(status) in lines[0]
    assert mend in lines[0]
    assert TOKEN not in done.stderr + done.stdout
    assert hub.files == {}


def test_no_hub_at_all(run_folder: Path) -> None:
    with HubServer() as hub:
        gone = hub.url
    done = run_push(gone, run_folder)
    assert done.returncode == 1
    assert "HubError: me/pocket: the upload failed" in done.stderr


def test_a_busy_hub_is_asked_again(run_folder: Path) -> None:
    with HubServer(faults=(429, 503)) as hub:
        done = run_push(hub.url, run_folder)
    assert done.returncode == 0, done.stderr
    assert len(hub.commits) == 1
    assert not (run_folder / "push.json").exists()


@pytest.mark.parametrize("place", ["/api/repos/create", "/commit/"])
def test_a_hub_that_never_answers_is_down(place: str, run_folder: Path) -> None:
    impatient = f"import chatalign.hub; chatalign.hub._SILENT_S = 0.5; {_PUSH}"
    with HubServer(silent_at=place) as hub:
        environment = hub_environment(hub.url, run_folder)
        command = [sys.executable, "-c", impatient, str(run_folder), "private"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "HubError: me/pocket: the upload failed (" in done.stderr
    assert hub.files == {}
    assert json.loads((run_folder / "push.json").read_text())["repo"] == "me/pocket"


@pytest.mark.slow
def test_an_upload_that_is_cut_waits_until_it_is_asked_for(run_folder: Path) -> None:
    """A file that breaks off leaves no commit; `push --pending` sends the whole, from any folder above the run."""
    with HubServer(cut_uploads=99) as hub:
        done = run_push(hub.url, run_folder)
        assert done.returncode == 1
        assert hub.files == {}
        waiting = json.loads((run_folder / "push.json").read_text())
        assert (waiting["repo"], waiting["private"], waiting["run_id"]) == ("me/pocket", True, "r1")
        assert TOKEN not in json.dumps(waiting)
        hub.cut_uploads = 0
        command = [sys.executable, "-m", "chatalign", "push", "--pending", str(run_folder.parent)]
        done = subprocess.run(
            command, env=hub_environment(hub.url, run_folder), capture_output=True, text=True, timeout=120, check=False
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{run_folder}: {hub.url}/me/pocket"
    assert hub.files["model.safetensors"] == (run_folder / "model" / "model.safetensors").read_bytes()
    assert not (run_folder / "push.json").exists()


def test_what_still_waits_is_counted(run_folder: Path) -> None:  # the test session itself is offline
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        push(run_folder, "me/pocket")
    assert pending(run_folder.parent) == [run_folder]
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set.*; 1 uploads still wait"):
        list(push_pending(run_folder.parent))
    (run_folder / "push.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"push.json: can't be read; delete it"):
        list(push_pending(run_folder))


def pushing(run_folder: Path) -> SftRecipe:
    return SftRecipe.model_validate(
        {
            "stage": "sft",
            "output_dir": str(run_folder),
            "model": {"name_or_path": "m"},
            "data": {"datasets": [{"path": "rows.jsonl"}]},
            "hub": {"push": True, "repo": "me/pocket"},
        }
    )


def test_a_hub_that_is_down_ends_no_run(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hand_out(pushing(run_folder))
    assert (
        f"the run is finished and kept, `chatalign push --pending {run_folder}` uploads it" in capsys.readouterr().err
    )
    assert pending(run_folder) == [run_folder]


def test_an_upload_that_is_cut_off_waits(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_: Any, **__: Any) -> str:
        assert pending(run_folder) == [run_folder], "a kill leaves no time to note it"
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "_upload", cut)
    with pytest.raises(KeyboardInterrupt):
        push(run_folder, "me/pocket", private=False)
    monkeypatch.setattr(hub, "_upload", lambda contents, repo, private, message: f"{repo} private={private}")
    assert list(push_pending(run_folder)) == [f"{run_folder}: me/pocket private=False"]
    assert pending(run_folder) == []


def test_a_finished_run_is_handed_out_where_that_was_cut_off(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[str] = []
    monkeypatch.setattr(hub, "push", lambda folder, repo, private: pushed.append(repo) or repo)
    recipe = pushing(run_folder)
    catch_up(recipe)  # killed between artifact.json and report.md
    assert (run_folder / "report.md").read_text().startswith("# dpo run `r1`")
    assert pushed == ["me/pocket"]
    catch_up(recipe)
    assert pushed == ["me/pocket"], "all is done"
    (run_folder / "push.json").write_text("{}")
    catch_up(recipe)
    assert pushed == ["me/pocket"] * 2


def test_offline_is_said(run_folder: Path) -> None:  # the test session itself is offline
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        push(run_folder, "me/pocket")


@pytest.mark.parametrize("fault", ["unfinished", "altered", "evaluation", "no weights", "token"])
def test_what_must_not_be_pushed(fault: str, run_folder: Path) -> None:
    record = run_folder / "artifact.json"
    content: dict[str, Any] = json.loads(record.read_text())
    if fault == "unfinished":
        record.unlink()
    elif fault == "altered":
        (run_folder / "model" / "model.safetensors").write_bytes(b"other")
    elif fault == "evaluation":
        record.write_text(json.dumps(content | {"kind": "evaluation"}))
    elif fault == "no weights":
        (run_folder / "model" / "model.safetensors").unlink()
        record.write_text(json.dumps(content | {"files": {}}))
    else:
        record.write_text(json.dumps(content | {"extra": {"note": TOKEN}}))
    with pytest.raises(HubError if fault == "token" else ArtifactError):
        push(run_folder, "me/pocket")


def test_adapter_of_a_local_base_says_so(run_folder: Path) -> None:
    content = json.loads((run_folder / "artifact.json").read_text())
    local = content | {"base_model": {"name_or_path": "/home/me/base", "revision": None, "sha256": "abc"}}
    card = contents_to_push(run_folder, Artifact.model_validate(local), "me/pocket")["README.md"]
    assert isinstance(card, bytes)
    assert b"local folder (weights' sha256 abc)" in card
    assert b"/home/me" not in card
    assert b"base_model:" not in card


def test_reward_model_is_labelled_so(run_folder: Path) -> None:
    content = json.loads((run_folder / "artifact.json").read_text())
    artifact = Artifact.model_validate(content | {"kind": "reward_model", "stage": "reward", "base_model": None})
    card = contents_to_push(run_folder, artifact, "me/rm")["README.md"]
    assert isinstance(card, bytes)
    assert b"pipeline_tag: text-classification" in card
    assert b"library_name: transformers" in card
