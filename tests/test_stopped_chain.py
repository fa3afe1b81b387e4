"""A chain whose stages are processes: a signal reaches each of them, and one that stops by itself costs no other."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_pipeline import STAND_IN, chain, processes, ran  # noqa: F401  # fixtures

import chatalign.pipeline as pipeline_module
from chatalign import checkpoint
from chatalign.artifact import Artifact
from chatalign.data.rows import BadRow
from chatalign.errors import ChatalignError, DependencyError, HubError, Interrupted, StageStopped
from chatalign.metrics_file import METRICS_FILE
from chatalign.pipeline import run_pipeline
from chatalign.recipe import Recipe
from chatalign.runs import open_run
from chatalign.side_by_side import Progress

# Both stages that need sft end as the test says: by a signal that the chain got, or by themselves.
STOPPED = STAND_IN.replace("import os, sys, time", "import os, signal, sys, time").replace(
    "if recipe.stage == os.environ.get",
    """
from chatalign.errors import StageStopped
from chatalign.engine.signals import note_saved
from chatalign.launch import guarded
sent = os.environ.get("SENT")
if sent and recipe.stage != "sft":
    if recipe.stage == os.environ["SENDER"]:
        os.kill(int(os.environ["CHAIN"]), int(sent))
    signal.sigtimedwait([int(sent)], 60) or sys.exit("chatalign: no signal came")
    (place / "saved").touch()
    sys.exit(130)
def stop():
    note_saved()
    raise StageStopped("saved at step 3")
if recipe.stage == os.environ.get("STOPS"):
    sys.exit(guarded(stop))
if recipe.stage == os.environ.get("DIES"):
    os.kill(os.getpid(), signal.SIGUSR1)
