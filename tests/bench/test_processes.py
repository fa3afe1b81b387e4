"""Arms that step in turn: what each does while the others wait, and that one that fails leaves the others."""

import json
import sys
from itertools import groupby
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import harness  # noqa: E402 - scripts run by path, no package
import processes  # noqa: E402

STEPS = 2 * harness.SHARES
ARM = f"""
import os, signal, sys
sys.path.insert(0, {str(BENCH)!r})
import harness
name, steps, fails, log, out = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[6]
for step in range(steps):
    if fails == "dies waiting" and step == harness.WARM_STEPS:
        os.write(int(os.environ["BENCH_TURNS"].split()[0]), b".")
        os.kill(os.getpid(), signal.SIGKILL)
    harness.wait_for_turn(step, steps)
    if fails == "raises" and step == steps // 2:
        raise SystemExit("no such thing")
    with open(log, "a") as file:
        file.write(name + " " + str(step) + chr(10))
open(out, "w").write('{{"steps": ' + str(steps) + "}}")
"""


@pytest.fixture
def arm(tmp_path):
    def command(name: str, steps: int = STEPS, fails: str = "no") -> tuple[str, list[str]]:
        (tmp_path / "arm.py").write_text(ARM)
        return name, [sys.executable, str(tmp_path / "arm.py"), name, str(steps), fails, str(tmp_path / "log")]

    return command


def stepped(folder: Path) -> list[tuple[str, int]]:
    lines = [line.split() for line in (folder / "log").read_text().splitlines()]
    return [(name, int(step)) for name, step in lines]


def test_each_does_a_share_of_its_steps_while_the_others_wait(arm, tmp_path):
    warm = harness.WARM_STEPS
    steps = {"a": warm + 2 * harness.SHARES, "b": warm + 4 * harness.SHARES, "c": warm + harness.SHARES // 4}
    results = processes.in_turn([arm(name, count) for name, count in steps.items()], None)
    assert results == [{"steps": count, "arm": name} for name, count in steps.items()]
    done = stepped(tmp_path)
    assert [step for name, step in done if name == "a"] == list(range(steps["a"]))
    turns = [(name, len(list(steps))) for name, steps in groupby(done, key=lambda line: line[0])]
    assert turns[:3] == [("a", warm), ("b", warm), ("c", warm)]  # one after the other, to the first timed step
    in_turn = [turns[i : i + 9] for i in range(3, len(turns), 9)]
    # Four rounds of two steps of a and four of b, of which c takes one step in the first; and so on to the end.
    assert in_turn == [[("a", 2), ("b", 4), ("c", 1), *[("a", 2), ("b", 4)] * 3]] * (harness.SHARES // 4)


@pytest.mark.parametrize("fails", ["raises", "dies waiting"])
def test_one_that_fails_leaves_the_others(arm, fails, capsys):
    results = processes.in_turn([arm("a", fails=fails), arm("b")], None)
    assert results == [None, {"steps": STEPS, "arm": "b"}]
    said = {"raises": "no such thing", "dies waiting": "ended without a result"}[fails]
    assert f"  a: {said}" in capsys.readouterr().out


def test_an_arm_alone_waits_for_nobody(arm, tmp_path):
    name, command = arm("a")
    out = tmp_path / "a.json"
    assert processes.run_process([*command, "--out", str(out)], name, out, None) == {"steps": STEPS, "arm": "a"}
    assert json.loads(out.read_text()) == {"steps": STEPS}
