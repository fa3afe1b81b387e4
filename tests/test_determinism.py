"""The same recipe twice gives the same bytes, whatever else differs: docs/reproducibility.md's promises."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import every_stage
import pytest
import torch
from every_stage import CASES, make_world
from tiny import make_llama, make_tokenizer

from chatalign.artifact import sha256_file
from chatalign.engine.lm_trainer import LmTrainer
from chatalign.inputs import NOT_IN_FINGERPRINT
from chatalign.metrics_file import METRICS_FILE, read_metrics

pytestmark = pytest.mark.slow
CHAIN = [case for case in CASES if case.startswith("chain-")]
ALONE = [case for case in CASES if not case.startswith("chain-")]
# How it is computed, not what: a recipe with these keys makes the same model.
LOADED = {"train": {"dataloader_num_workers": 2}, "data": {"num_proc": 2}}
DETERMINED = {"train": {"full_determinism": True}}
OVER = {case: LOADED for case in ALONE if case.endswith("-full") and not case.startswith("ppo")} | {
    case: DETERMINED for case in ALONE if case.endswith("-lora")
}
SPEED = re.compile(r"time_s|wall_s|.*runtime|.*tokens_per_s(econd)?(\..*)?|.*(samples|steps)_per_second")
TOKENS = ("train.arrow", "eval.arrow", "record.json")
TWICE = {"run_id", "wall_s", "tokens_per_s", "recipe.output_dir"}  # what differs whenever a recipe runs twice


def needed(case: str) -> str | None:
    """The package that a case can't run without."""
    if case.endswith("-qlora"):
        return "bitsandbytes"
    return "trl" if case.endswith("-trl") or case.startswith("kto") else None


def installed(cases: Sequence[str]) -> list[str]:
    return [case for case in cases if (package := needed(case)) is None or find_spec(package)]


