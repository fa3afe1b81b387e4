"""Models that are fused and their twins that are not: made, run and compared."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MistralConfig, Phi3Config, PreTrainedConfig, SeedOssConfig

from .test_attention import _SIZES, _WITH_HEAD_DIM, CONFIGS

VOCABULARY = 64
IDS = torch.tensor([[5, 9, 13, 2, 7, 30, 31], [3, 4, 11, 12, 8, 50, 33]])
MODULES = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
ALL: dict[str, PreTrainedConfig] = CONFIGS | {
    "mistral": MistralConfig(**_SIZES),
    "seed_oss": SeedOssConfig(**_WITH_HEAD_DIM, residual_dropout=0.2),
    "phi3": Phi3Config(**_SIZES, partial_rotary_factor=0.5),
}


def make_model(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ALL[name])
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)  # init leaves attention near uniform, which would hide a wrong rotation
            elif parameter_name.endswith("norm.weight"):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


def results(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model(input_ids=IDS, use_cache=False).logits
    (logits.float() * torch.linspace(-1, 1, logits.shape[-1])).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        gap = float((ours[1][name] - gradient).norm() / gradient.norm().clamp(min=1e-6))
        assert gap < 1e-5, name


def fused_modules(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def add_lora(model: Any, *, adapter_in_fp32: bool = True, name: str = "default", **options: Any) -> Any:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=MODULES, r=4, lora_alpha=12, **options)
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
    else:
        model = get_peft_model(model, config, adapter_name=name, autocast_adapter_dtype=adapter_in_fp32)
    torch.manual_seed(len(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f"lora_B.{name}" in key:  # 0 at first, which would hide the adapter
                parameter.normal_(std=0.1)
    return model.eval()


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits
