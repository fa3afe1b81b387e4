"""The quickstart as a new user runs it: the whole chain, what it prints, what it leaves, and that it goes on."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from safetensors import safe_open

from chatalign.artifact import load_artifact, verify_files

from .conftest import Workspace

pytestmark = pytest.mark.slow
STAGES = ["base", "sft", "reward", "dpo", "ppo", "eval"]


@pytest.fixture(scope="session")
def folder(workspace: Workspace, quickstart: subprocess.CompletedProcess[str]) -> Path:
    return workspace.folder / "runs" / "quickstart"


@pytest.fixture(scope="session")
def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text("utf-8"))


def test_summary_has_what_machines_read(summary: dict[str, Any]) -> None:
    assert [stage["name"] for stage in summary["stages"]] == STAGES
    for stage in summary["stages"]:
        assert {"name", "status", "wall_s", "tokens_per_s", "metrics"} <= set(stage)
    assert set(summary["eval"]) == {"base", "sft", "dpo", "ppo"}
    for measured in summary["eval"].values():
        assert {"win_rate", "win_rate_ci", "gold_mean", "kl", "format_rate", "accuracy", "n"} <= set(measured)
        assert measured["n"] >= 500
    assert summary["wall_s"] > 0
    assert summary["versions"]["torch"]


def test_alignment_works_in_order(summary: dict[str, Any]) -> None:
    """base < SFT < DPO, PPO by the gold reward; what they learn isn't bought with wrong answers."""
    measured = summary["eval"]
    gold = {name: values["gold_mean"] for name, values in measured.items()}
    assert gold["base"] < gold["sft"] < min(gold["dpo"], gold["ppo"])
    assert (
        measured["base"]["win_rate"] < 0.5 < min(measured["dpo"]["win_rate_ci"][0], measured["ppo"]["win_rate_ci"][0])
    )
    assert measured["sft"]["format_rate"] >= 0.93  # a seed is ±0.01; the study holds the mean to 0.95
    assert measured["base"]["format_rate"] <= 0.2
    for name in ("dpo", "ppo"):
        assert measured[name]["win_rate"] >= 0.65  # seeds differ by ±0.02; the study holds the mean to 0.70
        assert measured[name]["accuracy"] >= measured["sft"]["accuracy"] - 0.02
    assert summary["reward_model"]["accuracy"] >= 0.82


def test_prints_the_tables(quickstart: subprocess.CompletedProcess[str]) -> None:
    for word in [*STAGES, "tokens/s", "win"]:
        assert word in quickstart.stdout


def test_report_has_pictures_and_replies(folder: Path, summary: dict[str, Any]) -> None:
    text = (folder / "report.md").read_text("utf-8")
    page = (folder / "report.html").read_text("utf-8")
    assert summary["samples"][0]["replies"]["ppo"].split("\n")[0] in text
    assert page.count("data:image/png;base64") >= 3
    assert "http://" not in page.replace("http://www.w3.org", "")  # self-contained
    assert list(folder.glob("plots/*.png"))


def test_lineage_and_hashes(folder: Path) -> None:
    artifacts = {name: load_artifact(folder / name) for name in STAGES}
    for name, artifact in artifacts.items():
        assert verify_files(folder / name, artifact.files) == []
    ppo = {parent.role: parent.run_id for parent in artifacts["ppo"].parents}
    assert ppo == {"model": artifacts["sft"].run_id, "reward_model": artifacts["reward"].run_id}
    assert artifacts["dpo"].parents[0].fingerprint == artifacts["sft"].fingerprint


def test_only_safetensors_are_published(folder: Path) -> None:
    for name in ("sft", "reward", "dpo", "ppo"):
        files = [path for path in (folder / name / "model").rglob("*") if path.is_file()]
        assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
        weights = [path for path in files if path.suffix == ".safetensors"]
        assert weights
        with safe_open(weights[0], "pt") as tensors:
            assert list(tensors.keys())


