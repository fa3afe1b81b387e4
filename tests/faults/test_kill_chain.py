"""kill -9 all through sft → reward → dpo → ppo: the same command goes on, and the end is bit for bit the same."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from chatalign import checkpoint
from chatalign.artifact import Artifact, load_artifact
from chatalign.errors import ArtifactError
from chatalign.metrics_file import METRICS_FILE, read_metrics
from faults import killed_chain
from faults.killed_chain import PRELOADED, ROOT

STAGES = ("sft", "reward", "dpo", "ppo")
SAVE_EVERY = 2
KILLS = int(os.environ.get("CHATALIGN_KILLS", "20"))  # `make faults` sets 100
TRAIN = {
    "train.max_steps": 6,
    "train.save_steps": SAVE_EVERY,
    "train.logging_steps": 1,
    "train.per_device_train_batch_size": 2,
    "data.datasets.0.max_rows": 48,
    "lora": {"r": 4, "lora_alpha": 8},
    "tracking": "none",
}
PPO = {
    "ppo.total_episodes": 24,
    "ppo.rollout_batch_size": 8,
    "ppo.local_rollout_forward_batch_size": 8,
    "ppo.num_mini_batches": 2,
    "ppo.num_ppo_epochs": 1,
    "ppo.response_length": 6,
    "ppo.kl_control": "adaptive",
}


class Chain:
    """A short chain of four stages in a folder of its own, started in processes that can be killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        base = str(ROOT / "data/pocket/base")
        inputs = {"sft": {"model": base}, "reward": {"model": "sft"}, "dpo": {"model": "sft"}}
        inputs["ppo"] = {"model": "sft", "reward_model": "reward"}
        stages = {
            name: {
                "recipe": str(ROOT / f"recipes/pocket/{name}.yaml"),
                **inputs[name],
                "overrides": {**TRAIN, **(PPO if name == "ppo" else {})},
            }
            for name in STAGES
        }
        del stages["ppo"]["overrides"]["train.max_steps"]
        raw = {"pipeline": "short", "output_dir": str(folder / "runs"), "stages": stages}
        self.recipe = folder / "chain.yaml"
        self.recipe.write_text(yaml.safe_dump(raw, sort_keys=False))

    def start(self, kill_at: int | None = None) -> int:
        """Run it; the exit code, -9 where it was killed at that point."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        environment = {"HF_DATASETS_CACHE": str(self.folder / "cache"), "OMP_NUM_THREADS": "1"}
        arguments = (str(self.recipe), {}, environment, kill_at, str(self.folder / "labels.json"))
        process = context.Process(target=killed_chain.run, args=arguments)
        process.start()
        process.join(timeout=300)
        assert process.exitcode is not None, "the chain hangs"
        return process.exitcode

    @property
    def points(self) -> list[str]:
        """What an uninterrupted run did, point by point."""
        return list(json.loads((self.folder / "labels.json").read_text()))

    def losses(self, stage: str) -> list[tuple[int, float]]:
        """Step and loss of each line that a stage logged."""
        lines = read_metrics(self.folder / "runs" / stage / METRICS_FILE)
        return [(line["step"], line["loss"]) for line in lines if "loss" in line]

    def finished(self) -> dict[str, Artifact]:
        """The artifacts of the stages that are done."""
        found = {}
        for name in STAGES:
            try:
                found[name] = load_artifact(self.folder / "runs" / name)
            except ArtifactError:
                continue
        return found

    def lost_steps(self) -> int:
        """Steps that were logged in the stage at hand and lie beyond its newest checkpoint."""
        done = self.finished()
        at_hand = next((self.folder / "runs" / name for name in STAGES if name not in done), None)
        if at_hand is None or not (at_hand / "run.json").is_file():
            return 0
        run_id = json.loads((at_hand / "run.json").read_text())["run_id"]
        newest = checkpoint.latest_valid(at_hand / "checkpoints", run_id)
        saved = 0 if newest is None else int(newest.name.rpartition("-")[2])
        return max([line["step"] for line in read_metrics(at_hand / METRICS_FILE)], default=0) - saved


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The chain without a fault."""
    chain = Chain(tmp_path_factory.mktemp("whole") / "chain")
    assert chain.start() == 0
    return chain


def same_end(chain: Chain, whole: Chain) -> None:
    for name in STAGES:
        ours, theirs = (load_file(c.folder / f"runs/{name}/model/adapter_model.safetensors") for c in (chain, whole))
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert ours[key].numpy().tobytes() == tensor.numpy().tobytes(), f"{name}: {key}"
        logged = [
            [
                (line["step"], line["loss"])
                for line in read_metrics(c.folder / "runs" / name / METRICS_FILE)
                if "loss" in line
            ]
            for c in (chain, whole)
        ]
        assert logged[0] == logged[1], name


def killed_through(chain: Chain, kills: int, draw: random.Random, reach: int) -> None:
    """Kill the chain `kills` times at points drawn at random, each at most `reach` after its start; then let it end."""
    seen: dict[str, Artifact] = {}
    for _ in range(kills):
        code = chain.start(draw.randrange(1, reach))
        done = chain.finished()
        for name, artifact in seen.items():
            assert done[name].run_id == artifact.run_id, f"{name} was finished and ran again"
        seen = done
        if code == 0:
            raise AssertionError("the chain ended before all kills: they come too late")
        assert code == -signal.SIGKILL
        assert chain.lost_steps() <= SAVE_EVERY
    assert chain.start() == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_random_points_the_chain_ends_the_same(tmp_path: Path, whole: Chain) -> None:
    """Chains of ten kills each; a kill falls anywhere within the third of a chain after its start."""
    for number in range(0, KILLS, 10):
        chain = Chain(tmp_path / f"chain{number}")
        killed_through(chain, min(10, KILLS - number), random.Random(number), len(whole.points) // 6)
        same_end(chain, whole)
