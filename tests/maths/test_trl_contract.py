"""Contract: the same numbers and gradients as TRL's own code on the same batch; a drift on either side shows."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from chatalign.maths import (
    DPO_LOSSES,
    DPOLossType,
    FDivergence,
    chunked_linear_logprobs,
    dpo_loss,
    entropy,
    length_desensitised_weights,
    selected_logprobs,
    sum_by_sequence,
)

pytestmark = pytest.mark.slow
dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
trl_utils = pytest.importorskip("trl.trainer.utils")

PAIRS, LENGTH, BETA = 4, 9, 0.3
SMOOTHING = {"exo_pair": 1e-3, "robust": 0.1, "aot": 0.1, "aot_unpaired": 0.1}
F_LOSSES: list[DPOLossType] = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"]


def batch() -> dict[str, torch.Tensor]:
    """Chosen replies in the first rows, rejected ones in the last, prompts of 2 tokens, as TRL lays them out."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 5, 2, 7, 4, 1, 2, 6])
    positions = torch.arange(LENGTH)
    mask = (positions >= 2) & (positions < 2 + lengths[:, None])
    logps = -3 * torch.rand(2 * PAIRS, LENGTH - 1, generator=generator) * mask[:, 1:]
    ref_logps = -3 * torch.rand(2 * PAIRS, LENGTH - 1, generator=generator) * mask[:, 1:]
    return {"mask": mask.long(), "logps": logps, "ref_logps": ref_logps, "lengths": lengths}


def trl_loss(data: dict[str, torch.Tensor], logps: torch.Tensor, **options: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """TRL's loss of these per-token log-probabilities, its trainer played by a stub; and the metrics it logged."""
    ref_chosen, ref_rejected = (data["ref_logps"] * data.get("weights", 1)).sum(1).chunk(2)
    logps = logps * data["mask"][:, 1:]  # TRL's head returns 0 where there is no label
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x)
    outputs = SimpleNamespace(
        log_probs=logps, entropy=-logps, mean_logits=logps, is_top1=torch.zeros_like(logps, dtype=torch.bool)
    )
    settings = {
        "model": SimpleNamespace(training=True),
        "accelerator": accelerator,
        "aux_loss_enabled": False,
        "ld_alpha": None,
        "precompute_ref_logps": True,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "loss_types": ["sigmoid"],
        "loss_weights": [1.0],
        "label_smoothing": 0.0,
        "use_weighting": False,
        "beta": BETA,
        "args": SimpleNamespace(discopop_tau=0.05),
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    trainer = SimpleNamespace(**(settings | options))
    inputs = {
        "input_ids": torch.ones_like(data["mask"]),
        "attention_mask": torch.ones_like(data["mask"]),
        "completion_mask": data["mask"],
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    loss = dpo_trainer.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    return loss, trainer._metrics["train"]


def our_loss(data: dict[str, torch.Tensor], logps: torch.Tensor, **options: Any) -> Any:
    """Ours, through the flat layout that the engine uses."""
    keep = data["mask"][:, 1:].bool()
    rows_K = keep.nonzero()[:, 0]
    weights = data.get("weights", torch.ones_like(keep))[keep]
    sums_2B = sum_by_sequence(logps[keep] * weights, rows_K, 2 * PAIRS)
    ref_2B = sum_by_sequence(data["ref_logps"][keep] * weights, rows_K, 2 * PAIRS)
    plain_2B = sum_by_sequence(logps[keep], rows_K, 2 * PAIRS)
    return dpo_loss(
        chosen_logps_B=sums_2B[:PAIRS],
        rejected_logps_B=sums_2B[PAIRS:],
        ref_chosen_logps_B=ref_2B[:PAIRS],
        ref_rejected_logps_B=ref_2B[PAIRS:],
        chosen_lengths_B=data["lengths"][:PAIRS],
        rejected_lengths_B=data["lengths"][PAIRS:],
        sft_logps_B=plain_2B[:PAIRS],
        beta=BETA,
        **options,
    )


def assert_same(data: dict[str, torch.Tensor], theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    their_logps, our_logps = (data["logps"].clone().requires_grad_() for _ in range(2))
    their_loss, metrics = trl_loss(data, their_logps, **theirs)
    result = our_loss(data, our_logps, **ours)
    torch.testing.assert_close(result.losses_B.mean(), their_loss, atol=1e-6, rtol=1e-5)
    their_grad = torch.autograd.grad(their_loss, their_logps)[0]
    torch.testing.assert_close(
        torch.autograd.grad(result.losses_B.mean(), our_logps)[0], their_grad, atol=1e-6, rtol=1e-4
    )
    assert their_grad.abs().sum() > 0
    assert metrics["rewards/chosen"][0] == pytest.approx(result.chosen_rewards_B.mean().item(), abs=1e-6)
    assert metrics["rewards/rejected"][0] == pytest.approx(result.rejected_rewards_B.mean().item(), abs=1e-6)


@pytest.mark.parametrize("loss_type", list(DPO_LOSSES))
def test_every_loss(loss_type: DPOLossType) -> None:
    smoothing = SMOOTHING.get(loss_type, 0.0)
    assert_same(
        batch(),
        {"loss_types": [loss_type], "label_smoothing": smoothing},
        {"loss_type": loss_type, "label_smoothing": smoothing},
    )


@pytest.mark.parametrize("loss_type", F_LOSSES)
@pytest.mark.parametrize("divergence", get_args(FDivergence))
def test_every_f_divergence(loss_type: DPOLossType, divergence: FDivergence) -> None:
    smoothing = SMOOTHING.get(loss_type, 0.0)
    assert_same(
        batch(),
        {"loss_types": [loss_type], "label_smoothing": smoothing, "f_divergence_type": divergence},
        {"loss_type": loss_type, "label_smoothing": smoothing, "f_divergence": divergence},
    )


def test_a_mixture() -> None:
    names, weights = ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]
    assert_same(batch(), {"loss_types": names, "loss_weights": weights}, {"loss_type": names, "loss_weights": weights})


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_length_desensitised(alpha: float) -> None:
    data = batch()
    shared = torch.minimum(*data["lengths"].chunk(2)).repeat(2)[:, None].expand(-1, LENGTH - 1)
    positions = data["mask"][:, 1:].cumsum(1) - 1
    data["weights"] = length_desensitised_weights(positions, shared, alpha)
    names = ["sigmoid", "sft"]
    assert_same(data, {"loss_types": names, "loss_weights": [1.0, 1.0], "ld_alpha": alpha}, {"loss_type": names})


def test_our_table_is_trl_s_list() -> None:
    from trl import DPOConfig

    help_text = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert all(f"`'{name}'`" in help_text for name in DPO_LOSSES)
    assert help_text.count("`'") == len(DPO_LOSSES)


def test_log_probabilities_and_entropy() -> None:
    hidden_KD, weight_VD, targets_K = torch.randn(11, 8), torch.randn(31, 8), torch.randint(31, (11,))
    logits_KV = hidden_KD @ weight_VD.t()
    logps_K, entropy_K = chunked_linear_logprobs(hidden_KD, weight_VD, None, targets_K, 4)
    torch.testing.assert_close(logps_K, trl_utils.selective_log_softmax(logits_KV, targets_K), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(selected_logprobs(logits_KV, targets_K), logps_K, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy_K, trl_utils.entropy_from_logits(logits_KV), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy(logits_KV), entropy_K, atol=1e-5, rtol=1e-5)
