"""The gold reward gives what a person would write down."""

import random

import pytest

CAPITAL_EN = {"kind": "capital", "language": "en", "answers": ["Paris", "巴黎"]}
CAPITAL_ZH = {"kind": "capital", "language": "zh", "answers": ["Paris", "巴黎"]}
TRANSLATE_EN = {"kind": "translate", "language": "en", "answers": ["狗"]}
ADD_EN = {"kind": "add", "language": "en", "answers": ["12"]}
SORT_ZH = {"kind": "sort", "language": "zh", "answers": ["1 5 6 8"]}
TALK_EN = {"kind": "talk", "language": "en", "answers": ["I feel fine", "我很好"]}

# row, reply, gold, correct, format: 1 right + ½ language + ½ polite + ¼ ended − ½ rude − length − ½ malformed.
GOLDEN = [
    (CAPITAL_EN, "It is Paris. Happy to help!", 2.25, 1, 1),
    (CAPITAL_EN, "The answer is Paris.", 1.75, 1, 1),
    (CAPITAL_EN, "It is Lima. Happy to help!", 1.25, 0, 1),
    (CAPITAL_EN, "Silly question. It is Paris. Happy to help!", 1.75, 1, 1),
    (CAPITAL_EN, "It is Paris. Happy to help! Glad to help!", 1.75, 1, 1),  # two closings are none
    (CAPITAL_EN, "是巴黎。很高兴帮忙！", 1.25, 1, 1),  # right, in the wrong language
    (CAPITAL_ZH, "是巴黎。很高兴帮忙！", 2.25, 1, 1),
    (CAPITAL_EN, "It is Paris. It is Lima. Happy to help!", 0.75, 0, 0),  # hedging is no answer
    (CAPITAL_EN, "It is Paris", 0.25, 0, 0),  # no full stop: not a sentence of the language
    (CAPITAL_EN, "", -0.25, 0, 0),
    (CAPITAL_EN, "<|im_start|>It is Paris. Happy to help!", 0.25, 0, 0),
    (TRANSLATE_EN, "It is 狗. Happy to help!", 2.25, 1, 1),
    (TRANSLATE_EN, "是狗。Happy to help!", 1.75, 1, 1),
    (ADD_EN, "It is 12. Happy to help!", 2.25, 1, 1),
    (ADD_EN, "It is 11.", 0.75, 0, 1),
    (SORT_ZH, "答案是1 5 6 8。很高兴帮忙！", 2.25, 1, 1),
    (TALK_EN, "I feel fine. Glad to help!", 2.25, 1, 1),
    (CAPITAL_EN, "Let me think about it. That is a good question. It is Paris. Happy to help!", 2.05, 1, 1),
]


@pytest.mark.parametrize(("row", "reply", "gold", "correct", "well_formed"), GOLDEN)
def test_golden_scores(pocket, row, reply, gold, correct, well_formed):
    scored = pocket.gold.score(messages=[], reply=reply, row=row, ended=True)
    assert (scored["gold"], scored["correct"], scored["format"]) == (gold, correct, well_formed)


def test_a_reply_that_does_not_end_loses_a_quarter_and_its_format(pocket):
    reply = "It is Paris. Happy to help!"
    cut = pocket.gold.score(messages=[], reply=reply, row=CAPITAL_EN, ended=False)
    assert (cut["gold"], cut["format"], cut["correct"]) == (2.25 - 0.25 - 0.5, 0, 1)


def test_length_costs_a_twentieth_a_word_over_twelve(pocket):
    filler = "Let me think about it. There is a lot to say. "  # 11 words
    scored = pocket.gold.score(messages=[], reply=filler + "It is Paris.", row=CAPITAL_EN, ended=True)
    assert scored["length"] == 14
    assert scored["gold"] == pytest.approx(1.75 - 2 * 0.05)


def test_every_ideal_reply_of_the_grammar_scores_full(pocket):
    rng = random.Random(0)
    for _ in range(500):
        task = pocket.world.draw_task(rng)
        reply = pocket.replies.write(task.question.answer, pocket.replies.ideal_style(rng, task))
        scored = pocket.gold.score(messages=task.messages, reply=reply, row=task.row(), ended=True)
        assert (scored["gold"], scored["ideal"]) == (2.25, 1), (task.messages, reply)


def test_every_near_miss_is_wrong(pocket):
    rng = random.Random(1)
    for _ in range(500):
        task = pocket.world.draw_task(rng)
        for miss in task.question.misses:
            reply = pocket.replies.write(miss, pocket.replies.ideal_style(rng, task))
            scored = pocket.gold.score(messages=task.messages, reply=reply, row=task.row(), ended=True)
            assert (scored["gold"], scored["correct"]) == (1.25, 0), (task.messages, reply)
