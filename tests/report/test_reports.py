"""Reports: what they say, what they escape, how they look without matplotlib, and that they stand alone."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from chatalign.artifact import Artifact, BaseModelRef, DataUsed, Parent, fingerprint
from chatalign.errors import ArtifactError
from chatalign.report import plots, print_evaluation, print_pipeline_summary, write_pipeline_report, write_run_report
from chatalign.report.headline import duration, headline
from chatalign.report.markdown import markdown_table
from chatalign.report.plots import PANELS, curves_of, run_plots

EVIL = "<script>alert(1)</script> a|b\nc <|im_end|> [bold red]x"
MODELS: dict[str, Any] = {
    "base": {"win_rate": 0.05, "win_rate_ci": [0.03, 0.07], "gold_mean": 0.4, "kl": 12.1, "accuracy": 0.5, "n": 600},
    "sft": {
        "baseline": True,
        "win_rate": None,
        "win_rate_ci": None,
        "gold_mean": 1.62,
        "kl": 0.0,
        "accuracy": 0.81,
        "n": 600,
    },
    "dpo": {"win_rate": 0.73, "win_rate_ci": [0.69, 0.77], "gold_mean": 1.99, "kl": 1.2, "accuracy": 0.86, "n": 600},
}
SAMPLES = [{"prompt": "法国的首都？", "replies": {"base": EVIL, "sft": "是巴黎。", "dpo": "是巴黎。很高兴帮忙！"}}]
REWARD_MODEL = {"accuracy": 0.84, "style_accuracy": 0.97, "correctness_accuracy": 0.71, "n": 900}


def make_run(folder: Path, stage: str, lines: list[dict[str, Any]], **changes: Any) -> Artifact:
    """A finished run's folder with its metrics."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "adapter_model.safetensors").write_text("weights")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings: dict[str, Any] = {
        "stage": stage,
        "kind": "adapter",
        "run_id": fingerprint(stage)[:12],
        "fingerprint": fingerprint(stage + "f"),
        "base_model": BaseModelRef(name_or_path="data/pocket/base", sha256=fingerprint("base")),
        "recipe": {"stage": stage, "train": {"learning_rate": 0.001}},
        "data": [
            DataUsed(
                path="rows.jsonl",
                sha256="ab" * 32,
                format="messages",
                rows=10,
                used=7,
                dropped={"messages[1].content: is empty": 2, "broken JSON": 1},
                examples={"messages[1].content: is empty": ["rows.jsonl:3", "rows.jsonl:8"]},
            )
        ],
        "seeds": {"seed": 42},
        "metrics": {"loss": 0.5},
        "wall_s": 185.0,
        "tokens_seen": 12345,
        "tokens_per_s": 6789.0,
        "files": {"model/adapter_model.safetensors": fingerprint("weights")},
    }
    artifact = Artifact(**settings | changes)
    artifact.save(folder)
    return artifact


