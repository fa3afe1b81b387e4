"""The sections that recipes are made of. Field names are Hugging Face's own, verbatim, so their docs apply.

A field is here because a stage reads it; each class names the library class whose fields it holds, and a
contract test compares the two. Sections are frozen, refuse unknown keys, and import nothing heavy.

No ``from __future__ import annotations`` here: pydantic would evaluate each field's text, at every start.
"""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["auto", "varlen", "flex", "sdpa"]


class Section(BaseModel):
    """Frozen, keyword-only, no unknown keys."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        defer_build=True,  # a command validates one recipe: the other stages' validators needn't be built
    )


class ModelSection(Section):
    """Which model, by ``from_pretrained``'s own names.

    ``name_or_path`` is a Hub id, a folder with a model or an adapter, or a chatalign run folder; in a pipeline
    the name of an earlier stage. ``config`` (a model configuration as a mapping with ``model_type``) makes a
    model from nothing instead, with the tokenizer of ``tokenizer_name_or_path``. ``attention`` is ours: the kernel
    of the native engine, chosen by device and precision where it isn't given.
    """

    name_or_path: str | None = None
    config: dict[str, Any] | None = None
    tokenizer_name_or_path: str | None = None
    revision: str = "main"
    dtype: DtypeName = "auto"
    attention: Attention = "auto"
    trust_remote_code: Literal[False] = False
    chat_template_path: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.name_or_path and self.config:
            raise ValueError("`name_or_path` and `config` contradict each other: give one of the two")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("`config` needs a `model_type`, such as llama")
        if self.config is not None and not self.tokenizer_name_or_path:
            raise ValueError("`config` makes a model from nothing: give `tokenizer_name_or_path` too")
        return self


class QuantizationSection(Section):
    """``transformers.BitsAndBytesConfig``: 4-bit (QLoRA) or 8-bit weights for the frozen base."""

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    llm_int8_threshold: float = 6.0

    @model_validator(mode="after")
    def _one_width(self) -> Self:
        if self.load_in_4bit == self.load_in_8bit:
            raise ValueError("set exactly one of `load_in_4bit` and `load_in_8bit` to true")
        return self


class LoraSection(Section):
    """``peft.LoraConfig``. All linear layers by default, alpha = 2 r (the alignment-handbook's and Axolotl's habit)."""

    r: Count = 16
    lora_alpha: Count = 32
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = True
    layers_to_transform: int | list[int] | None = None
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, int] = {}


Format = Literal[
    "messages", "sharegpt", "alpaca", "prompt_completion", "preference", "hh", "unpaired", "text", "prompt"
]

Role = Literal["system", "user", "assistant", "tool", "function_call"]


class DatasetSource(Section):
    """One source of rows: a local file or folder (json, jsonl, parquet, csv, txt) or a Hub dataset.

    ``format`` is recognised from the columns where it isn't given; ``columns`` maps the schema's names to the
    file's (``{prompt: question, completion: answer}``; ``role`` and ``content`` are a turn's keys) and ``roles`` the
    file's names of roles to the schema's. ``weight`` is relative to the other sources' weights: the mixture draws
    rows in that proportion; without weights every row of every source is used once.
    """

    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    format: Format | None = None
    columns: dict[str, str] = {}
    roles: dict[str, Role] = {}
    weight: Positive | None = None
    max_rows: Count | None = None
    system: str | None = None


class CleanSection(Section):
    """Which rows of ``datasets`` are left out before any is tokenized; each is counted by its reason.

    A word is a run of letters and digits, or one Chinese or Japanese character; system turns aren't looked at.
    ``near_duplicates`` is the Jaccard of word 5-grams from which a row is an earlier one's copy, ``decontaminate`` the
    length in words of n-grams that no row to train on may share with one to evaluate on (GPT-3's 13).
    """

    exact_duplicates: bool = True
    near_duplicates: Annotated[float, Field(ge=0.7, le=0.95)] | None = None
    decontaminate: Annotated[int, Field(ge=5, le=50)] | None = None
    languages: list[Annotated[str, Field(pattern="^[a-z]{2,3}$")]] = []
    min_words: Count | None = None
    max_words: Count | None = None
    min_turns: Count | None = None
    max_turns: Count | None = None

    @model_validator(mode="after")
    def _least_below_most(self) -> Self:
        for least, most in (("min_words", "max_words"), ("min_turns", "max_turns")):
            if (getattr(self, least) or 0) > (getattr(self, most) or math.inf):
                raise ValueError(f"`{least}` is above `{most}`: no row would be left")
        return self


class DataSection(Section):
    """What to train on, and how rows become tokens."""

    datasets: Annotated[list[DatasetSource], Field(min_length=1)]
    eval_datasets: list[DatasetSource] = []
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    max_length: Annotated[int, Field(ge=8)] = 1024
    max_prompt_length: Count | None = None
    packing: bool = True
    on_overlong: Literal["truncate", "drop", "error"] = "truncate"
    on_bad_row: Literal["error", "drop"] = "error"
    supervise: Literal["assistant", "last_assistant", "all"] = "assistant"
    apply_chat_template: bool = True
    num_proc: Count | None = None
    clean: CleanSection | None = None

    @model_validator(mode="after")
    def _something_to_compare_with(self) -> Self:
        if self.clean and self.clean.decontaminate and not (self.eval_datasets or self.eval_fraction):
            raise ValueError("`clean.decontaminate` compares with rows to evaluate on: give `eval_datasets`")
        return self

    @model_validator(mode="after")
    def _weights_on_all_or_none(self) -> Self:
        weighted = [source.weight is not None for source in self.datasets]
        if any(weighted) and not all(weighted):
            raise ValueError("give `weight` to every entry of `datasets` or to none")
        return self


class TrainSection(Section):
    """``transformers.TrainingArguments``: the fields that a stage passes on, with the stage's own defaults.

    ``activation_offloading`` is TRL's; ``fused_layers`` is ours, what a CPU uses where a GPU has Liger. Where it,
    ``bf16``, ``tf32`` and ``use_liger_kernel`` are null, the hardware decides; ``gradient_checkpointing: auto``
    recomputes as few layers as the GPU's memory asks for. ``max_hours`` is ours: after so long a process saves and
    ends with status 130, and the same command goes on.
    """

    learning_rate: Positive | None = None  # None: the stage's published default, full or LoRA
    num_train_epochs: Positive = 1.0
    max_steps: int = -1
    per_device_train_batch_size: Count = 8
    per_device_eval_batch_size: Count = 8
    gradient_accumulation_steps: Count = 1
    lr_scheduler_type: str = "cosine"
    lr_scheduler_kwargs: dict[str, Any] | None = None
    warmup_steps: NonNegative = 0.03  # below 1: a share of all steps
    optim: str = "adamw_torch_fused"
    weight_decay: NonNegative = 0.0
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    adam_epsilon: Positive = 1e-8
    max_grad_norm: NonNegative = 1.0
    bf16: bool | None = None
    fp16: bool = False
    tf32: bool | None = None
    gradient_checkpointing: bool | Literal["auto"] = False
    activation_offloading: bool = False
    torch_compile: bool = False
    use_liger_kernel: bool | None = None
    liger_kernel_config: dict[str, bool] | None = None
    fused_layers: bool | None = None
    neftune_noise_alpha: NonNegative | None = None
    logging_steps: Positive = 10
    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    eval_steps: Positive | None = None
    eval_on_start: bool = False
    save_strategy: Literal["no", "steps", "epoch"] = "steps"
    save_steps: Positive = 200
    save_total_limit: Count | None = 2
    max_hours: Positive | None = None
    seed: Annotated[int, Field(ge=0)] = 42
    data_seed: int | None = None
    full_determinism: bool = False
    use_cpu: bool = False
    dataloader_num_workers: Annotated[int, Field(ge=0)] = 0
    ddp_find_unused_parameters: bool | None = None
    ddp_timeout: Count = 1800

    @model_validator(mode="after")
    def _one_precision(self) -> Self:
        if self.bf16 and self.fp16:
            raise ValueError("`bf16` and `fp16` contradict each other: set one of the two")
        return self


class HubSection(Section):
    """Where the finished run is uploaded. The token comes from ``HF_TOKEN`` or the Hub's login, never from here."""

    push: bool = False
    repo: str | None = None
    private: bool = True
    license: str | None = None  # the model card's, such as apache-2.0

    @model_validator(mode="after")
    def _repo_where_pushed(self) -> Self:
        if self.push and not self.repo:
            raise ValueError("`push: true` needs `repo`, such as me/my-assistant")
        return self
