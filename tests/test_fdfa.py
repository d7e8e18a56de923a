"""FDFA: B follows the mean Jacobian, by directional derivatives along random perturbations."""

import torch
import torch.nn.functional as F
from torch import nn

from feedback import DirectFeedback


def blocks():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh()),
        nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.Tanh()),
        nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh()),
        nn.Linear(6, 3),
    ).double()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 2, 8, 8, generator=generator, dtype=torch.float64), torch.arange(5) % 3


def directional_derivative(model, x, perturbations):
    """The logits' derivative along the perturbations of the first three blocks' outputs, by the definition."""

    def logits(size):
        h = x
        for block, u in zip(model[:-1], perturbations, strict=True):
            h = block(h) + size * u
        return model[-1](h)

    size = 1e-6
    return (logits(size) - logits(-size)) / (2 * size)


def test_gradients(monkeypatch):
    net, (x, y) = DirectFeedback(blocks(), ["0", "1", "2"], "FDFA", data()[0]), data()
    twin = DirectFeedback(blocks(), ["0", "1", "2"], "DFA", data()[0])
    drawn, randn_like = [], torch.randn_like

    def note(*args, **named):
        drawn.append(randn_like(*args, **named))
        return drawn[-1]

    monkeypatch.setattr(torch, "randn_like", note)
    for B, other in zip(net.matrices(), twin.matrices(), strict=True):
        other.copy_(B.detach())
    for module in (net, twin):
        F.cross_entropy(module(x, target=y), y).backward()
    for got, expected in zip(net.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad)
    assert len(drawn) == 3
    with torch.no_grad():
        perturbations = [u.view(5, *B.shape[1:]) for u, B in zip(drawn, net.matrices(), strict=True)]
        along = directional_derivative(blocks(), x, perturbations)
    for u, B in zip(drawn, net.matrices(), strict=True):
        torch.testing.assert_close(B.grad, B.detach() - (along.T @ u).view_as(B) / 5, atol=1e-6, rtol=1e-6)
