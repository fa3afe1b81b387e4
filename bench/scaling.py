"""How cost grows: with rows, sequence length, vocabulary, model size, processes and prompts; no worse than linear.

    python bench/scaling.py [--quick] [--curves rows length ...] [--plot-only]

Each point is a median of repeats that take turns over a curve's points, one thread, process CPU time; each curve gets
a slope on log-log axes (1 is linear) and, where it has one, the bound that the slope must keep. Attention alone may
grow faster than linearly: a token's cost without it must be flat in the document's length. Lines go to
bench/results/scaling.jsonl, the picture to bench/scaling.png; the exit status is 1 where a bound is broken.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import scaling_work as work
import workload

RESULTS = workload.ROOT / "bench" / "results" / "scaling.jsonl"
PICTURE = workload.ROOT / "bench" / "scaling.png"
LINEAR, FLAT = 1.15, 0.15
TOKENS = 4096  # of a step, where documents get longer
REPLY = 64
Values = dict[tuple[str, str], float]  # (curve, series) → what was measured at one x


@dataclass(frozen=True)
class Curve:
    """One panel: its axes, and the bound on the slope of each of its series, None where there is none."""

    title: str
    x_label: str
    unit: str
    bounds: dict[str, float | None] = field(default_factory=dict)


CURVES = {
    "rows": Curve("Data preparation", "rows", "CPU s", {"prepare": LINEAR}),
    "rows-memory": Curve("Data preparation, memory", "rows", "MB above imports", {"prepare": FLAT}),
    "length": Curve(
        "SFT by document length",
        "tokens a document",
        "CPU µs a token",
        {"whole step": None, "attention": LINEAR, "all but attention": FLAT},
    ),
    "vocabulary": Curve("SFT by vocabulary", "vocabulary", "CPU s a step", {"plain head": LINEAR, "chunked": LINEAR}),
    "vocabulary-memory": Curve(
        "SFT by vocabulary, memory", "vocabulary", "MB above the model", {"plain head": LINEAR, "chunked": LINEAR}
    ),
    "size": Curve("SFT by model size", "matmul parameters", "CPU µs a token", {"full": LINEAR}),
    "processes": Curve(
        "SFT by processes (gloo)",
        "processes on {cores} cores",
        "CPU s a step, all of them",
        {"1,024 tokens each": LINEAR},
    ),
    "processes-wall": Curve(
        "SFT by processes, wall", "processes on {cores} cores", "s a step", {"1,024 tokens each": None}
    ),
    "prompt": Curve(
        "DPO by prompt", "tokens a prompt", "CPU ms a pair", {"shared prompt": None, "two documents": None}
    ),
}


def sweep(xs: Iterable[float], repeats: int, measure: Callable[[Any], Values]) -> list[dict[str, Any]]:
    """Points of the curves that `measure` gives at each x: medians of repeats that take turns."""
    found: dict[tuple[str, str, float], list[float]] = {}
    for _ in range(repeats):
        for x in xs:
            for (curve, series), y in measure(x).items():
                found.setdefault((curve, series, x), []).append(y)
    return [
        {"curve": curve, "series": series, "x": x, "y": median(ys), "unit": CURVES[curve].unit, "repeats": ys}
        for (curve, series, x), ys in found.items()
    ]


# The sweeps, by what grows.


def rows(*, quick: bool) -> list[dict[str, Any]]:
    """CPU seconds and peak memory of data preparation."""
    counts = (500, 2_000) if quick else (2_000, 8_000, 32_000)
    tokenizer = str(workload.model_folder("3.4M"))
    texts = workload._texts()[0]
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            with (Path(folder) / f"{count}.jsonl").open("w") as file:
                for i in range(count):  # each repeat of a text ends in another number
                    prompt, reply = (f"{part} {i}" for part in texts[i % len(texts)])
                    file.write(json.dumps({"prompt": prompt, "completion": reply}) + "\n")

        def measure(count: int) -> Values:
            one = work.forked(work.data_preparation, f"{folder}/{count}.jsonl", tokenizer)
            return {("rows", "prepare"): one["cpu_s"], ("rows-memory", "prepare"): one["memory_mb"]}

        return sweep(counts, 1 if quick else 3, measure)


def length(*, quick: bool) -> list[dict[str, Any]]:
    """A token's cost in a step of 4,096 tokens, and attention's share of it, by the length of its documents."""

    def measure(tokens: int) -> Values:
        settings = {"vocabulary": 1024, "hidden": 128, "layers": 2}
        one = work.forked(work.sft_step, **settings, count=TOKENS // tokens, length=tokens)
        whole, part = (1e6 * one[name] / TOKENS for name in ("cpu_s", "attention_s"))
        parts = {"whole step": whole, "attention": part, "all but attention": whole - part}
        return {("length", series): y for series, y in parts.items()}

    return sweep((64, 256) if quick else (64, 128, 256, 512, 1024, 2048), 1 if quick else 3, measure)


def vocabulary(*, quick: bool) -> list[dict[str, Any]]:
    """A step of 1,024 tokens by the head, plain and chunked: seconds, and memory above the model's."""

    def measure(entries: int) -> Values:
        values = {}
        for head, series in (("plain", "plain head"), ("chunked", "chunked")):
            settings = {"hidden": 64, "layers": 2, "count": 8, "length": 128}
            one = work.forked(work.sft_step, vocabulary=entries, **settings, head=head)
            values["vocabulary", series] = one["cpu_s"]
            values["vocabulary-memory", series] = one["memory_mb"]
        return values

    return sweep([2**n for n in ((10, 12) if quick else (10, 12, 14, 16))], 1 if quick else 3, measure)


