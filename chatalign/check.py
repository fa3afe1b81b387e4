"""Everything that can be known before training: ``chatalign check``, and what every launch refuses first.

No model is loaded here and no torch imported, except by :func:`tokenizer_finding`, which comes last.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from chatalign.artifact import ARTIFACT_FILE
from chatalign.errors import ArtifactError, ChatalignError, DataError, DependencyError, ModelError, RecipeError
from chatalign.recipe import DataSection, DatasetSource, ModelSection, Recipe
from chatalign.runs import RUN_FILE, model_inputs

Kind = Literal["conversation", "text", "preference", "prompt", "unpaired"]
LookedAt = dict[tuple[str, Kind], list[str]]  # a data section as JSON and its kind of row → the problems of its rows
STAGE_DATA: dict[str, Kind] = {
    "pretrain": "text",
    "sft": "conversation",
    "reward": "preference",
    "dpo": "preference",
    "ppo": "prompt",
    "kto": "unpaired",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was checked. `problem` is None where it is right, else the error that a launch would raise."""

    what: str
    problem: ChatalignError | None = None


def check_recipe(
    recipe: Recipe, *, made_later: frozenset[str] = frozenset(), looked_at: LookedAt | None = None
) -> Iterator[Finding]:
    """Check a validated recipe's packages, models, functions and rows, cheapest first.

    `made_later` holds folders that stages of the same pipeline will make. `looked_at` is given to all of them, so
    that rows which two stages read alike are read once.
    """
    yield from _packages(recipe)
    for role, section in model_inputs(recipe).items():
        yield _model(role, section, made_later)
    if getattr(recipe, "pretrained", None) and not getattr(recipe, "from_scratch", False):
        yield _model("pretrained", ModelSection(name_or_path=recipe.pretrained), made_later)  # type: ignore[union-attr]
    for name in _functions(recipe):
        yield _function(name)
    yield _output(recipe)
    yield from _rows(recipe, {} if looked_at is None else looked_at)


def refuse_first(
    recipe: Recipe, *, made_later: frozenset[str] = frozenset(), looked_at: LookedAt | None = None
) -> None:
    """Raise the first problem of :func:`check_recipe`."""
    for finding in check_recipe(recipe, made_later=made_later, looked_at=looked_at):
        if finding.problem is not None:
            raise finding.problem


def _packages(recipe: Recipe) -> Iterator[Finding]:
    train = getattr(recipe, "train", None)
    needed = {
        "trl": getattr(recipe, "engine", "native") == "trl" or recipe.stage == "kto",
        "bitsandbytes": getattr(recipe, "quantization", None) is not None
        or any(name in getattr(train, "optim", "") for name in ("bnb", "8bit", "paged")),
        "liger_kernel": bool(getattr(train, "use_liger_kernel", False)),
        "vllm": getattr(getattr(recipe, "ppo", None), "rollout_engine", "") == "vllm_colocate",
        "evaluate": bool(getattr(getattr(recipe, "eval", None), "metrics", [])),
        recipe.tracking: recipe.tracking != "none",
    }
    extras = {"bitsandbytes": "quantization", "liger_kernel": "gpu"}
    for package, wanted in needed.items():
        if not wanted:
            continue
        missing = find_spec(package) is None
        mend = f"this recipe needs the package {package}; pip install 'chatalign[{extras.get(package, package)}]'"
        yield Finding(f"package {package} is installed", DependencyError(mend) if missing else None)


def _model(role: str, section: ModelSection, made_later: frozenset[str]) -> Finding:
    name = section.name_or_path or ""
    what = f"`{role}`: {name}"
    place = Path(name)
    if name in made_later:
        return Finding(f"{what} is made by an earlier stage")
    if not place.exists():
        return Finding(what, _missing_folder(role, name) if _looks_local(name) else None)
    if (place / RUN_FILE).exists() and not (place / ARTIFACT_FILE).exists():
        mend = f"`{role}: {name}` is a run that isn't finished; run `chatalign {{stage}} {place / 'recipe.yaml'}` first"
        return Finding(what, ArtifactError(mend.replace("{stage}", _stage_of(place))))
    files = ("config.json", "adapter_config.json", ARTIFACT_FILE)
    if not any((place / file).exists() for file in files):
        return Finding(what, ModelError(f"`{role}: {name}` holds no model (none of {', '.join(files)} is there)"))
    return Finding(what)


def _stage_of(run_folder: Path) -> str:
    import yaml

    recipe = yaml.safe_load((run_folder / "recipe.yaml").read_text("utf-8"))
    return str(recipe.get("stage", "STAGE"))


def _looks_local(name: str) -> bool:
    """A Hub id is ``name`` or ``owner/name``; anything else, or a path into a folder that exists, is local."""
    parts = Path(name).parts
    return name.startswith((".", "/", "~")) or len(parts) > 2 or (len(parts) == 2 and Path(parts[0]).is_dir())


