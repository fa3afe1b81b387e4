"""Every stage trains on real files of peers' shapes as they are; skipped where they aren't beside the checkout."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest

from chatalign.artifact import Artifact
from chatalign.pipeline import STAGE_MODULES
from chatalign.recipe import apply_overrides, validate_stage

pytestmark = pytest.mark.slow
LORA = {"r": 8, "lora_alpha": 16}
CASES = [
    ("pretrain", "c4_demo.jsonl", {}),
    ("pretrain", "wiki_demo.txt", {}),
    ("sft", "alpaca_en_demo.json", {}),
    ("sft", "alpaca_zh_demo.json", {"lora": LORA}),
    ("sft", "glaive_toolcall_en_demo.json", {"data.max_length": 2048}),
    ("reward", "dpo_en_demo.json", {"lora": LORA}),
    ("dpo", "dpo_en_demo.json", {}),
    ("kto", "kto_en_demo.json", {"lora": LORA}),
    ("ppo", "alpaca_en_demo.json", {"lora": LORA}),
    ("ppo", "dpo_en_demo.json", {}),
]
PPO = {"total_episodes": 32, "rollout_batch_size": 16, "num_ppo_epochs": 1, "response_length": 16}


def train(stage: str, file: Path, extra: dict[str, Any], tmp_path: Path, root: Path) -> Artifact:
    raw: dict[str, Any] = {
        "stage": stage,
        "output_dir": str(tmp_path / "run"),
        "model": {"name_or_path": str(root / "data/pocket/base")},
        "data": {"datasets": [{"path": str(file), "max_rows": 60}], "max_length": 256, "max_prompt_length": 128},
        "train": {"max_steps": 4, "learning_rate": 1e-4, "per_device_train_batch_size": 4, "logging_steps": 1},
    }
    if stage == "ppo":
        (tmp_path / "length.py").write_text(
            "def score(*, prompts, replies, extras):\n    return [min(len(reply), 40) / 40 for reply in replies]\n"
        )
        raw["ppo"] = PPO | {"rewards": [{"function": f"{tmp_path}/length.py:score"}]}
        del raw["train"]["max_steps"]
    recipe = validate_stage(apply_overrides(raw, extra), where="test")
    return importlib.import_module(STAGE_MODULES[stage]).run(recipe)


@pytest.mark.parametrize(("stage", "name", "extra"), CASES, ids=[f"{stage}-{name}" for stage, name, _ in CASES])
def test_stage_trains_on_a_real_file(
    stage: str, name: str, extra: dict[str, Any], shared_data: Path, tmp_path: Path, root: Path
) -> None:
    artifact = train(stage, shared_data / name, extra, tmp_path, root)
    used = artifact.data[0]
    assert used.rows == min(60, 30 if name.endswith(".txt") else 60)
    assert used.used > 0
    # A row is used or dropped for a reason that is counted (a text may be cut into several documents).
    assert used.used + sum(used.dropped.values()) >= used.rows
    assert all(math.isfinite(value) for value in artifact.metrics.values())
    assert (tmp_path / "run" / "metrics.jsonl").read_text("utf-8")
    assert list((tmp_path / "run" / "model").glob("*.safetensors"))
