"""From a YAML file and ``key=value`` overrides to a frozen recipe, or to one line that says what is wrong.

YAML is safe-loaded; nothing in a recipe is executed. ``extends:`` takes another recipe as its base, relative to
the file that names it. Paths inside recipes are relative to the working directory, as in Hugging Face's scripts.
Keys are checked first, by the shipped schema; the recipe's classes, and pydantic with them, are imported for values.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatalign.errors import RecipeError
from chatalign.recipe.schema import STAGE_NAMES, Keys, UnknownKey

if TYPE_CHECKING:
    from pydantic import ValidationError

    from chatalign.recipe.sections import Section
    from chatalign.recipe.stages import PipelineRecipe, Recipe


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, with ``extends`` resolved; raises RecipeError with file and line."""
    return _read(Path(path), seen=())


def _read(path: Path, *, seen: tuple[Path, ...]) -> dict[str, Any]:
    from chatalign.recipe.yaml_loader import YAMLError, parse_yaml

    if path.resolve() in seen:
        raise RecipeError(f"{path}: `extends` goes round in a circle; take one of them out")
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else "; give the path of a recipe file"
        raise RecipeError(f"{path}: no such recipe{hint}") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not a UTF-8 YAML file ({error}); give the path of a recipe file") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values; this file holds {type(raw).__name__}")
    base_name = raw.pop("extends", None)
    if base_name is None:
        return raw
    base = _read(path.parent / str(base_name), seen=(*seen, path.resolve()))
    return merge(base, raw)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid upon `base`: mappings key by key, everything else replaced; ``null`` takes a section out."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def parse_overrides(items: Iterable[str]) -> dict[str, Any]:
    """``["train.learning_rate=1e-4"]`` → ``{"train.learning_rate": 0.0001}``; values are read as YAML."""
    from chatalign.recipe.yaml_loader import YAMLError, parse_yaml

    overrides: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise RecipeError(f"`{item}` is not key=value; write it like train.learning_rate=1e-4")
        try:
            overrides[key.strip()] = parse_yaml(text)
        except YAMLError:
            raise RecipeError(f"`{item}`: the value is not valid YAML; put it in quotes") from None
    return overrides


