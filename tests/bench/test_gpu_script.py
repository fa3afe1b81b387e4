"""bench/gpu.py on a CPU with tiny models: the code that a GPU runs, its plan, its arithmetic and its checks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forked import LIMIT_S, start

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import gpu  # noqa: E402 - scripts run by path, no package
from gpu_work import LEVERS, QUICK, SIZES, WORKS, Size, draw_lengths, plan, training_flops  # noqa: E402

ALL = {"trl", "liger_kernel", "bitsandbytes"}


def run_script(*words: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, str(BENCH / "gpu.py"), "--device", "cpu", "--quick", *words],
        capture_output=True,
        text=True,
        env=dict(os.environ) | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    return done.returncode, done.stdout


def measure_arm(words: list[str]) -> None:
    import gpu_arm

    sys.argv = ["gpu_arm.py", *words]
    gpu_arm.main()


def run_forked(words: list[str], folder: Path) -> dict[str, Any]:
    """As gpu.run_process, in a process that need not import torch again."""
    printed = folder / f"arm{len(list(folder.iterdir()))}.txt"
    process = start(measure_arm, words, printed=printed)
    process.join(LIMIT_S)
    assert process.exitcode == 0, printed.read_text("utf-8")
    lines = printed.read_text("utf-8").splitlines()
    return next(json.loads(line) for line in lines if line.startswith('{"'))  # others are what TRL logs


@pytest.mark.slow
def test_one_command_measures_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.jsonl"
    settings = ("--only", "sft-tiny,dpo-tiny", "--arms", "chatalign,trl tuned", "--out", str(out))
    alone, ran = gpu.run_process, []

    def run_process(words: list[str], limit_s: float) -> dict[str, Any]:
        ran.append(words)
        return alone(words, limit_s) if len(ran) <= 2 else run_forked(words, tmp_path)  # the ceilings and one arm

    monkeypatch.setattr(gpu, "run_process", run_process)
    status = gpu.main(["--device", "cpu", "--quick", *settings])
    text = capsys.readouterr().out
    assert len(ran) == 5
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    arms = {(line["work"], line["arm"]): line for line in lines if "work" in line}
    assert len(arms) == 4
    assert not [line["error"] for line in lines if "error" in line]
    for line in arms.values():
        assert line["per_s"] > 0
        assert line["probe_grad_norm"] > 0
    assert status == 0, text  # the arms' losses and gradients agree
    for work in ("sft-tiny", "dpo-tiny"):
        ours, trl = arms[work, "chatalign"], arms[work, "trl tuned, sdpa"]
        assert ours["probe_loss"] == pytest.approx(trl["probe_loss"], rel=1e-5)
        assert ours["probe_grad_norm"] == pytest.approx(trl["probe_grad_norm"], rel=1e-4)
        assert f"### {work}: " in text
    assert arms["sft-tiny", "chatalign"]["items"] == arms["sft-tiny", "trl tuned, sdpa"]["items"]

    status, again = run_script(*settings)
    assert (status, again) == (0, text)
    assert len(out.read_text().splitlines()) == len(lines)


def test_a_spent_budget_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(gpu, "run_process", lambda words, limit_s: started.append(words) or {"gemm_tflops": 1.0})
    out = tmp_path / "out.jsonl"
    gpu.run_all(gpu.arguments(["--device", "cpu", "--quick", "--budget-s", "5", "--out", str(out)]))
    assert started == [["--ceilings", "cpu"]]


def test_what_was_measured_before_a_failure_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([{"gemm_tflops": 1.0}, {"error": "out of memory"}, {"per_s": 2.0}])
    monkeypatch.setattr(gpu, "run_process", lambda words, limit_s: next(answers))
    out = tmp_path / "out.jsonl"
    words = ["--device", "cpu", "--quick", "--only", "sft,dpo", "--arms", "chatalign", "--out", str(out)]
    gpu.run_all(gpu.arguments(words))
    results = gpu.read(out, "cpu")
    assert [r.get("error") or r.get("per_s") for r in results[1:]] == ["out of memory", 2.0]
    monkeypatch.setattr(gpu, "run_process", lambda words, limit_s: {"per_s": 3.0})
    gpu.run_all(gpu.arguments(words))  # the failed arm alone runs again
    assert [r["work"] for r in gpu.read(out, "cpu")[3:]] == ["sft-tiny"]


def test_the_headline_comes_before_the_levers() -> None:
    order = [(work.name, arm.name) for work, arm in plan(WORKS, device="cuda", installed=ALL)]
    assert order[:2] == [("sft-1.2B-chat", "chatalign"), ("sft-1.2B-chat", "trl tuned, sdpa")]
    assert len(order) == len(set(order))
    first_lever = next(i for i, (_, arm) in enumerate(order) if arm in {lever.name for lever in LEVERS})
    assert {work for work, arm in order[:first_lever] if arm == "chatalign"} == set(WORKS)
    assert {arm for _, arm in order} >= {lever.name for lever in LEVERS}


def test_arms_that_cannot_run_are_left_out() -> None:
    on_cpu = plan(QUICK, device="cpu", installed={"trl"})
    assert not [arm.name for _, arm in on_cpu if arm.gpu_only or arm.needs]
    assert "qlora" not in {work.tuning for work, _ in on_cpu}
    assert {arm.engine for _, arm in plan(QUICK, device="cpu", installed=set())} == {"chatalign"}


def test_flops_by_hand() -> None:
    # One layer: q 8×8, k and v 8×4 each, o 8×8, MLP 3 × 8 × 10; output layer 8 × 20.
    size = Size(hidden=8, layers=1, heads=2, kv_heads=1, head_dim=4, intermediate=10, vocabulary=20)
    weights = 64 + 2 * 32 + 64 + 240 + 160
    assert size.matmul_parameters == weights
    assert training_flops(size, [3, 2], full=True) == 6 * weights * 5 + 6 * 1 * 8 * (9 + 4)
    assert training_flops(size, [1], full=False) == 4 * weights + 6 * 8


@pytest.mark.parametrize(("name", "billions"), [("0.5B", 0.494), ("1.2B", 1.236), ("3.2B", 3.213), ("8B", 7.505)])
def test_sizes_are_what_they_are_called(name: str, billions: float) -> None:
    assert SIZES[name].matmul_parameters / 1e9 == pytest.approx(billions, abs=0.002)


def test_lengths_have_their_mean() -> None:
    lengths = draw_lengths("chat", 4000, 100_000, seed=0)
    assert sum(lengths) / 4000 == pytest.approx(850, rel=0.05)
    assert max(draw_lengths("chat", 4000, 2048, seed=0)) == 2048
    assert set(draw_lengths("4k", 3, 4096, seed=0)) == {4096}


def test_arms_that_compute_something_else_are_named() -> None:
    def arm(loss: float, norm: float) -> list[dict[str, Any]]:
        return [{"probe_loss": loss, "probe_grad_norm": norm, "per_s": 1.0}]

    arms = {"chatalign": arm(2.0, 1.0), "same": arm(2.000001, 1.00001), "loss": arm(2.1, 1.0), "norm": arm(2.0, 0.9)}
    assert [name.split(" ")[0] for name in gpu.apart(arms, half=False)] == ["loss", "norm"]
    assert [name.split(" ")[0] for name in gpu.apart(arms, half=True)] == ["loss", "norm"]
    assert gpu.apart({"chatalign": arm(2.0, 1.0), "bf16": arm(2.002, 1.03)}, half=True) == []
