"""Corpus BLEU by sacrebleu, as an evaluate module; Chinese is cut into characters where a reference holds any."""

import re

import datasets
import evaluate
from sacrebleu.metrics.bleu import BLEU

_CJK = re.compile("[\u3400-\u9fff\uf900-\ufaff]")


class Bleu(evaluate.Metric):
    """BLEU of Papineni et al. (2002), with sacrebleu's tokenizers (Post, 1804.08771)."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Post (2018), A Call for Clarity in Reporting BLEU Scores",
            inputs_description="predictions: list of texts; references: a list of texts for each",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        """``bleu`` in 0–100. Prompts may differ in the number of their references."""
        chinese = any(_CJK.search(text) for texts in references for text in texts)
        most = max(len(texts) for texts in references)
        # sacrebleu takes the n-th reference of every prompt at a time; None where a prompt has fewer.
        streams = [[texts[n] if n < len(texts) else None for texts in references] for n in range(most)]
        scorer = BLEU(tokenize="zh" if chinese else "13a", effective_order=True)
        return {"bleu": scorer.corpus_score(predictions, streams).score}  # type: ignore[arg-type]
