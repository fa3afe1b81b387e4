"""A chain whose stages have unfinished runs of other inputs: refused before any runs, allowed by name, begun anew."""

# ruff: noqa: F811 - fixtures of another module are imported and then arguments

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_pipeline import chain, processes, ran, statuses  # noqa: F401 - fixtures

from chatalign.checkpoint import publish
from chatalign.errors import ChangedRunError, RecipeError
from chatalign.pipeline import resolve_stages, run_pipeline
from chatalign.recipe import load_pipeline
from chatalign.runs import open_run
from chatalign.unfinished import read_run_file

CHANGE: dict[str, Any] = {"reward.train.weight_decay": 0.1}
ALLOW = ["reward.train.weight_decay"]


def leave_unfinished(chain: Path, name: str, *, world_size: int = 1) -> str:
    """Make a stage's run one that was killed after step 5; returns its id."""
    recipe: Any = resolve_stages(load_pipeline(chain), chain)[name]
    (Path(recipe.output_dir) / "artifact.json").unlink(missing_ok=True)
    run = open_run(recipe)
    aside = run.checkpoints / ".saving" / "checkpoint-5"
    aside.mkdir(parents=True)
    (aside / "weights").write_bytes(b"weights")
    publish(aside, run.run_id, {}, run.made_from(recipe) | {"world_size": world_size})
    return run.run_id


def test_a_changed_stage_is_refused_before_any_runs(chain: Path, ran: list[str]) -> None:
    run_pipeline(chain)
    leave_unfinished(chain, "reward")
    ran.clear()
    words = r"`--allow-change reward\.train\.weight_decay` goes on with it, `--force` begins every stage anew"
    with pytest.raises(ChangedRunError, match=words):
        run_pipeline(chain, {**CHANGE, "dpo.dpo.beta": 0.3})
    assert ran == []


def test_a_stage_goes_on_under_a_change_that_is_allowed(chain: Path, ran: list[str]) -> None:
    run_pipeline(chain)
    run_id = leave_unfinished(chain, "reward")
    assert statuses(run_pipeline(chain, CHANGE, allow_change=ALLOW)) == ["skipped", "resumed", "skipped"]
    assert read_run_file(chain.parent / "runs" / "reward")["run_id"] == run_id
    assert statuses(run_pipeline(chain, CHANGE, allow_change=ALLOW)) == ["skipped"] * 3  # the same command again


def test_a_change_comes_down_the_chain(
    chain: Path,
    ran: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_pipeline(chain)
    run_id = leave_unfinished(chain, "dpo")
    assert statuses(run_pipeline(chain, {"sft.train.seed": 1})) == ["ran"] * 3
    runs = chain.parent / "runs"
    assert (
        f"{runs}/dpo: moved to {runs}/dpo.previous, since it was begun otherwise (model.run)" in capsys.readouterr().out
    )
    assert read_run_file(runs / "dpo.previous")["run_id"] == run_id


def test_a_kill_between_a_changed_stage_and_its_child_changes_nothing_in_that(chain: Path, ran: list[str]) -> None:
    run_pipeline(chain)
    leave_unfinished(chain, "dpo")
    run_pipeline(chain, {"sft.train.seed": 1}, only=["sft"])  # and then it was killed
    assert statuses(run_pipeline(chain, {"sft.train.seed": 1})) == ["skipped", "ran", "ran"]


def test_force_begins_every_stage_anew(chain: Path, ran: list[str]) -> None:
    run_pipeline(chain)
    run_id = leave_unfinished(chain, "reward")
    assert statuses(run_pipeline(chain, CHANGE, force=True)) == ["ran"] * 3
    assert read_run_file(chain.parent / "runs" / "reward.previous")["run_id"] == run_id


@pytest.mark.parametrize(
    ("allow", "words"),
    [
        (["train.seed"], r"begin with a stage's name \(sft, reward, dpo\), as in sft\.train\.learning_rate"),
        (["reward"], "begin with a stage's name"),
        (
            ["reward.train.seed"],
            r"--allow-change reward\.train\.seed: that didn't change in .*/reward; what did:\n  reward\.train\.weight",
        ),
    ],
)
def test_a_key_that_no_stage_has_is_refused(
    allow: list[str],
    words: str,
    chain: Path,
    ran: list[str],
) -> None:
    run_pipeline(chain)
    leave_unfinished(chain, "reward")
    with pytest.raises((RecipeError, ChangedRunError), match=words):
        run_pipeline(chain, CHANGE, allow_change=allow)
    with pytest.raises(RecipeError, match="give one of the two"):
        run_pipeline(chain, CHANGE, allow_change=ALLOW, force=True)


def test_the_processes_of_a_launch_are_those_of_its_configuration(chain: Path, ran: list[str]) -> None:
    run_pipeline(chain)
    leave_unfinished(chain, "reward", world_size=1)
    config = chain.parent / "two.yaml"
    config.write_text("distributed_type: MULTI_GPU\nnum_processes: 2\n")
    with pytest.raises(ChangedRunError, match=r"reward: processes: 1 → 2"):
        run_pipeline(chain, accelerate_config=config)


def test_side_by_side_a_stage_goes_on_under_a_change(processes: Path) -> None:
    run_pipeline(processes, jobs=2)
    run_id = leave_unfinished(processes, "reward")
    with pytest.raises(ChangedRunError):
        run_pipeline(processes, CHANGE, jobs=2)
    assert statuses(run_pipeline(processes, CHANGE, jobs=2, allow_change=ALLOW)) == ["skipped", "resumed", "skipped"]
    assert read_run_file(processes.parent / "runs" / "reward")["run_id"] == run_id
