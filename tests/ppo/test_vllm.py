"""PPO with vLLM as its sampler: on a stand-in server and module whose numbers are a model's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_ranks
from rollout import fake_vllm_module
from rollout.fake_vllm import FakeServer, serving
from tiny import make_llama

from chatalign import ppo
from chatalign.check import refuse_first
from chatalign.errors import DependencyError, GuardError, ModelError, RecipeError, RolloutError
from chatalign.recipe import PpoRecipe, PpoSection
from chatalign.recipe.load import merge

from .conftest import LORA, Make
from .test_resume import go_on_from
from .test_run import logged, weights


@pytest.fixture(scope="module")
def sharp_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A model whose next-token distributions are far from flat, so that a temperature shows in them."""
    folder = tmp_path_factory.mktemp("sharp") / "model"
    make_llama(len(tiny_tokenizer), initializer_range=0.3).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def server(sharp_folder: Path) -> Iterator[FakeServer]:
    with serving(sharp_folder) as running:
        yield running


@pytest.fixture
def make_served(make_recipe: Make, sharp_folder: Path, server: FakeServer) -> Make:
    """A tiny recipe on `server`."""

    def make(name: str = "run", over: dict[str, Any] | None = None) -> PpoRecipe:
        section = {"rollout_engine": "vllm_server", "vllm_server_base_url": server.url, "vllm_server_timeout": 20}
        base = {"lora": LORA, "model": {"name_or_path": str(sharp_folder)}, "ppo": section}
        return make_recipe(name, merge(base, over or {}))

    return make


def test_a_run_starts_at_kl_0_and_hands_its_updates_over(make_served: Make, server: FakeServer) -> None:
    recipe = make_served("run", {"ppo": {"num_mini_batches": 1, "num_ppo_epochs": 1, "total_episodes": 24}})
    ppo.run(recipe)
    first, *others = logged(recipe)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert all(line["objective/kl_k3"] > 1e-6 for line in others)
    for line in (first, *others):
        # A server with the weights of one rollout before would show here.
        assert line["sampler/logprob_gap"] < 1e-4
        assert line["sampler/importance_weight"] == pytest.approx(1, abs=1e-4)
        assert line["sampler/capped"] == 0
        assert line["policy/ratio_mean"] == pytest.approx(1, abs=1e-4)
    assert len(server.loaded) == 3
    assert not server.engine.adapters
    seeds = [request["seed"] for request in server.asked]
    assert len(set(seeds)) == len(seeds) == 24


def test_a_run_is_the_same_twice_and_from_any_checkpoint(make_served: Make) -> None:
    over = {"train": {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}}
    whole = make_served("whole", over)
    ppo.run(whole)
    for step in (1, 4):  # in the middle of the first rollout, and between the two
        resumed = make_served(f"resumed{step}", over)
        go_on_from(Path(whole.output_dir), step, Path(resumed.output_dir))
        ppo.run(resumed)
        assert [line["step"] for line in logged(resumed)] == list(range(step + 1, 9))
        for name, tensor in weights(whole).items():
            assert torch.equal(weights(resumed)[name], tensor), name


@pytest.mark.parametrize("settings", [{"top_p": 0.5}, {"top_k": 3}, {"min_response_length": 6}])
def test_truncation_is_weighed(make_served: Make, settings: dict[str, Any]) -> None:
    once = {"num_mini_batches": 1, "num_ppo_epochs": 1, "total_episodes": 8, "temperature": 0.8}
    recipe = make_served("run", {"ppo": once | settings})
    ppo.run(recipe)
    (line,) = logged(recipe)
    # What was left out of the draw makes the kept tokens likelier than the policy has them.
    assert 0.3 < line["sampler/importance_weight"] < 1
    assert line["sampler/logprob_gap"] > 1e-6


def test_raw_logprobs_are_refused_before_any_update(make_served: Make, server: FakeServer) -> None:
    server.engine.logprobs_mode = "raw_logprobs"
    recipe = make_served("run", {"ppo": {"temperature": 0.6}})
    with pytest.raises(GuardError, match=r"nats a token .* start vLLM with --logprobs-mode processed_logprobs") as it:
        ppo.run(recipe)
    assert "\n" not in str(it.value)
    assert not (Path(recipe.output_dir) / "model").exists()


