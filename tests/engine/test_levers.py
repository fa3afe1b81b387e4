"""What the hardware decides and the recipe overrides; layers compiled, checkpointed and offloaded change no number."""

from __future__ import annotations

import copy
import sys
from functools import partialmethod
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config
from tiny import make_llama
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks

from chatalign import check
from chatalign.engine import model_setup
from chatalign.engine.attention import segment_inputs
from chatalign.engine.fused_layers import fuse_layers
from chatalign.engine.isolation import enable_segments
from chatalign.engine.layers import checkpoint_layers, compile_layers, decoder_layers
from chatalign.engine.levers import LIGER_LOSSES, Hardware, Levers, choose, described
from chatalign.engine.memory import StepMemory, layers_to_checkpoint, measure_step, optimizer_bytes
from chatalign.engine.model_setup import largest_batch, with_kernels
from chatalign.engine.offloading import OffloadedActivations
from chatalign.engine.replaced import put_back
from chatalign.engine.stage import argument_values
from chatalign.errors import DependencyError, ModelError, RecipeError
from chatalign.maths import fused
from chatalign.recipe import SftRecipe
from engine.fused_twins import MODULES, add_lora, fused_modules
from engine.stand_ins import VOCABULARY, lm_rows, make_run, make_trainer, sft_recipe, weights

CPU, H100 = Hardware(device="cpu"), Hardware(device="cuda", bf16=True)
LIGER, OLD = Hardware(device="cuda", bf16=True, liger=True), Hardware(device="cuda")


def chosen(machine: Hardware, folder: Path, **train: Any) -> Levers:
    return choose(sft_recipe(folder, **train), machine)


def test_the_hardware_decides_where_the_recipe_does_not(tmp_path: Path) -> None:
    on_cpu, on_gpu, on_old = (chosen(machine, tmp_path) for machine in (CPU, LIGER, OLD))
    assert on_cpu.arguments() == {}
    assert on_gpu.arguments() == {"bf16": True, "tf32": True}
    assert on_gpu.liger == LIGER_LOSSES
    assert on_old.arguments() == {}
    assert chosen(H100, tmp_path).liger is None


def test_the_recipe_has_the_last_word(tmp_path: Path) -> None:
    assert chosen(LIGER, tmp_path, bf16=False).arguments() == {}  # and no TF32 by the back door
    assert chosen(LIGER, tmp_path, bf16=False, tf32=True).arguments() == {"tf32": True}
    assert chosen(LIGER, tmp_path, fp16=True).bf16 is False
    assert chosen(LIGER, tmp_path, use_liger_kernel=False).liger is None
    assert chosen(LIGER, tmp_path, torch_compile=True).liger is None  # compiled layers are fused already
    both = chosen(LIGER, tmp_path, torch_compile=True, use_liger_kernel=True, liger_kernel_config={"rope": False})
    assert both.liger == {"rope": False, **LIGER_LOSSES}
    assert chosen(CPU, tmp_path, bf16=True).arguments() == {"bf16": True}


@pytest.mark.parametrize("train", [{"use_liger_kernel": True}, {"activation_offloading": True}])
def test_what_needs_a_gpu_is_refused_without_one(tmp_path: Path, train: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=f"train.{next(iter(train))}: true` needs an NVIDIA or AMD GPU"):
        chosen(CPU, tmp_path, **train)


def test_a_kernel_of_a_gpu_is_refused_without_one(tmp_path: Path) -> None:
    recipe = sft_recipe(tmp_path)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"attention": "flex"})})
    with pytest.raises(RecipeError, match=r"model\.attention: flex` needs"):
        choose(recipe, CPU)


