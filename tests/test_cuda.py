"""What must hold on a GPU: `python -m pytest -m cuda`; skipped where there is none.

Every rule, update of B, memory format and precision against one process on the CPU in float64.
"""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import checkpoint
from torch import nn
from variants import VARIANTS, each

import main
from benchmarks.step_time import WARM_UP, capture, on_side_streams
from feedback import RULES, DirectFeedback
from models import AlexNet, ConvNet

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.filterwarnings("ignore:.*lazily.*"),
]
ROOT = Path(__file__).resolve().parent.parent
BATCH = 16
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}
TWICE, FLOOR = 2, 1e-3  # of bfloat16's error on the CPU


@pytest.fixture(autouse=True)
def exact_products():
    """float32 as on a CPU, without TF32."""
    kinds = torch.backends.cuda.matmul, torch.backends.cudnn
    allowed = [kind.allow_tf32 for kind in kinds]
    for kind in kinds:
        kind.allow_tf32 = False
    yield
    for kind, value in zip(kinds, allowed, strict=True):
        kind.allow_tf32 = value


def convnet():
    torch.manual_seed(0)
    return ConvNet(10)


def alexnet():
    torch.manual_seed(0)
    model = AlexNet(10)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # its mask differs from device to device
    return model


def images(side, batch=BATCH):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, side, side, generator=generator), torch.arange(batch) % 10


def wrapped(make, side, rule, options, device, dtype, memory_format):
    """A net, images and labels on `device`, the same on every device."""
    model = make().to(device, dtype).to(memory_format=memory_format)
    x, y = images(side)
    x = x.to(device, dtype).contiguous(memory_format=memory_format)
    torch.manual_seed(2)
    return DirectFeedback(model, model.points, rule, x[:1], **options), x, y.to(device)


def one_backward(make, side, rule, options, device, dtype, memory_format, bf16=False):
    """Logits, gradients and every B after a backward pass, in float64 on the CPU; biases before a batch norm aside."""
    net, x, y = wrapped(make, side, rule, options, device, dtype, memory_format)
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        logits = net(x, y)
        loss = F.cross_entropy(logits, y)
    loss.backward()
    found = {"logits": logits}
    found |= {f"grad {name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
    found |= {f"B {i}": B for i, B in enumerate(net.matrices())}
    return {name: t.detach().double().cpu() for name, t in found.items() if not name.endswith("conv.bias")}


@functools.cache
def on_the_cpu(make, side, name, bf16):
    """`one_backward` there: in bfloat16, or the reference in float64."""
    dtype = torch.float32 if bf16 else torch.float64
    return one_backward(make, side, *VARIANTS[name], "cpu", dtype, torch.contiguous_format, bf16)


def errors(got, exact):
    assert got.keys() == exact.keys()
    return {key: ((got[key] - exact[key]).norm() / exact[key].norm()).item() for key in exact}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("make", "side"), [(convnet, 32), (alexnet, 64)], ids=["ConvNet", "AlexNet"])
def test_a_backward_pass_equals_the_cpus(name, memory_format, dtype, make, side):
    rule, options = VARIANTS[name]
    got = one_backward(make, side, rule, options, "cuda", dtype, memory_format)
    found = errors(got, on_the_cpu(make, side, name, False))
    assert max(found.values()) < TOLERANCES[dtype], found


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
def test_bfloat16_errs_at_most_twice_as_much_as_on_the_cpu(name, memory_format):
    rule, options = VARIANTS[name]
    exact = on_the_cpu(convnet, 32, name, False)
    got = errors(one_backward(convnet, 32, rule, options, "cuda", torch.float32, memory_format, bf16=True), exact)
    on_cpu = errors(on_the_cpu(convnet, 32, name, True), exact)
    assert all(got[key] <= TWICE * on_cpu[key] + FLOOR for key in got), {key: (got[key], on_cpu[key]) for key in got}


@each("DKP-inplace", "LAS-inplace")
def test_b_in_place_follows_its_equation_where_it_lies(rule, options):
    net, x, y = wrapped(convnet, 32, rule, options, "cuda", torch.float64, torch.contiguous_format)
    twin, _, _ = wrapped(convnet, 32, rule, {}, "cuda", torch.float64, torch.contiguous_format)
    before, places = [B.clone() for B in net.matrices()], [B.data_ptr() for B in net.matrices()]
    for each_net in (net, twin):
        F.cross_entropy(each_net(x, y), y).backward()
    lr, decay = options["feedback_lr"], options["feedback_weight_decay"]
    for B, old, other in zip(net.matrices(), before, twin.matrices(), strict=True):
        torch.testing.assert_close(B, old - lr * (other.grad + decay * old))
    assert [B.data_ptr() for B in net.matrices()] == places


