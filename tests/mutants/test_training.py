"""Failures of the training loop, of precision and of attention: planted, and named at the step where they show."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from engine.fused_twins import add_lora
from engine.stand_ins import VOCABULARY, lm_rows, make_trainer
from tiny import make_llama
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, MistralConfig, MistralForCausalLM

from chatalign import dpo
from chatalign.engine import attention, batching, dpo_trainer
from chatalign.engine.dpo_guard import refuse_other_loss
from chatalign.engine.guard import refuse_shared_seeds
from chatalign.engine.lm_trainer import LmTrainer
from chatalign.engine.ppo_schedule import Schedule
from chatalign.maths.preference import dpo_loss
from chatalign.maths.preference_losses import DPOLossType
from chatalign.recipe import DpoSection, validate_stage
from chatalign.rollout import Sampling, TransformersRollout
from mutants.guard_table import named

# 18: how micro-batches add up to a step


def accumulating(folder: Path, **settings: Any) -> LmTrainer:
    return make_trainer(folder, lm_rows(8), per_device_train_batch_size=1, gradient_accumulation_steps=4, **settings)


def test_a_loss_that_is_divided_once_more(tmp_path: Path) -> None:
    one = accumulating(tmp_path)
    one.loss_is_scaled_for_ga = False  # what transformers decides for a loss that it takes for a micro-batch's mean
    with named(18):
        one.train()


def test_a_mean_of_the_micro_batches_means(tmp_path: Path) -> None:
    class Means(LmTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            return super().compute_loss(model, inputs, num_items_in_batch=self.count_items(inputs))

    with named(18):
        accumulating(tmp_path, trainer_class=Means).train()


# 19: the schedule


def test_a_scheduler_stepped_by_each_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = make_trainer(tmp_path, lm_rows(8), lr_scheduler_type="cosine", warmup_steps=2)
    create = one.create_scheduler

    def twice(*args: Any, **kwargs: Any) -> Any:  # accelerate's scheduler steps once for each process
        scheduler = create(*args, **kwargs)
        step = scheduler.step
        monkeypatch.setattr(scheduler, "step", lambda: (step(), step()))
        return scheduler

    monkeypatch.setattr(one, "create_scheduler", twice)
    with named(19):
        one.train()


def test_a_schedule_over_another_number_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = make_trainer(tmp_path, lm_rows(8), lr_scheduler_type="linear")
    create = one.create_scheduler
    monkeypatch.setattr(
        one, "create_scheduler", lambda num_training_steps, **kwargs: create(2 * num_training_steps, **kwargs)
    )
    with named(19):
        one.train()


# 20: updates lost to rounding


def test_weights_of_bfloat16_stand_still(tmp_path: Path) -> None:
    model = make_llama(VOCABULARY).bfloat16()  # as a library that casts at loading leaves it
    with named(20):
        make_trainer(tmp_path, lm_rows(8), model=model, learning_rate=1e-6).train()


# 21: adapters without gradients


def test_checkpointed_layers_that_cut_the_graph(tmp_path: Path) -> None:
    model = add_lora(make_llama(VOCABULARY)).train()
    layer = model.get_base_model().model.layers[0]
    # Recomputed as transformers did by default, and nothing makes the frozen embedding's output carry gradients.
    layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, partial(checkpoint, use_reentrant=True)
    with named(21):
        make_trainer(tmp_path, lm_rows(8), model=model).train()


# 22, 23: attention


def test_rows_that_see_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def as_one(segments: torch.Tensor, total: int) -> Any:
        return planned(torch.tensor([[0, total, 0, 0]]), total)

    planned = attention.plan_segments
    monkeypatch.setattr(attention, "plan_segments", as_one)
    with named(22):
        make_trainer(tmp_path, lm_rows(8), packing=True)


def test_a_model_that_keeps_its_own_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama(VOCABULARY)

    def nominally(name: str) -> None:  # the configuration says one thing, the layers go on with another
        model.config._attn_implementation = name
        for layer in model.model.layers:
            layer.self_attn.config = copy.deepcopy(model.config)
            layer.self_attn.config._attn_implementation = "sdpa"

    monkeypatch.setattr(model, "set_attn_implementation", nominally)
    with named(23):
        make_trainer(tmp_path, lm_rows(8), model=model)


def test_a_sliding_window_that_is_not_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = MistralConfig(vocab_size=VOCABULARY, num_hidden_layers=2, sliding_window=16, pad_token_id=0, **shape)
    make_trainer(tmp_path / "clean", lm_rows(8, longest=12), model=MistralForCausalLM(config))
    forward = attention.segment_attention_forward

    def under_another_name(*args: Any, **kwargs: Any) -> Any:
        kwargs["window_size"] = kwargs.pop("sliding_window")
        return forward(*args, **kwargs)

    entry = attention.entry_name("auto")
    monkeypatch.setitem(AttentionInterface._global_mapping, entry, under_another_name)
    with named(23):
        make_trainer(tmp_path / "mutant", lm_rows(8), model=MistralForCausalLM(config))


# 24: rows that may attend to nothing


def test_a_padded_prompt_that_attends_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(query: Any, key: Any, value: Any, attn_mask: Any = None, **_: Any) -> torch.Tensor:
        scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(2, 3)
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf)  # the softmax of nothing is NaN
        return scores.softmax(-1) @ value.repeat_interleave(query.shape[1] // value.shape[1], 1)

    # A decoder that masks the pads' own places too, on a kernel whose softmax of nothing is NaN.
    monkeypatch.setattr(torch, "eye", lambda width, **_: torch.zeros(width, width, dtype=torch.bool))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", plain)
    rollout = TransformersRollout(make_llama(VOCABULARY), pad_token_id=0)
    sampling = Sampling(max_new_tokens=3, stop_token_ids=(3,))
    assert rollout.generate([[5, 6, 7], [8, 9, 10]], sampling).response_ids
    with named(24):
        rollout.generate([[5, 6, 7], [8]], sampling)


# 25, 26: several processes


def test_an_evaluation_that_repeats_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evened(self: Any) -> Any:  # as a distributed sampler pads the last batch with the first rows
        yield from ([index, index + 1] for index in range(0, self.bins - 1, 2))
        yield [self.bins - 1, 0]

    monkeypatch.setattr(batching.BinSampler, "__iter__", evened)
    one = make_trainer(tmp_path, lm_rows(2), eval_rows=lm_rows(5), per_device_eval_batch_size=2)
    with named(25):
        one.evaluate()


def test_two_processes_that_draw_alike() -> None:
    raw = {"stage": "ppo", "output_dir": "unused", "reward_model": {"name_or_path": "rm"}}
    raw |= {"data": {"datasets": [{"path": "p.jsonl"}]}, "ppo": {"rollout_batch_size": 4, "total_episodes": 8}}
    recipe = validate_stage(raw, where="test")
    ranks = [Schedule.of(recipe, prompts=8, rank=rank, world_size=2) for rank in range(2)]
    refuse_shared_seeds([one.own(one.episodes(1)) for one in ranks], rollout=1)
    alike = [Schedule.of(recipe, prompts=8, rank=0, world_size=2) for _ in range(2)]
    with named(26):
        refuse_shared_seeds([one.own(one.episodes(1)) for one in alike], rollout=1)


# 36: another loss than the recipe's


def dpo_recipe(folder: Path, base: Path, **section: Any) -> Any:
    rows = [{"prompt": f"{i}?", "chosen": f"{i}.", "rejected": "no"} for i in range(4)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    raw = {"stage": "dpo", "output_dir": str(folder / "run"), "model": {"name_or_path": str(base)}, "dpo": section}
    raw |= {"data": {"datasets": [{"path": str(folder / "pairs.jsonl")}]}, "train": {"max_steps": 1, "use_cpu": True}}
    return validate_stage(raw, where="test")


@pytest.mark.parametrize("ignored", [{"loss_type": ["sigmoid", "sft"]}, {"beta": 0.2}, {"loss_weights": None}])
def test_a_setting_of_the_loss_that_is_ignored(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, ignored: dict[str, Any]
) -> None:
    computed = dpo_trainer.dpo_loss

    def ignoring(**settings: Any) -> Any:
        return computed(**settings | (ignored if settings.get("loss_weights") else {}))

    monkeypatch.setattr(dpo_trainer, "dpo_loss", ignoring)
    with named(36):
        dpo.run(dpo_recipe(tmp_path, tiny_model_folder, loss_type="hinge", sft_weight=0.5))


@pytest.mark.parametrize("loss_type", get_args(DPOLossType))
def test_every_loss_is_what_it_is_by_hand(loss_type: DPOLossType) -> None:
    """Value and slopes of the whole list at a margin of 0, and every other loss of the list is told from it."""
    for beta in (0.1, 0.5):
        section = DpoSection(loss_type=loss_type, beta=beta, label_smoothing=0.1 if loss_type == "exo_pair" else 0.0)
        refuse_other_loss(section, loss_by(section))
        alike = {"sigmoid", "robust", "aot", "aot_unpaired"}  # on one pair without smoothing
        for other in set(get_args(DPOLossType)) - {loss_type, "exo_pair"}:
            if {loss_type, other} <= alike:
                continue
            with named(36):
                refuse_other_loss(
                    section, loss_by(section.model_copy(update={"loss_type": other, "label_smoothing": 0.0}))
                )


def loss_by(section: DpoSection) -> Any:
    def loss_of(logps: torch.Tensor, ref: torch.Tensor, lengths: torch.Tensor) -> Any:
        return dpo_loss(
            chosen_logps_B=logps[0::2],
            rejected_logps_B=logps[1::2],
            ref_chosen_logps_B=ref[0::2],
            ref_rejected_logps_B=ref[1::2],
            loss_type=section.loss_type,
            beta=section.beta,
            label_smoothing=section.label_smoothing,
            chosen_lengths_B=lengths[0::2],
            rejected_lengths_B=lengths[1::2],
        )

    return loss_of
