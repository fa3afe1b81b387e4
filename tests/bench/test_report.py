"""What bench/run.py and bench/report.py say of results: parity, ratios within a turn, the best peer arm."""

import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import report  # noqa: E402 - scripts run by path, no package
import run  # noqa: E402
import startup  # noqa: E402


def result(arm: str, speed: float, *, repeat: int = 0, loss: float = 2.0, memory: float = 100.0) -> dict:
    dtype = arm.rsplit("-", 1)[1]
    return {
        "arm": arm,
        "work": "sft",
        "model": "7M",
        "dtype": dtype,
        "repeat": repeat,
        "items_per_cpu_s": speed,
        "peak_mb": memory,
        "probe_loss": loss,
        "probe_grad_norm": 1.0,
        "rows": "made",
        "versions": {"torch": "2.13.0"},
    }


def test_ratios_are_taken_within_a_turn():
    ours = [result("chatalign-default-float32", 30, repeat=0), result("chatalign-default-float32", 10, repeat=1)]
    theirs = [result("trl-tuned-float32", 10, repeat=0), result("trl-tuned-float32", 5, repeat=1)]
    assert report.ratios(ours, theirs) == [3.0, 2.0]
    assert report.spread([3.0, 2.0]) == "2.50 (2.00–3.00)"


def test_the_best_peer_is_the_fastest_and_never_the_floor_or_us():
    results = [
        result("chatalign-default-float32", 50),
        result("floor-default-float32", 40),
        result("trl-tuned-bfloat16", 20),
        result("llamafactory-tuned-float32", 25),
    ]
    arms = report.by_arm(results)
    assert report.best(arms) == ("chatalign-default-float32", "llamafactory-tuned-float32")
    row = report.training_tables(results)[2]
    assert "| 2.00 (2.00–2.00) × | ≥ 1.3, 1.6 | 1.25 (1.25–1.25) | 1.00 | ≤ 0.8 | all but memory |" in row
    results[0] |= {"items_per_cpu_s": 30, "peak_mb": 80}
    assert "| 0.75 (0.75–0.75) | 0.80 | ≤ 0.8 | all but speed and floor |" in report.training_tables(results)[2]


def test_a_peer_that_ran_in_quiet_turns_alone_is_not_the_fastest_for_it():
    results = [
        *(result("chatalign-default-float32", 50 * (1 + turn), repeat=turn) for turn in range(2)),
        *(result("llamafactory-tuned-float32", 25 * (1 + turn), repeat=turn) for turn in range(2)),
        result("trl-tuned-float32", 40, repeat=1),
    ]
    arms = report.by_arm(results)
    assert report.speed(arms["trl-tuned-float32"]) > report.speed(arms["llamafactory-tuned-float32"])
    assert report.best(arms) == ("chatalign-default-float32", "llamafactory-tuned-float32")


def test_runs_in_turn_say_more_than_runs_alone():
    ours = [result("chatalign-float32", 20), result("chatalign-float32", 30) | {"in_turn": True}]
    theirs = [result("trl-float32", 5), result("trl-float32", 10) | {"in_turn": True}]
    alone = [result("ms-swift-float32", 19)]
    assert report.ratios(ours, theirs) == [3.0]
    assert report.ratios(ours, alone) == [20 / 19]
    assert report.speed(ours) == 30
    arms = {"chatalign-float32": ours, "trl-float32": theirs, "ms-swift-float32": alone}
    assert report.nearest(arms) == ("chatalign-float32", ["trl-float32", "ms-swift-float32"])


def arms_named(*names: str) -> list[run.Arm]:
    scripts = [name.split("-") for name in names]
    return [run.Arm(f"{who}_arm", None if who == "chatalign" else who, how, dtype) for who, how, dtype in scripts]


def test_what_steps_in_turn_is_what_led_alone():
    speeds = {
        "chatalign-default-float32": 50,
        "chatalign-tuned-float32": 60,
        "chatalign-tuned-bfloat16": 20,
        "trl-tuned-float32": 20,
        "llamafactory-tuned-float32": 40,
        "axolotl-tuned-float32": 10,
        "torchtune-tuned-float32": 70,
        "floor-default-float32": 30,
    }
    results = [result(name, speed) for name, speed in speeds.items()]
    results[-2]["probe_loss"] = 1.0
    leading = run.leading("sft", arms_named(*speeds), results)
    assert [[arm.name for arm in arms] for arms in leading] == [
        ["chatalign-default-float32", "chatalign-tuned-float32"],
        ["llamafactory-tuned-float32"],
        ["floor-default-float32"],
        ["trl-tuned-float32"],
    ]
    few = arms_named("chatalign-tuned-float32", "trl-tuned-float32")
    assert run.leading("dpo-short", few, results) == [few]  # of which none ran alone


def test_what_would_not_fit_into_memory_does_not_step_in_turn(capsys):
    arms = arms_named("chatalign-default-float32", "trl-tuned-float32", "axolotl-tuned-float32")
    jobs = [run.Turn(0, "sft", arm) for arm in arms]
    results = [result(arm.name, 1, memory=memory) for arm, memory in zip(arms, (1, 1e9, 1), strict=True)]
    assert run.fitting(jobs, results) == jobs[:1]
    assert "sft trl-tuned-float32: not in turn" in capsys.readouterr().out
    assert run.fitting(jobs, results[:1]) == jobs


def test_lora_is_held_against_our_own_full_fine_tuning():
    results = [
        result("chatalign-default-float32", 20),
        result("chatalign-default-float32", 30) | {"work": "sft-lora"},
        result("trl-tuned-float32", 20) | {"work": "sft-lora"},
    ]
    assert "| 7M | chatalign-default-float32 | 1.50 (1.50–1.50) × | ≥ 1.3, 1.5 |" in report.training_tables(results)