def size(*, quick: bool) -> list[dict[str, Any]]:
    """A token's cost in a step of 512 tokens, by the model's matmul parameters."""
    shapes = ((128, 2), (128, 4)) if quick else ((128, 2), (128, 8), (256, 4), (256, 8), (512, 4), (512, 8))
    by_parameters = {
        work.matmul_parameters(work.llama(vocabulary=1024, hidden=hidden, layers=layers)): (hidden, layers)
        for hidden, layers in shapes
    }

    def measure(parameters: int) -> Values:
        hidden, layers = by_parameters[parameters]
        one = work.forked(work.sft_step, vocabulary=1024, hidden=hidden, layers=layers, count=4, length=128)
        return {("size", "full"): 1e6 * one["cpu_s"] / 512}

    return sweep(by_parameters, 1 if quick else 3, measure)


def processes(*, quick: bool) -> list[dict[str, Any]]:
    """A step's CPU seconds over all processes of a run, each with 1,024 tokens, and its seconds by the clock."""

    def measure(count: int) -> Values:
        one = work.distributed(count)
        names = {"processes": "cpu_s", "processes-wall": "wall_s"}
        return {(curve, "1,024 tokens each"): one[name] for curve, name in names.items()}

    return sweep((1, 2) if quick else (1, 2, 4), 1 if quick else 3, measure)


def prompt(*, quick: bool) -> list[dict[str, Any]]:
    """A pair's cost by the length of its prompt, which chosen and rejected share or have each for itself."""

    def measure(tokens: int) -> Values:
        values = {}
        for shared, series in ((True, "shared prompt"), (False, "two documents")):
            one = work.forked(work.dpo_step, pairs=4, prompt=tokens, reply=REPLY, shared=shared)
            values["prompt", series] = 1e3 * one["cpu_s"] / 4
        return values

    return sweep((32, 96) if quick else (32, 96, 192, 384), 1 if quick else 3, measure)


SWEEPS = {"rows": rows, "length": length, "vocabulary": vocabulary, "size": size, "processes": processes}
SWEEPS |= {"prompt": prompt}


# Slopes, lines, picture.


