"""One real run of the quickstart, shared by every test here and by the README's commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Workspace:
    """A copy of what a user's clone holds, and a shell in it."""

    folder: Path

    def shell(self, command: str, *, timeout: int = 900, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a shell command in the workspace with this environment's programs on the path."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        settings = {**os.environ, "PATH": path, "COLUMNS": "160", **environment}
        return subprocess.run(
            command,
            shell=True,
            cwd=self.folder,
            env=settings,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Workspace:
    folder = tmp_path_factory.mktemp("clone")
    for name in ("recipes", "data", "accelerate_configs"):
        shutil.copytree(root / name, folder / name)
    return Workspace(folder)


@pytest.fixture(scope="session")
def quickstart(workspace: Workspace) -> subprocess.CompletedProcess[str]:
    """`make quickstart` after its set-up: the finished process."""
    done = workspace.shell("chatalign run recipes/quickstart.yaml")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done