if recipe.stage == os.environ.get""",
)
STOPPED = STOPPED.replace(
    "recipe = load",
    "signal.pthread_sigmask(signal.SIG_BLOCK, [int(os.environ.get('SENT', signal.SIGUSR2))])\nrecipe = load",
    1,
)
# Like accelerate's: a session for each process, and 1 for any status of theirs.
LAUNCHER = """
import os, signal, subprocess, sys
from pathlib import Path
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda *_: Path(os.environ["LAUNCHER_SIGNALLED"]).touch())
module, recipe = sys.argv[sys.argv.index("-m") + 1 :]
sys.exit(subprocess.run([sys.executable, "-m", module, recipe], start_new_session=True).returncode != 0)
"""


@pytest.fixture
def stopped(processes: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """The chain in the folder where its launcher would be found."""
    folder = processes.parent
    (folder / "stand_in.py").write_text(STOPPED)
    (folder / "accelerate" / "commands").mkdir(parents=True)
    for name, text in {"__init__.py": "", "commands/__init__.py": "", "commands/launch.py": LAUNCHER}.items():
        (folder / "accelerate" / name).write_text(text)
    monkeypatch.setenv("LAUNCHER_SIGNALLED", str(folder / "launcher-signalled"))
    monkeypatch.setenv("CHAIN", str(os.getpid()))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    return processes


@pytest.mark.parametrize(
    "error",
    [BadRow("chosen", "is empty", "fill it"), DependencyError("no trl"), HubError("down"), Interrupted("saved")],
)
def test_an_error_of_any_kind_is_raised_with_the_name_of_its_stage(error: ChatalignError) -> None:
    progress = Progress({"sft": None, "dpo": None, "ppo": None}, {"sft": set(), "dpo": set(), "ppo": {"sft"}})  # type: ignore[dict-item]
    progress.failed("sft", error)
    assert progress.blocked("ppo")
    progress.statuses["dpo"] = "ran"
    with pytest.raises(type(error)) as raised:
        progress.raise_failure()
    assert str(raised.value) == f"stage sft: {error}; left out: ppo"
    assert vars(raised.value) == vars(error)


def test_a_failure_outweighs_a_stop() -> None:
    progress = Progress({"sft": None, "dpo": None}, {"sft": set(), "dpo": set()})  # type: ignore[dict-item]
    progress.failed("sft", StageStopped("saved"))
    progress.failed("dpo", ChatalignError("wrong"))
    assert progress.statuses == {"sft": "interrupted", "dpo": "failed"}
    with pytest.raises(ChatalignError, match=r"^stage dpo: wrong \(sft interrupted too\)$"):
        progress.raise_failure()


def test_in_one_process_a_stage_whose_time_is_over_leaves_the_others_running(
    chain: Path,  # noqa: F811
    ran: list[str],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = pipeline_module.run_stage

    def out_of_time(recipe: Recipe) -> Artifact:
        if recipe.stage == "reward":
            open_run(recipe)
            raise StageStopped("`train.max_hours: 1` are over: saved at step 3")
        return whole(recipe)

    monkeypatch.setattr(pipeline_module, "run_stage", out_of_time)
    with pytest.raises(StageStopped, match=r"stage reward: .*saved at step 3$"):
        run_pipeline(chain)
    assert ran == ["sft", "dpo"]
    monkeypatch.setattr(pipeline_module, "run_stage", whole)
    assert [row["status"] for row in run_pipeline(chain)["stages"]] == ["skipped", "resumed", "skipped"]


HOW: dict[str, dict[str, Any]] = {"side by side": {"jobs": 2}, "launched": {"accelerate_config": "any.yaml"}}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("how", HOW)
def test_a_signal_reaches_every_stage_that_runs(
    how: str, number: signal.Signals, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SENT", str(int(number)))
    both = how == "side by side"
    monkeypatch.setenv("SENDER", "dpo" if both else "reward")
    monkeypatch.setenv("WAITS", "for each other" if both else "")
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="the same command goes on") as raised:
        run_pipeline(stopped, **HOW[how])
    assert type(raised.value) is Interrupted
    runs = stopped.parent / "runs"
    assert (runs / "reward" / "saved").exists()
    assert (runs / "dpo" / "saved").exists() == both  # in turn, the next one is not begun
    assert not (stopped.parent / "launcher-signalled").exists()
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(
    ("how", "variable", "words"),
    [
        ("side by side", "STOPS", "saved at step 3 (all of it in "),
        ("side by side", "DIES", "ended by SIGUSR1 (all of it in "),
        ("launched", "STOPS", "stopped and saved, see above"),
    ],
)
def test_a_stage_that_stops_by_itself_leaves_the_others_running(
    how: str, variable: str, words: str, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "reward")
    summaries: list[dict[str, Any]] = []
    monkeypatch.setattr(
        pipeline_module, "report_pipeline", lambda folder, summary, *, changed: summaries.append(summary)
    )
    with pytest.raises(StageStopped) as raised:
        run_pipeline(stopped, **HOW[how])
    assert words in str(raised.value)
    assert [row["status"] for row in summaries[0]["stages"]] == ["ran", "interrupted", "ran"]
    monkeypatch.delenv(variable)
    again = run_pipeline(stopped, **HOW[how])
    assert [row["status"] for row in again["stages"]] == ["skipped", "resumed", "skipped"]


@pytest.mark.slow
def test_a_signal_to_a_chain_stops_two_processes_of_accelerates(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing stands in here: what accelerate starts is found, signalled and waited for, and saves."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps({'prompt': 'hello', 'completion': 'thank you'})}\n" * 8)
    recipe = {
        "stage": "sft",
        "output_dir": "unused",
        "model": {"name_or_path": str(tiny_model_folder)},
        "data": {"datasets": [{"path": str(tmp_path / "rows.jsonl")}], "packing": False},
        "train": {"max_steps": 100_000, "logging_steps": 1, "save_strategy": "no", "use_cpu": True},
    }
    launch = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "num_processes": 2}
    launch |= {"main_process_port": 0, "rdzv_backend": "c10d", "gpu_ids": "all"}
    pipeline = {"pipeline": "p", "output_dir": str(tmp_path / "runs"), "stages": {"sft": {"recipe": "sft.yaml"}}}
    for name, content in (("sft", recipe), ("launch", launch), ("pipeline", pipeline)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    run = tmp_path / "runs" / "sft"

    def send() -> None:
        deadline = time.monotonic() + 300
        while not (run / METRICS_FILE).exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        if (run / METRICS_FILE).exists():
            os.kill(os.getpid(), signal.SIGUSR1)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    with pytest.raises(Interrupted, match="the same command goes on"):
        run_pipeline(tmp_path / "pipeline.yaml", accelerate_config=tmp_path / "launch.yaml")
    sender.join()
    (saved,) = checkpoint.list_checkpoints(run / "checkpoints")
    assert checkpoint.read_manifest(saved)["files"]
    assert sorted(path.name for path in saved.glob("rng_state*")) == ["rng_state_0.pth", "rng_state_1.pth"]