def slope_of(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The fitted exponent of y = a · x^slope."""
    return float(np.polyfit(np.log(xs), np.log(np.maximum(ys, 1e-9)), 1)[0])


def bound_of(curve: str, series: str, xs: Sequence[float]) -> float | None:
    """What the slope must not pass. A pair's cost must not outgrow its tokens: P + 2 R shared, 2 (P + R) not."""
    if curve == "prompt":
        tokens = [x + 2 * REPLY if series == "shared prompt" else 2 * (x + REPLY) for x in xs]
        return slope_of(xs, tokens) + FLAT
    return CURVES[curve].bounds[series]


def fits(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The slope of each series with its bound, and whether it was kept."""
    found = []
    for curve, series in dict.fromkeys((point["curve"], point["series"]) for point in points):
        line = [point for point in points if (point["curve"], point["series"]) == (curve, series)]
        xs, ys = ([point[axis] for point in line] for axis in "xy")
        slope, bound = slope_of(xs, ys), bound_of(curve, series, xs)
        kept = None if bound is None else slope <= bound
        found.append({"curve": curve, "series": series, "slope": slope, "bound": bound, "kept": kept})
    return found


def newest(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Points and fits of each curve's last run in a file of lines."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    last = {line["curve"]: line["at"] for line in lines}
    lines = [line for line in lines if line["at"] == last[line["curve"]]]
    return [line for line in lines if "x" in line], [line for line in lines if "slope" in line]


def plot(path: Path = RESULTS, picture: Path = PICTURE) -> None:
    """All curves of `path` as small multiples on log-log axes, with a dashed line of slope 1 in each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points, slopes = newest(path)
    drawn = [name for name in CURVES if any(point["curve"] == name for point in points)]
    look = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#9aa0a6"}
    with pyplot.rc_context(look):
        deep = -(-len(drawn) // 3)
        figure, axes = pyplot.subplots(deep, 3, figsize=(11, 3.1 * deep), layout="constrained", squeeze=False)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        for panel, name in zip(axes.flat, drawn, strict=False):
            _draw(
                panel,
                CURVES[name],
                [p for p in points if p["curve"] == name],
                [s for s in slopes if s["curve"] == name],
            )
        for panel in axes.flat[len(drawn) :]:
            panel.axis("off")
        figure.savefig(picture, dpi=130)
        pyplot.close(figure)


def _draw(panel: Any, curve: Curve, points: list[dict[str, Any]], slopes: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for fit, colour in zip(slopes, ("#2f6fde", "#d9622b", "#2a9d6f"), strict=False):
        line = sorted((p["x"], p["y"]) for p in points if p["series"] == fit["series"])
        label = f"{fit['series']}, slope {fit['slope']:.2f}"
        panel.plot(*zip(*line, strict=True), "o-", color=colour, linewidth=1.8, markersize=4.5, label=label)
    xs, ys = ([p[axis] for p in points] for axis in "xy")
    start = next(p["y"] for p in sorted(points, key=lambda p: (p["x"], -p["y"])))
    low, high = min(xs), max(xs)
    panel.plot([low, high], [start, start * high / low], "--", color="#b0b4ba", linewidth=1, zorder=0, label="slope 1")
    panel.set(xscale="log", yscale="log", xlabel=curve.x_label.format(cores=points[0]["cores"]), ylabel=curve.unit)
    panel.set_ylim(min(ys) / 1.6, max(*ys, start * high / low) * 1.6)
    panel.set_title(curve.title, fontsize=10, loc="left", fontweight="bold")
    panel.set_xticks(sorted(set(xs)))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _short(y)))
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.grid(True, which="major", color="#eceef1", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.legend(frameon=False, fontsize=7.5, loc="upper left")


def _short(number: float) -> str:
    if 1024 <= number < 2**20 and int(number).bit_count() == 1:
        return f"{number / 1024:.0f}k"
    for limit, letter in ((1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{letter}"
    return f"{number:.3g}"


def main() -> None:
    """Measure the curves that are asked for, say what they keep, and draw all that there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two points a curve, once each: that it runs, no figures")
    parser.add_argument("--curves", nargs="+", choices=list(SWEEPS), default=list(SWEEPS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--plot-only", action="store_true", help="draw what --out holds")
    chosen = parser.parse_args()
    broken = []
    if not chosen.plot_only:
        workload.make()
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        for name in chosen.curves:
            started = time.perf_counter()
            points = SWEEPS[name](quick=chosen.quick)
            slopes, about = (
                fits(points),
                {"bench": "scaling", "quick": chosen.quick, "cores": work.cores(), "at": time.time()},
            )
            with chosen.out.open("a") as file:
                file.writelines(json.dumps(about | line) + "\n" for line in [*points, *slopes])
            _print(points, slopes, time.perf_counter() - started)
            broken += [fit for fit in slopes if fit["kept"] is False and not chosen.quick]
    plot(chosen.out, chosen.picture)
    sys.exit(bool(broken))


def _print(points: list[dict[str, Any]], slopes: list[dict[str, Any]], seconds: float) -> None:
    for fit in slopes:
        line = [p for p in points if (p["curve"], p["series"]) == (fit["curve"], fit["series"])]
        values = "  ".join(f"{_short(p['x'])}: {p['y']:.4g}" for p in line)
        bound = "" if fit["bound"] is None else f" (bound {fit['bound']:.2f}{'' if fit['kept'] else ', BROKEN'})"
        print(f"{fit['curve']:18} {fit['series']:18} slope {fit['slope']:5.2f}{bound}  {values}  {line[0]['unit']}")
    print(f"{'':18} {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
