"""The command line: what it prints, its exit status, and that it stays light until a stage runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from chatalign.commands import app

RECIPE: dict[str, Any] = {
    "stage": "sft",
    "output_dir": "runs/x",
    "model": {"name_or_path": "model"},
    "data": {"datasets": [{"path": "rows.jsonl"}]},
}
ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with rows, a model's config and a recipe."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path


def call(*arguments: str) -> tuple[int, str]:
    outcome = CliRunner().invoke(app, list(arguments))
    assert outcome.exception is None or isinstance(outcome.exception, SystemExit), outcome.exception
    return outcome.exit_code, outcome.output


def test_help_names_every_command() -> None:
    code, text = call("--help")
    assert code == 0
    stages = ["pretrain", "sft", "reward", "dpo", "ppo", "kto", "eval"]
    for command in [*stages, "run", "check", "inspect", "chat", "report", "merge", "push", "schema", "env"]:
        assert f"  {command} " in text


@pytest.mark.parametrize(
    "arguments", [["--help"], ["schema", "dpo"], ["env"], ["sft", "no.yaml"], ["check", "bad.yaml"]]
)
def test_stays_light(arguments: list[str], place: Path) -> None:
    (place / "bad.yaml").write_text(yaml.safe_dump(RECIPE | {"trian": {}}))
    code = (
        f"import sys, atexit; sys.argv[1:] = {arguments!r}\n"
        "heavy = lambda: [m for m in ('torch', 'transformers', 'datasets') if m in sys.modules]\n"
        "atexit.register(lambda: print('HEAVY', heavy()))\n"
        "from chatalign.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "HEAVY []" in done.stdout, done.stdout + done.stderr


def test_schema_is_json_schema() -> None:
    code, text = call("schema", "pipeline")
    assert code == 0
    assert json.loads(text)["properties"]["stages"]
    code, text = call("schema", "nonsense")
    assert code == 2
    assert "is not a stage; give one of" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sft", "nowhere.yaml"], "chatalign: nowhere.yaml: no such recipe"),
        (["sft", "sft.yaml", "train.learning_rat=1"], "did you mean `train.learning_rate`?"),
        (["sft", "sft.yaml", "train.learning_rate"], "is not key=value"),
        (["dpo", "sft.yaml"], "run it with `chatalign sft sft.yaml`"),
        (["run", "sft.yaml"], "not a pipeline"),
        (["sft", "sft.yaml", "data.datasets.0.path=row.jsonl"], "row.jsonl"),
        (["sft", "sft.yaml", "model.name_or_path=./mode"], "no such folder; did you mean model?"),
        (["merge", "nowhere/at/all", "out"], "nowhere/at/all"),
        (["chat", "nowhere/at/all"], "nowhere/at/all"),
        (["push", "nowhere/at/all", "--repo", "me/x"], "nowhere/at/all"),
        (["report", "nowhere"], "nowhere/artifact.json: missing"),
    ],
)
def test_bad_input_gets_one_line_and_status_2(place: Path, arguments: list[str], words: str) -> None:
    before = sorted(place.rglob("*"))
    code, text = call(*arguments)
    assert code == 2, text
    assert words in text
    assert "Traceback" not in text
    assert len(text.strip().splitlines()) == 1, text
    assert sorted(place.rglob("*")) == before, "something was half-written"


def test_traceback_on_demand(place: Path) -> None:
    code, text = call("sft", "nowhere.yaml", "--traceback")
    assert code == 2
    assert "Traceback" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora": {"rank": 8}}, "`lora.rank` is not a recipe key"),
        ({"data": {"datasets": [{"path": "rowz.jsonl"}]}}, "did you mean rows.jsonl"),
        ({"model": {"name_or_path": "./nowhere"}}, "no such folder"),
        ({"stage": "dpo"}, "holds messages rows"),
    ],
)
def test_check_exits_1_and_names_the_problem(place: Path, change: dict[str, Any], words: str) -> None:
    assert call("check", "sft.yaml")[0] in (0, 1)  # the stub model has no tokenizer: only the light part is clean
    (place / "bad.yaml").write_text(yaml.safe_dump(RECIPE | change))
    code, text = call("check", "bad.yaml")
    assert code == 1
    assert words in text


def test_check_names_an_unfinished_parent(place: Path) -> None:
    (place / "runs" / "sft").mkdir(parents=True)
    (place / "runs" / "sft" / "run.json").write_text("{}")
    (place / "runs" / "sft" / "recipe.yaml").write_text("stage: sft")
    code, text = call("check", "sft.yaml", "model.name_or_path=runs/sft")
    assert code == 1
    assert "is a run that isn't finished; run `chatalign sft runs/sft/recipe.yaml` first" in text


def test_check_reads_gold_functions_without_running_them(place: Path) -> None:
    (place / "gold.py").write_text("raise SystemExit('was run')\ndef score(): ...\n")
    raw = {"stage": "eval", "output_dir": "runs/e", "eval": {"gold": "gold.py:scor"}}
    (place / "eval.yaml").write_text(yaml.safe_dump(raw))
    code, text = call("check", "eval.yaml")
    assert code == 1
    assert "has no function `scor`; it has score" in text
    assert call("check", "eval.yaml", "eval.gold=gold.py:score")[0] == 0


def test_check_says_what_it_did_not_look_at(place: Path) -> None:
    code, text = call("check", "sft.yaml", "data.datasets.0.path=owner/rows", "model.name_or_path=owner/model")
    assert code == 0
    assert "rows of owner/rows as conversation: on the Hub, not looked at before the run" in text


def test_check_names_a_missing_pretrained_model(place: Path) -> None:
    (place / "base.yaml").write_text(yaml.safe_dump(RECIPE | {"stage": "pretrain", "pretrained": "./modle"}))
    code, text = call("check", "base.yaml")
    assert code == 1
    assert "`pretrained: ./modle`: no such folder; did you mean model?" in text
