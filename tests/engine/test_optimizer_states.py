"""Adam's states made early are those that its first step makes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from chatalign.engine.optimizer_states import make_early


def stepped(optimizer_type: type, *, early: bool, **settings: object) -> tuple[nn.Linear, torch.optim.Optimizer]:
    """A layer after three steps, on two of which its bias has no gradient."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    optimizer = optimizer_type(layer.parameters(), lr=0.1, weight_decay=0.1, **settings)
    if early:
        assert make_early(optimizer)
    for step in range(3):
        optimizer.zero_grad()
        layer(torch.randn(4, 5)).square().sum().backward()
        if step < 2:
            layer.bias.grad = None
        optimizer.step()
    return layer, optimizer


@pytest.mark.parametrize("settings", [{}, {"fused": True}, {"foreach": False}])
@pytest.mark.parametrize("optimizer_type", [torch.optim.Adam, torch.optim.AdamW])
def test_steps_are_bit_for_bit_those_without(optimizer_type: type, settings: dict[str, bool]) -> None:
    ours, early = stepped(optimizer_type, early=True, **settings)
    theirs, late = stepped(optimizer_type, early=False, **settings)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    for i, state in late.state_dict()["state"].items():
        assert all(torch.equal(value, early.state_dict()["state"][i][name]) for name, value in state.items())


def test_a_saved_state_is_taken_over_the_early_one() -> None:
    layer, optimizer = stepped(torch.optim.AdamW, early=False)
    again = torch.optim.AdamW(layer.parameters(), lr=0.1)
    make_early(again)
    again.load_state_dict(optimizer.state_dict())
    assert float(again.state[layer.weight]["step"]) == 3
    assert torch.equal(again.state[layer.weight]["exp_avg"], optimizer.state[layer.weight]["exp_avg"])


def test_others_are_left_alone() -> None:
    parameters = [nn.Parameter(torch.zeros(2))]
    assert not make_early(torch.optim.SGD(parameters, lr=0.1))
    assert not make_early(torch.optim.AdamW(parameters, amsgrad=True))
    _, optimizer = stepped(torch.optim.AdamW, early=False)
    assert not make_early(optimizer)  # its moments are not thrown away
