"""What a run came from, as a graph, and two runs beside each other; hashes that no longer match are named."""

from __future__ import annotations

import io
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from chatalign import checkpoint
from chatalign.artifact import Artifact, BaseModelRef, DataUsed, Parent, hash_files, sha256_file, sha256_weights
from chatalign.errors import ArtifactError
from chatalign.report import write_comparison
from chatalign.report.compare import recipe_differences
from chatalign.report.lineage import finished_runs, lineage_of, mermaid, svg, tree
from chatalign.verify import verify_run

EVIL = 'a"<b>|`#.jsonl'


def stage(
    root: Path, name: str, *, parents: dict[str, Artifact] | None = None, loss: float = 1.0, **recipe: Any
) -> Artifact:
    """A finished run with weights, rows, a checkpoint and two logged steps."""
    folder = root / name
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "model.safetensors").write_bytes(f"{name} {loss} {recipe}".encode())
    rows, base = root.parent / EVIL, root.parent / "base"
    rows.write_text("{}\n")
    base.mkdir(exist_ok=True)
    (base / "model.safetensors").write_bytes(b"base")
    lines = [{"step": step, "loss": loss / step} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = [
        Parent(role=role, path=str(root / parent.stage), run_id=parent.run_id, fingerprint=parent.fingerprint)
        for role, parent in (parents or {}).items()
    ]
    artifact = Artifact(
        stage=name,
        kind="model",
        run_id=f"{name}-{loss}",
        fingerprint="f" * 64,
        parents=given,
        base_model=BaseModelRef(name_or_path=str(base), sha256=sha256_weights(base)),
        recipe={"stage": name, "output_dir": str(folder), "train": {"seed": 1, "learning_rate": 0.1} | recipe},
        data=[DataUsed(path=str(rows), sha256=sha256_file(rows), format="text", rows=1, used=1)],
        metrics={"loss": loss},
        files=hash_files(folder),
    )
    made = folder / "checkpoints" / "checkpoint-2"
    made.mkdir(parents=True)
    (made / "optimizer.pt").write_bytes(b"state")
    checkpoint.write_manifest(made, artifact.run_id)
    artifact.save(folder)
    return artifact


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """sft → reward → ppo, which takes both."""
    root = tmp_path / "runs"
    sft = stage(root, "sft")
    reward = stage(root, "reward", parents={"model": sft})
    stage(root, "ppo", parents={"model": sft, "reward_model": reward})
    return root


def test_parents_come_first_and_every_source_has_an_edge(chain: Path) -> None:
    runs = finished_runs(chain)
    assert list(runs) == ["sft", "reward", "ppo"]
    graph = lineage_of(runs)
    assert {(graph.nodes[e.source].name, e.target, e.role) for e in graph.edges} == {
        (str(chain.parent / "base"), "sft", "model"),
        *((str(chain.parent / EVIL), name, "rows") for name in ("sft", "reward", "ppo")),
        ("sft", "reward", "model"),
        ("sft", "ppo", "model"),
        ("reward", "ppo", "reward_model"),
    }
    assert len(graph.nodes) == 5
    assert list(finished_runs(chain / "ppo")) == ["ppo"]  # alone: its parents are sources from elsewhere
    alone = lineage_of(finished_runs(chain / "ppo"))
    assert {alone.nodes[e.source].kind for e in alone.edges} == {"model", "data"}
    with pytest.raises(ArtifactError, match="missing"):
        finished_runs(chain.parent / "base")


def test_the_graph_is_drawn_three_ways_and_names_are_text(chain: Path) -> None:
    graph = lineage_of(finished_runs(chain))
    drawn = ElementTree.fromstring(svg(graph))  # well-formed, whatever a file is called
    texts = [text.text for text in drawn.iter("text")]
    assert {"sft", "reward", "ppo", "sft · run sft-1.0"} <= set(texts)
    assert sum(element.tag == "rect" for element in drawn.iter()) == 5
    boxes = [(float(box.attrib["x"]), float(box.attrib["y"])) for box in drawn.iter("rect")]
    assert len(set(boxes)) == 5  # none on another
    flow = mermaid(graph)
    assert flow.count("-->") == len(graph.edges)
    assert "a#quot;#lt;b#gt;#124;#96;#35;.jsonl" in flow
    console = Console(file=io.StringIO(), width=200)
    console.print(tree(graph, "runs"))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "reward_model: reward  reward · run reward-1.0, weights" in shown
    assert EVIL in shown


def test_what_is_as_it_was_verifies(chain: Path) -> None:
    verdicts = list(verify_run(chain))
    assert [verdict.problem for verdict in verdicts] == [None] * len(verdicts)
    assert len(verdicts) == 3 * 4 + 3  # files, base, rows, checkpoint each; parents 0 + 1 + 2


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda root: _flip(root / "reward/model/model.safetensors"), "reward/model/model.safetensors: altered since"),
        (lambda root: (root / "ppo/model/model.safetensors").unlink(), "ppo/model/model.safetensors: missing"),
        (lambda root: _flip(root.parent / "base/model.safetensors"), "base: has sha256"),
        (lambda root: shutil.rmtree(root.parent / "base"), "base: missing; "),
        (lambda root: _flip(root.parent / EVIL), f"{EVIL}: altered since"),
        (lambda root: _flip(root / "sft/checkpoints/checkpoint-2/optimizer.pt"), "optimizer.pt: altered"),
        (lambda root: (root / "sft/checkpoints/checkpoint-2/manifest.json").unlink(), "has no manifest.json"),
        (lambda root: (shutil.rmtree(root / "sft"), stage(root, "sft", loss=2.0)), "and .*sft holds run sft-2.0 now"),
        (lambda root: shutil.rmtree(root / "reward"), "its reward_model can't be looked at"),
    ],
)
def test_what_no_longer_matches_is_named(chain: Path, damage: Callable[[Path], Any], words: str) -> None:
    damage(chain)
    problems = [verdict.problem for verdict in verify_run(chain) if verdict.problem]
    pattern = words if ".*" in words else re.escape(words)
    assert any(re.search(pattern, problem) for problem in problems), problems
    assert all("\n" not in problem for problem in problems)


