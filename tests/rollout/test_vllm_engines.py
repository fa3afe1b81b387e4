"""vLLM's two forms against the transformers engine and a whole forward pass; what a server does wrong, in one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rollout import fake_vllm_module
from rollout.fake_vllm import EOS, FakeServer, serving
from tiny import make_llama
from transformers import AutoModelForCausalLM

from chatalign.errors import DependencyError, ModelError, RolloutError
from chatalign.rollout import (
    RolloutEngine,
    Sampling,
    TransformersRollout,
    VllmClient,
    VllmColocateRollout,
    VllmServerRollout,
    VllmSettings,
)
from chatalign.rollout.vllm_adapter import lora_rank, refuse_unserved

PAD, STOPS, BANNED = 0, (3, 7, 8, 27, 31), (0, 5)
PROMPTS = [[9, 6, 8], [9], [12, 4, 13, 6, 8, 17, 20], [8, 30], [21, 22, 23, 24, 25]]
SAMPLING = Sampling(max_new_tokens=12, stop_token_ids=STOPS, forbidden_token_ids=BANNED, temperature=0.7, seed=5)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_llama(40, initializer_range=0.3).save_pretrained(folder)
    return folder


def with_adapter(folder: Path, **settings: Any) -> Any:
    """The base with an adapter that is no longer 0."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, **settings)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config).eval()


def shake(model: Any) -> None:
    """An update: every weight that trains moves."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))


@pytest.fixture
def server(base_folder: Path) -> Iterator[FakeServer]:
    with serving(base_folder) as running:
        yield running


def by_server(model: Any, server: FakeServer, folder: Path, **settings: Any) -> VllmServerRollout:
    client = VllmClient(server.url, timeout_s=settings.pop("timeout_s", 20))
    return VllmServerRollout(model, client, folder=folder, **{"vocabulary": 40, "longest": 30} | settings)


def colocated(model: Any, base: Path, *, sleep: bool = False, processes: int = 1, **over: Any) -> VllmColocateRollout:
    settings = VllmSettings(
        model=str(base),
        revision=None,
        dtype="float32",
        max_model_len=30,
        gpu_memory_utilization=0.3,
        tensor_parallel_size=over.get("tensor_parallel_size", 1),
        enable_sleep_mode=sleep,
        seed=0,
    )
    return VllmColocateRollout(model, settings, vocabulary=40, processes=processes)


@pytest.fixture(params=["server", "colocate adapter", "colocate full"])
def engine_and_model(
    request: pytest.FixtureRequest, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[RolloutEngine, Any]:
    fake_vllm_module.install(monkeypatch)
    if request.param == "colocate full":
        model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()
        shake(model)
        return colocated(model, base_folder), model
    model = with_adapter(base_folder)
    if request.param == "server":
        return by_server(model, request.getfixturevalue("server"), tmp_path), model
    return colocated(model, base_folder), model


def test_greedy_replies_are_those_of_the_transformers_engine(engine_and_model: tuple[RolloutEngine, Any]) -> None:
    engine, model = engine_and_model
    for sampling in (replace(SAMPLING, temperature=0.0), replace(SAMPLING, temperature=0.0, min_new_tokens=5)):
        ours = TransformersRollout(model, PAD).generate(PROMPTS, sampling)
        theirs = engine.generate(PROMPTS, sampling)
        assert theirs.response_ids == ours.response_ids
        assert theirs.ended == ours.ended
    assert any(ours.ended), "the test needs a reply that ends"
    assert not all(ours.ended), "and one that is cut"


def test_logprobs_are_those_of_one_whole_forward(engine_and_model: tuple[RolloutEngine, Any]) -> None:
    engine, model = engine_and_model
    rollout = engine.generate(PROMPTS * 4, SAMPLING)
    for prompt, reply, logps in zip(PROMPTS * 4, rollout.response_ids, rollout.logprobs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + reply]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        logits[:, list(BANNED)] = -torch.inf
        expected = (logits / 0.7).log_softmax(-1).gather(1, torch.tensor(reply)[:, None]).squeeze(1)
        assert logps == pytest.approx(expected.tolist(), abs=1e-4)
        assert not set(reply) & set(BANNED)
        assert not set(reply[:-1]) & set(STOPS)


def test_a_reply_depends_on_its_seed_alone(engine_and_model: tuple[RolloutEngine, Any]) -> None:
    engine, _ = engine_and_model
    seeds = [100 + row for row in range(len(PROMPTS))]
    together = engine.generate(PROMPTS, SAMPLING, row_seeds=seeds)
    backwards = engine.generate(PROMPTS[::-1], SAMPLING, row_seeds=seeds[::-1])
    assert together.response_ids == backwards.response_ids[::-1]
    assert engine.generate(PROMPTS[2:3], SAMPLING, row_seeds=seeds[2:3]).response_ids == together.response_ids[2:3]
    other = engine.generate(PROMPTS, replace(SAMPLING, seed=6), row_seeds=seeds)
    assert other.response_ids != together.response_ids
    same = engine.generate([[9, 6]] * 8, replace(SAMPLING, temperature=2.0, min_new_tokens=10)).response_ids
    assert len({tuple(reply) for reply in same}) == 8


def test_an_update_changes_the_replies(engine_and_model: tuple[RolloutEngine, Any]) -> None:
    engine, model = engine_and_model
    greedy = replace(SAMPLING, temperature=0.0, max_new_tokens=1)  # the first token is what a stale prefix would give
    before = engine.generate(PROMPTS, greedy)
    shake(model)
    after = engine.generate(PROMPTS, greedy)
    assert after.response_ids == TransformersRollout(model, PAD).generate(PROMPTS, greedy).response_ids
    assert after.response_ids != before.response_ids


def test_truncation_and_minimum_length_hold(engine_and_model: tuple[RolloutEngine, Any]) -> None:
    engine, model = engine_and_model
    few = replace(SAMPLING, top_k=1, min_new_tokens=5)
    greedy = TransformersRollout(model, PAD).generate(PROMPTS, replace(few, temperature=0.0))
    assert engine.generate(PROMPTS, few).response_ids == greedy.response_ids
    rollout = engine.generate(PROMPTS * 6, replace(SAMPLING, min_new_tokens=5, top_p=0.9))
    assert min(map(len, rollout.response_ids)) == 6


def test_stop_tokens_and_bans_outside_the_vocabulary_are_passed_over(engine_and_model: tuple[Any, Any]) -> None:
    engine, _ = engine_and_model
    sampling = replace(SAMPLING, stop_token_ids=(*STOPS, 50_000), forbidden_token_ids=(*BANNED, 60_000))
    assert engine.generate(PROMPTS, sampling).response_ids == engine.generate(PROMPTS, SAMPLING).response_ids


def test_only_the_stop_tokens_that_are_given_stop(engine_and_model: tuple[RolloutEngine, Any]) -> None:
    engine, _ = engine_and_model
    endless = engine.generate(PROMPTS * 4, replace(SAMPLING, stop_token_ids=(), temperature=2.0))
    assert any(EOS in reply[:-1] for reply in endless.response_ids), "the test needs the model's own EOS in a reply"
    assert {len(reply) for reply in endless.response_ids} == {SAMPLING.max_new_tokens}


def test_bad_prompts_are_refused(engine_and_model: tuple[RolloutEngine, Any]) -> None:
    engine, _ = engine_and_model
    with pytest.raises(ValueError, match="prompt 1 has no token"):
        engine.generate([[9], []], SAMPLING)
    with pytest.raises(ValueError, match="1 row seeds for 2 prompts"):
        engine.generate([[9], [6]], SAMPLING, row_seeds=[1])


# Served


def test_each_draw_has_an_adapter_of_its_own_and_leaves_nothing(
    base_folder: Path, tmp_path: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "a-key")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    engine = by_server(with_adapter(base_folder), server, tmp_path / "run")
    for _ in range(2):
        engine.generate(PROMPTS, SAMPLING)
    assert len(set(server.loaded)) == 2
    assert not server.engine.adapters
    assert list((tmp_path / "run").iterdir()) == []
    assert {request["model"] for request in server.asked} == set(server.loaded)
    assert len({request["seed"] for request in server.asked[: len(PROMPTS)]}) == len(PROMPTS)
    assert server.headers["Authorization"] == "Bearer a-key"


FAULTS = {
    "500": "HTTP 500, EngineCore encountered an issue. See stack trace",
    "truncated": "is no whole JSON",
    "few": "gave 0 replies to 1 prompt",
    "no logprobs": "has no log-probabilities; start vLLM with --logprobs-mode processed_logprobs",
    "no ids": "has no `token_ids`; use vLLM",
    "aborted": "finished by 'abort'",
    "short": "raise its --max-model-len",
    "uneven": r"has \d+ log-probabilities for \d+ tokens",
    "own stop": "isn't a stop token here; start vLLM with --generation-config vllm",
    "banned": "holds the banned token 0",
    "positive": "a value that is no log-probability",
    "hang": "no answer within 0.3 s; raise `ppo.vllm_server_timeout`",
    "drop": "the connection broke",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_fails_is_named_in_one_line(
    base_folder: Path, tmp_path: Path, server: FakeServer, fault: str
) -> None:
    engine = by_server(with_adapter(base_folder), server, tmp_path)
    if fault == "hang":
        engine.client.timeout_s = 0.3
    server.fault = fault
    # Token 3 and its kin never come, so that no reply ends before its limit.
    sampling = replace(SAMPLING, max_new_tokens=4, min_new_tokens=4)
    with pytest.raises(RolloutError, match=FAULTS[fault]) as caught:
        engine.generate(PROMPTS[:1], sampling)
    assert "\n" not in str(caught.value)


def test_a_server_that_is_down_or_too_small_or_without_adapters(base_folder: Path, tmp_path: Path) -> None:
    model = with_adapter(base_folder)
    with serving(base_folder, max_model_len=20) as server:
        with pytest.raises(RolloutError, match=r"room for 20 tokens.* start the server with --max-model-len 30"):
            by_server(model, server, tmp_path)
        engine = by_server(model, server, tmp_path, longest=20)
    with pytest.raises(RolloutError, match=r"no vLLM server after 0.2 s \(.*refused.*vllm serve") as caught:
        by_server(model, server, tmp_path, timeout_s=0.2)
    assert "\n" not in str(caught.value)
    with pytest.raises(RolloutError, match="/v1/load_lora_adapter: can't be reached"):
        engine.generate(PROMPTS, SAMPLING)
    with serving(base_folder, lora=False) as server:
        engine = by_server(model, server, tmp_path)
        with pytest.raises(RolloutError, match=r"HTTP 404, Not Found; start it as VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
            engine.generate(PROMPTS, SAMPLING)
    with serving(base_folder) as server:
        engine, server.engine.max_lora_rank = by_server(model, server, tmp_path), 2
        with pytest.raises(RolloutError, match=r"LoRA rank 4 is greater than max_lora_rank 2"):
            engine.generate(PROMPTS, SAMPLING)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
    ],
)
def test_adapters_that_vllm_would_not_compute_are_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ModelError, match=f"doesn't serve an adapter with `{key}`"):
        refuse_unserved(LoraConfig(r=4, **settings))


def test_ranks_are_rounded_up_to_those_that_vllm_takes() -> None:
    assert [lora_rank(LoraConfig(r=r)) for r in (1, 8, 9, 64, 500)] == [8, 8, 16, 64, 512]
    with pytest.raises(ModelError, match=r"`lora\.r: 513` is above"):
        lora_rank(LoraConfig(r=513))


# Colocated


def test_sleep_lies_between_draws(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = fake_vllm_module.install(monkeypatch)
    engine = colocated(with_adapter(base_folder), base_folder, sleep=True)
    engine.generate(PROMPTS, SAMPLING)
    (made,) = llm.made
    assert made.calls == ["sleep 1", "wake_up", "generate", "sleep 1"]
    assert made.settings["logprobs_mode"] == "processed_logprobs"
    assert made.settings["max_lora_rank"] == 8
    assert made.settings["distributed_executor_backend"] is None


def test_all_weights_are_copied_in_this_process_and_the_prefix_cache_is_emptied(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = fake_vllm_module.install(monkeypatch)
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()
    engine = colocated(model, base_folder, sleep=True)
    engine.generate(PROMPTS, SAMPLING)
    (made,) = llm.made
    assert made.calls == ["sleep 1", "wake_up", "apply_model", "reset_prefix_cache", "generate", "sleep 1"]
    assert made.launcher["RANK"] == "0"
    assert made.launcher["WORLD_SIZE"] == "1"
    import os

    assert "RANK" not in os.environ, "a later stage of this process would take itself for one of several"


def test_without_vllm_the_package_is_named(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(DependencyError, match=r"pip install 'chatalign\[vllm\]'"):
        colocated(with_adapter(base_folder), base_folder)


def test_what_vllm_refuses_is_one_line(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = fake_vllm_module.install(monkeypatch)
    monkeypatch.setattr(llm, "refusal", ValueError("Free memory on device is less\nthan desired"))
    with pytest.raises(RolloutError, match=r"less than desired\); lower `ppo.vllm_gpu_memory_utilization`") as caught:
        colocated(with_adapter(base_folder), base_folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(RolloutError, match="vllm_tensor_parallel_size"):
        colocated(with_adapter(base_folder), base_folder, processes=2, tensor_parallel_size=2)


def test_the_adapter_that_is_written_is_what_peft_reads(base_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    from chatalign.rollout.vllm_adapter import write_adapter

    model = with_adapter(base_folder)
    write_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))["inference_mode"] is True
    read = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), tmp_path).eval()
    ids = torch.tensor([PROMPTS[2]])
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, model(ids).logits)


# The real one


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM needs a GPU")
@pytest.mark.parametrize("adapter", [True, False])
def test_vllm_itself(tmp_path: Path, tiny_tokenizer: Any, adapter: bool) -> None:
    pytest.importorskip("vllm")
    # Heads of 64 and a vocabulary that vLLM's kernels take.
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "initializer_range": 0.1}
    make_llama(len(tiny_tokenizer), **shape).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = (with_adapter(tmp_path / "base") if adapter else base).to("cuda").eval()
    settings = VllmSettings(
        model=str(tmp_path / "base"),
        revision=None,
        dtype="bfloat16" if adapter else "float32",  # vLLM's LoRA kernels have no float32
        max_model_len=64,
        gpu_memory_utilization=0.2,
        tensor_parallel_size=1,
        enable_sleep_mode=True,
        seed=0,
    )
    engine = VllmColocateRollout(model, settings, vocabulary=len(tiny_tokenizer), processes=1)
    for _ in range(2):
        rollout = engine.generate(PROMPTS, replace(SAMPLING, top_p=1.0))
        for prompt, reply, logps in zip(PROMPTS, rollout.response_ids, rollout.logprobs, strict=True):
            with torch.no_grad():
                ids = torch.tensor([prompt + reply], device="cuda")
                logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            logits[:, list(BANNED)] = -torch.inf
            own = (logits / 0.7).log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1)
            assert sum(abs(a - b) for a, b in zip(own.tolist(), logps, strict=True)) / len(logps) < 0.1
        shake(model.cpu())
        model.to("cuda")