def test_metrics_are_json_lines(folder: Path) -> None:
    for name in ("sft", "reward", "dpo", "ppo"):
        rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text("utf-8").splitlines()]
        assert len(rows) >= 3
        steps = [row["step"] for row in rows]
        assert steps == sorted(steps)
        assert (folder / name / "report.md").is_file()


def test_again_skips_everything(workspace: Workspace, summary: dict[str, Any], folder: Path) -> None:
    done = workspace.shell("chatalign run recipes/quickstart.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fresh, skipped") == len(STAGES)
    again = json.loads((folder / "summary.json").read_text("utf-8"))
    assert [stage["run_id"] for stage in again["stages"]] == [stage["run_id"] for stage in summary["stages"]]
    assert again["eval"] == summary["eval"]


def test_skipping_imports_no_torch(workspace: Workspace, folder: Path) -> None:
    code = (
        "import sys; from chatalign.pipeline import run_pipeline; run_pipeline('recipes/quickstart.yaml');"
        "sys.exit(any(heavy in sys.modules for heavy in ('torch', 'transformers', 'datasets')))"
    )
    assert workspace.shell(f'{sys.executable} -c "{code}"').returncode == 0


def test_killed_and_terminated_stages_go_on(workspace: Workspace, folder: Path) -> None:
    """SIGTERM in sft saves and says how to go on; kill -9 later loses no more than a save interval; same weights."""
    command = (
        "exec chatalign sft recipes/pocket/sft.yaml model.name_or_path=runs/quickstart/base "
        "output_dir=runs/killed train.save_steps=5 train.max_steps=40"
    )
    whole = workspace.shell(command.replace("runs/killed", "runs/whole"))
    assert whole.returncode == 0, whole.stderr
    checkpoints = workspace.folder / "runs" / "killed" / "checkpoints"
    first = _start(workspace, command)
    _wait_for(lambda: any(checkpoints.glob("checkpoint-*")), first)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=120)
    assert first.returncode == 130, said
    assert "same command" in said
    second = _start(workspace, command)
    newest = max(int(path.name.split("-")[1]) for path in checkpoints.glob("checkpoint-*"))
    _wait_for(lambda: any(int(p.name.split("-")[1]) > newest for p in checkpoints.glob("checkpoint-*")), second)
    second.kill()
    second.communicate()
    assert not (workspace.folder / "runs" / "killed" / "artifact.json").exists()
    last = workspace.shell(command)
    assert last.returncode == 0, last.stderr
    runs = [load_artifact(workspace.folder / "runs" / name) for name in ("whole", "killed")]
    weights = [{k: v for k, v in run.files.items() if k.endswith(".safetensors")} for run in runs]
    assert weights[0] == weights[1], "the resumed run's weights differ from the uninterrupted one's"


def _start(workspace: Workspace, command: str) -> subprocess.Popen[str]:
    import os

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        command,
        shell=True,
        cwd=workspace.folder,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for(condition: Any, process: subprocess.Popen[str], limit_s: float = 240) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert process.poll() is None, f"ended early: {process.communicate()}"
        assert time.monotonic() < end, "the awaited checkpoint never came"
        time.sleep(0.02)


# The READMEs: every command runs, in order, in the same copy of the clone; what would take hours is made small.

