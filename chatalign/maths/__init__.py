"""The objectives as pure functions of tensors: no configuration, no model, no input or output.

Each file names its shapes at the top and each function its source. Everything accumulates in fp32.
"""

from chatalign.maths.gae import gae, response_mask, token_rewards
from chatalign.maths.kl import AdaptiveKLController, FixedKLController, k1, k2, k3, kl_exact
from chatalign.maths.linear_logprobs import chunked_linear_logprob_sum, chunked_linear_logprobs
from chatalign.maths.logprobs import entropy, mean_by_sequence, selected_logprobs, sum_by_sequence
from chatalign.maths.masked import (
    Moments,
    masked_mean,
    masked_moments,
    masked_sum,
    masked_var,
    masked_whiten,
    whiten_with,
)
from chatalign.maths.policy import PolicyLoss, entropy_bonus, importance_weights, policy_loss, sampler_excess
from chatalign.maths.preference import (
    FDivergence,
    PreferenceLoss,
    dpo_loss,
    length_desensitised_weights,
)
from chatalign.maths.preference_losses import DPO_LOSSES, DPOLossType
from chatalign.maths.reward import ScoreNormaliser, bradley_terry_loss, pairwise_accuracy, penalise_missing_stop
from chatalign.maths.stats import Interval, paired_bootstrap, wilson_interval
from chatalign.maths.value import ValueLoss, explained_variance, value_loss

__all__ = [
    "DPO_LOSSES",
    "AdaptiveKLController",
    "DPOLossType",
    "FDivergence",
    "FixedKLController",
    "Interval",
    "Moments",
    "PolicyLoss",
    "PreferenceLoss",
    "ScoreNormaliser",
    "ValueLoss",
    "bradley_terry_loss",
    "chunked_linear_logprob_sum",
    "chunked_linear_logprobs",
    "dpo_loss",
    "entropy",
    "entropy_bonus",
    "explained_variance",
    "gae",
    "importance_weights",
    "k1",
    "k2",
    "k3",
    "kl_exact",
    "length_desensitised_weights",
    "masked_mean",
    "masked_moments",
    "masked_sum",
    "masked_var",
    "masked_whiten",
    "mean_by_sequence",
    "paired_bootstrap",
    "pairwise_accuracy",
    "penalise_missing_stop",
    "policy_loss",
    "response_mask",
    "sampler_excess",
    "selected_logprobs",
    "sum_by_sequence",
    "token_rewards",
    "value_loss",
    "whiten_with",
    "wilson_interval",
]
