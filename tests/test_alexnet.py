"""alexnet/main.py: its command line, and (slow, as CI runs them) jobs of several processes from start to end."""

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import loaded
from PIL import Image
from small_alexnet import SmallNet

from models import AlexNet
from training import batches
from training.checkpoint import TRAINED, load_checkpoint
from training.data import CIFAR, epoch_order
from training.image_files import ImageFiles
from training.launch import free_port
from training.run import DIVERGED
from training.synthetic import synthetic_images

ROOT = Path(__file__).resolve().parent.parent


# --- the command line


def test_the_originals_command_line_parses(alexnet):
    line = "-a alexnet --dist-url tcp://127.0.0.1:8080 --dist-backend gloo --multiprocessing-distributed --world-size 1"
    args = alexnet.parse_arguments(
        [*line.split(), "--rank", "0", "DATA", "--dataset", "cifar100", "--train-mode", "DFA", "--recipe", "original"]
    )
    assert (args.data, args.epochs, args.batch_size, args.lr, args.momentum, args.wd) == (
        "DATA",
        90,
        256,
        0.1,
        0.9,
        1e-4,
    )
    args = alexnet.parse_arguments(["--recipe", "original"])
    assert (args.data, args.train_mode, args.b_lr, args.b_wd, args.gamma) == ("data", "DKP", 0.01, 1e-4, 1.0)
    dfa = alexnet.parse_arguments(["--train-mode", "DFA", "--recipe", "original"])
    assert (args.b_scale, dfa.b_scale, dfa.recipe) == (0, 1, "original")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--dist-backend nccl", "nccl needs a GPU"),
        ("--image-size 32", "got 32, expected 63 or more"),
        ("-b 3 --multiprocessing-distributed --nprocs-per-node 2", "expected 2 or more for each of 2 processes"),
        ("--rank 3", "--rank: needs --multiprocessing-distributed"),
        ("--dist-url env://", "--dist-url: needs --multiprocessing-distributed"),
        ("--multiprocessing-distributed --rank 1", "--rank: got 1, expected --world-size with it"),
        ("--nprocs-per-node 2", "needs --multiprocessing-distributed"),
        ("--world-size 2 --rank 0", "needs --dist-url"),
        ("--world-size 2 --dist-url tcp://127.0.0.1:1 --rank 2", "got 2, expected 0 to 1"),
        ("--gpu 5", "there are 0 GPUs"),
        ("--momentum 1", "expected less than 1"),
        ("-e", "needs --resume"),
        ("--start-epoch 90", "expected less than --epochs 90"),
        ("--pretrained", "unrecognized"),
        ("--train-mode BP --gamma 0.5", "needs --train-mode DKP, LAS, FDFA, HEAD or LOCAL, got BP"),
        ("--resume nowhere", "there is no nowhere"),
        ("--mode DFA", "did you mean --train-mode?"),
        ("--save-mode", "did you mean --save-model?"),
        ("--pipeline-stages 2 --train-mode BP", "got --train-mode BP, expected DFA, DKP, LAS, DRTP"),
        ("--pipeline-stages 8", "got 8, but 7 blocks have feedback"),
        ("--pipeline-stages 1", "got 1, expected 2 or more"),
        ("--pipeline-stages 2 --micro-batches 3", "got 3, expected a divisor of -b 256"),
        ("--pipeline-stages 2 --micro-batches 128 -b 128", "expected 2 or more for each of 1 replicas' micro-batches"),
        ("--compile-mode default", "--compile-mode needs --compile"),
        ("--compile --compile-mode reduce-overhead --b-update inplace", "does not go with --b-update inplace"),
        ("--pipeline-stages 2 --compile", "--compile does not go with --pipeline-stages"),
        ("--micro-batches 2", "--micro-batches needs --pipeline-stages"),
    ],
)
def test_bad_command_lines_are_refused(alexnet, capsys, monkeypatch, line, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit) as exit_:
        alexnet.parse_arguments(line.split())
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.count("\n") == 1 and message in error


