"""DRTP: the one-hot target goes to every block through a fixed B, whatever the network's error is."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from feedback import DirectFeedback


@pytest.fixture
def mlp():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(7, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2, 2])
    return DirectFeedback(model, ("1", "3"), "DRTP", x), x, y


def test_gradients_equal_those_worked_out_by_hand(mlp):
    net, x, y = mlp
    F.cross_entropy(net(x, target=y), y).backward()
    first, _, second, _, last = net.model
    h1 = (x @ first.weight.T + first.bias).tanh()
    h2 = (h1 @ second.weight.T + second.bias).tanh()
    target = torch.zeros(7, 3, dtype=torch.float64)
    target[torch.arange(7), y] = 1
    error = ((h2 @ last.weight.T + last.bias).softmax(1) - target) / 7
    B1, B2 = net.matrices()
    for layer, delta, inputs in (
        (first, -target / 7 @ B1 * (1 - h1**2), x),
        (second, -target / 7 @ B2 * (1 - h2**2), h1),
        (last, error, h2),
    ):
        torch.testing.assert_close(layer.weight.grad, delta.T @ inputs)
        torch.testing.assert_close(layer.bias.grad, delta.sum(0))


def test_no_block_but_the_last_depends_on_the_network_error_but_for_the_scale_of_the_loss(mlp):
    net, x, y = mlp
    hidden = [p for name, p in net.model.named_parameters() if not name.startswith("4.")]
    grads = []
    for factor, bias in ((1, [0, 0, 0]), (5, [3, -2, 1])):
        net.model[4].bias.data.copy_(torch.tensor(bias))
        loss = factor * F.cross_entropy(net(x, target=y), y)
        grads.append(torch.autograd.grad(loss, hidden))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(5 * one, other)


def test_b_is_fixed_and_the_labels_are_needed(mlp):
    net, x, _ = mlp
    assert not list(net.feedback.parameters()) and len(net.matrices()) == 2
    with pytest.raises(ValueError, match=r"DRTP reads the labels: call net\(x, target=y\) in training"):
        net(x)