def test_two_pipelines_beside_each_other(chain: Path, tmp_path: Path) -> None:
    other = tmp_path / "again"
    stage(other, "sft", loss=0.5, learning_rate=0.2, warmup_steps=3)
    stage(other, "dpo")
    report = write_comparison(chain, other, tmp_path / "compared").read_text("utf-8")
    assert "| sft | runs | sft-1.0 |" in report
    assert "| `train.learning_rate` | 0.1 | 0.2 |" in report
    assert "| `train.warmup_steps` | None | 3 |" in report
    assert "output_dir" not in report
    assert "| loss | 1 | 0.5 | -0.5 |" in report
    assert "![loss](plots/sft_loss.png)" in report
    assert (tmp_path / "compared/plots/sft_loss.png").read_bytes()[:4] == b"\x89PNG"
    assert "## reward" not in report
    with pytest.raises(ArtifactError, match="no stage in common"):
        write_comparison(chain / "reward", other / "dpo", tmp_path / "none")


def test_two_runs_of_the_same_bytes_are_said_to_be_that(chain: Path, tmp_path: Path) -> None:
    stage(tmp_path / "again", "sft")
    same = write_comparison(chain / "sft", tmp_path / "again/sft", tmp_path / "same").read_text("utf-8")
    assert "### Files\n\nThe same bytes." in same
    stage(tmp_path / "other", "sft", loss=0.5)
    report = write_comparison(chain / "sft", tmp_path / "other/sft", tmp_path / "differ").read_text("utf-8")
    assert "### Files\n\n1 of 1 differ: model/model.safetensors\n" in report


def test_replies_stand_side_by_side(tmp_path: Path) -> None:
    for name, reply in (("a", "It is 4."), ("b", "4 | <b>")):
        stage(tmp_path / name, "eval")
        results = {"models": {}, "reward_model": {}, "samples": [{"prompt": "2 + 2?", "replies": {"sft": reply}}]}
        (tmp_path / name / "eval" / "eval.json").write_text(json.dumps(results))
    report = write_comparison(tmp_path / "a/eval", tmp_path / "b/eval", tmp_path / "compared").read_text("utf-8")
    assert "| 2 + 2? | sft | It is 4. | 4 \\| &lt;b&gt; |" in report
    assert "The recipes, rows and versions are the same." in report


def test_differences_of_nested_recipes() -> None:
    one = {"train": {"seed": 1, "lr": 0.1}, "lora": {"r": 8}, "x": None}
    other = {"train": {"seed": 2, "lr": 0.1}, "lora": None, "y": 1}
    assert list(recipe_differences(one, other)) == [("lora", {"r": 8}, None), ("train.seed", 1, 2), ("y", None, 1)]
