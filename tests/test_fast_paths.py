"""What makes a step cheap changes no gradient, and holds no more memory than it says."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.step_time import DYNAMO, VARIANTS, Cell, chart, make_step, on_side_streams, peak_bytes, side_stream
from feedback import DirectFeedback, functional, layout, wrapper
from models import ConvNet

EAGER = ("contiguous", "fp32", "eager")


@pytest.mark.parametrize(("batch", "rows"), [(64, 16), (50, 10), (13, 13), (7, 7), (1, 1), (34, 34)])
def test_products_over_few_images_equal_the_plain_ones(batch, rows):
    torch.manual_seed(0)
    error, feedback, h = (torch.randn(*shape, dtype=torch.float64) for shape in ((batch, 10), (10, 600), (batch, 600)))
    assert layout.images_at_a_time(feedback, batch) == rows
    torch.testing.assert_close(functional.learning_signal(error, feedback), error @ feedback)
    old, unset = feedback.clone(), torch.full_like(feedback, torch.nan)
    torch.testing.assert_close(functional.add_correlation(unset, error, h), error.T @ h)
    functional.add_correlation(feedback, error, h, beta=0.9, alpha=-0.1)
    torch.testing.assert_close(feedback, 0.9 * old - 0.1 * error.T @ h)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_over_the_whole_batch(dtype):
    """At most twice the error of the plain product, which rounds once."""
    torch.manual_seed(0)
    error, h = torch.randn(512, 10, dtype=torch.float64), torch.randn(512, 300, dtype=torch.float64)
    exact = error.T @ h
    half_error, half_h = error.to(dtype), h.to(dtype)
    got = functional.add_correlation(torch.empty(10, 300, dtype=dtype), half_error, half_h)
    plain = half_error.T @ half_h
    assert (got.double() - exact).norm() <= 2 * (plain.double() - exact).norm()


@pytest.mark.parametrize("rule", ["DFA", "DKP"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_fused_optimisers_equal_plain_ones(rule, memory_format):
    x, y = torch.randn(8, 3, 32, 32).to(memory_format=memory_format), torch.arange(8)
    found = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = ConvNet().to(memory_format=memory_format)
        net = DirectFeedback(model, model.points, rule, x[:1])
        optimizers = [torch.optim.SGD(model.parameters(), 0.01, 0.9, nesterov=True, weight_decay=1e-3, fused=fused)]
        if rule == "DKP":
            optimizers.append(torch.optim.Adam(net.feedback.parameters(), 1e-3, weight_decay=1e-3, fused=fused))
        for _ in range(3):
            F.cross_entropy(net(x), y).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        found.append(list(net.parameters()))
    for fast, plain in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_every_variant_compiles_in_one_process(monkeypatch):
    """As on a GPU, where the benchmark compiles them all: none may be given another's graph."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="eager"))
    with torch._dynamo.config.patch(**DYNAMO):
        for variant in VARIANTS:
            way = ("contiguous", "fp32", "compiled")
            step = make_step(Cell("ConvNet", 2, [way]), variant, way, torch.device("cpu"))
            step()
            step()


@pytest.mark.parametrize("variant", ["DFA", "DKP optimizer", "DKP inplace"])
def test_matrices_that_eager_takes_in_pieces_compile_without_a_graph_break(variant):
    torch._dynamo.reset()
    model, x = ConvNet(), torch.randn(32, 3, 32, 32)
    net = DirectFeedback(model, model.points, example=x[:1], **VARIANTS[variant])
    assert layout.images_at_a_time(net.matrices()[0].flatten(1), len(x)) < len(x)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    F.cross_entropy(compiled(x), torch.arange(32) % 10).backward()
    assert model.conv1.conv.weight.grad.norm() > 0


class FakeStream:
    """In the place of a CUDA stream: knows its name, and what it has waited for."""

    current: "FakeStream"

    def __init__(self, name="side"):
        self.name, self.waited_for = name, []

    def wait_stream(self, other):
        self.waited_for.append(other)


def test_each_block_runs_on_a_stream_of_its_own(monkeypatch):
    """The bookkeeping alone: there need be no GPU. A point is made on its block's stream, before the way home."""
    home = FakeStream("home")
    FakeStream.current = home
    uses = []
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: FakeStream.current)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(FakeStream, "current", stream))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: uses.append((x.data_ptr(), stream)))
    model = ConvNet()
    net = DirectFeedback(model, model.points, "DFA", torch.zeros(2, 3, 32, 32))
    made_on, ran_on, outputs = [], {}, {}
    make = wrapper.feedback_point
    monkeypatch.setattr(
        wrapper, "feedback_point", lambda *a, **k: (made_on.append(FakeStream.current), make(*a, **k))[1]
    )
    for name in ("conv1.conv", "conv2.conv", "pool", "fc1.linear", "fc2"):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda m, i, out, name=name: ran_on.__setitem__(name, FakeStream.current))
    side_stream.cache_clear()
    on_side_streams(model)
    side_stream.cache_clear()
    for name in ("conv1", "conv2", "fc1"):
        model.get_submodule(name).register_forward_hook(
            lambda m, i, h, name=name: outputs.__setitem__(name, h.data_ptr())
        )
    net(torch.zeros(2, 3, 32, 32))
    sides = [ran_on["conv1.conv"], ran_on["conv2.conv"], ran_on["fc1.linear"]]
    assert len({home, *sides}) == 4
    assert made_on == sides
    assert ran_on["pool"] is ran_on["fc2"] is FakeStream.current is home
    assert home.waited_for == sides
    assert all(side.waited_for == [home] for side in sides)
    # no memory that another stream still reads is given away: a block's output, at home and in the next block
    assert all((outputs[name], home) in uses for name in outputs)
    assert (outputs["conv1"], sides[1]) in uses


