"""kill -9 all through sft → reward → dpo → ppo: the same command goes on, and the end is bit for bit the same."""

from __future__ import annotations

import json
import random
import signal
from itertools import zip_longest
from pathlib import Path

import pytest

from chatalign.artifact import Artifact
from faults.chains import KILLS, OTHERS, SAVE_EVERY, SHIPPED, Chain, same_end
from faults.killed_chain import Kill, Point

ROUNDS = 1 if KILLS < 100 else None  # of kills at the boundaries of files, for each stage; None: all that there are


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The chain without a fault."""
    chain = Chain(tmp_path_factory.mktemp("whole") / "chain", SHIPPED)
    assert chain.start() == 0
    return chain


def killed(chain: Chain, kill: Kill, seen: dict[str, Artifact], only: list[str] | None = None) -> bool:
    """Start it, to be killed: no finished stage runs again, and no more is lost than the steps since a save.

    False where it came to its end first.
    """
    code = chain.start(kill, only=only)
    assert code in (0, -signal.SIGKILL)
    done = chain.finished()
    for name, artifact in seen.items():
        assert done[name].run_id == artifact.run_id, f"{name} was finished and ran again"
    assert chain.lost_steps() <= SAVE_EVERY
    seen |= done
    return code != 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_random_points_the_chain_ends_the_same(tmp_path: Path, whole: Chain) -> None:
    """Chains of ten kills each, or as many as there is room for; each within a sixth of a chain after a start."""
    kills = number = 0
    while kills < KILLS:
        chain, draw = Chain(tmp_path / f"chain{number}", SHIPPED), random.Random(number)
        seen: dict[str, Artifact] = {}
        for _ in range(min(10, KILLS - kills)):
            if not killed(chain, Kill(draw.randrange(1, len(whole.points) // 6)), seen):
                break
            kills += 1
        assert chain.start() == 0
        same_end(chain, whole, SHIPPED)
        number += 1


def kills_in(points: list[Point], place: str) -> list[Kill]:
    """Every point of a place, and where a file is being written there, that file cut in half too."""
    found = []
    for number, point in enumerate((point for point in points if point.place == place), start=1):
        found.append(Kill(number, place))
        if point.writing:
            found.append(Kill(number, place, half=True))
    return found


def rounds(points: list[Point], stage: str) -> list[list[Kill]]:
    """Kills at every file boundary of a stage's opening, of two saves that take an older one away, and of its end.

    A round has one of each, in the order in which a run meets them, as long as there are some left.
    """
    parts = [kills_in(points, f"{stage} {part}") for part in ("open", "save 4", "save 6", "finish")]
    assert all(parts) or stage == "eval"  # which saves nothing: all of it is the opening
    return [[kill for kill in kills if kill is not None] for kills in zip_longest(*parts)]


def killed_in_rounds(whole: Chain, stage: str, folder: Path, count: int | None) -> None:
    """The stage, begun anew in each of so many rounds, or all, and killed in it, ends as the one that never was."""
    every = rounds(whole.points, stage)
    full = [kills for kills in every if len(kills) == len(every[0])]
    drawn = every if count is None else random.Random(stage).sample(full, count)
    for number, kills in enumerate(drawn):
        chain = whole.beside(folder / f"round{number}", stage)
        seen = chain.finished()
        for kill in kills:
            assert killed(chain, kill, seen, only=[stage]), f"it ended before {kill}"
        assert chain.start(only=[stage]) == 0
        same_end(chain, whole, [*seen, stage])


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("stage", SHIPPED)
def test_killed_at_every_file_boundary_a_stage_ends_the_same(stage: str, tmp_path: Path, whole: Chain) -> None:
    killed_in_rounds(whole, stage, tmp_path, ROUNDS)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The stages that the chain hasn't, each in a process of its own, without a fault."""
    folder = tmp_path_factory.mktemp("others")
    texts = [{"text": f"{number} and {number} are {2 * number}. " * 8} for number in range(48)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    pretrain = OTHERS["pretrain"]["overrides"] | {"data.datasets.0.path": str(folder / "texts.jsonl")}
    chain = Chain(folder / "chain", OTHERS | {"pretrain": OTHERS["pretrain"] | {"overrides": pretrain}})
    assert [chain.start(only=[stage]) for stage in OTHERS] == [0] * len(OTHERS)
    return chain


@pytest.mark.slow
@pytest.mark.skipif(KILLS < 100, reason="`make faults` has it: each start imports TRL")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", OTHERS)
def test_other_stages_are_killed_at_every_file_boundary(stage: str, tmp_path: Path, others: Chain) -> None:
    """Weights trained from nothing, KTO, ``engine: trl`` and an evaluation."""
    killed_in_rounds(others, stage, tmp_path, 4)
