"""Models that are called in any way and return anything, and those that a wrapper has to prepare."""

import copy
import math
import pickle
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from variants import IN_PLACE, each

from feedback import RULES, DirectFeedback, alignment

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
MASK, Y = torch.arange(24).view(6, 4) % 5 > 0, torch.arange(6) % 3
Outputs = namedtuple("Outputs", ["logits", "features"])


@dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


class Record(OrderedDict):
    """As the outputs of Hugging Face's models: a dict whose keys are attributes, too."""

    def __getattr__(self, name):
        return self[name]


def only_logits(z, h):
    return z


FORMS = {  # what a model makes of its logits, and the key under which they are
    "a tensor": (only_logits, None),
    "a tuple": (lambda z, h: (h, z), 1),
    "a list": (lambda z, h: [h, z], -1),
    "a named tuple": (Outputs, "logits"),
    "a named tuple by index": (Outputs, 0),
    "a dict": (lambda z, h: {"features": h, "items": z}, "items"),
    "a dataclass": (lambda z, h: Output(z), "logits"),
    "a record": (lambda z, h: Record(logits=z, features=h), "logits"),
}
forms = pytest.mark.parametrize(("form", "key"), FORMS.values(), ids=FORMS)


class Model(nn.Module):
    """Two inputs, one by keyword."""

    def __init__(self, form=only_logits, own_loss=False):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.form, self.own_loss = form, own_loss

    def forward(self, x, mask=None, labels=None):
        h = self.a(x if mask is None else x * mask).tanh()
        h = self.b(h).tanh()
        z = self.c(h)
        if labels is not None:
            return Output(z, F.cross_entropy(z, labels))
        return self.form(z, h)


def wrap(model, rule="DKP", example=None, **options):
    torch.manual_seed(0)
    return DirectFeedback(model.double(), ["a", "b"], rule, X[:2] if example is None else example, **options)


def gradients(net, logits):
    net.zero_grad()
    F.cross_entropy(logits, Y).backward()
    return [None if p.grad is None else p.grad.clone() for p in net.parameters()]


def assert_equal(these, those):
    for one, other in zip(these, those, strict=True):
        torch.testing.assert_close(one, other)


@forms
@each()
def test_the_logits_are_found_in_any_output_and_put_back(form, key, rule, options):
    plain, net = (wrap(Model(f), rule, logits=k, **options) for f, k in ((only_logits, None), (form, key)))
    expected = gradients(plain, plain(X, target=Y))
    out = net(X, target=Y)
    assert type(out) is type(form(X, X))
    logits = out if key is None else out[key] if isinstance(key, int) or type(out) is dict else getattr(out, key)
    assert_equal(gradients(net, logits), expected)
    with torch.no_grad():
        assert type(net.eval()(X)) is type(out)
    assert alignment(net, X, Y).keys() == alignment(plain, X, Y).keys()


@each()
def test_a_model_may_return_more_in_training_than_in_eval_mode(rule, options):
    class WithAuxiliary(Model):
        def forward(self, x):
            z = super().forward(x)
            return Outputs(z, x) if self.training else z

    plain, net = wrap(Model(), rule, **options), wrap(WithAuxiliary(), rule, logits="logits", **options)
    assert_equal(gradients(net, net(X, target=Y).logits), gradients(plain, plain(X, target=Y)))
    assert isinstance(net.eval()(X), torch.Tensor)


@each()
@pytest.mark.parametrize(
    ("example", "inputs", "named"),
    [
        ((X[:2], MASK[:2]), (X, MASK), {}),
        ({"x": X[:2], "mask": MASK[:2]}, (), {"x": X, "mask": MASK}),
        (X[:2], (X,), {"mask": MASK}),
    ],
    ids=["tuple", "dict", "tensor"],
)
def test_every_input_gets_to_the_model(rule, options, example, inputs, named):
    net, masked = wrap(Model(), rule, example, **options), wrap(Model(), rule, **options)
    assert_equal(gradients(net, net(*inputs, target=Y, **named)), gradients(masked, masked(X * MASK, target=Y)))
    net.eval()
    assert torch.equal(net(*inputs, **named), net.model(X * MASK))


@pytest.mark.parametrize("probe", [(X, MASK), {"x": X, "mask": MASK}], ids=["tuple", "dict"])
def test_angles_of_a_model_with_several_inputs(probe):
    net = wrap(Model())
    angles, expected = alignment(net, probe, Y), alignment(net, X * MASK, Y)
    for point in net.points:
        assert angles[point] == pytest.approx(expected[point])


def test_an_input_may_be_a_dict_or_a_list():
    class Batch(Model):
        def forward(self, batch):
            return super().forward(batch["x"] if isinstance(batch, dict) else batch[0])

    for batch in ({"x": X}, [X]):
        net, plain = wrap(Batch(), example=(batch,)), wrap(Model())
        assert_equal(gradients(net, net(batch)), gradients(plain, plain(X)))