def apply_overrides(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `raw` with dotted keys set; list entries go by number (``data.datasets.0.path``)."""
    changed = _copy(raw)
    for dotted, value in overrides.items():
        place: Any = changed
        *parents, last = dotted.split(".")
        for part in parents:
            if isinstance(place, list):
                place = place[_list_index(place, part, dotted)]
            elif isinstance(place.get(part), dict | list):
                place = place[part]
            else:
                place[part] = {}
                place = place[part]
        if isinstance(place, list):
            place[_list_index(place, last, dotted)] = value
        else:
            place[last] = value
    return changed


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value


def _list_index(items: list[Any], part: str, dotted: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise RecipeError(f"`{dotted}`: `{part}` must be a number below {len(items)}, the length of that list")
    return int(part)


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None, *, stage: str | None = None) -> Recipe:
    """The recipe of one stage, read, overridden and validated.

    `stage`, where given, is the stage that the caller runs; another one in the file is an error.
    Raises RecipeError naming file, key, what is wrong and the nearest right name.
    """
    raw = apply_overrides(read_yaml(path), overrides or {})
    if "pipeline" in raw:
        raise RecipeError(f"{path}: this is a pipeline; run it with `chatalign run {path}`")
    return validate_stage(raw, where=str(path), stage=stage)


def validate_stage(raw: Mapping[str, Any], *, where: str, stage: str | None = None) -> Recipe:
    """Validate a raw mapping as the recipe of its ``stage``; `where` names its origin in errors."""
    named = raw.get("stage")
    if named not in STAGE_NAMES:
        near = difflib.get_close_matches(str(named), STAGE_NAMES, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else f"; give one of {', '.join(STAGE_NAMES)}"
        raise RecipeError(f"{where}: `stage: {named}` is not a stage{hint}")
    if stage is not None and named != stage:
        raise RecipeError(f"{where}: this is a {named} recipe; run it with `chatalign {named} {where}`")
    _refuse_unknown_keys(named, raw, where)
    from chatalign.recipe.stages import STAGES

    return _validate(STAGES[named], raw, where)  # type: ignore[return-value]


def load_pipeline(path: str | Path, overrides: Mapping[str, Any] | None = None) -> PipelineRecipe:
    """A pipeline recipe; ``STAGE.key=value`` overrides go to that stage, others to the pipeline itself."""
    raw = read_yaml(path)
    if "pipeline" not in raw:
        raise RecipeError(f"{path}: not a pipeline (no `pipeline:` name); run it with `chatalign {raw.get('stage')}`")
    for dotted, value in (overrides or {}).items():
        first, _, rest = dotted.partition(".")
        stages = raw.get("stages")  # of this turn's raw: the one before may have been copied
        if isinstance(stages, dict) and rest and isinstance(stages.get(first), dict):
            stages[first].setdefault("overrides", {})[rest] = value
        else:
            raw = apply_overrides(raw, {dotted: value})
    _refuse_unknown_keys("pipeline", raw, str(path))
    from chatalign.recipe.stages import PipelineRecipe

    recipe = _validate(PipelineRecipe, raw, str(path))
    assert isinstance(recipe, PipelineRecipe)
    _check_chain(recipe, str(path))
    return recipe


def _check_chain(recipe: PipelineRecipe, where: str) -> None:
    """Every input that looks like a stage's name is an earlier stage."""
    earlier: list[str] = []
    for name, stage in recipe.stages.items():
        single = [(key, getattr(stage, key)) for key in ("model", "reward_model", "value_model")]
        for key, source in single + [("models", source) for source in stage.models]:
            if source is None or source in earlier or "/" in source or Path(source).exists():
                continue
            near = difflib.get_close_matches(source, earlier, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"earlier stages are: {', '.join(earlier) or 'none'}"
            raise RecipeError(f"{where}: `stages.{name}.{key}: {source}` is no earlier stage, folder or Hub id; {hint}")
        earlier.append(name)


def _refuse_unknown_keys(name: str, raw: Mapping[str, Any], where: str) -> None:
    """Before any value is looked at: a misspelt key is often the cause of what is wrong with the others."""
    keys = Keys(name)
    if unknown := keys.unknown(raw):
        problem = f"`{unknown[0].dotted}` is not a recipe key; {_nearest(unknown[0], keys)}"
        raise RecipeError(f"{where}: {problem}{_more(len(unknown) - 1)}")


def _nearest(unknown: UnknownKey, keys: Keys) -> str:
    """The key of the recipe that looks most like the unknown one: in the same section first, then anywhere."""
    name = unknown.dotted.rpartition(".")[2]
    siblings = {key.rpartition(".")[2]: key for key in unknown.siblings}
    if near := difflib.get_close_matches(name, list(siblings), n=1):
        return f"did you mean `{siblings[near[0]]}`?"
    if starts := [sibling for sibling in siblings if name.startswith(sibling) or sibling.startswith(name)]:
        return f"did you mean `{siblings[max(starts, key=len)]}`?"
    elsewhere = {key.rpartition(".")[2]: key for key in keys.known()}
    if name in elsewhere:
        return f"did you mean `{elsewhere[name]}`?"
    if near := difflib.get_close_matches(name, list(elsewhere), n=1):
        return f"did you mean `{elsewhere[near[0]]}`?"
    return f"keys here are: {', '.join(sorted(siblings)) or 'none'}"


def _validate(model: type[Section], raw: Mapping[str, Any], where: str) -> Section:
    from pydantic import ValidationError

    try:
        return model.model_validate(dict(raw))
    except ValidationError as error:
        raise RecipeError(f"{where}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    """The first problem in one line."""
    problems = error.errors()
    problem = problems[0]
    dotted = ".".join(str(part) for part in problem["loc"])
    more = _more(len(problems) - 1)
    if problem["type"] == "missing":
        return f"`{dotted}` is missing; add it{more}"
    message = problem["msg"].removeprefix("Value error, ")
    place = f"`{dotted}`: " if dotted else ""
    value = problem.get("input")
    shown = f" (it is {value!r})" if dotted and not isinstance(value, dict | list) else ""
    return f"{place}{message}{shown}{more}"


def _more(problems: int) -> str:
    return f" ({problems} more problem{'s' if problems > 1 else ''} after this one)" if problems else ""
