"""What must hold on a GPU: `python -m pytest -m cuda`; skipped where there is none.

Every rule, update of B, memory format and precision against one process on the CPU in float64.
"""

import copy
import functools
import json
import subprocess
import sys
import tempfile
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
from training.run import DIVERGED, Run

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.filterwarnings("ignore:.*lazily.*"),
]
ROOT = Path(__file__).resolve().parent.parent
BATCH = 16
LR = 2.0**-7  # of all rates here, exact in float32, in which a GPU keeps them
EXACT = {
    name: (rule, options | {"feedback_lr": LR} if "feedback_lr" in options else options)
    for name, (rule, options) in VARIANTS.items()
}
SAME_EVERYWHERE = [name for name, rule in RULES.items() if not rule.perturbs]  # other devices draw other numbers
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}
TWICE, FLOOR = 2, 1e-3  # of bfloat16's error on the CPU
ROUNDING = torch.finfo(torch.bfloat16).eps  # of a bias's gradient, whose few numbers may be right on the CPU by chance


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


@functools.cache
def an_alexnet():
    torch.manual_seed(0)
    model = AlexNet(10)
    model.fc1.linear, model.fc2.linear, model.fc3 = nn.Linear(9216, 64), nn.Linear(64, 64), nn.Linear(64, 10)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # its mask differs from device to device
    return model


def alexnet():
    """Its five convolutions, with fc layers of 64 features."""
    return copy.deepcopy(an_alexnet())


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
        logits = net(x, target=y)
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
    return one_backward(make, side, *EXACT[name], "cpu", dtype, torch.contiguous_format, bf16)


def errors(got, exact):
    assert got.keys() == exact.keys()
    return {key: ((got[key] - exact[key]).norm() / exact[key].norm()).item() for key in exact}


@functools.cache
def of_plain_pytorch(make, side, dtype, memory_format):
    """The largest error of a BP pass on the GPU: cuDNN's 5x5 convolutions are off by 1e-4 in contiguous float32."""
    got = one_backward(make, side, "BP", {}, "cuda", dtype, memory_format)
    return max(errors(got, on_the_cpu(make, side, "BP", False)).values())


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("make", "side"), [(convnet, 32), (alexnet, 64)], ids=["ConvNet", "AlexNet"])
def test_a_backward_pass_equals_the_cpus(name, memory_format, dtype, make, side):
    got = one_backward(make, side, *EXACT[name], "cuda", dtype, memory_format)
    found = errors(got, on_the_cpu(make, side, name, False))
    plain = of_plain_pytorch(make, side, dtype, memory_format)
    assert plain < 1e-3 and max(found.values()) < max(TOLERANCES[dtype], TWICE * plain), found


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
def test_bfloat16_errs_at_most_twice_as_much_as_on_the_cpu(name, memory_format):
    exact = on_the_cpu(convnet, 32, name, False)
    got = errors(one_backward(convnet, 32, *EXACT[name], "cuda", torch.float32, memory_format, bf16=True), exact)
    on_cpu = errors(on_the_cpu(convnet, 32, name, True), exact)
    floors = {key: ROUNDING if key.endswith(".bias") else FLOOR for key in got}
    wrong = {key: (got[key], on_cpu[key]) for key in got if got[key] > TWICE * on_cpu[key] + floors[key]}
    assert not wrong


@each("DKP-inplace", "LAS-inplace")
def test_b_in_place_follows_its_equation_where_it_lies(rule, options):
    net, x, y = wrapped(convnet, 32, rule, options, "cuda", torch.float64, torch.contiguous_format)
    twin, _, _ = wrapped(convnet, 32, rule, {}, "cuda", torch.float64, torch.contiguous_format)
    net.feedback_lr = LR
    before, places = [B.clone() for B in net.matrices()], [B.data_ptr() for B in net.matrices()]
    for each_net in (net, twin):
        F.cross_entropy(each_net(x, target=y), y).backward()
    decay = options["feedback_weight_decay"]
    for B, old, other in zip(net.matrices(), before, twin.matrices(), strict=True):
        torch.testing.assert_close(B, old - LR * (other.grad + decay * old))
    assert [B.data_ptr() for B in net.matrices()] == places


