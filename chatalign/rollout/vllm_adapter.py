"""The policy's adapter as files, the form in which vLLM takes new weights, and what of LoRA vLLM has."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from chatalign.errors import ModelError

ADAPTER = "default"
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def refuse_unserved(config: Any) -> None:
    """Raise ModelError where vLLM refuses an adapter of this ``LoraConfig``, or would compute something else with it.

    Source: ``vllm.lora.peft_helper`` of vLLM 0.22, which refuses DoRA and whole modules, and reads no patterns.
    """
    keys = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "trainable_token_indices")
    found = [key for key in keys if getattr(config, key, None)]
    if config.bias != "none":
        found.append("bias")
    if found:
        raise ModelError(
            f"`ppo.rollout_engine`: vLLM doesn't serve an adapter with `{found[0]}`; train one without it, or set "
            f"`ppo.rollout_engine: transformers`"
        )
    lora_rank(config)


def lora_rank(config: Any) -> int:
    """The least ``max_lora_rank`` that vLLM takes for an adapter; ModelError where its rank is above all of them."""
    for rank in _RANKS:
        if config.r <= rank:
            return rank
    raise ModelError(f"`lora.r: {config.r}` is above vLLM's {_RANKS[-1]}; set `ppo.rollout_engine: transformers`")


def write_adapter(model: Any, folder: Path) -> None:
    """Write the adapter that a peft model trains, as peft itself would, with the weights as they are now."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    tensors = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    saved = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(saved, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.deepcopy(model.peft_config[ADAPTER])
    config.inference_mode = True
    config.save_pretrained(str(folder))
