"""Rows of a file to packed, masked tokens: tokens/s a core, tokens/s by the clock with 4 workers, memory by rows.

    python bench/data_prep.py [cpu] [wall] [memory] [pairs] [--rows N] [--repeats N] [--fresh]

Arms, one process each, in turn (A-B-A-B): ``chatalign`` (prepare, lengths, bins), TRL's own ``_prepare_dataset`` on
prompt/completion rows (its default, and packed by ``bfd``) and on messages rows with assistant masks, each behind
``load_dataset``; and ``tokenizer``, the tokenizers library's ``encode_batch`` alone on texts that are rendered
already: what no preparation that calls it can go below. Nothing is cached. CPU seconds are the process's and its
children's, from the file to the packed rows; imports and the loading of the tokenizer don't count.

Rows are alpaca_en's, each repeat with another number at its end (a memo of words gains from repeats; ``--fresh``
takes texts that occur once, as many as there are). The first 100 rows' ids and masks must agree over the arms, and
all arms' tokens. Lines go to bench/results/data_prep.jsonl.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import workload

TOKENIZER = workload.CACHE / "data-prep-tokenizer"
RESULTS = workload.ROOT / "bench" / "results" / "data_prep.jsonl"
MAX_LENGTH, CHECKED, VOCABULARY = 8192, 100, 8192
CURVE = (10_000, 40_000, 160_000)
Result = dict[str, Any]
Checked = list[tuple[list[int], list[int]]]


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=list(_PARTS), help=", ".join(_PARTS))
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--arms", help="these only, with commas between")
    parser.add_argument("--arm", help="run this arm in this process (what the others are started with)")
    parser.add_argument("--folder", type=Path)
    chosen = parser.parse_args()
    if chosen.arm:
        print(json.dumps(_run(chosen.arm, chosen.folder)))
        return
    if not TOKENIZER.is_dir():
        conversations, pairs, _ = workload._texts()
        texts = [text for parts in [*conversations, *pairs] for text in parts]
        workload._tokenizer(texts, VOCABULARY).save_pretrained(TOKENIZER)
    for part in chosen.parts:
        _PARTS[part](chosen)


# The arms. Each returns rows, tokens and the first rows, and is timed by _run.


def chatalign_arm(folder: Path, file: str, *, kind: str = "conversation", workers: int | None = None) -> Callable:
    """chatalign.data.prepare and the bins that trainers make of it."""
    from chatalign.data import prepare
    from chatalign.engine.batching import make_bins, row_lengths
    from chatalign.recipe import DataSection

    tokenizer = _tokenizer()

    def work() -> tuple[int, int, Checked]:
        source = {"path": str(folder / file)}
        section = DataSection(datasets=[source], max_length=MAX_LENGTH, num_proc=workers)
        rows = prepare(section, tokenizer, kind, seed=0).train
        lengths = row_lengths(rows)
        make_bins(rows, lengths, MAX_LENGTH)
        return len(rows), sum(lengths), [_columns(row) for row in rows.select(range(CHECKED))]

    return work


def trl_arm(folder: Path, file: str, *, packing: bool = False, workers: int | None = None) -> Callable:
    """TRL's SFT dataset preparation, without the model that its trainer would load."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    tokenizer = _tokenizer()
    masks = file.startswith("messages")
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        max_length=MAX_LENGTH,
        packing=packing,
        dataset_num_proc=workers,
        assistant_only_loss=masks,
    )
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=not masks)

    def work() -> tuple[int, int, Checked]:
        rows = datasets.load_dataset("json", data_files=str(folder / file), split="train")
        made = SFTTrainer._prepare_dataset(trainer, rows, tokenizer, config, packing, None, "train")
        shown = [] if packing else [_columns(row) for row in made.select(range(CHECKED))]
        return len(rows), _tokens(made, "input_ids"), shown

    return work


