"""What a start may import: light commands little, a stage nothing that its recipe doesn't ask for. No seconds here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from chatalign.pipeline import STAGE_MODULES

HEAVY = {"torch", "transformers", "datasets", "accelerate", "peft", "trl", "numpy", "pandas", "matplotlib", "rich"}
PYDANTIC = {"pydantic", "pydantic_core", "yaml", "typer"}
# Optional packages of trackers, reports, other engines and metrics. Not ours to keep out where they are installed are
# bitsandbytes, which peft imports, and scipy, which transformers' losses of object detection import.
UNASKED = {
    "trl",
    "wandb",
    "tensorboard",
    "trackio",
    "matplotlib",
    "evaluate",
    "sklearn",
    "datasketch",
    "vllm",
    "deepspeed",
}
REPORT = """
import atexit, json, sys
def report():
    sys.stderr.flush()
    print("MODULES", json.dumps(sorted(sys.modules)), flush=True)
atexit.register(report)
sys.argv = ["chatalign", *json.loads({words!r})]
{before}
{begin}
"""
COMMAND = "from chatalign.cli import main; main()"
AS_MODULE = "import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"  # as -m does
# Ends the run at the first optimizer step, with the modules of that moment.
AT_FIRST_STEP = """
from importlib.abc import MetaPathFinder
class Watch(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "transformers.trainer":
            sys.meta_path.remove(self)
            from torch.optim.optimizer import register_optimizer_step_post_hook
            register_optimizer_step_post_hook(stepped)
def stepped(*_):
    import gc, os
    assert gc.isenabled()
    if gc.get_freeze_count() > 100_000:
        sys.modules["frozen"] = None
    report()
    os._exit(0)
sys.meta_path.insert(0, Watch())
"""


def modules_of(words: list[str], folder: Path, *, before: str = "", begin: str = COMMAND) -> set[str]:
    """Every module that a command had imported at its end, or where `before` ends it."""
    code = REPORT.format(words=json.dumps(words), before=before, begin=begin)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("MODULES ")]
    assert lines, done.stdout + done.stderr
    return set(json.loads(lines[0].removeprefix("MODULES ")))


def packages(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_folder: Path) -> Path:
    row = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 8)
    raw = {
        "stage": "sft",
        "output_dir": str(tmp_path / "run"),
        "model": {"name_or_path": str(tiny_model_folder)},
        "data": {"datasets": [{"path": str(tmp_path / "rows.jsonl")}], "max_length": 128},
        "train": {"max_steps": 1, "per_device_train_batch_size": 1},
    }
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


# The bounds are a seventh above what Python 3.11 imports now; by itself it has 68 modules.
@pytest.mark.parametrize(
    ("words", "without", "at_most"),
    [
        (["--help"], HEAVY | (PYDANTIC - {"typer"}), 180),
        (["schema"], HEAVY | PYDANTIC, 102),
        (["schema", "pipeline"], HEAVY | PYDANTIC, 102),
        (["sft", "sft.yaml", "train.learning_rat=1"], HEAVY | (PYDANTIC - {"yaml"}), 136),
        (["dpo", "sft.yaml"], HEAVY | (PYDANTIC - {"yaml"}), 136),
        (["sft", "sft.yaml", "train.learning_rate=fast"], HEAVY | {"typer", "logging"}, 294),
    ],
)
def test_a_light_command_imports_little(words: list[str], without: set[str], at_most: int, recipe: Path) -> None:
    modules = modules_of(words, recipe.parent)
    assert not packages(modules) & without
    assert len(modules) <= at_most


@pytest.mark.parametrize("module", [*STAGE_MODULES.values(), "chatalign.evaluate"])
def test_a_launched_module_refuses_as_lightly(module: str, recipe: Path) -> None:
    words = ["sft.yaml", "train.learning_rat=1"]
    modules = modules_of(words, recipe.parent, begin=AS_MODULE.format(module=module))
    assert not packages(modules) & HEAVY
    assert "chatalign.recipe" in modules, "it never came to the recipe"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "begin"),
    [(["sft", "sft.yaml"], COMMAND), (["sft.yaml"], AS_MODULE.format(module="chatalign.sft"))],
    ids=["command", "module"],
)
def test_a_stage_imports_nothing_unasked_before_its_first_step(words: list[str], begin: str, recipe: Path) -> None:
    modules = modules_of(words, recipe.parent, before=AT_FIRST_STEP, begin=begin)
    assert "torch" in modules, "the run never came to a step"
    assert "frozen" in modules, "its imports are walked by every collection of the training"
    assert not (recipe.parent / "run" / "artifact.json").exists(), "the run went on"
    assert not packages(modules) & UNASKED
    ours = {name for name in modules if name.startswith("chatalign.")}
    others = {"reward", "dpo", "ppo", "kto", "pretrain", "evaluate", "report", "chat", "hub", "commands", "rollout"}
    assert not ours & {f"chatalign.{name}" for name in others}


@pytest.mark.slow
def test_a_fresh_process_imports_a_stage_without_collecting_and_keeps_it_out_of_later_collections() -> None:
    code = (
        "import gc, json, os\n"
        "os.environ['LRU_CACHE_CAPACITY'] = '7'\n"
        "from chatalign.warm import import_once\n"
        "before = gc.get_stats()[2]['collections']\n"
        "import_once('chatalign.sft')\n"
        "after = gc.get_stats()[2]['collections']\n"
        "frozen = gc.get_freeze_count()\n"
        "import_once('chatalign.dpo')\n"
        "names = ['THP_MEM_ALLOC_ENABLE', 'ONEDNN_PRIMITIVE_CACHE_CAPACITY', 'LRU_CACHE_CAPACITY']\n"
        "allocation = [os.environ[name] for name in names]\n"
        "print(json.dumps([after - before, frozen, gc.get_freeze_count(), gc.isenabled(), allocation]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    collections, frozen, later, enabled, allocation = json.loads(done.stdout.splitlines()[-1])
    assert collections == 1, "but the one that is asked for"
    assert frozen > 100_000
    assert later == frozen, "a process that has torch may hold a model: it must not be frozen"
    assert enabled
    assert allocation == ["1", "8", "7"], "what keeps a training's memory small, but for what the user set"


def test_a_process_that_trains_an_adapter_keeps_the_kernels_of_its_products() -> None:
    code = (
        "import os\n"
        "from chatalign.warm import import_once\n"
        "import_once('json', adapter=True)\n"
        "print(os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'], os.environ['LRU_CACHE_CAPACITY'])"
    )
    unset = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=unset)
    assert done.stdout.split() == ["32", "32"]
