"""Fixtures of the model tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from model_cases import train_adapter


@pytest.fixture(scope="session")
def sft_adapter(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """An adapter's folder, as an SFT stage leaves it."""
    return train_adapter(tiny_model_folder, tmp_path_factory.mktemp("sft") / "model")
