"""What bench/run_ppo.py and bench/ppo_report.py say of results: parity, the bars, the floor's arithmetic."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import ppo_harness  # noqa: E402 - scripts run by path, no package
import ppo_report  # noqa: E402
import run_ppo  # noqa: E402


def result(arm: str, speed: float, *, work: str = "equal", repeat: int = 0, **more: Any) -> dict[str, Any]:
    line = {
        "bench": "ppo",
        "arm": arm,
        "work": work,
        "model": "7M",
        "dtype": arm.rsplit("-", 1)[1],
        "repeat": repeat,
        "items_per_cpu_s": speed,
        "replies_per_cpu_s": speed / 64,
        "peak_mb": 1000.0,
        "cpu_s": {"rollout": 2.0, "scoring": 4.0, "update": 40.0},
        "iterations": 2,
        "tokens": 2000,
        "prompt_tokens": 500,
        "first": {"kl": 0.0, "score": 1.0},
        "probe": {"scores": [1.0], "logps": [-2.0], "ref_logps": [-2.0], "values": [0.5]},
    }
    return line | more


def test_each_bar_is_held_against_trls_fastest_arm() -> None:
    results = [
        result("chatalign-default-bfloat16", 30, repeat=0),
        result("chatalign-default-bfloat16", 20, repeat=1),
        result("chatalign-default-float32", 5),
        result("trl-default-float32", 10, repeat=0),
        result("trl-default-float32", 20, repeat=1),
        result("trl-default-bfloat16", 9),
    ]
    line = ppo_report.section(results)[2]
    assert line == (
        "| equal | 7M | chatalign-default-bfloat16 / trl-default-float32 | 2.00 (1.00–3.00, n 2) × | 2.00 × | ≥ 1.5 "
        "| 1.00 | yes |"
    )


def test_lora_is_held_against_whole_models_where_those_are_faster() -> None:
    results = [
        result("chatalign-shared-bfloat16", 30, work="lora"),
        result("trl-peft-float32", 5, work="lora"),
        result("trl-default-float32", 10, work="unequal"),
        result("trl-default-float32", 100, work="equal"),
    ]
    line = next(line for line in ppo_report.section(results) if line.startswith("| lora | 7M | chat"))
    assert "chatalign-shared-bfloat16 / trl-default-float32 | 3.00 (3.00–3.00, n 1) ×" in line
    assert line.endswith("| no |")


def rollout(arm: str, speed: float, peak: float) -> dict[str, Any]:
    return result(arm, speed, work="rollout", bench="ppo-rollout", peak_mb=peak)


@pytest.mark.parametrize(("peak", "passes"), [(900, "yes"), (1100, "no")])
def test_a_rollout_is_faster_and_smaller_than_the_fastest_generate(peak: float, passes: str) -> None:
    results = [
        rollout("chatalign-float32", 35, peak),
        rollout("generate-float32", 10, 1000),
        rollout("generate-bfloat16", 7, 1000),
        rollout("static-float32", 12, 1000),
    ]
    lines = ppo_report.rollout_table(results, ["7M"])
    assert lines[2].startswith("| chatalign-float32 | 7M | 35 (35–35, n 1) | 3.50 (3.50–3.50, n 1) |")
    assert lines[2].endswith(f"| ≥ 3.0, less memory | {passes} |")
    assert lines[3].endswith("| 1000 | – | – |")


def test_memory_is_held_against_sft_in_the_same_precision() -> None:
    results = [
        result("chatalign-default-float32", 1, work="lora-equal", peak_mb=1300.0),
        result("chatalign-shared-bfloat16", 1, work="lora-equal", peak_mb=1500.0),
        {"bench": "ppo-memory", "model": "7M", "dtype": "float32", "peak_mb": 1000.0},
        {"bench": "ppo-memory", "model": "7M", "dtype": "bfloat16", "peak_mb": 1000.0},
    ]
    assert ppo_report.memory_table(results, ["7M"])[2:] == [
        "| chatalign-default-float32 | 7M | 1300 / 1000 | 1.30 | ≤ 1.35 | yes |",
        "| chatalign-shared-bfloat16 | 7M | 1500 / 1000 | 1.50 | ≤ 1.35 | no |",
    ]


FLOOR = {
    "bench": "ppo-floor",
    "model": "7M",
    "dtype": "bfloat16",
    "s_a_token": {"decode": 1e-3, "forward": 1e-4, "lora": 2e-4, "full": 3e-4},
}


@pytest.mark.parametrize(
    ("arm", "work", "update"),
    [
        ("trl-default-bfloat16", "equal", 2 * 3e-4),
        ("chatalign-default-bfloat16", "lora", 2 * 2e-4),
        ("chatalign-shared-bfloat16", "lora", 2e-4),
        ("trl-peft-bfloat16", "lora", 2 * 3e-4),
    ],
)
def test_the_floor_is_by_the_phases_tokens(arm: str, work: str, update: float) -> None:
    # A rollout has 500 prompt tokens and 1,000 of response; 4 epochs.
    found = ppo_report.floor_s(result(arm, 1, work=work), FLOOR)
    assert found == pytest.approx({"rollout": 0.05 + 1.0, "scoring": 3 * 0.15, "update": 4 * 1500 * update})


def test_shares_of_the_floor_are_shown_by_phase() -> None:
    results = [result("chatalign-default-bfloat16", 3), result("trl-default-bfloat16", 1), FLOOR]
    lines = ppo_report.phase_table(results, ["7M"])
    assert lines[2] == "| equal | 7M | chatalign-default-bfloat16 | 2.00 (52 %) | 4.00 (11 %) | 40.00 (9 %) |"


@pytest.mark.parametrize(
    ("name", "off", "named"), [("logps", 5e-5, False), ("logps", 2e-4, True), ("scores", 1e-3, True)]
)
def test_an_arm_that_computes_something_else_is_named(name: str, off: float, named: bool) -> None:
    ours, theirs = result("chatalign-default-float32", 1), result("trl-default-float32", 1)
    theirs["probe"] = theirs["probe"] | {name: [theirs["probe"][name][0] + off]}
    found = run_ppo.check_parity([ours, theirs])
    assert [line.split()[0] for line in found] == (["trl-default-float32"] if named else [])


def test_a_first_rollout_off_its_reference_is_named() -> None:
    found = run_ppo.check_parity([result("chatalign-default-float32", 1, first={"kl": 0.01, "score": 1.0})])
    assert found == ["chatalign-default-float32 on equal 7M: KL of the first rollout 0.01000"]


def test_slow_arms_stay_out_after_the_first_turn() -> None:
    done = [
        result("chatalign-default-bfloat16", 100),
        result("chatalign-default-float32", 80),
        result("trl-default-float32", 10),
        result("trl-default-bfloat16", 9),
    ]
    jobs = {name: run_ppo.Job("equal", run_ppo.run.Arm("x", peer, "default", dtype), 1) for name, peer, dtype in (
        ("ours", None, "bfloat16"), ("ours slow", None, "float32"), ("trl", "trl-ppo", "float32"),
        ("trl close", "trl-ppo", "bfloat16"),
    )}  # fmt: skip
    assert [name for name, job in jobs.items() if run_ppo.goes_on(job, done)] == ["ours", "trl", "trl close"]


def test_an_iteration_is_cut_into_phases_and_its_steps_counted() -> None:
    import torch

    clock = ppo_harness.Clock()
    clock.watch_optimizer()
    clock.enter("rollout")
    clock.drew([3, 5])
    clock.enter("update")
    weight = torch.nn.Parameter(torch.ones(2))
    (3 * weight).sum().backward()
    torch.optim.SGD([weight], lr=0.1).step()
    clock.end_iteration()
    first = clock.iterations[0]
    assert (first.replies, first.tokens, first.steps) == (2, 8, 1)
    assert clock.first_grad_norm == pytest.approx(18**0.5)
    assert set(first.cpu_s) == {"rollout", "update"}
