"""Pages say what the code does: their recipes validate, links lead somewhere, tables name what exists and no less."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from chatalign.artifact import Artifact
from chatalign.engine.defaults import LEARNING_RATES
from chatalign.maths.preference_losses import DPOLossType
from chatalign.pipeline import resolve_stages, run_stage
from chatalign.recipe import STAGES, PipelineRecipe, load_pipeline, read_yaml, validate_stage

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md")])
OWN_SECTIONS = ("reward", "dpo", "kto")
TRAINED = ("pretrain", "sft", "reward", "dpo", "kto")
PIPELINE_PAGE = "pipeline"


def read(page: str) -> str:
    return (ROOT / "docs" / f"{page}.md").read_text("utf-8")


def section(text: str, heading: str) -> str:
    """What stands under a heading of the second level."""
    return re.split(r"^## ", text.split(f"\n## {heading}\n")[1], flags=re.M)[0]


def table_rows(text: str) -> list[list[str]]:
    """The cells of all table rows, heads and rules left out."""
    without_heads = re.sub(r"^.*\n *\|[-|]+\n", "", text, flags=re.M)
    lines = [line.strip() for line in without_heads.splitlines()]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]


def names_in(text: str) -> set[str]:
    """What the first column of a text's tables names in backticks."""
    return {name for cells in table_rows(text) for name in re.findall(r"`([^`]+)`", cells[0])}


def whole_recipes() -> list[Any]:
    found = []
    for page in PAGES:
        blocks = re.findall(r"^```yaml\n(.*?)^```", page.read_text("utf-8"), flags=re.M | re.S)
        whole = [block for block in blocks if re.search(r"^(stage|pipeline):", block, flags=re.M)]
        found += [pytest.param(block, id=f"{page.stem}-{number}") for number, block in enumerate(whole)]
    return found


@pytest.mark.parametrize("block", whole_recipes())
def test_recipes_on_pages_validate(block: str, tmp_path: Path) -> None:
    path = tmp_path / "page.yaml"
    path.write_text(block, "utf-8")
    raw = read_yaml(path)
    if "pipeline" not in raw:
        validate_stage(raw, where="page")
        return
    assert isinstance(pipeline := load_pipeline(path), PipelineRecipe)
    assert resolve_stages(pipeline, ROOT / "recipes" / "page.yaml").keys() == pipeline.stages.keys()


def test_every_page_of_a_stage_has_a_recipe() -> None:
    with_recipe = {re.sub(r"-\d+$", "", str(param.id)) for param in whole_recipes()}
    assert {*TRAINED, "ppo", PIPELINE_PAGE, "evaluation", "README"} <= with_recipe


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes from a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, anchor = target.partition("#")
        linked = (page.parent / place).resolve() if place else page
        if not linked.is_relative_to(ROOT) or not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    assert not broken


def default_of(stage: str, dotted: str) -> Any:
    """A recipe key's default; KeyError where there is no such key."""
    fields = STAGES[stage].model_fields
    *parents, last = dotted.split(".")
    for part in parents:
        annotation = fields[part].annotation
        fields = annotation.model_fields  # type: ignore[union-attr]
    return fields[last].default


@pytest.mark.parametrize("stage", TRAINED)
def test_keys_are_there_with_their_defaults(stage: str) -> None:
    rows = table_rows(section(read(stage), "Its keys"))
    told = {cells[0].strip("`"): yaml.safe_load(cells[1]) for cells in rows}
    assert told == {key: default_of(stage, key) for key in told}
    if stage in OWN_SECTIONS:
        own = STAGES[stage].model_fields[stage].annotation.model_fields  # type: ignore[union-attr]
        assert {f"{stage}.{name}" for name in own} <= told.keys()


@pytest.mark.parametrize("stage", TRAINED)
def test_learning_rates_are_the_defaults(stage: str) -> None:
    told = re.findall(r"`(\d+e-\d+)`", section(read(stage), "Learning rate"))
    assert {float(rate) for rate in told} == set(LEARNING_RATES[stage])


def test_every_dpo_loss_is_in_the_table() -> None:
    assert names_in(section(read("dpo"), "Losses")) == set(get_args(DPOLossType))


def test_every_field_of_the_artifact_is_in_the_table() -> None:
    fields = names_in(section(read(PIPELINE_PAGE), "What a run leaves").partition("field of `artifact.json`")[2])
    assert fields == set(Artifact.model_fields)


WORDS = ("hello", "world", "Paris", "France")
ROWS: dict[str, list[dict[str, Any]]] = {
    "pretrain": [{"text": f"{a} {b}"} for a in WORDS for b in WORDS],
    "sft": [
        {"messages": [{"role": "user", "content": f"{a} {b}?"}, {"role": "assistant", "content": f"{b}."}]}
        for a in WORDS
        for b in WORDS
    ],
    "reward": [{"prompt": f"{a} {b}?", "chosen": f"{b}.", "rejected": f"{a} no"} for a in WORDS for b in WORDS],
    "kto": [
        {"prompt": f"{a} {b}?", "completion": f"{b}.", "label": label}
        for a in WORDS
        for b in WORDS
        for label in (True, False)
    ],
}
ROWS["dpo"] = ROWS["reward"]


def logged(stage: str, folder: Path, model: Path) -> set[str]:
    """The names of everything that two steps and an evaluation log."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[stage]), "utf-8")
    train = {"max_steps": 2, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"}
    raw = {
        "stage": stage,
        "output_dir": str(folder / "run"),
        "model": {"name_or_path": str(model)},
        "data": {"datasets": [{"path": str(rows)}], "max_length": 64, "eval_fraction": 0.3},
        "train": train | {"per_device_train_batch_size": 4, "use_cpu": True},
    }
    run_stage(validate_stage(raw, where="page"))
    lines = (folder / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    return {name for line in lines for name in json.loads(line)}


@pytest.mark.slow
@pytest.mark.parametrize("stage", TRAINED)
def test_metrics_are_those_of_the_table(stage: str, tmp_path: Path, tiny_model_folder: Path) -> None:
    if stage == "kto":
        pytest.importorskip("trl")
    told = names_in(section(read(stage), "Metrics"))
    if "eval_NAME" in told:
        own = told - {"eval_NAME"}
        told = own | {f"eval_{name}" for name in own} | names_in(section(read(PIPELINE_PAGE), "What every stage logs"))
    assert logged(stage, tmp_path, tiny_model_folder) == told
