"""What a run writes, in bytes, estimated before its model is loaded: from the headers of safetensors files.

A checkpoint holds the trained weights in float32 (4 bytes) and the optimizer's states; the finished model the trained
weights again. Nothing else of size is written but the tokens.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatalign.artifact import ARTIFACT_FILE
from chatalign.check.rows import data_sections
from chatalign.check.stops import model_folder
from chatalign.recipe import EvalRecipe, LoraSection, ModelSection, PretrainRecipe, Recipe

WEIGHT = 4  # bytes of a trained weight, float32 on disk
# Bytes of optimizer states a trained weight, by the names of `train.optim`; AdamW and everything else has two floats.
_STATES = {"8bit": 2, "adafactor": 1, "sgd": 0, "lion": 4}
_STATES_OF_OTHERS = 8
TOKENS_PER_BYTE = 1.5  # bytes of kept tokens a byte of rows: an id of 4 bytes for about 4 letters, marks, the place
_NOT_LINEAR = ("embed", "wte", "wpe", "lm_head", "score", "norm")

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Sizes:
    """Estimated bytes: of one checkpoint, of the finished model, of the tokens; and how many checkpoints are kept."""

    checkpoint: int
    model: int
    tokens: int
    kept: int

    @property
    def output(self) -> int:
        """The most that lies in ``output_dir`` at once: a new checkpoint is written before the oldest goes."""
        return (self.kept + (self.kept > 0)) * self.checkpoint + self.model

    @property
    def afterwards(self) -> int:
        """What stays in ``output_dir``."""
        return self.kept * self.checkpoint + self.model


def estimate(recipe: Recipe, earlier: Mapping[str, Recipe]) -> Sizes | None:
    """The sizes of a recipe's run; None where nothing is trained or the model's size isn't known here.

    `earlier` are the pipeline's stages by the folder that they will make.
    """
    train = getattr(recipe, "train", None)
    taken = getattr(recipe, "pretrained", None) and not getattr(recipe, "from_scratch", False)
    if train is None or taken or (weights := trained_weights(recipe, earlier)) is None:
        return None
    states = next((size for name, size in _STATES.items() if name in train.optim), _STATES_OF_OTHERS)
    ppo = getattr(recipe, "ppo", None)
    critic = 2 if ppo is not None and ppo.value == "separate" else 1  # its own weights, as many as the policy's
    return Sizes(
        checkpoint=critic * weights * (WEIGHT + states),
        model=weights * WEIGHT,
        tokens=int(TOKENS_PER_BYTE * sum(_file_bytes(section) for section, _ in data_sections(recipe))),
        kept=_kept(train),
    )


def _kept(train: Any) -> int:
    if train.save_strategy == "no":
        return 0
    made = int(train.max_steps / train.save_steps) if train.max_steps > 0 and train.save_steps >= 1 else None
    if train.save_total_limit is None:
        return made or 1
    return min(train.save_total_limit, made or train.save_total_limit)


def _file_bytes(section: Any) -> int:
    paths = [Path(source.path) for source in [*section.datasets, *section.eval_datasets] if source.max_rows is None]
    return sum(path.stat().st_size for path in paths if path.is_file())


def trained_weights(recipe: Recipe, earlier: Mapping[str, Recipe]) -> int | None:
    """How many weights a recipe trains: the whole model's, or its adapter's."""
    section: ModelSection = recipe.model  # type: ignore[union-attr]
    lora: LoraSection | None = recipe.lora  # type: ignore[union-attr]
    while (before := earlier.get(section.name_or_path or "")) and not Path(before.output_dir, ARTIFACT_FILE).is_file():
        if isinstance(before, EvalRecipe):
            return None
        if isinstance(before, PretrainRecipe) and before.pretrained:
            section = ModelSection(name_or_path=before.pretrained)
            break
        lora, section = lora or before.lora, before.model
    if section.config is not None:
        return _of_config(section.config)
    folder = model_folder(section)
    if folder is None:
        return None
    adapter = adapter_file(section)
    if adapter is not None:
        return _numel(read_shapes(adapter))
    shapes: Shapes = {}
    for file in folder.glob("*.safetensors"):
        shapes |= read_shapes(file)
    if not shapes:
        return None
    return _numel(shapes) if lora is None else lora_weights(shapes, lora)


def adapter_file(section: ModelSection) -> Path | None:
    """The weights of the adapter that a section names, or None where it names a whole model."""
    place = Path(section.name_or_path or "")
    files = (place / "adapter_model.safetensors", place / "model" / "adapter_model.safetensors")
    return next((file for file in files if file.is_file()), None)


def lora_weights(shapes: Shapes, lora: LoraSection) -> int:
    """The weights of a new adapter: r × (in + out) for each matrix that it targets, and modules that are kept whole."""
    targets = lora.target_modules
    total = 0
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if lora.modules_to_save and any(part in lora.modules_to_save for part in module.split(".")):
            total += math.prod(shape)
        elif len(shape) == 2 and name.endswith(".weight"):
            # A string other than all-linear is an expression over module names: taken as if it met every matrix.
            named = module.rpartition(".")[2] in targets if isinstance(targets, list) else True
            if named and not any(part in module for part in _NOT_LINEAR):
                total += lora.r * sum(shape)
    return total


def read_shapes(file: Path) -> Shapes:
    """Every tensor's shape in a safetensors file, from its header alone; empty where it isn't one."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(min(length, 100 * 2**20)))
        return {name: tuple(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__"}
    except (OSError, ValueError, struct.error, KeyError, TypeError):
        return {}  # said where the model is loaded; a size is not worth refusing for


def _numel(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _of_config(config: Mapping[str, Any]) -> int | None:
    """A decoder's weights by its configuration: attention of 4 matrices at most, and a gated feed-forward of 3."""
    try:
        hidden, layers, vocab = (int(config[name]) for name in ("hidden_size", "num_hidden_layers", "vocab_size"))
    except KeyError:
        return None
    inner = int(config.get("intermediate_size", 4 * hidden))
    heads = 1 if config.get("tie_word_embeddings") else 2
    return vocab * hidden * heads + layers * (4 * hidden * hidden + 3 * hidden * inner + 2 * hidden) + hidden
