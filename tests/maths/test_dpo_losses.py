"""DPO's table of losses: values by hand, a NumPy oracle from the papers, options that a loss would ignore."""

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch

from chatalign.maths import (
    DPO_LOSSES,
    DPOLossType,
    FDivergence,
    dpo_loss,
    length_desensitised_weights,
    sum_by_sequence,
)

BETA, TAU = 0.3, 0.05
SMOOTHING = {"exo_pair": 1e-3, "robust": 0.1, "aot": 0.1, "aot_unpaired": 0.1}


def pairs(seed: int = 0, n: int = 5) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    names = ("chosen_logps_B", "rejected_logps_B", "ref_chosen_logps_B", "ref_rejected_logps_B")
    return {name: -5 * torch.rand(n, generator=generator) for name in names} | {
        "chosen_lengths_B": torch.tensor([3, 5, 2, 7, 1])[:n],
        "rejected_lengths_B": torch.tensor([4, 1, 2, 6, 9])[:n],
    }


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def oracle(loss_type: str, batch: dict[str, Any]) -> np.ndarray:
    """Each loss from its paper's formula, in float64, with no trick for stability."""
    c, r, rc, rr = (batch[k].double().numpy() for k in list(batch)[:4])
    nc, nr = batch["chosen_lengths_B"].numpy(), batch["rejected_lengths_B"].numpy()
    w, l, b, e = c - rc, r - rr, BETA, SMOOTHING.get(loss_type, 0.0)  # noqa: E741
    d = b * (w - l)

    def smoothed(x: np.ndarray) -> np.ndarray:
        return -(1 - e) * np.log(sigmoid(x)) - e * np.log(sigmoid(-x))

    p, m = sigmoid(d), sigmoid(d / TAU)
    return {
        "sigmoid": lambda: np.log(1 + np.exp(-d)),
        "hinge": lambda: np.maximum(0, 1 - d),
        "ipo": lambda: (w / nc - l / nr - 1 / (2 * b)) ** 2,
        "exo_pair": lambda: p * np.log(p / (1 - e)) + (1 - p) * np.log((1 - p) / e),
        "nca_pair": lambda: -np.log(sigmoid(b * w)) - 0.5 * np.log(sigmoid(-b * w)) - 0.5 * np.log(sigmoid(-b * l)),
        "robust": lambda: (-(1 - e) * np.log(p) + e * np.log(1 - p)) / (1 - 2 * e),
        "bco_pair": lambda: -np.log(sigmoid(b * w)) - np.log(sigmoid(-b * l)),
        "sppo_hard": lambda: (w - 1 / (2 * b)) ** 2 + (l + 1 / (2 * b)) ** 2,
        "aot": lambda: smoothed(b * (np.sort(c - r) - np.sort(rc - rr))),
        "aot_unpaired": lambda: smoothed(b * (np.sort(w) - np.sort(l))),
        "apo_zero": lambda: 1 - sigmoid(b * w) + sigmoid(b * l),
        "apo_down": lambda: sigmoid(b * w) + 1 - sigmoid(b * (w - l)),
        "discopop": lambda: (1 - m) * np.log(1 + np.exp(-d)) + m * np.exp(-d),
        "sft": lambda: -c / nc.mean(),
        "sigmoid_norm": lambda: -np.log(sigmoid(b * (w / nc - l / nr))),
    }[loss_type]()


@pytest.mark.parametrize("loss_type", list(DPO_LOSSES))
def test_against_numpy(loss_type: DPOLossType) -> None:
    batch = pairs()
    result = dpo_loss(**batch, loss_type=loss_type, beta=BETA, label_smoothing=SMOOTHING.get(loss_type, 0.0))
    np.testing.assert_allclose(result.losses_B, oracle(loss_type, batch), rtol=1e-5, atol=1e-6)
    chosen = BETA * (batch["chosen_logps_B"] - batch["ref_chosen_logps_B"])
    torch.testing.assert_close(result.chosen_rewards_B, chosen)
    torch.testing.assert_close(
        result.rejected_rewards_B, BETA * (batch["rejected_logps_B"] - batch["ref_rejected_logps_B"])
    )


