"""Recipes: YAML in, frozen and validated values out. Light: pydantic and PyYAML, no torch.

The classes are imported on first use (PEP 562): a misspelt key is refused without pydantic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chatalign.recipe.load import (
    apply_overrides,
    load_pipeline,
    load_recipe,
    parse_overrides,
    read_yaml,
    validate_stage,
)

if TYPE_CHECKING:
    from chatalign.recipe.methods import (
        DpoSection,
        EvalSection,
        KtoSection,
        PpoSection,
        RewardFunction,
        RewardSection,
    )
    from chatalign.recipe.sections import (
        CleanSection,
        DataSection,
        DatasetSource,
        HubSection,
        LoraSection,
        ModelSection,
        QuantizationSection,
        Section,
        TrainSection,
    )
    from chatalign.recipe.stages import (
        STAGES,
        DpoRecipe,
        EvalRecipe,
        KtoRecipe,
        PipelineRecipe,
        PipelineStage,
        PpoRecipe,
        PretrainRecipe,
        Recipe,
        RewardRecipe,
        SftRecipe,
        StageRecipe,
    )

__all__ = [
    "STAGES",
    "CleanSection",
    "DataSection",
    "DatasetSource",
    "DpoRecipe",
    "DpoSection",
    "EvalRecipe",
    "EvalSection",
    "HubSection",
    "KtoRecipe",
    "KtoSection",
    "LoraSection",
    "ModelSection",
    "PipelineRecipe",
    "PipelineStage",
    "PpoRecipe",
    "PpoSection",
    "PretrainRecipe",
    "QuantizationSection",
    "Recipe",
    "RewardFunction",
    "RewardRecipe",
    "RewardSection",
    "Section",
    "SftRecipe",
    "StageRecipe",
    "TrainSection",
    "apply_overrides",
    "load_pipeline",
    "load_recipe",
    "parse_overrides",
    "read_yaml",
    "validate_stage",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'chatalign.recipe' has no attribute {name!r}")
    from chatalign.recipe import methods, sections, stages

    return getattr(next(module for module in (stages, methods, sections) if hasattr(module, name)), name)
