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
    from chatalign.recipe.sections import (
        CleanSection,
        DataSection,
        DatasetSource,
        DpoSection,
        EvalSection,
        HubSection,
        KtoSection,
        LoraSection,
        ModelSection,
        PpoSection,
        QuantizationSection,
        RewardFunction,
        RewardSection,
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
    from chatalign.recipe import sections, stages

    return getattr(stages if hasattr(stages, name) else sections, name)
