"""The PPOTrainer of TRL 1.12, the last release that had one, on the same models, prompts and hyperparameters.

Its minibatches make no optimizer steps of their own, and the last batches of its data make more than they should: it
steps once an epoch and does the same work as others only with one minibatch a rollout, which is what is measured.
Variant ``micro`` passes 16 replies at a time through the model, ``default`` all 64; ``peft`` gives the policy LoRA.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import harness
import ppo_harness
import ppo_work
import torch
import trl.experimental.ppo.ppo_trainer as ppo
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

ARGS = ppo_harness.arguments()
WORK = ppo_harness.work_of(ARGS)
IS_EQUAL = ppo_harness.lengths_of(ARGS.work) == "equal"
MICRO_BATCH = 16 if ARGS.variant == "micro" else ppo_work.PROMPTS
# Its bf16 autocasts the update alone; the frozen models may be loaded in bf16, which is faster still.
FROZEN = torch.bfloat16 if ARGS.dtype == "bfloat16" else torch.float32


def config() -> Any:
    """The hyperparameters of all arms."""
    return ppo.PPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=ARGS.dtype == "bfloat16",
        seed=0,
        learning_rate=ppo_work.LEARNING_RATE,
        lr_scheduler_type="constant",
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=ppo_work.PROMPTS // MICRO_BATCH,
        gradient_checkpointing=False,
        num_mini_batches=1,
        num_ppo_epochs=ppo_work.EPOCHS,
        total_episodes=ppo_work.PROMPTS * (ppo_harness.WARM + ARGS.iterations),
        local_rollout_forward_batch_size=ppo_work.PROMPTS,
        response_length=ppo_work.RESPONSE,
        temperature=ppo_work.TEMPERATURE,
        stop_token=None if IS_EQUAL else "eos",
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def build() -> tuple[Any, Any]:
    """The trainer and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(WORK.policy, padding_side="left")
    rows = [{"input_ids": ppo_work.tokenized(tokenizer, row)} for row in ppo_work.read(WORK.prompts)]
    copies = 4  # so that no timed batch is the data's last, see above
    policy = AutoModelForCausalLM.from_pretrained(WORK.policy, dtype=torch.float32)
    value = AutoModelForSequenceClassification.from_pretrained(WORK.reward, dtype=torch.float32)
    peft_config = None
    if ARGS.variant == "peft":
        from peft import LoraConfig

        peft_config = LoraConfig(target_modules=harness.LINEARS, task_type="CAUSAL_LM", **harness.LORA)
    trainer = ppo.PPOTrainer(
        args=config(),
        processing_class=tokenizer,
        model=policy,
        ref_model=None if peft_config else copy.deepcopy(policy).to(FROZEN),
        reward_model=copy.deepcopy(value).to(FROZEN),
        value_model=value,
        train_dataset=Dataset.from_list(rows * copies),
        eval_dataset=Dataset.from_list(rows[:1]),
        peft_config=peft_config,
    )
    return trainer, tokenizer


@torch.no_grad()
def probe(trainer: Any, tokenizer: Any) -> dict[str, list[float]]:
    """Scores, log-probabilities under policy and reference, and values of the probe's replies, by TRL's functions."""
    found: dict[str, list[float]] = {"scores": [], "logps": [], "ref_logps": [], "values": []}
    pad = tokenizer.pad_token_id
    for row in ppo_work.read(WORK.probe):
        prompt, reply = row["prompt_ids"], row["response_ids"]
        ids, start = torch.tensor([prompt + reply]), len(prompt)
        padded = torch.cat((ids, ids.new_full((1, 1), pad)), 1)  # its score is read before the first pad
        found["scores"] += ppo.get_reward(trainer.reward_model, padded, pad, start)[1].tolist()
        values = ppo.get_reward(trainer.value_model, ids, pad, start)[0][0, start - 1 : -1, 0]
        found["values"] += values.tolist()
        reference = trainer.ref_model
        with trainer.null_ref_context():
            frozen = ppo.forward(reference or trainer.policy_model, ids, pad).logits
        with trainer.accelerator.autocast():
            own = ppo.forward(trainer.policy_model, ids, pad).logits
        for name, logits in (("logps", own), ("ref_logps", frozen)):
            scaled = logits[:, start - 1 : -1].float() / (ppo_work.TEMPERATURE + 1e-7)
            found[name] += ppo.selective_log_softmax(scaled, ids[:, start:])[0].tolist()
    return found


def watch(trainer: Any, tokenizer: Any) -> tuple[ppo_harness.Clock, dict[str, float]]:
    """Put the clock around TRL's own functions: generation, the first pass of the update, the end of a step."""
    import transformers

    clock, first = ppo_harness.Clock(), {}
    batch_generation, forward, log = ppo.batch_generation, ppo.forward, trainer.log

    def watched_generation(model: Any, queries: Any, *args: Any, **kwargs: Any) -> Any:
        clock.enter("rollout")
        query_responses, logits = batch_generation(model, queries, *args, **kwargs)
        clock.enter("scoring")
        replies = query_responses[:, queries.shape[1] :]
        ends = (replies == tokenizer.eos_token_id).long()
        cut = ends.shape[1] if IS_EQUAL else (ends.cumsum(1) - ends == 0).sum(1)
        clock.drew([cut] * len(replies) if IS_EQUAL else cut.tolist())
        return query_responses, logits

    def watched_forward(model: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and clock.phase == "scoring":
            clock.enter("update")
        return forward(model, *args, **kwargs)

    def watched_log(metrics: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if not first:
            first.update({"score": metrics["objective/scores"], "kl": metrics["objective/kl"]})
        log(metrics, *args, **kwargs)

    class IterationEnd(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.end_iteration()

    ppo.batch_generation, ppo.forward, trainer.log = watched_generation, watched_forward, watched_log
    trainer.add_callback(IterationEnd())
    clock.watch_optimizer()
    return clock, first


def main() -> None:
    """Build, measure, write."""
    torch.manual_seed(0)
    trainer, tokenizer = build()
    found = probe(trainer, tokenizer)
    clock, first = watch(trainer, tokenizer)
    trainer.train()
    ppo_harness.finish(clock, ARGS, f"trl-{ARGS.variant}-{ARGS.dtype}", first, found)


main()
