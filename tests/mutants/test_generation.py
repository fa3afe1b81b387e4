"""Failures of what a model says about its own generation: stop tokens, padding, sampling defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.stand_ins import VOCABULARY
from tiny import make_llama
from transformers import GenerationConfig

from chatalign import sft
from chatalign.models import load
from chatalign.models.adapters import load_inference
from chatalign.models.load import load_tokenizer
from chatalign.recipe import ModelSection, validate_stage
from chatalign.rollout import Sampling, TransformersRollout, vllm_server_engine
from chatalign.rollout.vllm_server_engine import VllmServerRollout
from mutants.guard_table import named

END, TURN_END, PAD = 1, 3, 0  # of tiny's tokenizer


def recipe_of(folder: Path, base: Path, **sections: Any) -> Any:
    rows = [{"prompt": f"{i}?", "completion": f"{i}."} for i in range(8)]
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    raw = {
        "stage": "sft",
        "output_dir": str(folder / "run"),
        "model": {"name_or_path": str(base)},
        "data": {"datasets": [{"path": str(folder / "rows.jsonl")}]},
        "train": {"max_steps": 2, "learning_rate": 1e-3, "warmup_steps": 0, "use_cpu": True},
    }
    return validate_stage(raw | sections, where="test")


@pytest.fixture(scope="module", params=[{}, {"lora": {"r": 2}}], ids=["whole", "adapter"])
def run_folder(request: Any, tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """A finished SFT run."""
    folder = tmp_path_factory.mktemp("sft")
    sft.run(recipe_of(folder, tiny_model_folder, **request.param))
    return folder / "run"


def edited(run: Path, **changes: Any) -> Any:
    """Load a run to generate with, its generation config edited."""
    file = run / "model" / "generation_config.json"
    before = file.read_text("utf-8")
    file.write_text(json.dumps(json.loads(before) | changes), "utf-8")
    section = ModelSection(name_or_path=str(run))
    try:
        return load_inference(section, load_tokenizer(section))
    finally:
        file.write_text(before, "utf-8")


# 11: stop tokens


def test_a_run_whose_stop_token_was_taken_out(run_folder: Path) -> None:
    assert edited(run_folder).generation_config.eos_token_id == [TURN_END]
    with named(11):
        edited(run_folder, eos_token_id=END)
    with named(11):
        edited(run_folder, eos_token_id=None)


def test_replies_that_end_in_what_nobody_stops_at(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template's end of turn is overlooked, and the model goes on to its old EOS."""
    monkeypatch.setattr(load, "stop_token_ids", lambda *_: [END])
    with named(11):
        sft.run(recipe_of(tmp_path, tiny_model_folder))


def test_a_generation_config_that_is_not_written(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = GenerationConfig.save_pretrained

    def old(self: Any, folder: Any, **kwargs: Any) -> None:
        self.eos_token_id = END
        save(self, folder, **kwargs)

    monkeypatch.setattr(GenerationConfig, "save_pretrained", old)
    with named(11):
        sft.run(recipe_of(tmp_path, tiny_model_folder))


def test_a_foreign_model_is_mended_and_not_refused(
    tmp_path: Path, tiny_model_folder: Path, tiny_tokenizer: Any
) -> None:
    """Many published models list their pad token, or lack their template's stop: that is no fault of the user's."""
    model = make_llama(len(tiny_tokenizer))
    model.generation_config.eos_token_id = [PAD, END]
    model.save_pretrained(tmp_path / "foreign")
    tiny_tokenizer.save_pretrained(tmp_path / "foreign")
    section = ModelSection(name_or_path=str(tmp_path / "foreign"))
    loaded = load_inference(section, load_tokenizer(section))
    assert loaded.generation_config.eos_token_id == [END, TURN_END]
    sft.run(recipe_of(tmp_path / "sft", tmp_path / "foreign"))


# 12: pad


def test_a_run_whose_pad_token_ends_replies(run_folder: Path) -> None:
    with named(12):
        edited(run_folder, eos_token_id=[TURN_END, PAD])


def test_padded_batches_of_a_saved_model_are_answered(run_folder: Path) -> None:
    """transformers' own generate, from the saved folder, on a left-padded batch: more than nothing for every row."""
    model = edited(run_folder)
    config = GenerationConfig.from_pretrained(str(run_folder / "model"))
    ids = torch.tensor([[PAD, PAD, 20, 21], [20, 21, 22, 23]])
    config.max_new_tokens = 4
    replies = model.generate(input_ids=ids, attention_mask=(ids != PAD).long(), generation_config=config)[:, 4:]
    assert bool((replies[:, 0] != PAD).all())


# 14: sampling defaults

PUBLISHED = {"repetition_penalty": 1.3, "temperature": 0.6, "top_k": 2, "top_p": 0.5, "do_sample": True}


class _Server:
    """A server that is up and would answer; it is never asked."""

    base_url = "http://nowhere"

    def wait_until_up(self) -> None: ...

    def base_model(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("name", ["repetition_penalty", "temperature", "top_k", "top_p"])
def test_a_server_that_would_fill_in_sampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    asked = vllm_server_engine.sampling_fields

    def without(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return {key: value for key, value in asked(*args, **kwargs).items() if key != name}

    monkeypatch.setattr(vllm_server_engine, "sampling_fields", without)
    model = make_llama(VOCABULARY)
    model.generation_config.update(**PUBLISHED)
    engine = VllmServerRollout(model, _Server(), folder=tmp_path, vocabulary=VOCABULARY, longest=8)
    with named(14):
        engine.generate([[5, 6]], Sampling(max_new_tokens=2, stop_token_ids=(3,)))


def test_own_decoding_reads_no_sampling_defaults() -> None:
    model = make_llama(VOCABULARY)
    sampling = Sampling(max_new_tokens=6, stop_token_ids=(3,), temperature=0.9)
    before = TransformersRollout(model, pad_token_id=0).generate([[5, 6], [7]], sampling)
    model.generation_config.update(**PUBLISHED)
    assert TransformersRollout(model, pad_token_id=0).generate([[5, 6], [7]], sampling) == before
