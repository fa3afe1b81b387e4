"""Rows that a run left out are in its artifact and its report, with where they stand."""

from __future__ import annotations

import json
from pathlib import Path

from chatalign import sft
from chatalign.artifact import load_artifact
from chatalign.recipe import SftRecipe
from chatalign.report import write_run_report


def test_a_run_lists_every_row_that_it_left_out(tmp_path: Path, tiny_model_folder: Path) -> None:
    good = [json.dumps({"prompt": f"question {i}", "completion": "yes"}) for i in range(6)]
    empty = json.dumps({"prompt": "question", "completion": ""})
    doubled = '{"prompt": "a", "prompt": "b", "completion": "c"}'
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*good, *[empty] * 7, doubled, '{"prompt": ', good[0][:-1] + ', "x": NaN}']) + "\n")
    raw = {
        "stage": "sft",
        "output_dir": str(tmp_path / "run"),
        "model": {"name_or_path": str(tiny_model_folder)},
        "data": {"datasets": [{"path": str(path)}], "max_length": 64, "on_bad_row": "drop"},
        "train": {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True},
    }
    sft.run(SftRecipe.model_validate(raw))
    (used,) = load_artifact(tmp_path / "run").data
    assert (used.rows, used.used) == (16, 6)
    assert used.dropped == {
        "NaN is not JSON": 1,
        "broken JSON": 1,
        "completion: is empty": 7,
        "prompt: stands twice in one object": 1,
    }
    report = write_run_report(tmp_path / "run").read_text("utf-8")
    assert f"| {path} | prompt_completion | 16 | 6 | 10 |" in report
    named = ", ".join(f"{path}:{row}" for row in range(7, 12))
    assert f"| {path} | completion: is empty | 7 | {named} |" in report
    for reason, row in (("prompt: stands twice in one object", 14), ("broken JSON", 15), ("NaN is not JSON", 16)):
        assert f"| {path} | {reason} | 1 | {path}:{row} |" in report
