"""The chain's bookkeeping, with stages that only write an artifact: skip, rerun, resume, refuse, summarise."""

from __future__ import annotations

import json
import os
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import chatalign.pipeline as pipeline_module
from chatalign.artifact import Artifact, hash_files, load_artifact, write_json
from chatalign.beside import Beside
from chatalign.data import checks
from chatalign.errors import ChatalignError, DataError, Interrupted, RecipeError
from chatalign.phases import phase
from chatalign.pipeline import resolve_stages, run_pipeline
from chatalign.recipe import DataSection, Recipe, load_pipeline
from chatalign.runs import locked, open_run
from chatalign.sweep import parse_sweeps, run_sweep

ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
PAIR = {"prompt": "hi", "chosen": "hello", "rejected": "go away"}


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline sft → reward, dpo on disk; running a stage is recorded in ``ran``."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "sft.jsonl").write_text(json.dumps(ROW) + "\n")
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIR) + "\n")
    common: dict[str, Any] = {"output_dir": "unused", "model": {"name_or_path": str(tmp_path / "m")}}
    for stage, rows in [("sft", "sft.jsonl"), ("reward", "pairs.jsonl"), ("dpo", "pairs.jsonl")]:
        raw = common | {"stage": stage, "data": {"datasets": [{"path": str(tmp_path / rows)}]}}
        (tmp_path / f"{stage}.yaml").write_text(yaml.safe_dump(raw))
    raw = {
        "pipeline": "chain",
        "output_dir": str(tmp_path / "runs"),
        "stages": {
            "sft": {"recipe": "sft.yaml"},
            "reward": {"recipe": "reward.yaml", "model": "sft"},
            "dpo": {"recipe": "dpo.yaml", "model": "sft"},
        },
    }
    path = tmp_path / "chain.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    monkeypatch.setattr(pipeline_module, "report_pipeline", lambda folder, summary, *, changed: None)
    monkeypatch.setattr(pipeline_module, "hand_out", lambda recipe, report: None)
    monkeypatch.setattr(Beside, "begin", lambda self, first: None)
    monkeypatch.setattr(pipeline_module, "catch_up", lambda recipe: None)
    monkeypatch.setattr(pipeline_module, "import_once", lambda name, *, adapter: None)
    monkeypatch.setattr(pipeline_module, "as_if_alone", nullcontext)
    return path


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []

    def run_stage(recipe: Recipe) -> Artifact:
        names.append(recipe.stage)
        run = open_run(recipe)
        run.model_folder.mkdir(exist_ok=True)
        (run.model_folder / "config.json").write_text(run.fingerprint)
        artifact = Artifact(
            stage=recipe.stage,
            kind="model",
            run_id=run.run_id,
            fingerprint=run.fingerprint,
            parents=run.parents,
            files=hash_files(run.folder),
            metrics={"loss": 1.0},
        )
        artifact.save(run.folder)
        return artifact

    monkeypatch.setattr(pipeline_module, "run_stage", run_stage)
    return names