def trl_pairs_arm(folder: Path, file: str, *, workers: int | None = None) -> Callable:
    """TRL's DPO dataset preparation, without its model."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    tokenizer = _tokenizer()
    config = DPOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=False, max_length=MAX_LENGTH, dataset_num_proc=workers
    )
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)

    def work() -> tuple[int, int, Checked]:
        rows = datasets.load_dataset("json", data_files=str(folder / file), split="train")
        made = DPOTrainer._prepare_dataset(trainer, rows, tokenizer, config, "train")
        tokens = sum(_tokens(made, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        return len(rows), tokens, [_columns(row) for row in made.select(range(CHECKED))]

    return work


def tokenizer_arm(folder: Path, file: str) -> Callable:
    """The tokenizers library alone: rendered texts to ids."""
    tokenizer = _tokenizer()
    rows = [json.loads(line) for line in (folder / file).read_text().splitlines()]
    texts = tokenizer.apply_chat_template([row["prompt"] + row["completion"] for row in rows], tokenize=False)

    def work() -> tuple[int, int, Checked]:
        made = [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)]
        return len(made), sum(map(len, made)), []

    return work


_ARMS: dict[str, Callable[[Path], Callable]] = {
    "chatalign": partial(chatalign_arm, file="completion.jsonl"),
    "chatalign-messages": partial(chatalign_arm, file="messages.jsonl"),
    "chatalign-4": partial(chatalign_arm, file="completion.jsonl", workers=4),
    "chatalign-pairs": partial(chatalign_arm, file="pairs.jsonl", kind="preference"),
    "trl": partial(trl_arm, file="completion.jsonl"),
    "trl-packed": partial(trl_arm, file="completion.jsonl", packing=True),
    "trl-messages": partial(trl_arm, file="messages.jsonl"),
    "trl-messages-packed": partial(trl_arm, file="messages.jsonl", packing=True),
    "trl-4": partial(trl_arm, file="completion.jsonl", workers=4),
    "trl-packed-4": partial(trl_arm, file="completion.jsonl", packing=True, workers=4),
    "trl-messages-4": partial(trl_arm, file="messages.jsonl", workers=4),
    "trl-messages-packed-4": partial(trl_arm, file="messages.jsonl", packing=True, workers=4),
    "trl-pairs": partial(trl_pairs_arm, file="pairs.jsonl"),
    "tokenizer": partial(tokenizer_arm, file="completion.jsonl"),
    "tokenizer-4": partial(tokenizer_arm, file="completion.jsonl"),
}


def _run(arm: str, folder: Path) -> Result:
    import datasets

    datasets.disable_caching()
    datasets.disable_progress_bars()
    work = _ARMS[arm](folder)
    before, cpu, wall = _peak(), _cpu(), time.perf_counter()
    rows, tokens, shown = work()
    cpu, wall = _cpu() - cpu, time.perf_counter() - wall
    first = hashlib.sha256(json.dumps(shown).encode()).hexdigest() if shown else ""
    memory = {"peak_mb": _peak(), "before_mb": before}
    return {"arm": arm, "rows": rows, "tokens": tokens, "cpu_s": cpu, "wall_s": wall, "first_rows": first, **memory}


def _cpu() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in usage)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOKENIZER)


def _tokens(rows: Any, column: str) -> int:
    import pyarrow.compute

    return int(pyarrow.compute.sum(pyarrow.compute.list_value_length(rows.with_format("arrow")[:][column])).as_py())


def _columns(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Ids and marks of a row of either project; a pair is its three parts, with marks on the replies."""
    if "prompt_ids" in row:
        sides = [*row["chosen_ids"], *row["rejected_ids"]]
        return [*row["prompt_ids"], *sides], [*[0] * len(row["prompt_ids"]), *[1] * len(sides)]
    marks = row["supervised"] if "supervised" in row else [int(label != -100) for label in row["labels"]]
    return row["input_ids"], marks


# The rows.


def write_rows(folder: Path, count: int, *, fresh: bool = False) -> None:
    """One set of rows as prompt/completion, as messages and as pairs."""
    texts = _fresh_texts() if fresh else _numbered(workload._texts()[0], count)
    pairs = [] if fresh else _numbered(workload._texts()[1], count // 4)
    with (folder / "completion.jsonl").open("w") as completion, (folder / "messages.jsonl").open("w") as messages:
        for text in texts:
            prompt, reply = _turn("user", text[0]), _turn("assistant", text[1])
            completion.write(json.dumps({"prompt": [prompt], "completion": [reply]}) + "\n")
            messages.write(json.dumps({"messages": [prompt, reply]}) + "\n")
    with (folder / "pairs.jsonl").open("w") as file:
        for text in pairs:
            sides = {"chosen": [_turn("assistant", text[1])], "rejected": [_turn("assistant", text[2])]}
            file.write(json.dumps({"prompt": [_turn("user", text[0])], **sides}) + "\n")


def _numbered(texts: Sequence[Sequence[str]], count: int) -> list[list[str]]:
    return [[f"{part.strip()} {i}" for part in texts[i % len(texts)]] for i in range(count)]


def _fresh_texts() -> list[list[str]]:
    """Every text of the data files beside the project once, cut into prompts and replies of 40 and 120 words."""
    texts: list[str] = []
    for name in ("c4_demo.jsonl", "wiki_demo.txt", "kto_en_demo.json", "dpo_en_demo.json", "alpaca_en_demo.json"):
        raw = (workload.SHARED / name).read_text()
        if name.endswith(".txt"):
            texts.append(raw)
        else:
            rows = [json.loads(line) for line in raw.splitlines()] if name.endswith("jsonl") else json.loads(raw)
            texts += _strings(rows)
    words = " ".join(texts).split(" ")
    cuts = range(0, len(words) - 160, 160)
    made = [[" ".join(words[at : at + 40]).strip(), " ".join(words[at + 40 : at + 160]).strip()] for at in cuts]
    return [text for text in made if all(text)]


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for one in inner for text in _strings(one)]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


