"""The report: what it prints, for people and machines, its exit status, and what it doesn't load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from chatalign import preflight
from chatalign.check import rows as check_rows
from chatalign.commands import app
from chatalign.data import checks
from chatalign.preflight import check_file, load_any
from chatalign.runs import open_run
from check.conftest import question, write_recipe, write_rows

ROOT = Path(__file__).resolve().parents[2]


def call(*arguments: str) -> tuple[int, str]:
    outcome = CliRunner().invoke(app, ["check", *arguments])
    assert outcome.exception is None or isinstance(outcome.exception, SystemExit), outcome.exception
    return outcome.exit_code, outcome.output


def test_json_is_one_object_with_what_the_page_promises(place: Path) -> None:
    write_rows(place / "rows.jsonl", [question(0), question(1), question(0)])
    code, text = call("sft.yaml", "--json")
    assert code == 0
    report = json.loads(text)
    assert list(report) == ["file", "findings", "recipes", "counts"]
    assert report["file"] == "sft.yaml"
    assert report["recipes"]["sft"]["stage"] == "sft"
    found = [*report["findings"], *report["recipes"]["sft"]["findings"]]
    assert all(list(finding) == ["check", "what", "status", "problem", "mend"] for finding in found)
    counted = {status: sum(one["status"] == status for one in found) for status in ("ok", "FAIL", "note")}
    assert report["counts"] == counted
    (copies,) = [finding for finding in found if finding["check"] == "duplicates"]
    assert copies["status"] == "note"
    assert copies["problem"].endswith(
        "1 of 3 rows (33.3%) are exact copies of an earlier one, and are learned that often"
    )
    assert copies["mend"] == "take them out, or set data.clean.exact_duplicates: true"
    page = (ROOT / "docs" / "guard.md").read_text("utf-8")
    assert all(f"`{finding['check']}`" in page for finding in found), "the page names every check"


def test_a_failure_has_status_1_in_both_forms(place: Path) -> None:
    write_rows(place / "rows.jsonl", [question(0), {"messages": []}])
    code, text = call("sft.yaml")
    assert code == 1
    assert "FAIL rows.jsonl:2: messages: " in text
    assert text.splitlines()[-1] == "1 problem"
    code, text = call("sft.yaml", "--json")
    assert code == 1
    (failed,) = [one for one in json.loads(text)["recipes"]["sft"]["findings"] if one["status"] == "FAIL"]
    assert failed["problem"].startswith("rows.jsonl:2: messages: ")
    assert failed["mend"]


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_recipe_that_cannot_be_read_is_a_finding(place: Path, form: tuple[str, ...]) -> None:
    code, text = call("sft.yaml", "train.learning_rat=1", *form)
    assert code == 1
    assert "did you mean `train.learning_rate`?" in text
    if form:
        assert json.loads(text)["recipes"] == {}
        assert json.loads(text)["counts"] == {"ok": 0, "FAIL": 1, "note": 0}


def test_a_note_is_no_failure(place: Path) -> None:
    write_rows(place / "rows.jsonl", [question(0), question(0)])
    code, text = call("sft.yaml")
    assert code == 0
    assert text.splitlines()[-1] == "0 problems, 1 note"


def write_pipeline(place: Path) -> None:
    data = {"datasets": [{"path": "pairs.jsonl"}], "max_length": 64}
    write_recipe(place / "dpo.yaml", stage="dpo", data=data, lora={"r": 4})
    write_recipe(place / "reward.yaml", stage="reward", data=data, lora={"r": 4})
    stages = {"sft": {"recipe": "sft.yaml"}}
    stages |= {name: {"recipe": f"{name}.yaml", "model": "sft"} for name in ("reward", "dpo")}
    (place / "chain.yaml").write_text(
        yaml.safe_dump({"pipeline": "chain", "output_dir": "runs", "stages": stages}, sort_keys=False)
    )


def test_a_pipeline_is_looked_at_whole_and_shared_rows_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pipeline(place)
    looked: list[str] = []
    look_at_data = checks.look_at_data

    def watched(section: Any, kind: Any) -> Any:
        looked.append(section.datasets[0].path)
        return look_at_data(section, kind)

    monkeypatch.setattr(check_rows, "look_at_data", watched)
    report = check_file("chain.yaml")
    assert report.findings[0].problem is None
    assert looked == ["rows.jsonl", "pairs.jsonl"]
    assert list(report.recipes) == ["sft", "reward", "dpo"]
    assert report.counts["FAIL"] == 0
    tokenized = {name for name, (_, found) in report.recipes.items() if any(one.check == "template" for one in found)}
    assert tokenized == {"sft", "reward", "dpo"}, "a later stage has the tokenizer of the model that it starts from"


def test_a_stage_that_was_killed_is_a_model_to_come_for_the_later_ones(place: Path) -> None:
    write_pipeline(place)
    open_run(load_any("chain.yaml", [])["sft"])
    report = check_file("chain.yaml")
    assert report.counts["FAIL"] == 0, report.as_json()
    assert not any(one.check == "reference" for one in report.recipes["dpo"][1])


def test_files_read_in_other_processes_give_the_same_report(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(place / "rows.jsonl", [question(i % 700) for i in range(1200)])
    write_recipe(place / "sft.yaml", data={"datasets": [{"path": "rows.jsonl"}], "eval_fraction": 0.1})
    here = check_file("sft.yaml").as_json()
    monkeypatch.setattr(preflight, "_BYTES_BESIDE", 1)
    monkeypatch.setattr(checks, "_BYTES_FOR_WORKERS", 1)
    monkeypatch.setattr(checks, "_workers", lambda: 2)
    assert check_file("sft.yaml").as_json() == here
    assert "500 of 1,200 rows" in json.dumps(here)


def test_nothing_heavy_is_imported_where_no_tokenizer_is_here(place: Path) -> None:
    code = (
        "import sys, atexit; sys.argv[1:] = ['check', 'sft.yaml', 'model.name_or_path=owner/model']\n"
        "atexit.register(lambda: print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules]))\n"
        "from chatalign.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]", done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sft.yaml", "quickstart.yaml", "models/qwen3-0.6b/pipeline.yaml"])
def test_shipped_recipes_have_no_failure(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    report = check_file(f"recipes/{recipe}", [f"output_dir={tmp_path / 'run'}"])
    failed = [str(one.problem) for _, found in report.recipes.values() for one in found if one.problem is not None]
    assert not [line for line in failed if "package" not in line], "what isn't installed here is no fault of a recipe"
    assert report.findings[0].problem is None
