"""Direct preference optimisation: the objective, the reference's log-probabilities, and the check that it is right.

A pair is one row, prompt | chosen | rejected, so that the prompt is computed once for policy and reference each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from chatalign.data.collate import collate_pairs
from chatalign.engine.batching import Batch, Bins
from chatalign.engine.dpo_guard import refuse_other_loss
from chatalign.engine.isolation import computes_in_half
from chatalign.engine.loss_head import token_logprobs
from chatalign.engine.model_setup import set_up_reference
from chatalign.engine.sealed import SealedTrainer
from chatalign.engine.trainer import Items, Metrics, StageTrainer
from chatalign.errors import GuardError, ModelError
from chatalign.maths.logprobs import sum_by_sequence
from chatalign.maths.preference import PreferenceLoss, dpo_loss
from chatalign.maths.preference_losses import DPOLossType
from chatalign.models.adapters import Policy
from chatalign.models.reference import WRONG_REFERENCE, Reference
from chatalign.recipe import DpoRecipe

CHOSEN, REJECTED = "ref_chosen_logps", "ref_rejected_logps"
# Largest |log π − log π_ref| a token before the first update: rounding, and no more.
_DRIFT_AT_START = {"full": 1e-3, "half": 5e-2}


def collate_dpo(rows: Sequence[Mapping[str, Any]]) -> Batch:
    """Pairs, with the reference's log-probabilities [2n] where they were computed before training."""
    batch: Batch = dict(collate_pairs(rows))
    if CHOSEN in rows[0]:
        batch["ref_logps"] = torch.tensor([row[name] for row in rows for name in (CHOSEN, REJECTED)])
    return batch


