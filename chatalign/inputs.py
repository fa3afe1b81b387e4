"""What a run depends on: its recipe, the runs and models that it starts from, its rows and functions, this version.

One JSON-able value, kept in ``run.json``; its hash is the run's fingerprint. Light: no torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chatalign import __version__
from chatalign.artifact import (
    ARTIFACT_FILE,
    RUN_FILE,
    BaseModelRef,
    Parent,
    fingerprint,
    load_artifact,
    sha256_file,
    sha256_weights,
)
from chatalign.recipe import DatasetSource, ModelSection, Recipe

Inputs = dict[str, Any]
# Dotted keys that change no byte of what a run makes: its place and reporting, how long and with how many hands.
NOT_IN_FINGERPRINT = (
    "output_dir",
    "tracking",
    "hub",
    "run_name",
    "train.max_hours",
    "train.dataloader_num_workers",
    "data.num_proc",
    "ptx_data.num_proc",
)


def run_inputs(recipe: Recipe) -> Inputs:
    """What the result of a recipe's run depends on, from the files as they are now.

    ``recipe`` without :data:`NOT_IN_FINGERPRINT`; ``parents`` by role, each a run id and a fingerprint; the sha256 of
    ``models`` by role (of templates and tokenizers by path); ``data`` and ``functions``, each with its key in the
    recipe, path and sha256 (a Hub name stands for itself); and ``chatalign``, the version.
    Raises ArtifactError where a parent is unfinished.
    """
    settings = recipe.model_dump(mode="json")
    for key in NOT_IN_FINGERPRINT:
        within, _, name = key.rpartition(".")
        ((settings.get(within) or {}) if within else settings).pop(name, None)
    parents = {p.role: {"run_id": p.run_id, "fingerprint": p.fingerprint} for p in parents_of(recipe)}
    models: dict[str, str | None] = {}
    for role, section in model_inputs(recipe).items():
        if role in parents:  # the parent's fingerprint stands for it, wherever its folder is
            _drop_path(settings, role)
        elif Path(section.name_or_path or "").is_dir():
            models[role] = sha256_weights(section.name_or_path or "")
    sections = [*model_inputs(recipe).values(), getattr(recipe, "model", None)]
    for path in {path for s in sections if s for path in (s.chat_template_path, s.tokenizer_name_or_path) if path}:
        models[path] = _content(path)
    if pretrained := getattr(recipe, "pretrained", None):
        models["pretrained"] = sha256_weights(pretrained)
    return {
        "recipe": settings,
        "parents": parents,
        "models": models,
        "data": [_read(key, source.path) for key, source in data_sources(recipe)],
        "functions": [_read(key, path) for key, path in _function_files(recipe)],
        "chatalign": __version__,
    }


def inputs_fingerprint(inputs: Mapping[str, Any]) -> str:
    """The hash of :func:`run_inputs`: of what was read, wherever it lay and whichever run made it."""
    read = {name: [one["sha256"] for one in inputs[name]] for name in ("data", "functions")}
    parents = {role: parent["fingerprint"] for role, parent in inputs["parents"].items()}
    return fingerprint({**inputs, **read, "parents": parents})


def recipe_fingerprint(recipe: Recipe) -> str:
    """The fingerprint of the run that `recipe` describes, from the files as they are now."""
    return inputs_fingerprint(run_inputs(recipe))


def model_inputs(recipe: Recipe) -> dict[str, ModelSection]:
    """The models that a recipe starts from, by role."""
    inputs: dict[str, ModelSection] = {}
    for role in ("model", "reward_model", "value_model"):
        section = getattr(recipe, role, None)
        if section is not None and section.name_or_path:
            inputs[role] = section
    for name, section in getattr(recipe, "models", {}).items():
        inputs[name] = section
    for i, reward in enumerate(getattr(getattr(recipe, "ppo", None), "rewards", [])):
        if reward.model:
            inputs[f"reward_{i}"] = ModelSection(name_or_path=reward.model)
    return inputs


def data_sources(recipe: Recipe) -> Iterator[tuple[str, DatasetSource]]:
    """Every source of rows that a recipe names, after its dotted key."""
    for name in ("data", "ptx_data"):
        if (section := getattr(recipe, name, None)) is not None:
            yield from ((f"{name}.datasets.{i}", source) for i, source in enumerate(section.datasets))
            yield from ((f"{name}.eval_datasets.{i}", source) for i, source in enumerate(section.eval_datasets))
    if (section := getattr(recipe, "eval", None)) is not None:
        for name in ("prompts", "pairs", "texts"):
            if (source := getattr(section, name)) is not None:
                yield f"eval.{name}", source


def parents_of(recipe: Recipe) -> list[Parent]:
    """The chatalign runs among a recipe's model inputs; raises ArtifactError where one is unfinished."""
    parents = []
    for role, section in model_inputs(recipe).items():
        folder = Path(section.name_or_path or "")
        if (folder / RUN_FILE).is_file() or (folder / ARTIFACT_FILE).is_file():
            artifact = load_artifact(folder)
            parents.append(
                Parent(role=role, path=str(folder), run_id=artifact.run_id, fingerprint=artifact.fingerprint)
            )
    return parents


def base_model(section: ModelSection, inputs: Inputs) -> BaseModelRef | None:
    """The model that a run trains: name, revision, and its weights' sha256 where it is a folder or a run."""
    if section.name_or_path is None:
        return None
    sha256 = inputs["models"].get("model")
    if "model" in inputs["parents"]:
        files = load_artifact(section.name_or_path).files.items()
        sha256 = fingerprint({Path(name).name: found for name, found in files if name.endswith(".safetensors")})
    revision = None if Path(section.name_or_path).is_dir() else section.revision
    return BaseModelRef(name_or_path=section.name_or_path, revision=revision, sha256=sha256)


def _drop_path(settings: dict[str, Any], role: str) -> None:
    for place in (settings.get(role), (settings.get("models") or {}).get(role)):
        if isinstance(place, dict):
            place["name_or_path"] = role


def _function_files(recipe: Recipe) -> Iterator[tuple[str, str]]:
    rewards = getattr(getattr(recipe, "ppo", None), "rewards", [])
    named = [(f"ppo.rewards.{i}.function", reward.function) for i, reward in enumerate(rewards)]
    named.append(("eval.gold", getattr(getattr(recipe, "eval", None), "gold", None)))
    return ((key, name.rpartition(":")[0]) for key, name in named if name)


def _read(key: str, path: str) -> dict[str, str]:
    return {"key": key, "path": path, "sha256": _content(path)}


def _content(path: str) -> str:
    """What stands for a source in a fingerprint: its files' hash, or its Hub name."""
    place = Path(path)
    if place.is_file():
        return sha256_file(place)
    if place.is_dir():
        files = {p.relative_to(place).as_posix(): sha256_file(p) for p in place.rglob("*") if p.is_file()}
        return fingerprint(files)
    return path
