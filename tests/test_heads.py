"""HEAD and LOCAL: each block's signal through a head of its own, against blocks and heads run one by one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from feedback import DirectFeedback, alignment, direct_feedback
from feedback.heads import AverageTo, default_head

both = pytest.mark.parametrize("rule", ["HEAD", "LOCAL"])
POINTS = ["0", "1", "2"]


def data(images=5):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, 2, 9, 9, generator=generator, dtype=torch.float64), torch.arange(images) % 3


def blocks():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 5, 3), nn.Tanh()),
        nn.Sequential(nn.Flatten(), nn.Linear(125, 6), nn.Tanh()),
        nn.Linear(6, 3),
    ).double()


def wrap(rule, **options):
    model = blocks()
    torch.manual_seed(1)
    return DirectFeedback(model, POINTS, rule, data()[0][:2], **options)


def reference(net, x, y, loss_fn=F.cross_entropy):
    """Gradients of the model's parameters and of the heads', each block and head run by itself."""
    model, flow = copy.deepcopy(net.model), x
    logits = model(x).detach().requires_grad_()
    (error,) = torch.autograd.grad(loss_fn(logits, y), logits)
    of_model, of_heads = [], []
    for block, head in zip(model[:-1], net.feedback.children(), strict=True):
        head = copy.deepcopy(head)
        h = block(flow)
        leaf = h.detach().requires_grad_()
        z = head(leaf)
        own = torch.autograd.grad(loss_fn(z, y), z, retain_graph=True)[0]
        (signal,) = torch.autograd.grad(z, leaf, error if net.rule == "HEAD" else own, retain_graph=True)
        of_heads += torch.autograd.grad(z, [*head.parameters()], own)
        of_model += torch.autograd.grad(h, [*block.parameters()], signal)
        flow = h.detach()
    return [*of_model, *torch.autograd.grad(loss_fn(model[-1](flow), y), [*model[-1].parameters()])], of_heads


def assert_gradients(net, of_model, of_heads):
    for parameters, expected in ((net.model.parameters(), of_model), (net.feedback.parameters(), of_heads)):
        for parameter, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)


@both
def test_gradients_equal_those_of_blocks_and_heads_run_by_themselves(rule):
    net, (x, y) = wrap(rule), data()
    expected = reference(net, x, y)
    F.cross_entropy(net(x, target=y), y).backward()
    assert_gradients(net, *expected)


@both
def test_the_heads_of_another_loss(rule):
    net, (x, _) = wrap(rule, loss=F.mse_loss), data()
    target = torch.randn(5, 3, dtype=torch.float64)
    expected = reference(net, x, target, F.mse_loss)
    (F.mse_loss(net(x, target=target), target) / 4).backward()
    assert_gradients(net, *([gradient / 4 for gradient in gradients] for gradients in expected))


def linear_head(h, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(h[0].numel(), classes, bias=False))


def test_a_linear_head_is_las():
    head, las = wrap("HEAD", head=linear_head), wrap("LAS")
    for made, B in zip(head.feedback.children(), las.matrices(), strict=True):
        B.data.copy_(made[1].weight.data.view_as(B))
    x, y = data()
    for net in (head, las):
        F.cross_entropy(net(x, target=y), y).backward()
    for one, other in zip(head.parameters(), las.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad.view_as(one.grad))


def test_the_heads_by_default():
    with torch.random.fork_rng():
        conv, linear = default_head(torch.zeros(2, 4, 30, 5), 10), default_head(torch.zeros(2, 20), 10)
        zero = default_head(torch.zeros(2, 4, 9, 9), 10, scale=0)
    assert conv[0].output_size == (7, 5) and conv[1].weight.shape == (128, 4, 7, 5)
    assert conv[-1].weight.shape == (10, 128) and linear.weight.shape == (10, 20)
    assert not zero(torch.randn(2, 4, 9, 9)).any() and zero[1].weight.any()
    with pytest.raises(ValueError, match=r"\(2, 3, 4\), expected \(N, D\) or \(N, C, H, W\): give a head"):
        default_head(torch.zeros(2, 3, 4), 10)


@pytest.mark.parametrize("height", [30, 28, 8, 3])
def test_a_feature_map_is_averaged_over_windows_that_do_not_overlap_where_they_fit(height):
    x = torch.randn(2, 3, height, 4, dtype=torch.float64)
    got = AverageTo((4, 2))(x)
    exact = F.adaptive_avg_pool2d(x, (4, 2))
    if height == 30:
        rows = [x[:, :, i : i + 8].mean(2) for i in (0, 8, 16, 24)]
        exact = torch.stack(rows, 2).unflatten(3, (2, 2)).mean(4)
    torch.testing.assert_close(got, exact)


@both
def test_heads_of_nets_whose_logits_have_positions(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 5), nn.Sequential(nn.Linear(5, 6), nn.Tanh()), nn.Linear(6, 3)).double()
    x, y = torch.arange(12).view(2, 6) % 9, torch.arange(12).view(2, 6) % 3
    net = DirectFeedback(model, ["0", "1"], rule, x, head=lambda h, classes: nn.Linear(h.shape[-1], classes))
    logits = net(x, target=y)
    F.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
    h = model[0].weight[x].detach().requires_grad_()
    z = nn.functional.linear(h, *net.feedback.get_submodule("0").parameters())
    error = (logits.detach().softmax(-1) - F.one_hot(y, 3)) / 12 if rule == "HEAD" else None
    own = torch.autograd.grad(F.cross_entropy(z.flatten(0, 1), y.flatten()), z, retain_graph=True)[0]
    (signal,) = torch.autograd.grad(z, h, own if error is None else error)
    expected = torch.zeros_like(model[0].weight).index_add(0, x.flatten(), signal.flatten(0, 1))
    torch.testing.assert_close(model[0].weight.grad, expected)


@both
def test_angles(rule):
    net, (x, y) = wrap(rule), data()
    angles = alignment(net, x, y)
    F.cross_entropy(net(x, target=y), y).backward()
    bare = blocks()
    F.cross_entropy(bare(x), y).backward()
    for name, parameter in bare.named_parameters():
        got = net.model.get_parameter(name).grad.flatten()
        expected = F.cosine_similarity(got, parameter.grad.flatten(), dim=0).clamp(-1, 1).acos().rad2deg()
        if name != "0.0.bias":
            assert angles[name]["parameter_deg"] == pytest.approx(expected.item(), abs=0.05)
    assert all(0 < angles[point]["alignment_deg"] < 180 for point in POINTS)


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("DKP", {"head": linear_head}, r"head goes with \['HEAD', 'LOCAL'\], got rule 'DKP'"),
        ("HEAD", {"update": "inplace", "feedback_lr": 0.1}, r"needs a rule of \['DKP', 'LAS'\], got 'HEAD'"),
        ("LOCAL", {"positions": "pooled"}, "no positions, feature_dim or init"),
        ("HEAD", {"init": nn.init.zeros_}, "no positions, feature_dim or init"),
        ("HEAD", {"feature_dim": 1}, "no positions, feature_dim or init"),
    ],
)
def test_what_heads_have_not_is_refused(rule, options, message):
    with pytest.raises(ValueError, match=message):
        wrap(rule, **options)


def gradients_of_blocks(net):
    return [parameter.grad for name, parameter in net.model.named_parameters() if not name.startswith("3.")]


@both
def test_only_by_the_networks_error_does_a_block_hear_of_the_blocks_above(rule):
    grads = []
    for factor in (1, 2):
        net, (x, y) = wrap(rule), data()
        with torch.no_grad():
            net.model[3].weight.mul_(factor)
        F.cross_entropy(net(x, target=y), y).backward()
        grads.append(gradients_of_blocks(net))
    same = [torch.equal(one, other) for one, other in zip(*grads, strict=True)]
    assert all(same) if rule == "LOCAL" else not any(same)


@both
def test_the_default_heads_compile_without_a_graph_break(rule):
    torch._dynamo.reset()
    net, (x, y) = wrap(rule), data()
    twin = copy.deepcopy(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for module in (compiled, twin):
        F.cross_entropy(module(x, target=y), y).backward()
    for got, expected in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad)


@both
def test_the_default_heads_in_channels_last(rule):
    nets, (x, y) = [wrap(rule)], data()
    model = blocks().to(memory_format=torch.channels_last)
    torch.manual_seed(1)
    nets.append(DirectFeedback(model, POINTS, rule, x.to(memory_format=torch.channels_last)))
    assert nets[1].feedback.get_submodule("0")[1].weight.is_contiguous(memory_format=torch.channels_last)
    for net, layout in zip(nets, (torch.contiguous_format, torch.channels_last), strict=True):
        F.cross_entropy(net(x.to(memory_format=layout), target=y), y).backward()
    for one, other in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@both
def test_the_default_heads_in_bfloat16_err_as_plain_autograd_does(rule):
    net, (x, y) = wrap(rule), data(16)
    exact = [gradient for gradients in reference(net, x, y) for gradient in gradients]
    net, x = net.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        plain = [gradient for gradients in reference(net, x, y) for gradient in gradients]
        loss = F.cross_entropy(net(x, target=y), y)
    loss.backward()
    got = [parameter.grad for parameter in (*net.model.parameters(), *net.feedback.parameters())]
    exact, plain, got = (torch.cat([g.flatten().double() for g in gradients]) for gradients in (exact, plain, got))
    assert (got - exact).norm() <= 2 * (plain - exact).norm()
    assert (plain - exact).norm() < 0.2 * exact.norm()


def test_no_statistics_are_tracked_in_the_default_heads():
    net, (x, y) = wrap("HEAD"), data()
    before = copy.deepcopy(net.feedback.state_dict())
    net(x, target=y)
    assert before and all(torch.equal(before[key], value) for key, value in net.feedback.state_dict().items())


def pooled(h, classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


@both
def test_a_head_that_returns_other_than_logits_is_refused(rule):
    model, (x, y) = nn.Sequential(*blocks()[:2], nn.Flatten(), nn.Linear(125, 3)).double(), data()
    net = DirectFeedback(model, ["0", "1"], rule, x, head=pooled)
    with pytest.raises(ValueError, match=r"a head returns \(5, 4\), expected \(5, 3\): classes last"):
        net(x, target=y)


@both
def test_logits_with_positions_need_a_head_of_ones_own(rule):
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Conv2d(4, 3, 1))
    with pytest.raises(ValueError, match=r"\(2, 3, 6, 6\) have positions, expected \(N, K\) for rule .*own"):
        DirectFeedback(model, ["0"], rule, torch.zeros(2, 3, 8, 8), class_dim=1)


class Scaled(nn.Sequential):
    def __init__(self, inner):
        super().__init__(nn.Tanh(), inner)

    def forward(self, x):
        return 10 * super().forward(x)


def twice(features, classes):
    layer = nn.Linear(features, features)
    return nn.Sequential(nn.Flatten(), layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(features, classes))


def tied(features, classes):
    made = twice(features, classes)
    made[3] = nn.Linear(features, features)
    made[3].weight = made[1].weight
    return made


def hooked(features, classes):
    made = nn.Sequential(nn.Flatten(), nn.Linear(features, classes))
    made.register_forward_hook(lambda module, inputs, z: 3 * z)
    return made


HEADS = {
    "a module used twice": twice,
    "tied weights": tied,
    "a Sequential with a forward of its own": lambda features, classes: nn.Sequential(
        nn.Flatten(), Scaled(nn.Linear(features, classes))
    ),
    "the same, as the head": lambda features, classes: Scaled(
        nn.Sequential(nn.Flatten(), nn.Linear(features, classes))
    ),
    "a hook on the head": hooked,
    "statistics": lambda features, classes: nn.Sequential(
        nn.Flatten(), nn.BatchNorm1d(features), nn.Linear(features, classes)
    ),
}


@both
@pytest.mark.parametrize("make_head", HEADS.values(), ids=HEADS)
def test_any_head(rule, make_head):
    net, (x, y) = wrap(rule, head=lambda h, classes: make_head(h[0].numel(), classes)), data()
    expected = reference(net, x, y)
    for _ in range(2):
        net.zero_grad()
        F.cross_entropy(net(x, target=y), y).backward()
        assert all(isinstance(parameter, nn.Parameter) for parameter in net.feedback.parameters())
        assert_gradients(net, *expected)
    for buffer in net.feedback.buffers():
        if not buffer.is_floating_point():
            assert buffer == 2  # batches tracked


def test_measuring_angles_leaves_the_heads_as_they_were():
    def head(h, classes):
        return HEADS["statistics"](h[0].numel(), classes)

    net, (x, y) = wrap("HEAD", head=head), data()
    before = copy.deepcopy(net.state_dict())
    alignment(net, x, y)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_heads_without_the_wrapper_are_refused():
    h, B, y = torch.randn(5, 4, requires_grad=True), torch.randn(3, 4), torch.arange(5) % 3
    for rule in ("HEAD", "LOCAL"):
        with pytest.raises(ValueError, match=f"rule is '{rule}', expected one of"):
            direct_feedback(torch.randn(5, 3, requires_grad=True), [h], [B], rule=rule, target=y)


def test_a_head_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="head makes a function, expected a Module for point '0'"):
        wrap("HEAD", head=lambda h, classes: lambda h: h)


@both
def test_a_head_with_positions_under_logits_without_is_refused(rule):
    net, (x, y) = wrap(rule, head=lambda h, classes: nn.Linear(h.shape[-1], classes)), data()
    with pytest.raises(ValueError, match=r"a head returns \(5, 4, 7, 3\), expected \(5, 3\): classes last"):
        net(x, target=y)