class DpoTrainer(StageTrainer):
    """Minimises a DPO loss, the mean over an optimizer step's pairs (Rafailov et al., 2305.18290, equation 7).

    ``dpo.loss_type`` names the loss, ``dpo.sft_weight`` adds the chosen replies' mean negative log-likelihood.
    """

    items: ClassVar[Items] = "pairs"

    def __init__(self, *, reference: Reference, **settings: Any) -> None:
        assert isinstance(settings["recipe"], DpoRecipe)
        self.section = settings["recipe"].dpo
        self.loss_type: DPOLossType = settings["recipe"].dpo.loss_type
        self.reference = reference
        self._tokens_per_reply: Tensor | float | None = None
        self._checked = False
        super().__init__(**settings, collate=collate_dpo)
        refuse_other_loss(self.section, self.loss_of)
        if reference.module is not None:
            with self.accelerator.autocast():
                set_up_reference(reference.module, self.recipe, self.levers)
        if self.section.precompute_ref_log_probs:
            self._precompute()

    def beside(self) -> list[nn.Module]:
        """The reference, where it is a copy."""
        return [] if self.reference.module is None else [self.reference.module]

    def objective(  # type: ignore[override]
        self, model: nn.Module, batch: Batch, num_items: float | Tensor
    ) -> tuple[Tensor, Metrics]:
        """The summed loss over the step's pairs; implicit rewards, log-probabilities, distance from the start."""
        logps_2B, lengths_2B = sequence_logprobs(model, batch)
        ref_2B = batch["ref_logps"] if "ref_logps" in batch else self._reference_logprobs(batch)
        loss = self.loss_of(logps_2B, ref_2B, lengths_2B)
        drift_2B = (logps_2B.detach() - ref_2B) / lengths_2B
        if model.training and not self._checked:
            self._check_start(loss, drift_2B)
        chosen_B, rejected_B = loss.chosen_rewards_B, loss.rejected_rewards_B
        return loss.losses_B.sum() / num_items, {
            "rewards/chosen": chosen_B,
            "rewards/rejected": rejected_B,
            "rewards/margins": chosen_B - rejected_B,
            "rewards/accuracies": (chosen_B > rejected_B).float(),
            "logps/chosen": logps_2B[0::2],
            "logps/rejected": logps_2B[1::2],
            "logratio_per_token": drift_2B,
        }

    def loss_of(self, logps_2B: Tensor, ref_2B: Tensor, lengths_2B: Tensor) -> PreferenceLoss:
        """The recipe's loss of each pair from summed log-probabilities; 2i is chosen i, 2i + 1 rejected i."""
        with_sft = self.section.sft_weight > 0
        return dpo_loss(
            chosen_logps_B=logps_2B[0::2],
            rejected_logps_B=logps_2B[1::2],
            ref_chosen_logps_B=ref_2B[0::2],
            ref_rejected_logps_B=ref_2B[1::2],
            loss_type=[self.loss_type, "sft"] if with_sft else self.loss_type,
            loss_weights=[1.0, self.section.sft_weight] if with_sft else None,
            beta=self.section.beta,
            label_smoothing=self.section.label_smoothing,
            chosen_lengths_B=lengths_2B[0::2],
            rejected_lengths_B=lengths_2B[1::2],
            sft_tokens_per_reply=self._tokens_per_reply if self.model.training else None,
        )

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> int | Tensor:
        pairs = super()._get_num_items_in_batch(batch_samples, device)
        if self.section.sft_weight > 0:  # its mean is over the step's chosen tokens, not the micro-batch's
            kept = [batch["sequence_index"] for batch in batch_samples if not batch.get("filler")]
            tokens = torch.tensor(float(sum(int((index % 2 == 0).sum()) for index in kept)), device=device)
            self._tokens_per_reply = self.reduce(tokens) / pairs
        return pairs

    def _reference_logprobs(self, batch: Batch) -> Tensor:
        # Under the policy's own precision: a reference in another one would not agree with it at the start.
        with self.reference.use() as model, self.accelerator.autocast():
            return sequence_logprobs(model, batch)[0]

    def _check_start(self, loss: PreferenceLoss, drift_2B: Tensor) -> None:
        """Before the first update the policy is its reference: no drift, and the loss is that of a margin of 0."""
        self._checked = True
        if self.state.global_step > 0:  # resumed
            return
        with self.accelerator.autocast():
            allowed = _DRIFT_AT_START["half" if computes_in_half(self.model) else "full"]
        drift = float(drift_2B.abs().max())
        if drift > allowed:
            raise GuardError(
                f"{WRONG_REFERENCE}: before the first step the two differ by {drift:.2g} nats a token; give the model "
                "that SFT made as model.name_or_path"
            )
        at_zero = {
            "sigmoid": math.log(2),
            "sigmoid_norm": math.log(2),
            "hinge": 1.0,
            "ipo": 0.25 / self.section.beta**2,
        }
        expected = at_zero.get(self.loss_type)
        found = float(loss.losses_B.detach().mean())
        if expected is not None and not self.section.sft_weight and abs(found - expected) > 0.05 * expected:
            raise GuardError(
                f"{WRONG_REFERENCE}: before the first step the {self.loss_type} loss is {found:.4f} and not "
                f"{expected:.4f}, its value at a margin of 0; give the model that SFT made as model.name_or_path"
            )

    def _precompute(self) -> None:
        """Run the reference once over all rows and keep two numbers a pair; it is not needed in memory afterwards."""
        for bins in (self.train_dataset, self.eval_dataset):
            if isinstance(bins, Bins):
                found = self._all_reference_logprobs(bins)
                bins.rows = bins.rows.add_column(CHOSEN, found[0::2]).add_column(REJECTED, found[1::2])
        if self.reference.module is not None:
            self.reference.module.to("cpu")

    def _all_reference_logprobs(self, bins: Bins) -> list[float]:
        world, size = self.args.world_size, self.args.per_device_eval_batch_size
        found: list[float] = []
        for host_batch in self.get_eval_dataloader(bins):
            filler = bool(host_batch.pop("filler"))
            logps = self._reference_logprobs(self._prepare_inputs(host_batch))
            # NaN marks what is no pair, so that all processes gather the same shape.
            padded = logps.new_full((size, 2), math.nan)
            if not filler:
                padded[: len(logps) // 2] = logps.view(-1, 2)
            # Process r holds bins r, r + W, … of a stretch: turned, they are in the rows' order again.
            gathered = self.accelerator.gather(padded).view(world, size, 2).transpose(0, 1).reshape(-1, 2)
            found += gathered[~gathered.isnan().any(-1)].flatten().tolist()
        return found


def require_reference(policy: Policy, method: str) -> Reference:
    """The policy's reference; ModelError for a model made from nothing, which has none."""
    if policy.reference is None:
        raise ModelError(f"`model.config` makes a model from nothing, and {method} needs one that SFT ended with")
    return policy.reference


def refuse_moved(reference: Reference, sha256_at_start: str, trainer: SealedTrainer) -> None:
    """Raise GuardError where the reference's weights are not those of the start; not known where they are sharded."""
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        reference.refuse_moved(sha256_at_start)


def sequence_logprobs(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Summed log-probability of each reply of a batch of pairs, and its length in tokens, (2B,) each."""
    logps_K, _ = token_logprobs(model, batch)
    index_K, count = batch["sequence_index"], int(batch["num_sequences"])
    return sum_by_sequence(logps_K, index_K, count), sum_by_sequence(torch.ones_like(logps_K), index_K, count)