# The measurements.


def _measure(arms: Sequence[str], chosen: argparse.Namespace, *, rows: int, repeats: int, **env: str) -> list[Result]:
    """Each arm `repeats` times, in turn; raises where tokens or first rows differ."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder, rows, fresh=chosen.fresh)
        wanted = [arm for arm in arms if chosen.arms is None or arm in chosen.arms.split(",")]
        results = []
        for arm in [arm for _ in range(repeats) for arm in wanted]:
            results.append(_start(arm, folder, **env))
            print({name: round(v, 2) if isinstance(v, float) else v for name, v in results[-1].items()}, flush=True)
    if len({result["tokens"] for result in results}) > 1:
        raise SystemExit(f"the arms' tokens differ: {[(one['arm'], one['tokens']) for one in results]}")
    if len({result["first_rows"] for result in results} - {""}) > 1:
        raise SystemExit("the arms' first rows differ")
    return results


def _start(arm: str, folder: Path, **env: str) -> Result:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--arm", arm, "--folder", str(folder)]
        environment = os.environ | offline | {"HF_DATASETS_CACHE": cache} | env
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arm}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _speed_part(part: str, chosen: argparse.Namespace) -> None:
    """Tokens/s by arm and turn, and ours over TRL's fastest arm, turn by turn."""
    arms, clock, env = _SPEEDS[part]
    results = _measure(arms, chosen, rows=chosen.rows, repeats=chosen.repeats, **env)
    speeds: dict[str, list[float]] = {}
    for one in results:
        speeds.setdefault(one["arm"], []).append(one["tokens"] / one[clock])
        turn = {"repeat": len(speeds[one["arm"]]) - 1, "rows": one["rows"], "fresh": chosen.fresh}
        _keep(one["arm"], f"{part}_tokens_per_s", speeds[one["arm"]][-1], "tokens/s", turn)
    for arm, turns in speeds.items():
        print(f"{part:7} {arm:24} {median(turns):12,.0f} tokens/s   ({', '.join(f'{speed:,.0f}' for speed in turns)})")
    peers = [arm for arm in speeds if arm.startswith("trl")]
    if peers:
        best = max(peers, key=lambda arm: median(speeds[arm]))
        for arm in (arm for arm in speeds if arm.startswith("chatalign")):
            ratios = [ours / theirs for ours, theirs in zip(speeds[arm], speeds[best], strict=True)]
            print(f"{part:7} {arm} over {best}: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def _memory_part(chosen: argparse.Namespace) -> None:
    """Peak resident memory, and what of it is above the imports, by rows."""
    for rows in CURVE:
        for one in _measure(["chatalign", "trl"], chosen, rows=rows, repeats=1, TOKENIZERS_PARALLELISM="false"):
            arm, peak, grown = one["arm"], one["peak_mb"], one["peak_mb"] - one["before_mb"]
            print(f"memory  {arm:24} {rows:8,} rows {peak:8,.0f} MB, {grown:6,.0f} above the imports")
            _keep(arm, "peak_mb", peak, "MB", {"rows": rows, "above_imports_mb": grown})


def _keep(arm: str, metric: str, value: float, unit: str, more: Result) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    line = {"bench": "data_prep", "arm": arm, "metric": metric, "value": value, "unit": unit}
    with RESULTS.open("a") as file:
        file.write(json.dumps(line | more) + "\n")


_ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false"}
_ONE = ["chatalign", "trl", "trl-packed", "chatalign-messages", "trl-messages", "trl-messages-packed", "tokenizer"]
_FOUR = ["trl-4", "chatalign-4", "trl-packed-4", "trl-messages-4", "trl-messages-packed-4", "tokenizer-4"]
_SPEEDS: dict[str, tuple[list[str], str, dict[str, str]]] = {
    "cpu": (_ONE, "cpu_s", _ONE_THREAD),
    "wall": (_FOUR, "wall_s", {"RAYON_NUM_THREADS": "4"}),
    "pairs": (["chatalign-pairs", "trl-pairs"], "cpu_s", _ONE_THREAD),
}
_PARTS = {part: partial(_speed_part, part) for part in _SPEEDS} | {"memory": _memory_part}

if __name__ == "__main__":
    main()