@pytest.mark.parametrize(
    ("form", "key", "message"),
    [
        (FORMS["a tuple"][0], None, r"needs logits \(N, K\).*got a tuple.*logits="),
        (FORMS["a tuple"][0], 2, "a tuple of 2, expected logits in it at 2"),
        (FORMS["a dict"][0], "logits", r"a dict with \['features', 'items'\], expected logits in it at 'logits'"),
        (lambda z, h: Output(z), "scores", "a Output, expected logits in it at 'scores'"),
    ],
)
def test_logits_that_are_not_there_are_refused(form, key, message):
    with pytest.raises(ValueError, match=message):
        wrap(Model(form), logits=key)


@pytest.mark.parametrize("rule", [rule for rule in RULES if not RULES[rule].chained])
def test_a_loss_that_the_model_computes_itself_is_refused(rule):
    net = wrap(Model(FORMS["a dataclass"][0]), rule, logits="logits")
    with pytest.raises(ValueError, match=r"the model returns a loss of its logits.*without labels"):
        net(X, labels=Y, target=Y)
    with torch.no_grad():
        assert net(X, labels=Y).loss > 0
    F.cross_entropy(net(X, target=Y).logits, Y).backward()


ESCAPES = {
    "logits that are a part of what the loss is of": lambda z, h: {
        "logits": z[:, :3],
        "loss": F.cross_entropy(z, Y[: len(z)]),
    },
    "a loss of shape (1,)": lambda z, h: {"logits": z, "loss": F.cross_entropy(z, Y[: len(z)])[None]},
    "a loss for each image": lambda z, h: {"logits": z, "loss": F.cross_entropy(z, Y[: len(z)], reduction="none")},
    "an object": lambda z, h: SimpleNamespace(logits=z, loss=F.cross_entropy(z, Y[: len(z)])),
}


@pytest.mark.parametrize("form", ESCAPES.values(), ids=ESCAPES)
def test_every_form_of_such_a_loss_is_seen(form):
    with pytest.raises(ValueError, match="the model returns a loss of its logits"):
        wrap(Model(form), logits="logits")(X)


def test_an_output_may_have_itself_in_it():
    def form(z, h):
        out = SimpleNamespace(logits=z)
        out.itself = out
        return out

    net, plain = wrap(Model(form), logits="logits"), wrap(Model())
    assert_equal(gradients(net, net(X).logits), gradients(plain, plain(X)))


def test_logits_that_are_returned_twice_are_refused():
    with pytest.raises(ValueError, match="returns its logits twice"):
        wrap(Model(lambda z, h: (z, z)), logits=0)(X)


@dataclass(frozen=True)
class Frozen:
    logits: torch.Tensor


class Pair(tuple):
    pass


@pytest.mark.parametrize(
    ("form", "key"), [(lambda z, h: Frozen(z), "logits"), (lambda z, h: Pair([z, h]), 0), (FORMS["a record"][0], 0)]
)
def test_outputs_of_other_types_come_back_as_such(form, key):
    net, plain = wrap(Model(form), logits=key), wrap(Model())
    out = net(X)
    assert type(out) is type(form(X, X))
    logits = out.logits if isinstance(out, (Frozen, Record)) else out[0]
    assert_equal(gradients(net, logits), gradients(plain, plain(X)))


def test_a_model_that_returns_a_dict_is_compiled():
    torch._dynamo.reset()
    net, plain = wrap(Model(FORMS["a dict"][0]), logits="items"), wrap(Model())
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert_equal(gradients(net, compiled(X)["items"]), gradients(plain, plain(X)))


def test_an_input_called_target_is_refused():
    with pytest.raises(ValueError, match="the example has a 'target'"):
        wrap(Model(), example={"x": X, "target": Y})


def test_one_class_has_no_cross_entropy():
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 1)).double()
    y = (Y[:, None] > 0).double()
    for rule in ("LAS", "DRTP"):
        with pytest.raises(ValueError, match="the logits have one class"):
            DirectFeedback(model, ["0"], rule, X)(X, target=y)
    net = DirectFeedback(model, ["0"], "LAS", X, loss=F.binary_cross_entropy_with_logits)
    F.binary_cross_entropy_with_logits(net(X, target=y), y).backward()
    assert net.matrices()[0].grad.any()


@each()
def test_weights_may_be_swapped_by_functional_call(rule, options):
    net = wrap(Model(), rule, **options)
    weights = {name: p.detach().clone().requires_grad_() for name, p in net.model.named_parameters(prefix="model")}
    F.cross_entropy(torch.func.functional_call(net, weights, (X,), {"target": Y}), Y).backward()
    swapped = [weight.grad for weight in weights.values()]
    F.cross_entropy(net(X, target=Y), Y).backward()
    if not options.get("update"):
        assert_equal(swapped, [p.grad for p in net.model.parameters()])