def test_the_best_recipes_are_what_the_search_found_but_for_dkps_and_batch_norms(alexnet):
    """The search's 100 steps do not show what becomes unstable later: docs/results-alexnet.md."""
    searched = json.loads((ROOT / "benchmarks" / "results" / "cifar100-alexnet64-search" / "recipe.json").read_text())
    assert len(searched) == 6 and searched.pop("DKP")
    for mode, flags in searched.items():
        best = alexnet.parse_arguments(["--train-mode", mode])
        winner = alexnet.parse_arguments(["--recipe", "original", "--train-mode", mode, *flags])
        assert vars(best) == vars(winner) | {"recipe": "best", "fc_norm": mode == "LAS"}
    assert alexnet.parse_arguments(["--train-mode", "DKP"]).fc_norm


# --- the net and its data


def test_alexnet_has_the_originals_shapes():
    net = AlexNet(100)
    shapes = {}
    for point in net.points:
        net.get_submodule(point).register_forward_hook(lambda m, i, h, point=point: shapes.__setitem__(point, h.shape))
    assert net(torch.zeros(1, 3, 224, 224)).shape == (1, 100)
    expected = [(64, 27, 27), (192, 13, 13), (384, 13, 13), (256, 13, 13), (9216,), (4096,), (4096,)]
    assert [tuple(shape[1:]) for shape in shapes.values()] == expected
    assert net.eval()(torch.zeros(1, 3, AlexNet.smallest_image, AlexNet.smallest_image)).shape == (1, 100)


def test_fc_norm_is_a_batch_norm_in_both_fc_blocks():
    net = AlexNet(10, fc_norm=True)
    assert [type(module).__name__ for module in net.fc1] == ["Linear", "BatchNorm1d", "ReLU", "Dropout"]
    assert [type(module).__name__ for module in net.fc2] == ["Linear", "BatchNorm1d", "ReLU"]
    assert not any("fc" in name and "norm" in name for name, _ in AlexNet(10).named_modules())


def as_world(monkeypatch, rank, world):
    monkeypatch.setattr(batches, "rank", lambda: rank)
    monkeypatch.setattr(batches, "world_size", lambda: world)
    monkeypatch.setattr(batches, "replica", lambda: (rank, world))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_same_global_batches_and_crops(monkeypatch, data_set, world):
    source = batches.crops(data_set, 64, 12, 1, 4)
    alone = loaded(source, 1)
    shares = []
    for rank in range(world):
        as_world(monkeypatch, rank, world)
        shares.append(loaded(source, 1))
    assert len(alone) == 4 and [len(share) for share in shares] == [4 if world == 2 else 3] * world
    for batch, parts in zip(alone, zip(*shares, strict=True), strict=False):
        assert all(n == batch[2] for _, _, n in parts)
        torch.testing.assert_close(torch.cat([x for x, _, _ in parts]), batch[0])
        assert torch.equal(torch.cat([y for _, y, _ in parts]), batch[1])


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_every_test_image_counts_once(monkeypatch, data_set, world):
    source = batches.crops(data_set, 64, 12, 1, 4)
    seen = []
    for rank in range(world):
        as_world(monkeypatch, rank, world)
        seen += [image for x, _, _ in source.test() for image in x.mean((1, 2, 3)).tolist()]
    as_world(monkeypatch, 0, 1)
    expected = [image for x, _, _ in source.test() for image in x.mean((1, 2, 3)).tolist()]
    assert len(seen) == 20 and np.allclose(sorted(seen), sorted(expected), atol=1e-5)


def test_a_resumed_epoch_goes_on_with_the_same_crops(data_set):
    source = batches.crops(data_set, 64, 12, 1, 4)
    whole = [x for x, _, _ in loaded(source, 2)]
    rest = [x for x, _, _ in loaded(source, 2, 24)]
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], rest, strict=True))
    other = loaded(source, 3)[0][0]
    assert not torch.equal(whole[0], other)


