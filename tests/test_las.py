"""LAS: each B is trained as a linear readout of its own block, by that readout's own error."""

import copy

import pytest
import torch
import torch.nn.functional as F
from reference import convnet_gradients, mlp_gradients
from torch import nn

from feedback import DirectFeedback, direct_feedback
from models import ConvNet


def convnet(**options):
    torch.manual_seed(0)
    model = ConvNet(4).double()
    x, y = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 3, 1])
    return DirectFeedback(model, model.points, "LAS", x[:1], **options), x, y


def mlp(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(7, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2, 2])
    return DirectFeedback(model, ("1", "3"), "LAS", x, **options), x, y


def readout_gradients(net, x, y):
    """d/dB of the mean cross-entropy of a softmax regression on each point's output, by plain autograd."""
    _, activations = net.tapped_forward(x, cut=False)
    matrices = [B.detach().clone().requires_grad_() for B in net.matrices()]
    losses = [
        F.cross_entropy(torch.einsum("n...,k...->nk", h.detach(), B), y)
        for h, B in zip(activations.values(), matrices, strict=True)
    ]
    return torch.autograd.grad(sum(losses), matrices)


@pytest.mark.parametrize("build", [convnet, mlp])
def test_gradients_equal_those_worked_out_by_hand(build):
    net, x, y = build()
    F.cross_entropy(net(x, target=y), y).backward()
    parameters = dict(net.model.named_parameters())
    if build is convnet:
        expected, _ = convnet_gradients(parameters, net.matrices(), x, y)
    else:
        layers = list(net.model)[::2]
        weights, biases, _ = mlp_gradients([z.weight for z in layers], [z.bias for z in layers], net.matrices(), x, y)
        expected = {f"{2 * i}.weight": value for i, value in enumerate(weights)}
        expected |= {f"{2 * i}.bias": value for i, value in enumerate(biases)}
    assert expected.keys() == parameters.keys()
    for name, value in expected.items():
        torch.testing.assert_close(parameters[name].grad, value)
    for B, value in zip(net.matrices(), readout_gradients(net, x, y), strict=True):
        torch.testing.assert_close(B.grad, value)


@pytest.mark.parametrize("build", [convnet, mlp])
def test_inplace_update_equals_sgd_step_for_step(build):
    lr, decay = 0.1, 0.05
    by_optimizer, x, y = build()
    inplace, _, _ = build(update="inplace", feedback_lr=lr, feedback_weight_decay=decay)
    optimizers = [torch.optim.SGD(net.model.parameters(), 0.3) for net in (by_optimizer, inplace)]
    of_feedback = torch.optim.SGD(by_optimizer.feedback.parameters(), lr, weight_decay=decay)
    for _ in range(4):
        for net, optimizer in zip((by_optimizer, inplace), optimizers, strict=True):
            net.zero_grad()
            F.cross_entropy(net(x, target=y), y).backward()
            optimizer.step()
        of_feedback.step()
        for got, expected in zip(inplace.parameters(), by_optimizer.parameters(), strict=True):
            torch.testing.assert_close(got, expected)
    assert all(B.grad is None for B in inplace.matrices())


def test_the_function_takes_the_target():
    net, x, y = mlp()
    logits, activations = net.tapped_forward(x, cut=True)
    routed = direct_feedback(logits, list(activations.values()), net.matrices(), rule="LAS", target=y)
    F.cross_entropy(routed, y).backward()
    for B, value in zip(net.matrices(), readout_gradients(net, x, y), strict=True):
        torch.testing.assert_close(B.grad, value)


def test_the_readouts_learn_the_classes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
    x = torch.randn(256, 8)
    y = (2 * (x[:, 0] > 0) + (x[:, 1] > 0)).long()
    net = DirectFeedback(model, ("1", "3"), "LAS", x[:1])
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(net(x, target=y), y).backward()
        optimizer.step()
    logits, activations = net.tapped_forward(x, cut=False)
    for outputs in (logits, *(h @ B.T for h, B in zip(activations.values(), net.matrices(), strict=True))):
        assert (outputs.argmax(1) == y).float().mean() > 0.9


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (None, r"call net\(x, target=y\) in training"),
        (
            torch.zeros(6, dtype=torch.int64),
            r"target has shape \(6,\), expected .* \(N, ..., K\) \(7, 3\)",
        ),
        (torch.zeros(7, 1), r"target is torch.float32 \(7, 1\), expected class ids"),
        (torch.zeros(7), r"target is torch.float32 \(7,\), expected class ids"),
        (torch.zeros(7, dtype=torch.int32), r"target is torch.int32 \(7,\), expected class ids torch.int64"),
    ],
)
def test_a_wrong_target_is_refused(target, message):
    net, x, _ = mlp()
    with pytest.raises(ValueError, match=message):
        net(x, target=target)
    net.eval()
    assert torch.equal(net(x, target=target), net.model(x))


def mixed(logits, targets):
    one, other = targets
    return 0.3 * F.cross_entropy(logits, one) + 0.7 * F.cross_entropy(logits, other)


def test_a_loss_may_take_more_than_one_tensor():
    net, x, y = mlp(loss=mixed)
    soft, _, _ = mlp()
    mixed(net(x, target=(y, y.flip(0))), (y, y.flip(0))).backward()
    shares = 0.3 * F.one_hot(y, 3) + 0.7 * F.one_hot(y.flip(0), 3)
    F.cross_entropy(soft(x, target=shares.double()), shares).backward()
    for one, other in zip(net.parameters(), soft.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_loss_that_is_a_module_is_no_part_of_the_state_dict():
    net, x, y = mlp(loss=nn.CrossEntropyLoss(weight=torch.ones(3).double()))
    plain, _, _ = mlp()
    plain.load_state_dict(net.state_dict())
    assert copy.deepcopy(net).loss is not None and net.loss not in net.modules()
    net.loss(net(x, target=y), y).backward()
    F.cross_entropy(plain(x, target=y), y).backward()
    for one, other in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_a_last_layer_for_other_classes_is_named():
    net, x, y = mlp()
    net.model[4] = nn.Linear(4, 5).double()
    with pytest.raises(ValueError, match="the logits have 5 classes, expected 3 as at construction"):
        net(x, target=y)


def test_an_fp16_grad_scaler_scales_b_as_the_weights():
    exact, x, y = mlp()
    net = copy.deepcopy(exact).float()
    F.cross_entropy(exact(x, target=y), y).backward()
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD(net.parameters(), 0.1)
    with torch.autocast("cpu", torch.float16):
        loss = F.cross_entropy(net(x.float(), target=y), y)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for got, expected in zip(net.parameters(), exact.parameters(), strict=True):
        assert (got.grad.double() - expected.grad).norm() <= 0.02 * expected.grad.norm() + 1e-3