def sgd(net, lr=0.01):
    """The optimisers of main.py: SGD for the weights and KP's B, Adam for the other rules' B."""
    weights = net.parameters() if net.rule == "KP" else net.model.parameters()
    optimizers = [torch.optim.SGD(weights, lr, 0.9, nesterov=True, fused=True)]
    if net.rule != "KP" and any(B.requires_grad for B in net.matrices()):
        optimizers.append(torch.optim.Adam(net.feedback.parameters(), 1e-3, fused=True))
    return optimizers


def make_step(rule, options, dtype=torch.float32, streams=False):
    """A training step of ConvNet on one batch, and the net."""
    net, x, y = wrapped(convnet, 32, rule, options, "cuda", dtype, torch.channels_last)
    optimizers = sgd(net)
    if streams:
        on_side_streams(net.model)

    def step():
        F.cross_entropy(net(x, y), y).backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()

    return step, net


@each()
def test_a_step_waits_for_nothing(rule, options):
    step, _ = make_step(rule, options)
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_same_net(got, expected, tolerance):
    for (key, a), b in zip(got.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}")


@each()
@pytest.mark.parametrize("streams", [False, True], ids=["plain", "streams"])
def test_graph_replays_equal_eager_steps(rule, options, streams):
    step, net = make_step(rule, options, torch.float64, streams)
    replay = capture(step)
    for _ in range(5):
        replay()
    eager, expected = make_step(rule, options, torch.float64)
    for _ in range(WARM_UP + 5):
        eager()
    assert_same_net(net, expected, 1e-9)


@each("DFA", "DKP-inplace")
def test_side_streams_are_joined(rule, options):
    eager, expected = make_step(rule, options, torch.float64)
    for _ in range(200):
        eager()
    for _ in range(10):
        step, net = make_step(rule, options, torch.float64, streams=True)
        for _ in range(200):
            step()
        assert_same_net(net, expected, 1e-6)


@each()
def test_compiled_equals_eager(rule, options):
    step, net = make_step(rule, options, torch.float64)
    net.compile()
    eager, expected = make_step(rule, options, torch.float64)
    for _ in range(3):
        step()
        eager()
    assert_same_net(net, expected, 1e-8)


# --- the scripts


@pytest.fixture
def train(data_folder, tmp_path):
    """Run main.py on the GPU, on 40 images in batches of 12."""

    def run_main(*flags, out="run"):
        new = ("--data", data_folder, "--batch-size", 12, "--recipe", "original", "--out", tmp_path / out)
        where = () if "--resume" in flags else new
        return main.main([str(flag) for flag in (*where, *flags)])

    return run_main


@pytest.mark.parametrize("mode", RULES)
def test_a_run_goes_from_the_cpu_to_the_gpu_and_back(train, mode, tmp_path):
    for out, where in (("mixed", ("--no-cuda",)), ("cpu", ("--no-cuda",))):
        assert train("--train-mode", mode, "--epochs", 1, *where, out=out) == 0
    assert train("--resume", tmp_path / "mixed", "--epochs", 2) == 0
    assert train("--resume", tmp_path / "mixed", "--epochs", 3, "--no-cuda") == 0
    assert train("--resume", tmp_path / "cpu", "--epochs", 3, "--no-cuda") == 0
    got, expected = (checkpoint(tmp_path / out)["net"] for out in ("mixed", "cpu"))
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-3, atol=1e-4)


def processes(*flags):
    """A job of alexnet/main.py with a small net."""
    command = [sys.executable, str(ROOT / "tests" / "small_alexnet.py"), "--multiprocessing-distributed", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize("flags", [(), ("--nprocs-per-node", "2", "--dist-backend", "gloo")], ids=["nccl", "gloo"])
def test_processes_train_on_a_gpu(flags, tmp_path):
    small = (
        "--dataset",
        "synthetic",
        "--image-size",
        "64",
        "-b",
        "32",
        "--epochs",
        "1",
        "--out",
        str(tmp_path / "run"),
    )
    job = processes(*flags, *small)
    assert job.returncode == 0, job.stderr
    assert "see" in job.stdout, job.stdout