def make_image_folder(folder):
    """Classes cat and dog, 6 training and 3 test images each."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (80, 90, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")


def test_an_image_folder_is_read_shared_and_resumed(monkeypatch, tmp_path):
    make_image_folder(tmp_path)
    make = lambda: batches.image_folder(tmp_path, 64, 4, 1, 2, 0, torch.device("cpu"))  # noqa: E731
    source = make()
    assert (source.classes, source.images, source.probe[0].shape) == (["cat", "dog"], 12, (2, 3, 64, 64))
    whole = loaded(source, 1)
    assert [n for _, _, n in whole] == [4, 4, 4] and whole[0][0].shape == (4, 3, 64, 64)
    assert -1 <= whole[0][0].min() < whole[0][0].max() <= 1
    (x, y, _), *_ = loaded(make(), 1, 8)
    assert torch.equal(x, whole[2][0]) and torch.equal(y, whole[2][1])
    as_world(monkeypatch, 1, 2)
    (x, y, n), *_ = loaded(make(), 1)
    assert n == 4 and torch.equal(x, whole[0][0][2:]) and torch.equal(y, whole[0][1][2:])
    assert sum(len(y) for _, y, _ in make().test()) == 3
    (tmp_path / "val" / "dog").rename(tmp_path / "val" / "cow")
    with pytest.raises(ValueError, match="train/ alone has dog; val/ alone has cow"):
        make()
    with pytest.raises(ValueError, match="cannot read a folder of images"):
        batches.image_folder(tmp_path / "nowhere", 64, 4, 1, 2, 0, torch.device("cpu"))


def test_a_folder_as_people_have_it(tmp_path):
    make_image_folder(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / ".ipynb_checkpoints").mkdir()
        (tmp_path / split / "cat" / "._0.png").write_bytes(b"not an image")
        os.rename(os.fsencode(tmp_path / split / "dog"), os.fsencode(tmp_path / split) + b"/do\xe9")
    source = batches.image_folder(tmp_path, 64, 4, 1, 2, 0, torch.device("cpu"))
    assert (source.classes, source.images) == (["cat", os.fsdecode(b"do\xe9")], 12)
    assert len(list(source.train(1, 0))) == 3


def test_sixteen_bits_of_grey_are_read_as_eight(tmp_path):
    ramp = np.arange(238, dtype=np.uint16)[None].repeat(80, 0)
    Image.fromarray(ramp * 257).save(tmp_path / "16.png")
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "8.png")
    (first, _), (second, _) = ImageFiles([(str(tmp_path / f"{bits}.png"), 0) for bits in (16, 8)], 64)
    assert torch.equal(first, second) and first.float().std() > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "message"),
    [(("--lr", 0.02), "--lr: the processes have 0.01 and 0.02"), (("-b", 6), "--batch-size: the processes have 8 of")],
    ids=["lr", "b"],
)
def test_processes_that_were_told_different_things_end_at_once(folder, other, message):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    common = ("--world-size", 2, "--dist-url", url, "--epochs", 1, "--out", folder / "run")
    jobs = [start(folder, *common, "--rank", rank, *(other if rank else ())) for rank in (0, 1)]
    for job in jobs:
        assert message in finish(job, status=2, timeout=60)[1]
    assert not (folder / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--multiprocessing-distributed", "--nprocs-per-node", 2)], ids=["1", "2"])
def test_a_damaged_image_ends_a_run_with_its_name(tmp_path, flags):
    make_image_folder(tmp_path)
    flags = (*flags, "--dataset", "imagenet", "-j", 2, "-b", 4, "--train-mode", "DFA", "--out", tmp_path / "run")
    path = tmp_path / "val" / "dog" / "2.png"  # the last one that is read
    path.write_bytes(path.read_bytes()[:9000])
    _, error = finish(start(tmp_path, *flags, "--epochs", 1), status=1, timeout=120)
    assert f"error: {path} cannot be read as an image: " in error and "Traceback" not in error
    kept = load_checkpoint(tmp_path / "run" / "checkpoint.pth.tar", "AlexNet")
    assert (kept["epoch"], kept["ranks"][0]["tally"]["step"]) == (0, 3)


@pytest.fixture
def data_set():
    from training.data import checked_set

    return checked_set("cifar100", "made for the test", 100, synthetic_images(100, 40, 20))


@pytest.fixture
def folder(tmp_path):
    """tmp_path, with a tiny cifar100.npz in it."""
    arrays = {key: value.numpy() for key, value in synthetic_images(100, 48, 20).items()}
    np.savez(tmp_path / "cifar100.npz", **arrays)
    return tmp_path


@pytest.mark.parametrize("batch_size", [16, 40, 3])
def test_a_run_resumed_with_another_batch_size_sees_each_image_once(alexnet, folder, monkeypatch, batch_size):
    monkeypatch.setattr(alexnet, "AlexNet", SmallNet)
    make, indices = alexnet.crops, []

    def noted(*args):
        data = make(*args)
        train = data.train

        def batches_of(epoch, seen):
            for batch in train(epoch, seen):
                indices.append(batch[0][0])
                if len(indices) == 3:
                    signal.raise_signal(signal.SIGTERM)
                yield batch

        data.train = batches_of
        return data

    monkeypatch.setattr(alexnet, "crops", noted)
    flags = [str(folder), "--image-size", "64", "--train-mode", "BP", "--epochs", "1"]
    out = folder / "run"
    assert alexnet.main([*flags, "-b", "4", "--out", str(out)]) == 128 + signal.SIGTERM
    assert alexnet.main([*flags, "-b", str(batch_size), "--resume", str(out)]) == 0
    order = epoch_order(48, 1, 1)
    assert torch.equal(torch.cat(indices), order)
    kept = load_checkpoint(out / "checkpoint.pth.tar", "AlexNet")
    assert kept["steps"] == len(indices) == 3 + -(-36 // batch_size)


def test_a_run_with_fc_norm_keeps_it(alexnet, folder, monkeypatch, capsys):
    monkeypatch.setattr(alexnet, "AlexNet", SmallNet)
    flags = [str(folder), "--image-size", "64", "-b", "16"]
    out = str(folder / "run")
    assert alexnet.main([*flags, "--fc-norm", "--epochs", "1", "--out", out]) == 0
    assert alexnet.main([*flags, "--resume", out, "--epochs", "2", "--save-model"]) == 0
    assert alexnet.main([*flags, "--resume", out, "--evaluate"]) == 0
    assert "hidden.1.running_mean" in torch.load(folder / "run" / "model.pt", weights_only=True)
    with pytest.raises(SystemExit):
        alexnet.main([*flags, "--resume", out, "--epochs", "3", "--no-fc-norm"])
    assert "--fc-norm: the run in" in capsys.readouterr().err


# --- jobs of several processes


def command(folder, *flags, torchrun=(), script="alexnet/main.py"):
    start = [sys.executable, "-m", "torch.distributed.run", *torchrun] if torchrun else [sys.executable]
    line = [str(ROOT / script), str(folder), "--image-size", "64", "-b", "8", "--lr", "0.01"]
    return [*start, *line, *(str(flag) for flag in flags)]


def start(folder, *flags, **how):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command(folder, *flags, **how),
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process, status=0, timeout=300):
    out, error = process.communicate(timeout=timeout)
    assert process.returncode == status, out + error
    return out, error


def net_of(run):
    state = torch.load(run / "checkpoint.pth.tar", weights_only=True, mmap=True)
    return state["net"], state["optimizers"]


def assert_same_nets(one, other):
    (net, optimizers), (other_net, other_optimizers) = net_of(one), net_of(other)
    assert all(torch.equal(value, other_net[name]) for name, value in net.items())
    for mine, theirs in zip(optimizers, other_optimizers, strict=True):
        for index, state in mine["state"].items():
            assert all(
                torch.equal(torch.as_tensor(v), torch.as_tensor(theirs["state"][index][k])) for k, v in state.items()
            )


TWO = ("--multiprocessing-distributed", "--nprocs-per-node", 2)


@pytest.mark.slow
def test_two_ranks_resume_exactly_evaluate_and_go_on_in_another_world(folder):
    finish(start(folder, *TWO, "--epochs", 2, "--out", folder / "straight"))
    finish(start(folder, *TWO, "--epochs", 1, "--out", folder / "halves"))
    finish(start(folder, *TWO, "--epochs", 2, "--resume", folder / "halves"))
    assert_same_nets(folder / "straight", folder / "halves")
    with open(folder / "halves" / "metrics.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    for world in ((), TWO):
        out, _ = finish(start(folder, *world, "-e", "--resume", folder / "halves" / "checkpoint.pth.tar"))
        assert f"test accuracy {float(last['test_accuracy']):.2f} % top-1" in out
    best = torch.load(folder / "halves" / "model_best.pth.tar", weights_only=True)
    assert best.keys() == TRAINED.keys() and best["net"].keys() == net_of(folder / "halves")[0].keys()
    out, _ = finish(start(folder, "-e", "--resume", folder / "halves" / "model_best.pth.tar"))
    assert "test accuracy" in out
    picture = folder / "picture.png"
    Image.new("RGB", (90, 70), "orange").save(picture)
    out, _ = finish(start(folder, "--resume", folder / "halves", "--classify", picture))
    (line,) = out.splitlines()
    assert line.startswith(f"{picture}: ") and line.split(": ")[1].split()[0] in CIFAR["cifar100"].classes
    out, _ = finish(start(folder, "--epochs", 3, "-b", 16, "--resume", folder / "halves"))
    assert "1 process; " in out and "from epoch 2, step 0" in out
    with open(folder / "halves" / "metrics.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3"]


@pytest.mark.slow
def test_a_run_of_two_ranks_that_diverges_ends_with_its_own_status(folder):
    flags = ("--epochs", 20, "--lr", 1, "--out", folder / "run", "--train-mode", "DFA")
    out, error = finish(start(folder, *TWO, *flags), status=DIVERGED)
    assert re.search(r"the loss is nan at|diverged at|are not finite after", error), out + error
    with pytest.raises(ValueError, match="no checkpoint"):
        load_checkpoint(folder / "run" / "model.pt", "AlexNet")
    net = load_checkpoint(folder / "run" / "checkpoint.pth.tar", "AlexNet")["net"]
    assert all(value.isfinite().all() for value in net.values())


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_the_outcome_is_the_same(folder):
    torchrun = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "3")
    flags = ("--b-update", "inplace", "--b-lr", 0.01, "--epochs", 3)
    finish(start(folder, *flags, "--out", folder / "whole", torchrun=torchrun))
    process = start(folder, *flags, "--out", folder / "killed", torchrun=torchrun)
    wait_for_epoch_1(folder / "killed")
    (victim,) = [pid for pid in children(process.pid) if b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(victim, signal.SIGKILL)
    out, _ = finish(process)
    assert re.search(r"from epoch [12], step 0", out)
    assert_same_nets(folder / "whole", folder / "killed")


def wait_for_epoch_1(run):
    """Wait until the checkpoint of the first epoch is written: the second one is under way."""
    deadline = time.time() + 120
    while not (run / "model_best.pth.tar").exists():
        assert time.time() < deadline
        time.sleep(0.02)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_job_of_two_that_sigterm_stopped_goes_on_exactly(folder):
    flags = (*TWO, "--train-mode", "BP", "--epochs", 3)
    finish(start(folder, *flags, "--out", folder / "straight"))
    process = start(folder, *flags, "--out", folder / "stopped")
    wait_for_epoch_1(folder / "stopped")
    process.send_signal(signal.SIGTERM)
    _, error = finish(process, status=128 + signal.SIGTERM, timeout=60)
    assert "stopped at epoch" in error and f"--resume {folder / 'stopped'}" in error
    finish(start(folder, *TWO, "--resume", folder / "stopped"))
    assert_same_nets(folder / "straight", folder / "stopped")


@pytest.mark.slow
def test_where_one_of_two_processes_by_hand_is_killed_the_other_ends_in_one_line(folder):
    url = f"tcp://127.0.0.1:{free_port()}"
    flags = ("--world-size", 2, "--dist-url", url, "--train-mode", "BP", "--epochs", 50, "--out", folder / "run")
    killed, other = (start(folder, *flags, "--rank", rank) for rank in (0, 1))
    wait_for_epoch_1(folder / "run")
    killed.kill()
    _, error = finish(other, status=1, timeout=60)
    assert error.count("\n") == 1 and error.startswith("error: rank 1 of 2 has lost another one: "), error


@pytest.mark.slow
def test_a_rank_that_raises_ends_the_job_with_its_error_on_top():
    began = time.time()
    worker = [sys.executable, str(ROOT / "tests" / "failing_worker.py")]
    result = subprocess.run(worker, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and time.time() - began < 60
    assert result.stderr.splitlines()[0] == "error: process 1 failed: ValueError: boom in rank 1"


@pytest.mark.slow
def test_a_port_that_is_taken_or_silent_does_not_hang(folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        url = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        _, error = finish(start(folder, *TWO, "--dist-url", url, "--dist-timeout", 5), status=1, timeout=90)
        assert f"could not join at {url}" in error
        lonely = ("--world-size", 2, "--rank", 1, "--dist-url", url, "--dist-timeout", 5)
        _, error = finish(start(folder, *lonely), status=1, timeout=90)
        assert f"rank 1 of 2 could not join at {url}" in error


# --- stages of a net in several processes

SMALL = {"script": "tests/small_alexnet.py"}
STAGES = {"torchrun": ("--standalone", "--nproc-per-node", "2", "--max-restarts", "3"), **SMALL}


def metrics(run):
    with open(run / "metrics.csv", newline="") as file:
        return [{key: float(value or "nan") for key, value in row.items()} for row in csv.DictReader(file)]


def assert_close_nets(one, other):
    (net, _), (other_net, _) = net_of(one), net_of(other)
    for name, value in net.items():
        torch.testing.assert_close(value, other_net[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
def test_two_stages_are_one_process_and_resume_as_either(folder):
    rule = ("--train-mode", "DKP", "--b-update", "inplace")
    stages = (*rule, "--pipeline-stages", 2)
    finish(start(folder, *rule, "--epochs", 2, "--out", folder / "alone", **SMALL))
    out, _ = finish(start(folder, *stages, "--epochs", 2, "--out", folder / "stages", **STAGES))
    assert re.search(r"stage 0: conv.* % of the time\); stage 1: .*fc \(", out), out
    assert_close_nets(folder / "alone", folder / "stages")
    for mine, theirs in zip(metrics(folder / "alone"), metrics(folder / "stages"), strict=True):
        for key in mine.keys() - {"seconds"}:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-3, nan_ok=True), key
    finish(start(folder, *stages, "--epochs", 1, "--out", folder / "halves", **STAGES))
    shutil.copytree(folder / "halves", folder / "later-alone")
    finish(start(folder, "--pipeline-stages", 2, "--epochs", 2, "--resume", folder / "halves", **STAGES))
    assert_same_nets(folder / "stages", folder / "halves")
    finish(start(folder, "--epochs", 2, "--resume", folder / "later-alone", **SMALL))
    assert_close_nets(folder / "stages", folder / "later-alone")


@pytest.mark.slow
def test_replicas_of_stages_train_and_more_micro_batches_than_one(folder):
    torchrun = ("--standalone", "--nproc-per-node", "4")
    flags = ("--pipeline-stages", 2, "--micro-batches", 2, "--precision", "bf16", "--channels-last")
    out, _ = finish(start(folder, *flags, "--epochs", 2, "--out", folder / "run", torchrun=torchrun, **SMALL))
    assert "4 processes" in out and "test accuracy" in out
    assert load_checkpoint(folder / "run" / "checkpoint.pth.tar", "AlexNet")["epoch"] == 2


@pytest.mark.slow
def test_a_stage_that_is_killed_or_stopped_comes_back_and_one_that_diverges_ends_all(folder):
    flags = ("--pipeline-stages", 2, "--epochs", 40)
    finish(start(folder, *flags, "--out", folder / "whole", **STAGES))
    process = start(folder, *flags, "--out", folder / "killed", **STAGES)
    wait_for_epoch_1(folder / "killed")
    (victim,) = [pid for pid in children(process.pid) if b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(victim, signal.SIGKILL)
    out, _ = finish(process)
    assert len(re.findall("from epoch", out)) == 2
    assert_same_nets(folder / "whole", folder / "killed")
    process = start(folder, *flags, "--out", folder / "stopped", **STAGES)
    wait_for_epoch_1(folder / "stopped")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert load_checkpoint(folder / "stopped" / "checkpoint.pth.tar", "AlexNet")["epoch"] < 40
    finish(start(folder, "--pipeline-stages", 2, "--resume", folder / "stopped", **STAGES))
    assert_same_nets(folder / "whole", folder / "stopped")
    process = start(folder, *flags, "--lr", 1e6, "--out", folder / "diverged", **STAGES)
    out, error = process.communicate(timeout=100)
    assert process.returncode == 1 and len(re.findall("from epoch", out)) == 1, out + error
    assert (folder / "diverged" / "diverged").exists() and "exitcode  : 3" in error
