"""The recipe of each stage, and of a pipeline: sections put together, with what must not contradict."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from chatalign.recipe.methods import DpoSection, EvalSection, KtoSection, PpoSection, RewardSection
from chatalign.recipe.sections import (
    DataSection,
    HubSection,
    LoraSection,
    ModelSection,
    QuantizationSection,
    Section,
    TrainSection,
)

Tracking = Literal["none", "wandb", "tensorboard", "trackio"]
Engine = Literal["native", "trl"]


class StageRecipe(Section):
    """What every training stage has."""

    stage: str
    output_dir: str
    model: ModelSection = ModelSection.model_construct()
    quantization: QuantizationSection | None = None
    lora: LoraSection | None = None
    data: DataSection
    train: TrainSection = TrainSection.model_construct()
    tracking: Tracking = "none"
    run_name: str | None = None
    hub: HubSection = HubSection.model_construct()

    @model_validator(mode="after")
    def _quantized_base_is_frozen(self) -> Self:
        if self.quantization and not self.lora and self.stage in ("pretrain", "sft"):
            raise ValueError("`quantization` freezes the base: add a `lora` section to train (QLoRA)")
        return self

    @model_validator(mode="after")
    def _no_dropout_where_models_are_compared(self) -> Self:
        if self.stage not in ("pretrain", "sft") and self.lora and self.lora.lora_dropout:
            raise ValueError(f"`lora.lora_dropout` must be 0 in {self.stage}: it makes scores and logprobs noise")
        return self

    @model_validator(mode="after")
    def _levers_that_the_engine_has(self) -> StageRecipe:
        train = self.train
        if self.stage == "kto" or getattr(self, "engine", "native") == "trl":
            if train.gradient_checkpointing == "auto":
                raise ValueError("`train.gradient_checkpointing: auto` is the native engine's; give TRL true or false")
            if self.model.attention != "auto":
                raise ValueError("`model.attention` is the native engine's; leave it out where TRL trains")
            if self.train.fused_layers:
                raise ValueError("`train.fused_layers` is the native engine's; leave it out where TRL trains")
            return self
        for name, given in (train.liger_kernel_config or {}).items():
            if given and name.endswith("cross_entropy"):
                raise ValueError(
                    f"`train.liger_kernel_config.{name}` would replace the native engine's own loss; take it out"
                )
        if self.stage == "ppo":
            refused = {
                "torch_compile": train.torch_compile,
                "use_liger_kernel": bool(train.use_liger_kernel),
                "activation_offloading": train.activation_offloading,
                "gradient_checkpointing: auto": train.gradient_checkpointing == "auto",
            }
            for name, given in refused.items():
                if given:
                    raise ValueError(f"`train.{name}` is not available in ppo, whose layers also decode; take it out")
        return self


class PretrainRecipe(StageRecipe):
    """Next-token training on plain text, from nothing or from a model.

    ``pretrained`` names the finished model that this recipe made; it is taken instead of training unless
    ``from_scratch`` is true, and refused where its weights' hash isn't ``pretrained_sha256``.
    """

    stage: Literal["pretrain"]
    pretrained: str | None = None
    pretrained_sha256: str | None = None
    from_scratch: bool = False


class SftRecipe(StageRecipe):
    """Supervised fine-tuning on demonstrations (Ouyang et al., 2203.02155, step 1)."""

    stage: Literal["sft"]
    engine: Engine = "native"


class RewardRecipe(StageRecipe):
    """A reward model from preference pairs (2203.02155, step 2, equation 1)."""

    stage: Literal["reward"]
    reward: RewardSection = RewardSection.model_construct()
    engine: Engine = "native"


class DpoRecipe(StageRecipe):
    """Direct preference optimisation (Rafailov et al., 2305.18290); the reference is the starting policy."""

    stage: Literal["dpo"]
    dpo: DpoSection = DpoSection.model_construct()
    engine: Engine = "native"


class PpoRecipe(StageRecipe):
    """PPO on a reward model or Python rewards (2203.02155, step 3; 2403.17031).

    ``ptx_data`` are the pretraining or demonstration rows mixed in where ``ppo.ptx_coef`` is above 0. ``value_model``
    is a critic with weights of its own, a reward model or a language model; without it `ppo.value` decides.
    """

    stage: Literal["ppo"]
    reward_model: ModelSection | None = None
    value_model: ModelSection | None = None
    ppo: PpoSection = PpoSection.model_construct()
    ptx_data: DataSection | None = None

    @model_validator(mode="after")
    def _something_rewards(self) -> Self:
        if self.reward_model is None and not self.ppo.rewards:
            raise ValueError("PPO needs a reward: give `reward_model` or `ppo.rewards`")
        if (self.ppo.ptx_coef > 0) != (self.ptx_data is not None):
            raise ValueError("`ppo.ptx_coef` above 0 and `ptx_data` go together: give both or neither")
        if self.value_model is not None and self.ppo.value == "shared":
            raise ValueError("`value_model` is a critic of its own, and `ppo.value: shared` has none: take one out")
        return self


class KtoRecipe(StageRecipe):
    """KTO (Ethayarajh et al., 2402.01306) on unpaired feedback, run by TRL."""

    stage: Literal["kto"]
    kto: KtoSection = KtoSection.model_construct()


class EvalRecipe(Section):
    """Measures models side by side: the first of ``models`` named by ``eval.baseline`` is what others are held to."""

    stage: Literal["eval"]
    output_dir: str
    models: dict[str, ModelSection] = {}
    reward_model: ModelSection | None = None
    quantization: QuantizationSection | None = None  # of every model's base, adapters on top
    eval: EvalSection
    tracking: Tracking = "none"


Recipe = PretrainRecipe | SftRecipe | RewardRecipe | DpoRecipe | PpoRecipe | KtoRecipe | EvalRecipe

STAGES: dict[str, type[Section]] = {
    "pretrain": PretrainRecipe,
    "sft": SftRecipe,
    "reward": RewardRecipe,
    "dpo": DpoRecipe,
    "ppo": PpoRecipe,
    "kto": KtoRecipe,
    "eval": EvalRecipe,
}


class PipelineStage(Section):
    """A stage of a pipeline: its recipe, where its inputs come from, and what it changes in the recipe.

    ``model``, ``reward_model``, ``value_model`` and ``models`` take an earlier stage's name, a Hub id or a folder.
    ``overrides`` are dotted keys of the recipe, as on the command line.
    """

    recipe: str
    model: str | None = None
    reward_model: str | None = None
    value_model: str | None = None
    models: list[str] = []
    overrides: dict[str, Any] = {}


class PipelineRecipe(Section):
    """Stages in order, chained by name; each runs in ``output_dir/NAME``."""

    pipeline: str
    output_dir: str
    stages: Annotated[dict[str, PipelineStage], Field(min_length=1)]

    @field_validator("stages")
    @classmethod
    def _plain_names(cls, stages: dict[str, PipelineStage]) -> dict[str, PipelineStage]:
        for name in stages:
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"stage name {name!r}: use letters, digits, - and _")
        return stages
