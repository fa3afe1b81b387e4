"""Shared fixtures: a tiny tokenizer with a chat template, a tiny Llama, and threads held to two."""

from __future__ import annotations

import gc
import os
import signal
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Prepared tokens of the tests go with them. pytest-xdist's workers take the first process's folder.
if "HF_DATASETS_CACHE" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="chatalign-tests-")
    os.environ["HF_DATASETS_CACHE"] = _cache.name

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import make_llama, make_tokenizer

ROOT = Path(__file__).resolve().parent.parent
LONGEST = (
    "tests/quickstart/",
    "tests/faults/",
    "tests/test_determinism.py",
    "tests/test_invariance.py",
    "tests/ppo/",
    "tests/engine/",
    "tests/test_golden_curves.py",
    "tests/contract/",
    "tests/mutants/",
    "",  # all others
)


signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and with it what its tests want to see


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Import what the tests use as a stage imports: no collections meanwhile, and none of it is walked by later ones.

    Each training collects garbage once or more; walking a million imported objects cost more than the training.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes first: of two processes, neither then waits long for the other at the end.

    ``--dist loadfile`` keeps this order with ``--no-loadscope-reorder``; else it begins with the files of most tests.
    """
    items.sort(key=lambda item: next(n for n, path in enumerate(LONGEST) if item.nodeid.startswith(path)))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data files beside the checkout; the test is skipped where it is absent."""
    folder = Path(os.environ.get("CHATALIGN_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real data beside the checkout (set CHATALIGN_SHARED_DATA)")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """ChatML with generation markers."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A saved tiny Llama with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_llama(len(tiny_tokenizer)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder
