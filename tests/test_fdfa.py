"""FDFA: B follows the mean Jacobian, by directional derivatives along random perturbations."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from feedback import DirectFeedback, alignment, direct_feedback

POINTS = ["0", "1", "2"]


def blocks():
    """Smooth, since the derivative is held against a difference."""
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


def wrap(rule="FDFA", **options):
    model = blocks()
    torch.manual_seed(1)
    return DirectFeedback(model, POINTS, rule, data()[0][:2], **options)


def step(net):
    x, y = data()
    torch.manual_seed(2)
    F.cross_entropy(net(x, target=y), y).backward()


def difference(model, x, perturbations):
    """The logits' derivative along the perturbations of the first three blocks' outputs, by its definition."""

    def logits(size):
        h = x
        for block, u in zip(model[:-1], perturbations, strict=True):
            h = block(h) + size * u
        return model[-1](h)

    size = 1e-6
    return (logits(size) - logits(-size)) / (2 * size)


@pytest.fixture
def drawn(monkeypatch):
    """The random numbers that a pass takes."""
    tensors, randn_like = [], torch.randn_like

    def note(*args, **named):
        tensors.append(randn_like(*args, **named))
        return tensors[-1]

    monkeypatch.setattr(torch, "randn_like", note)
    return tensors


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_b_gets_its_distance_from_the_product_of_the_derivative_and_the_perturbation(drawn, layout):
    net, (x, y) = wrap(), data()
    x = x.to(memory_format=layout)
    if layout == torch.channels_last:
        net = DirectFeedback(blocks().to(memory_format=layout), POINTS, "FDFA", x[:2])
    F.cross_entropy(net(x, target=y), y).backward()
    shapes = [B.shape[1:] for B in net.matrices()]
    if layout == torch.channels_last:  # drawn as (N, H, W, C)
        in_order = [(5, *s[1:], *s[:1]) if len(s) == 3 else (5, *s) for s in shapes]
        perturbations = [u.view(size).movedim(-1, 1) for u, size in zip(drawn, in_order, strict=True)]
    else:
        perturbations = [u.view(5, *shape) for u, shape in zip(drawn, shapes, strict=True)]
    with torch.no_grad():
        along = difference(blocks(), x, perturbations)
    for u, B in zip(perturbations, net.matrices(), strict=True):
        expected = B.detach() - torch.einsum("nk,n...->k...", along, u) / 5
        torch.testing.assert_close(B.grad, expected, atol=1e-6, rtol=1e-6)


def test_the_signal_is_that_of_dfa():
    net, dfa = wrap(), wrap("DFA")
    assert all(torch.equal(B, other) for B, other in zip(net.matrices(), dfa.matrices(), strict=True))
    for module in (net, dfa):
        step(module)
    for got, expected in zip(net.model.parameters(), dfa.model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad)
    for got, expected in zip(net.model.buffers(), dfa.model.buffers(), strict=True):
        torch.testing.assert_close(got, expected)
    x, y = data()
    by_rule, by_dfa = alignment(net, x, y), alignment(dfa, x, y)
    assert by_rule["0"] == pytest.approx(by_dfa["0"]) and by_rule.keys() == by_dfa.keys()


def test_the_mean_over_many_perturbations_is_the_jacobian():
    """Of a linear net, where it is a product of weights; the tolerance is five standard errors of each element."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)).double()
    net = DirectFeedback(model, ["0", "1"], "FDFA", torch.zeros(2, 3).double())
    images = 20000
    F.cross_entropy(net(torch.randn(images, 3).double()), torch.arange(images) % 2).backward()
    jacobians = [model[2].weight @ model[1].weight, model[2].weight]
    scale = sum(jacobian.square().sum() for jacobian in jacobians).sqrt()  # of the derivative
    for B, jacobian in zip(net.matrices(), jacobians, strict=True):
        assert (B - B.grad - jacobian).abs().max() < 5 * 2**0.5 * scale / images**0.5


