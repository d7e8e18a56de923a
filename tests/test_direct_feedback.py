"""The method: gradients, unlocking, Kolen-Pollack, and every way a network may be used."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from reference import convnet_gradients, mlp_gradients
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from variants import IN_PLACE, VARIANTS, each

from feedback import RULES, DirectFeedback, Rule, direct_feedback
from models import ConvNet

LEARNING = ("DFA", "DKP-optimizer", "DKP-inplace")
WITH_B = [name for name in VARIANTS if name != "BP"]


def small_net(dtype=torch.float64):
    """A conv net with three feedback points on 6x6 images."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 5, 3), nn.ReLU()),
        nn.Flatten(),
        nn.Sequential(nn.Linear(20, 7), nn.ReLU()),
        nn.Linear(7, 3),
    ).to(dtype)


POINTS = ("0", "1", "3")


def make(rule="DKP", dtype=torch.float64, **options):
    torch.manual_seed(0)
    return DirectFeedback(small_net(dtype), POINTS, rule, torch.zeros(1, 3, 6, 6, dtype=dtype), **options)


def data(batch=8, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (batch,), generator=generator)


def gradients(net):
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters() if parameter.grad is not None}


def step(net, x, y):
    net.zero_grad()
    F.cross_entropy(net(x, target=y), y).backward()
    return gradients(net)


# --- against independent implementations


@pytest.mark.parametrize("rule", ["DFA", "DKP"])
def test_convnet_gradients_equal_those_worked_out_by_hand(rule):
    torch.manual_seed(0)
    model = ConvNet(4).double()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    y = torch.tensor([0, 3, 1])
    net = DirectFeedback(model, model.points, rule, x[:1])
    got = step(net, x, y)
    expected, expected_feedback = convnet_gradients(dict(model.named_parameters()), net.matrices(), x, y)
    for name, value in expected.items():
        torch.testing.assert_close(got.pop(f"model.{name}"), value)
    if rule == "DKP":
        for point, value in zip(model.points, expected_feedback, strict=True):
            torch.testing.assert_close(got.pop(f"feedback.{point}"), value)
    assert not got


@pytest.mark.parametrize("rule", ["DFA", "DKP"])
def test_mlp_gradients_equal_those_worked_out_by_hand(rule):
    torch.manual_seed(0)
    sizes = [6, 5, 4, 3]
    layers = [nn.Linear(a, b, dtype=torch.float64) for a, b in itertools.pairwise(sizes)]
    model = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])
    x, y = torch.randn(7, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2, 2])
    net = DirectFeedback(model, ("1", "3"), rule, x)
    step(net, x, y)
    weights, biases, matrices = mlp_gradients(
        [z.weight for z in layers], [z.bias for z in layers], net.matrices(), x, y
    )
    for layer, weight, bias in zip(layers, weights, biases, strict=True):
        torch.testing.assert_close(layer.weight.grad, weight)
        torch.testing.assert_close(layer.bias.grad, bias)
    if rule == "DKP":
        for B, expected in zip(net.matrices(), matrices, strict=True):
            torch.testing.assert_close(B.grad, expected)


def test_dfa_equals_bp_when_feedback_is_the_forward_path():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(a, b, dtype=torch.float64) for a, b in ((6, 5), (5, 4), (4, 3))))
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.arange(9) % 3
    net = DirectFeedback(copy.deepcopy(model), ("0", "1"), "DFA", x)
    net.matrices()[0].copy_(model[2].weight.detach() @ model[1].weight.detach())
    net.matrices()[1].copy_(model[2].weight.detach())
    F.cross_entropy(net(x), y).backward()
    F.cross_entropy(model(x), y).backward()
    for got, expected in zip(net.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad)


def test_bp_is_plain_autograd():
    net = make("BP")
    bare = small_net()
    bare.load_state_dict(net.model.state_dict())
    x, y = data()
    got = step(net, x, y)
    F.cross_entropy(bare(x), y).backward()
    for name, parameter in bare.named_parameters():
        assert torch.equal(got[f"model.{name}"], parameter.grad)
    assert net.matrices() == [] and not list(net.feedback.state_dict())


