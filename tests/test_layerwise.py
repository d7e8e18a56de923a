"""FA and KP: B in the place of W^T, layer by layer, for every shape of layer, and Kolen-Pollack's exact rate."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from reference import layerwise_gradients
from torch import nn
from variants import assert_equals_bp_where_b_is_the_weight, feed_back_the_weights

from feedback import DirectFeedback
from feedback.layerwise import layer_feedback
from models import AlexNet, ConvNet

both = pytest.mark.parametrize("rule", ["FA", "KP"])
SHAPES = {
    "plain": {},
    "stride": {"stride": (2, 3)},
    "padding": {"padding": (2, 1)},
    "dilation": {"dilation": (1, 2)},
    "groups": {"groups": 2},
    "all": {"stride": 2, "padding": 1, "dilation": 2, "groups": 2},
    "same": {"padding": "same", "dilation": (2, 1)},
    "valid": {"padding": "valid"},
    "no padding, so no matter which": {"padding_mode": "reflect"},
    "no bias": {"bias": False},
}


def conv_net(**shape):
    """Two convolutions, the second of the shape that is tested, and two linear layers, on 11x11 images."""
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 4, 3, bias=False), nn.Tanh(), nn.Conv2d(4, 6, 3, **shape), nn.Tanh(), nn.Flatten()]
    features = nn.Sequential(*convolutions)(torch.zeros(1, 3, 11, 11)).shape[1]
    return nn.Sequential(*convolutions, nn.Linear(features, 5), nn.Tanh(), nn.Linear(5, 3)).double()


POINTS = ("1", "3", "6")


def data(batch=7):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, 11, 11, generator=generator).double(), torch.arange(batch) % 3


def wrap(rule, model=None, **options):
    return DirectFeedback(conv_net() if model is None else model, POINTS, rule, data()[0][:1], **options)


def matrices(net):
    """B of every layer that has one, by the layer's name."""
    return {name: B for name, B in net.feedback.state_dict(keep_vars=True).items()}


@both
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_equal_those_worked_out_by_hand(rule, shape):
    net = wrap(rule, conv_net(**shape))
    x, y = data()
    F.cross_entropy(net(x), y).backward()
    assert list(matrices(net)) == ["2", "5", "7"]
    layers = {name: net.model.get_submodule(name) for name in ("0", "2", "5", "7")}
    expected = layerwise_gradients(layers, matrices(net), x, y)
    for name, parameter in net.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])
    for name, B in matrices(net).items():
        assert B.requires_grad == (rule == "KP")
        if rule == "KP":
            torch.testing.assert_close(B.grad, expected[f"{name}.weight"])
            assert B.grad.data_ptr() != net.model.get_submodule(name).weight.grad.data_ptr()


@both
@pytest.mark.parametrize(
    "make", [ConvNet, pytest.param(lambda: AlexNet(10), marks=pytest.mark.slow)], ids=["ConvNet", "AlexNet"]
)
def test_equals_bp_where_b_is_the_weight(rule, make):
    torch.manual_seed(0)
    model = make().double()
    size = 32 if isinstance(model, ConvNet) else 63
    x, y = torch.randn(2, 3, size, size, dtype=torch.float64), torch.tensor([3, 1])
    net = assert_equals_bp_where_b_is_the_weight(model, model.points, rule, x, y)
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert list(matrices(net)) == [name.replace(".", "_") for name in layers[1:]]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kolen_pollack_gap_shrinks_by_one_minus_lr_times_decay_in_every_layer(shape):
    lr, decay = 0.2, 0.3
    net = wrap("KP", conv_net(**shape))
    x, y = data()
    optimizer = torch.optim.SGD(net.parameters(), lr, weight_decay=decay)
    gaps = {name: (net.model.get_submodule(name).weight - B).detach() for name, B in matrices(net).items()}
    assert len(gaps) == 3 and all(gap.norm() > 0.1 for gap in gaps.values())
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        for name, B in matrices(net).items():
            gaps[name] *= 1 - lr * decay
            torch.testing.assert_close((net.model.get_submodule(name).weight - B).detach(), gaps[name])


@both
def test_bfloat16_autocast_is_as_exact_as_bp(rule):
    torch.manual_seed(0)
    exact = conv_net(padding=1)
    x, y = data(16)
    plain = copy.deepcopy(exact).float()
    net = wrap(rule, copy.deepcopy(exact)).float()
    feed_back_the_weights(net)
    F.cross_entropy(exact(x), y).backward()
    for module in (plain, net):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(module(x.float()), y)
        loss.backward()
    for (name, parameter), bp in zip(exact.named_parameters(), plain.parameters(), strict=True):
        got = net.model.get_parameter(name).grad
        allowed = 2 * (bp.grad.double() - parameter.grad).norm() + 1e-3 * parameter.grad.abs().max()
        assert got.dtype == torch.float32 and (got.double() - parameter.grad).norm() <= allowed, name
    for name, B in matrices(net).items():
        assert rule == "FA" or torch.equal(B.grad, net.model.get_submodule(name).weight.grad)


def test_compiled_kolen_pollack_accumulates_apart():
    torch._dynamo.reset()
    net, (x, y) = wrap("KP"), data()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        F.cross_entropy(compiled(x), y).backward()
    twice = {name: B.grad.clone() for name, B in matrices(net).items()}
    net.zero_grad()
    F.cross_entropy(net(x), y).backward()
    for name, B in matrices(net).items():
        torch.testing.assert_close(twice[name], 2 * B.grad)