def make_step(rule, options, dtype=torch.float32, streams=False, capturable=False, lr=LR):
    """A training step of ConvNet on one batch by main.py's optimisers, the net, and them."""
    options = options | {"feedback_lr": LR / 8} if "feedback_lr" in options else options
    net, x, y = wrapped(convnet, 32, rule, options, "cuda", dtype, torch.channels_last)
    weights = net.parameters() if rule == "KP" else net.model.parameters()
    optimizers = [torch.optim.SGD(weights, lr, 0.9, nesterov=True, fused=True)]
    if rule != "KP" and any(B.requires_grad for B in net.matrices()):
        optimizers.append(torch.optim.Adam(net.feedback.parameters(), LR / 8, fused=True, capturable=capturable))
    if streams:
        on_side_streams(net.model)

    def step():
        F.cross_entropy(net(x, target=y), y).backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()

    return step, net, optimizers


@each()
def test_a_step_waits_for_nothing(rule, options):
    step, _, _ = make_step(rule, options)
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
def test_graph_replays_equal_eager_steps_and_obey_new_learning_rates(rule, options, streams):
    step, net, optimizers = make_step(rule, options, torch.float64, streams, capturable=True)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], device="cuda")
    eager, expected, of_eager = make_step(rule, options, torch.float64)
    replay = capture(step)
    for _ in range(WARM_UP):
        eager()
    for lr in (LR, LR / 4, LR / 4, 0.0, LR / 2):
        for optimizer, other in zip(optimizers, of_eager, strict=True):
            other.param_groups[0]["lr"] = lr
            optimizer.param_groups[0]["lr"].fill_(lr)
        if "feedback_lr" in options:
            net.feedback_lr = expected.feedback_lr = lr / 8
        replay()
        eager()
    assert_same_net(net, expected, 1e-9)


@each("DFA", "DKP-inplace")
def test_side_streams_are_joined(rule, options):
    eager, expected, _ = make_step(rule, options, torch.float64, lr=LR / 8)
    for _ in range(200):
        eager()
    for _ in range(10):
        step, net, _ = make_step(rule, options, torch.float64, streams=True, lr=LR / 8)
        for _ in range(200):
            step()
        assert_same_net(net, expected, 1e-6)


@pytest.mark.parametrize(
    ("name", "mode"),
    [*((name, None) for name in ("BP", "DFA", "DKP-optimizer", "DKP-inplace")), ("DKP-optimizer", "reduce-overhead")],
)
def test_compiled_equals_eager(name, mode):
    rule, options = EXACT[name]
    step, net, _ = make_step(rule, options, torch.float64)
    net.compile(mode=mode)
    eager, expected, _ = make_step(rule, options, torch.float64)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        step()
        eager()
    assert_same_net(net, expected, 1e-7)


@each()
def test_found_inf_leaves_weights_and_b_as_they_are(rule, options):
    step, net, optimizers = make_step(rule, options)
    step()
    before = copy.deepcopy({**dict(net.named_parameters()), **dict(net.feedback.named_buffers())})
    flag = torch.ones((), device="cuda")
    for optimizer in optimizers:
        optimizer.found_inf = flag
    net.found_inf = flag
    step()
    for name, value in before.items():
        assert torch.equal(value, net.state_dict()[name if name in net.state_dict() else f"feedback.{name}"]), name


# --- the scripts


@pytest.fixture
def train(data_folder, tmp_path):
    """Run main.py on the GPU, on 40 images in batches of 12."""

    def run_main(*flags, out="run"):
        new = ("--data", data_folder, "--batch-size", 12, "--recipe", "original", "--out", tmp_path / out)
        where = () if "--resume" in flags else new
        return main.main([str(flag) for flag in (*where, *flags)])

    return run_main


