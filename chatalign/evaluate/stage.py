"""The evaluation stage: models side by side on the same held-out prompts, one after another in one process."""

from __future__ import annotations

if __name__ == "__main__":  # before all that follows is imported: a wrong recipe is refused without it
    from chatalign.launch import stage_main

    stage_main("eval")

import time
from collections.abc import Mapping
from typing import Any

from chatalign.artifact import Artifact
from chatalign.errors import RecipeError
from chatalign.evaluate.gold import gold_scores, load_gold
from chatalign.evaluate.heldout import HeldOut, read_held_out
from chatalign.evaluate.policy import Policy, answer, opened, perplexity, reply_logps
from chatalign.evaluate.results import Measured, summarise, write
from chatalign.evaluate.reward import opened_judge, pair_accuracies, reply_scores
from chatalign.phases import phase
from chatalign.recipe import EvalRecipe
from chatalign.runs import open_run, world_size
from chatalign.tracking import log_results, working


def run(recipe: EvalRecipe) -> Artifact:
    """Measure the recipe's models and write ``eval.json``, ``replies.jsonl`` and, last, ``artifact.json``."""
    baseline = refuse_what_cannot_run(recipe)
    opened_run = open_run(recipe)
    started = time.perf_counter()
    with phase("data"):
        held_out = read_held_out(recipe.eval)
    with phase("score"):
        measured = measure_models(recipe, held_out, baseline)
        reward_model = judge_replies(recipe, held_out, measured)
    results = summarise(recipe, held_out, measured, baseline) | {"reward_model": reward_model}
    artifact = write(recipe, opened_run, held_out, measured, results, wall_s=time.perf_counter() - started)
    log_results(recipe, opened_run, artifact.metrics)
    return artifact


def refuse_what_cannot_run(recipe: EvalRecipe) -> str:
    """The baseline's name; raises RecipeError for a recipe that measures nothing or holds models to an absent one."""
    section = recipe.eval
    if world_size() > 1:
        raise RecipeError(
            "evaluation runs in one process; start it with `chatalign eval` in place of accelerate launch"
        )
    if not (section.prompts or section.pairs or section.texts):
        raise RecipeError("`eval` measures nothing: give `eval.prompts`, `eval.pairs` or `eval.texts`")
    if section.pairs and recipe.reward_model is None and not (section.prompts or section.texts):
        raise RecipeError("`eval.pairs` measures a reward model: give `reward_model`")
    if (section.prompts or section.texts) and not recipe.models:
        raise RecipeError("`models` is empty: name at least one, as `models: {sft: {name_or_path: runs/sft}}`")
    baseline = section.baseline or next(iter(recipe.models), "")
    if recipe.models and baseline not in recipe.models:
        raise RecipeError(f"`eval.baseline: {baseline}` is none of `models` ({', '.join(recipe.models)}); name one")
    return baseline


def measure_models(recipe: EvalRecipe, held_out: HeldOut, baseline: str) -> dict[str, Measured]:
    """Replies, log-probabilities, gold scores and perplexity of each model, in the recipe's order.

    The baseline is opened last, when the others' replies are there: it is their reference, and no two models are
    in memory at once.
    """
    gold = load_gold(recipe.eval.gold) if recipe.eval.gold else None
    measured = {name: Measured() for name in recipe.models}
    for name in [*(name for name in recipe.models if name != baseline), *([baseline] if recipe.models else [])]:
        with opened(recipe.models[name], recipe.quantization) as policy:
            measured[name].tokenizer = policy.tokenizer
            if held_out.questions:
                _answer(recipe, held_out, policy, name, measured[name])
            if held_out.texts:
                with working(f"eval {name} perplexity", len(held_out.texts)) as step:
                    measured[name].perplexity = perplexity(policy, held_out.texts, step)
            if name == baseline:
                _hold_to_baseline(recipe, policy, measured)
    if gold is not None:
        for one in measured.values():
            one.gold = _gold(recipe, gold, held_out, one)
    return measured


def _temperature(recipe: EvalRecipe) -> float:
    """The temperature of log-probabilities: the sampler's own, 1 for greedy replies."""
    return recipe.eval.temperature or 1.0


def _answer(recipe: EvalRecipe, held_out: HeldOut, policy: Policy, name: str, one: Measured) -> None:
    started = time.perf_counter()
    with working(f"eval {name}", len(held_out.questions)) as step:
        one.answers = answer(policy, held_out.questions, recipe.eval, step)
    one.seconds = time.perf_counter() - started
    one.logps = reply_logps(policy, one.answers, temperature=_temperature(recipe))


def _hold_to_baseline(recipe: EvalRecipe, policy: Policy, measured: Mapping[str, Measured]) -> None:
    """The baseline's log-probabilities of everybody's replies, where their tokens are its own."""
    for one in measured.values():
        if one.answers is None or not same_vocabulary(one.tokenizer, policy.tokenizer):
            continue
        own = one.tokenizer is policy.tokenizer
        one.reference_logps = one.logps if own else reply_logps(policy, one.answers, temperature=_temperature(recipe))


def same_vocabulary(one: Any, other: Any) -> bool:
    """Whether two tokenizers give every token the same id."""
    return one is other or one.get_vocab() == other.get_vocab()


def _gold(recipe: EvalRecipe, function: Any, held_out: HeldOut, one: Measured) -> list[dict[str, float]]:
    if one.answers is None:
        return []
    return [
        gold_scores(
            function,
            str(recipe.eval.gold),
            messages=question.messages,
            reply=text,
            row=question.row,
            ended=ended,
        )
        for question, text, ended in zip(held_out.questions, one.answers.texts, one.answers.ended, strict=True)
    ]


def judge_replies(recipe: EvalRecipe, held_out: HeldOut, measured: Mapping[str, Measured]) -> dict[str, Any]:
    """Score every model's replies with the reward model, and the reward model itself on the pairs."""
    if recipe.reward_model is None or not recipe.reward_model.name_or_path:
        return {}
    with opened_judge(recipe.reward_model, recipe.quantization) as judge:
        for one in measured.values():
            if one.answers is not None:
                same = same_vocabulary(one.tokenizer, judge.tokenizer)
                same = same and one.tokenizer.chat_template == judge.tokenizer.chat_template
                one.rm_scores = reply_scores(judge, held_out.questions, one.answers, same_tokens=same)
        return dict(pair_accuracies(judge, held_out.pairs)) if held_out.pairs else {}