@pytest.mark.parametrize("update", ["optimizer", "inplace"])
def test_kolen_pollack_gap_shrinks_by_one_minus_lr_times_decay(update):
    lr, decay = 0.2, 0.3
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Linear(4, 3, bias=False)).double()
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.arange(9) % 3
    inplace = {"update": "inplace", "feedback_lr": lr, "feedback_weight_decay": decay} if update == "inplace" else {}
    net = DirectFeedback(model, ("1", "2"), "DKP", x, **inplace)
    learned = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learned, lr, weight_decay=decay)
    output, feedback = model[3].weight, net.matrices()[1]
    gap = (output - feedback).detach().clone()
    assert gap.norm() > 0.1
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        gap *= 1 - lr * decay
        torch.testing.assert_close((output - feedback).detach(), gap)


def test_inplace_update_equals_sgd_step_for_step():
    lr, decay = 0.1, 0.05
    by_optimizer = make("DKP")
    inplace = make("DKP", update="inplace", feedback_lr=lr, feedback_weight_decay=decay)
    optimizers = [torch.optim.SGD(net.model.parameters(), 0.3) for net in (by_optimizer, inplace)]
    of_feedback = torch.optim.SGD(by_optimizer.feedback.parameters(), lr, weight_decay=decay)
    start = [B.detach().clone() for B in inplace.matrices()]
    for seed in range(6):
        x, y = data(5, seed=seed)
        for net, optimizer in zip((by_optimizer, inplace), optimizers, strict=True):
            step(net, x, y)
            optimizer.step()
        of_feedback.step()
        for got, expected in zip(inplace.parameters(), by_optimizer.parameters(), strict=True):
            torch.testing.assert_close(got, expected)
        inplace.feedback_lr = of_feedback.param_groups[0]["lr"] = lr * 0.8**seed
    for B, before in zip(inplace.matrices(), start, strict=True):
        assert B.grad is None and not torch.allclose(B, before)


# --- unlocked