def _missing_folder(role: str, name: str) -> ModelError:
    parent = Path(name).parent
    siblings = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    near = difflib.get_close_matches(Path(name).name, siblings, n=1)
    hint = f"did you mean {parent / near[0]}?" if near else "run the stage that makes it first, or give a Hub id"
    return ModelError(f"`{role}: {name}`: no such folder; {hint}")


def _functions(recipe: Recipe) -> list[str]:
    named = [reward.function for reward in getattr(getattr(recipe, "ppo", None), "rewards", [])]
    named.append(getattr(getattr(recipe, "eval", None), "gold", None))
    return [name for name in named if name]


def _function(name: str) -> Finding:
    """A ``file.py:name`` reference, read and not run."""
    what = f"function {name}"
    file, _, function = name.rpartition(":")
    try:
        tree = ast.parse(Path(file).read_text("utf-8"))
    except FileNotFoundError:
        return Finding(what, RecipeError(f"{name}: no such file; give path/to/file.py:name"))
    except SyntaxError as error:
        return Finding(what, RecipeError(f"{file}:{error.lineno}: not valid Python ({error.msg})"))
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    if function not in defined:
        return Finding(what, RecipeError(f"{file}: has no function `{function}`; it has {', '.join(defined)}"))
    return Finding(what)


def _output(recipe: Recipe) -> Finding:
    folder = Path(recipe.output_dir)
    ours = not folder.exists() or not any(folder.iterdir()) or (folder / RUN_FILE).exists()
    ours = ours or (folder / ARTIFACT_FILE).exists()
    mend = f"`output_dir: {folder}` holds files that are no chatalign run; give another folder"
    return Finding(f"`output_dir`: {folder}", None if ours else RecipeError(mend))


def _rows(recipe: Recipe, looked_at: LookedAt) -> Iterator[Finding]:
    from chatalign.data.checks import check_data
    from chatalign.data.sources import looks_local

    for section, kind in data_sections(recipe):
        names = ", ".join(source.path for source in section.datasets)
        if not any(Path(source.path).exists() or looks_local(source.path) for source in section.datasets):
            yield Finding(f"rows of {names} as {kind}: on the Hub, not looked at before the run")
            continue
        alike = (section.model_dump_json(), kind)
        if alike not in looked_at:
            looked_at[alike] = check_data(section, kind)
        problems = looked_at[alike]
        more = f" ({len(problems) - 1} more such problems)" if len(problems) > 1 else ""
        yield Finding(f"rows of {names} as {kind}", DataError(problems[0] + more) if problems else None)


def data_sections(recipe: Recipe) -> list[tuple[DataSection, Kind]]:
    """Every source of rows in a recipe, with the kind of row that its stage reads."""
    sections: list[tuple[DataSection, Kind]] = []
    if recipe.stage == "pretrain" and getattr(recipe, "pretrained", None) and not getattr(recipe, "from_scratch", True):
        return sections  # the finished model is taken: its corpus need not be here
    if recipe.stage in STAGE_DATA:
        sections.append((recipe.data, STAGE_DATA[recipe.stage]))  # type: ignore[union-attr]
    if getattr(recipe, "ptx_data", None) is not None:
        sections.append((recipe.ptx_data, "text"))  # type: ignore[union-attr, arg-type]
    evaluation = getattr(recipe, "eval", None)
    parts: list[tuple[DatasetSource | None, Kind]] = []
    if evaluation is not None:
        parts = [(evaluation.prompts, "prompt"), (evaluation.pairs, "preference"), (evaluation.texts, "text")]
    sections += [(DataSection(datasets=[source]), kind) for source, kind in parts if source is not None]
    return sections


def tokenizer_finding(recipe: Recipe) -> Finding | None:
    """Whether the first rows tokenize with an exact mask; None where the tokenizer isn't on this machine."""
    section = getattr(recipe, "model", None)
    name = getattr(section, "tokenizer_name_or_path", None) or getattr(section, "name_or_path", None)
    if section is None or not name or not Path(name).exists() or recipe.stage not in STAGE_DATA:
        return None
    from chatalign.data import prepare
    from chatalign.models.load import load_tokenizer

    what = f"the first rows as {name} tokenizes them"
    if not data_sections(recipe):
        return None
    data, kind = data_sections(recipe)[0]
    few = [source.model_copy(update={"max_rows": min(source.max_rows or 64, 64)}) for source in data.datasets]
    try:
        # Of so few rows no share can be judged: neither eval_fraction's nor that of rows cut by max_length.
        update = {"datasets": few, "eval_datasets": [], "eval_fraction": 0.0, "max_length": 1 << 20}
        prepare(data.model_copy(update=update), load_tokenizer(section), kind, seed=0)
    except ChatalignError as error:
        return Finding(what, error)
    return Finding(what)
