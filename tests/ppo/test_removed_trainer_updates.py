"""What TRL's removed trainer got wrong in its updates: each fault, built on purpose, is caught where ours passes.

The rows that are about replies and scores are in test_removed_trainer_rollouts.py. Each test names the report that
its fault is known from; numbers are issues of huggingface/trl.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import TrainingArguments

from chatalign import ppo
from chatalign.engine import ppo_experience, ppo_trainer
from chatalign.engine.ppo_collect import Collected
from chatalign.engine.ppo_experience import Episodes, make_experience
from chatalign.engine.ppo_model import PpoModel
from chatalign.engine.ppo_schedule import Schedule
from chatalign.engine.ppo_trainer import PpoTrainer
from chatalign.errors import GuardError
from chatalign.maths import policy as policy_maths
from chatalign.maths import policy_loss
from chatalign.models import adapters
from chatalign.recipe import PpoSection
from chatalign.recipe.load import merge

from .conftest import Make, built
from .test_experience import PLAIN, episodes
from .test_resume import OVER, go_on_from
from .test_run import logged, weights

Check = Callable[[], None]


def caught(check: Check, match: str = "") -> None:
    """The check fails on the build that the test has just broken."""
    with pytest.raises((AssertionError, RuntimeError), match=match):
        check()


def test_minibatches_that_make_no_optimizer_step(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """#5645: 1, 2 and 4 minibatches made the same number of steps, the last batch 8 in place of 2."""

    def check(minibatches: int) -> None:
        trainer = built(make_recipe(f"run{minibatches}", {"ppo": {"num_mini_batches": minibatches}}))
        steps: list[int] = []
        hook = register_optimizer_step_post_hook(lambda *_: steps.append(trainer.position.rollout))
        try:
            trainer.train()
        finally:
            hook.remove()
        assert [steps.count(rollout) for rollout in range(2)] == [2 * minibatches] * 2

    for minibatches in (1, 2, 4):
        check(minibatches)
    counted = Schedule.micro_batches.fget
    # Gradients gathered over all minibatches of an epoch: one step in place of four.
    monkeypatch.setattr(Schedule, "micro_batches", property(lambda self: counted(self) * self.minibatches))  # type: ignore[misc]
    caught(lambda: check(4), "was used up before its optimizer step")


def test_gradients_that_are_never_clipped(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """``max_grad_norm`` was never read."""

    def check() -> None:
        trainer = built(make_recipe("run", {"train": {"max_grad_norm": 1e-3}}))
        norms: list[float] = []

        def note(optimizer: Any, *_: Any) -> None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))

        hook = register_optimizer_step_pre_hook(note)
        try:
            trainer.train()
        finally:
            hook.remove()
        assert len(norms) == 8
        assert max(norms) <= 1.001e-3
        logged_norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
        assert min(logged_norms) > 1e-3, "the norm before clipping is what is logged"

    check()
    clip = Accelerator.clip_grad_norm_
    monkeypatch.setattr(
        Accelerator,
        "clip_grad_norm_",
        lambda self, parameters, max_norm, *rest: clip(self, parameters, float("inf"), *rest),
    )
    caught(check)


def halves(whole: Episodes) -> list[Episodes]:
    """The episodes as two processes would hold them."""
    cut = len(whole.response_ids) // 2
    tokens = int(whole.lengths[:cut].sum())

    def half(rows: slice, places: slice) -> Episodes:
        return Episodes(
            prompt_ids=whole.prompt_ids[rows],
            response_ids=whole.response_ids[rows],
            ended=whole.ended[rows],
            logps=whole.logps[places],
            ref_logps=whole.ref_logps[places],
            values=whole.values[places],
            bootstrap=whole.bootstrap[rows],
            scores=whole.scores[rows],
            score_terms={name: term[rows] for name, term in whole.score_terms.items()},
        )

    return [half(slice(cut), slice(tokens)), half(slice(cut, None), slice(tokens, None))]