class InputGradientCounter(TorchDispatchMode):
    """Count the operators of a backward pass that compute a gradient with respect to a layer's input."""

    def __init__(self, model):
        super().__init__()
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self.linear_weights = {module.weight.data_ptr() for module in linear}
        self.convolution_backwards = self.convolution_inputs = self.linear_inputs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.convolution_backwards += 1
            self.convolution_inputs += args[10][0]  # output_mask: (input, weight, bias)
        elif func is torch.ops.aten.mm.default:
            self.linear_inputs += any(operand.data_ptr() in self.linear_weights for operand in args[:2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("rule", "options"), [*VARIANTS.values(), ("FDFA", {})], ids=[*VARIANTS, "FDFA"])
def test_no_gradient_with_respect_to_a_blocks_input(rule, options):
    net = make(rule, **options)
    x, y = data()
    loss = F.cross_entropy(net(x, target=y), y)
    with InputGradientCounter(net.model) as counter:
        loss.backward()
    assert counter.convolution_backwards == 2
    # BP, and FA and KP through B: all layers but the first, whose input is data
    convolutions, linears = {"BP": (1, 2), "FA": (1, 0), "KP": (1, 0)}.get(rule, (0, 0))
    assert (counter.convolution_inputs, counter.linear_inputs) == (convolutions, linears)


# --- any use of a module


@each(*WITH_B)
@pytest.mark.parametrize("batch", [1, 2, 9])
def test_any_batch_size(rule, options, batch):
    net = make(rule, **options)
    for size in (4, batch):
        found = step(net, *data(size))
        assert all(value.isfinite().all() for value in found.values())
        assert found["model.0.0.weight"].abs().sum() > 0


@pytest.mark.parametrize("rule", ["FA", "KP", "DFA", "DKP", "LAS"])
def test_gradients_accumulate(rule):
    net = make(rule)
    (x1, y1), (x2, y2) = data(4, seed=1), data(3, seed=2)
    first, second = step(net, x1, y1), step(net, x2, y2)
    net.zero_grad()
    F.cross_entropy(net(x1, target=y1), y1).backward()
    F.cross_entropy(net(x2, target=y2), y2).backward()
    for name, value in gradients(net).items():
        torch.testing.assert_close(value, first[name] + second[name])


@pytest.mark.parametrize("rule", ["FA", "KP", "DFA", "DKP", "LAS"])
def test_two_forwards_before_one_backward(rule):
    net = make(rule)
    (x1, y1), (x2, y2) = data(4, seed=1), data(3, seed=2)
    first, second = step(net, x1, y1), step(net, x2, y2)
    net.zero_grad()
    (F.cross_entropy(net(x1, target=y1), y1) + F.cross_entropy(net(x2, target=y2), y2)).backward()
    for name, value in gradients(net).items():
        torch.testing.assert_close(value, first[name] + second[name])


def test_two_forwards_before_one_backward_step_b_twice_in_place():
    """Each backward is a step of B: the outcome is that of two steps, one after the other, in either order."""
    (x1, y1), (x2, y2) = data(4, seed=1), data(3, seed=2)
    options = IN_PLACE
    together = make("DKP", **options)
    (F.cross_entropy(together(x1), y1) + F.cross_entropy(together(x2), y2)).backward()
    orders = []
    for order in ([(x1, y1), (x2, y2)], [(x2, y2), (x1, y1)]):
        net = make("DKP", **options)
        for x, y in order:
            F.cross_entropy(net(x), y).backward()
        orders.append(net)
    matches = [
        all(torch.allclose(a, b) for a, b in zip(together.matrices(), net.matrices(), strict=True))
        and all(torch.allclose(value, gradients(net)[name]) for name, value in gradients(together).items())
        for net in orders
    ]
    assert any(matches)


@each(*WITH_B)
@pytest.mark.parametrize("converted", ["before", "after"])
def test_channels_last_equals_contiguous(rule, options, converted):
    x, y = data()
    plain = make(rule, **options)
    expected = step(plain, x, y)
    torch.manual_seed(0)
    model, example = small_net(), torch.zeros(2, 3, 6, 6, dtype=torch.float64)
    if converted == "before":
        model = model.to(memory_format=torch.channels_last)
        example = example.to(memory_format=torch.channels_last)
    net = DirectFeedback(model, POINTS, rule, example, **options)
    if converted == "after":
        net = net.to(memory_format=torch.channels_last)
    got = step(net, x.to(memory_format=torch.channels_last), y)
    kept = [B.is_contiguous(memory_format=torch.channels_last) for B in net.matrices() if B.dim() == 4]
    assert all(kept) and bool(kept) != RULES[rule].head
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)
    for B, expected_B in zip(net.matrices(), plain.matrices(), strict=True):
        torch.testing.assert_close(B, expected_B)


def plain_direct_feedback_gradients(net, x, y):
    """The same gradients in plain PyTorch: a surrogate loss per block, sum(h * (e @ B)), with the input detached."""
    modules = list(net.unwrap())
    surrogate, h = 0.0, x
    outputs = []
    for i, module in enumerate(modules):
        h = module(h)
        if str(i) in net.points:
            outputs.append(h)
            h = h.detach()
    loss = F.cross_entropy(h, y)
    (error,) = torch.autograd.grad(loss, h, retain_graph=True)
    surrogate = loss
    for output, B in zip(outputs, net.matrices(), strict=True):
        signal = (error @ B.detach().flatten(1)).view_as(output)
        surrogate = surrogate + (output * signal).sum()
    parameters = dict(net.model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(surrogate, list(parameters.values())), strict=True))


