"""What TRL's removed trainer got wrong in replies and scores, and what it lacked; see test_removed_trainer_updates.py.

Each fault, built on purpose, is caught where ours passes. Numbers are issues of huggingface/trl.
"""

from __future__ import annotations

import dataclasses
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_llama, make_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chatalign import ppo
from chatalign.data import prepare
from chatalign.engine import ppo_roles
from chatalign.engine.ppo_experience import make_experience
from chatalign.engine.ppo_rewards import ModelScorer
from chatalign.engine.ppo_trainer import PpoTrainer
from chatalign.models.tokenizer import load_tokenizer, stop_token_ids
from chatalign.rollout import decoding, transformers_engine
from chatalign.rollout.sampler import Sampler

from .conftest import Make, built, train_reward
from .test_removed_trainer_updates import caught
from .test_roles import one_by_one

REPLIES = 8


def likely_to_end(trainer: Any, bonus: float = 5.0) -> Any:
    """The trainer, its policy and reference readier to say EOS: a random model's replies hardly ever end."""
    for model in (trainer.model.policy, trainer.play.collector.reference.module):
        model.get_output_embeddings().bias[trainer.processing_class.eos_token_id] += bonus
    return trainer


def collected(trainer: Any, **sampling: Any) -> Any:
    rows = [trainer.prompt_rows[row] for row in range(REPLIES)]
    plan = dataclasses.replace(trainer.play.sampling, **sampling)
    return trainer.play.collector.collect(rows, plan, range(REPLIES)).episodes


class LiveLogits(TorchDispatchMode):
    """The most elements that tensors with the vocabulary as their last dimension have held at one time."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.most = vocabulary, 0
        self._alive: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.shape and tensor.shape[-1] == self.vocabulary:
                self._alive.append(weakref.ref(tensor))
        self._alive = [kept for kept in self._alive if kept() is not None]
        storages = {
            t.untyped_storage().data_ptr(): t.numel() for t in (kept() for kept in self._alive) if t is not None
        }
        self.most = max(self.most, sum(storages.values()))
        return out


def test_scores_kept_for_the_whole_rollout(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """``generate(output_scores=True)``: 64 replies × 512 tokens × 151,936 × 4 bytes are 20 GB."""
    length = 64
    trainer = built(make_recipe("run", {"ppo": {"response_length": length}}))
    vocabulary = trainer.model.config.vocab_size
    prompts = [trainer.prompt_rows[row]["prompt_ids"] for row in range(REPLIES)]

    def check() -> None:
        with LiveLogits(vocabulary) as watch:
            rollout = trainer.play.collector.engine.generate(prompts, trainer.play.sampling)
        assert max(map(len, rollout.response_ids)) == length
        # One position's logits, and what a draw makes of them; a rollout's scores would be 64 times that.
        assert watch.most <= 8 * REPLIES * vocabulary

    check()
    draw, kept = Sampler.draw, []

    def keeping(self: Any, logits: Any, *args: Any) -> Any:
        kept.append(logits.float().clone())
        return draw(self, logits, *args)

    monkeypatch.setattr(Sampler, "draw", keeping)
    caught(check)


def test_eos_that_ends_no_reply(make_recipe: Make, tiny_model_folder: Path) -> None:
    """#2387: without a stop token by default, every reply ran to its full length."""
    recipe = make_recipe("run", {"ppo": {"response_length": 24}})
    tokenizer = load_tokenizer(recipe.model, chat=True)
    trainer = likely_to_end(built(recipe, stop_ids=stop_token_ids(tokenizer)))

    def check(**sampling: Any) -> None:
        drawn = collected(trainer, **sampling)
        assert bool(drawn.ended.all())
        for reply in drawn.response_ids:
            assert reply.count(tokenizer.eos_token_id) == 1
            assert reply[-1] == tokenizer.eos_token_id

    check()
    caught(lambda: check(stop_token_ids=()))


