"""One warm process for a chain: a stage in it gives the weights that it gives alone, and leaves nothing behind."""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from forked import start

from chatalign.artifact import load_artifact
from chatalign.errors import NonFiniteError
from chatalign.launch import stage_main
from chatalign.pipeline import run_pipeline
from chatalign.warm import as_if_alone, import_once

pytestmark = pytest.mark.slow
CHAT = [
    {"messages": [{"role": "user", "content": f"{i} + 1?"}, {"role": "assistant", "content": str(i + 1)}]}
    for i in range(24)
]
PAIRS = [{"prompt": f"{i} + 1?", "chosen": str(i + 1), "rejected": str(i)} for i in range(24)]
# The first stage leaves what it can: determinism and its variables, bfloat16, gradient clipping, an adapter's draws.
FIRST = {"full_determinism": True, "bf16": True, "seed": 7}


@pytest.fixture
def chain(tmp_path: Path, tiny_model_folder: Path) -> Path:
    """sft (LoRA) → reward, dpo on it, as a pipeline on disk."""
    train = {"max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-3}
    for name, rows in (("chat", CHAT), ("pairs", PAIRS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages: dict[str, dict[str, Any]] = {
        "sft": {"lora": {"r": 4}, "train": train | FIRST},
        "reward": {"train": train},
        "dpo": {"train": train},
    }
    for stage, settings in stages.items():
        rows = tmp_path / ("chat.jsonl" if stage == "sft" else "pairs.jsonl")
        raw = {"stage": stage, "output_dir": "unused", "model": {"name_or_path": str(tiny_model_folder)}} | settings
        raw["data"] = {"datasets": [{"path": str(rows)}], "max_length": 96}
        (tmp_path / f"{stage}.yaml").write_text(yaml.safe_dump(raw))
    raw = {
        "pipeline": "chain",
        "output_dir": str(tmp_path / "chain"),
        "stages": {
            "sft": {"recipe": "sft.yaml"},
            "reward": {"recipe": "reward.yaml", "model": "sft"},
            "dpo": {"recipe": "dpo.yaml", "model": "sft"},
        },
    }
    path = tmp_path / "chain.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def models_alive() -> int:
    import torch

    gc.collect()
    return sum(isinstance(thing, torch.nn.Module) for thing in gc.get_objects())


def alone_in_its_process(stage: str, words: list[str]) -> None:
    stage_main(stage, import_module(f"chatalign.{stage}").run, words)


def test_a_stage_of_a_chain_gives_the_weights_that_it_gives_alone(chain: Path) -> None:
    folder = chain.parent
    import_once("chatalign.sft")
    environment, alive = dict(os.environ), models_alive()
    summary = run_pipeline(chain)
    assert dict(os.environ) == environment
    assert models_alive() <= alive, "a stage's model outlives it"
    for row in summary["stages"]:
        assert {"data", "model", "train", "save"} <= set(row["seconds"])
        assert 0 < row["overhead_s"] < sum(row["seconds"].values())
    for stage in ("sft", "reward", "dpo"):
        words = [f"{stage}.yaml", f"output_dir={folder}/alone_{stage}"]
        if stage != "sft":
            words.append(f"model.name_or_path={folder}/chain/sft")
        process = start(alone_in_its_process, stage, words, printed=folder / "printed.txt", folder=folder)
        process.join()
        assert process.exitcode == 0, (folder / "printed.txt").read_text("utf-8")
        together, alone = load_artifact(folder / "chain" / stage), load_artifact(folder / f"alone_{stage}")
        assert together.files == alone.files, f"{stage}: other weights than in a process of its own"
        assert together.metrics["loss"] == alone.metrics["loss"]


def test_what_a_stage_changes_in_the_process_is_taken_back() -> None:
    import torch
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState

    root = logging.getLogger()
    before = (dict(os.environ), list(root.handlers), root.level)

    def stage() -> None:
        os.environ["ACCELERATE_DYNAMO_BACKEND"] = "INDUCTOR"
        os.environ.pop("TOKENIZERS_PARALLELISM", None)
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]
        torch.set_grad_enabled(False)
        root.addHandler(logging.NullHandler())
        root.setLevel(logging.CRITICAL)
        Accelerator(cpu=True)
        raise NonFiniteError("the stage fails")

    with pytest.raises(NonFiniteError), as_if_alone():
        stage()
    assert before == (dict(os.environ), list(root.handlers), root.level)
    assert torch.get_default_dtype() == torch.float32
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.fp32_precision == "none"  # type: ignore[attr-defined]
    assert torch.is_grad_enabled()
    assert not AcceleratorState._shared_state
    assert not PartialState._shared_state, "the next stage couldn't choose another device"


def test_what_a_stage_replaced_in_other_modules_stands_there_again() -> None:
    """A stage of TRL's after one of ours would run our rotary embedding, which differs in the last digit."""
    from tiny import make_llama
    from transformers.models.llama import modeling_llama

    from chatalign.engine.fused_layers import apply_rotary, fuse_layers
    from chatalign.engine.replaced import noting_replaced

    own, norm = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRMSNorm
    for _ in range(2):
        with as_if_alone():
            fuse_layers(make_llama(64))
            assert modeling_llama.apply_rotary_pos_emb is apply_rotary
            with suppress(KeyError), noting_replaced(modeling_llama):
                modeling_llama.LlamaRMSNorm = object  # type: ignore[misc]
                raise KeyError("a failure half-way: the chain's other stages run on in this process")
        assert modeling_llama.apply_rotary_pos_emb is own
        assert modeling_llama.LlamaRMSNorm is norm


def test_the_next_stage_compiles_anew() -> None:
    """Else its recompilations would be added to the last stage's, and past a few it would run uncompiled."""
    import_once("chatalign.sft")
    import torch

    graphs = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    double = torch.compile(lambda x: 2 * x, backend=backend)
    for _ in range(2):
        with as_if_alone():
            double(torch.ones(3))
            double(torch.ones(3))
    assert len(graphs) == 2


def test_an_open_wandb_run_is_finished_with_its_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    import_once("chatalign.sft")
    finished = []

    class Wandb:
        run = object()

        @staticmethod
        def finish() -> None:
            finished.append(True)

    monkeypatch.setitem(sys.modules, "wandb", Wandb)  # type: ignore[misc]
    with as_if_alone():
        assert not finished
    assert finished == [True]
