"""Points that a path leads around are refused: below them a direct rule would be backpropagation in part."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from feedback import RULES, DirectFeedback

DIRECT = [rule for rule in RULES if not RULES[rule].chained]
X, Y = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


class Around(nn.Module):
    """`z + f(z)`."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.f = nn.Sequential(nn.Linear(5, 5), nn.Tanh())
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        z = self.stem(x)
        return self.head(z + self.f(z))


class Beside(Around):
    """`z + f(z)`, and a row that is the same for the whole batch, as of a table of positions."""

    def __init__(self):
        super().__init__()
        self.row = nn.Linear(4, 5)

    def forward(self, x):
        z = self.stem(x)
        return self.head(z + self.f(z) + self.row(torch.ones_like(x[:1])))


class Residual(nn.Module):
    """Two residual blocks, each with a point within it and one at its end."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.layers = nn.ModuleList(Around() for _ in range(2))
        for layer in self.layers:
            layer.stem, layer.head = nn.Linear(5, 5), nn.Tanh()
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        h = self.stem(x)
        for layer in self.layers:
            h = layer(h)
        return self.fc(h)


class Captured(nn.Sequential):
    """A feature that a hook of the model's own takes from a block, used again at the end."""

    def __init__(self):
        super().__init__(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
        self[1].register_forward_hook(lambda module, inputs, out: setattr(self, "feature", out))

    def forward(self, x):
        h = self[3](self[2](self[1](self[0](x))))
        return self[4](h + self.feature)


class Tied(nn.Module):
    """One weight below the point and above it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(self.b(self.a(x).tanh()))


def wrap(model, points, rule="DFA", **options):
    torch.manual_seed(0)
    return DirectFeedback(model.double(), points, rule, X[:2], **options)


@pytest.mark.parametrize("rule", DIRECT)
@pytest.mark.parametrize(
    ("make", "points", "leak", "instead"),
    [
        (Around, ["f"], "'stem.0.weight', 'stem.0.bias' would learn from 'f'", "'stem'"),
        (Beside, ["f"], "'stem.0.weight', 'stem.0.bias' would learn from 'f'", "'stem', 'stem.0':"),
        (Residual, ["stem", "layers.0.f"], "'layers.0.stem.weight', ", "'stem', 'stem.0', 'layers.0', 'layers.1', "),
        (
            Residual,
            ["layers.0", "layers.1.f"],
            "from 'the logits' as well",
            "'stem', 'stem.0', 'layers.0', 'layers.1', ",
        ),
        (Captured, ["3"], "'0.weight', '0.bias' would learn from '3'", "'0':"),
        (Captured, ["1"], "'0.weight', '0.bias' would learn from '1'", "'0':"),
        (Tied, ["a"], "'a.weight' would learn from 'a'", "'b':"),
    ],
)
def test_a_path_around_a_point_is_refused_with_what_would_do(rule, make, points, leak, instead):
    with pytest.raises(ValueError, match="a path leads around a feedback point, or a weight is shared") as refusal:
        wrap(make(), points, rule)
    message = str(refusal.value)
    assert leak in message and f"No path leads around {instead}" in message and "allow_skips=True" in message


def test_a_refusal_says_where_no_point_would_do():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match="No module would do instead: untie what is shared, or allow_skips=True"):
        wrap(model, ["1"])


def test_the_bare_model_is_left_without_hooks_and_as_it_was():
    model = Around().double().train()
    with pytest.raises(ValueError, match="a path leads around"):
        wrap(model, ["f"])
    assert model.training and not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("rule", DIRECT)
@pytest.mark.parametrize(
    ("make", "points"), [(Around, ["stem"]), (Residual, ["stem", "layers.0", "layers.1"]), (Captured, ["0"])]
)
def test_points_that_all_passes_through_are_taken_and_without_b_nothing_is_learned_below(rule, make, points):
    net = wrap(make(), points, rule)
    for B in net.matrices():
        B.data.zero_()
    F.cross_entropy(net(X, target=Y), Y).backward()
    below = {name for name, _ in net.model.get_submodule(points[-1]).named_parameters(prefix=points[-1])}
    assert below
    for name, parameter in net.model.named_parameters():
        if name in below:
            assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize("rule", DIRECT)
def test_who_wants_skips_may_have_them(rule):
    net = wrap(Around(), ["f"], rule, allow_skips=True)
    assert "allow_skips=True" in repr(net) and "allow_skips" not in repr(wrap(Around(), ["stem"], rule))
    F.cross_entropy(net(X, target=Y), Y).backward()
    assert net.model.stem[0].weight.grad.any()


@pytest.mark.parametrize("rule", [rule for rule in RULES if RULES[rule].chained])
def test_rules_that_go_block_by_block_take_any_points(rule):
    wrap(Around(), ["f"], rule)


@pytest.mark.parametrize("rule", DIRECT)
def test_a_model_in_training_mode_under_a_wrapper_in_eval_mode_is_refused(rule):
    net = wrap(Around(), ["stem"], rule)
    net.eval()
    net.model.train()
    with pytest.raises(ValueError, match="the wrapper is in eval mode and its model in training mode"):
        net(X, target=Y)
    with torch.no_grad():
        net(X, target=Y)
    net.train()
    net.model.eval()  # batch norms that are to stay as they are
    F.cross_entropy(net(X, target=Y), Y).backward()
    assert net.model.head.weight.grad.any()


@pytest.mark.parametrize("rule", DIRECT)
@pytest.mark.parametrize("points", [("0", "1"), ("0", "0.1")], ids=["an Identity", "a block and its last module"])
def test_a_point_from_which_nothing_would_learn_is_refused(rule, points):
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Identity(), nn.Linear(5, 3))
    with pytest.raises(ValueError, match=r"nothing learns from feedback point '\d'"):
        wrap(model, points, rule)
    model[2].bias.requires_grad_(False)  # where parameters are frozen, such a point may be meant
    wrap(model, points, rule)


def test_a_second_input_is_not_taken_for_the_target():
    with pytest.raises(ValueError, match="LAS reads the labels"):
        wrap(Around(), ["stem"], "LAS")(X, Y)
    with pytest.raises(TypeError, match="takes 2 positional arguments"):
        wrap(Around(), ["stem"], "DFA")(X, Y)


@pytest.mark.parametrize("rule", DIRECT)
def test_compiled_blocks_and_models_are_looked_at_as_if_they_were_not(rule):
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Sequential(nn.Linear(5, 5), nn.Tanh()), nn.Linear(5, 3)
    )
    compiled = torch.compile(model, backend="aot_eager")
    DirectFeedback(compiled.double(), ["_orig_mod.0", "_orig_mod.1"], rule, X[:2])
    with pytest.raises(ValueError, match="a path leads around"):
        DirectFeedback(torch.compile(Around().double(), backend="aot_eager"), ["_orig_mod.f"], rule, X[:2])