@pytest.mark.parametrize(("mode", "flags"), [*((mode, ()) for mode in SAME_EVERYWHERE), ("DKP", ("--cuda-graph",))])
def test_a_run_goes_from_the_cpu_to_the_gpu_and_back(train, mode, flags, tmp_path):
    rule = ("--train-mode", mode, "--tf32", "off", "--lr", 1e-3)
    for out in ("mixed", "cpu"):
        assert train(*rule, "--epochs", 1, "--no-cuda", out=out) == 0
    assert train("--resume", tmp_path / "mixed", "--epochs", 3, *flags) == 0
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    assert config["resumed"][0]["hardware"] == torch.cuda.get_device_name()
    assert config["resumed"][0]["versions"]["cuda"] == torch.version.cuda
    assert train("--resume", tmp_path / "mixed", "--epochs", 4, "--no-cuda") == 0
    assert train("--resume", tmp_path / "cpu", "--epochs", 4, "--no-cuda") == 0
    got, expected = (checkpoint(tmp_path / out)["net"] for out in ("mixed", "cpu"))
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-2, atol=1e-3, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("mode", ["BP", "DKP", "LAS"])
@pytest.mark.parametrize("flags", [(), ("--cuda-graph",)], ids=["eager", "graph"])
def test_a_deterministic_run_resumes_bit_for_bit(train, mode, flags, tmp_path):
    try:
        rule = ("--train-mode", mode, "--deterministic", "--precision", "bf16", "--channels-last", *flags)
        assert train(*rule, "--epochs", 2, out="straight") == 0
        assert train(*rule, "--epochs", 1) == 0
        assert train("--resume", tmp_path / "run", "--epochs", 2, *flags) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    got, expected = (checkpoint(tmp_path / out)["net"] for out in ("run", "straight"))
    for key, value in expected.items():
        if flags:  # the resumed run warms up anew, and a graph may take other algorithms
            torch.testing.assert_close(got[key], value, rtol=1e-2, atol=1e-3)
        else:
            assert torch.equal(got[key], value), key


@pytest.mark.parametrize("mode", [("DKP",), ("DKP", "--b-update", "inplace"), ("KP",)], ids=" ".join)
@pytest.mark.parametrize("flags", [(), ("--cuda-graph",)], ids=["eager", "graph"])
def test_a_loss_that_is_not_finite_updates_nothing(train, mode, flags, tmp_path, change_training_batches, capsys):
    assert train("--train-mode", *mode, "--batch-size", 4, "--epochs", 1, *flags) == 0
    kept, nets = checkpoint(tmp_path / "run"), []

    def with_a_nan(batches):
        for step, (x, y, together) in enumerate(batches, start=1):
            if step == 7:
                nets.append({key: value.clone() for key, value in held[-1].net.state_dict().items()})
                x = x * torch.nan
            yield x, y, together

    held = []
    change_training_batches(with_a_nan)
    watch = Run.watch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "watch", lambda run, *given: (held.append(run), watch(run, *given))[1])
        assert train("--resume", tmp_path / "run", "--epochs", 2, *flags) == DIVERGED
    assert "the loss is nan at epoch 2, step 7: stopped before the update" in capsys.readouterr().err
    assert checkpoint(tmp_path / "run")["epoch"] == kept["epoch"] == 1
    after = held[-1].net.state_dict()
    for key, value in nets[0].items():
        if "running" not in key and "num_batches" not in key:  # of a batch norm, which saw the NaN
            assert torch.equal(after[key], value), key


@functools.cache
def loss_of(update, *launcher):
    """Training loss of an epoch of a small AlexNet in a job of its own: python, or it with `launcher`."""
    small = [*launcher, str(ROOT / "tests" / "small_alexnet.py"), "--b-update", update]
    flags = ["--dataset", "synthetic", "--image-size", "64", "-b", "32", "--limit-batches", "20", "--epochs", "1"]
    backend = ["--dist-backend", "nccl" if launcher[-1] == "1" else "gloo"] if launcher else []
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, *small, *flags, *backend, "--out", f"{out}/run"]
        job = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert job.returncode == 0, job.stderr
    return float(job.stdout.split("train loss ")[1].split(",")[0])


@pytest.mark.parametrize(("processes", "update"), [("1", "optimizer"), ("2", "optimizer"), ("2", "inplace")])
def test_processes_on_one_gpu(processes, update):
    """NCCL takes one; gloo takes two, and equals it but for rounding."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes)
    assert loss_of(update, *torchrun) == pytest.approx(loss_of(update), rel=0.05)


def test_more_processes_than_gpus_are_refused():
    script = [sys.executable, str(ROOT / "alexnet" / "main.py"), "--multiprocessing-distributed", "--nprocs-per-node"]
    job = subprocess.run([*script, str(torch.cuda.device_count() + 1)], capture_output=True, text=True)
    assert job.returncode == 2 and "expected at most the" in job.stderr
