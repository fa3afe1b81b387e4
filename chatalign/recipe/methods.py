"""The sections that belong to a method: ``dpo:``, ``reward:``, ``ppo:``, ``kto:`` and ``eval:``.

As in :mod:`chatalign.recipe.sections`, names are the libraries' own, and ``from __future__ import annotations`` stays
out.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from chatalign.recipe.sections import Count, DatasetSource, Fraction, NonNegative, Positive, Section

DpoLoss = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]


class DpoSection(Section):
    """``trl.DPOConfig``'s fields. ``loss_type`` names a function of :mod:`chatalign.maths.preference`."""

    beta: Positive = 0.1
    loss_type: DpoLoss = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    precompute_ref_log_probs: bool = False
    sft_weight: NonNegative = 0.0  # RPO's negative log-likelihood of the chosen reply (arXiv 2404.19733)

    @model_validator(mode="after")
    def _no_key_that_the_loss_ignores(self) -> Self:
        smoothed = ("aot", "aot_unpaired", "exo_pair", "robust")
        if self.label_smoothing and self.loss_type not in smoothed:
            raise ValueError(
                f"`label_smoothing` is ignored by `loss_type: {self.loss_type}`; it acts in {', '.join(smoothed)} "
                f"(robust is the sigmoid loss under flipped labels)"
            )
        if self.sft_weight and self.loss_type == "sft":
            raise ValueError("`sft_weight` is `loss_type: sft` a second time; give one of the two")
        return self


class RewardSection(Section):
    """``trl.RewardConfig``'s field, the normalisation stored with the model, and how much it may go by length."""

    center_rewards_coefficient: NonNegative | None = None
    normalize: bool = True  # mean and std of training scores saved with the model (N+ details, 2403.17031)
    max_length_bias: Fraction = 0.9  # accuracy where the chosen reply is the longer, less that where it is the shorter


class RewardFunction(Section):
    """One term of PPO's reward: a reward model, or a Python function ``path/to/file.py:name``, with its weight."""

    model: str | None = None
    function: str | None = None
    weight: float = 1.0

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if bool(self.model) == bool(self.function):
            raise ValueError("give exactly one of `model` and `function`")
        if self.function and ":" not in self.function:
            raise ValueError("`function` is path/to/file.py:name")
        return self


class PpoSection(Section):
    """PPO's own settings; names as in the removed ``trl.PPOConfig`` where it had them, ``vllm_*`` as in GRPOConfig.

    ``rollout_batch_size`` prompts a rollout over all processes; each is split into ``num_mini_batches`` optimizer
    steps, ``num_ppo_epochs`` times. ``total_episodes`` replies in all.
    """

    total_episodes: Count = 4096
    rollout_batch_size: Count = 64
    num_ppo_epochs: Count = 4
    num_mini_batches: Count = 1
    local_rollout_forward_batch_size: Count = 64  # replies that a process draws and scores at once, without gradients
    response_length: Count = 64
    min_response_length: Annotated[int, Field(ge=0)] = 0
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    kl_coef: NonNegative = 0.05
    kl_control: Literal["fixed", "adaptive"] = "fixed"
    kl_target: Positive = 6.0
    kl_horizon: Positive = 10000
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    cliprange: Positive = 0.2
    cliprange_value: Positive = 0.2
    vf_coef: NonNegative = 0.1
    entropy_coef: NonNegative = 0.0
    ptx_coef: NonNegative = 0.0
    target_kl: Positive | None = None
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    missing_eos_penalty: NonNegative | None = 1.0
    reward_clip: Positive | None = None
    normalize_reward: bool | Literal["replies"] = True  # by what its run stored, or by the first policy's replies
    value: Literal["shared", "separate"] = "separate"  # shared: a head on the policy's own hidden states
    value_init: Literal["reward", "policy"] = "reward"
    value_learning_rate: Positive | None = None
    value_warmup_rollouts: Annotated[int, Field(ge=0)] = 0
    rewards: list[RewardFunction] = []
    rollout_engine: Literal["transformers", "vllm_server", "vllm_colocate"] = "transformers"
    vllm_server_base_url: str | None = None  # in place of host and port
    vllm_server_host: str = "127.0.0.1"
    vllm_server_port: Annotated[int, Field(ge=1, le=65535)] = 8000
    vllm_server_timeout: Positive = 240.0  # seconds that the server has to come up, and for any one reply
    vllm_gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.3
    vllm_max_model_length: Count | None = None  # None: the longest prompt and its reply
    vllm_tensor_parallel_size: Count = 1
    vllm_enable_sleep_mode: bool = False
    vllm_importance_sampling_correction: bool = True
    vllm_importance_sampling_clip_max: Positive = 3.0

    @model_validator(mode="after")
    def _keys_of_the_engine_that_runs(self) -> Self:
        read: dict[str, tuple[str, ...]] = {
            "transformers": (),
            "vllm_server": ("vllm_importance_", "vllm_server_"),
            "vllm_colocate": ("vllm_importance_", "vllm_gpu_", "vllm_max_", "vllm_tensor_", "vllm_enable_"),
        }
        for name, field in type(self).model_fields.items():
            unread = name.startswith("vllm_") and not name.startswith(read[self.rollout_engine])
            if unread and getattr(self, name) != field.default:
                raise ValueError(f"`{name}` isn't read under `rollout_engine: {self.rollout_engine}`; take it out")
        if self.rollout_engine != "transformers" and not 0.01 <= self.temperature <= 2:
            raise ValueError(f"`temperature: {self.temperature}`: vLLM takes 0.01 to 2; set one of those")
        return self

    @model_validator(mode="after")
    def _server_has_a_scheme(self) -> Self:
        if self.vllm_server_base_url and not self.vllm_server_base_url.startswith(("http://", "https://")):
            raise ValueError("`vllm_server_base_url` starts with http:// or https://, as in http://127.0.0.1:8000")
        return self

    @model_validator(mode="after")
    def _minibatches_divide(self) -> Self:
        if self.rollout_batch_size % self.num_mini_batches:
            raise ValueError("`rollout_batch_size` must be a multiple of `num_mini_batches`")
        if self.total_episodes < self.rollout_batch_size:
            raise ValueError("`total_episodes` must be at least `rollout_batch_size`")
        return self


class KtoSection(Section):
    """``trl.KTOConfig``'s fields."""

    beta: Positive = 0.1
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    desirable_weight: Positive = 1.0
    undesirable_weight: Positive = 1.0


class EvalSection(Section):
    """What ``chatalign eval`` and a pipeline's eval stage measure.

    ``prompts`` are held-out prompts, each answered greedily or by sampling; ``gold`` is ``path/to/file.py:name``, a
    function that scores a reply; ``metrics`` are names of ``evaluate`` metrics that load without a network.
    """

    prompts: DatasetSource | None = None
    pairs: DatasetSource | None = None
    texts: DatasetSource | None = None
    gold: str | None = None
    metrics: list[Literal["bleu", "rouge", "accuracy"]] = []
    max_new_tokens: Count = 64
    temperature: NonNegative = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    batch_size: Count = 64
    samples: Annotated[int, Field(ge=0)] = 6
    baseline: str | None = None
    seed: Annotated[int, Field(ge=0)] = 0
