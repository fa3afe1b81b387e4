"""The pocket scripts import each other by bare name, as scripts in one folder do; here they are put on the path."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

POCKET = Path(__file__).resolve().parents[2] / "data" / "pocket"
MODULES = ("gold", "lexicon", "world", "replies", "corpus", "make_pocket", "frontier_report", "frontier")


@pytest.fixture(scope="session")
def pocket():
    """The pocket modules under their names, and the folder."""
    sys.path.insert(0, str(POCKET))
    try:
        modules = {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(str(POCKET))
    return SimpleNamespace(folder=POCKET, **modules)
