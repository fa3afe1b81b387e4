"""Every command in the READMEs runs, in order, in a copy of the clone; what would take hours is made pocket-size."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from hub_server import HubServer

from .conftest import Workspace

pytestmark = pytest.mark.slow
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
