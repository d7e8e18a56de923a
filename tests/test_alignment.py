"""The alignment angle: what it is for BP, for a fresh B, and that measuring it leaves no trace."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from feedback import DirectFeedback, alignment
from models import ConvNet


def probe(batch=16):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, 3, 32, 32, generator=generator), torch.randint(10, (batch,), generator=generator)


def make(rule, **options):
    torch.manual_seed(0)
    return DirectFeedback(ConvNet(), ConvNet.points, rule, torch.zeros(1, 3, 32, 32), **options)


def test_angle_is_zero_for_bp():
    result = alignment(make("BP"), *probe())
    assert list(result) == ["conv1", "conv2", "fc1"]
    for values in result.values():
        assert values["alignment_deg"] < 1e-3
        assert math.isnan(values["logit_cosine"])


def test_angle_is_about_90_for_a_fresh_random_b():
    for values in alignment(make("DFA"), *probe(64)).values():
        assert abs(values["alignment_deg"] - 90) < 10
        assert abs(values["logit_cosine"]) < 0.9


def test_angle_is_zero_where_feedback_is_the_forward_path():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))
    x, y = torch.randn(8, 6), torch.arange(8) % 3
    net = DirectFeedback(model, ("0", "1"), "DFA", x)
    net.matrices()[0].copy_((model[2].weight @ model[1].weight).detach())
    net.matrices()[1].copy_(model[2].weight.detach())
    assert all(values["alignment_deg"] < 1e-2 for values in alignment(net, x, y).values())
    net.matrices()[1].neg_()
    assert alignment(net, x, y)["1"]["alignment_deg"] == pytest.approx(180, abs=1e-2)


def test_angle_and_cosine_equal_a_sample_by_sample_computation():
    net = make("DKP")
    x, y = probe(4)
    result = alignment(net, x, y)
    model = copy.deepcopy(net.model)
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


@pytest.mark.parametrize(
    ("rule", "options"),
    [("BP", {}), ("FA", {}), ("KP", {}), ("DFA", {}), ("DKP", {}), ("DKP", {"update": "inplace", "feedback_lr": 0.1})],
)
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
            angles.append({point: values["alignment_deg"] for point, values in alignment(net, x, y).items()})
    assert losses[-1] < (0.5 if rule == "FA" else 0.3) * losses[0]
    if rule == "DKP":
        assert all(angles[1][point] < angles[0][point] - 15 for point in net.points), angles
