"""Failures of PPO's references, rewards, samplers and values: planted, and named before they train anything."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ppo import conftest
from ppo.conftest import LORA, Make, built
from tiny import make_llama
from torch import nn

from chatalign.engine import ppo_experience
from chatalign.engine.ppo_model import PpoModel, ValueHead
from chatalign.engine.ppo_trainer import PpoTrainer
from chatalign.errors import GuardError
from chatalign.maths import k1
from chatalign.models import adapters
from chatalign.models.reference import Reference
from chatalign.rollout import TransformersRollout, decoding, transformers_engine
from chatalign.rollout.sampler import Sampler, truncate
from mutants.guard_table import named

make_recipe, gpt2_folder, sft_run = conftest.make_recipe, conftest.gpt2_folder, conftest.sft_run
prompt_file, reward_file = conftest.prompt_file, conftest.reward_file
MANY_STOPS = list(range(3, 80))  # so that a random model's replies end at different lengths


@pytest.fixture(scope="module")
def sharp(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> dict[str, Any]:
    """A model that is sure of its tokens, so that temperatures and stale weights show as in a trained one."""
    folder = tmp_path_factory.mktemp("sharp")
    make_llama(len(tiny_tokenizer), initializer_range=0.3).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return {"name_or_path": str(folder)}


# 34: the reference


def test_a_reference_that_is_the_base_and_not_the_sft_adapter(
    make_recipe: Make, sft_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "_reference", lambda model, *_: Reference(model, way="disabled"))
    with named(34):
        built(make_recipe("run", {"model": {"name_or_path": str(sft_run)}})).train()


def test_a_reference_that_is_the_policy_itself(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "copy", SimpleNamespace(deepcopy=lambda model: model))
    with named(34):
        built(make_recipe())


def test_a_base_that_trains_under_its_adapter(make_recipe: Make, gpt2_folder: Path) -> None:
    # The biases that `all` trains are the base's, and stay changed where peft switches the adapter off.
    over = {"model": {"name_or_path": str(gpt2_folder)}, "lora": LORA | {"bias": "all"}}
    with named(34):
        built(make_recipe("run", over))


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_reference_that_moves(make_recipe: Make, lora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = built(make_recipe("run", {"lora": lora, "ppo": {"total_episodes": 8}}))
    after_step = PpoTrainer.after_step

    def moved(self: PpoTrainer) -> bool:
        reference = self.play.collector.reference
        frozen = reference.module if lora is None else reference._policy.get_base_model()
        next(p for p in frozen.parameters() if not p.requires_grad).data.add_(1e-3)
        return after_step(self)

    monkeypatch.setattr(PpoTrainer, "after_step", moved)
    with named(34):
        trainer.train()


# 35: dropout


def test_dropout_while_ppo_trains(make_recipe: Make, gpt2_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "disable_dropout", lambda *_: None)
    monkeypatch.setattr(PpoModel, "train", nn.Module.train)
    with named(35):
        built(make_recipe("run", {"model": {"name_or_path": str(gpt2_folder)}})).train()


# 40: what a reply is paid for


def test_a_stop_token_found_in_the_prompt(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    # ChatML prompts end their turns in EOS: no reply would lack one, and `missing_eos_penalty` would never be paid.
    cut = transformers_engine.cut_at_stops

    def ended_in_the_prompt(*args: Any) -> Any:
        tokens, logps, ended = cut(*args)
        return tokens, logps, [True for _ in ended]

    monkeypatch.setattr(transformers_engine, "cut_at_stops", ended_in_the_prompt)
    with named(40):
        built(make_recipe()).train()


@pytest.mark.parametrize("place", ["padding", "rectangle's end", "every token"])
def test_a_score_that_is_not_on_the_last_token(make_recipe: Make, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    right = ppo_experience.token_rewards

    def misplaced(score: torch.Tensor, kl: torch.Tensor, mask: torch.Tensor, coef: float) -> torch.Tensor:
        rewards = right(torch.zeros_like(score), kl, mask, coef)
        if place == "every token":
            return rewards + mask * score[:, None]
        last = mask.sum(1) - (0 if place == "padding" else 1)
        at = last.clamp(max=mask.shape[1] - 1) if place == "padding" else torch.full_like(last, mask.shape[1] - 1)
        return rewards.scatter_add(1, at[:, None], score[:, None])

    monkeypatch.setattr(ppo_experience, "token_rewards", misplaced)
    with named(40):
        built(make_recipe(), stop_ids=MANY_STOPS).train()


# 41: padding


def test_padding_that_moves_positions(make_recipe: Make, gpt2_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_forward_parameters", lambda _: set())  # as a model that is given no positions
    with named(41):
        built(make_recipe("run", {"model": {"name_or_path": str(gpt2_folder)}})).train()


# 42 and 43: sampler and trainer


def test_another_temperature(make_recipe: Make) -> None:
    trainer = built(make_recipe())
    trainer.play = dataclasses.replace(
        trainer.play, sampling=dataclasses.replace(trainer.play.sampling, temperature=0.9)
    )
    with named(42):
        trainer.train()


@pytest.mark.parametrize("bf16", [False, True])
def test_log_probabilities_after_top_p(
    make_recipe: Make, sharp: dict[str, Any], bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = Sampler.draw

    def after_top_p(self: Sampler, logits: torch.Tensor, *args: Any) -> Any:
        tokens, _ = draw(self, logits, *args)
        allowed = logits.float().index_fill(1, self.forbidden_ids, -torch.inf).log_softmax(-1)
        kept = truncate(allowed, top_p=0.5, top_k=0).log_softmax(-1)
        return tokens, kept.gather(1, tokens[:, None]).squeeze(1)

    monkeypatch.setattr(Sampler, "draw", after_top_p)
    with named(42):
        built(make_recipe("run", {"model": sharp, "ppo": {"top_p": 0.5}, "train": {"bf16": bf16}})).train()


def test_a_sampler_that_keeps_its_old_weights(make_recipe: Make, sharp: dict[str, Any]) -> None:
    trainer = built(make_recipe("run", {"model": sharp, "train": {"learning_rate": 1e-2}}))
    collector = trainer.play.collector
    collector.engine = TransformersRollout(copy.deepcopy(trainer.model.policy), collector.engine.pad_token_id)
    with named(43):
        trainer.train()
    assert trainer.position.rollout == 1, "at the first, the two are alike"


def test_a_cache_that_loses_its_place(
    make_recipe: Make, sharp: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = decoding.Decoding.step

    def behind(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        self.lengths_B = self.lengths_B * 0 + 1
        return step(self, tokens)

    monkeypatch.setattr(decoding.Decoding, "step", behind)
    with named(43):
        built(make_recipe("run", {"model": sharp})).train()


def test_an_update_that_runs_another_policy_than_its_rollout(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = PpoModel.forward

    def colder(self: PpoModel, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        return out._replace(logps=1.1 * out.logps)

    monkeypatch.setattr(PpoModel, "forward", colder)
    with pytest.raises(GuardError, match="rollout and update of one policy differ by 0"):
        built(make_recipe("run", {"ppo": {"value": "shared"}})).train()


# 44: the penalty's gradient


@pytest.mark.parametrize("name", ["k2", "k3"])
def test_an_estimator_with_the_size_of_the_kl_and_not_its_gradient(make_recipe: Make, name: str) -> None:
    with named(44):
        built(make_recipe("run", {"ppo": {"kl_estimator": name}}))


def test_an_estimator_of_the_other_sign(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ppo_experience.KL_ESTIMATORS, "k1", lambda logps, ref_logps: k1(ref_logps, logps))
    with named(44):
        built(make_recipe())


# 45: values before the first update


@pytest.mark.parametrize("over", [{}, {"lora": LORA}, {"ppo": {"value": "shared"}}])
def test_a_value_head_with_random_weights(
    make_recipe: Make, over: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ValueHead, "__init__", lambda self, size: nn.Linear.__init__(self, size, 1))
    with named(45):
        built(make_recipe("run", over)).train()
