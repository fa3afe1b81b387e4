"""What a finished model's generation_config.json must say: every stop token that it was taught, and no pad token.

chatalign's own decoding doesn't read the file; whoever serves the model does (rows 11 and 12 of docs/guard.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chatalign.errors import GuardError
from chatalign.models.tokenizer import stop_token_ids

GENERATION_FILE = "generation_config.json"


def refuse_other_stops(folder: str | Path, tokenizer: Any) -> None:
    """Raise GuardError where a run's model folder would be served past the ends of its replies, or not at all.

    `tokenizer` is the run's own.
    """
    from transformers import GenerationConfig

    file = Path(folder) / GENERATION_FILE
    if not file.is_file():
        raise GuardError(
            f"{file}: missing, so that generation stops at what its server thinks, not at what ends the trained "
            f"replies ({_names(tokenizer, stop_token_ids(tokenizer))}), and may ramble; restore it"
        )
    configured = GenerationConfig.from_pretrained(str(folder)).eos_token_id
    stops = [configured] if isinstance(configured, int) else list(configured or [])
    pad = tokenizer.pad_token_id
    if pad in stops:
        raise GuardError(
            f"{file}: `eos_token_id` {stops} holds the pad token {tokenizer.pad_token} ({pad}), so that a padded batch "
            "is answered by nothing; take it out"
        )
    if missing := [stop for stop in stop_token_ids(tokenizer) if stop not in stops]:
        raise GuardError(
            f"{file}: generation stops at {_names(tokenizer, stops)}, not at what ends the trained replies "
            f"({_names(tokenizer, missing)}), and may ramble; restore it"
        )


def refuse_untaught_stops(last_ids: Sequence[int], tokenizer: Any, generation_config: Any) -> None:
    """Raise GuardError where most training rows end in a special token at which generation wouldn't stop.

    `last_ids` are the last targets of some rows; rows that were cut end anywhere.
    """
    configured = getattr(generation_config, "eos_token_id", None)
    stops = [configured] if isinstance(configured, int) else list(configured or [])
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    for token, count in Counter(last_ids).most_common(1):
        if token in special and token not in stops and 2 * count > len(last_ids):
            raise GuardError(
                f"the model to train: generation stops at {_names(tokenizer, stops)}, not at what ends the trained "
                f"replies ({_names(tokenizer, [token])}), and may ramble; add it to `eos_token_id` in the model's "
                f"{GENERATION_FILE}"
            )


def _names(tokenizer: Any, ids: list[int]) -> str:
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(token)} ({token})" for token in ids) or "nothing"
