"""Plots from metrics.jsonl and eval.json, as figures and PNG bytes; matplotlib without its global state."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from chatalign.errors import DependencyError

Lines = Sequence[Mapping[str, Any]]  # of a metrics.jsonl
Curves = Mapping[str, tuple[list[float], list[float]]]  # metric → steps, values
Figure = Any  # matplotlib's, which may not be installed
NO_MATPLOTLIB = 'no plots: matplotlib isn\'t installed; pip install "chatalign[report]" and run the report again'


class Colours(NamedTuple):
    """Of text, background and lines."""

    ink: str
    paper: str
    grid: str


class Panel(NamedTuple):
    """One plot of a run report: name (the file's too), axis, and the metrics that it draws where they were logged."""

    name: str
    label: str
    keys: tuple[str, ...]


PANELS: tuple[Panel, ...] = (
    Panel("loss", "nats", ("loss", "loss/policy", "loss/value", "loss/ptx")),
    Panel("perplexity", "perplexity", ("perplexity",)),
    Panel("score", "reward", ("objective/score", "objective/rlhf_reward", "score_mean")),
    Panel("rewards", "reward", ("rewards/chosen", "rewards/rejected")),
    Panel("margins", "reward margin", ("rewards/margins", "margin")),
    Panel("accuracy", "share", ("rewards/accuracies", "accuracy", "mean_token_accuracy")),
    Panel("logps", "nats a reply", ("logps/chosen", "logps/rejected")),
    Panel("kl", "nats a reply", ("objective/kl", "objective/kl_k3", "kl")),
    Panel("approx_kl", "nats a token", ("policy/approxkl",)),
    Panel("clipping", "share clipped", ("policy/clipfrac", "value/clipfrac")),
    Panel("value", "explained variance", ("value/explained_variance",)),
    Panel("entropy", "nats", ("policy/entropy", "objective/entropy", "entropy")),
    Panel("length", "tokens a reply", ("reply/length",)),
    Panel("ended", "share of replies", ("reply/eos_rate",)),
    Panel("logprob_gap", "nats a token", ("sampler/logprob_gap",)),
    Panel("grad_norm", "gradient norm", ("grad_norm",)),
    Panel("learning_rate", "learning rate", ("learning_rate",)),
    Panel(
        "speed",
        "tokens a second",
        ("tokens_per_s", "speed/rollout_tokens_per_s", "speed/score_tokens_per_s", "speed/update_tokens_per_s"),
    ),
)
_HEIGHT = 2.9  # inches, of every plot of curves
_COLOURS = ("#2f6fde", "#d9622b", "#2a9d6f", "#9b59b6", "#c2a000", "#6b7280")
_LIGHT = Colours(ink="#22262e", paper="#ffffff", grid="#e3e6eb")
_DARK = Colours(ink="#e6e6e6", paper="#1b1e24", grid="#3a3f4a")
_CJK_FONTS = (
    "Noto Sans CJK SC",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "PingFang SC",
    "Microsoft YaHei",
    "SimHei",
)


def run_plots(lines: Lines) -> dict[str, bytes]:
    """Name → PNG of every panel that the metrics of one run fill with at least two points. Raises DependencyError."""
    filled = {panel: curves for panel in PANELS if (curves := curves_of(lines, panel.keys))}
    pictures: dict[str, bytes] = {}
    if not filled:
        return pictures
    with _look():
        figure, (axes,) = _figure(1, height=_HEIGHT, width=6.4, fixed_margins=True)
        for panel, curves in filled.items():
            _draw(axes, panel.name.replace("_", " "), panel.label, curves)
            pictures[panel.name] = _png(figure)
            _wipe(axes)
    return pictures


def curves_of(lines: Lines, keys: Sequence[str]) -> dict[str, tuple[list[float], list[float]]]:
    """Metric → (steps, values) for each of `keys`, and its ``eval_`` twin, that has at least two finite points."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for key in [twin for name in keys for twin in (name, f"eval_{name}")]:
        points = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
        if len(points) >= 2:
            curves[key] = ([float(step) for step, _ in points], [float(value) for _, value in points])
    return curves


def stage_curves(stages: Mapping[str, Lines], keys: Sequence[str], label: str) -> Figure | None:
    """One panel a stage side by side, each on its own scale; None where no stage logged any of `keys`."""
    panels = {name: curves for name, lines in stages.items() if (curves := curves_of(lines, keys))}
    if not panels:
        return None
    width = 6.4 if len(panels) == 1 else 3.4 * len(panels)
    with _look():
        figure, all_axes = _figure(len(panels), height=_HEIGHT, width=width, fixed_margins=True)
        for axes, (name, curves) in zip(all_axes, panels.items(), strict=True):
            _draw(axes, name, label, curves)
    return figure


def compared_curves(runs: Mapping[str, Lines]) -> dict[str, Figure]:
    """Name → figure of every panel that two runs both fill, the second's lines dotted in the same colours."""
    figures: dict[str, Figure] = {}
    for panel in PANELS:
        both = {name: curves_of(lines, panel.keys) for name, lines in runs.items()}
        shared = [key for key in next(iter(both.values())) if all(key in curves for curves in both.values())]
        if not shared:
            continue
        with _look():
            figure, (axes,) = _figure(1, height=_HEIGHT, width=6.4, fixed_margins=True)
            for style, (name, curves) in zip(("-", ":"), both.items(), strict=True):
                for key, colour in zip(shared, _COLOURS, strict=False):
                    label = name if len(shared) == 1 else f"{key} · {name}"
                    axes.plot(*curves[key], style, linewidth=1.6, color=colour, label=label)
            axes.set_title(panel.name.replace("_", " "), y=1.0)
            axes.set_xlabel("step")
            axes.set_ylabel(panel.label)
            axes.legend(frameon=False, fontsize=8)
        figures[panel.name] = figure
    return figures


def win_rates(models: Mapping[str, Mapping[str, Any]], baseline: str) -> Figure | None:
    """A dot with its confidence interval for each model that has a win rate; None where none has."""
    colours = _model_colours(models)
    rows = [(name, row) for name, row in models.items() if _number(row, "win_rate")]
    if not rows:
        return None
    with _look():
        figure, (axes,) = _figure(1, height=0.9 + 0.45 * len(rows), width=6.4)
        for place, (name, row) in enumerate(reversed(rows)):
            rate, colour = row["win_rate"], colours[name]
            low, high = row.get("win_rate_ci") or (rate, rate)
            axes.plot([low, high], [place, place], color=colour, linewidth=2.5, solid_capstyle="round")
            axes.plot([rate], [place], "o", color=colour, markersize=8)
            axes.annotate(f"{rate:.3f}", (rate, place), (0, 8), textcoords="offset points", ha="center")
        axes.axvline(0.5, linestyle="--", linewidth=1, color="#888888")
        axes.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) - 0.3)
        axes.set_xlim(0, 1)
        axes.set_xlabel(f"win rate against {baseline} (ties ½, 95 % interval)")
    return figure