def test_b_is_drawn_as_the_weight_is():
    torch.manual_seed(0)
    net = DirectFeedback(ConvNet(), ConvNet.points, "FA", torch.zeros(1, 3, 32, 32))
    for B, weight in zip(matrices(net).values(), list(net.model.parameters())[4::4], strict=False):
        assert B.shape == weight.shape and B.abs().max() == pytest.approx(weight.abs().max().item(), rel=0.02)
        assert B.std().item() == pytest.approx(weight.std().item(), rel=0.02)


@both
def test_linear_layers_take_inputs_of_any_dimensions(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = torch.randn(3, 2, 4, dtype=torch.float64), torch.arange(3)
    assert_equals_bp_where_b_is_the_weight(model, ("1",), rule, x, y)


@both
def test_what_follows_may_change_a_layers_output_in_place_and_a_point_may_be_a_layer(rule):
    torch.manual_seed(0)
    grads = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6), nn.ReLU(inplace), nn.Linear(6, 3))
        net = DirectFeedback(model, ("0", "2", "1"), rule, torch.zeros(2, 4))
        F.cross_entropy(net(torch.linspace(-1, 1, 8).view(2, 4)), torch.arange(2)).backward()
        grads.append([parameter.grad for parameter in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@both
def test_a_layer_called_twice_uses_its_b_twice(rule):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.again(self.again(input=self.first(x)).tanh()))

    torch.manual_seed(0)
    model, x = Twice().double(), torch.randn(5, 4, dtype=torch.float64)
    assert_equals_bp_where_b_is_the_weight(model, ("first",), rule, x, torch.arange(5) % 3)


def test_a_frozen_layer_and_its_b_stay():
    net = wrap("KP")
    net.model[2].requires_grad_(False)
    x, y = data()
    F.cross_entropy(net(x), y).backward()
    assert net.model[2].weight.grad is None and matrices(net)["2"].grad is None
    assert net.model[0].weight.grad is not None and matrices(net)["5"].grad is not None


def test_a_frozen_first_block_needs_no_b_until_it_thaws():
    model = conv_net()
    model[0].requires_grad_(False)
    net = wrap("FA", model)
    assert list(matrices(net)) == ["5", "7"]
    model[0].requires_grad_(True)
    with pytest.raises(ValueError, match="input of layer '2' needs a gradient, expected none as at construction"):
        net(data()[0])


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(x)))


class Bare(Shared):
    def __init__(self):
        super().__init__()
        self.second = nn.Linear(4, 4)
        self.matrix = nn.Parameter(torch.eye(4))

    def forward(self, x):
        return self.head(F.linear(self.first(x), self.second.weight) @ self.matrix)


class Unreached(Shared):
    def __init__(self):
        super().__init__()
        self.second = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(F.linear(self.first(x), self.second.weight))


class MyLinear(nn.Linear):
    pass


@both
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.RNNCell(4, 3)), "'2' is a RNNCell with weights"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (1, 2, 2)), nn.ConvTranspose2d(1, 1, 2), nn.Flatten()),
         "'2' is a ConvTranspose2d"),
        (lambda: nn.Sequential(nn.Linear(4, 4), MyLinear(4, 3)), "'1' is a MyLinear"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))), "'1.param"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.orthogonal(nn.Linear(4, 3))), "'1.param"),
        (Bare, "'' is a Bare with weights"),
        (Unreached, "'second' was never reached"),
        (Shared, "'second' shares its weight with 'first'"),
        (lambda: nn.Sequential(nn.Tanh(), nn.Linear(4, 3)), "no layer needs feedback"),
        (lambda: nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 1, 1),
                               nn.Conv2d(1, 3, 3, padding=1, padding_mode="circular"), nn.Flatten()), "'circular'"),
        (lambda: nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 1, 1),
                               nn.Conv2d(1, 3, 2, padding="same", dilation=(1, 2)), nn.Flatten()), "pads one side"),
        (lambda: nn.Sequential(OrderedDict(first=nn.Linear(4, 4), a=nn.Sequential(nn.Linear(4, 4)),
                                           a_0=nn.Linear(4, 3))), "'a_0' has the name of another"),
    ],
)  # fmt: skip
def test_what_has_no_feedback_is_refused_and_left_without_hooks(rule, model, message):
    model = model()
    point = next(name for name, _ in model.named_modules() if name)
    with pytest.raises(ValueError, match=message):
        DirectFeedback(model, (point,), rule, torch.zeros(2, 4))
    assert not any(module._forward_hooks for module in model.modules())


def test_modules_without_a_matrix_that_is_transported_stay_exact():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(9, 4), nn.Linear(4, 4), nn.LayerNorm((2, 4)), nn.PReLU(), nn.Flatten(), nn.Linear(8, 3)
    )
    x = torch.tensor([[1, 2], [8, 0]])
    net = assert_equals_bp_where_b_is_the_weight(model, ("1",), "FA", x, torch.arange(2))
    assert list(matrices(net)) == ["1", "5"]


def test_a_matrix_of_another_shape_is_refused():
    layer, x = nn.Linear(4, 3), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"shape \(4, 3\), expected \(3, 4\)"):
        layer_feedback(layer, x, layer(x), torch.zeros(4, 3))