def test_another_base_on_the_server_is_refused(
    make_recipe: Make, sharp_folder: Path, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    other = tmp_path / "other"
    shutil.copytree(sharp_folder, other)
    make_llama(len(tiny_tokenizer), seed=7, initializer_range=0.3).save_pretrained(other)
    with serving(other) as server:
        section = {"rollout_engine": "vllm_server", "vllm_server_base_url": server.url}
        recipe = make_recipe("run", {"lora": LORA, "model": {"name_or_path": str(sharp_folder)}, "ppo": section})
        with pytest.raises(GuardError, match="on the base that the recipe's model hangs on"):
            ppo.run(recipe)


def test_a_sampler_that_drifts_is_corrected_and_capped(
    make_served: Make, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The server thinks every token 5 % less likely than it is: weights of 1.05, or of the cap.
    drawn = server.engine.draw

    def drifting(*args: Any) -> Any:
        ids, logprobs, reason = drawn(*args)
        return ids, [value - 0.0488 for value in logprobs], reason

    monkeypatch.setattr(server.engine, "draw", drifting)
    once: dict[str, Any] = {"num_mini_batches": 1, "num_ppo_epochs": 1, "total_episodes": 8}
    once["whiten_advantages"] = False  # whitened ones have mean 0, and so has the loss at a ratio of 1
    recipes = {
        "free": make_served("free", {"ppo": once}),
        "capped": make_served("capped", {"ppo": once | {"vllm_importance_sampling_clip_max": 1.02}}),
        "off": make_served("off", {"ppo": once | {"vllm_importance_sampling_correction": False}}),
    }
    lines = {}
    for name, recipe in recipes.items():
        ppo.run(recipe)
        (lines[name],) = logged(recipe)
    assert lines["free"]["sampler/importance_weight"] == pytest.approx(1.05, abs=1e-3)
    assert lines["free"]["sampler/capped"] == 0
    assert lines["capped"]["sampler/importance_weight"] == pytest.approx(1.02, abs=1e-6)
    assert lines["capped"]["sampler/capped"] == 1
    assert "sampler/importance_weight" not in lines["off"]
    assert lines["off"]["sampler/logprob_gap"] == pytest.approx(0.0488, abs=1e-3)
    assert abs(lines["off"]["loss/policy"]) > 0.01
    # The same replies and advantages: the policy's loss is the uncorrected one times the weight.
    for name, weight in (("free", 1.05), ("capped", 1.02)):
        assert lines[name]["loss/policy"] == pytest.approx(weight * lines["off"]["loss/policy"], rel=1e-3, abs=1e-6)
        assert lines[name]["loss/value"] == pytest.approx(lines["off"]["loss/value"], rel=1e-5)


@pytest.mark.parametrize(("fault", "message"), [("500", "HTTP 500"), ("few", "gave 0 replies to 1 prompt")])
def test_a_server_that_fails_stops_the_run_in_one_line(
    make_served: Make, server: FakeServer, fault: str, message: str
) -> None:
    server.fault = fault
    with pytest.raises(RolloutError, match=message) as caught:
        ppo.run(make_served())
    assert "\n" not in str(caught.value)


def test_what_a_server_cannot_be_given_is_refused(make_served: Make) -> None:
    with pytest.raises(RecipeError, match="this recipe trains all weights; add a `lora` section"):
        ppo.run(make_served("full", {"lora": None}))
    with pytest.raises(ModelError, match="doesn't serve an adapter with `use_dora`"):
        ppo.run(make_served("dora", {"lora": {**LORA, "use_dora": True}}))
    with pytest.raises(ValueError, match="starts with http://"):
        make_served("url", {"ppo": {"vllm_server_base_url": "localhost:8000"}})


@pytest.mark.parametrize(
    ("engine", "unread"),
    [
        ("transformers", {"vllm_server_port": 9000}),
        ("transformers", {"vllm_importance_sampling_clip_max": 2.0}),
        ("vllm_server", {"vllm_tensor_parallel_size": 2}),
        ("vllm_colocate", {"vllm_server_timeout": 9.0}),
    ],
)
def test_a_key_that_the_engine_does_not_read_is_refused(engine: str, unread: dict[str, Any]) -> None:
    (name,) = unread
    with pytest.raises(ValueError, match=f"`{name}` isn't read under `rollout_engine: {engine}`"):
        PpoSection(rollout_engine=engine, **unread)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.001, 2.5])