def test_a_copy_of_the_model_alone_is_the_bare_model():
    net = wrap(Model())
    model = copy.deepcopy(net.model)
    with pytest.raises(ValueError, match="called without its wrapper"):
        net.model(X)
    assert_equal([model(X)], [net(X)])
    copied = copy.deepcopy(net)
    with pytest.raises(ValueError, match="called without its wrapper"):
        copied.model(X)
    del net, copied
    model(X).sum().backward()


def test_labels_are_neither_pickled_nor_copied():
    net = wrap(Model(), "LAS")
    size = len(pickle.dumps(net))
    teacher = nn.Linear(4, 3).double()
    x = X.repeat(1000, 1)
    soft = teacher(x).softmax(1)
    F.cross_entropy(net(x, target=soft), soft.detach()).backward()
    net.zero_grad()
    assert len(pickle.dumps(net)) == size and len(copy.deepcopy(net).points) == 2
    assert teacher.weight.grad is None


def test_a_block_put_in_after_wrapping_is_seen_where_blocks_may_be_left_out():
    model = Dropped().double()
    net = DirectFeedback(model, ["blocks.0", "blocks.1"], "DKP", X[:2], missing="skip")
    model.blocks[1] = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
    with pytest.raises(ValueError, match="a Linear, was put in after wrapping"):
        net(X)


def test_an_expanded_buffer_is_left_alone():
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    model.register_buffer("mask", torch.ones(1, 5).expand(4, 5))
    DirectFeedback(model, ["0"], "DKP", X)
    assert model.mask.stride() == (0, 1)