def test_a_matrix_larger_than_the_cache_or_of_rows_below_a_page_takes_all_images_at_once():
    assert layout.images_at_a_time(torch.empty(100, 46656), 64) == 64
    assert layout.images_at_a_time(torch.empty(10, 128), 64) == 64


@pytest.mark.parametrize("options", [{}, {"update": "inplace", "feedback_lr": 0.1, "feedback_weight_decay": 0.01}])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_step_by_few_images_equals_the_plain_step(monkeypatch, options, memory_format):
    x, y = torch.randn(32, 3, 32, 32, dtype=torch.float64), torch.arange(32) % 10
    x = x.to(memory_format=memory_format)
    found = []
    for cached in (layout.CACHED_BYTES, 0):
        monkeypatch.setattr(layout, "CACHED_BYTES", 2 * cached)  # float64
        torch.manual_seed(0)
        model = ConvNet().double().to(memory_format=memory_format)
        net = DirectFeedback(model, model.points, "DKP", x[:1], **options)
        assert (layout.images_at_a_time(net.matrices()[0], 32) == 32) == (cached == 0)
        F.cross_entropy(net(x), y).backward()
        found.append([value for p in net.parameters() for value in (p.detach(), p.grad)])
    for fast, plain in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain)


def test_no_learning_signal_waits_for_its_block():
    """A DFA step holds at most what a BP step holds, DKP in place the same, and DKP's optimizer grad_B besides."""
    model = ConvNet()
    size = sum(B.nbytes for B in DirectFeedback(model, model.points, "DFA", torch.zeros(1, 3, 32, 32)).matrices())
    peak = {}
    for variant in ("BP", "DFA", "DKP inplace", "DKP optimizer"):
        step = make_step(Cell("ConvNet", 16, [EAGER]), variant, EAGER, torch.device("cpu"))
        step()
        peak[variant] = peak_bytes(step, torch.device("cpu"))
    assert peak["DFA"] <= peak["BP"]
    assert peak["DKP inplace"] <= peak["BP"]
    assert peak["DKP inplace"] < peak["DKP optimizer"] <= peak["BP"] + size


NO_KERNEL = ("empty", "new_empty", "detach", "_record_function", "_local_scalar")


class CountKernels(TorchDispatchMode):
    """Counts operators that compute: no views, no memory without values."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        view = any(
            argument.alias_info is not None and not argument.alias_info.is_write
            for argument in operator._schema.arguments
        )
        name = operator.name().partition("::")[2]
        if not view and not name.startswith(NO_KERNEL):
            self.names.append(name)
        return out


@pytest.mark.parametrize(
    ("rule", "options", "kernels"),
    [("BP", {}, 32), ("DFA", {}, 32), ("DKP", {}, 37), ("DKP", {"update": "inplace", "feedback_lr": 0.1}, 35)],
)
def test_a_step_computes_nothing_but_what_the_rule_is_made_of(monkeypatch, rule, options, kernels):
    monkeypatch.setattr(layout, "CACHED_BYTES", 0)  # as on a GPU: products of the whole batch
    torch.manual_seed(0)
    model = ConvNet()
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
    net = DirectFeedback(model, model.points, rule, x, **options)
    optimizers = [torch.optim.SGD(model.parameters(), 0.01, 0.9, nesterov=True, fused=True)]
    if net.matrices() and net.matrices()[0].requires_grad:
        optimizers.append(torch.optim.Adam(net.feedback.parameters(), 1e-3, fused=True))
    for _ in range(2):  # the first makes the optimisers' state
        for optimizer in optimizers:
            optimizer.zero_grad()
        with CountKernels() as count:
            F.cross_entropy(net(x, target=y), y).backward()
            for optimizer in optimizers:
                optimizer.step()
    assert len(count.names) == kernels, " ".join(count.names)


def test_the_chart_of_step_times_has_a_bar_for_every_variant(tmp_path):
    row = {"net": "ConvNet", "batch": 64, "way": "channels_last fp32 eager", "to_BP": [1.0, 1.0, 1.0]}
    chart([row | {"variant": variant} for variant in VARIANTS], "title", tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 0
