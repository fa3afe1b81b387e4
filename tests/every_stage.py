"""Every stage, full, with an adapter and with a quantized base, one after another in this process: what is run twice.

``python tests/every_stage.py PLAN.json`` runs the cases that the plan names, in its order, in its world (a folder that
`make_world` filled), each as a chain would run it in its warm process.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

LORA = {"r": 4, "lora_alpha": 8}
QLORA = {"lora": LORA, "quantization": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
# Drawn while it trains: a loader, or a stage before it, that moved a generator would show.
NOISE = {"train": {"neftune_noise_alpha": 5.0}}
EVALUATED = {"data": {"eval_fraction": 0.1}, "train": {"eval_strategy": "steps", "eval_steps": 2}}
FROM_SFT = {"model": {"name_or_path": "@chain-sft"}}
# Each case is a stage's recipe with these keys; @NAME is the run of an earlier case.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "pretrain-full": ("pretrain", {"model": {"tokenizer_name_or_path": "base", "config": LLAMA}} | EVALUATED),
    "sft-full": ("sft", {"data": EVALUATED["data"], "train": EVALUATED["train"] | NOISE["train"]}),
    "sft-lora": ("sft", {"lora": LORA | {"lora_dropout": 0.1}}),
    "sft-qlora": ("sft", QLORA),
    "sft-trl": ("sft", {"engine": "trl"} | EVALUATED),
    "reward-full": ("reward", EVALUATED),
    "reward-lora": ("reward", {"lora": LORA}),
    "reward-qlora": ("reward", QLORA),
    "reward-trl": ("reward", {"engine": "trl"}),
    "dpo-full": ("dpo", EVALUATED),
    "dpo-lora": ("dpo", {"lora": LORA, "dpo": {"precompute_ref_log_probs": True}}),
    "dpo-qlora": ("dpo", QLORA),
    "dpo-trl": ("dpo", {"engine": "trl"}),
    "kto-full": ("kto", {}),
    "kto-lora": ("kto", {"lora": LORA}),
    "ppo-full": ("ppo", EVALUATED),
    "ppo-lora": ("ppo", {"lora": LORA, "ppo": {"top_p": 0.9, "top_k": 50}}),
    "ppo-qlora": ("ppo", QLORA),
    "chain-sft": ("sft", {"lora": LORA}),
    "chain-reward": ("reward", FROM_SFT),
    "chain-dpo": ("dpo", FROM_SFT),
    "chain-ppo": ("ppo", FROM_SFT | {"reward_model": {"name_or_path": "@chain-reward"}, "ppo": {"rewards": []}}),
    "chain-eval": (
        "eval",
        {
            "models": {name: {"name_or_path": f"@chain-{name}"} for name in ("sft", "dpo", "ppo")},
            "reward_model": {"name_or_path": "@chain-reward"},
        },
    ),
}
UNSORTED = ("chatalign.data.sources", "chatalign.models.adapters")  # modules that sort what has no order of its own
PLANTED = "sft-lora"
ROWS = {
    "pretrain": "rows/texts",
    "sft": "rows/turns",
    "reward": "rows/pairs",
    "dpo": "rows/pairs",
    "kto": "rows/feedback",
    "ppo": "rows/prompts",
}
TRAIN = {
    "learning_rate": 1e-3,
    "max_steps": 4,
    "warmup_steps": 0,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_steps": 2,
    "use_cpu": True,
}
PPO = {
    "total_episodes": 16,
    "rollout_batch_size": 8,
    "num_ppo_epochs": 1,
    "num_mini_batches": 2,
    "response_length": 8,
    "rewards": [{"function": "rewards.py:letters"}],
}
EVAL = {
    "prompts": {"path": "rows/prompts"},
    "pairs": {"path": "rows/pairs/a.jsonl", "max_rows": 20},
    "gold": "rewards.py:gold",
    "temperature": 1.0,
    "max_new_tokens": 8,
    "batch_size": 64,
}
REWARDS = '''
def letters(*, prompts, replies, extras):
    """A point for each letter a, a tenth less for each character."""
    return [reply.count("a") - 0.1 * len(reply) for reply in replies]


def gold(*, messages, reply, row, ended):
    return float(reply.count("a"))
'''
WORDS = ("hello", "world", "thank you", "the answer is Paris", "the capital of France", "1 + 2 = 3", "你好，世界")
COUNT = 300  # rows of each kind: more than one worker's portion


def _rows() -> dict[str, list[dict[str, Any]]]:
    texts = [" ".join(WORDS[(i + j) % 7] for j in range(1 + i * 3 % 5)) + f" {i}" for i in range(COUNT)]
    replies = [" ".join(WORDS[(i * 2 + j) % 7] for j in range(1 + i * 5 % 4)) for i in range(COUNT)]
    asked = list(zip(texts, replies, strict=True))
    return {
        "texts": [{"text": text} for text in texts],
        "turns": [{"prompt": text, "completion": reply} for text, reply in asked],
        "pairs": [{"prompt": text, "chosen": reply, "rejected": f"no {len(reply)}"} for text, reply in asked],
        "feedback": [
            {"prompt": text, "completion": reply, "label": i % 2 == 0} for i, (text, reply) in enumerate(asked)
        ],
        "prompts": [{"prompt": text} for text in texts[:40]],
    }


def make_world(folder: Path) -> Path:
    """Fill `folder` with rows, a folder of two files for each kind, and rewards."""
    for kind, rows in _rows().items():
        (folder / "rows" / kind).mkdir(parents=True)
        halves = {"a.jsonl": rows[: len(rows) // 2], "b.jsonl": rows[len(rows) // 2 :]}
        for name, half in halves.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in half)
            (folder / "rows" / kind / name).write_text(text, "utf-8")
    (folder / "rewards.py").write_text(REWARDS, "utf-8")
    return folder


def recipe_of(case: str, output: str, over: Mapping[str, Any]) -> Any:
    """The recipe of a case, with `over` on top, its run in ``output/CASE``."""
    from chatalign.recipe import STAGES
    from chatalign.recipe.load import merge

    stage, keys = CASES[case]
    raw: dict[str, Any] = {"stage": stage, "output_dir": f"{output}/{case}"}
    if stage == "eval":
        raw["eval"] = EVAL
    else:
        raw |= {"data": {"datasets": [{"path": ROWS[stage]}], "max_length": 64}, "train": TRAIN}
        raw["model"] = {} if "model" in keys else {"name_or_path": "base"}
    if stage == "ppo":
        raw |= {"ppo": PPO, "train": TRAIN | {"max_steps": -1}}
    text = json.dumps(merge(merge(raw, keys), dict(over))).replace('"@', f'"{output}/')
    return STAGES[stage].model_validate_json(text)


def run_cases(cases: Iterable[str], output: str, over: Mapping[str, Mapping[str, Any]]) -> None:
    """Run cases in turn, each in a process that is afterwards as it was before."""
    from chatalign.pipeline import STAGE_MODULES, run_stage
    from chatalign.warm import as_if_alone, import_once

    for case in cases:
        recipe = recipe_of(case, output, over.get(case, {}))
        import_once(STAGE_MODULES[recipe.stage])
        with as_if_alone():
            run_stage(recipe)


def run_planted(output: str) -> None:
    """Run `PLANTED` as it would be if a module took sets and folders as they come."""
    import datasets

    for name in UNSORTED:
        module: Any = import_module(name)
        datasets.config.HF_DATASETS_CACHE = Path(output).absolute() / f"tokens-{name}"  # none were prepared in order
        module.sorted = list  # a global of the module, before the built-in function
        run_cases([PLANTED], f"{output}/{name}", {})
        del module.sorted


class Listing:
    """What ``os.scandir`` gives, by name or from the end; else a folder's order is the file system's affair."""

    def __init__(self, *path: Any, backwards: bool) -> None:
        with _scandir(*path) as entries:
            self.entries = iter(sorted(entries, key=lambda entry: entry.name, reverse=backwards))

    def __iter__(self) -> Iterator[os.DirEntry[str]]:
        return self.entries

    def __next__(self) -> os.DirEntry[str]:
        return next(self.entries)

    def __enter__(self) -> Listing:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is open."""


_scandir = os.scandir

if __name__ == "__main__":
    plan = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    os.chdir(plan["world"])
    os.scandir = partial(Listing, backwards=plan["backwards"])  # type: ignore[assignment]
    run_cases(plan["cases"], plan["output"], plan["over"])
    if plan["planted"]:
        run_planted(plan["output"])
