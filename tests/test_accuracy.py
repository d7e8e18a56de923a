"""The sweep: what it writes, that it is stopped, continued and shared without repeating a run, and its search."""

import csv
import json
import re
import shutil
import signal
import struct
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
from helpers import held_by_another_process

import main
from feedback import RULES
from training.arguments import RECIPES
from training.synthetic import synthetic_images


@pytest.fixture
def sweep(accuracy, data_folder, tmp_path, monkeypatch):
    """Run the sweep on 40 images, two epochs, with its folder under tmp_path; return the folder of its results."""
    monkeypatch.setattr(accuracy, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(accuracy, "COMMITTED", tmp_path / "committed")
    net = accuracy.NETS["convnet"]
    few = replace(
        net,
        search_flags=("--validation", "16"),
        stages=lambda mode: [stage[:2] for stage in net.stages(mode)[:3]],
    )
    monkeypatch.setitem(accuracy.NETS, "convnet", few)

    def run(*flags, name="it", status=0):
        recipe = () if {"--recipe", "--search"} & set(flags) else ("--recipe", "original")
        argv = ["--data", data_folder, "--epochs", 2, "--name", name, "--no-cuda", *recipe, *flags]
        assert accuracy.main([str(flag) for flag in argv]) == status
        return tmp_path / "runs" / name

    return run


@pytest.fixture
def trained(accuracy, monkeypatch):
    """The folders that main.py is called for, as they come, new ones or resumed."""
    calls, script = [], main.main

    def note(argv):
        flag = "--resume" if "--resume" in argv else "--out"
        calls.append((flag, argv[argv.index(flag) + 1].rpartition("/")[2]))
        return script(argv)

    monkeypatch.setattr(main, "main", note)
    return calls


def rows(results):
    with open(results / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def settings_of(text):
    """Of a row, what the search chose: {flag: value or None}."""
    return {flag: value or None for flag, value in re.findall(r"(--\S+)(?: ([^-]\S*))?", text)}


def width(path):
    return struct.unpack(">I", path.read_bytes()[16:20])[0]


def test_a_sweep_writes_a_csv_a_table_and_plots_and_repeats_nothing(sweep, trained, capsys):
    modes = ("BP", "FA", "DKP")  # no B, one as W is, one at a point
    flags = ("--modes", *modes, "--seeds", 1, 2, "--lr", 0.01)
    results = sweep(*flags)
    assert len(trained) == 6 == len(set(trained))
    found = rows(results)
    assert {(row["mode"], row["seed"], row["epoch"]) for row in found} == {
        (mode, str(seed), str(epoch)) for mode in modes for seed in (1, 2) for epoch in (1, 2)
    }
    assert {(row["recipe"], row["flags"], row["lr"]) for row in found} == {("original", "--no-cuda --lr 0.01", "0.01")}
    last = [float(row["test_accuracy"]) for row in found if (row["mode"], row["epoch"]) == ("DKP", "2")]
    best = [max(float(r["test_accuracy"]) for r in found if (r["mode"], r["seed"]) == ("DKP", s)) for s in "12"]
    lines = (results / "table.md").read_text().splitlines()
    line, line_of_angles = (line for line in lines if line.startswith("| DKP "))
    cells = [cell.strip() for cell in line.split("|")[3:-1]]
    std = abs(last[0] - last[1]) / 2**0.5, abs(best[0] - best[1]) / 2**0.5
    figures = [sum(last) / 2, std[0], sum(best) / 2, std[1]]
    losses = [float(row["train_loss"]) for row in found if (row["mode"], row["epoch"]) == ("DKP", "2")]
    assert cells == [*(f"{figure:.2f}" for figure in figures), f"{sum(losses) / 2:.4g}", "2", "0"]
    (heads,) = (line.split(" | ") for line in lines if "| signal conv1 |" in line)
    for column, head in (
        ("alignment_deg_conv2", "signal conv2"),
        ("parameter_deg_fc1.linear.weight", "gradient fc1.linear"),
    ):
        angles = [float(row[column]) for row in found if (row["mode"], row["epoch"]) == ("DKP", "2")]
        assert line_of_angles.split(" | ")[heads.index(head)] == f"{sum(angles) / 2:.1f}"
    plots = ("accuracy.png", "signal_angles.png", "gradient_angles.png")
    assert [width(results / name) for name in plots] == [800, 800, 800]
    output = capsys.readouterr().out
    assert "run 1/6, BP-original-seed1; 12 epochs to go" in output
    assert "epochs to go, about 0:00:0" in output and line in output
    before = (results / "metrics.csv").read_bytes()
    sweep(*flags)
    assert len(trained) == 6 and (results / "metrics.csv").read_bytes() == before
    sweep("--seeds", 3, "--modes", "BP", "--lr", 0.01)  # one more: the others stay in the results
    assert len(trained) == 7 and len(rows(results)) == 14


def test_a_stopped_sweep_goes_on_where_it_was(sweep, trained, change_training_batches, capsys):
    flags = ("--modes", "BP", "DKP", "--seeds", 1)
    whole = sweep(*flags, name="whole")

    def with_a_signal(batches):
        for batch in batches:
            count.append(1)
            if len(count) == 3:  # one batch an epoch: it is DKP's first
                signal.raise_signal(signal.SIGINT)
            yield batch

    count = []
    del trained[:]
    change_training_batches(with_a_signal)
    with pytest.raises(SystemExit) as exit_:
        sweep(*flags)
    assert exit_.value.code == 130 and "the sweep's own command goes on" in capsys.readouterr().err
    continued = sweep(*flags)
    assert trained == [
        ("--out", "BP-original-seed1"),
        ("--out", "DKP-original-seed1"),
        ("--resume", "DKP-original-seed1"),
    ]
    strip = lambda found: [{k: v for k, v in row.items() if k != "seconds"} for row in found]  # noqa: E731
    assert strip(rows(whole)) == strip(rows(continued))


def test_a_run_of_another_process_is_passed_over(accuracy, sweep, trained, tmp_path, capsys):
    with held_by_another_process(tmp_path / "runs" / "it" / "BP-original-seed1" / accuracy.LOCK):
        sweep("--modes", "BP", "DFA", "--seeds", 1)
    assert trained == [("--out", "DFA-original-seed1")]
    assert "BP-original-seed1: another process is at it" in capsys.readouterr().out
    sweep("--modes", "BP", "DFA", "--seeds", 1)
    assert trained[1:] == [("--out", "BP-original-seed1")]


def test_a_run_that_blows_up_is_counted_and_not_tried_again(sweep, trained):
    flags = ("--modes", "BP", "--seeds", 1, "--lr", 1e6, "--wd", 1e6)
    sweep(*flags, status=1)  # of no run an epoch is done
    results = sweep("--modes", "DFA", "--seeds", 1)
    for _ in range(2):
        sweep(*flags)
    assert len(trained) == 2
    assert (
        "| BP | original `--no-cuda --lr 1000000.0 --wd 1000000.0` |  |  |  |  |  | 0 | 1 |"
        in (results / "table.md").read_text()
    )


@pytest.mark.parametrize(("start", "runs"), [("original", 5), ("best", 7)])
def test_a_search_chooses_on_held_out_training_images_and_its_recipe_can_be_run(
    accuracy, sweep, trained, capsys, start, runs
):
    flag = ("--search",) if start == "original" else ("--search", start)
    found = sweep(*flag, "--modes", "FA", "DKP", "--log-interval", 3, name="search")
    assert len(trained) == 2 * runs == len(set(trained))
    assert f"run {2 * runs}/{2 * runs}" in capsys.readouterr().out
    assert all(not any(key.startswith("test_") for key in row) for row in rows(found))
    recipe = json.loads((found / "recipe.json").read_text())
    for mode in ("FA", "DKP"):
        accuracies = {
            row["recipe"]: (float(row["validation_accuracy"]), row["settings"])
            for row in rows(found)
            if (row["mode"], row["epoch"]) == (mode, "2")
        }
        best = max(accuracy for accuracy, _ in accuracies.values())
        assert recipe[mode][:2] == ["--batch-size", "50"]
        assert (best, " ".join(recipe[mode][2:])) in accuracies.values()
        tried = []
        words = json.loads(RECIPES.read_text())["ConvNet"]["best"][mode] if start == "best" else []
        begin = settings_of(" ".join(words[2:]))
        for stage in accuracy.stages_of(mode, Namespace(net="convnet", search=start)):
            base = max(tried, key=lambda name: (accuracies[name][0], name), default=None)
            before = settings_of(accuracies[base][1]) if base else begin  # each on the best of the stages before
            for changes in stage:
                expected = before | changes
                (name,) = (n for n, (_, s) in accuracies.items() if settings_of(s) == expected and n not in tried)
                tried.append(name)
        assert len(tried) == runs == len(accuracies)
    results = sweep("--recipe", found / "recipe.json", "--modes", "DKP", "--seeds", 4, name="best")
    assert {row["recipe"] for row in rows(results)} == {"recipe"} and (results / "accuracy.png").exists()


def test_a_search_goes_no_further_than_a_run_of_another_process(accuracy, sweep, trained, tmp_path, capsys):
    with held_by_another_process(tmp_path / "runs" / "it" / "BP-schedule-one-cycle-lr-0.002-seed1" / accuracy.LOCK):
        sweep("--search", "--modes", "BP")
        assert len(trained) == len(accuracy.NETS["convnet"].stages("BP")[0]) - 1
        assert "not over: another process is at BP-schedule-one-cycle-lr-0.002-seed1" in capsys.readouterr().out
    sweep("--search", "--modes", "BP")
    assert len(trained) == 5


def test_a_setting_that_blows_up_is_not_chosen_and_where_all_do_the_search_says_so(
    accuracy, sweep, trained, monkeypatch, capsys
):
    bad, good = {"--lr": "1e6", "--wd": "1e6"}, {"--lr": "0.001"}
    stages = {"BP": [[bad, good], [{"--wd": "1e-4"}]], "FA": [[bad], [good]]}
    monkeypatch.setitem(accuracy.NETS, "convnet", replace(accuracy.NETS["convnet"], stages=stages.get))
    results = sweep("--search", "--modes", "BP", "FA", status=1)
    assert len(trained) == 4 and "ends early: of some rule, no setting came to its end" in capsys.readouterr().err
    recipe = json.loads((results / "recipe.json").read_text())
    assert recipe.keys() == {"BP"} and recipe["BP"][2:4] == ["--lr", "0.001"]


def test_a_signal_of_zeros_has_no_angle_in_the_table(sweep):
    results = sweep("--modes", "DFA", "--seeds", 1, "--b-scale", 0)
    assert (
        "| rule | settings | gradient fc2 |\n|---|---|---|\n| DFA | original | 0.0 |\n"
        in (results / "table.md").read_text()
    )


@pytest.mark.parametrize(
    ("start", "net", "runs"),
    [("original", "convnet", 10), ("original", "alexnet", 8), ("best", "convnet", 7), ("best", "alexnet", 7)],
)
def test_a_search_has_as_many_runs_for_every_rule_and_its_script_takes_them_all(accuracy, start, net, runs):
    for mode in RULES:
        changes = [change for stage in accuracy.stages_of(mode, Namespace(net=net, search=start)) for change in stage]
        assert len(changes) == runs
        gammas = [change["--gamma"] for change in changes if "--gamma" in change]
        assert not gammas or net == "convnet" or gammas == ["0.8"]  # a factor of 1 is the default of AlexNet
        for change in changes:
            argv = ["--recipe", start, "--train-mode", mode, *accuracy.words(change)]
            accuracy.NETS[net].script.parse_arguments(argv)


def test_a_reproduction_is_compared_with_what_is_committed_in_one_line(accuracy, sweep, tmp_path, capsys):
    flags = ("--modes", "BP", "DKP", "--seeds", 1, 2)
    first = sweep(*flags)
    assert "against the committed" not in capsys.readouterr().out
    shutil.copytree(first, tmp_path / "committed" / "it")
    sweep(*flags)
    line = capsys.readouterr().out.splitlines()[-1]
    last = {
        mode: [float(r["test_accuracy"]) for r in rows(first) if (r["mode"], r["epoch"]) == (mode, "2")]
        for mode in ("BP", "DKP")
    }
    assert line == "against the committed it: BP +0.0 sd, DKP +0.0 sd; none beyond 2 sd"
    other = tmp_path / "committed" / "it" / "metrics.csv"
    spread = 50 - last["BP"][0], 60 - last["BP"][1]
    with open(other, "w", newline="") as file:
        writer = csv.DictWriter(file, rows(first)[0])
        writer.writeheader()
        for row in rows(first):
            if (row["mode"], row["epoch"]) == ("BP", "2"):
                row["test_accuracy"] = 50 if row["seed"] == "1" else 60
            writer.writerow(row)
    sweep(*flags)
    line = capsys.readouterr().out.splitlines()[-1]
    deviations = -sum(spread) / 2 / 50**0.5
    assert line == f"against the committed it: BP {deviations:+.1f} sd, DKP +0.0 sd; beyond 2 sd: BP"


def test_a_sweep_of_another_layout_is_refused(sweep, tmp_path, capsys):
    sweep("--modes", "BP", "--seeds", 1)
    kept = tmp_path / "runs" / "it" / "sweep.json"
    for version in ({"version": 1}, {}):
        kept.write_text(json.dumps(version | {"epochs": 2, "runs": [{"mode": "BP"}]}))
        with pytest.raises(SystemExit) as exit_:
            sweep("--modes", "BP", "--seeds", 1)
        assert exit_.value.code == 2 and f"is of layout {version.get('version')}, expected" in capsys.readouterr().err


@pytest.mark.slow
def test_alexnet_is_searched_by_its_training_loss(accuracy, monkeypatch, tmp_path, capsys):
    np.savez(tmp_path / "cifar100.npz", **{k: v.numpy() for k, v in synthetic_images(100, 24, 8).items()})
    monkeypatch.setattr(accuracy, "RUNS", tmp_path / "runs")
    stages = lambda mode: [[{"--lr": "0.001"}, {"--lr": "0.002"}]]  # noqa: E731
    monkeypatch.setitem(accuracy.NETS, "alexnet", replace(accuracy.NETS["alexnet"], stages=stages))
    flags = ("--net", "alexnet", "--search", "--modes", "BP", "--image-size", "64", "-b", "8", "--limit-batches", "2")
    assert accuracy.main(["--data", str(tmp_path), *flags]) == 0
    found = tmp_path / "runs" / "cifar100-search-1-epoch"
    losses = {row["recipe"]: float(row["train_loss"]) for row in rows(found)}
    best, second = sorted(losses, key=losses.get)
    for name, recipe in (("recipe.json", best), ("runner-up.json", second)):
        assert json.loads((found / name).read_text()) == {"BP": ["--lr", recipe.removeprefix("lr-")]}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--modes", "XYZ"), "--modes"),
        (("--seeds", "-1"), "--seeds"),
        (("--recipe", "nowhere.json"), "--recipe: cannot read nowhere.json, expected original, best or a recipe.json"),
        (("--recipe", "nowhere.json", "--search"), "--recipe does not go with --search"),
        (("--out", "elsewhere"), "--out is for the sweep itself"),
        (("--search", "--wd=3"), "--wd is what a search tries"),
        (("--search", "best", "--modes", "LAS", "--schedule", "constant"), "--schedule is what a search tries"),
        (("--search", "best", "--modes", "LAS", "--b-update", "inplace"), "--b-update does not go with --search best"),
        (("--validation=3",), "--validation=3 is for the sweep itself"),
        (("--foo",), "main.py: error: unrecognized arguments: --foo"),
        (("-e",), "-e is for the sweep itself"),
        (("--epochs", "3", "--modes", "BP", "--seeds", "1"), "has a sweep with other settings"),
        (("--lr", "0.1", "--modes", "BP", "--seeds", "1"), "has a sweep with other settings"),
    ],
)
def test_mistakes_are_one_line(sweep, tmp_path, capsys, flags, message):
    if "--seeds" in flags and "-1" not in flags:
        sweep("--modes", "BP", "--seeds", 1)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        sweep(*flags)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and message in error and error.count("\n") == 1


def test_a_mistake_in_a_flag_of_the_script_leaves_the_folder_free(sweep, trained, capsys, tmp_path):
    with pytest.raises(SystemExit):
        sweep("--modes", "BP", "--seeds", 1, "--bathc-size", 5)
    assert "did you mean --batch-size?" in capsys.readouterr().err and not trained
    sweep("--modes", "BP", "--seeds", 1, "--batch-size", 5)


def test_a_recipe_that_is_none_is_refused(sweep, tmp_path, capsys):
    for name, content in (("a.json", '{"BP": "--lr 1"}'), ("best.json", '{"BP": []}')):
        (tmp_path / name).write_text(content)
        with pytest.raises(SystemExit) as exit_:
            sweep("--recipe", tmp_path / name, "--modes", "BP")
        assert exit_.value.code == 2 and "is no recipe: expected lists of flags" in capsys.readouterr().err


def test_quick_leaves_nothing_behind(accuracy, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(accuracy, "RUNS", tmp_path / "runs")
    assert accuracy.main(["--quick", "--modes", "BP", "--data", "nowhere"]) == 0
    assert "| BP | best |" in capsys.readouterr().out and not list(tmp_path.iterdir())
