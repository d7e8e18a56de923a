"""The wrapper under other people's tools: checkpointing, hooks, copies, TorchScript, empty batches, ignored labels."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from variants import IN_PLACE, VARIANTS, each

from feedback import RULES, DirectFeedback, alignment
from models import ConvNet

POINTS = ("a", "b")
X = torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randint(3, (8,), generator=torch.Generator().manual_seed(2))
NEEDS_TARGET = [name for name, (rule, _) in VARIANTS.items() if RULES[rule].needs_target]


class Net(nn.Module):
    """Two blocks and a last layer; `reentrant` is how torch.utils.checkpoint runs the blocks, None if it does not."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.a = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.b = nn.Sequential(nn.Linear(6, 7), nn.Tanh())
        self.c = nn.Linear(7, 3)
        self.reentrant = reentrant

    def blocks(self, x):
        return self.b(self.a(x))

    def forward(self, x):
        if self.reentrant is None:
            return self.c(self.blocks(x))
        return self.c(checkpoint(self.blocks, x, use_reentrant=self.reentrant))


def make(rule, options, reentrant=None):
    torch.manual_seed(0)
    return DirectFeedback(Net(reentrant).double(), POINTS, rule, X, **options)


def assert_same_state_and_gradients(one, other):
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad), name


@each()
def test_a_checkpointed_block_learns_as_without_checkpointing(rule, options):
    """Also where two passes are under way, with other images and labels."""
    plain, checkpointed = make(rule, options), make(rule, options, reentrant=False)
    for net in (plain, checkpointed):
        first = F.cross_entropy(net(X[:3], target=Y[:3]), Y[:3])
        second = F.cross_entropy(net(X[3:], target=Y[3:]), Y[3:])
        second.backward()
        first.backward()
    assert_same_state_and_gradients(plain, checkpointed)


@each()
@pytest.mark.parametrize("angles", [False, True], ids=["test", "angles"])
def test_a_test_between_the_two_passes_of_a_checkpointed_block_changes_nothing(rule, options, angles):
    plain, checkpointed = make(rule, options), make(rule, options, reentrant=False)
    for net in (plain, checkpointed):
        loss = F.cross_entropy(net(X, target=Y), Y)
        if angles:
            alignment(net, X, Y)
        else:
            with torch.no_grad():
                net.eval()(X)
            net.train()
        loss.backward()
    assert_same_state_and_gradients(plain, checkpointed)


@each()
def test_a_pass_that_is_dropped_leaves_nothing_in_memory(rule, options):
    net, kept = make(rule, options), []

    def pack(tensor):
        copied = tensor.detach().clone()
        kept.append(weakref.ref(copied))
        return copied

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = net(X, target=Y)
    assert any(reference() is not None for reference in kept)
    del logits
    assert not any(reference() is not None for reference in kept)


@each("DKP-inplace", "LAS-inplace")
def test_b_in_place_is_stepped_where_saved_tensors_are_copied(rule, options):
    plain, copied = make(rule, options), make(rule, options)
    before = [B.clone() for B in copied.matrices()]
    F.cross_entropy(plain(X, target=Y), Y).backward()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
        F.cross_entropy(copied(X, target=Y), Y).backward()
    assert_same_state_and_gradients(plain, copied)
    assert not any(torch.equal(B, old) for B, old in zip(copied.matrices(), before, strict=True))


@each()
def test_the_bare_net_is_checkpointed_as_if_there_were_no_wrapper(rule, options):
    net, bare = make(rule, options, reentrant=False), Net(reentrant=False).double()
    F.cross_entropy(net(X, target=Y), Y).backward()
    net.zero_grad()
    bare.load_state_dict(net.model.state_dict())
    for module in (net.unwrap(), bare):
        F.cross_entropy(module(X), Y).backward()
    assert_same_state_and_gradients(net.model, bare)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("rule", [rule for rule in RULES if not RULES[rule].chained])
def test_a_reentrant_checkpoint_that_would_make_it_backpropagation_is_refused(rule):
    message = "'a' runs without gradients, expected them: .* checkpoint it with use_reentrant=False"
    with pytest.raises(ValueError, match=message):
        make(rule, {}, reentrant=True)
    net = make(rule, {"allow_skips": True}, reentrant=True)  # which looks at no pass with gradients
    with pytest.raises(ValueError, match=message):
        net(X.clone().requires_grad_(), target=Y)