def reward_against_kl(models: Mapping[str, Mapping[str, Any]], baseline: str) -> Figure | None:
    """Gold reward (or the RM's score) over the distance from the baseline; None without two such models."""
    key = next((key for key in ("gold_mean", "rm_score") if any(_number(row, key) for row in models.values())), None)
    points = {name: row for name, row in models.items() if key and _number(row, key) and _number(row, "kl")}
    if key is None or len(points) < 2:
        return None
    with _look():
        figure, (axes,) = _figure(1, height=3.0, width=6.4)
        for name, row in points.items():
            axes.plot([row["kl"]], [row[key]], "o", color=_model_colours(models)[name], markersize=8, label=name)
        axes.margins(0.15)
        axes.legend(frameon=False, fontsize=8)
        axes.set_xlabel(f"KL from {baseline}, nats a reply")
        axes.set_ylabel("mean gold reward" if key == "gold_mean" else "mean RM score")
    return figure


def light_png(figure: Figure) -> bytes:
    """A figure as it was drawn."""
    with _look():
        return _png(figure)


def dark_png(figure: Figure) -> bytes:
    """The same figure for dark pages; call it after :func:`light_png`, for it changes the figure's colours for good.

    To make it anew, and lay it out again, would take longer.
    """
    from matplotlib.text import Text

    figure.set_layout_engine("none")  # all stays where light_png laid it
    figure.set_facecolor(_DARK.paper)
    for axes in figure.axes:
        axes.set_facecolor(_DARK.paper)
        for spine in axes.spines.values():
            spine.set_edgecolor(_DARK.grid)
        axes.tick_params(colors=_DARK.ink, grid_color=_DARK.grid)
    for text in figure.findobj(Text):
        text.set_color(_DARK.ink)
    return light_png(figure)