def test_fused_layers_are_refused_where_they_would_not_run(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.fused_layers: true` is for a CPU"):
        chosen(H100, tmp_path, fused_layers=True)
    assert not chosen(H100, tmp_path).fused
    recipe = {"stage": "sft", "output_dir": "run", "data": {"datasets": [{"path": "rows.jsonl"}]}, "engine": "trl"}
    with pytest.raises(ValueError, match=r"`train\.fused_layers` is the native engine's"):
        SftRecipe.model_validate(recipe | {"train": {"fused_layers": True}})


def test_liger_that_is_not_installed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DependencyError, match="needs liger-kernel; pip install"):
        chosen(H100, tmp_path, use_liger_kernel=True)


def test_liger_goes_to_the_models_that_it_has_kernels_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its kernels run on GPUs alone; what is held here is whom they are given to, and without which of its losses.
    given: list[dict[str, Any]] = []
    package, patches = ModuleType("liger_kernel.transformers"), ModuleType("liger_kernel.transformers.monkey_patch")
    package._apply_liger_kernel_to_instance = lambda **settings: given.append(settings)  # type: ignore[attr-defined]
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}  # type: ignore[attr-defined]
    for module in (ModuleType("liger_kernel"), package, patches):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    recipe, model = sft_recipe(tmp_path), make_llama(VOCABULARY)
    levers = choose(recipe, LIGER)
    assert with_kernels(model, recipe, levers) == levers
    assert given == [{"model": model, **LIGER_LOSSES}]
    model.config.model_type = "gpt2"
    assert with_kernels(model, recipe, levers).liger is None
    with pytest.raises(ModelError, match="Liger has no kernels for gpt2 models"):
        with_kernels(model, sft_recipe(tmp_path, use_liger_kernel=True), levers)
    assert len(given) == 1


def test_check_names_the_packages_that_levers_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check.models, "find_spec", lambda _name: None)
    recipe = sft_recipe(tmp_path, optim="paged_adamw_8bit", use_liger_kernel=True)
    problems = [str(finding.problem) for finding in check.check_recipe(recipe) if finding.what.startswith("package ")]
    assert any("bitsandbytes" in problem for problem in problems)
    assert any("pip install 'chatalign[gpu]'" in problem for problem in problems)
    assert not [f for f in check.check_recipe(sft_recipe(tmp_path)) if f.what.startswith("package ")]


def test_the_engines_own_levers_never_reach_training_arguments(tmp_path: Path) -> None:
    recipe = sft_recipe(tmp_path, torch_compile=True, gradient_checkpointing="auto")
    values = argument_values(recipe, make_run(tmp_path), is_adapter=False)
    assert not {"torch_compile", "use_liger_kernel", "activation_offloading", "gradient_checkpointing"} & set(values)
    assert argument_values(sft_recipe(tmp_path, gradient_checkpointing=True), make_run(tmp_path), is_adapter=False)[
        "gradient_checkpointing"
    ]


def test_the_record_says_what_ran(tmp_path: Path) -> None:
    said = described(
        chosen(LIGER, tmp_path), attention={"varlen"}, optim="adamw_torch_fused", fp16=False, checkpointed=3, layers=24
    )
    assert said == "attention: varlen, bf16, adamw_torch_fused, tf32, Liger kernels, 3 of 24 layers checkpointed"
    assert make_trainer(tmp_path, lm_rows(4)).ran_with == "attention: sdpa, float32, adamw_torch_fused, fused layers"


# Layers


def flat_batch(*lengths: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(sum(lengths))
    ends = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    table = [[a, b, 0, 0] for a, b in pairwise(ends)]
    return segment_inputs(
        {
            "input_ids": torch.randint(0, VOCABULARY, (1, ends[-1]), generator=generator),
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "segments": torch.tensor(table, dtype=torch.int32),
        }
    )


def loss_and_gradient(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    model.zero_grad()
    loss = model(**batch).logits.square().mean()
    loss.backward()
    return torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters() if p.grad is not None)])


def pair_of_models() -> tuple[Any, Any]:
    model = make_llama(VOCABULARY).train()
    enable_segments(model)
    return model, copy.deepcopy(model)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [0, 1])
def test_compiled_layers_compute_the_same_and_once_for_all_lengths(checkpointed: int) -> None:
    plain, compiled = pair_of_models()
    names = list(compiled.state_dict())
    if checkpointed:
        checkpoint_layers(compiled, checkpointed)
    compile_layers(compiled, checkpointed=checkpointed)
    assert list(compiled.state_dict()) == names  # so that checkpoints, adapters and exports don't change
    graphs = []
    for lengths in ((9, 7), (5,), (30, 2, 8), (64,), (3, 3, 3, 3), (101, 16)):
        found, expected = (loss_and_gradient(model, flat_batch(*lengths)) for model in (compiled, plain))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[-1] == graphs[1]  # compiled for the first lengths, and never again


@pytest.mark.slow
def test_compiled_layers_keep_the_fused_lora_product_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    # What is traced and its gradients are the compiler's own; its code generator, which takes minutes, other tests run.
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    plain = add_lora(make_llama(VOCABULARY, num_hidden_layers=1))
    enable_segments(plain)
    compiled = copy.deepcopy(plain)
    fuse_layers(compiled, lora_alone=True)
    assert {name.rsplit(".", 1)[-1] for name in fused_modules(compiled)} == set(MODULES)
    traced: list[int] = []
    lora_linear = fused.lora_linear
    monkeypatch.setattr(fused, "lora_linear", lambda *args: traced.append(1) or lora_linear(*args))
    compile_layers(compiled)
    for lengths in ((9, 7), (30, 2, 8)):
        found, expected = (loss_and_gradient(model, flat_batch(*lengths)) for model in (compiled, plain))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert traced


@pytest.mark.slow
def test_compiled_layers_keep_what_products_give_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    model = make_llama(VOCABULARY, num_hidden_layers=2)
    width = model.config.intermediate_size
    enable_segments(model)
    compile_layers(model)
    kept: dict[int, torch.Tensor] = {}
    with saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
        loss_and_gradient(model, flat_batch(9, 7))
    wide = [x for x in kept.values() if x.shape[-1:] == (width,) and x.numel() == 16 * width]
    assert len(wide) == 2 * 2  # gate and up of each layer, not their product
    put_back()
    assert functorch_config.activation_memory_budget == 1.0


@pytest.mark.slow
def test_a_compiled_run_is_the_plain_run(tmp_path: Path) -> None:
    def trained(name: str, **train: Any) -> dict[str, torch.Tensor]:
        # Adam would make a small weight's step of a gradient's rounding; by this one weights move by up to 0.05.
        settings = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 3} | train
        trainer = make_trainer(tmp_path / name, lm_rows(16), packing=True, **settings)
        trainer.train()
        return weights(trainer)

    plain = trained("plain")
    for name, settings in (("compiled", {}), ("both", {"gradient_checkpointing": True})):
        compiled = trained(name, torch_compile=True, **settings)
        for weight, value in plain.items():
            torch.testing.assert_close(compiled[weight], value, atol=1e-6, rtol=1e-5)


def test_some_layers_can_be_checkpointed() -> None:
    plain, checkpointed = pair_of_models()
    checkpoint_layers(checkpointed, 1)
    assert [layer.gradient_checkpointing for layer in decoder_layers(checkpointed)] == [True, False]
    batch = flat_batch(12, 9)
    torch.testing.assert_close(loss_and_gradient(checkpointed, batch), loss_and_gradient(plain, batch))


def test_offloading_moves_activations_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, offloaded = pair_of_models()
    moved: list[torch.Size] = []
    unpack = OffloadedActivations._unpack

    def counted(self: OffloadedActivations, packed: Any) -> torch.Tensor:
        back = unpack(self, packed)
        if not isinstance(packed, torch.Tensor):
            moved.append(back.shape)
        return back

    monkeypatch.setattr(OffloadedActivations, "_unpack", counted)
    batch = flat_batch(40, 31)
    context = OffloadedActivations(offloaded, device_type="cpu", smallest_bytes=1024)
    with context:
        loss = offloaded(**batch).logits.square().mean()
    loss.backward()
    expected = loss_and_gradient(plain, batch)
    found = torch.cat([loss.detach()[None], *(p.grad.flatten() for p in offloaded.parameters())])
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert moved
    shapes = {shape for p in offloaded.parameters() for shape in (p.shape, p.shape[::-1])}
    assert not shapes & set(moved)
    assert all({71, 40, 31} & set(shape) for shape in moved)  # a place for each token, of the batch or of a segment


# Memory


def step(**changes: Any) -> StepMemory:
    settings: dict[str, Any] = {
        "weights": 4000,
        "trained": 1000,
        "layers": 4,
        "layer_bytes_per_token": 10.0,
        "input_bytes_per_token": 1.0,
        "other_bytes_per_token": 2.0,
        "head_bytes": 500,
        "half": False,
        "optimizer_bytes": 8.0,
    }
    return StepMemory(**settings | changes)


def test_memory_of_a_step_by_hand() -> None:
    # weights 4,000, gradients 4,000, moments 8,000, head 500; 100 tokens × (4 layers × 10 + 2)
    assert step().total(100, 0) == 16_500 + 100 * 42
    # two of four layers keep their input alone, and one is there whole while it is recomputed
    assert step().total(100, 2) == 16_500 + 100 * (2 * 10 + 2 * 1 + 10 + 2)
    assert step(half=True).total(0, 0) == 16_500 + 2000
    assert step(optimizer_bytes=2.0, trained=10).total(0, 0) == 4000 + 10 * 6 + 500


def test_as_few_layers_as_needed_are_checkpointed() -> None:
    needed = [step().total(1000, count) / 0.85 for count in range(5)]
    assert layers_to_checkpoint(step(), 1000, needed[0] + 1) == 0
    assert layers_to_checkpoint(step(), 1000, needed[3] + 1) == 3
    assert layers_to_checkpoint(step(), 1000, 1.0) == 4  # nothing is enough: all, and the step decides
    assert needed[1] > needed[0]  # the first costs its recomputation and saves less: it is never taken alone
    counts = [layers_to_checkpoint(step(), 1000, needed[0] * share) for share in (1.01, 0.97, 0.9, 0.8, 0.7)]
    assert counts == sorted(counts)


def test_optimizers_by_name() -> None:
    assert [optimizer_bytes(n) for n in ("adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit", "sgd")] == [
        8.0,
        2.0,
        2.0,
        0.0,
    ]


def test_auto_checkpoints_what_the_memory_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_trainer(tmp_path / "plain", lm_rows(16), max_steps=3, gradient_checkpointing="auto")
    assert not any(layer.gradient_checkpointing for layer in decoder_layers(plain.model))  # a CPU
    plain.train()
    monkeypatch.setattr(model_setup, "available_bytes", lambda _device: 1)
    auto = make_trainer(tmp_path / "auto", lm_rows(16), max_steps=3, gradient_checkpointing="auto")
    assert auto.ran_with.endswith("2 of 2 layers checkpointed")
    auto.train()
    assert all(layer.gradient_checkpointing for layer in decoder_layers(auto.model))
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(auto)[name], value)
    assert largest_batch(auto.train_dataset, auto.args) == 2 * max(map(len, lm_rows(16)["input_ids"]))


def test_what_a_layer_keeps_is_measured() -> None:
    model, _ = pair_of_models()
    measured = measure_step(model, optim="adamw_torch_fused", half=False, head_bytes=0)
    config = model.config
    assert measured.trained * 4 == measured.weights == sum(p.numel() * 4 for p in model.parameters())
    assert measured.layers == config.num_hidden_layers
    assert all(p.grad is None for p in model.parameters())
    # At least residuals and norms' outputs (4 × D), queries, keys and values, and three tensors of the MLP, float32.
    d, inner = config.hidden_size, config.intermediate_size
    least = 4 * (4 * d + 3 * d + 3 * inner)
    assert least <= measured.layer_bytes_per_token <= 3 * least
    frozen = model.requires_grad_(False)
    frozen.model.layers[1].mlp.down_proj.weight.requires_grad_(True)
    assert measure_step(frozen, optim="sgd", half=False, head_bytes=0).trained < measured.trained