def test_advantages_whitened_by_each_process_alone(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whitening per rank: the same reply was worth more or less with its neighbours on the process."""
    trainer = built(make_recipe())
    rows = [trainer.prompt_rows[row] for row in range(8)]
    whole = trainer.play.collector.collect(rows, trainer.play.sampling, range(8)).episodes
    whole.scores = torch.arange(8.0) ** 2
    expected = make_experience(whole, trainer.section, kl_coef=trainer.kl_controller.coef).advantages
    parts = [Collected(episodes=part, rollout_s=1.0, score_s=1.0, logprob_gap=None) for part in halves(whole)]
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda _: 2))
    monkeypatch.setattr(trainer.play.collector, "collect", lambda *_, **__: parts[0])

    def check() -> None:
        advantages = trainer._new_experience(0).advantages
        assert torch.equal(advantages[: len(parts[0].episodes.logps)], expected[: len(parts[0].episodes.logps)])

    monkeypatch.setattr(ppo_trainer, "gather_object", lambda mine: parts if isinstance(mine[0], Collected) else mine)
    check()
    monkeypatch.setattr(ppo_trainer, "gather_object", lambda mine: mine)
    caught(check)


def test_a_cut_reply_taken_for_a_finished_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Truncation was treated as termination: the value of the state after the cut was lost."""

    def check() -> None:
        drawn = episodes(ended=[True, False], lengths=[1, 1], scores=[1.0, 1.0])
        assert make_experience(drawn, PpoSection(**PLAIN), kl_coef=0.0).advantages.tolist() == [1.0, 11.0]

    check()
    right = ppo_experience.gae
    monkeypatch.setattr(ppo_experience, "gae", lambda *args: right(*args[:5], None))
    caught(check)


def test_dropout_in_the_update(make_recipe: Make, monkeypatch: pytest.MonkeyPatch, gpt2_folder: Path) -> None:
    """#744, #1540: with dropout the ratio is noise around 1 before any update."""

    def check() -> None:
        once = {"num_mini_batches": 1, "num_ppo_epochs": 1, "total_episodes": 8}
        trainer = built(make_recipe("run", {"model": {"name_or_path": str(gpt2_folder)}, "ppo": once}))
        trainer.train()
        (line,) = (line for line in trainer.state.log_history if "policy/ratio_var" in line)
        assert line["policy/ratio_var"] < 1e-8
        assert line["sampler/logprob_gap"] < 1e-5

    check()
    # Either of two things is enough: probabilities of dropout set to 0, or evaluation mode all through.
    with monkeypatch.context() as patch:
        patch.setattr(PpoModel, "train", torch.nn.Module.train)
        check()
    monkeypatch.setattr(adapters, "disable_dropout", lambda *_: None)
    check()
    monkeypatch.setattr(PpoModel, "train", torch.nn.Module.train)
    with pytest.raises(GuardError, match="dropout is on while PPO trains"):
        check()


@pytest.mark.parametrize("side", ["trainer", "reference"])
def test_temperature_on_one_side_alone(make_recipe: Make, monkeypatch: pytest.MonkeyPatch, side: str) -> None:
    """#4159, #7269: replies drawn at one temperature and measured at another."""
    from chatalign.engine import ppo_collect

    def check() -> None:
        trainer = built(make_recipe("run", {"ppo": {"temperature": 0.5, "total_episodes": 8}}))
        if wrong and side == "trainer":
            trainer.model.temperature = 1.0
        trainer.train()
        first = next(line for line in trainer.state.log_history if "objective/kl_k3" in line)
        assert first["objective/kl_k3"] == pytest.approx(0, abs=1e-5)

    wrong = False
    check()
    wrong = True
    if side == "reference":
        right = ppo_collect.token_logprobs
        monkeypatch.setattr(ppo_collect, "token_logprobs", lambda model, batch, **_: right(model, batch))
        caught(check)
    else:
        with pytest.raises(GuardError, match=r"temperature 0\.5 and 1"):
            check()


def test_a_clip_fraction_that_counts_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The removed trainer's example code computed the masked clip fraction, then the unmasked one over it."""

    def check() -> None:
        # Two tokens of three are the reply's; one of those is clipped.
        loss = policy_loss(
            logps_BT=torch.tensor([[1.0, 0.0, 9.0]]),
            old_logps_BT=torch.zeros(1, 3),
            advantages_BT=torch.ones(1, 3),
            mask_BT=torch.tensor([[True, True, False]]),
        )
        assert float(loss.clipfrac) == 0.5

    check()
    monkeypatch.setattr(policy_maths, "masked_mean", lambda values, mask: values.mean())
    caught(check)


@pytest.mark.slow
def test_a_run_that_cannot_go_on(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """#1643, #2657: the value and score heads were not saved, and the step counter began anew."""
    save, state = PpoTrainer._save, PpoTrainer.stage_state

    def check(name: str) -> None:
        over = merge(OVER, {"ppo": {"total_episodes": 16}})
        whole, resumed = make_recipe(f"{name}-whole", over), make_recipe(f"{name}-resumed", over)
        ppo.run(whole)
        go_on_from(Path(whole.output_dir), 3, Path(resumed.output_dir))
        ppo.run(resumed)
        assert [line["step"] for line in logged(resumed)] == list(range(4, 9))
        assert all(torch.equal(weights(resumed)[key], tensor) for key, tensor in weights(whole).items())

    def without_the_head(self: Any, *args: Any, **kwargs: Any) -> None:
        head = {key: tensor.clone() for key, tensor in self.model.value_head.state_dict().items()}
        for parameter in self.model.value_head.parameters():
            parameter.data.zero_()
        save(self, *args, **kwargs)
        self.model.value_head.load_state_dict(head)

    check("right")
    monkeypatch.setattr(PpoTrainer, "_save", without_the_head)
    caught(lambda: check("headless"))
    monkeypatch.setattr(PpoTrainer, "_save", save)
    start = {"rollout": 0, "epoch": 0, "minibatch": 0}
    monkeypatch.setattr(PpoTrainer, "stage_state", lambda self: state(self) | {"position": start})
    caught(lambda: check("from-the-start"))
