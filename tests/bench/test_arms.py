"""The arms that are ours in bench/, on tiny models: each says something, and those of one work say the same."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from forked import LIMIT_S, start

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import ppo_work  # noqa: E402 - scripts run by path, no package
import run  # noqa: E402
import run_ppo  # noqa: E402
import workload  # noqa: E402

pytestmark = pytest.mark.slow


def make_tiny(cache: Path) -> None:
    """Let all works be small ones, in a folder of the test's."""
    workload.CACHE, workload.SHARED = cache, cache / "made rows"
    workload.SIZES["3.4M"] = workload.Size(vocabulary=1024, hidden=64, layers=2, intermediate=96, tied=True)
    workload.SFT_ROWS = workload.PAIRS = 64
    ppo_work.PROMPTS = 8
    for other in ("7M", "25M"):
        workload.SIZES.pop(other, None)


def write_works(cache: Path) -> None:
    make_tiny(cache)
    for lengths in ("equal", "unequal"):
        ppo_work.make("3.4M", lengths)


def run_arm(cache: Path, command: list[str]) -> None:
    make_tiny(cache)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def finished(printed: Path, *target: Any) -> None:
    process = start(*target, printed=printed, environment={"OMP_NUM_THREADS": "1"})
    process.join(LIMIT_S)
    assert process.exitcode == 0, printed.read_text("utf-8")[-2000:]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("works")
    finished(folder / "printed.txt", write_works, folder)
    return folder


@pytest.fixture
def forked(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arms run on the tiny works, in processes that need not import torch again."""

    def run_process(command: list[str], name: str, out: Path, core: int | None) -> dict[str, Any]:
        finished(tmp_path / f"{name}.txt", run_arm, cache, command[1:])
        return json.loads(out.read_text()) | {"arm": name}

    monkeypatch.setattr(run, "run_process", run_process)
    monkeypatch.setattr(run, "installed", lambda arm: arm.peer is None)
    monkeypatch.setattr(workload, "CACHE", cache)


@pytest.mark.parametrize("work", ["sft", "sft-lora", "dpo-short", "reward-long"])
def test_training(forked: None, tmp_path: Path, work: str) -> None:
    arms = [arm for arm in run.arms_of(work, ("float32",)) if arm.variant == "default"]
    results = [run.run(arm, work, "3.4M", tmp_path / f"{arm.name}.json", None) for arm in arms]
    assert [r["arm"].split("-")[0] for r in results] == (["chatalign", "floor"] if "sft" in work else ["chatalign"])
    assert all(r["items_per_cpu_s"] > 0 and r["probe_grad_norm"] > 0 for r in results)
    assert run.unlike(results) == {}


@pytest.mark.parametrize("part", ["unequal", "lora", "rollout", "memory", "floor"])
def test_ppo(forked: None, tmp_path: Path, part: str) -> None:
    jobs = [job for job in run_ppo.jobs_of(part, ("float32",)) if not job.arm.peer and job.arm.variant != "continuous"]
    results = [run_ppo.run_job(job, "3.4M", tmp_path / f"{job.arm.variant}.json", None) for job in jobs]
    assert len(results) == len(jobs) >= 1
    measured = {"floor": lambda r: min(r["gflops"].values()), "memory": lambda r: r["peak_mb"]}
    assert all(measured.get(part, lambda r: r["items_per_cpu_s"])(result) > 0 for result in results)
    if part in run_ppo.WORKS:
        assert run_ppo.check_parity(results) == []