ROOT = Path(__file__).resolve().parents[2]
SMALL = "train.max_steps=3 train.logging_steps=1"
POCKET = "model.name_or_path=data/pocket/base"
# What is added to a command, so that it ends in seconds. Commands that are not here run as they stand.
ADDED = {
    "chatalign sft recipes/sft.yaml train.learning_rate=1e-3": f"{SMALL} data.datasets.0.max_rows=200",
    "chatalign reward recipes/reward.yaml": f"{SMALL} data.datasets.0.max_rows=200",
    "chatalign dpo recipes/dpo.yaml": f"{SMALL} data.datasets.0.max_rows=200",
    "chatalign ppo recipes/ppo.yaml": "ppo.total_episodes=64 ppo.rollout_batch_size=32 train.logging_steps=1",
    "chatalign eval recipes/eval.yaml": "eval.prompts.max_rows=40 eval.pairs.max_rows=40",
    "accelerate launch --config_file accelerate_configs/cpu.yaml -m chatalign.sft recipes/sft.yaml": (
        f"{SMALL} data.datasets.0.max_rows=200 output_dir=runs/launched"
    ),
    "chatalign run recipes/quickstart.yaml --accelerate-config accelerate_configs/cpu.yaml": "",  # fresh: skipped
    "chatalign run recipes/models/qwen3-0.6b/pipeline.yaml": " ".join(
        f"{stage}.train.max_steps=2 {stage}.data.datasets='[{{path: data/pocket/{rows}, max_rows: 100}}]' "
        f"{stage}.data.eval_datasets='[]' {stage}.train.bf16=false {stage}.train.eval_strategy=no"
        for stage, rows in (("sft", "sft.jsonl"), ("dpo", "preferences.jsonl"))
    )
    + f" sft.{POCKET}",
}
# Commands whose work CI has done by other means: what stands for each.
MAKE = {
    "make quickstart": "chatalign run recipes/quickstart.yaml",  # the quickstart fixture runs it
    "make check": "mypy",
    "make test": "pytest",
}


def commands(readme: str) -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / readme).read_text("utf-8"), flags=re.M | re.S)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


def test_both_languages_give_the_same_commands() -> None:
    english, chinese = commands("README.md"), commands("README_zh.md")
    assert [c for c in english if not c.startswith("echo")] == [c for c in chinese if not c.startswith("echo")]
    assert len(english) == len(chinese) > 10


def test_additions_are_of_commands_that_stand_there() -> None:
    assert set(ADDED) | set(MAKE) <= set(commands("README.md"))


@pytest.mark.parametrize("command", MAKE)
def test_make_targets_do_what_ci_does(command: str) -> None:
    made = subprocess.run([*command.split(), "-n"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert MAKE[command] in made


def test_installing_all_extras_is_what_ci_has(workspace: Workspace) -> None:
    assert "pip install -e '.[all]'" in commands("README.md")
    check = "import trl, bitsandbytes, evaluate, sacrebleu, rouge_score, matplotlib, wandb, tensorboard"
    assert workspace.shell(f"python -c {shlex.quote(check)}").returncode == 0


def test_every_command_runs(workspace: Workspace, quickstart: subprocess.CompletedProcess[str]) -> None:
    """In the README's own order, since later commands use what earlier ones left."""
    with HubServer() as hub:
        run_all(workspace, {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_" + "x" * 34, "HF_HUB_OFFLINE": "0"})
        assert "model.safetensors" in hub.files or "adapter_model.safetensors" in hub.files


def run_all(workspace: Workspace, hub_settings: dict[str, str]) -> None:
    chats = [c for c in commands("README_zh.md") if c.startswith("echo")]
    for command in [*commands("README.md"), *chats]:
        if command in MAKE or command.startswith("pip install"):
            continue
        environment = hub_settings | {"HF_HUB_DISABLE_XET": "1"} if command.startswith("chatalign push") else {}
        done = workspace.shell(f"{command} {ADDED.get(command, '')}", timeout=600, **environment)
        assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
        if command.startswith("echo"):
            assert done.stdout.strip(), f"{command}: said nothing"


def test_the_table_is_the_quickstarts() -> None:
    """The README shows what a run printed: every stage and every measure, in both languages."""
    for readme in ("README.md", "README_zh.md"):
        text = (ROOT / readme).read_text("utf-8")
        table = text.split("<!-- quickstart table: begin -->")[1].split("<!-- quickstart table: end -->")[0]
        for word in ("base", "sft", "reward", "dpo", "ppo"):
            assert word in table, f"{readme}: {word} is missing in the table"
