"""What each process of tests/test_pipeline.py runs; a module of its own, so that spawned processes can import it."""

import copy
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import SplitPoint, pipeline

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from variants import VARIANTS

from feedback import RULES, DirectFeedback
from feedback.pipeline import Pipeline, parts_of
from models import VGG, ConvNet
from training.launch import LAST_TENSORS_S

DIRECT = {name: (rule, options) for name, (rule, options) in VARIANTS.items() if not RULES[rule].chained}
POINTS = ("one", "two", "three")
CUTS = {1: (), 2: ("two",), 3: ("one", "two")}
BATCH, STEPS = 9, 2
EXAMPLE = torch.zeros(2, 3, 8, 8, dtype=torch.float64)


class Net(nn.Module):
    """Three blocks and a last layer, one after the other, with something between the second and the third."""

    def __init__(self, norm=True):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 4, 3), *[nn.BatchNorm2d(4)] * norm, nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(4, 5, 3), *[nn.BatchNorm2d(5)] * norm, nn.ReLU())
        self.pool = nn.Sequential(nn.MaxPool2d(2), nn.Flatten())
        self.three = nn.Sequential(nn.Linear(20, 7), nn.ReLU())
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        return self.head(self.three(self.pool(self.two(self.one(x)))))


def batch(step, images=BATCH, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(images, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (images,), generator=generator)


def whole(variant, norm=True, memory_format=torch.contiguous_format, autocast=None):
    """The net in one process: in float64, or with `autocast` in float32."""
    rule, options = DIRECT[variant]
    torch.manual_seed(0)
    dtype = torch.float64 if autocast is None else torch.float32
    model = Net(norm).to(dtype=dtype, memory_format=memory_format)
    return DirectFeedback(model, POINTS, rule, EXAMPLE.to(dtype=dtype, memory_format=memory_format), **options)


def optimizers_of(net):
    """SGD over the weights, and Adam over what of B learns by an optimiser."""
    of_b = [B for B in net.feedback.parameters() if B.requires_grad]
    return [
        torch.optim.SGD(net.model.parameters(), 0.1, momentum=0.9),
        *([torch.optim.Adam(of_b, 0.01)] if of_b else []),
    ]


def train_alone(net, micro_batches, images=BATCH, autocast=None):
    """Accumulate micro-batches in one process; return the loss of each step."""
    optimizers, losses = optimizers_of(net), []
    for step in range(STEPS):
        x, y = batch(step, images, next(net.parameters()).dtype)
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses.append(torch.zeros((), dtype=torch.float64))
        for xi, yi in zip(x.tensor_split(micro_batches), y.tensor_split(micro_batches), strict=True):
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                loss = F.cross_entropy(net(xi, target=yi), yi) * (len(yi) / len(y))
            loss.backward()
            losses[-1] += loss.detach()
        for optimizer in optimizers:
            optimizer.step()
    return losses


def train_stage(stage, micro_batches, share=slice(None), images=BATCH):
    """The same through the pipeline; return the last stage's losses."""
    optimizers, losses = optimizers_of(stage.net), []
    for step in range(STEPS):
        x, y = batch(step, images, next(stage.net.parameters()).dtype)
        for optimizer in optimizers:
            optimizer.zero_grad()
        x, y = x[share] if stage.stage == 0 else None, y[share]
        result = stage.step(x, y, micro_batches=micro_batches)
        losses += [] if result is None else [result[1]]
        for optimizer in optimizers:
            optimizer.step()
    return losses


def parts(model, stages, splitter):
    """The net in `stages` parts, by `parts_of` or by torch's own splitter."""
    if not splitter:
        return parts_of(model, CUTS[stages])
    after = {"one": "two", "two": "three"}
    spec = {after[cut]: SplitPoint.BEGINNING for cut in CUTS[stages]}
    split = pipeline(model, (EXAMPLE,), split_spec=spec)
    return [split.get_stage_module(number) for number in range(stages)]


def stage_of(net, variant, stages, group, splitter=False, **options):
    """This process's stage of a copy of `net`."""
    rule, of_rule = DIRECT[variant]
    dtype, memory_format = next(net.parameters()).dtype, options.pop("memory_format", torch.contiguous_format)
    example = EXAMPLE.to(dtype=dtype, memory_format=memory_format)
    stage = Pipeline(parts(net.model, stages, splitter), POINTS, rule, example, group=group, **of_rule, **options)
    state = net.state_dict()
    stage.net.load_state_dict({key: state[key] for key in stage.net.state_dict()})
    return stage


def together(stage, value):
    """What each stage has, on every stage."""
    values = [None] * stage.stages
    dist.all_gather_object(values, value, stage.group)
    return values


def run_nets(rank, world, port, folder):
    """ConvNet and VGG in two stages; the last stage writes whether they equal one process."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    x, y = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double(), torch.arange(4)
    equal = {}
    for make, cut in ((ConvNet, "conv2"), (VGG, "conv3")):
        torch.manual_seed(0)
        model = make(10).double()
        torch.manual_seed(1)
        alone = DirectFeedback(copy.deepcopy(model), make.points, "DKP", x)
        torch.manual_seed(1)
        stage = Pipeline(parts_of(model, [cut]), make.points, "DKP", x[:2])
        for piece, labels in zip(x.split(2), y.split(2), strict=True):
            (F.cross_entropy(alone(piece), labels) / 2).backward()
        stage.step(x, y, micro_batches=2)
        grads = {name: parameter.grad for name, parameter in alone.named_parameters()}
        own = [torch.allclose(p.grad, grads[name], rtol=1e-11) for name, p in stage.net.named_parameters()]
        equal[make.__name__] = bool(own) and all(own)
    torch.save(equal, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    time.sleep(LAST_TENSORS_S)


def run_replicas(rank, world, port, folder):
    """Two replicas of two stages, on half of each batch; without batch norms, which compare the images of a replica."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "stage"))
    results = {}
    for name in DIRECT:
        stage = stage_of(
            whole(name, norm=False), name, 2, mesh["stage"].get_group(), replicas=mesh["replica"].get_group()
        )
        train_stage(stage, 1, slice(0, 4) if rank < 2 else slice(4, 8), images=8)
        states = together(stage, stage.net.state_dict())
        results[name] = {key: value for state in states for key, value in state.items()}
        if "inplace" in name:  # one replica's images are not finite: no replica steps B
            before = [B.clone() for B in stage.net.matrices()]
            x, y = batch(0, 4)
            stage.step(x * (torch.nan if rank < 2 else 1) if stage.stage == 0 else None, y)
            assert all(torch.equal(B, old) for B, old in zip(stage.net.matrices(), before, strict=True)), name
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    time.sleep(LAST_TENSORS_S)


CASES = [(name, stages, m, {}) for name in DIRECT for stages in CUTS for m in (1, 2, 4)]
CASES += [(name, 3, 2, {"memory_format": torch.channels_last}) for name in DIRECT]
CASES += [(name, 3, 2, {"autocast": torch.bfloat16}) for name in DIRECT]
SPLIT_BY_TORCH = [(name, 3, 2, {"splitter": True}) for name in DIRECT]


def run(rank, world, port, folder, cases):
    """Train each case (variant, stages, micro-batches, options); write what each stage was left with."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    groups = {stages: dist.new_group(list(range(stages))) for stages in range(1, world + 1)}
    results = {}
    if rank < 2:
        rule, options = DIRECT["DKP-optimizer"]
        model = Net().double()
        torch.manual_seed(3)
        of_whole = DirectFeedback(model, POINTS, rule, EXAMPLE, **options).feedback.state_dict()
        torch.manual_seed(3)
        stage = Pipeline(parts_of(model, CUTS[2]), POINTS, rule, EXAMPLE, group=groups[2], **options)
        own = stage.net.feedback.state_dict()
        assert own and all(torch.equal(B, of_whole[key]) for key, B in own.items())
    for name, stages, micro_batches, given in cases:
        options = dict(given)
        if rank < stages:
            net = whole(name, **{key: options[key] for key in ("memory_format", "autocast") if key in options})
            stage = stage_of(net, name, stages, groups[stages], **options)
            losses = train_stage(stage, micro_batches)
            states = together(stage, stage.net.state_dict())
            stage.net.eval()
            logits = None
            if not options.get("splitter"):  # torch's trace of a net has its training mode in it
                logits = stage.forward(batch(99, dtype=next(net.parameters()).dtype)[0] if rank == 0 else None, BATCH)
            merged = {key: value for state in states for key, value in state.items()}
            if stage.last:
                results[name, stages, micro_batches, *given] = {"state": merged, "logits": logits, "losses": losses}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    time.sleep(LAST_TENSORS_S)