def _model_colours(models: Mapping[str, Any]) -> dict[str, str]:
    """A model has one colour in every plot."""
    return {name: _COLOURS[place % len(_COLOURS)] for place, name in enumerate(models)}


def _number(row: Mapping[str, Any], key: str) -> bool:
    return isinstance(row.get(key), int | float)


def _draw(axes: Any, title: str, label: str, curves: Curves) -> None:
    for place, (key, (steps, values)) in enumerate(curves.items()):
        marker = "o" if len(steps) <= 30 else None
        style = "--" if key.startswith("eval_") else "-"
        colour = _COLOURS[place % len(_COLOURS)]
        axes.plot(steps, values, style, marker=marker, markersize=3, linewidth=1.6, color=colour, label=key)
    axes.set_title(title, y=1.0)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    if len(curves) > 1 or next(iter(curves)) != title:
        axes.legend(frameon=False, fontsize=8)


def _wipe(axes: Any) -> None:
    """Take the curves off for the next ones: to make axes and ticks anew is a third of a plot's time."""
    for line in list(axes.lines):
        line.remove()
    if axes.get_legend() is not None:
        axes.get_legend().remove()
    axes.relim()
    axes.autoscale()


@contextmanager
def _look() -> Iterator[None]:
    """The reports' look, for everything drawn inside; raises DependencyError without matplotlib."""
    try:
        from matplotlib import font_manager, rc_context
    except ImportError:
        raise DependencyError(NO_MATPLOTLIB) from None
    ink, paper, grid = _LIGHT
    installed = {font.name for font in font_manager.fontManager.ttflist}
    look: dict[Any, Any] = {
        # A stage or model may be named in Chinese; only fonts that are there, or each glyph warns.
        "font.family": ["DejaVu Sans", *(font for font in _CJK_FONTS if font in installed)],
        "font.size": 9,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": grid,
        "axes.facecolor": paper,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": grid,
        "xtick.color": ink,
        "ytick.color": ink,
        "figure.facecolor": paper,
    }
    with rc_context(look):
        yield


def _figure(columns: int, *, height: float, width: float, fixed_margins: bool = False) -> tuple[Any, list[Any]]:
    """A figure of `columns` plots side by side, in inches; no pyplot, so nothing is kept or needs a display.

    With `fixed_margins`, where all tick labels are numbers, nothing is measured: half of the time of a figure.
    """
    from matplotlib.figure import Figure

    if not fixed_margins:
        figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
        return figure, list(figure.subplots(1, columns, squeeze=False)[0])
    left, right, bottom, top = 0.85, 0.12, 0.5, 0.32
    between = left + right
    panel = (width - columns * between) / columns
    figure = Figure(figsize=(width, height), dpi=120)
    figure.subplots_adjust(
        left=left / width,
        right=1 - right / width,
        bottom=bottom / height,
        top=1 - top / height,
        wspace=between / panel,
    )
    all_axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for axes in all_axes:
        axes.xaxis.set_label_coords(0.5, -0.32 / (height - bottom - top))
    return figure, all_axes


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    fast = {"compress_level": 1}  # the usual level takes a quarter of a plot's time, to save a sixth of its bytes
    # Without the version of what wrote it the same numbers give the same bytes.
    figure.savefig(file, format="png", metadata={"Software": None}, pil_kwargs=fast)
    return file.getvalue()
