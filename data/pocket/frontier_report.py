"""What the frontier's runs measured: the results file, means and ranges over seeds, the two figures.

Figures and table are made from the results file alone, so they can be made again without a run.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple


@dataclass(frozen=True, kw_only=True)
class Point:
    """One policy, or best-of-n of SFT, on the held-out prompts.

    `setting` is kl_coef (ppo), β (dpo), n (best_of_n) or the optimizer step (no_penalty). `kl` is in nats a reply, from
    SFT; for best-of-n its upper bound. `score` is the reward model's mean, in standard deviations of its scores of
    SFT's replies, above their mean.
    """

    method: str
    setting: float
    seed: int
    kl: float
    win_rate: float
    gold: float
    accuracy: float
    format_rate: float
    ideal: float
    score: float

    @property
    def key(self) -> tuple[str, float, int]:
        """What a later measurement replaces."""
        return self.method, self.setting, self.seed


class Spread(NamedTuple):
    """A quantity over seeds."""

    mean: float
    low: float
    high: float


def add_results(path: Path, new: Sequence[Point]) -> list[Point]:
    """Put points into a results file, each in place of an earlier one of the same method, setting and seed."""
    kept = {point.key: point for point in [*read_results(path), *new]}
    in_order = [kept[key] for key in sorted(kept)]
    path.write_text("".join(json.dumps(asdict(point)) + "\n" for point in in_order), "utf-8")
    return in_order


def read_results(path: Path) -> list[Point]:
    """The points of a results file; none where there is no file."""
    if not path.is_file():
        return []
    return [Point(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]


def settings(results: Sequence[Point], method: str) -> list[float]:
    """The settings of a method that were measured, in order."""
    return sorted({point.setting for point in results if point.method == method})


def at(results: Sequence[Point], method: str, setting: float) -> list[Point]:
    """The points of one setting, one a seed."""
    return [point for point in results if (point.method, point.setting) == (method, setting)]


def spread(points: Sequence[Point], measure: str) -> Spread:
    """Mean, lowest and highest of one measure over points, which stand for seeds. Raises ValueError without points."""
    values = [float(getattr(point, measure)) for point in points]
    if not values:
        raise ValueError(f"no point to take the {measure} of")
    return Spread(statistics.fmean(values), min(values), max(values))


def win_ceiling(results: Sequence[Point]) -> Spread:
    """The win rate of a policy whose every reply is ideal: it ties where SFT's reply is ideal too, else it wins."""
    shares = spread([point for point in results if point.method == "sft"], "ideal")
    return Spread(1 - shares.mean / 2, 1 - shares.high / 2, 1 - shares.low / 2)


COLUMNS = {
    "kl": ("KL to SFT, nats a reply", 2),
    "win_rate": ("gold win rate over SFT", 3),
    "accuracy": ("right answers", 3),
    "gold": ("gold reward", 2),
    "score": ("reward model's score, sd", 2),
}
TITLES = {"sft": "SFT", "ppo": "PPO, kl_coef {:g}", "dpo": "DPO, β {:g}", "best_of_n": "best of {:g}"}
BEGIN, END = "<!-- frontier table: begin -->", "<!-- frontier table: end -->"


def write_table(results: Sequence[Point], page: Path) -> None:
    """Put the table between the page's two marks; raises ValueError where the page hasn't both."""
    text = page.read_text("utf-8")
    if BEGIN not in text or END not in text.split(BEGIN, 1)[1]:
        raise ValueError(f"{page}: has no `{BEGIN}` with `{END}` after it")
    before, rest = text.split(BEGIN, 1)
    page.write_text("\n".join([before + BEGIN, "", *table(results), "", END + rest.split(END, 1)[1]]), "utf-8")


def table(results: Sequence[Point]) -> list[str]:
    """Markdown: a row a setting, each cell the mean over seeds with lowest and highest.

    PPO without a penalty is left to its figure.
    """
    heads = ["", "seeds", *(title for title, _ in COLUMNS.values())]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for method, title in TITLES.items():
        for setting in settings(results, method):
            points = at(results, method, setting)
            cells = [cell(spread(points, measure), digits) for measure, (_, digits) in COLUMNS.items()]
            if method == "best_of_n":
                cells[0] = f"≤ {cells[0]}"
            lines.append("| " + " | ".join([title.format(setting), str(len(points)), *cells]) + " |")
    return lines


def cell(value: Spread, digits: int) -> str:
    """``0.81 (0.80–0.83)``; the range is left out where it is no wider than the last digit shows."""
    mean, low, high = (f"{number:.{digits}f}" for number in value)
    return mean if low == high else f"{mean} ({low}–{high})"


class Line(NamedTuple):
    """How a method is drawn."""

    label: str
    colour: str
    marker: str


LINES = {
    "ppo": Line("PPO, by kl_coef", "#d9622b", "o"),
    "dpo": Line("DPO, by β", "#2f6fde", "s"),
    "best_of_n": Line("best-of-n of SFT, by n (its KL: the upper bound)", "#2a9d6f", "^"),
}
INK, FAINT, GRID = "#22262e", 0.35, "#e3e6eb"


