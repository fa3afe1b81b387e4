"""Who the models are: which base an adapter hangs on, and what a policy is held to."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from chatalign.artifact import ARTIFACT_FILE
from chatalign.check.findings import Finding
from chatalign.errors import ChatalignError, ModelError
from chatalign.inputs import model_inputs
from chatalign.models.resolve import Resolved, base_sha256, local_folder, resolve
from chatalign.recipe import ModelSection, Recipe

WITH_REFERENCE = ("dpo", "ppo", "kto")
HASHED_BYTES = 2**30  # of weights; more take too long for a check, and the run hashes them before it loads them


def identity_findings(recipe: Recipe, earlier: Collection[str] = ()) -> Iterator[Finding]:
    """Whether adapters hang on the base that they were trained on, and policy and reference on the same one.

    `earlier` are the folders of the pipeline's stages: one that isn't finished has no model yet.
    """
    for role, section in model_inputs(recipe).items():
        folder = Path(section.name_or_path or "")
        if not folder.is_dir() or (section.name_or_path in earlier and not (folder / ARTIFACT_FILE).is_file()):
            continue
        try:
            resolved = resolve(section.name_or_path or "", revision=section.revision, online=False)
        except ChatalignError as error:
            yield Finding("identity", f"`{role}: {section.name_or_path}`", error)
            continue
        if role == "model" and recipe.stage != "eval" and resolved.kind not in ("model", "adapter"):
            kind = resolved.kind.replace("_", " ")
            problem = ModelError(f"{section.name_or_path}: a {kind}, not a language model; start from one")
            yield Finding("identity", f"`{role}: {section.name_or_path}`", problem)
            continue
        if resolved.adapter is not None:
            yield _base(role, section, resolved)
        if role == "model" and recipe.stage in WITH_REFERENCE:
            yield Finding("reference", _reference(recipe, resolved))


def _reference(recipe: Recipe, resolved: Resolved) -> str:
    """What the policy is held to, in words; it is made from the policy's own base in each of the three ways."""
    if resolved.adapter is not None:
        return f"reference: the adapter {resolved.adapter} as it is now, on the policy's own base {resolved.base}"
    if getattr(recipe, "lora", None) is not None:
        return f"reference: {resolved.base}, the policy's own base, without the new adapter"
    return f"reference: a frozen copy of the policy {resolved.base}"


def _base(role: str, section: ModelSection, resolved: Resolved) -> Finding:
    what = f"`{role}: {section.name_or_path}`: an adapter on {resolved.base}"
    expected = resolved.expected_base_sha256
    if expected is None:
        mend = "chatalign didn't save it; make sure that it belongs there"
        return Finding("identity", what, note=f"{what}, which records no hash of its base → {mend}")
    if weights_bytes(resolved.base, resolved.revision) > HASHED_BYTES:
        return Finding("identity", f"{what}, too large to hash here; the run does it before it loads the base")
    found = base_sha256(resolved.base, resolved.revision)
    if found is not None and found != expected:
        return Finding(
            "identity",
            what,
            ModelError(
                f"{resolved.adapter}: trained on a base with sha256 {expected[:12]}…, but {resolved.base} has "
                f"{found[:12]}…; give it its own base back"
            ),
        )
    return Finding("identity", f"{what}, the one that it was trained on")


def weights_bytes(base: str, revision: str = "main") -> int:
    """The bytes of a base's weights that a hash has to read; those of the Hub's cache are named by theirs."""
    folder = local_folder(base, revision)
    if folder is None or folder != Path(base):
        return 0
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
