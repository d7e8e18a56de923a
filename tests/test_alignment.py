"""The alignment angle: what it is for BP, for a fresh B, and that measuring it leaves no trace."""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from variants import each, feed_back_the_weights

from feedback import DirectFeedback, alignment
from models import ConvNet


def probe(batch=16):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, 3, 32, 32, generator=generator), torch.randint(10, (batch,), generator=generator)


def make(rule, **options):
    torch.manual_seed(0)
    return DirectFeedback(ConvNet(), ConvNet.points, rule, torch.zeros(1, 3, 32, 32), **options)


def test_angle_is_zero_for_bp():
    net = make("BP")
    net.model.fc1.add_module("dropout", nn.Dropout())
    result = alignment(net, *probe())
    assert list(result) == ["conv1", "conv2", "fc1", *(name for name, _ in net.model.named_parameters())]
    for point in net.points:
        assert result[point]["alignment_deg"] < 1e-3
        assert math.isnan(result[point]["logit_cosine"])
    for name, _ in net.model.named_parameters():
        assert result[name]["parameter_deg"] < 1e-3


@pytest.mark.parametrize("rule", ["FA", "KP", "DFA", "DKP"])
def test_angle_is_about_90_for_a_fresh_random_b(rule):
    net = make(rule)
    result = alignment(net, *probe(64))
    for point in net.points:
        assert abs(result[point]["alignment_deg"] - 90) < 10
        assert math.isnan(result[point]["logit_cosine"]) == (rule in ("FA", "KP"))
    for name in ("conv1.conv.weight", "conv2.conv.weight", "fc1.linear.weight"):
        assert abs(result[name]["parameter_deg"] - 90) < 30  # one angle, of one batch
    assert result["fc2.weight"]["parameter_deg"] < 1e-3  # the output layer needs no B


@pytest.mark.parametrize("rule", ["FA", "KP"])
def test_angle_is_zero_where_the_layers_b_is_their_weight(rule):
    net = make(rule)
    feed_back_the_weights(net)
    for values in alignment(net, *probe()).values():
        assert values.get("alignment_deg", 0) < 0.05


@pytest.mark.parametrize("rule", ["BP", "FA", "KP", "DFA", "DRTP"])
def test_angles_are_those_at_the_point_where_what_follows_changes_its_output_in_place(rule):
    results = []
    for inplace in (False, True):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
        model = nn.Sequential(block, nn.ReLU(inplace), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        x, y = torch.randn(9, 6, dtype=torch.float64), torch.arange(9) % 3
        results.append(alignment(DirectFeedback(model, ("0",), rule, x), x, y))
    for name, values in results[0].items():
        for key, value in values.items():
            assert results[1][name][key] == pytest.approx(value, nan_ok=True), (name, key)


@pytest.mark.parametrize("rule", ["FA", "KP", "DFA", "DKP"])
def test_angles_are_between_the_gradients_that_training_gets(rule):
    net = make(rule)
    x, y = probe(8)
    result = alignment(net, x, y)
    bare = copy.deepcopy(net).unwrap()
    signals = []
    for model in (net, bare):
        kept = {}
        for point in net.points:
            block = (net.model if model is net else bare).get_submodule(point)
            keep = functools.partial(kept.__setitem__, point)
            block.register_forward_hook(lambda m, i, h, keep=keep: h.register_hook(keep) and None, prepend=True)
        F.cross_entropy(model(x), y).backward()
        signals.append(kept)
    for point in net.points:
        cosines = F.cosine_similarity(*(kept[point].flatten(1).double() for kept in signals))
        assert result[point]["alignment_deg"] == pytest.approx(cosines.acos().rad2deg().mean().item(), abs=1e-3)
    for name, parameter in bare.named_parameters():
        if "conv.bias" not in name:
            got = net.model.get_parameter(name).grad
            cosine = F.cosine_similarity(got.flatten().double(), parameter.grad.flatten().double(), dim=0)
            expected = cosine.clamp(max=1).acos().rad2deg().item()
            assert result[name]["parameter_deg"] == pytest.approx(expected, abs=0.05), name


def test_angle_is_zero_where_feedback_is_the_forward_path():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))
    x, y = torch.randn(8, 6), torch.arange(8) % 3
    net = DirectFeedback(model, ("0", "1"), "DFA", x)
    net.matrices()[0].copy_((model[2].weight @ model[1].weight).detach())
    net.matrices()[1].copy_(model[2].weight.detach())
    result = alignment(net, x, y)
    assert all(result[point]["alignment_deg"] < 1e-2 for point in net.points)
    assert all(result[name]["parameter_deg"] < 1e-2 for name, _ in model.named_parameters())
    net.matrices()[1].neg_()
    assert alignment(net, x, y)["1"]["alignment_deg"] == pytest.approx(180, abs=1e-2)


def test_angle_and_cosine_equal_a_sample_by_sample_computation():
    net = make("DKP")
    x, y = probe(4)
    result = alignment(net, x, y)
    model = copy.deepcopy(net).unwrap()
    kept = {}
    for point in net.points:
        model.get_submodule(point).register_forward_hook(lambda m, i, h, point=point: kept.__setitem__(point, h))
    logits = model(x)
    for point, B in zip(net.points, net.matrices(), strict=True):
        h = kept[point]
        error, bp = torch.autograd.grad(F.cross_entropy(logits, y), [logits, h], retain_graph=True)
        angles, cosines = [], []
        for n in range(4):
            rule = sum(error[n, k] * B[k] for k in range(10)).flatten().double()
            cosine = (rule @ bp[n].flatten().double() / rule.norm() / bp[n].double().norm()).item()
            angles.append(math.degrees(math.acos(cosine)))
            readout = torch.stack([(h[n] * B[k]).sum() for k in range(10)])
            cosines.append(F.cosine_similarity(readout, logits[n], dim=0).item())
        assert result[point]["alignment_deg"] == pytest.approx(sum(angles) / 4, abs=1e-3)
        assert result[point]["logit_cosine"] == pytest.approx(sum(cosines) / 4, abs=1e-5)


def test_a_point_with_nothing_to_train_below_has_no_angle():
    net = make("DKP")
    net.model.conv1.requires_grad_(False)
    result = alignment(net, *probe(4))
    assert math.isnan(result["conv1"]["alignment_deg"]) and result["conv2"]["alignment_deg"] > 0
    assert "conv1.conv.weight" not in result and result["conv2.conv.weight"]["parameter_deg"] > 0


@pytest.mark.parametrize("update", [{}, {"update": "inplace", "feedback_lr": 0.5}])
def test_measuring_leaves_no_trace(update):
    net = make("DKP", **update)
    net.model.fc1.add_module("dropout", nn.Dropout())
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    alignment(net, *probe())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert net.training


@each("BP", "FA", "KP", "DFA", "DKP-optimizer", "DKP-inplace")
def test_every_rule_learns_and_dkp_aligns(rule, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
    x = torch.randn(256, 8)
    y = (2 * (x[:, 0] * x[:, 1] > 0) + (x[:, 2] > 0)).long()
    net = DirectFeedback(model, ("1", "3"), rule, x[:1], **options)
    learned = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learned, 0.1, momentum=0.9, weight_decay=1e-3)
    losses, angles = [], []
    for step in range(201):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step in (0, 200):
            result = alignment(net, x, y)
            angles.append({point: result[point]["alignment_deg"] for point in net.points})
    assert losses[-1] < (0.5 if rule == "FA" else 0.3) * losses[0]
    if rule in ("KP", "DKP"):
        assert all(angles[1][point] < angles[0][point] - 15 for point in net.points), angles