def write_figures(results: Sequence[Point], folder: Path) -> None:
    """Write ppo_frontier.png and ppo_overoptimisation.png, each where its runs were measured."""
    folder.mkdir(parents=True, exist_ok=True)
    if settings(results, "ppo"):
        save(frontier(results), folder / "ppo_frontier.png")
    if settings(results, "no_penalty"):
        save(overoptimisation(results), folder / "ppo_overoptimisation.png")


def frontier(results: Sequence[Point]) -> Any:
    """Win rate and right answers against KL: a line a method through its settings' means, bars from seed to seed."""
    ceiling = win_ceiling(results)
    accuracy = spread([point for point in results if point.method == "sft"], "accuracy")
    with look():
        figure, (left, right) = panels(2, width=9.6, height=3.9)
        for axes, measure in ((left, "win_rate"), (right, "accuracy")):
            for method in (method for method in LINES if settings(results, method)):
                draw_method(axes, results, method, measure)
            axes.set_xlabel("KL from SFT, nats a reply")
            axes.set_xlim(left=0)
        left.axhline(ceiling.mean, linestyle="--", linewidth=1, color=INK)
        left.annotate(f"every reply ideal: {ceiling.mean:.3f}", (0, ceiling.mean), (4, 4), textcoords="offset points")
        left.axhline(0.5, linestyle=":", linewidth=1, color=INK)
        left.annotate(
            "SFT itself", (1, 0.5), (-4, 4), xycoords=left.get_yaxis_transform(), textcoords="offset points", ha="right"
        )
        right.axhline(accuracy.mean, linestyle=":", linewidth=1, color=INK)
        right.annotate(
            "SFT itself",
            (1, accuracy.mean),
            (-4, 4),
            xycoords=right.get_yaxis_transform(),
            textcoords="offset points",
            ha="right",
        )
        left.set_ylabel("gold win rate over SFT")
        right.set_ylabel("share of right answers")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def draw_method(axes: Any, results: Sequence[Point], method: str, measure: str) -> None:
    """One method's settings: small marks for seeds, a line through the means, a bar over the range, the setting."""
    label, colour, marker = LINES[method]
    groups = [at(results, method, setting) for setting in settings(results, method)]
    groups.sort(key=lambda points: spread(points, "kl").mean)
    xs = [spread(points, "kl").mean for points in groups]
    ys = [spread(points, measure) for points in groups]
    seeds = [point for points in groups for point in points]
    axes.plot(
        [p.kl for p in seeds], [getattr(p, measure) for p in seeds], marker, color=colour, alpha=FAINT, markersize=4
    )
    axes.plot(xs, [y.mean for y in ys], marker=marker, color=colour, markersize=6, linewidth=1.6, label=label)
    axes.vlines(xs, [y.low for y in ys], [y.high for y in ys], color=colour, linewidth=1.2)
    for x, y, points in zip(xs, ys, groups, strict=True):
        axes.annotate(
            f"{points[0].setting:g}", (x, y.mean), (5, -11), textcoords="offset points", color=colour, fontsize=8
        )


def overoptimisation(results: Sequence[Point]) -> Any:
    """Proxy and gold against KL in the course of PPO without a penalty: a line a seed, from SFT on.

    KL is on a square-root scale, as in Gao et al. (2210.10760): seeds run off at different steps and end far apart.
    """
    titles = {
        "score": "reward model's score\n(sd of SFT's scores above SFT)",
        "gold": "gold reward\n(ideal: 2.25)",
        "win_rate": "gold win rate over SFT",
        "accuracy": "share of right answers",
    }
    with look():
        figure, all_axes = panels(len(titles), width=11.2, height=3.4)
        for axes, (measure, title) in zip(all_axes, titles.items(), strict=True):
            draw_courses(axes, results, measure)
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("KL from SFT, nats a reply")
        all_axes[2].axhline(0.5, linestyle=":", linewidth=1, color=INK)
        figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_courses(axes: Any, results: Sequence[Point], measure: str) -> None:
    """A measure of each seed's policies, checkpoint after checkpoint, against their KL."""
    steps = settings(results, "no_penalty")
    for place, seed in enumerate(sorted({point.seed for point in results if point.method == "no_penalty"})):
        course = [*at(results, "sft", 0.0), *(point for step in steps for point in at(results, "no_penalty", step))]
        own = [point for point in course if point.seed == seed]
        line = LINES[tuple(LINES)[place % len(LINES)]]
        marks = {"marker": line.marker, "markersize": 4, "color": line.colour, "linewidth": 1.6}
        axes.plot([p.kl for p in own], [getattr(p, measure) for p in own], label=f"seed {seed}", **marks)
    axes.set_xscale("function", functions=(lambda kl: abs(kl) ** 0.5, lambda root: root**2))
    largest = max(point.kl for point in results if point.method == "no_penalty")
    axes.set_xlim(0, 1.05 * largest)
    axes.set_xticks([tick for tick in (0, 2, 10, 25, 50, 100, 200, 400) if tick <= largest])


@contextmanager
def look() -> Iterator[None]:
    """The figures' look, for what is drawn inside."""
    from matplotlib import rc_context

    settings = {
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": GRID,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": GRID,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with rc_context(settings):
        yield


def panels(columns: int, *, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure of plots side by side, in inches; no pyplot, so it needs no display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def save(figure: Any, path: Path) -> None:
    """As a PNG; without the version of what wrote it the same numbers give the same bytes."""
    with look():
        figure.savefig(path, metadata={"Software": None})