def test_a_backward_hook_within_a_block_sees_the_signal_and_one_on_the_point_does_not_fire():
    net, seen = make("DFA", {}), []
    net.model.a.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("point"))
    net.model.a[3].register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_out[0]))
    logits = net(X)
    loss = F.cross_entropy(logits, Y)
    (error,) = torch.autograd.grad(loss, logits, retain_graph=True)
    loss.backward()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], error @ net.feedback.a)


@each()
def test_an_empty_batch_gives_zero_gradients_and_leaves_b(rule, options):
    torch.manual_seed(0)
    options = options | ({"feedback_weight_decay": 0.0} if "feedback_lr" in options else {})
    example = torch.zeros(1, 3, 32, 32)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.zeros(0, 3, 32, 32).to(memory_format=memory_format)
        model = ConvNet(10).to(memory_format=memory_format)
        net = DirectFeedback(model, model.points, rule, example.to(memory_format=memory_format), **options)
        net.eval()
        before = [B.detach().clone() for B in net.matrices()]
        net.train()
        for module in net.modules():  # a batch norm cannot train on no image, in plain PyTorch neither
            module.train(not isinstance(module, nn.BatchNorm2d))
        y = torch.zeros(0, dtype=torch.int64)
        F.cross_entropy(net(x, target=y), y, reduction="sum").backward()
        assert all(p.grad is None or not p.grad.any() for p in net.parameters())
        assert sum(p.grad is not None for p in net.model.parameters()) == len(list(net.model.parameters()))
        assert all(torch.equal(B, old) for B, old in zip(net.matrices(), before, strict=True))


@each(*NEEDS_TARGET)
def test_an_ignored_image_is_as_good_as_absent(rule, options):
    """-100 is what F.cross_entropy ignores by default."""
    nets = [make(rule, options) for _ in range(2)]
    y = Y.clone()
    y[[1, 4]] = -100
    rest = y != -100
    F.cross_entropy(nets[0](X, target=y), y).backward()
    F.cross_entropy(nets[1](X[rest], target=y[rest]), y[rest]).backward()
    for (name, p), q in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)
        torch.testing.assert_close(p.grad, q.grad, msg=name)


@each(*NEEDS_TARGET)
@pytest.mark.parametrize("label", [3, -1])
def test_a_label_out_of_range_is_refused_in_the_forward_pass(rule, options, label):
    y = Y.clone()
    y[2] = label
    with pytest.raises(ValueError, match=f"label {label}, expected 0 to 2, or -100 to ignore an image"):
        make(rule, options)(X, target=y)


def test_a_batch_without_a_label_has_no_gradients():
    y = torch.full_like(Y, -100)
    for name in NEEDS_TARGET:
        rule, options = VARIANTS[name]
        net = make(rule, options | ({"feedback_weight_decay": 0.0} if "feedback_lr" in options else {}))
        before = [B.detach().clone() for B in net.matrices()]
        F.cross_entropy(net(X, target=y), y, reduction="sum").backward()
        assert all(p.grad is None or not p.grad.any() for p in net.parameters()), name
        assert all(torch.equal(B, old) for B, old in zip(net.matrices(), before, strict=True)), name


@each()
def test_a_wrapper_that_is_dropped_is_freed_with_its_hooks(rule, options):
    model = Net().double()
    for _ in range(3):
        net = DirectFeedback(model, POINTS, rule, X, **options)
        F.cross_entropy(net(X, target=Y), Y).backward()
    dropped = weakref.ref(net)
    del net
    assert dropped() is None and not any(module._forward_hooks for module in model.modules())


@each()
def test_a_copy_outlives_its_original_and_takes_its_own_hooks_along(rule, options):
    net, twin = make(rule, options), make(rule, options)
    for module in (net, twin):
        F.cross_entropy(module(X, target=Y), Y).backward()
    copied, shallow = copy.deepcopy(net), copy.copy(net)
    del shallow
    F.cross_entropy(net(X, target=Y), Y).backward()
    del net
    twin.zero_grad()
    for module in (copied, twin):
        F.cross_entropy(module(X, target=Y), Y).backward()
    assert_same_state_and_gradients(copied, twin)
    model = copied.model
    del copied
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_torchscript_takes_the_net_that_is_unwrapped():
    net = DirectFeedback(ConvNet(10), ConvNet.points, "DKP", torch.zeros(1, 3, 32, 32), **IN_PLACE)
    x = torch.randn(2, 3, 32, 32)
    expected = net.eval()(x)
    torch.testing.assert_close(torch.jit.script(net.unwrap())(x), expected)