class Dropped(nn.Module):
    """Leaves out its second block, or its third, when it is told to."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        self.head, self.dropped = nn.Linear(4, 3), ()

    def forward(self, x):
        for number, block in enumerate(self.blocks):
            x = x if number in self.dropped else block(x)
        return self.head(x)


@each("DFA", "DKP-optimizer", "DKP-inplace", "LAS-optimizer", "LAS-inplace", "DRTP")
def test_a_block_that_a_pass_leaves_out_learns_nothing(rule, options):
    points = ["blocks.0", "blocks.1", "blocks.2"]
    model = Dropped().double()
    net = DirectFeedback(model, points, rule, X[:2], missing="skip", **options)
    before = [B.detach().clone() for B in net.matrices()]
    short = copy.deepcopy(net).unwrap()
    del short.blocks[1]
    without = DirectFeedback(short, points[:2], rule, X[:2], **options)
    for B, other in zip(without.matrices(), [before[0], before[2]], strict=True):
        B.data.copy_(other)
    model.dropped = (1,)
    F.cross_entropy(net(X, target=Y), Y).backward()
    F.cross_entropy(without(X, target=Y), Y).backward()
    assert model.blocks[1][0].weight.grad is None
    for here, there in ((0, 0), (2, 1)):
        torch.testing.assert_close(model.blocks[here][0].weight.grad, short.blocks[there][0].weight.grad)
        torch.testing.assert_close(net.matrices()[here], without.matrices()[there])
    assert torch.equal(net.matrices()[1], before[1]) and net.matrices()[1].grad is None
    model.dropped = ()
    F.cross_entropy(net(X, target=Y), Y).backward()
    assert model.blocks[1][0].weight.grad.any()


@each("BP", "FA", "DFA", "DKP-optimizer", "LAS-optimizer", "DRTP", "LOCAL")
def test_a_point_that_a_pass_leaves_out_has_no_angle_and_the_others_theirs(rule, options):
    model = Dropped().double()
    net = DirectFeedback(model, ["blocks.0", "blocks.1", "blocks.2"], rule, X[:2], missing="skip", **options)
    model.dropped = (1,)
    result = alignment(net, X, Y)
    assert {name for name in net.points if math.isnan(result[name]["alignment_deg"])} == {"blocks.1"}
    assert math.isnan(result["blocks.1.0.weight"]["parameter_deg"])
    assert result["head.weight"]["parameter_deg"] < 1e-3


def test_passes_that_leave_out_different_points_are_not_compared():
    model = Dropped().double()
    net = DirectFeedback(model, ["blocks.0", "blocks.1"], "DFA", X[:2], missing="skip")
    passes = iter([(1,), ()])
    model.register_forward_pre_hook(lambda model, inputs: setattr(model, "dropped", next(passes)))
    with pytest.raises(ValueError, match=r"one of two passes left out blocks\.1, expected the same of both"):
        alignment(net, X, Y)


def test_a_block_that_is_left_out_is_refused_by_default_and_in_the_example():
    model = Dropped().double()
    net = DirectFeedback(model, ["blocks.0", "blocks.1"], "DFA", X[:2])
    model.dropped = (1,)
    with pytest.raises(ValueError, match=r"'blocks.1' was never reached.*missing=\"skip\""):
        net(X)
    with pytest.raises(ValueError, match="never reached"):
        DirectFeedback(model, ["blocks.0", "blocks.1"], "DFA", X[:2], missing="skip")
    with pytest.raises(ValueError, match="missing is 'ignore', expected one of"):
        DirectFeedback(model, ["blocks.0"], "DFA", X[:2], missing="ignore")


@pytest.mark.filterwarnings("ignore:the error at the logits is no multiple")
@each()
def test_the_logits_may_be_changed_in_place(rule, options):
    grads = []
    for inplace in (False, True):
        net = wrap(Model(), rule, **options)
        out = net(X, target=Y % 2)
        if inplace:
            out[:, 2] = -1e4
        else:
            out = torch.cat([out[:, :2], torch.full_like(out[:, 2:], -1e4)], 1)
        F.cross_entropy(out, Y % 2).backward()
        grads.append([p.grad for p in net.model.c.parameters()])
        if not RULES[rule].needs_target:  # whose factor is that of the logits as the loss sees them
            grads[-1] += [p.grad for p in net.parameters()]
    assert_equal(*grads)


@each()
def test_a_model_called_beside_its_wrapper_in_training_is_refused(rule, options):
    net = wrap(Model(), rule, **options)
    if RULES[rule].has_feedback:
        with pytest.raises(ValueError, match="called without its wrapper, in training"):
            net.model(X)
    with torch.no_grad():
        net.model(X)
    net.eval()
    net.model(X).sum().backward()
    net.train()
    other = DirectFeedback(net.model, ["a"], "DFA", X[:2])  # a second wrapper of the same model
    F.cross_entropy(other(X), Y).backward()
    F.cross_entropy(net(X, target=Y), Y).backward()
    del other
    net.unwrap()(X).sum().backward()


@each()
def test_lazy_modules_get_their_shapes(rule, options):
    def lazy():
        return nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(3))

    torch.manual_seed(0)
    net = DirectFeedback(lazy().double(), ["2"], rule, X[:2], **options)
    assert not any(isinstance(module, LazyModuleMixin) for module in net.modules())
    assert net.model.training and torch.equal(net.model[1].running_mean, torch.zeros(5, dtype=torch.float64))
    torch.manual_seed(0)
    model = lazy().double()
    model(X[:2])
    model[1].reset_running_stats()
    same = DirectFeedback(model, ["2"], rule, X[:2], **options)
    for one, other in zip(net.state_dict().values(), same.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@each()
def test_on_the_meta_device_shapes_are_there_and_a_checkpoint_brings_the_values(rule, options):
    saved = wrap(Model(), rule, **options)
    with torch.device("meta"):
        model = Model()
    net = wrap(model, rule, X[:2].to("meta"), **options)
    assert all(tensor.is_meta for tensor in net.state_dict().values())
    net.to_empty(device="cpu").load_state_dict(saved.state_dict())
    assert_equal(gradients(net, net(X, target=Y)), gradients(saved, saved(X, target=Y)))


@each()
@pytest.mark.parametrize("points", [["0", "1"], ["0.1", "1"]], ids=["the blocks", "within a block"])
def test_blocks_that_were_compiled_before(rule, options, points):
    torch._dynamo.reset()
    grads = []
    for compiled in (False, True):
        torch.manual_seed(0)
        first = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh())
        model = nn.Sequential(first, nn.Sequential(nn.Linear(5, 5), nn.Tanh()), nn.Linear(5, 3)).double()
        if compiled:
            for block in model[:2]:
                block.compile(backend="aot_eager")
        net = DirectFeedback(model, points, rule, X[:2], **options)
        F.cross_entropy(net(X, target=Y), Y).backward()
        grads.append([p.grad for p in net.model.parameters()] + [B.detach() for B in net.matrices()])
    assert_equal(*grads)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_an_unwrapped_model_is_exported_and_scripted_without_a_trace_of_the_wrapper():
    for rule in ("DKP", "FA"):
        model = nn.Sequential(OrderedDict(a=nn.Linear(4, 5), b=nn.Tanh(), c=nn.Linear(5, 3))).double()
        expected = model(X)
        net = DirectFeedback(model, ["b"], rule, X[:2], **(IN_PLACE if rule == "DKP" else {}))
        exported = torch.export.export(net.eval().model, (X,))
        assert not any("feedback" in name for name in exported.state_dict)
        assert torch.equal(exported.module()(X), expected)
        bare = net.unwrap()
        scripted = torch.jit.script(bare)
        assert torch.equal(scripted(X), expected) and list(scripted.state_dict()) == list(bare.state_dict())
        assert not any(module._forward_hooks for module in bare.modules())
