"""``--force`` and ``--allow-change`` of a pipeline: what becomes of its stages' unfinished runs of other inputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatalign import checkpoint
from chatalign.artifact import ARTIFACT_FILE, CHECKPOINTS
from chatalign.check.launch import launch_of_config
from chatalign.errors import RecipeError
from chatalign.inputs import model_inputs
from chatalign.launch import refuse_problems, say
from chatalign.recipe import Recipe
from chatalign.runs import finished, locked
from chatalign.unfinished import is_finished, judged, settle


def by_stage(allow: Collection[str], names: Collection[str]) -> dict[str, list[str]]:
    """``["sft.train.learning_rate"]`` → ``{"sft": ["train.learning_rate"]}``; RecipeError where no stage is named."""
    keys: dict[str, list[str]] = {}
    for key in allow:
        name, _, rest = key.partition(".")
        if name not in names or not rest:
            example = f"{next(iter(names))}.train.learning_rate"
            raise RecipeError(f"--allow-change {key}: begin with a stage's name ({', '.join(names)}), as in {example}")
        keys.setdefault(name, []).append(rest)
    return keys


@dataclass(frozen=True, kw_only=True)
class Permits:
    """What may become of unfinished runs of other inputs, for the stages of one command.

    `allow` are the named keys by stage, `accelerate_config` the file that stages are launched with.
    """

    stages: Mapping[str, Recipe]
    force: bool
    allow: Mapping[str, list[str]]
    accelerate_config: str | Path | None = None

    def refuse(self) -> None:
        """Raise ChangedRunError for the first stage that would be refused, before any runs.

        A stage whose inputs are still to be made is left for its turn: what it starts from isn't known yet.
        """
        folders = [Path(recipe.output_dir) for recipe in self.stages.values()]
        if self.force or not any(_is_unfinished(folder) for folder in folders):
            return
        to_come: set[str] = set()
        for name, recipe in self.stages.items():
            sources = {section.name_or_path for section in model_inputs(recipe).values()}
            if sources & to_come:
                to_come.add(recipe.output_dir)
            elif finished(recipe) is None:
                to_come.add(recipe.output_dir)
                judged(recipe, made_here=self._made_here, **self._judging(name))

    def make_way(self, name: str) -> None:
        """Settle what an earlier run means for a stage whose turn it is, and say what was done about it.

        A finished run of other inputs stays in its place where the new one couldn't begin.
        """
        recipe = self.stages[name]
        if (Path(recipe.output_dir) / ARTIFACT_FILE).exists():  # not looked at before the first stage, and moved aside
            refuse_problems(recipe)
        with locked(recipe.output_dir):
            line = settle(recipe, force=self.force, made_here=self._made_here, **self._judging(name))
        if line:
            say(line)

    @property
    def _made_here(self) -> frozenset[str]:
        return frozenset(recipe.output_dir for recipe in self.stages.values())

    def _judging(self, name: str) -> dict[str, Any]:
        processes: int | None = 1
        if self.accelerate_config is not None and self.stages[name].stage != "eval":
            there = Path(self.accelerate_config).is_file()  # the launcher says so where it isn't
            processes = launch_of_config(self.accelerate_config).processes if there else None
        return {"processes": processes, "allow": self.allow.get(name, []), "stage": f"{name}."}


def _is_unfinished(folder: Path) -> bool:
    return bool(checkpoint.list_checkpoints(folder / CHECKPOINTS)) and not is_finished(folder)