@each(*LEARNING)
def test_bfloat16_autocast_is_as_exact_as_plain_pytorch(rule, options):
    x, y = data(16)
    exact_net = make(rule, **options)
    exact = step(exact_net, x, y)
    plain_net, net = make("DFA", torch.float32), make(rule, torch.float32, **options)
    before = [B.detach().clone() for B in net.matrices()]
    with torch.autocast("cpu", torch.bfloat16):
        plain = plain_direct_feedback_gradients(plain_net, x.float(), y)
        loss = F.cross_entropy(net(x.float()), y)
    loss.backward()
    got = gradients(net)
    for name, value in plain.items():
        reference = exact[f"model.{name}"]
        floor = 1e-3 * reference.abs().max()
        allowed = 2 * (value.double() - reference).norm() + floor
        assert (got[f"model.{name}"].double() - reference).norm() <= allowed, name
    for B, old, exact_B in zip(net.matrices(), before, exact_net.matrices(), strict=True):
        assert B.dtype == torch.float32
        change, expected = (B - old).double(), exact_B - old.double()  # DFA: none; in place: the step
        if rule == "DKP" and not options:
            change, expected = B.grad.double(), exact_B.grad
        assert (change - expected).norm() <= 0.02 * expected.norm()


@each()
def test_compiles_without_a_graph_break(rule, options):
    torch._dynamo.reset()
    net = make(rule, torch.float32, **options)
    twin = copy.deepcopy(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for seed in range(10 if options else 2):  # more learning rates than the compiler recompiles for
        if net.update == "inplace":
            net.feedback_lr = twin.feedback_lr = 0.1 * 0.8**seed
        x, y = data(8, torch.float32, seed)
        expected = step(twin, x, y)
        net.zero_grad()
        F.cross_entropy(compiled(x, target=y), y).backward()
        for name, value in gradients(net).items():
            torch.testing.assert_close(value, expected[name])
        for B, expected_B in zip(net.matrices(), twin.matrices(), strict=True):
            torch.testing.assert_close(B, expected_B)


@each()
def test_deep_copy_is_independent(rule, options):
    net = make(rule, **options)
    twin = copy.deepcopy(net)
    x, y = data()
    alone = step(make(rule, **options), x, y)
    got = step(twin, x, y)
    assert all(torch.equal(got[name], value) for name, value in alone.items())
    assert not gradients(net)
    for mine, theirs in zip(net.state_dict().values(), twin.state_dict().values(), strict=True):
        assert mine.data_ptr() != theirs.data_ptr()


@each()
def test_state_dict_round_trip_into_a_fresh_object(rule, options, tmp_path):
    net = make(rule, **options)
    x, y = data()
    step(net, x, y)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    torch.manual_seed(9)
    fresh = DirectFeedback(small_net(), POINTS, rule, x, **options)
    fresh.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    for name, value in net.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)
    got, expected = step(fresh, x, y), step(net, x, y)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    in_state = [name for name in net.state_dict() if name.startswith("feedback.")]
    assert len(in_state) == {"BP": 0, "HEAD": 12, "LOCAL": 12}.get(rule, 3)


@each()
def test_eval_and_no_grad_are_the_bare_model(rule, options):
    net = make(rule, **options)
    x, _ = data()
    before = copy.deepcopy(net.state_dict())
    bare = copy.deepcopy(net.model)
    with torch.no_grad():
        assert torch.equal(net(x), bare(x))
    net.eval(), bare.eval()
    logits = net(x)
    assert torch.equal(logits, bare(x))
    (bp,) = torch.autograd.grad(logits.sum(), net.model[0][0].weight)
    (expected,) = torch.autograd.grad(bare(x).sum(), bare[0][0].weight)
    assert torch.equal(bp, expected)
    assert all(torch.equal(before[name], B) for name, B in net.state_dict().items() if name.startswith("feedback"))


def test_training_forward_returns_the_models_logits():
    net = make("DKP")
    x, _ = data()
    bare = copy.deepcopy(net).unwrap()
    assert torch.equal(net(x), bare(x))


