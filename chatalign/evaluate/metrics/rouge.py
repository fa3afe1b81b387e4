"""ROUGE by rouge-score, as an evaluate module; a Chinese character is a token of its own."""

import re

import datasets
import evaluate
from rouge_score.rouge_scorer import RougeScorer

_TOKEN = re.compile("[a-z0-9]+|[\u3400-\u9fff\uf900-\ufaff]")
_TYPES = ["rouge1", "rouge2", "rougeL"]


class _Tokenizer:
    """rouge-score's own tokenizer drops everything but a–z and 0–9, and so every Chinese reply whole."""

    def tokenize(self, text: str) -> list[str]:
        return _TOKEN.findall(text.lower())


class Rouge(evaluate.Metric):
    """F1 of unigrams, bigrams and the longest common subsequence (Lin, 2004); the best reference counts."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Lin (2004), ROUGE: A Package for Automatic Evaluation of Summaries",
            inputs_description="predictions: list of texts; references: a list of texts for each",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        """``rouge1``, ``rouge2``, ``rougeL`` in 0–1, means over the predictions."""
        scorer = RougeScorer(_TYPES, tokenizer=_Tokenizer())
        scores = [scorer.score_multi(texts, reply) for reply, texts in zip(predictions, references, strict=True)]
        return {kind: sum(score[kind].fmeasure for score in scores) / len(scores) for kind in _TYPES}