def test_pad_that_is_eos(make_recipe: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """#6802, #3750: with pad = EOS the mask ``ids != pad`` drops the stop token, its reward and its loss."""
    recipe = make_recipe("run", {"ppo": {"whiten_advantages": False, "lam": 0.0, "response_length": 24}})
    trainer = likely_to_end(built(recipe))
    end = trainer.processing_class.eos_token_id
    trainer.play.collector.engine.pad_token_id = end

    def check() -> None:
        drawn = collected(trainer)
        assert bool(drawn.ended.any())
        made = make_experience(drawn, trainer.section, kl_coef=0.0)
        batch = trainer._batch(made, list(range(REPLIES)), fresh=True)
        at = -1
        for reply, ended, score in zip(drawn.response_ids, drawn.ended, drawn.scores, strict=True):
            at += len(reply)
            if ended:
                assert int(batch["targets"][at]) == end
                assert float(made.advantages[at]) == pytest.approx(float(score)), "V = 0: the score is EOS's own"

    check()
    cut = transformers_engine.cut_at_stops

    def unequal_to_pad(tokens: Any, logps: Any, sampler: Any) -> Any:
        ids, numbers, ended = cut(tokens, logps, sampler)
        # A reply of EOS alone keeps its place: an empty one couldn't be scored at all.
        ids = [[token for token in row if token != end] or [0] for row in ids]
        return ids, [values[: len(row)] for values, row in zip(numbers, ids, strict=True)], ended

    monkeypatch.setattr(transformers_engine, "cut_at_stops", unequal_to_pad)
    caught(check)

    # And a tokenizer that pads with EOS is given another pad token before anything is trained.
    both = make_tokenizer()
    both.pad_token = both.eos_token
    both.save_pretrained(tmp_path / "both")
    make_llama(len(both)).save_pretrained(tmp_path / "both")
    loaded = load_tokenizer(make_recipe("pad", {"model": {"name_or_path": str(tmp_path / "both")}}).model)
    assert loaded.pad_token_id != loaded.eos_token_id
    assert loaded.eos_token_id in stop_token_ids(loaded)


def test_a_reward_model_that_reads_the_policys_tokens(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """#3595, #1674, #1979: a reward model had to share the policy's tokenizer, and misread it in silence if not."""
    other = make_tokenizer(vocab_size=300)
    make_llama(400, seed=3).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "reward").mkdir()
    folder = train_reward(tmp_path / "reward", tmp_path / "other")
    over = {"reward_model": {"name_or_path": str(folder)}, "ppo": {"rewards": [], "normalize_reward": False}}
    trainer = built(make_recipe("run", over))

    def check() -> None:
        drawn = collected(trainer)
        texts = [
            trainer.processing_class.decode(prompt)
            + trainer.processing_class.decode(reply, skip_special_tokens=True)
            + "<|im_end|>"
            for prompt, reply in zip(drawn.prompt_ids, drawn.response_ids, strict=True)
        ]
        own = [other(text, add_special_tokens=False)["input_ids"] for text in texts]
        assert drawn.scores.tolist() == pytest.approx(one_by_one(folder, own), abs=1e-5)

    check()
    monkeypatch.setattr(
        ModelScorer,
        "_sequences",
        lambda self, replies: [[*p, *r] for p, r in zip(replies.prompt_ids, replies.response_ids, strict=True)],
    )
    caught(check)


def test_left_padding_that_moves_positions(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch, gpt2_folder: Path
) -> None:
    """#6800: prompts of a GPT-2 family model, padded on the left, were scored at the wrong positions, 34 nats off."""
    trainer = built(make_recipe("run", {"model": {"name_or_path": str(gpt2_folder)}}))
    prompts = [[5 + row, *range(10, 10 + 3 * row)] for row in range(REPLIES)]
    plain = trainer.model.policy.eval()
    forbidden = list(trainer.play.sampling.forbidden_token_ids)

    def check() -> None:
        rollout = trainer.play.collector.engine.generate(prompts, trainer.play.sampling)
        for prompt, reply, logps in zip(prompts, rollout.response_ids, rollout.logprobs, strict=True):
            with torch.no_grad():
                logits = plain(input_ids=torch.tensor([prompt + reply]), use_cache=False).logits[
                    0, len(prompt) - 1 : -1
                ]
            logits[:, forbidden] = -torch.inf
            expected = logits.log_softmax(-1).gather(1, torch.tensor(reply)[:, None]).squeeze(1)
            assert logps == pytest.approx(expected.tolist(), abs=1e-4)

    check()
    monkeypatch.setattr(decoding, "_forward_parameters", lambda _: set())  # as a model that is given no positions
    caught(check)


def test_a_backbone_for_each_role(make_recipe: Make, sft_run: Path, reward_adapter_run: Path, monkeypatch: Any) -> None:
    """No shared backbone: four models in memory where one and four adapters do."""
    over = {
        "model": {"name_or_path": str(sft_run)},
        "reward_model": {"name_or_path": str(reward_adapter_run)},
        "ppo": {"rewards": []},
    }

    def check() -> None:
        trainer = built(make_recipe("run", over))
        modules = [trainer.model, trainer.play.collector.rewards.terms[0].scorer.model]
        held = {id(p): p.numel() for module in modules for p in module.parameters() if p.dim() == 2}
        base = sum(p.numel() for p in make_llama(trainer.model.config.vocab_size).parameters() if p.dim() == 2)
        assert sum(held.values()) < 1.6 * base, "a tiny model's adapters are a tenth of it each"

    check()
    source = ppo_roles._source
    monkeypatch.setattr(ppo_roles, "_source", lambda *args: dataclasses.replace(source(*args), on_backbone=False))
    caught(check)


def test_no_evaluation_rows(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """There was no evaluation set: what the policy does on prompts that it isn't trained on went unseen."""
    over = {"data": {"eval_fraction": 0.3}, "train": {"eval_strategy": "steps", "eval_steps": 4}}

    def check(name: str) -> None:
        recipe = make_recipe(name, over)
        ppo.run(recipe)
        lines = map(json.loads, (Path(recipe.output_dir) / "metrics.jsonl").read_text("utf-8").splitlines())
        evaluated = [line for line in lines if "eval_objective/score" in line]
        assert len(evaluated) == 2
        assert all(
            {"eval_objective/kl", "eval_reply/length", "eval_reward/letters"} <= line.keys() for line in evaluated
        )

    check("right")
    monkeypatch.setattr(PpoTrainer, "evaluate", lambda *_, **__: {})
    caught(lambda: check("blind"))


def test_rows_without_their_conversation(make_recipe: Make, tmp_path: Path) -> None:
    """Input was tokens alone: turns, a system message and the template's generation prompt were the user's to make."""
    turns = [
        {"role": "system", "content": "hello"},
        {"role": "user", "content": "1 + 2"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "what is the capital"},
    ]
    conversation, text = tmp_path / "turns.jsonl", tmp_path / "text.jsonl"
    conversation.write_text(json.dumps({"prompt": turns}) + "\n", "utf-8")
    text.write_text(json.dumps({"prompt": turns[-1]["content"]}) + "\n", "utf-8")

    def check(path: Path) -> None:
        recipe = make_recipe("run", {"data": {"datasets": [{"path": str(path)}]}})
        tokenizer = load_tokenizer(recipe.model, chat=True)
        (row,) = prepare(recipe.data, tokenizer, "prompt", seed=0).train
        shown = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert row["prompt_ids"] == tokenizer(shown, add_special_tokens=False)["input_ids"]
        assert [(turn["role"], turn["content"]) for turn in json.loads(row["prompt"])] == [
            (turn["role"], turn["content"]) for turn in turns
        ]

    check(conversation)
    caught(lambda: check(text))
