"""A run's folder under other people's hands: two processes, foreign and edited files, full disks, closed terminals."""

import errno
import functools
import json
import math
import os
import resource
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import assert_refused, checkpoint, held_by_another_process
from tensorboard.compat.tensorflow_stub.io import gfile

import main
from training.checkpoint import NAMES
from training.machine import REPOSITORY
from training.run import DIVERGED, write_config
from training.synthetic import synthetic_images


@pytest.fixture
def script(data_folder, tmp_path):
    """Start main.py as a process of its own."""

    def start(*flags, interpreter=(), **options):
        flags = ("--data", data_folder, "--recipe", "original", "--no-cuda", "--batch-size", 12, *flags)
        line = [sys.executable, *interpreter, str(REPOSITORY / "main.py"), *map(str, flags)]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        return subprocess.Popen(line, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)

    return start


# --- two processes


def test_a_folder_in_which_another_process_trains_is_refused(run, tmp_path, capsys):
    with held_by_another_process(tmp_path / "run" / "run.lock"):
        assert_refused(capsys, run, str(tmp_path / "run"), "another process is training there")
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["run.lock"]
    assert run("--epochs", 1) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with held_by_another_process(tmp_path / "run" / "run.lock"):
        resume = ("--resume", tmp_path / "run", "--epochs", 2)
        assert_refused(capsys, lambda: run(*resume), "another process is training there")
        assert run("--resume", tmp_path / "run", "--evaluate") == 0
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert run(*resume) == 0


@pytest.mark.slow
def test_of_two_runs_started_together_one_is_refused(script, tmp_path):
    both = [script("--epochs", 3, "--seed", seed, "--out", tmp_path / "run") for seed in (1, 2)]
    errors = [process.communicate(timeout=100)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    (refused,) = (error for process, error in zip(both, errors, strict=True) if process.returncode == 2)
    assert refused.count("\n") == 1 and ("another process" in refused or "already holds a run" in refused)
    seed = 1 + [process.returncode for process in both].index(0)
    kept = checkpoint(tmp_path / "run")
    assert kept["args"]["seed"] == seed and kept["epoch"] == 3
    assert json.loads((tmp_path / "run" / "config.json").read_text())["args"]["seed"] == seed


def test_a_resume_never_writes_over_what_another_process_has_done_meanwhile(run, tmp_path, capsys, monkeypatch):
    assert run("--epochs", 1) == 0
    load_images = main.load_images

    def meanwhile(*args):
        monkeypatch.setattr(main, "load_images", load_images)
        assert run("--resume", tmp_path / "run", "--epochs", 3) == 0
        return load_images(*args)

    monkeypatch.setattr(main, "load_images", meanwhile)
    late = ("--resume", tmp_path / "run", "--epochs", 2)
    assert_refused(capsys, lambda: run(*late), "another process has trained it on in this moment: start once more")
    assert checkpoint(tmp_path / "run")["epoch"] == 3


# --- files that are not ours, or that somebody changed


@pytest.mark.parametrize("name", ["config.json", "metrics.csv", "model.pt"])
def test_a_folder_with_somebodys_file_is_refused(run, tmp_path, capsys, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("theirs")
    assert_refused(capsys, lambda: run("--dry-run"), f"it holds {name}, but no run of these scripts")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]
    assert (tmp_path / "run" / name).read_text() == "theirs"


def test_a_run_of_the_other_script_is_not_written_over(run, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    for file in ("run.lock", NAMES["AlexNet"]):
        (tmp_path / "run" / file).touch()
    assert_refused(capsys, lambda: run("--dry-run"), "already holds a run")


def test_a_run_without_a_lock_is_still_known_as_one(run, tmp_path, capsys):
    assert run("--epochs", 1) == 0
    (tmp_path / "run" / "run.lock").unlink()
    assert_refused(capsys, lambda: run("--dry-run"), "already holds a run", "--resume")


def test_what_a_killed_run_leaves_before_its_first_checkpoint_does_not_stand_in_the_way(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.lock").touch()
    (tmp_path / "run" / "config.json").write_text("{")
    for name in ("checkpoint.pt.123.partial", "film.partial"):
        (tmp_path / "run" / name).touch()
    assert run("--epochs", 1) == 0
    assert [path.name for path in (tmp_path / "run").glob("*.partial")] == ["film.partial"]


def edited(state):
    """The checkpoint of a run, with one value after the other changed by hand."""
    (rank,) = state["ranks"]
    rows = ([1], state["rows"] * 3, [{"epoch": "one"}])
    ranks = [
        {"tally": {"step": "three"}},
        {"tally": rank["tally"] | {"step": "1"}},
        {"tally": rank["tally"] | {"seen": -4}},
    ]
    changes = [
        {"epoch": -5},
        {"steps": 2.5},
        {"recent": ["2.3"]},
        {"ranks": [7]},
        {"ranks": []},
        {"optimizers": [1, 2]},
    ]
    changes += [{"rows": value} for value in rows]
    changes += [{"ranks": [rank | change]} for change in (*ranks, {"rng": 3})]
    arguments = [{"lr": "much"}, {"lr": -1.0}, {"epochs": None}, {"train_mode": "XYZ"}, {"fc_norm": "yes"}]
    arguments += [{"momentum": "0.9"}, {"speed": 3}, {"schedule": 5}]
    changes += [{"args": state["args"] | change} for change in arguments]
    return [state | change for change in (*changes, {"net": state["net"] | {"feedback.fc1": 3}})]


def test_a_checkpoint_that_was_edited_is_refused_in_one_line(run, tmp_path, capsys):
    run("--epochs", 1)
    for state in edited(checkpoint(tmp_path / "run")):
        torch.save(state, tmp_path / "run" / "checkpoint.pt")
        assert_refused(capsys, lambda: run("--resume", tmp_path / "run", "--epochs", 2))


@pytest.mark.parametrize("text", ["[]", "3", "{", '{"resumed": 5}', '{"resumed": {}}', "[" * 100_000])
def test_a_config_that_was_edited_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        write_config(tmp_path, {}, "", torch.device("cpu"))
    assert (tmp_path / "config.json").read_text() == text


# --- endings


def test_the_line_that_resumes_can_be_pasted_into_a_shell(run, tmp_path, change_training_batches, capsys):
    def with_a_signal(batches):
        signal.raise_signal(signal.SIGTERM)
        return batches

    change_training_batches(with_a_signal)
    folder = tmp_path / "it's a run; $HOME"
    run(out=folder.name)
    line = capsys.readouterr().err.strip().partition("go on with: ")[2]
    assert shlex.split(line) == ["python", "main.py", "--resume", str(folder)]


@pytest.mark.slow
def test_a_reader_that_goes_away_stops_nothing(script, tmp_path):
    process = script("--epochs", 2, "--out", tmp_path / "run")
    process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=100) == 0
    assert checkpoint(tmp_path / "run")["epoch"] == 2


@pytest.mark.slow
def test_streams_that_are_closed_from_the_start_stop_nothing(script, tmp_path):
    process = script("--epochs", 1, "--out", tmp_path / "run", preexec_fn=lambda: os.closerange(1, 3))
    process.communicate(timeout=100)
    assert process.returncode == 0 and checkpoint(tmp_path / "run")["epoch"] == 1


def test_a_test_loss_that_is_not_finite_keeps_the_epoch_before(run, tmp_path, monkeypatch):
    evaluate = main.evaluate

    def not_finite(*args):
        tested = evaluate(*args)
        return tested | {"loss": math.nan} if len(calls) == 1 else calls.append(1) or tested

    calls = []
    monkeypatch.setattr(main, "evaluate", not_finite)
    assert run("--epochs", 3) == DIVERGED
    kept = checkpoint(tmp_path / "run")
    assert (kept["epoch"], kept["ranks"][0]["tally"]["step"]) == (1, 0)
    assert not list((tmp_path / "run").glob("*.before"))
    monkeypatch.undo()
    assert run("--resume", tmp_path / "run", "--lr", 1e-4) == 0


def test_ctrl_c_while_torch_is_loaded_is_no_traceback(script, tmp_path):
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it
    process = script("--out", tmp_path / "run", interpreter=("-X", "importtime"), preexec_fn=heed)
    line = next(line for line in process.stderr if line.endswith("training.console\n"))
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=100)[1]
    assert line and "Traceback" not in error and error.splitlines()[-1] == "interrupted", error
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT)


