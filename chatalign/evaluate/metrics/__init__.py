"""Text metrics through Hugging Face's evaluate, without a network.

``evaluate.load("bleu")`` fetches a script from the Hub. The modules beside this file are loaded by path instead;
they compute with sacrebleu and rouge-score, and read Chinese as well as English.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from chatalign.errors import DataError, DependencyError

TextMetric = Literal["bleu", "rouge", "accuracy"]


def text_metrics(
    names: Sequence[TextMetric], replies: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """The values of the named metrics: ``bleu`` (0–100), ``rouge1``, ``rouge2``, ``rougeL`` and ``exact_match`` (0–1).

    Raises DataError where a prompt has no reference, DependencyError where a package is missing.
    """
    if not names:
        return {}
    if (bare := next((i for i, known in enumerate(references) if not known), None)) is not None:
        raise DataError(
            f"`eval.metrics` needs a right reply for each prompt, and prompt {bare + 1} has none; "
            "add a `references` column (or answers, completion, output), or take `metrics` out"
        )
    try:
        import evaluate
    except ImportError:
        raise DependencyError("`eval.metrics` needs a package; pip install 'chatalign[evaluate]'") from None
    values: dict[str, float] = {}
    for name in names:
        module = evaluate.load(str(Path(__file__).with_name(f"{name}.py")), keep_in_memory=True)
        values |= module.compute(predictions=list(replies), references=[list(known) for known in references])
    return {name: float(value) for name, value in values.items()}