AT_ZERO = {
    "sigmoid": math.log(2),
    "sigmoid_norm": math.log(2),
    "hinge": 1.0,
    "ipo": 1 / (4 * BETA**2),
    "exo_pair": 0.5 * math.log(0.5 / 0.999) + 0.5 * math.log(0.5 / 0.001),
    "nca_pair": 2 * math.log(2),
    "robust": math.log(2),
    "bco_pair": 2 * math.log(2),
    "sppo_hard": 1 / (2 * BETA**2),
    "aot": math.log(2),
    "aot_unpaired": math.log(2),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.5 * math.log(2) + 0.5,
    "sft": 2.5,
}


@pytest.mark.parametrize("loss_type", list(DPO_LOSSES))
def test_policy_equal_to_the_reference(loss_type: DPOLossType) -> None:
    chosen_B, rejected_B, lengths_B = torch.tensor([-5.0, -5.0]), torch.tensor([-7.0, -3.0]), torch.tensor([2, 2])
    result = dpo_loss(
        chosen_logps_B=chosen_B,
        rejected_logps_B=rejected_B,
        ref_chosen_logps_B=chosen_B,
        ref_rejected_logps_B=rejected_B,
        loss_type=loss_type,
        beta=BETA,
        label_smoothing=SMOOTHING.get(loss_type, 0.0),
        chosen_lengths_B=lengths_B,
        rejected_lengths_B=lengths_B,
    )
    assert result.losses_B.tolist() == pytest.approx([AT_ZERO[loss_type]] * 2)
    assert result.chosen_rewards_B.tolist() == result.rejected_rewards_B.tolist() == [0, 0]


def test_the_table_holds_every_name_of_the_type() -> None:
    assert tuple(DPO_LOSSES) == get_args(DPOLossType)
    assert set(AT_ZERO) == set(DPO_LOSSES)


@pytest.mark.parametrize("loss_type", list(DPO_LOSSES))
@pytest.mark.parametrize("extreme", [-1e4, 1e4])
def test_extreme_margins_stay_finite(loss_type: DPOLossType, extreme: float) -> None:
    chosen_B = torch.tensor([extreme, 0.0], requires_grad=True)
    result = dpo_loss(
        chosen_logps_B=chosen_B,
        rejected_logps_B=torch.zeros(2),
        reference_free=True,
        loss_type=loss_type,
        label_smoothing=SMOOTHING.get(loss_type, 0.0),
        chosen_lengths_B=torch.ones(2),
        rejected_lengths_B=torch.ones(2),
    )
    result.losses_B.mean().backward()
    assert result.losses_B.isfinite().all()
    assert chosen_B.grad is not None
    assert chosen_B.grad.isfinite().all()


def f_prime(divergence: str, u: np.ndarray, alpha: float) -> np.ndarray:
    if divergence == "forward_kl":
        return 1 - 1 / u
    if divergence == "js_divergence":
        return np.log(2 * u / (1 + u))
    if divergence == "alpha_divergence":
        return (u ** (alpha - 1) - 1) / (alpha - 1)
    return np.log(u)


@pytest.mark.parametrize("divergence", get_args(FDivergence))
@pytest.mark.parametrize("alpha", [0.5, 1.5, 2.0])
def test_f_divergences_against_numpy(divergence: FDivergence, alpha: float) -> None:
    batch = pairs()
    result = dpo_loss(**batch, beta=BETA, f_divergence=divergence, f_alpha=alpha)
    c, r, rc, rr = (batch[k].double().numpy() for k in list(batch)[:4])
    d = BETA * (f_prime(divergence, np.exp(c - rc), alpha) - f_prime(divergence, np.exp(r - rr), alpha))
    np.testing.assert_allclose(result.losses_B, np.log(1 + np.exp(-d)), rtol=1e-4)


