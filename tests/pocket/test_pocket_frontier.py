"""The frontier script: best-of-n estimates and their KL bound, results over seeds, figures, and one small real run."""

import itertools
import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file


@pytest.fixture
def point(pocket):
    """Makes a point; what isn't given is SFT-like."""

    def make(method="ppo", setting=0.1, seed=1, **measured):
        usual = {"kl": 1.0, "win_rate": 0.8, "gold": 2.0, "accuracy": 0.8, "format_rate": 0.9, "ideal": 0.5, "score": 1}
        return pocket.frontier_report.Point(method=method, setting=setting, seed=seed, **(usual | measured))

    return make


@pytest.fixture
def results(point):
    """Two seeds of everything that is drawn."""
    made = [point("sft", 0.0, seed, kl=0.0, win_rate=0.5, ideal=0.1 + seed / 10, score=0.0) for seed in (1, 2)]
    for seed, (method, setting) in itertools.product(
        (1, 2), [("ppo", 0.1), ("ppo", 0.2), ("dpo", 0.1), ("best_of_n", 2)]
    ):
        made.append(point(method, setting, seed, kl=setting * 10 + seed, win_rate=0.7 + seed / 100))
    for seed, step in itertools.product((1, 2), (24, 48)):
        made.append(point("no_penalty", step, seed, kl=step / 10, gold=2 - step / 100, score=step / 20 + seed / 10))
    return made


def test_best_of_weights_of_four_draws(pocket):
    """Of two of four, the third-best draw is the better one in 1 of 6 pairs, and so on; the worst never."""
    weights = pocket.frontier.best_of_weights([0.3, 0.9, 0.1, 0.5], 2)
    assert weights == pytest.approx([1 / 6, 3 / 6, 0, 2 / 6])


@pytest.mark.parametrize("n", range(1, 7))
def test_best_of_weights_are_the_mean_over_all_subsets(pocket, n):
    scores, gold = [0.2, -1.0, 3.0, 0.7, 0.1, 2.5], [1.0, 2.0, 0.5, 1.5, -1.0, 0.0]
    subsets = list(itertools.combinations(range(6), n))
    expected = sum(gold[max(subset, key=scores.__getitem__)] for subset in subsets) / len(subsets)
    weights = pocket.frontier.best_of_weights(scores, n)
    assert sum(w * g for w, g in zip(weights, gold, strict=True)) == pytest.approx(expected)


@pytest.mark.parametrize("n", [0, 4])
def test_best_of_more_than_there_are_is_refused(pocket, n):
    with pytest.raises(ValueError, match="between 1 and the number of draws"):
        pocket.frontier.best_of_weights([1.0, 2.0, 3.0], n)


def test_best_of_kl_bounds_the_exact_one(pocket):
    """Over K equally likely replies of different scores the KL is a sum; many replies come near the bound."""
    assert pocket.frontier.best_of_kl(1) == 0
    assert pocket.frontier.best_of_kl(2) == pytest.approx(math.log(2) - 0.5)
    for n, replies in itertools.product((2, 8, 32), (3, 4000)):
        shares = [((k + 1) / replies) ** n - (k / replies) ** n for k in range(replies)]
        exact = sum(share * math.log(share * replies) for share in shares if share)
        bound = pocket.frontier.best_of_kl(n)
        assert exact <= bound
        assert (bound - exact < 0.01) == (replies == 4000)


def drawn(gold, rm_score, correct=1.0):
    return {"gold": gold, "rm_score": rm_score, "gold_parts": {"correct": correct, "format": 1.0, "ideal": 0.0}}


def test_best_of_point_by_hand(pocket):
    """Two prompts, two draws each; the reward model picks the second, then the first."""
    groups = [[drawn(0.0, 1.0, 0.0), drawn(2.0, 3.0)], [drawn(1.0, 5.0), drawn(2.0, 1.0, 0.0)]]
    baseline = [drawn(1.0, 1.0), drawn(1.0, 3.0)]  # scores 1 and 3: mean 2, deviation 1
    point = pocket.frontier.best_of_point(7, 2, groups, baseline)
    assert (point.method, point.setting, point.seed) == ("best_of_n", 2, 7)
    assert point.win_rate == (1 + 0.5) / 2  # a win and a tie
    assert point.gold == (2 + 1) / 2
    assert point.accuracy == 1
    assert point.score == ((3 - 2) + (5 - 2)) / 2


def test_ceiling_and_spread(pocket, results):
    report = pocket.frontier_report
    assert report.win_ceiling(results) == pytest.approx((0.875, 0.85, 0.9))  # a fifth and three tenths are ideal
    assert report.spread(report.at(results, "ppo", 0.1), "kl") == (2.5, 2.0, 3.0)
    with pytest.raises(ValueError, match="no point"):
        report.spread([], "kl")


def test_later_results_take_the_place_of_earlier(pocket, point, tmp_path):
    path = tmp_path / "results.jsonl"
    pocket.frontier_report.add_results(path, [point(seed=2), point(seed=1, kl=3.0)])
    pocket.frontier_report.add_results(path, [point(seed=1, kl=4.0), point("dpo")])
    read = pocket.frontier_report.read_results(path)
    assert [(p.method, p.seed, p.kl) for p in read] == [("dpo", 1, 1.0), ("ppo", 1, 4.0), ("ppo", 2, 1.0)]
    assert pocket.frontier_report.read_results(tmp_path / "none.jsonl") == []