def test_rows_that_two_stages_read_alike_are_looked_at_once(
    chain: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    check_data = checks.check_data

    def watched(section: DataSection, kind: Any) -> list[str]:
        looked.append(Path(section.datasets[0].path).name)
        return check_data(section, kind)

    monkeypatch.setattr(checks, "check_data", watched)
    run_pipeline(chain)
    assert looked == ["sft.jsonl", "pairs.jsonl"]
    looked.clear()
    run_pipeline(chain, {"output_dir": str(chain.parent / "other"), "dpo.data.on_bad_row": "drop"})
    assert looked == ["sft.jsonl", "pairs.jsonl", "pairs.jsonl"]


def statuses(summary: dict[str, Any]) -> list[str]:
    return [row["status"] for row in summary["stages"]]


def test_runs_in_order_then_skips(chain: Path, ran: list[str]) -> None:
    assert statuses(run_pipeline(chain)) == ["ran"] * 3
    assert statuses(run_pipeline(chain)) == ["skipped"] * 3
    assert ran == ["sft", "reward", "dpo"]
    assert statuses(run_pipeline(chain, force=True)) == ["ran"] * 3


def test_a_changed_recipe_runs_again_with_all_that_hangs_on_it(chain: Path, ran: list[str]) -> None:
    run_pipeline(chain)
    ran.clear()
    assert statuses(run_pipeline(chain, {"dpo.dpo.beta": 0.3})) == ["skipped", "skipped", "ran"]
    assert statuses(run_pipeline(chain, {"sft.train.seed": 1, "dpo.dpo.beta": 0.3})) == ["ran"] * 3
    assert ran == ["dpo", "sft", "reward", "dpo"]


def test_changed_data_runs_again_only_what_reads_it(chain: Path, ran: list[str]) -> None:
    run_pipeline(chain)
    (chain.parent / "pairs.jsonl").write_text(json.dumps(PAIR | {"rejected": "no"}) + "\n")
    assert statuses(run_pipeline(chain)) == ["skipped", "ran", "ran"]


def test_an_interrupted_stage_resumes_and_the_rest_follows(
    chain: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pipeline_module.run_stage

    def killed(recipe: Recipe) -> Artifact:
        if recipe.stage == "reward":
            open_run(recipe)
            raise Interrupted("stopped; run the same command to go on")
        return whole(recipe)

    monkeypatch.setattr(pipeline_module, "run_stage", killed)
    with pytest.raises(Interrupted):
        run_pipeline(chain)
    monkeypatch.setattr(pipeline_module, "run_stage", whole)
    assert statuses(run_pipeline(chain)) == ["skipped", "resumed", "ran"]


def test_a_bad_row_of_the_last_stage_stops_the_first_from_starting(chain: Path, ran: list[str]) -> None:
    (chain.parent / "pairs.jsonl").write_text(json.dumps(PAIR) + "\n" + json.dumps({"prompt": "hi"}) + "\n")
    with pytest.raises(DataError, match=r"pairs.jsonl:2: "):
        run_pipeline(chain)
    assert ran == []


def test_a_finished_run_stays_in_its_place_where_the_next_one_can_not_begin(chain: Path, ran: list[str]) -> None:
    run_pipeline(chain)
    rows = chain.parent / "sft.jsonl"
    good = rows.read_text()
    rows.write_text(good + '{"messages": 3}\n')
    for force in (False, True):
        with pytest.raises(DataError, match=r"^stage sft: .*sft\.jsonl:2: .*left out: reward, dpo$"):
            run_pipeline(chain, force=force)
    rows.write_text(good)
    assert statuses(run_pipeline(chain)) == ["skipped"] * 3


def test_every_stages_recipe_is_validated_before_the_first_runs(chain: Path, ran: list[str]) -> None:
    with pytest.raises(RecipeError, match=r"stage dpo .*`dpo.bata` is not a recipe key"):
        run_pipeline(chain, {"dpo.dpo.bata": 1})
    assert ran == []


def test_inputs_become_folders_of_earlier_stages(chain: Path) -> None:
    stages = resolve_stages(load_pipeline(chain), chain)
    runs = chain.parent / "runs"
    assert stages["dpo"].output_dir == str(runs / "dpo")
    assert stages["dpo"].model.name_or_path == str(runs / "sft")  # type: ignore[union-attr]


def test_a_stages_override_holds_beside_one_of_the_pipeline(chain: Path) -> None:
    """In either order: the pipeline's own key once took the stages' later ones with it."""
    changes: dict[str, Any] = {"output_dir": "elsewhere", "dpo.dpo.beta": 0.3}
    for order in (changes, dict(reversed(changes.items()))):
        stages = resolve_stages(load_pipeline(chain, order), chain)
        assert stages["dpo"].dpo.beta == 0.3  # type: ignore[union-attr]
        assert stages["dpo"].output_dir == "elsewhere/dpo"


def test_a_stage_whose_folder_is_held_by_another_run_is_refused(chain: Path, ran: list[str]) -> None:
    with locked(chain.parent / "runs" / "reward"), pytest.raises(RecipeError, match="another chatalign run"):
        run_pipeline(chain)
    assert ran == ["sft", "dpo"]
    assert statuses(run_pipeline(chain)) == ["skipped", "ran", "skipped"]


def test_the_summary_keeps_the_seconds_of_the_run_that_made_a_stage(
    chain: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        pipeline_module,
        "report_pipeline",
        lambda folder, summary, *, changed: write_json(folder / "summary.json", summary),
    )
    whole = pipeline_module.run_stage

    def with_phases(recipe: Recipe) -> Artifact:
        with phase("train"):
            time.sleep(0.02)
        with phase("data"):
            time.sleep(0.02)
        return whole(recipe)

    monkeypatch.setattr(pipeline_module, "run_stage", with_phases)
    first = run_pipeline(chain)["stages"]
    for row in first:
        assert {"check", "train", "data"} <= set(row["seconds"])
        assert row["overhead_s"] == pytest.approx(sum(row["seconds"].values()) - row["seconds"]["train"], abs=0.006)
    again = run_pipeline(chain, {"dpo.dpo.beta": 0.3})["stages"]
    assert [row["status"] for row in again] == ["skipped", "skipped", "ran"]
    assert [row["seconds"] for row in again[:2]] == [row["seconds"] for row in first[:2]]


def test_a_failing_launch_names_the_command(chain: Path, ran: list[str]) -> None:
    with pytest.raises(ChatalignError, match="ended with status"):
        run_pipeline(chain, accelerate_config=chain.parent / "no_such_config.yaml")


def test_a_stage_that_fails_leaves_those_that_do_not_need_it_running(
    chain: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = yaml.safe_load(chain.read_text())
    raw["stages"]["ppo"] = {"recipe": "ppo.yaml", "model": "sft", "reward_model": "reward"}
    raw["stages"]["again"] = {"recipe": "dpo.yaml", "model": "dpo"}
    chain.write_text(yaml.safe_dump(raw, sort_keys=False))
    prompts = {"datasets": [{"path": str(chain.parent / "pairs.jsonl")}]}
    (chain.parent / "ppo.yaml").write_text(yaml.safe_dump({"stage": "ppo", "output_dir": "unused", "data": prompts}))
    whole = pipeline_module.run_stage

    def fails(recipe: Recipe) -> Artifact:
        if recipe.stage == "reward":
            raise DataError("no row is left")
        return whole(recipe)

    monkeypatch.setattr(pipeline_module, "run_stage", fails)
    written: list[dict[str, Any]] = []
    monkeypatch.setattr(pipeline_module, "report_pipeline", lambda folder, summary, *, changed: written.append(summary))
    with pytest.raises(DataError, match=r"^stage reward: no row is left; left out: ppo$"):
        run_pipeline(chain)
    assert ran == ["sft", "dpo", "dpo"]
    assert statuses(written[0]) == ["ran", "failed", "ran", "blocked", "ran"]
    monkeypatch.setattr(pipeline_module, "run_stage", whole)
    assert statuses(run_pipeline(chain)) == ["skipped", "ran", "skipped", "ran", "skipped"]


def test_a_sweep_runs_what_all_share_once(chain: Path, ran: list[str]) -> None:
    swept = parse_sweeps(["dpo.beta=0.05, 0.1", "dpo.train.seed=1,2"])
    assert swept == {"dpo.beta": [0.05, 0.1], "dpo.train.seed": [1, 2]}
    summaries = run_sweep(chain, {"reward.train.seed": 3}, swept)
    assert ran == ["sft", "reward", *["dpo"] * 4]
    assert [statuses(summary) for summary in summaries] == [["skipped", "skipped", "ran"]] * 4
    home = chain.parent / "runs"
    names = sorted(path.name for path in (home / "sweep").iterdir() if path.is_dir())
    assert names == [f"dpo.dpo.beta={beta},dpo.train.seed={seed}" for beta in (0.05, 0.1) for seed in (1, 2)]
    recipes = [load_artifact(home / "sweep" / name / "dpo").recipe for name in names]
    assert len({load_artifact(home / "sweep" / name / "dpo").fingerprint for name in names}) == len(recipes) == 4
    assert (home / "sweep" / names[0] / "sft").resolve() == (home / "sft").resolve()
    assert (home / "sweep" / "sweep.md").read_text().count("| dpo |") == 4
    ran.clear()
    assert [statuses(summary) for summary in run_sweep(chain, {"reward.train.seed": 3}, swept)] == [["skipped"] * 3] * 4
    assert statuses(run_sweep(chain, {}, {"sft.train.seed": [9]})[0]) == ["ran"] * 3  # nothing is shared
    assert ran == ["sft", "reward", "dpo"]


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("dpo.beta", "write it like dpo.beta=0.05,0.1,0.2"),
        ("dpo.beta=", "write it like"),
        ("dpo.beta=[", "write it like"),
        ("beta=1,2", r"begin with a stage's name \(sft, reward, dpo\)"),
        ("dpo.bata=1,2", "is not a recipe key"),
        ("dpo.beta=0.1,-1", "greater than 0"),
        ("dpo.beta=0.1,0.1", "two values are the same"),
    ],
)
def test_a_sweep_that_cannot_run_is_refused_before_it_begins(
    item: str, words: str, chain: Path, ran: list[str]
) -> None:
    with pytest.raises(RecipeError, match=words):
        run_sweep(chain, {}, parse_sweeps([item]))
    assert ran == []


STAND_IN = """
import os, sys, time, yaml
from pathlib import Path
from chatalign.artifact import Artifact
from chatalign.recipe import load_recipe
from chatalign.runs import open_run
recipe = load_recipe(sys.argv[1])
run = open_run(recipe)
place = Path(recipe.output_dir)
(place / "began").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
waits = os.environ.get("WAITS", "")
other = {"reward": "dpo", "dpo": "reward"}.get(recipe.stage)
deadline = time.monotonic() + 60
while waits == "for each other" and other and not (place.parent / other / "began").exists():
    if time.monotonic() > deadline:
        sys.exit("chatalign: the other never began")
    time.sleep(0.01)
if recipe.stage == os.environ.get("FAILS"):
    sys.exit("chatalign: out of memory")
artifact = Artifact(
    stage=recipe.stage, kind="model", run_id=run.run_id, fingerprint=run.fingerprint, parents=run.parents
)
artifact.save(run.folder)
"""


@pytest.fixture
def processes(chain: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The chain, its stages processes that write an artifact."""
    (chain.parent / "stand_in.py").write_text(STAND_IN)
    paths = [str(chain.parent), *filter(None, [os.environ.get("PYTHONPATH")]), str(Path(__file__).resolve().parents[1])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setattr(pipeline_module, "STAGE_MODULES", dict.fromkeys(pipeline_module.STAGE_MODULES, "stand_in"))
    return chain


def test_stages_that_do_not_need_one_another_run_side_by_side(processes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAITS", "for each other")  # reward and dpo end only where both have begun
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert statuses(run_pipeline(processes, jobs=2)) == ["ran"] * 3
    runs = processes.parent / "runs"
    assert {(runs / name / "began").read_text() for name in ("reward", "dpo")} == {"4", "7"}
    assert statuses(run_pipeline(processes, jobs=2)) == ["skipped"] * 3


def test_side_by_side_a_failure_leaves_the_others_running(processes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILS", "reward")
    with pytest.raises(ChatalignError, match=r"^stage reward: out of memory \(all of it in .*runs/reward/log.txt\)$"):
        run_pipeline(processes, jobs=2)
    assert (processes.parent / "runs" / "dpo" / "artifact.json").exists()
    monkeypatch.delenv("FAILS")
    assert statuses(run_pipeline(processes, jobs=2)) == ["skipped", "resumed", "skipped"]


def test_side_by_side_a_stage_that_can_not_begin_leaves_out_those_that_need_it(processes: Path) -> None:
    words = "^stage sft: .*another chatalign run writes here; .*; left out: reward, dpo$"
    with locked(processes.parent / "runs" / "sft"), pytest.raises(RecipeError, match=words):
        run_pipeline(processes, jobs=2)


@pytest.mark.parametrize(
    ("stage", "raw", "expected"), [("sft", {"r": 4}, True), ("sft", None, False), ("ppo", {}, False)]
)
def test_a_stage_is_imported_as_what_it_will_train(
    stage: str, raw: dict[str, Any] | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    done = SimpleNamespace(run=lambda recipe: asked.append(recipe))
    monkeypatch.setattr(pipeline_module, "import_once", lambda name, *, adapter: asked.append((name, adapter)) or done)
    recipe: Any = SimpleNamespace(stage=stage, lora=raw)
    pipeline_module.run_stage(recipe)
    assert asked == [(f"chatalign.{stage}", expected), recipe]