def test_construction_leaves_batch_norm_and_random_numbers_untouched():
    model = small_net()
    model[2] = nn.Sequential(nn.Dropout(), nn.Flatten())
    model[0][1].eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    DirectFeedback(model, POINTS, "DKP", data()[0], init=nn.init.zeros_)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training and not model[0][1].training and model[2][0].training


def test_an_example_of_one_image_is_enough_for_batch_norm():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    with torch.autocast("cpu", torch.bfloat16):
        net = DirectFeedback(model, ("1",), "DKP", torch.zeros(1, 4))
    assert net.matrices()[0].dtype == torch.float32


def test_feedback_is_parameter_buffer_or_absent():
    shapes = [(3, 4, 4, 4), (3, 5, 2, 2), (3, 7)]
    assert [B.shape for B in make("DFA").matrices()] == shapes
    assert len(list(make("DFA").feedback.buffers())) == 3 and not list(make("DFA").feedback.parameters())
    assert [B.requires_grad for B in make("DKP").feedback.parameters()] == [True] * 3
    assert [B.requires_grad for B in make("DKP", **IN_PLACE).feedback.parameters()] == [False] * 3
    bound = (6 / 64) ** 0.5  # kaiming-uniform with fan-in D = 4 * 4 * 4, both signs
    first = make("DFA").matrices()[0]
    assert first.abs().max() <= bound and first.max() > 0.8 * bound and first.min() < -0.8 * bound


def test_in_place_the_b_of_a_frozen_block_learns_as_by_an_optimiser():
    nets = [make("DKP"), make("DKP", update="inplace", feedback_lr=0.1)]
    for net in nets:
        net.model[0].requires_grad_(False)
        step(net, *data())
    torch.optim.SGD(nets[0].feedback.parameters(), 0.1).step()
    for got, expected in zip(nets[1].matrices(), nets[0].matrices(), strict=True):
        torch.testing.assert_close(got, expected)


def test_a_frozen_block_gets_no_gradient_and_does_not_hinder_the_others():
    net = make("DKP")
    net.model[1].requires_grad_(False)
    found = step(net, *data())
    assert "model.1.0.weight" not in found and "model.0.0.weight" in found and "feedback.1" in found


# --- misuse


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.unused, self.pair = nn.Linear(4, 4), nn.Linear(4, 4), nn.GRUCell(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.block(self.block(x)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda x: DirectFeedback(Twice(), ("nowhere",), "DFA", x), "'nowhere' does not exist, expected one of"),
        (lambda x: DirectFeedback(Twice(), ("unused",), "DFA", x), "'unused' was never reached"),
        (lambda x: DirectFeedback(Twice(), ("block",), "DKP", x), "'block' was reached twice"),
        (lambda x: DirectFeedback(Twice(), ("head",), "DKP", x), "'head' returns the logits"),
        (lambda x: DirectFeedback(Twice(), (), "DKP", x), "expected a sequence of one or more"),
        (lambda x: DirectFeedback(Twice(), "block", "DKP", x), "expected a sequence of one or more"),
        (lambda x: DirectFeedback(Twice(), ("head", "head"), "DKP", x), "'head' is given twice"),
        (lambda x: DirectFeedback(Twice(), ("head",), "FOO", x), "rule is 'FOO', expected one of"),
        (lambda x: DirectFeedback(Twice(), ("head",), "DKP", x, update="foo"), "update is 'foo', expected one of"),
        (lambda x: DirectFeedback(Twice(), ("head",), "DFA", x, update="inplace"), "got 'DFA'"),
        (lambda x: DirectFeedback(Twice(), ("head",), "DKP", x, update="inplace"), "got feedback_lr=None"),
        (lambda x: DirectFeedback(Twice(), ("head",), "DKP", x, feedback_lr=0.1), "got feedback_lr=0.1"),
        (lambda x: DirectFeedback(Twice(), ("head",), "DKP", x, feedback_weight_decay=0.1), "got update='optimizer'"),
        (lambda x: DirectFeedback(nn.Sequential(nn.Linear(4, 3), nn.Flatten(0)), ("0",), "DKP", x),
         r"\(N, K\), or \(N, \.\.\., K\), got \(6,\)"),
        (lambda x: DirectFeedback(nn.ModuleDict({"a": nn.Sequential(nn.Tanh()), "a_0": nn.Tanh()}), ("a.0", "a_0"),
                                  "DKP", x), "has the name of another"),
        (lambda x: DirectFeedback(nn.Sequential(nn.Linear(4, 3), nn.LSTM(3, 3)), ("0",), "DFA", x), "got a tuple"),
        (lambda x: DirectFeedback(nn.Sequential(nn.Linear(4, 3), nn.Flatten(0), nn.Unflatten(0, (2, 3))), ("1",), "DFA",
                                  x), r"activation '1' has shape \(6,\), expected \(2, D"),
        (lambda x: DirectFeedback(nn.Sequential(nn.LSTM(4, 3), nn.Linear(3, 2)), ("0",), "DKP", x), "returned a tuple"),
    ],
)  # fmt: skip
def test_misuse_of_the_wrapper_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build(torch.zeros(2, 4))


