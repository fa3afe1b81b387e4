"""Exact match, as an evaluate module: the share of replies that equal a reference but for case, spaces and stops."""

import datasets
import evaluate

_EDGES = " \t\n.,;:!?。，；：！？"


class ExactMatch(evaluate.Metric):
    """A reply counts where it equals any of its references, in lower case, single spaces, without outer punctuation."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Rajpurkar et al. (2016), SQuAD",
            inputs_description="predictions: list of texts; references: a list of texts for each",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
            ),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        """``exact_match`` in 0–1."""
        hits = [
            _plain(reply) in {_plain(text) for text in texts}
            for reply, texts in zip(predictions, references, strict=True)
        ]
        return {"exact_match": sum(hits) / len(hits)}


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).strip(_EDGES)
