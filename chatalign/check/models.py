"""Whether the packages, models and functions that a recipe names are there."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from chatalign.artifact import ARTIFACT_FILE, RUN_FILE
from chatalign.check.findings import Finding
from chatalign.errors import ArtifactError, DependencyError, ModelError, RecipeError
from chatalign.inputs import model_inputs
from chatalign.recipe import ModelSection, Recipe


def package_findings(recipe: Recipe) -> Iterator[Finding]:
    """Whether the optional packages that a recipe needs are installed."""
    train = getattr(recipe, "train", None)
    sections = [getattr(recipe, name, None) for name in ("data", "ptx_data")]
    cleans = [section.clean for section in sections if section and section.clean]
    needed = {
        "trl": getattr(recipe, "engine", "native") == "trl" or recipe.stage == "kto",
        "bitsandbytes": getattr(recipe, "quantization", None) is not None
        or any(name in getattr(train, "optim", "") for name in ("bnb", "8bit", "paged")),
        "liger_kernel": bool(getattr(train, "use_liger_kernel", False)),
        "vllm": getattr(getattr(recipe, "ppo", None), "rollout_engine", "") == "vllm_colocate",
        "evaluate": bool(getattr(getattr(recipe, "eval", None), "metrics", [])),
        "datasketch": any(clean.near_duplicates for clean in cleans),
        "py3langid": any(clean.languages for clean in cleans),
        recipe.tracking: recipe.tracking != "none",
    }
    extras = {"bitsandbytes": "quantization", "liger_kernel": "gpu", "datasketch": "clean", "py3langid": "clean"}
    for package, wanted in needed.items():
        if not wanted:
            continue
        missing = find_spec(package) is None
        mend = f"this recipe needs the package {package}; pip install 'chatalign[{extras.get(package, package)}]'"
        yield Finding("packages", f"package {package} is installed", DependencyError(mend) if missing else None)


def model_findings(recipe: Recipe, made_later: frozenset[str]) -> Iterator[Finding]:
    """Whether the models that a recipe starts from are there; `made_later` are folders of earlier stages."""
    for role, section in model_inputs(recipe).items():
        yield _model(role, section, made_later)
    if getattr(recipe, "pretrained", None) and not getattr(recipe, "from_scratch", False):
        yield _model("pretrained", ModelSection(name_or_path=recipe.pretrained), made_later)  # type: ignore[union-attr]


def _model(role: str, section: ModelSection, made_later: frozenset[str]) -> Finding:
    name = section.name_or_path or ""
    what = f"`{role}`: {name}"
    place = Path(name)
    if name in made_later:
        return Finding("models", f"{what} is made by an earlier stage")
    if not place.exists():
        return Finding("models", what, _missing_folder(role, name) if _looks_local(name) else None)
    if (place / RUN_FILE).exists() and not (place / ARTIFACT_FILE).exists():
        mend = f"`{role}: {name}` is a run that isn't finished; run `chatalign {{stage}} {place / 'recipe.yaml'}` first"
        return Finding("models", what, ArtifactError(mend.replace("{stage}", _stage_of(place))))
    files = ("config.json", "adapter_config.json", ARTIFACT_FILE)
    if not any((place / file).exists() for file in files):
        return Finding(
            "models", what, ModelError(f"`{role}: {name}` holds no model (none of {', '.join(files)} is there)")
        )
    return Finding("models", what)


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


def function_findings(recipe: Recipe) -> Iterator[Finding]:
    """Whether the Python functions that a recipe names are there."""
    named = [reward.function for reward in getattr(getattr(recipe, "ppo", None), "rewards", [])]
    named.append(getattr(getattr(recipe, "eval", None), "gold", None))
    yield from (_function(name) for name in named if name)


def _function(name: str) -> Finding:
    """A ``file.py:name`` reference, read and not run."""
    what = f"function {name}"
    file, _, function = name.rpartition(":")
    try:
        tree = ast.parse(Path(file).read_text("utf-8"))
    except FileNotFoundError:
        return Finding("functions", what, RecipeError(f"{name}: no such file; give path/to/file.py:name"))
    except SyntaxError as error:
        return Finding("functions", what, RecipeError(f"{file}:{error.lineno}: not valid Python ({error.msg})"))
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    if function not in defined:
        return Finding(
            "functions", what, RecipeError(f"{file}: has no function `{function}`; it has {', '.join(defined)}")
        )
    return Finding("functions", what)