def test_a_refused_model_is_left_without_hooks():
    model = Twice()
    with pytest.raises(ValueError, match="never reached"):
        DirectFeedback(model, ("unused",), "DKP", torch.zeros(2, 4))
    assert not any(module._forward_hooks for module in model.modules())


@each(*LEARNING)
def test_an_output_changed_in_place_further_up_is_refused_where_it_is_needed(rule, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    if rule == "DKP":
        with pytest.raises(ValueError, match="'0' was changed in place further up"):
            DirectFeedback(model, ("0",), rule, x, **options)
        return
    net = DirectFeedback(model, ("0",), rule, x)
    got = step(net, x, y)
    error = (net.unwrap()(x).softmax(1) - F.one_hot(y)) / 6
    torch.testing.assert_close(got["model.0.bias"], (error @ net.matrices()[0]).sum(0))


def test_another_image_size_than_the_examples_is_refused():
    net = DirectFeedback(nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)),
                         ("0",), "DFA", torch.zeros(1, 3, 8, 8))  # fmt: skip
    with pytest.raises(ValueError, match=r"shape \(3, 2, 6, 6\), expected \(3, 2, 7, 7\)"):
        net(torch.zeros(2, 3, 9, 9))


@pytest.mark.parametrize(
    ("logits", "activations", "matrices", "message"),
    [
        ((4,), [(4, 5)], [(3, 5)], r"\(N, K\), or \(N, \.\.\., K\), got \(4,\)"),
        ((4, 3), [(4, 7, 5)], [(3, 5)], r"feedback matrix 0 has shape \(3, 5\), expected \(3, 7, 5\)"),
        ((4, 3), [(4, 5)], [], "got 1 activations and 0 feedback matrices"),
        ((4, 3), [(4, 5)], [(5, 3)], r"feedback matrix 0 has shape \(5, 3\), expected \(3, 5\)"),
        ((4, 3), [(4, 5, 1)], [(3, 5)], r"feedback matrix 0 has shape \(3, 5\), expected \(3, 5, 1\)"),
        ((4, 3), [(2, 5)], [(3, 5)], r"activation 0 has shape \(2, 5\), expected \(4, D, \.\.\.\)"),
    ],
)
def test_misuse_of_the_function_is_refused(logits, activations, matrices, message):
    with pytest.raises(ValueError, match=message):
        direct_feedback(torch.zeros(logits), [torch.zeros(s) for s in activations], [torch.zeros(s) for s in matrices])


def test_update_in_place_is_refused_where_it_cannot_be_right():
    logits, h = torch.zeros(4, 3), torch.zeros(4, 5)
    with pytest.raises(ValueError, match="expected requires_grad=False"):
        direct_feedback(logits, [h], [torch.zeros(3, 5, requires_grad=True)], inplace_lr=0.1)
    with pytest.raises(ValueError, match="contiguous"):
        direct_feedback(logits, [h], [torch.zeros(5, 3).T], inplace_lr=0.1)