def test_temperatures_that_vllm_would_change_or_refuse(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"vLLM takes 0.01 to 2"):
        PpoSection(rollout_engine="vllm_server", temperature=temperature)


def test_check_asks_for_vllm_where_it_is_colocated(make_recipe: Make) -> None:
    if find_spec("vllm") is not None:
        pytest.skip("vllm is installed")
    with pytest.raises(DependencyError, match=r"pip install 'chatalign\[vllm\]'"):
        refuse_first(make_recipe("run", {"lora": LORA, "ppo": {"rollout_engine": "vllm_colocate"}}))


@pytest.mark.slow
def test_two_processes_share_a_server(make_served: Make, server: FakeServer, tmp_path: Path) -> None:
    one, two = make_served("one"), make_served("two")
    ppo.run(one)
    run_ranks(2, ppo.run, two, printed=tmp_path / "printed.txt")
    assert len(set(server.loaded)) == 4, "one adapter a rollout, however many processes"
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lora", [LORA, None])
def test_a_run_in_one_process_with_vllm(
    make_recipe: Make, sharp_folder: Path, monkeypatch: pytest.MonkeyPatch, lora: dict[str, Any] | None
) -> None:
    llm = fake_vllm_module.install(monkeypatch)
    section = {"rollout_engine": "vllm_colocate", "vllm_enable_sleep_mode": True}
    base = {"lora": lora, "model": {"name_or_path": str(sharp_folder)}, "ppo": section}
    evaluated = {"data": {"eval_fraction": 0.3}, "train": {"eval_strategy": "steps", "eval_steps": 8}}
    recipe = make_recipe("run", merge(base, evaluated))
    ppo.run(recipe)
    (made,) = llm.made
    assert made.calls.count("generate") == 3, "two rollouts and an evaluation"
    assert made.asleep
    # vLLM multiplies adapters in half precision only.
    assert made.settings["dtype"] == ("bfloat16" if lora else "float32")
    assert made.settings["model"] == str(sharp_folder)
    gaps = [line["sampler/logprob_gap"] for line in logged(recipe) if "sampler/logprob_gap" in line]
    assert len(gaps) == 2
    assert max(gaps) < 1e-4
    assert json.loads((Path(recipe.output_dir) / "artifact.json").read_text("utf-8"))["kind"]


def test_a_quantized_base_is_not_put_beside_vllm(
    make_recipe: Make, sharp_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chatalign.engine.ppo_setup import _ENGINES, _Parts

    fake_vllm_module.install(monkeypatch)
    over = {"lora": LORA, "quantization": {"load_in_4bit": True}, "ppo": {"rollout_engine": "vllm_colocate"}}
    recipe = make_recipe("run", merge({"model": {"name_or_path": str(sharp_folder)}}, over))
    nothing: Any = type("Roles", (), {"policy": None})
    parts = _Parts(recipe=recipe, run=nothing, roles=nothing, tokenizer=None, longest=8, bf16=False)
    with pytest.raises(RecipeError, match="`quantization` don't go together"):
        _ENGINES["vllm_colocate"](parts)


def test_keys_are_trls() -> None:
    """Names and defaults are those of GRPOConfig, but for the host: a server of TRL's listens to everybody's."""
    grpo = pytest.importorskip("trl").GRPOConfig
    theirs = {field.name: field.default for field in fields(grpo)}
    ours = {name: field.default for name, field in PpoSection.model_fields.items() if name.startswith("vllm_")}
    assert len(ours) == 10
    assert ours | {"vllm_server_host": "0.0.0.0"} == {name: theirs[name] for name in ours}
    assert ours["vllm_server_host"] == "127.0.0.1"
