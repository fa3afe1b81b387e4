"""Which language a row is in, by py3langid: naive Bayes over bytes, its model inside the package, no download."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any

from chatalign.errors import DataError, DependencyError

_SURE = 0.3  # a less probable language is no reason to leave a row out: five words may be anything
_READ = 1000  # characters of a row that are looked at
_UNDECIDED = ("und", "zxx")  # too little to go by; no language, such as digits
_WRITTEN_ALIKE = {"wuu": "zh", "yue": "zh"}  # short Chinese texts are often taken for Wu


@cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise DependencyError("`data.clean.languages` needs py3langid; pip install 'chatalign[clean]'") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=_SURE)


def check_languages(languages: Collection[str]) -> None:
    """Load the model, and raise DataError for a code that it doesn't know; DependencyError without py3langid."""
    known = _identifier().labels
    for language in languages:
        if language not in known:
            mend = f"use ISO 639 codes: {', '.join(sorted(known))}"
            raise DataError(f"`data.clean.languages`: `{language}` is no language that py3langid tells; {mend}")


def other_language(text: str, languages: Collection[str]) -> str | None:
    """The language of a text where it is none of `languages` with a probability of 0.3 or more, else None."""
    found, _ = _identifier().classify(text[:_READ])
    if found in _UNDECIDED or found in languages or _WRITTEN_ALIKE.get(found) in languages:
        return None
    return str(found)
