"""sft → reward → dpo, ppo with another accumulation, packing and attention in every stage ends in the same losses.

The bar is derived. A stage's own steps may be 1e-5 off (`same_steps.BAR`), and what it starts from is off too. How much
that may matter is measured: the chain is run once more from SFT weights that are moved by 1e-5 of themselves at random,
and the last losses move by some r. A random direction of N weights meets the steepest one by 1/√N on average, so a
difference of d in the worst direction moves the losses, to first order, as d √N at random would: where d √N ≤ 1e-5,
by no more than r. The bar is 1e-5 + r. Residuals of a last stage need not have mean 0: what was inherited is the same
at every step.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from same_steps import BAR, LORA, Line, assert_same_steps, recipe_of, run, signed_residuals, write_rows
from test_invariance import follow, rows_of_bins
from torch import Tensor
from whole_row_attention import Kernel, eager, over_the_row, sdpa

from chatalign.engine import attention, batching, lm_trainer, trainer
from chatalign.engine.loss_head import sum_of_logprobs
from chatalign.recipe.load import merge

LAST = ("dpo", "ppo")
STAGES = ("sft", "reward", *LAST)
PACKED = {"packing": True, "max_length": 64}
# Bins of packed rows a step, pairs a step, replies a step: the same in both chains, cut otherwise.
ONE_WAY: dict[str, dict[str, Any]] = {
    "sft": {
        "data": PACKED,
        "train": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 4},
    },
    "reward": {},
    "dpo": {"train": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}},
    "ppo": {},
}
OTHERWISE: dict[str, dict[str, Any]] = {
    "sft": {"data": PACKED | {"packing": False}, "train": {"per_device_train_batch_size": 1, "max_steps": 4}},
    "reward": {"train": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}},
    "dpo": {},
    "ppo": {"train": {"per_device_train_batch_size": 1}},
}
KERNELS: dict[str, Kernel] = {"sft": eager, "reward": sdpa, "dpo": sdpa, "ppo": eager}
Patches = Mapping[str, Callable[[pytest.MonkeyPatch], None]]  # what is replaced while a stage runs


@dataclass
class Chain:
    """A chain's folder, and what each of its stages logged."""

    folder: Path
    steps: dict[str, list[Line]] = field(default_factory=dict)

    def weights(self, stage: str) -> dict[str, Tensor]:
        """What a stage saved."""
        return load_file(weights_file(self.folder / stage))


def weights_file(run_folder: Path) -> Path:
    (path,) = (run_folder / "model").glob("*.safetensors")
    return path


class Chains:
    """Runs chains in one folder, all from one base and the same rows."""

    def __init__(self, root: Path, base: Path, sft: Mapping[str, Any]) -> None:
        self.root, self.base, self.sft = root, base, sft
        (root / "rows").mkdir()
        self.rows = write_rows(root / "rows")

    def run(self, name: str, ways: Mapping[str, Any], patches: Patches, *, sft: Path | None = None) -> Chain:
        """Run a chain, or, from a model in the place of its SFT, the rest of one."""
        chain = Chain(self.root / name)
        start = sft or chain.folder / "sft"
        inputs: dict[str, dict[str, Any]] = {
            "sft": dict(self.sft),
            "reward": {"model": {"name_or_path": str(start)}},
            "dpo": {"model": {"name_or_path": str(start)}},
            # Its rewards are normalised: at the others' rate its values would grow without end.
            "ppo": {"model": {"name_or_path": str(start)}, "ppo": {"rewards": []}, "train": {"learning_rate": 1e-3}}
            | {"reward_model": {"name_or_path": str(chain.folder / "reward")}},
        }
        for stage in STAGES if sft is None else STAGES[1:]:
            over = merge(inputs[stage], ways[stage])
            recipe = recipe_of(stage, over, folder=chain.folder / stage, rows=self.rows, model=self.base)
            with pytest.MonkeyPatch.context() as patch:
                patches.get(stage, lambda _: None)(patch)
                chain.steps[stage] = run(recipe)
        return chain

    def moved(self, chain: Chain) -> Chain:
        """The rest of a chain from its SFT weights, each moved by 1e-5 of itself at random."""
        start = self.root / "moved-start"
        shutil.copytree(chain.folder / "sft", start)
        generator = torch.Generator().manual_seed(0)
        moved = {
            name: tensor * (1 + BAR * torch.randn(tensor.shape, generator=generator))
            for name, tensor in chain.weights("sft").items()
        }
        save_file(moved, weights_file(start), metadata={"format": "pt"})
        (start / "artifact.json").unlink()  # its hashes are those of the weights as they were
        (start / "run.json").unlink()
        return self.run("moved", ONE_WAY, {}, sft=start / "model")