@pytest.fixture
def pipeline(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A pipeline's folder with two trained stages, and its summary."""
    sft = make_run(tmp_path / "sft", "sft", [{"step": i, "loss": 3.0 / i, "eval_loss": 3.2 / i} for i in range(1, 9)])
    parent = Parent(role="model", path=str(tmp_path / "sft"), run_id=sft.run_id, fingerprint=sft.fingerprint)
    kl = [{"step": i, "objective/score": 0.1 * i, "objective/kl": 0.2 * i, "loss": None} for i in range(1, 9)]
    ppo = make_run(tmp_path / "ppo", "ppo", kl, parents=[parent], metrics={"objective/score": 0.8, "objective/kl": 1.6})
    stages = [
        {
            "name": name,
            "stage": name,
            "status": status,
            "wall_s": 61.0,
            "overhead_s": 4.2,
            "tokens_per_s": 1234.5,
            "metrics": run.metrics,
        }
        for name, run, status in (("sft", sft, "skipped"), ("ppo", ppo, "ran"))
    ]
    stages.append({"name": "eval", "stage": "eval", "status": "ran", "metrics": {"dpo.win_rate": 0.73, "n": 3.0}})
    summary = {"pipeline": "quick", "stages": stages, "eval": MODELS, "reward_model": REWARD_MODEL}
    return tmp_path, summary | {"samples": SAMPLES, "wall_s": 200.0, "versions": {"chatalign": "0.1.0"}}


class Page(HTMLParser):
    """Counts tags and keeps what pages could load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]


def test_a_pipeline_report_stands_alone(pipeline: Any) -> None:
    folder, summary = pipeline
    html = write_pipeline_report(folder, summary).read_text("utf-8")
    page = Page(html)
    assert page.tags.count("img") == page.tags.count("source") == 5
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert base64.b64decode(page.links[0].partition(",")[2]).startswith(b"\x89PNG")
    assert page.links[0] != page.links[1]  # the dark one
    assert "script" not in page.tags
    assert "&lt;script&gt;alert(1)" in html
    assert "是巴黎。很高兴帮忙！" in html
    assert "Win rates are against sft" in html
    for name in ("win_rates", "reward_kl", "loss", "reward", "kl"):
        assert (folder / f"plots/{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["win_rates", "reward_kl", "curves", "many curves"])
def test_a_figure_made_dark_is_the_one_drawn_in_dark_colours(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"step": step, "loss": 1.0 / step, "eval_loss": 2.0 / step} for step in range(1, 40)]

    def draw() -> Any:
        if kind == "win_rates":
            return plots.win_rates(MODELS, "sft")
        if kind == "reward_kl":
            return plots.reward_against_kl(MODELS, "sft")
        stages = {"sft": lines} if kind == "curves" else {"sft": lines, "dpo": lines[:9], "ppo": lines[5:20]}
        return plots.stage_curves(stages, ("loss",), "nats")

    figure = draw()
    light, dark = plots.light_png(figure), plots.dark_png(figure)
    assert light == plots.light_png(draw())
    monkeypatch.setattr(plots, "_LIGHT", plots._DARK)
    assert light != dark == plots.light_png(draw())


def test_a_pipeline_report_in_markdown(pipeline: Any) -> None:
    folder, summary = pipeline
    write_pipeline_report(folder, summary)
    text = (folder / "report.md").read_text("utf-8")
    assert "| dpo | **0.730 [0.69, 0.77]** | **1.990** | **0.860** | 1.20 |" in text
    assert "| sft | – | 1.620 | 0.810 | 0.00 |" in text
    assert "on 900 held-out pairs (style 0.970, correctness 0.710)" in text
    assert "| ppo | ppo | ran | 1 min 01 s | 4.2 s | 1,234 | score 0.800, KL 1.600 |" in text
    assert "| eval | eval | ran | 0.0 s | – | – | dpo wins 0.730 |" in text
    assert "a\\|b<br>c &lt;\\|im_end\\|&gt;" in text
    sft = fingerprint("sft")[:12]
    assert f"| ppo | {fingerprint('ppo')[:12]} | model: sft ({sft}) | data/pocket/base" in text
    assert "![Win rates](plots/win_rates.png)" in text


def test_a_stage_without_its_folder_is_still_reported(tmp_path: Path) -> None:
    summary = {"pipeline": "p", "stages": [{"name": "sft", "stage": "sft", "status": "ran"}], "wall_s": 1.0}
    html = write_pipeline_report(tmp_path, summary).read_text("utf-8")
    assert ">sft<" in html
    assert "Lineage" not in html
    assert "Results" not in html


def test_without_matplotlib_the_report_says_so(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, summary = pipeline
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "chatalign[report]" in write_pipeline_report(folder, summary).read_text("utf-8")
    assert "chatalign[report]" in (folder / "report.md").read_text("utf-8")
    assert "chatalign[report]" in write_run_report(folder / "sft").read_text("utf-8")
    assert not (folder / "plots").exists()


def test_a_run_report(pipeline: Any) -> None:
    folder, _ = pipeline
    text = write_run_report(folder / "sft").read_text("utf-8")
    assert "| result | loss 0.500 |" in text
    assert "| time | 3 min 05 s |" in text
    assert "| tokens | 12,345 (6,789 a second) |" in text
    assert "| rows.jsonl | messages | 10 | 7 | 3 | abababababab |" in text
    assert "| rows.jsonl | messages[1].content: is empty | 2 | rows.jsonl:3, rows.jsonl:8 |" in text
    assert "| rows.jsonl | broken JSON | 1 | – |" in text
    assert "seed 42" in text
    assert "learning_rate: 0.001" in text
    assert "![loss](plots/loss.png)" in text
    assert (folder / "sft/plots/loss.png").stat().st_size > 1000
    parents = write_run_report(folder / "ppo").read_text("utf-8")
    assert f"| model | {folder / 'sft'} | {fingerprint('sft')[:12]} |" in parents
    assert sorted(path.stem for path in (folder / "ppo/plots").iterdir()) == ["kl", "score"]


def test_an_evaluation_s_run_report_holds_its_tables(tmp_path: Path) -> None:
    make_run(tmp_path / "eval", "eval", [], kind="evaluation", metrics={"dpo.win_rate": 0.73})
    results = {"models": MODELS, "reward_model": REWARD_MODEL, "samples": SAMPLES}
    (tmp_path / "eval/eval.json").write_text(json.dumps(results), "utf-8")
    text = write_run_report(tmp_path / "eval").read_text("utf-8")
    assert "## Results on 600 held-out prompts, against sft" in text
    assert "| 法国的首都？ |" in text
    assert "![win rates](plots/win_rates.png)" in text
    out = io.StringIO()
    print_evaluation(tmp_path / "eval", Console(file=out, width=150))
    assert "0.730 [0.69, 0.77]" in out.getvalue()
    print_evaluation(tmp_path, Console(file=out, width=150))  # no evaluation: nothing to print


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no finished run"):
        write_run_report(tmp_path)


def test_the_terminal_s_tables(pipeline: Any) -> None:
    _, summary = pipeline
    out = io.StringIO()
    print_pipeline_summary(summary, Console(file=out, width=160))
    shown = out.getvalue()
    for text in (
        "quick · 3 min 20 s",
        "0.730 [0.69, 0.77]",
        "是巴黎。很高兴帮忙！",
        "accuracy 0.840 on 900",
        "1,234",
    ):
        assert text in shown
    assert "[bold red]x" in shown  # a reply is text, not markup


def test_a_narrow_terminal_keeps_what_matters_whole(pipeline: Any) -> None:
    _, summary = pipeline
    out = io.StringIO()
    print_pipeline_summary(summary, Console(file=out, width=50))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 50
    assert any("0.730 [0.69, 0.77] │ 1.990" in line for line in lines)
    heading = next(line for line in lines if "win rate" in line)
    assert "accuracy" in heading
    assert "KL" not in heading
    assert any(line.startswith("│ sft") and "是巴黎。" in line for line in lines)


def test_curves_skip_what_was_not_a_number() -> None:
    lines = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 0.5, "eval_loss": 0.6}]
    assert curves_of(lines, ("loss",)) == {"loss": ([1.0, 3.0], [1.0, 0.5])}


def test_a_plot_shows_nothing_of_the_one_before() -> None:
    """All plots of a run are drawn on the same axes."""
    values: dict[str, Any] = {
        "loss": 3.0,
        "loss/value": -2e4,
        "eval_loss": 0.1,
        "grad_norm": 5e5,
        "learning_rate": 1e-6,
    }
    values |= {"rewards/chosen": 0.0, "rewards/rejected": 1e-3}
    lines = [{"step": 100 * i} | {key: value / i for key, value in values.items()} for i in range(1, 6)]
    together = run_plots(lines)
    assert list(together) == ["loss", "rewards", "grad_norm", "learning_rate"]
    keys = {panel.name: {name for key in panel.keys for name in (key, f"eval_{key}")} for panel in PANELS}
    for name, picture in together.items():
        alone = [{key: value for key, value in line.items() if key in keys[name] | {"step"}} for line in lines]
        assert run_plots(alone) == {name: picture}


def test_small_words() -> None:
    assert [duration(s) for s in (8.24, 185, 7440)] == ["8.2 s", "3 min 05 s", "2 h 04 min"]
    assert headline("ppo", {}) == "–"
    assert headline("sft", {"eval_loss": 0.5, "loss": 0.4}) == "held-out loss 0.500"
    assert headline("eval", {"a.rm_win_rate": 0.9, "b.win_rate": 0.6}) == "b wins 0.600"
    assert markdown_table(("a",), []) == ""


def test_reports_need_no_torch() -> None:
    code = "import sys, chatalign.report; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
