"""Contract: PPO's maths against other libraries' own functions on the same numbers, to 1e-6.

TRL is always there; TorchRL and Stable-Baselines3 come with the ``oracles`` extra. verl and OpenRLHF pin other
versions of transformers and need a GPU's packages: their tests run where both were installed with
``pip install --no-deps verl openrlhf omegaconf``, and are skipped elsewhere.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import math
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from chatalign.maths import (
    AdaptiveKLController,
    chunked_linear_logprobs,
    entropy,
    gae,
    k1,
    k2,
    k3,
    masked_mean,
    masked_whiten,
    policy_loss,
    selected_logprobs,
    value_loss,
)

pytestmark = pytest.mark.slow
B, T, V = 5, 7, 11
LENGTHS = torch.tensor([7, 1, 4, 2, 6])
MASK = torch.arange(T) < LENGTHS[:, None]
ENDED = torch.tensor([True, True, False, True, False])
EXACT = {"atol": 1e-6, "rtol": 1e-6}
# What verl and OpenRLHF import for clusters and GPUs, and no function here calls.
CLUSTER = {"ray", "deepspeed", "flash_attn", "codetiming", "hydra", "pylatexenc"}


def numbers(seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(B, T, generator=torch.Generator().manual_seed(seed))


def policy_numbers() -> dict[str, Tensor]:
    old = -numbers(0).abs()
    # Ratios within exp(±1): verl's dual clip, at 3, is then out of reach.
    near = old + numbers(1, 0.3).clamp(-1, 1)
    return {"logps_BT": near, "old_logps_BT": old, "advantages_BT": numbers(2), "mask_BT": MASK}


def value_numbers() -> dict[str, Tensor]:
    old = numbers(3)
    return {"values_BT": old + numbers(4, 0.3), "old_values_BT": old, "returns_BT": numbers(5), "mask_BT": MASK}


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules for packages that are named and absent."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        absent = fullname.partition(".")[0] in CLUSTER
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if absent else None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: type(name, (), {}) if not name.startswith("__") else _missing(name)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def _missing(name: str) -> Any:
    raise AttributeError(name)


@contextmanager
def cluster_packages_absent() -> Iterator[None]:
    """What is imported inside may import cluster packages that aren't installed; nothing of it stays behind."""
    finder, before = _StandIns(), set(sys.modules)
    sys.meta_path.append(finder)  # last: what is installed comes first
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in CLUSTER:
                del sys.modules[name]


@pytest.fixture(scope="module")
def verl() -> Any:
    """``verl.trainer.ppo.core_algos``."""
    pytest.importorskip("omegaconf")
    if importlib.util.find_spec("verl") is None:
        pytest.skip("verl is not installed")
    with cluster_packages_absent():
        return importlib.import_module("verl.trainer.ppo.core_algos")


@pytest.fixture(scope="module")
def openrlhf() -> Any:
    """OpenRLHF's ``models/loss.py`` and ``models/utils.py``, without the trainers that their package imports."""
    spec = importlib.util.find_spec("openrlhf")
    if spec is None or spec.origin is None:
        pytest.skip("OpenRLHF is not installed")
    package = types.ModuleType("openrlhf_models")
    package.__path__ = [str(Path(spec.origin).parent / "models")]
    sys.modules[package.__name__] = package
    with cluster_packages_absent():
        loss = importlib.import_module("openrlhf_models.loss")
        return types.SimpleNamespace(loss=loss, utils=importlib.import_module("openrlhf_models.utils"))


def test_trl_log_probabilities_and_entropy_at_a_temperature() -> None:
    trl = pytest.importorskip("trl.trainer.utils")
    hidden, weight = torch.randn(9, 8).double(), torch.randn(V, 8).double()
    targets = torch.randint(V, (9,))
    scaled = hidden @ weight.t() / 0.7
    logps, entropies = chunked_linear_logprobs(hidden, weight, None, targets, 4, 0.7)
    torch.testing.assert_close(logps, trl.selective_log_softmax(scaled, targets), **EXACT)
    torch.testing.assert_close(selected_logprobs(hidden @ weight.t(), targets, 0.7), logps, **EXACT)
    torch.testing.assert_close(entropies, trl.entropy_from_logits(scaled), **EXACT)
    torch.testing.assert_close(entropy(hidden @ weight.t(), 0.7), entropies, **EXACT)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (0.97, 0.0)])
def test_torchrl_gae(gamma: float, lam: float) -> None:
    functional = pytest.importorskip("torchrl.objectives.value.functional")
    rewards, values, last = numbers(6), numbers(7), numbers(8)[:, 0]
    ours, our_returns = gae(rewards, values, MASK, gamma, lam, torch.where(ENDED, 0.0, last))
    for row, length in enumerate(LENGTHS.tolist()):
        v = values[row, :length]
        done = torch.zeros(length, 1, dtype=torch.bool)
        done[-1] = True
        theirs, returns = functional.generalized_advantage_estimate(
            gamma,
            lam,
            v[:, None],
            torch.cat((v[1:], last[row : row + 1]))[:, None],
            rewards[row, :length, None],
            done,
            terminated=done & ENDED[row],
        )
        torch.testing.assert_close(ours[row, :length], theirs[:, 0], **EXACT)
        torch.testing.assert_close(our_returns[row, :length], returns[:, 0], **EXACT)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0)])