def started(bench_name: str, arm: str, metric: str, *values: float) -> list[dict]:
    return [{"bench": f"startup/{bench_name}", "arm": arm, "metric": metric, "value": value} for value in values]


def test_starting_is_held_to_its_bars():
    lines = report.startup_table(
        [
            *started("light", "python -c pass", "wall_s", 0.01),
            *started("light", "chatalign --help", "wall_s", 0.1, 0.2),
            *started("light", "chatalign --help", "cpu_s", 9.0),
            *started("first-step", "chatalign sft", "wall_s", 4, 7),
            *started("first-step", "trl sft", "wall_s", 10, 10),
            *started("chain", "quickstart", "overhead_s", 16),
        ]
    )
    assert lines[2:] == [
        "| chatalign --help | 0.15 (0.10–0.20) s | ≤ 0.3, 0.15 | yes |",
        "| quickstart: beside its loops | 16.00 (16.00–16.00) s | ≤ 15, 8 | no |",
        "| start to first step, over `trl sft` | 0.55 (0.40–0.70) × | ≤ 0.6, 0.4 | yes |",
        "",
    ]


def prepared(arm: str, metric: str, *values: float, **more: object) -> list[dict]:
    line = {"bench": "data_prep", "arm": arm, "metric": metric, "rows": 10, "fresh": False}
    return [line | {"value": value} | more for value in values]


def test_data_preparation_says_whether_it_passes():
    lines = report.data_tables(
        [
            *prepared("chatalign-4", "wall_tokens_per_s", 70, 20),
            *prepared("trl-4", "wall_tokens_per_s", 5, 5),
            *prepared("trl-packed-4", "wall_tokens_per_s", 20, 10),
            *prepared("tokenizer-4", "wall_tokens_per_s", 900, 900),
            *prepared("chatalign", "cpu_tokens_per_s", 40),
            *prepared("chatalign", "cpu_tokens_per_s", 9000, fresh=True),
            *prepared("chatalign-messages", "cpu_tokens_per_s", 50),
            *prepared("trl", "cpu_tokens_per_s", 10),
            *prepared("tokenizer", "pairs_tokens_per_s", 10),
        ]
    )
    assert lines[2:4] == [
        "| rows, a core | chatalign / trl | 4.00 (4.00–4.00) × | ≥ 2.0, 4.0 | yes |",
        "| rows, a core | chatalign-messages / trl | 5.00 (5.00–5.00) × | ≥ 2.0, 4.0 | yes |",
    ]
    assert lines[4].endswith("| chatalign-4 / trl-packed-4 | 2.75 (2.00–3.50) × | ≥ 3.0, 4.0 | no |")
    assert lines[5] == ""  # pairs: nobody to hold against anybody
    assert "| rows, 4 workers by the clock | chatalign-4 | 45 (20–70) | 2 |" in lines


def test_memory_is_flat_or_not():
    def memory(arm: str, few: float, many: float) -> list[dict]:
        return [*prepared(arm, "peak_mb", few), *prepared(arm, "peak_mb", many, rows=4000)]

    lines = report.data_tables([*memory("chatalign", 500, 540), *memory("trl", 500, 900)])
    assert lines[-4:] == [
        "| peak MB of | 10 rows | 4,000 rows | most / fewest | bar | passes |",
        "|---|---|---|---|---|---|",
        "| chatalign | 500 | 540 | 1.08 | ≤ 1.1 | yes |",
        "| trl | 500 | 900 | 1.80 | – | – |",
    ]
    assert report.data_tables(memory("chatalign", 500, 560))[-1].endswith("| 1.12 | ≤ 1.1 | no |")


@pytest.mark.parametrize(("off", "named"), [(5e-5, False), (2e-4, True)])
def test_an_arm_with_another_loss_is_named(off, named):
    results = [result("chatalign-default-float32", 1), result("trl-tuned-float32", 1, loss=2.0 + off)]
    found = run.unlike(results)
    assert list(found) == ["trl-tuned-float32"] * named
    assert all(f"loss {2 + off:.6f}, chatalign's 2.000000" in line for line in found.values())


def test_bf16_is_held_to_bf16():
    results = [
        result("chatalign-default-float32", 1),
        result("chatalign-default-bfloat16", 1, loss=2.001),
        result("trl-tuned-bfloat16", 1, loss=2.002),
        result("trl-default-bfloat16", 1, loss=2.01),
    ]
    assert list(run.unlike(results)) == ["trl-default-bfloat16"]


def test_an_arm_without_its_environment_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "VENVS", tmp_path)
    with pytest.raises(SystemExit, match=r"python bench/peers.py chatalign"):
        run.require_ours()
    (tmp_path / "chatalign").mkdir()
    (tmp_path / "chatalign/peer.json").write_text('{"versions": {"chatalign": "0.1.0"}}')
    (tmp_path / "trl").mkdir()
    (tmp_path / "trl/peer.json").write_text('{"reason": "no network"}')
    run.require_ours()
    arms = run.arms_of("sft")
    plain = {f"{who}-default-{dtype}" for who in ("chatalign", "floor") for dtype in ("float32", "bfloat16")}
    assert {arm.name for arm in arms} == plain | {"chatalign-tuned-bfloat16", "chatalign-tuned-float32"}
    assert {arm.python for arm in arms} == {tmp_path / "chatalign/bin/python"}


def test_start_up_is_measured_whole_unless_parts_are_named(capsys):
    assert startup.parsed([]).parts == ["light", "first-step", "chain"]
    assert startup.parsed(["chain", "--full"]).parts == ["chain"]
    with pytest.raises(SystemExit):
        startup.parsed(["chains"])
    assert "chains is no part; name any of light" in capsys.readouterr().err
