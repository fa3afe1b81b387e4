"""Names: Hub ids, folders, adapters, runs; nothing heavy, nothing online."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from chatalign.artifact import Artifact, sha256_weights
from chatalign.errors import ChatalignError, HubError, ModelError
from chatalign.models.resolve import base_sha256, read_base_ref, resolve


def test_model_folder(tiny_model_folder: Path) -> None:
    found = resolve(str(tiny_model_folder))
    assert (found.kind, found.base, found.adapter) == ("model", str(tiny_model_folder), None)


def test_adapter_folder_names_its_base(sft_adapter: Path, tiny_model_folder: Path) -> None:
    found = resolve(str(sft_adapter))
    assert (found.kind, found.base, found.adapter) == ("adapter", str(tiny_model_folder), sft_adapter)
    assert found.source == str(sft_adapter)
    assert found.expected_base_sha256 == sha256_weights(tiny_model_folder) == base_sha256(str(tiny_model_folder))


def test_run_folder_is_its_model(sft_adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(sft_adapter)
    Artifact(stage="sft", kind="adapter", run_id="r1", fingerprint="f").save(tmp_path)
    for name in (tmp_path, tmp_path / "model"):
        found = resolve(str(name))
        assert found.adapter == tmp_path / "model"
        assert found.artifact is not None
        assert found.artifact.run_id == "r1"


def test_adapter_opened_from_another_place_finds_its_base(
    tiny_model_folder: Path, sft_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = tmp_path / "runs" / "base" / "model", tmp_path / "runs" / "sft" / "model"
    shutil.copytree(tiny_model_folder, base)
    shutil.copytree(sft_adapter, adapter)
    record = adapter / "base_model.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"name_or_path": "runs/base/model"}))
    monkeypatch.chdir(tmp_path)
    assert resolve("runs/sft/model").base == "runs/base/model"
    monkeypatch.chdir(base)
    assert resolve(str(adapter)).base == str(base)


def test_unfinished_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ChatalignError, match="no finished run"):
        resolve(str(tmp_path))


def test_base_that_is_a_run(tiny_model_folder: Path, sft_adapter: Path, tmp_path: Path) -> None:
    run, adapter = tmp_path / "pretrain", tmp_path / "adapter"
    run.mkdir()
    adapter.mkdir()
    (run / "model").symlink_to(tiny_model_folder)
    Artifact(stage="pretrain", kind="model", run_id="r0", fingerprint="f").save(run)
    config = json.loads((sft_adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(run)}))
    assert resolve(str(adapter)).base == str(run / "model")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"peft_type": "IA3"}, "IA3 adapter"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": "/not/there"}, "is not there"),
    ],
)
def test_unusable_adapters_are_named(change: dict[str, object], reason: str, sft_adapter: Path, tmp_path: Path) -> None:
    config = json.loads((sft_adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=reason):
        resolve(str(tmp_path))


def test_damaged_records_are_named(tmp_path: Path) -> None:
    (tmp_path / "base_model.json").write_text('{"name_or_path": 3}')
    with pytest.raises(ModelError, match="not a base model's record"):
        read_base_ref(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="can't be read"):
        resolve(str(tmp_path))


def test_hub_ids_stay_hub_ids() -> None:
    found = resolve("someone/some-model", revision="v1", online=False)
    assert (found.base, found.revision, found.kind) == ("someone/some-model", "v1", "model")
    with pytest.raises(HubError, match="can't be reached"):  # tests run with HF_HUB_OFFLINE=1
        resolve("someone/some-model")


def test_hub_cache_gives_the_same_hash_as_a_folder(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache's links are named by sha256, so the files themselves need not be read."""
    from chatalign.artifact import sha256_file
    from chatalign.models import resolve as module

    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    blob = tmp_path / sha256_file(tiny_model_folder / "model.safetensors")
    blob.write_bytes(b"not read")
    (snapshot / "model.safetensors").symlink_to(blob)
    monkeypatch.setattr(module, "local_folder", lambda name, revision: snapshot)
    assert base_sha256("someone/some-model") == sha256_weights(tiny_model_folder)


def test_resolving_imports_no_torch() -> None:
    code = "import sys, chatalign.models.resolve; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