def test_stable_baselines3_gae(gamma: float, lam: float) -> None:
    buffers = pytest.importorskip("stable_baselines3.common.buffers")
    spaces = pytest.importorskip("gymnasium").spaces
    rewards, values, last = numbers(6), numbers(7), numbers(8)[:, 0]
    ours, our_returns = gae(rewards, values, MASK, gamma, lam, torch.where(ENDED, 0.0, last))
    for row, length in enumerate(LENGTHS.tolist()):
        buffer = buffers.RolloutBuffer(
            length, spaces.Discrete(2), spaces.Discrete(2), device="cpu", gamma=gamma, gae_lambda=lam
        )
        for t in range(length):
            zero = np.zeros(1)
            buffer.add(zero, zero, rewards[row, t : t + 1].numpy(), zero, values[row, t : t + 1], torch.zeros(1))
        buffer.compute_returns_and_advantage(last[row : row + 1], ENDED[row : row + 1].numpy())
        np.testing.assert_allclose(ours[row, :length], buffer.advantages[:, 0], atol=1e-6)
        np.testing.assert_allclose(our_returns[row, :length], buffer.returns[:, 0], atol=1e-6)


@pytest.mark.parametrize("clip", [0.1, 0.3])
def test_torchrl_clipped_losses_and_their_gradients(clip: float) -> None:
    pytest.importorskip("torchrl.objectives")
    from tensordict import TensorDict
    from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
    from torch.distributions import Categorical
    from torchrl.objectives import ClipPPOLoss

    generator = torch.Generator().manual_seed(9)
    count = int(MASK.sum())
    tables = [torch.nn.Embedding(count, V), torch.nn.Embedding(count, 1)]
    for table in tables:
        torch.nn.init.normal_(table.weight, generator=generator)
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(tables[0], in_keys=["place"], out_keys=["logits"]),
        ProbabilisticTensorDictModule(in_keys=["logits"], out_keys=["action"], distribution_class=Categorical),
    )
    critic = TensorDictModule(tables[1], in_keys=["place"], out_keys=["state_value"])
    actions = torch.randint(V, (count,), generator=generator)
    with torch.no_grad():
        logps = tables[0].weight.log_softmax(-1).gather(1, actions[:, None]).squeeze(1)
        values = tables[1].weight.squeeze(1)
    old_logps, old_values = logps - numbers(1, 0.3)[MASK], values - numbers(4, 0.3)[MASK]
    advantages, returns = numbers(2)[MASK], numbers(5)[MASK]
    data = TensorDict(
        {
            "place": torch.arange(count),
            "action": actions,
            "old_logps": old_logps,
            "advantage": advantages[:, None],
            "value_target": returns[:, None],
            "state_value": old_values[:, None],
        },
        [count],
    )
    loss = ClipPPOLoss(
        actor, critic, clip_epsilon=clip, entropy_coeff=1.0, critic_coeff=0.5, loss_critic_type="l2", clip_value=clip
    )
    loss.set_keys(sample_log_prob="old_logps")
    out = loss(data)
    theirs = torch.autograd.grad(out["loss_objective"] + out["loss_critic"], list(loss.parameters()))

    all_logps = tables[0].weight.log_softmax(-1)
    ours = policy_loss(
        logps_BT=all_logps.gather(1, actions[:, None]).squeeze(1),
        old_logps_BT=old_logps,
        advantages_BT=advantages,
        mask_BT=torch.ones(count),
        clip_range=clip,
    )
    our_values = value_loss(
        values_BT=tables[1].weight.squeeze(1),
        old_values_BT=old_values,
        returns_BT=returns,
        mask_BT=torch.ones(count),
        clip_range=clip,
    )
    torch.testing.assert_close(ours.loss, out["loss_objective"], **EXACT)
    torch.testing.assert_close(our_values.loss, out["loss_critic"], **EXACT)
    torch.testing.assert_close(entropy(tables[0].weight).mean(), out["entropy"], **EXACT)
    gradients = torch.autograd.grad(ours.loss + our_values.loss, [table.weight for table in tables])
    for mine, yours in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(mine, yours.view_as(mine), **EXACT)