def test_update_in_place_under_an_fp16_grad_scaler_is_refused():
    net = make("DKP", torch.float32, update="inplace", feedback_lr=0.1)
    x, y = data(4, torch.float32)
    scaler = torch.amp.GradScaler("cpu")
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="got float16, expected float32"):
        scaler.scale(F.cross_entropy(net(x), y)).backward()


@pytest.mark.filterwarnings("ignore:the error at the logits is no multiple")
@pytest.mark.parametrize("rule", ["DKP", "LAS"])
def test_update_in_place_under_a_bfloat16_grad_scaler_is_refused_before_b_is_stepped(rule):
    net = make(rule, torch.float32, update="inplace", feedback_lr=0.1)
    x, y = data(4, torch.float32)
    before = [B.clone() for B in net.matrices()]
    scaler = torch.amp.GradScaler("cpu")
    net(x, target=y)  # one that has no backward pass has no error to see
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(net(x, target=y), y)
    with pytest.raises(ValueError, match=r"an error of .* at a logit, expected 1 at most.*GradScaler"):
        scaler.scale(loss).backward()
    assert all(torch.equal(B, old) for B, old in zip(net.matrices(), before, strict=True))
    for reduction in ("mean", "sum"):
        net = make(rule, torch.float32, update="inplace", feedback_lr=0.1)
        F.cross_entropy(net(x, target=y), y, reduction=reduction).backward()
    for _ in range(9):  # later errors may be large: training has begun
        (1e6 * net(x, target=y).mean()).backward()


def test_update_in_place_is_refused_under_fp16_autocast_even_where_all_it_sees_is_float32():
    model = nn.Sequential(nn.Linear(4, 5), nn.Softmax(1), nn.Linear(5, 3), nn.Softmax(1))
    net = DirectFeedback(model, ("1",), "DKP", torch.zeros(2, 4), update="inplace", feedback_lr=0.1)
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="got float16"):
        net(torch.zeros(2, 4)).float()


def test_optimizer_update_works_under_an_fp16_grad_scaler():
    net = make("DKP", torch.float32)
    x, y = data(8, torch.float32)
    exact = step(make("DKP"), x.double(), y)
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with torch.autocast("cpu", torch.float16):
        loss = F.cross_entropy(net(x), y)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for name, value in gradients(net).items():
        assert (value.double() - exact[name]).norm() <= 0.02 * exact[name].norm() + 1e-3, name


def test_the_wrapper_can_be_taken_off():
    x, y = data()
    for rule in RULES:
        net = make(rule)
        bare = small_net()
        bare.load_state_dict(net.model.state_dict())
        model = net.unwrap()
        assert model is net.model and not any(module._forward_hooks for module in model.modules())
        model.train(), bare.train()
        expected, got = (torch.autograd.grad(F.cross_entropy(m(x), y), list(m.parameters())) for m in (bare, model))
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_a_rule_of_ones_own_is_a_line_in_the_registry(monkeypatch):
    def halved(error_NK, h_ND, feedback_KD, target_N):
        return error_NK / 2

    monkeypatch.setitem(RULES, "HALF", Rule("HALF", sent=halved))
    x, y = data()
    grads = {}
    for rule in ("DFA", "HALF"):
        torch.manual_seed(0)
        grads[rule] = step(make(rule), x, y)
    name = "model.0.0.weight"
    torch.testing.assert_close(grads["HALF"][name], grads["DFA"][name] / 2)


def test_matrices_lists_b_of_every_rule_that_has_matrices():
    shapes = {rule: [tuple(B.shape) for B in make(rule).matrices()] for rule in RULES if not RULES[rule].head}
    assert shapes.pop("BP") == []
    layers = shapes.pop("FA")
    assert layers == shapes.pop("KP") and layers
    assert len({str(direct) for direct in shapes.values()}) == 1 and len(shapes["DFA"]) == len(POINTS)