def differently(plan: list[list[int]]) -> Patches:
    """Another attention kernel in each stage, and the packed SFT's rows, bin by bin, without packing."""

    def with_kernel(stage: str) -> Callable[[pytest.MonkeyPatch], None]:
        def replace(patch: pytest.MonkeyPatch) -> None:
            patch.setattr(attention, "_segment_by_segment", over_the_row(KERNELS[stage], []))
            if stage == "sft":
                follow(plan, patch)

        return replace

    return {stage: with_kernel(stage) for stage in STAGES}


@dataclass(frozen=True)
class Arms:
    """The chain one way and the other, and one way from SFT weights that were moved; the plan of the other's SFT."""

    chains: Chains
    one: Chain
    other: Chain
    moved: Chain
    plan: list[list[int]]

    def bar(self, stage: str) -> float:
        """1e-5, and what moved weights do to the losses of a stage."""
        return BAR + float(residuals(self.moved, self.one, stage).abs().max())


@pytest.fixture(scope="module", params=[{}, {"lora": LORA}], ids=["full", "lora"])
def arms(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Arms:
    chains = Chains(tmp_path_factory.mktemp("chains"), tiny_model_folder, request.param)
    bins: list[batching.Bins] = []
    make_bins = batching.make_bins

    def keep(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(trainer, "make_bins", lambda *args: bins.append(make_bins(*args)) or bins[-1])

    one = chains.run("one", ONE_WAY, {"sft": keep})
    packed = rows_of_bins(bins[0])
    assert len(packed) >= 8, "a second epoch would have another order"
    plan = [packed[i] + packed[i + 1] for i in range(0, 8, 2)]
    assert max(map(len, plan)) > 2
    other = chains.run("other", OTHERWISE, differently(plan))
    return Arms(chains=chains, one=one, other=other, moved=chains.moved(one), plan=plan)


def residuals(ours: Chain, theirs: Chain, stage: str) -> Tensor:
    return signed_residuals(*([line["loss"] for line in chain.steps[stage]] for chain in (ours, theirs)))


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> tuple[float, int]:
    """How far weights are apart, as a share of their norm, and how many there are."""
    apart = sum(float((one[name] - other[name]).double().square().sum()) for name in one)
    norm = sum(float(one[name].double().square().sum()) for name in one)
    return (apart / norm) ** 0.5, sum(tensor.numel() for tensor in one.values())


def test_each_stage_before_the_last_is_the_same(arms: Arms) -> None:
    assert_same_steps(arms.other.steps["sft"], arms.one.steps["sft"])
    for stage in ("sft", "reward"):
        apart, count = distance(arms.one.weights(stage), arms.other.weights(stage))
        assert 0 < apart * count**0.5 <= BAR, f"{stage}: {apart:.1e} apart, of {count} weights"


@pytest.mark.parametrize("stage", LAST)
def test_the_last_losses_are_the_same(stage: str, arms: Arms) -> None:
    assert len(arms.one.steps[stage]) == len(arms.other.steps[stage]) >= 5
    found = residuals(arms.other, arms.one, stage)
    assert float(found.abs().max()) <= arms.bar(stage), f"{found.tolist()}, bar {arms.bar(stage):.1e}"


def test_the_bar_is_a_low_one(arms: Arms) -> None:
    assert max(map(arms.bar, LAST)) < 1e-3


# This comparison can fail


def test_a_wrong_divisor_in_the_first_stage_is_found_in_the_last(arms: Arms) -> None:
    def mean_of_means(self: Any, model: Any, batch: Any, _num_items: Any) -> Any:
        return -sum_of_logprobs(model, batch) / batch["targets"].numel() / self.args.gradient_accumulation_steps, {}

    def plant(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(lm_trainer.LmTrainer, "objective", mean_of_means)

    wrong = arms.chains.run("wrong", ONE_WAY, {"sft": plant})
    for stage in LAST:
        assert float(residuals(wrong, arms.one, stage).abs().max()) > arms.bar(stage), stage