def test_alpha_one_is_reverse_kl() -> None:
    near = dpo_loss(**pairs(), f_divergence="alpha_divergence", f_alpha=1.0).losses_B
    assert torch.equal(near, dpo_loss(**pairs()).losses_B)


def test_mixtures_add_up_with_their_weights() -> None:
    batch = pairs()
    mixed = dpo_loss(**batch, loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]).losses_B
    single = [dpo_loss(**batch, loss_type=name).losses_B for name in ("sigmoid", "bco_pair", "sft")]
    torch.testing.assert_close(mixed, 0.8 * single[0] + 0.2 * single[1] + single[2])


def test_sft_over_a_split_batch_equals_the_whole() -> None:
    batch = pairs()
    whole = dpo_loss(**batch, loss_type="sft").losses_B.mean()
    tokens = batch["chosen_lengths_B"].float().mean()
    halves = [
        dpo_loss(**{k: v[rows] for k, v in batch.items()}, loss_type="sft", sft_tokens_per_reply=tokens).losses_B.sum()
        for rows in (slice(0, 2), slice(2, 5))
    ]
    torch.testing.assert_close((halves[0] + halves[1]) / 5, whole)


def test_gradient_of_the_sigmoid_loss_by_hand() -> None:
    batch = pairs()
    batch["chosen_logps_B"].requires_grad_()
    batch["ref_chosen_logps_B"].requires_grad_()
    result = dpo_loss(**batch, beta=BETA)
    result.losses_B.sum().backward()
    margin_B = (result.chosen_rewards_B - result.rejected_rewards_B).detach()
    torch.testing.assert_close(batch["chosen_logps_B"].grad, -BETA * torch.sigmoid(-margin_B))
    assert batch["ref_chosen_logps_B"].grad is None
    assert not result.chosen_rewards_B.requires_grad


def test_reference_free_takes_the_reference_as_uniform() -> None:
    batch = pairs()
    free = dpo_loss(
        chosen_logps_B=batch["chosen_logps_B"], rejected_logps_B=batch["rejected_logps_B"], reference_free=True
    )
    equal_reference = dict.fromkeys(("ref_chosen_logps_B", "ref_rejected_logps_B"), torch.full((5,), -3.0))
    torch.testing.assert_close(free.losses_B, dpo_loss(**(batch | equal_reference)).losses_B)


def test_length_desensitised_weights() -> None:
    sequence_K = torch.tensor([0, 0, 0, 1])
    positions_K = torch.tensor([0, 1, 2, 0])
    weights_K = length_desensitised_weights(positions_K, torch.tensor([1, 1, 1, 1]), 0.25)
    assert weights_K.tolist() == [1, 0.25, 0.25, 1]
    assert sum_by_sequence(torch.full((4,), -2.0) * weights_K, sequence_K, 2).tolist() == [-3, -2]
    with pytest.raises(ValueError, match="alpha"):
        length_desensitised_weights(positions_K, positions_K, 1.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "simgoid"}, "expected different names out of"),
        ({"loss_type": []}, "expected different names"),
        ({"loss_type": ["sft", "sft"]}, "different names"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "1 loss_weights for 2"),
        ({"label_smoothing": 0.1}, "would ignore"),
        ({"loss_type": "exo_pair"}, "1e-3"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, r"\[0, 0.5\)"),
        ({"loss_type": "bco_pair", "f_divergence": "forward_kl"}, "not defined under forward_kl"),
        ({"f_divergence": "kl"}, "expected one of"),
        ({"loss_type": "ipo", "chosen_lengths_B": None}, "pass chosen_lengths_B"),
        ({"ref_chosen_logps_B": None}, "reference_free=True"),
        ({"rejected_logps_B": torch.zeros(5, 1)}, "shapes differ"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dpo_loss(**(pairs() | options))
