"""Short chains in folders of their own, started in processes that can be killed, and what holds after a kill."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from chatalign import checkpoint
from chatalign.artifact import Artifact, load_artifact
from chatalign.errors import ArtifactError
from chatalign.metrics_file import METRICS_FILE, read_metrics
from faults import killed_chain
from faults.killed_chain import PRELOADED, ROOT, Kill, Point

KILLS = int(os.environ.get("CHATALIGN_KILLS", "20"))  # `make faults` sets 100
SAVE_EVERY = 2
BASE = str(ROOT / "data/pocket/base")
TRAIN: dict[str, Any] = {
    "train.max_steps": 6,
    "train.save_steps": SAVE_EVERY,
    "train.save_total_limit": 1,  # so that the saves of steps 4 and 6 each take one away
    "train.logging_steps": 1,
    "train.per_device_train_batch_size": 2,
    "data.datasets.0.max_rows": 48,
    "lora": {"r": 4, "lora_alpha": 8},
    "tracking": "none",
}
PPO: dict[str, Any] = {
    "ppo.total_episodes": 24,
    "ppo.rollout_batch_size": 12,  # three steps, so that the saves of steps 2 and 4 hold a rollout
    "ppo.local_rollout_forward_batch_size": 12,
    "ppo.num_mini_batches": 3,
    "ppo.num_ppo_epochs": 1,
    "ppo.response_length": 6,
    "ppo.kl_control": "adaptive",
}


def stage(recipe: str, overrides: Mapping[str, Any], **inputs: Any) -> dict[str, Any]:
    """A stage of a pipeline recipe, of one of the shipped recipes."""
    return {"recipe": str(ROOT / recipe), **inputs, "overrides": dict(overrides)}


SHIPPED = {
    "sft": stage("recipes/pocket/sft.yaml", TRAIN, model=BASE),
    "reward": stage("recipes/pocket/reward.yaml", TRAIN, model="sft"),
    "dpo": stage("recipes/pocket/dpo.yaml", TRAIN, model="sft"),
    "ppo": stage(
        "recipes/pocket/ppo.yaml",
        {name: value for name, value in (TRAIN | PPO).items() if name != "train.max_steps"},
        model="sft",
        reward_model="reward",
    ),
}

WHOLE = {name: value for name, value in TRAIN.items() if name != "lora"}
# The other stages, and TRL's trainer and loaders in the place of ours.
OTHERS = {
    "pretrain": stage(
        "recipes/pocket/base.yaml",
        WHOLE | {"pretrained": None, "pretrained_sha256": None, "from_scratch": True, "data.datasets.0.path": ""},
    ),
    "kto": stage("recipes/kto.yaml", TRAIN | {"data.datasets.0.path": "data/pocket/feedback.jsonl"}, model=BASE),
    "trl": stage("recipes/pocket/sft.yaml", TRAIN | {"engine": "trl"}, model=BASE),
    "eval": stage(
        "recipes/pocket/eval.yaml",
        {"eval.baseline": "trl", "eval.prompts.max_rows": 8, "eval.max_new_tokens": 8, "eval.pairs": None},
        models=["kto", "trl"],
    ),
}


class Chain:
    """A pipeline's recipe and all that its runs leave, in one folder."""

    def __init__(self, folder: Path, stages: Mapping[str, Any]) -> None:
        self.folder, self.stages, self.runs = folder, stages, folder / "runs"
        self.points: list[Point] = []  # what the starts that were not to be killed did
        folder.mkdir(parents=True)
        raw = {"pipeline": "short", "output_dir": str(self.runs), "stages": dict(stages)}
        (folder / "chain.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))

    def beside(self, folder: Path, stage: str) -> Chain:
        """The same chain, with all done but this stage and those that need it."""
        chain = Chain(folder, self.stages)
        for name in list(self.stages)[: list(self.stages).index(stage)]:
            shutil.copytree(self.runs / name, chain.runs / name)
        return chain

    def start(self, kill: Kill | None = None, *, only: Collection[str] | None = None) -> int:
        """Run it; the exit code, -9 where it was killed."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        environment = {"HF_DATASETS_CACHE": str(self.folder / "cache"), "OMP_NUM_THREADS": "1"}
        points = self.folder.with_name(f"{self.folder.name}.points")
        arguments = (str(self.folder / "chain.yaml"), only, environment, kill, None if kill else str(points))
        process = context.Process(target=killed_chain.run, args=arguments)
        process.start()
        process.join(timeout=300)
        if process.exitcode is None:
            process.kill()
            raise AssertionError("the chain hangs")
        if process.exitcode == 0:
            self.points += [Point(**point) for point in json.loads(points.read_text())]
        return process.exitcode

    def logged(self, stage: str) -> list[tuple[int, float]]:
        """Step and loss of each line that a stage logged."""
        lines = read_metrics(self.runs / stage / METRICS_FILE)
        return [(line["step"], line["loss"]) for line in lines if "loss" in line]

    def finished(self) -> dict[str, Artifact]:
        """The artifacts of the stages that are done."""
        found = {}
        for name in self.stages:
            try:
                found[name] = load_artifact(self.runs / name)
            except ArtifactError:
                continue
        return found

    def lost_steps(self) -> int:
        """Steps that were logged in the stage at hand and lie beyond its newest checkpoint."""
        done = self.finished()
        at_hand = next((self.runs / name for name in self.stages if name not in done), None)
        if at_hand is None or not (at_hand / "run.json").is_file():
            return 0
        run_id = json.loads((at_hand / "run.json").read_text())["run_id"]
        newest = checkpoint.latest_valid(at_hand / "checkpoints", run_id)
        saved = 0 if newest is None else int(newest.name.rpartition("-")[2])
        return max([line["step"] for line in read_metrics(at_hand / METRICS_FILE)], default=0) - saved

    def files(self, under: str = "") -> set[str]:
        """Every file and folder below a part of the chain's folder, by its path in the chain's folder."""
        return {path.relative_to(self.folder).as_posix() for path in (self.folder / under).rglob("*")}


def same_end(chain: Chain, whole: Chain, stages: Collection[str]) -> None:
    """Weights and all else that was saved bit for bit, losses, and not a file more or less."""
    for name in stages:
        ours, theirs = chain.finished()[name], whole.finished()[name]
        assert ours.files == theirs.files, name
        assert any(file.endswith((".safetensors", ".json")) for file in ours.files)
        assert ours.metrics == theirs.metrics, name
        assert chain.logged(name) == whole.logged(name), name
        assert chain.files(f"runs/{name}") == whole.files(f"runs/{name}")
        latest = Path("runs", name, "checkpoints", checkpoint.LATEST)
        if (whole.folder / latest).exists():
            assert (chain.folder / latest).read_text() == (whole.folder / latest).read_text()
    assert chain.files() <= whole.files(), "a kill left something behind"