def test_perturbations_are_random_and_follow_the_seed():
    nets = [wrap() for _ in range(3)]
    for net in nets[:2]:
        step(net)
    x, y = data()
    F.cross_entropy(nets[2](x), y).backward()
    first, same, other = ([B.grad for B in net.matrices()] for net in nets)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_without_learning_it_is_dfa(drawn):
    net, dfa = wrap(), wrap("DFA")
    net.feedback.requires_grad_(False)
    for module in (net, dfa):
        step(module)
    assert all(B.grad is None for B in net.matrices())
    for got, expected in zip(net.model.parameters(), dfa.model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad)
    net.eval(), net(data()[0])
    net.train()
    with torch.no_grad():
        net(data()[0])
    assert len(drawn) == len(POINTS)  # those of the one training pass


def test_bfloat16_is_near(drawn):
    nets, (x, y) = [wrap(), wrap().float()], data()
    step(nets[0])
    drawn_again = list(drawn)
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(torch, "randn_like", lambda rows, **named: drawn_again.pop(0).to(rows.dtype))
        loss = F.cross_entropy(nets[1](x.float()), y)
    loss.backward()
    for exact, B in zip(*(net.matrices() for net in nets), strict=True):
        learned = [M.detach().double() - M.grad.double() for M in (exact, B)]
        assert (learned[1] - learned[0]).norm() < 0.05 * learned[0].norm()


def test_an_operation_in_place_behind_a_point():
    grads = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace), nn.Linear(5, 5), nn.ReLU(inplace), nn.Linear(5, 3))
        net = DirectFeedback(model.double(), ["0", "2"], "FDFA", torch.zeros(2, 4).double())
        torch.manual_seed(1)
        F.cross_entropy(net(torch.randn(6, 4).double()), torch.arange(6) % 3).backward()
        grads.append([parameter.grad for parameter in net.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_a_pass_without_a_point_lets_b_follow_nothing():
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.last, self.skip = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 3), False

        def forward(self, x):
            return self.last(x if self.skip else self.block(x))

    net = DirectFeedback(Skipping(), ["block"], "FDFA", torch.zeros(2, 4), missing="skip")
    net.model.skip = True
    F.cross_entropy(net(torch.randn(6, 4)), torch.arange(6) % 3).backward()
    assert net.matrices()[0].grad is None and net.model.last.weight.grad.any()


def test_an_empty_batch_moves_no_b():
    net = DirectFeedback(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), ["1"], "FDFA", torch.zeros(2, 4))
    net(torch.zeros(0, 4)).sum().backward()
    assert not net.matrices()[0].grad.any()


def checkpointed():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = blocks()

        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    return Checkpointed()


def test_what_forward_mode_does_not_go_with_is_refused():
    x, y = data()
    net = DirectFeedback(checkpointed(), ["blocks.0", "blocks.1", "blocks.2"], "FDFA", x[:2])
    oldest = torch.__version__.startswith("2.6.")  # refuses both with words of its own
    with pytest.raises(NotImplementedError if oldest else CheckpointError):
        F.cross_entropy(net(x), y).backward()
    torch._dynamo.reset()
    compiled = torch.compile(wrap(), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="WITH_EXCEPT_START" if oldest else r"which torch\.compile does not take"):
        compiled(x)
    with pytest.raises(ValueError, match=r"needs a rule of \['DKP', 'LAS'\], got 'FDFA'"):
        wrap(update="inplace", feedback_lr=0.1)
    with pytest.raises(ValueError, match="takes no positions and no feature_dim"):
        wrap(positions="pooled")
    with (
        pytest.raises(ValueError, match=r"got float16.*does not grow with the loss"),
        torch.autocast("cpu", torch.half),
    ):
        wrap().float()(x.float())
    h, B = torch.randn(5, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    with pytest.raises(ValueError, match="`DirectFeedback` alone runs the forward pass by which it learns"):
        direct_feedback(torch.randn(5, 3, requires_grad=True), [h], [B], rule="FDFA")
    tokens = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"\(2, 5, 2\) have positions, expected \(N, K\) for rule FDFA"):
        DirectFeedback(tokens, ["0"], "FDFA", torch.zeros(2, 5, 3))


def test_a_deep_copy_learns_alike():
    net = wrap()
    twin = copy.deepcopy(net)
    for module in (net, twin):
        step(module)
    for one, other in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
