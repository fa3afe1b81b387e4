"""Next-token training on plain text: ``chatalign pretrain RECIPE`` or ``accelerate launch -m chatalign.pretrain``.

From a configuration (``model.config``) or going on from a model. Where the recipe names the finished model that it
made (``pretrained``), that one is verified and taken, so that a chain starts in seconds; ``from_scratch: true``
trains it again. The artifact says which of the two happened.
"""

from __future__ import annotations

if __name__ == "__main__":  # before all that follows is imported: a wrong recipe is refused without it
    from chatalign.launch import stage_main

    stage_main("pretrain")

import shutil
from pathlib import Path

from chatalign.artifact import (
    ARTIFACT_FILE,
    Artifact,
    BaseModelRef,
    hash_files,
    load_artifact,
    sha256_weights,
    verify_files,
)
from chatalign.data import prepare
from chatalign.data.collate import collate_lm
from chatalign.engine.lm_trainer import LmTrainer
from chatalign.engine.stage import Work, finish, last_means, native_settings, train
from chatalign.errors import ModelError
from chatalign.models.adapters import load_policy
from chatalign.models.resolve import resolve
from chatalign.models.tokenizer import load_tokenizer, text_hashes
from chatalign.phases import phase
from chatalign.recipe import ModelSection, PretrainRecipe
from chatalign.runs import Run, is_main_process, open_run


def run(recipe: PretrainRecipe) -> Artifact:
    """Train the recipe's model, or take the finished one that it names; raises a ChatalignError otherwise."""
    opened = open_run(recipe)
    if recipe.pretrained and not recipe.from_scratch:
        return take_pretrained(recipe, opened, recipe.pretrained)
    with phase("data"):
        tokenizer = load_tokenizer(recipe.model)
        prepared = prepare(recipe.data, tokenizer, "text", seed=recipe.train.seed)
    with phase("model"):
        policy = load_policy(recipe, tokenizer)
    work = Work(
        recipe=recipe,
        run=opened,
        model=policy.model,
        is_adapter=policy.is_adapter,
        tokenizer=tokenizer,
        rows=prepared,
    )
    trainer = LmTrainer(**native_settings(work), collate=collate_lm)
    wall_s = train(trainer, opened)
    return finish(
        run=opened,
        recipe=recipe,
        trainer=trainer,
        tokenizer=tokenizer,
        data=prepared.used,
        base_ref=policy.base_ref,
        kind="adapter" if policy.is_adapter else "model",
        metrics=last_means(trainer),
        extra={"from_scratch": recipe.model.config is not None, "taken_from": None},
        wall_s=wall_s,
    )


def take_pretrained(recipe: PretrainRecipe, opened: Run, folder: str) -> Artifact:
    """Copy a finished model into the run, checked against the artifact that lies beside it, and record its hash.

    Raises ModelError where it is no whole model, was altered since it was made, or has no tokenizer.
    """
    resolved = resolve(folder)
    if resolved.kind != "model" or not Path(resolved.base).is_dir():
        raise ModelError(f"`pretrained: {folder}` is no model folder; set `from_scratch: true` to make it")
    source = Path(resolved.base)
    sha256 = sha256_weights(source)
    if recipe.pretrained_sha256 not in (None, sha256):
        raise ModelError(
            f"`pretrained: {folder}` has weights of sha256 {sha256}, not `pretrained_sha256`: they were altered since "
            f"this recipe made them; fetch them again, or set `from_scratch: true`"
        )
    made_by = _verified_record(source)
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(source)))
    artifact = Artifact(
        stage="pretrain",
        kind="model",
        run_id=opened.run_id,
        fingerprint=opened.fingerprint,
        base_model=BaseModelRef(name_or_path=str(source), sha256=sha256),
        parents=opened.parents,
        recipe=recipe.model_dump(mode="json"),
        seeds={"seed": recipe.train.seed},
        metrics=made_by.metrics if made_by else {},
        extra={"from_scratch": False, "taken_from": str(source), "made_by_run": made_by.run_id if made_by else None},
        tokens_seen=made_by.tokens_seen if made_by else 0,
    ).model_copy(update=text_hashes(tokenizer, source))
    if is_main_process():
        shutil.copytree(source, opened.model_folder, dirs_exist_ok=True)
        artifact = artifact.model_copy(update={"files": hash_files(opened.folder)})
        artifact.save(opened.folder)
    return artifact


def _verified_record(source: Path) -> Artifact | None:
    """The artifact of the run that made the model, its files checked; None where the model has none beside it."""
    if not (source.parent / ARTIFACT_FILE).is_file() or source.name != "model":
        return None
    record = load_artifact(source.parent)
    if problems := verify_files(source.parent, record.files):
        raise ModelError(f"{problems[0]}; fetch the model again, or set `from_scratch: true` to make it")
    return record