def world(folder: Path) -> Path:
    """A folder with rows and a tiny base, for recipes that name both by relative paths."""
    tokenizer = make_tokenizer()
    make_llama(len(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return make_world(folder)


def run_all(
    folder: Path,
    output: str,
    cases: Sequence[str],
    over: dict[str, Any],
    *,
    planted: bool = True,
    backwards: bool = False,
    **environment: str,
) -> Path:
    """Run cases in a fresh process, one after another, in `folder`; the folder of the runs."""
    plan = folder / "plan.json"
    text = {"world": str(folder), "output": output, "cases": cases, "over": over}
    plan.write_text(json.dumps(text | {"planted": planted, "backwards": backwards}), "utf-8")
    command = [sys.executable, every_stage.__file__, str(plan)]
    own = {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "PYTHONHASHSEED": "1"}
    done = subprocess.run(command, env=os.environ | own | environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / output


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """All cases in two processes: in another order, folder, place and hash seed, and folders listed from the end.

    Of the cases that share their rows the first prepares them and the others take them from the cache; since the
    order is turned round, each meets a cold cache in one process and a warm one in the other.
    """
    one, other = (world(tmp_path_factory.mktemp(name)) for name in ("one", "other"))
    alone, chain = installed(ALONE), CHAIN
    return (
        run_all(one, "runs", [*chain, *alone], {}),
        run_all(other, "else/where", [*reversed(alone), *chain], OVER, backwards=True, PYTHONHASHSEED="2"),
    )


def files_that_differ(one: Path, other: Path) -> list[str]:
    """Paths inside two folders that are in one of them alone, or whose bytes differ."""
    found = [
        {path.relative_to(root).as_posix(): sha256_file(path) for path in root.rglob("*") if path.is_file()}
        for root in (one, other)
    ]
    return sorted(name for name in found[0].keys() | found[1].keys() if found[0].get(name) != found[1].get(name))


def metrics_that_differ(one: Path, other: Path) -> set[str]:
    """Names in ``metrics.jsonl`` that have other values on some line, speeds and times left out."""
    lines = zip(read_metrics(one / METRICS_FILE), read_metrics(other / METRICS_FILE), strict=True)
    names = {name for a, b in lines for name in a.keys() | b.keys() if a.get(name) != b.get(name)}
    return {name for name in names if not SPEED.fullmatch(name)}


def fields_that_differ(one: Path, other: Path) -> set[str]:
    """Dotted fields of two ``artifact.json``."""
    a, b = (dict(flat(json.loads((run / "artifact.json").read_text("utf-8")))) for run in (one, other))
    return {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)}


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a JSON tree by its dotted name."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


@pytest.mark.parametrize("case", CASES)
def test_the_same_recipe_gives_the_same_bytes(case: str, twice: tuple[Path, Path]) -> None:
    if case not in installed([case]):
        pytest.skip(f"{case} needs {needed(case)}")
    one, other = (root / case for root in twice)
    if case == "chain-eval":
        for name in ("eval.json", "replies.jsonl"):
            assert sha256_file(one / name) == sha256_file(other / name), name
        return
    assert list((one / "model").glob("*.safetensors"))
    assert files_that_differ(one / "model", other / "model") == []
    assert len(read_metrics(one / METRICS_FILE)) > 4
    assert metrics_that_differ(one, other) == set()


@pytest.mark.parametrize("case", CASES)
def test_nothing_of_an_artifact_differs_but_who_when_and_where(case: str, twice: tuple[Path, Path]) -> None:
    if case not in installed([case]):
        pytest.skip(f"{case} needs {needed(case)}")
    one, other = (root / case for root in twice)
    assert fields_that_differ(one, other) == TWICE | changed_keys(case) | places(one)


def changed_keys(case: str) -> set[str]:
    """What the second process's recipe has otherwise, and the fingerprint where that covers one of them."""
    keys = {f"{section}.{key}" for section, given in OVER.get(case, {}).items() for key in given}
    covered = keys - set(NOT_IN_FINGERPRINT)
    return {f"recipe.{key}" for key in keys} | ({"fingerprint"} if covered else set())


def places(run: Path) -> set[str]:
    """Where the runs lie that a run took something from, and which they were; an evaluation's speeds."""
    artifact = json.loads((run / "artifact.json").read_text("utf-8"))
    parents = {f"parents.{i}.{key}" for i in range(len(artifact["parents"])) for key in ("path", "run_id")}
    inputs = {f"recipe.{name}" for name, value in flat(artifact["recipe"]) if "/chain-" in str(value)}
    speeds = {f"extra.generated_tokens_per_s.{name}" for name in artifact["extra"].get("generated_tokens_per_s", {})}
    return parents | inputs - {"recipe.output_dir"} | speeds


def test_prepared_tokens_are_the_same_bytes(twice: tuple[Path, Path]) -> None:
    """By workers and without, from files in another order."""
    kept = [
        sorted(sha256_file(path) for name in TOKENS for path in (root / "cache" / "chatalign").glob(f"*/{name}"))
        for root in (twice[0].parent, twice[1].parents[1])
    ]
    assert kept[0] == kept[1]
    assert len(kept[0]) > 2 * len(every_stage.ROWS)


def test_the_key_asks_torch_for_deterministic_algorithms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    objective = LmTrainer.objective

    def watched(*arguments: Any) -> Any:
        asked.append(torch.are_deterministic_algorithms_enabled())
        return objective(*arguments)

    monkeypatch.setattr(LmTrainer, "objective", watched)
    monkeypatch.chdir(world(tmp_path))
    every_stage.run_cases(["sft-lora"], "runs", {"sft-lora": DETERMINED})
    assert asked
    assert all(asked)
    assert not torch.are_deterministic_algorithms_enabled()


ON_A_GPU = ["sft-full", "sft-lora", "dpo-full", "dpo-lora", "ppo-full", "ppo-lora"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_full_determinism_gives_the_same_bytes_on_a_gpu(attention: str, tmp_path: Path) -> None:
    """In bfloat16 where the GPU has it: FlashAttention by `auto`, and PyTorch's own choice segment by segment."""
    over = {"train": {"full_determinism": True, "use_cpu": False}, "model": {"attention": attention}}
    one, other = (
        run_all(world(tmp_path / name), "runs", ON_A_GPU, dict.fromkeys(ON_A_GPU, over), planted=False)
        for name in ("one", "other")
    )
    for case in ON_A_GPU:
        assert files_that_differ(one / case / "model", other / case / "model") == [], case
        assert metrics_that_differ(one / case, other / case) == set(), case


# These comparisons can fail


@pytest.mark.parametrize(
    ("unsorted", "differ"),
    [
        ("chatalign.data.sources", ["adapter_model.safetensors"]),
        ("chatalign.models.adapters", ["adapter_config.json"]),  # peft keeps target modules as a set of strings
    ],
)
def test_an_order_that_is_nobodys_is_found(unsorted: str, differ: list[str], twice: tuple[Path, Path]) -> None:
    """Planted in both processes: sets in the order of their hashes, folders in that of the file system."""
    one, other = (root / unsorted / every_stage.PLANTED for root in twice)
    assert files_that_differ(one / "model", other / "model") == differ
    assert {f"files.model/{name}" for name in differ} <= fields_that_differ(one, other)


def test_other_training_is_found(twice: tuple[Path, Path]) -> None:
    dropout, plain = (twice[0] / case for case in ("sft-lora", "chain-sft"))
    differ = files_that_differ(dropout / "model", plain / "model")
    assert differ == ["adapter_config.json", "adapter_model.safetensors"]
    assert {"loss", "grad_norm"} <= metrics_that_differ(dropout, plain)
