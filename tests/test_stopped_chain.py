"""A chain whose stages are processes: a signal reaches each of them, and one that stops by itself costs no other."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import STAND_IN, chain, processes  # noqa: F401  # fixtures

import chatalign.pipeline as pipeline_module
from chatalign.errors import Interrupted, StageStopped
from chatalign.pipeline import run_pipeline

# Both stages that need sft end as the test says: by a signal that the chain got, or by themselves.
STOPPED = STAND_IN.replace("import os, sys, time", "import os, signal, sys, time").replace(
    "if recipe.stage == os.environ.get",
    """
from chatalign.errors import StageStopped
from chatalign.launch import guarded
sent = os.environ.get("SENT")
if sent and recipe.stage != "sft":
    if recipe.stage == os.environ["SENDER"]:
        os.kill(int(os.environ["CHAIN"]), int(sent))
    signal.sigtimedwait([int(sent)], 60) or sys.exit("chatalign: no signal came")
    (place / "saved").touch()
    sys.exit(130)
def stop():
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