def test_verl_gae_over_the_mask_and_its_whitening(verl: Any) -> None:
    # Theirs knows no bootstrap, takes what stands off the mask at the first step back, and whitens by n − 1.
    rewards, values = torch.where(MASK, numbers(6), 0.0), torch.where(MASK, numbers(7), 0.0)
    theirs, returns = verl.compute_gae_advantage_return(rewards, values, MASK.float(), 0.9, 0.8)
    advantages, our_returns = gae(rewards, values, MASK, 0.9, 0.8)
    torch.testing.assert_close(our_returns[MASK], returns[MASK], **EXACT)
    count = int(MASK.sum())
    whitened = masked_whiten(advantages, MASK) * math.sqrt((count - 1) / count)
    torch.testing.assert_close(whitened[MASK], theirs[MASK], **EXACT)


def test_verl_kl_estimators_and_controller(verl: Any) -> None:
    policy, reference = -numbers(0).abs(), -numbers(1).abs()
    for ours, name in ((k1, "k1"), (k2, "k2"), (k3, "k3")):
        torch.testing.assert_close(ours(policy, reference), verl.kl_penalty(policy, reference, name), **EXACT)
    mine, yours = AdaptiveKLController(0.1, 6.0, 1000), verl.AdaptiveKLController(0.1, 6.0, 1000)
    for kl in (6.3, 40.0, 0.1):
        mine.update(kl, 64)
        yours.update(kl, 64)
        assert mine.coef == pytest.approx(yours.value, rel=1e-9)


def test_verl_losses_and_clip_fractions(verl: Any) -> None:
    policy, value, mask = policy_numbers(), value_numbers(), MASK.float()
    for clip in (0.1, 0.3):
        ours = policy_loss(**policy, clip_range=clip)
        loss, clipped, _, dual = verl.compute_policy_loss(
            policy["old_logps_BT"], policy["logps_BT"], policy["advantages_BT"], mask, cliprange=clip
        )
        assert float(dual) == 0
        torch.testing.assert_close(ours.loss, loss, **EXACT)
        torch.testing.assert_close(ours.clipfrac, clipped, **EXACT)
        ours_value = value_loss(**value, clip_range=clip)
        loss, clipped = verl.compute_value_loss(
            value["values_BT"], value["returns_BT"], value["old_values_BT"], mask, clip
        )
        torch.testing.assert_close(ours_value.loss, loss, **EXACT)
        torch.testing.assert_close(ours_value.clipfrac, clipped, **EXACT)


def test_verl_masked_means_whitening_and_entropy(verl: Any) -> None:
    functional, values, logits = verl.verl_F, numbers(2), torch.randn(B, V)
    torch.testing.assert_close(masked_mean(values, MASK), functional.masked_mean(values, MASK), **EXACT)
    count = int(MASK.sum())
    for shift in (True, False):
        theirs = functional.masked_whiten(values, MASK, shift_mean=shift)
        mean = 0.0 if shift else masked_mean(values, MASK)
        ours = (masked_whiten(values, MASK, shift) - mean) * math.sqrt((count - 1) / count) + mean
        torch.testing.assert_close(ours[MASK], theirs[MASK], **EXACT)
    torch.testing.assert_close(entropy(logits), functional.entropy_from_logits(logits), **EXACT)


def test_openrlhf_losses_and_clip_fraction(openrlhf: Any) -> None:
    policy, value, mask = policy_numbers(), value_numbers(), MASK.float()
    for clip in (0.1, 0.3):
        ours = policy_loss(**policy, clip_range=clip)
        module = openrlhf.loss.PolicyLoss(clip_eps_low=clip, clip_eps_high=clip)
        loss, clipped, *_ = module(policy["logps_BT"], policy["old_logps_BT"], policy["advantages_BT"], mask)
        torch.testing.assert_close(ours.loss, loss, **EXACT)
        torch.testing.assert_close(ours.clipfrac, clipped, **EXACT)
        loss = openrlhf.loss.ValueLoss(clip)(value["values_BT"], value["old_values_BT"], value["returns_BT"], mask)
        torch.testing.assert_close(value_loss(**value, clip_range=clip).loss, loss, **EXACT)


def test_openrlhf_kl_estimators_log_probabilities_and_normalisation(openrlhf: Any) -> None:
    policy, reference = -numbers(0).abs(), -numbers(1).abs()
    for ours, name in ((k1, "k1"), (k2, "k2"), (k3, "k3")):
        theirs = openrlhf.utils.compute_approx_kl(policy, reference, kl_estimator=name)
        torch.testing.assert_close(ours(policy, reference), theirs, **EXACT)
    logits, targets = torch.randn(B, V), torch.randint(V, (B,))
    theirs = openrlhf.utils.log_probs_from_logits(logits.clone().half().float(), targets)
    torch.testing.assert_close(selected_logprobs(logits.half().float(), targets), theirs, **EXACT)
    values = numbers(2)
    flat = openrlhf.utils.masked_normalize(values.flatten()[None], MASK.flatten()[None].float())
    torch.testing.assert_close(masked_whiten(values, MASK).flatten()[None], flat, **EXACT)
