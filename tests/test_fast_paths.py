"""What makes a step cheap changes no gradient, and holds no more memory than it says."""

import functools

import pytest
import torch
import torch.nn.functional as F

from benchmarks.step_time import DYNAMO, VARIANTS, Cell, make_step, peak_bytes
from feedback import DirectFeedback, functional
from models import ConvNet

EAGER = ("contiguous", "fp32", "eager")


@pytest.mark.parametrize(("batch", "rows"), [(64, 16), (50, 10), (13, 13), (7, 7), (1, 1), (34, 34)])
def test_products_over_few_images_equal_the_plain_ones(batch, rows):
    torch.manual_seed(0)
    error, feedback, h = (torch.randn(*shape, dtype=torch.float64) for shape in ((batch, 10), (10, 600), (batch, 600)))
    assert functional.images_at_a_time(feedback, batch) == rows
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


def test_a_matrix_larger_than_the_cache_or_of_rows_below_a_page_takes_all_images_at_once():
    assert functional.images_at_a_time(torch.empty(100, 46656), 64) == 64
    assert functional.images_at_a_time(torch.empty(10, 128), 64) == 64


@pytest.mark.parametrize("options", [{}, {"update": "inplace", "feedback_lr": 0.1, "feedback_weight_decay": 0.01}])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_step_by_few_images_equals_the_plain_step(monkeypatch, options, memory_format):
    x, y = torch.randn(32, 3, 32, 32, dtype=torch.float64), torch.arange(32) % 10
    x = x.to(memory_format=memory_format)
    found = []
    for cached in (functional.CACHED_BYTES, 0):
        monkeypatch.setattr(functional, "CACHED_BYTES", 2 * cached)  # float64
        torch.manual_seed(0)
        model = ConvNet().double().to(memory_format=memory_format)
        net = DirectFeedback(model, model.points, "DKP", x[:1], **options)
        assert (functional.images_at_a_time(net.matrices()[0], 32) == 32) == (cached == 0)
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