def test_table_says_mean_and_range(pocket, results):
    lines = pocket.frontier_report.table(results)
    assert len(lines) == 2 + 1 + 2 + 1 + 1
    assert lines[3].startswith("| PPO, kl_coef 0.1 | 2 | 2.50 (2.00–3.00) | 0.715 (0.710–0.720) | 0.800 |")
    assert lines[-1].startswith("| best of 2 | 2 | ≤ ")


def test_figures_draw_the_means(pocket, results, tmp_path):
    pocket.frontier_report.write_figures(results, tmp_path)
    for name in ("ppo_frontier.png", "ppo_overoptimisation.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    left = pocket.frontier_report.frontier(results).axes[0]
    ppo = next(line for line in left.lines if line.get_label().startswith("PPO"))
    assert list(ppo.get_xdata()) == [2.5, 3.5]
    assert list(ppo.get_ydata()) == pytest.approx([0.715, 0.715])
    score, gold, *_ = pocket.frontier_report.overoptimisation(results).axes
    assert [list(line.get_ydata()) for line in score.lines] == [[0, 1.3, 2.5], [0, 1.4, 2.6]]  # a seed each, from SFT
    assert list(gold.lines[0].get_xdata()) == [0, 2.4, 4.8]


def test_table_goes_between_the_pages_marks(pocket, results, tmp_path):
    report, page = pocket.frontier_report, tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", "utf-8")
    report.write_table(results, page)
    once = page.read_text("utf-8")
    assert once == "\n".join(["before", report.BEGIN, "", *report.table(results), "", report.END, "after", ""])
    report.write_table(results, page)
    assert page.read_text("utf-8") == once
    page.write_text(report.END + report.BEGIN, "utf-8")
    with pytest.raises(ValueError, match="has no"):
        report.write_table(results, page)


def test_page_shows_the_committed_results(pocket, root):
    report = pocket.frontier_report
    page = (root / "docs" / "ppo.md").read_text("utf-8")
    table = "\n".join(report.table(report.read_results(pocket.folder / "frontier.jsonl")))
    assert page.split(report.BEGIN)[1].split(report.END)[0].strip() == table


def test_policy_at_a_checkpoint(pocket, tmp_path):
    run, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoints" / "checkpoint-3"
    (run / "model").mkdir(parents=True)
    checkpoint.mkdir(parents=True)
    (run / "model" / "config.json").write_text("{}", "utf-8")
    save_file({"w": torch.ones(2)}, run / "model" / "model.safetensors")
    save_file({"policy.w": torch.zeros(2), "value_head.w": torch.ones(1)}, checkpoint / "trainable.safetensors")
    folder = pocket.frontier.policy_at(run, 3, tmp_path / "at-3")
    assert (folder / "config.json").is_file()
    assert load_file(folder / "model.safetensors")["w"].tolist() == [0, 0]
    save_file({"policy.adapter": torch.zeros(2)}, checkpoint / "trainable.safetensors")
    with pytest.raises(ValueError, match="other weights"):
        pocket.frontier.policy_at(run, 3, tmp_path / "at-3")


SMALL = {
    "sft": {"train": {"max_steps": 2}},
    "reward": {"train": {"max_steps": 2}},
    "dpo": {"train": {"max_steps": 2}},
    "ppo": {"ppo": {"total_episodes": 24, "rollout_batch_size": 12}, "train": {"per_device_train_batch_size": 4}},
    "eval": {},
}


@pytest.mark.slow
def test_small_study_runs_and_goes_on(pocket, root, tmp_path, monkeypatch):
    """All four methods from real runs of a few steps; asked again, nothing runs and the results are the same."""
    monkeypatch.chdir(root)
    for stage, smaller in SMALL.items():
        recipe = yaml.safe_load((root / "recipes" / "pocket" / f"{stage}.yaml").read_text("utf-8"))
        for section, keys in smaller.items():
            recipe[section] |= keys
        (tmp_path / f"{stage}.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    frontier = pocket.frontier
    small = {"RECIPES": tmp_path, "KL_COEFS": (0.1,), "DPO_BETAS": (0.1,), "BEST_OF": (2, 4)}
    for name, value in small.items():
        monkeypatch.setattr(frontier, name, value)
    for key, smaller in {"ppo.total_episodes": 24, "train.save_steps": 6}.items():
        monkeypatch.setitem(frontier.NO_PENALTY, key, smaller)
    first = [point for new in frontier.measured(tmp_path / "runs", [1], 12) for point in new]
    expected = [("sft", 0), ("ppo", 0.1), ("dpo", 0.1), *(("best_of_n", n) for n in (2, 4))]
    expected += [("no_penalty", step) for step in (6, 12)]
    assert {(p.method, p.setting) for p in first} == set(expected)
    last = max((p for p in first if p.method == "no_penalty"), key=lambda p: p.setting)
    made = json.loads((tmp_path / "runs" / "seed-1" / "eval-no-penalty" / "eval.json").read_text("utf-8"))["models"]
    assert last.kl == made["12"]["kl"] > 0
    monkeypatch.setattr(frontier, "run_stage", lambda recipe: pytest.fail(f"{recipe.output_dir} ran again"))
    assert [point for new in frontier.measured(tmp_path / "runs", [1], 12) for point in new] == first