def test_events_that_cannot_be_written_end_a_run_in_one_line(run, tmp_path, capsys, monkeypatch):
    def no_room(self, *args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gfile.LocalFileSystem, "append", no_room)
    assert run("--epochs", 1, "--log-interval", 1) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"cannot write to {tmp_path / 'run'}: " in error and "No space left" in error
    monkeypatch.undo()
    assert run("--resume", tmp_path / "run") == 0


def test_a_disk_that_is_full_at_the_end_of_an_epoch_keeps_the_last_checkpoint(run, tmp_path, capsys):
    assert run("--epochs", 1) == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        assert run("--resume", tmp_path / "run", "--epochs", 2) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"cannot write to {tmp_path / 'run'}: " in capsys.readouterr().err
    assert checkpoint(tmp_path / "run")["epoch"] == 1 and not list((tmp_path / "run").glob("*.partial"))
    assert run("--resume", tmp_path / "run", "--epochs", 2) == 0


@pytest.mark.slow
def test_two_processes_that_need_the_data_fetch_them_once(script, tmp_path):
    """The first to come is as one that still fetches; the second waits, and trains on what has arrived."""
    folder = tmp_path / "new"
    with held_by_another_process(folder / ".lock"):
        process = script("--data", folder, "--dry-run", "--out", tmp_path / "run")
        assert "waiting for another process" in process.stderr.readline()
        arrays = {key: value.numpy() for key, value in synthetic_images(10, 40, 20).items()}
        np.savez(folder / "cifar10.npz", **arrays)
    output, error = process.communicate(timeout=100)
    assert process.returncode == 0 and str(folder / "cifar10.npz") in output, error
    assert "SYNTHETIC" not in error
