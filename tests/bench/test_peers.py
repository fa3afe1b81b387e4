"""What bench/peers.py decides before it installs anything, and what it says when an install stops."""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / "bench" / "peers.py"


@pytest.fixture(scope="module")
def peers():
    spec = importlib.util.spec_from_file_location("bench_peers", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_peers"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_peers"]


def test_the_metadata_filter_keeps_torch_and_cuda_out(peers):
    requires = [
        "torch>=2.4",
        "Torchvision",
        "torchaudio>=2.4",
        "nvidia-cublas-cu12==12.8",
        "nvidia_ml_py",
        "xformers>=0.0.33; sys_platform != 'no-such-system'",
        "torchdata<=0.11.0,>=0.10.0",
        "transformers<=5.6.0",
    ]
    assert peers.installable(requires) == ["torchdata<=0.11.0,>=0.10.0", "transformers<=5.6.0"]


def test_the_metadata_filter_keeps_extras_and_other_systems_out(peers):
    requires = ["deepspeed; extra == 'deepspeed'", "winpty; sys_platform == 'no-such-system'", "fire"]
    assert peers.installable(requires) == ["fire"]


def test_every_pip_command_of_an_install_is_held_to_the_constraints(peers, monkeypatch, tmp_path):
    commands = []

    def record(command, *, constraints, **_):
        commands.append((command, constraints.read_text()))
        (tmp_path / "lib/python3/site-packages/trl.dist-info").mkdir(parents=True, exist_ok=True)
        metadata = "Metadata-Version: 2.1\nName: trl\nVersion: 1.16.0\nRequires-Dist: torch\nRequires-Dist: jinja2\n"
        (tmp_path / "lib/python3/site-packages/trl.dist-info/METADATA").write_text(metadata)

    monkeypatch.setattr(peers, "watched", record)
    monkeypatch.setattr(peers.subprocess, "run", lambda *_, **__: None)
    assert peers.install(peers.PEERS["trl"], tmp_path) == {"trl": "1.16.0"}

    pip = [command for command, _ in commands if "pip" in command]
    assert len(pip) == 4
    assert all(command[command.index("-c") + 1] == str(tmp_path / "constraints.txt") for command in pip)
    assert all(held.startswith("torch==") for _, held in commands)
    torch_alone = next(place for place, command in enumerate(pip) if command[-1].startswith("torch=="))
    trl = next(place for place, command in enumerate(pip) if "trl==1.16.0" in command)
    assert torch_alone < trl
    assert "--no-deps" in pip[trl]
    assert "jinja2" in pip[-1]
    assert "torch" not in pip[-1]


def test_ours_is_the_checkout_without_extras(peers, monkeypatch, tmp_path):
    pip = []

    def record(command, **_):
        pip.append([str(word) for word in command])
        info = tmp_path / "lib/python3/site-packages/chatalign.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        needs = "Requires-Dist: torch\nRequires-Dist: peft\nRequires-Dist: bitsandbytes; extra == 'quantization'\n"
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: chatalign\nVersion: 0.1.0\n{needs}")

    monkeypatch.setattr(peers, "watched", record)
    monkeypatch.setattr(peers.subprocess, "run", lambda *_, **__: None)
    assert peers.install(peers.PEERS["chatalign"], tmp_path) == {"chatalign": "0.1.0"}
    assert any(command[-3:] == ["--no-deps", "--editable", str(FILE.parents[1])] for command in pip)
    assert any("peft" in command for command in pip)
    assert not any("bitsandbytes" in word for command in pip for word in command)


@pytest.mark.parametrize("fetched", ["nvidia-cublas-cu12==12.8 (from torch)", "torchvision", "cuda-bindings<14"])
def test_an_install_that_reaches_for_cuda_is_stopped(peers, tmp_path, fetched):
    (tmp_path / "constraints.txt").write_text("")
    script = f"print('Collecting {fetched}', flush=True); import time; time.sleep(60)"
    with pytest.raises(peers.InstallError, match=fetched.split("=")[0].split("<")[0]):
        peers.watched(
            [sys.executable, "-c", script],
            log=tmp_path / "log",
            deadline=time.monotonic() + 50,
            constraints=tmp_path / "constraints.txt",
        )


def test_an_install_past_its_deadline_is_stopped(peers, tmp_path):
    with pytest.raises(peers.InstallError, match="not done within"):
        peers.watched(
            [sys.executable, "-c", "import time; time.sleep(60)"],
            log=tmp_path / "log",
            deadline=time.monotonic(),
            constraints=tmp_path / "constraints.txt",
        )


def test_the_reason_is_one_line(peers):
    pip = ["Collecting a", "ERROR: Cannot install a and b", "ERROR: ResolutionImpossible: see the guide"]
    assert peers.reason(pip) == "Cannot install a and b"
    python = ["Traceback (most recent call last):", 'File "x.py", line 1', "NotImplementedError: you need a GPU", ""]
    assert peers.reason(python) == "NotImplementedError: you need a GPU"
    assert peers.reason([]) == "it failed without a word"


def test_a_recorded_peer_is_not_installed_again_until_asked(peers, monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "VENVS", tmp_path)
    (tmp_path / "trl").mkdir()
    installs = []
    monkeypatch.setattr(peers, "install", lambda peer, venv: installs.append(peer) or {"trl": "1.16.0"})
    for again in (False, False, True):
        assert peers.outcome("trl", again=again)["versions"] == {"trl": "1.16.0"}
    assert len(installs) == 2


def test_an_unknown_peer_is_refused_by_name():
    refused = subprocess.run([sys.executable, str(FILE), "trll"], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2
    assert "trll is no peer" in refused.stderr
    assert "llamafactory" in refused.stderr
