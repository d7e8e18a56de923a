"""The tables of README and docs hold what the raw data in benchmarks/results have."""

import csv
import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SETTINGS = {"contiguous": "contiguous fp32 eager", "channels_last": "channels_last fp32 eager"}


def table(page, heading, number=1):
    """The rows of the `number`-th table below a heading, each a dict from its column's name to the text of its cell."""
    lines = (ROOT / page).read_text().split(f"# {heading}\n")[1].splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("|--")]
    names, rows = cells(lines[starts[number - 1] - 1]), []
    for line in lines[starts[number - 1] + 1 :]:
        if not line.startswith("|"):
            break
        rows.append(dict(zip(names, cells(line), strict=True)))
    return rows


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def last_epochs(*folders):
    """The rows of each rule's last epochs, one for each seed."""
    rules = {}
    for folder in folders:
        with open(RESULTS / folder / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        last = max(int(row["epoch"]) for row in rows)
        for row in rows:
            if int(row["epoch"]) == last:
                rules.setdefault(row["mode"], []).append(row)
    return rules


def accuracy(rows):
    values = [float(row["test_accuracy"]) for row in rows]
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


BEST = tuple(f"cifar10-{name}-12-epochs" for name in ("best", "dkp", "drtp", "heads"))


def test_accuracies_and_angles_of_the_conv_net():
    for heading, folders in (("The best recipes", BEST), ("The original's settings", ["cifar10-original-10-epochs"])):
        runs = last_epochs(*folders)
        for row in table("docs/results-cifar10.md", heading):
            data = runs.pop(row[""])
            assert len(data) == 3 and row["test accuracy, %"] == accuracy(data)
            for point, weights in (("conv1", "conv1.conv"), ("conv2", "conv2.conv"), ("fc1", "fc1.linear")):
                angles = {f"signal {point}": f"alignment_deg_{point}"}
                for name, key in (angles | {f"gradient {point}": f"parameter_deg_{weights}.weight"}).items():
                    assert row[name] == f"{statistics.mean(float(line[key]) for line in data):.1f}", (row[""], name)
        assert not runs


def test_the_front_page_has_these_accuracies_and_times():
    runs = last_epochs(*BEST)
    steps = {row["rule"]: row for row in json.loads((RESULTS / "accuracy_by_time.json").read_text())["rows"]}
    for row in table("README.md", "The rules"):
        rule = row["rule"].partition(",")[0]
        assert row["accuracy, %"] == accuracy(runs.pop(rule))
        assert row["step"] == ("1" if rule == "BP" else f"{steps[rule]['to_BP'][1]:.2f}")
    for row in table("docs/results-cifar10.md", "The best recipes", 2):
        step = steps.pop(row[""])
        assert row["step, ms"] == f"{step['ms'][1]:.1f}"
        assert row["to BP"] == "{1:.2f} ({0:.2f}-{2:.2f})".format(*step["to_BP"])
    assert not runs and not steps


def test_the_scripts_open_with_results_of_the_pages():
    shown = {row[""]: row["test accuracy, %"] for row in table("docs/results-cifar10.md", "The best recipes")}
    others = ", ".join(f"{rule} {shown[rule].partition(' ')[0]}" for rule in ("BP", "LAS", "DKP"))
    opening = (ROOT / "main.py").read_text().partition("Source:")[0]
    assert "--train-mode LOCAL" in opening
    assert f"Result: {shown['LOCAL'].replace('±', '+-')} % test accuracy (n=3; {others})" in opening
    shown = {row[""]: row["test top-1, %"] for row in table("docs/results-alexnet.md", "The defaults train", 2)}
    result = f"Result: at 64x64, 3 epochs: {shown['DKP']} % top-1 (n=1; BP {shown['BP']}, DFA {shown['DFA']})"
    assert result in (ROOT / "alexnet" / "main.py").read_text()


def test_alexnets_long_runs():
    with open(RESULTS / "cifar100-alexnet64-15-epochs" / "metrics.csv", newline="") as file:
        runs = {(row["mode"], int(row["epoch"])): row for row in csv.DictReader(file)}
    shown = table("docs/results-alexnet.md", "15 epochs at 64x64")
    assert {row[""] for row in shown} == {mode for mode, _ in runs}
    for row in shown:
        for name, epoch in (("epoch 5", 5), ("10", 10), ("15", 15)):
            assert row[name] == f"{float(runs[row[''], epoch]['test_accuracy']):.2f}"
        last = runs[row[""], 15]
        assert row["top-5"] == f"{float(last['test_top5_accuracy']):.2f}"
        assert row["training, %"] == f"{float(last['train_accuracy']):.2f}"
        assert row["training loss"] == f"{float(last['train_loss']):.3f}"
        assert row["test loss"] == f"{float(last['test_loss']):.3f}"
    angles = table("docs/results-alexnet.md", "15 epochs at 64x64", 2)
    assert {row[""] for row in angles} == {mode for mode, _ in runs} - {"BP"}
    for row in angles:
        last = runs[row.pop(""), 15]
        points = "conv1", "conv2", "conv3", "conv4", "conv5", "fc1", "fc2"
        assert row == {point: f"{float(last[f'alignment_deg_{point}']):.1f}" for point in points}


def test_heads_that_imitate():
    page = " ".join((ROOT / "docs" / "results-cifar10.md").read_text().split())
    accuracies, conv2, fc1 = [], [], []
    for name in ("heads-that-imitate/mix-1", "heads-that-imitate/mix-0.5", "small-heads-held-out/HEAD-seed1"):
        with open(RESULTS / f"cifar10-{name}.csv", newline="") as file:
            rows = list(csv.DictReader(file))[-4:]
        accuracies.append(f"{float(rows[-1]['validation_accuracy']):.2f}")
        for angles, layer in ((conv2, "conv2.conv"), (fc1, "fc1.linear")):
            angles.append(f"{statistics.mean(float(row[f'parameter_deg_{layer}.weight']) for row in rows):.0f}")
    assert "it has {} and {} % of 5,000 held-out images, {} as it is".format(*accuracies) in page
    assert "conv2's are at {} and {} degrees".format(", ".join(conv2[:2]), conv2[2]) in page
    assert "fc1's at {} and {}.".format(", ".join(fc1[:2]), fc1[2]) in page


def test_the_search_from_the_best_recipes():
    runs = last_epochs("cifar10-search-from-best-12-epochs")
    for row in table("docs/results-cifar10.md", "At full length"):
        found = {f"{float(run['validation_accuracy']):.2f}" for run in runs.pop(row.pop(""))}
        shown = {word for cell in row.values() for word in re.findall(r"\d\d\.\d\d", cell)}
        assert shown == found and len(found) == 7
    assert not runs


def test_dkp_with_b_on_one_cycle():
    page = (ROOT / "docs" / "results-cifar10.md").read_text().replace("\n ", "")
    for name in ("gamma-0.9", "gamma-1"):
        with open(RESULTS / "cifar10-dkp-one-cycle-12-epochs" / f"{name}.csv", newline="") as file:
            assert accuracy([row for row in csv.DictReader(file) if row["epoch"] == "12"]) in page


def test_dkp_for_100_epochs():
    last = epochs_of("cifar10-dkp-100-epochs", "tied-3e-4-gamma-lr.csv")[99]
    shown = f"{float(last['test_accuracy']):.2f} %"
    page = " ".join((ROOT / "docs" / "results-cifar10.md").read_text().split())
    assert f"to {float(last['train_loss']):.2f} in the last, and DKP has {shown} of the test images" in page
    assert f"[{shown}](docs/results-cifar10.md#other-steps-of-dkps-b), one seed" in (ROOT / "README.md").read_text()


def test_step_times():
    for heading, file in (("What a step costs", "step_time_cpu.json"), ("Every rule", "step_time_cpu_rules.json")):
        rows = json.loads((RESULTS / file).read_text())["rows"]
        steps = {(f"{row['net']} {row['batch']}", row["way"], row["variant"]): row for row in rows}
        seen = set()
        for row in table("docs/speed.md", heading):
            key = row.pop("net, batch"), SETTINGS[row.pop("memory format")]
            seen |= {(*key, name) for name in ("BP", *row) if " / " not in name}
            assert row.pop("BP, ms") == f"{steps[*key, 'BP']['ms'][1]:.1f}"
            for name, cell in row.items():
                variant, _, base = name.partition(" / ")
                assert cell == f"{steps[*key, variant]['to_' + (base or 'BP')][1]:.3f}", (key, name)
        assert seen - {(net, way, "BP, ms") for net, way, _ in steps} == steps.keys()


def test_small_heads_beside_dkp():
    page = (ROOT / "docs" / "speed.md").read_text()
    for name in ("step_time_cpu_heads", "step_time_cpu_heads_again"):
        measured = json.loads((RESULTS / f"{name}.json").read_text())
        (line,) = [line for line in page.splitlines() if f"/{name}.json" in line]
        shown = [measured["git"][:7]]
        for memory_format in ("channels_last", "contiguous"):
            ways = [row for row in measured["rows"] if row["way"] == SETTINGS[memory_format]]
            times = {row["variant"]: row["seconds"] for row in ways}
            ratios = [a / b for a, b in zip(times["HEAD 32 4"], times["DKP optimizer"], strict=True)]
            assert len(ratios) == 60
            shown.append("{1:.2f} ({0:.2f}-{2:.2f})".format(*statistics.quantiles(ratios, n=4, method="inclusive")))
        commit, *ratios = cells(line)
        assert [commit.partition(" ")[0], *ratios] == shown


def test_step_times_on_a_gpu():
    rows = []
    for net in ("ConvNet", "AlexNet"):
        rows += json.loads((RESULTS / f"step_time_cuda_{net}.json").read_text())["rows"]
    steps = {(f"{row['net']} {row['batch']}", row["way"], row["variant"]): row for row in rows}
    for row in table("docs/speed.md", "On a GPU"):
        key = row.pop("net, batch"), f"channels_last {row.pop('precision')} {row.pop('execution')}"
        assert row.pop("BP, ms") == f"{steps.pop((*key, 'BP'))['ms'][1]:.2f}"
        for variant, cell in row.items():
            assert cell == f"{steps.pop((*key, variant))['to_BP'][1]:.2f}", (key, variant)
    assert not steps


def test_steps_of_every_rule_on_a_gpu():
    rows = json.loads((RESULTS / "step_time_cuda_rules.json").read_text())["rows"]
    steps = {(row["way"], row["variant"]): row for row in rows}
    for row in table("docs/speed.md", "Every rule on a GPU"):
        way = f"channels_last {row.pop('precision')} graph"
        assert row.pop("BP, ms") == f"{steps.pop((way, 'BP'))['ms'][1]:.3f}"
        for variant, cell in row.items():
            assert cell == f"{steps.pop((way, variant))['to_BP'][1]:.2f}", (way, variant)
    assert not steps


def epochs_of(*path):
    with open(RESULTS.joinpath(*path), newline="") as file:
        return list(csv.DictReader(file))


def test_the_conv_net_on_a_gpu():
    shown = {row[""]: row for row in table("docs/results-cifar10.md", "On a GPU")}
    assert len(shown) == len(list((RESULTS / "cifar10-cuda-10-epochs").iterdir())) == 10
    for mode, row in shown.items():
        last = epochs_of("cifar10-cuda-10-epochs", f"{mode}.csv")[9]
        assert row["test accuracy, %"] == f"{float(last['test_accuracy']):.2f}"
        assert row["training, %"] == f"{float(last['train_accuracy']):.2f}"
    for row in table("docs/results-cifar10.md", "On a GPU", 2):
        run = epochs_of("cifar10-cuda-100-epochs", f"{row.pop('')}.csv")
        last = {"training, %": f"{float(run[99]['train_accuracy']):.2f}"}
        columns = {name: int(name.removeprefix("epoch ")) for name in row if name not in last}
        found = {name: f"{float(run[epoch - 1]['test_accuracy']):.2f}" for name, epoch in columns.items()}
        assert len(run) == 100 and row == found | last


def test_alexnet_on_a_gpu():
    shown = table("docs/results-alexnet.md", "90 epochs at 224x224")
    assert {row["run"] for row in shown} == {
        path.stem for path in (RESULTS / "cifar100-alexnet224-90-epochs").iterdir()
    }
    for row in shown:
        run = epochs_of("cifar100-alexnet224-90-epochs", f"{row.pop('run')}.csv")
        columns = {name: int(name.removeprefix("epoch ")) for name in row if name.removeprefix("epoch ").isdecimal()}
        for name, epoch in columns.items():
            assert row[name] == (f"{float(run[epoch - 1]['test_accuracy']):.2f}" if epoch <= len(run) else "")
        whole = len(run) == 90
        assert row["top-5"] == (f"{float(run[-1]['test_top5_accuracy']):.2f}" if whole else "")
        assert row["training, %"] == (f"{float(run[-1]['train_accuracy']):.2f}" if whole else "")
        assert row["diverged in epoch"] in ([""] if whole else ["", str(len(run) + 1)])


def test_alexnet_with_batch_norm_in_its_fc_blocks():
    folder = "cifar100-alexnet64-fc-norm"
    for row in table("docs/results-alexnet.md", "Batch norm in fc1 and fc2"):
        run = epochs_of(folder, f"{row.pop('')}.csv")
        found = {
            name: f"{float(run[epoch]['test_accuracy']):.2f}" for name, epoch in (("epoch 5", 4), ("10", 9), ("15", 14))
        }
        found |= {"top-5": f"{float(run[14]['test_top5_accuracy']):.2f}"}
        found |= {"training, %": f"{float(run[14]['train_accuracy']):.2f}"}
        found |= {name: f"{float(run[14][name.replace('ing', '').replace(' ', '_')]):.3f}" for name in list(row)[-2:]}
        assert row == found
    for row in table("docs/results-alexnet.md", "Batch norm in fc1 and fc2", 2):
        run = epochs_of(folder, f"{row.pop('run')}.csv")
        *shown, fourth, eighth, last = row.values()
        angles = [f"{float(epoch['alignment_deg_fc1']):.1f}" for epoch in (run[3], run[7], run[-1])]
        assert [fourth, eighth, last] == angles
        found = [
            f"{float(run[epoch - 1]['test_accuracy']):.2f}" if epoch <= len(run) else "" for epoch in (4, 8, 12, 16, 20)
        ]
        assert shown == found
    lengths = []
    for row in table("docs/results-alexnet.md", "Batch norm in fc1 and fc2", 3):
        run = epochs_of("cifar100-alexnet64-90-epochs", f"{row.pop('run')}.csv")
        lengths.append(len(run))
        keys = {
            "top-5": ("test_top5_accuracy", 2),
            "training, %": ("train_accuracy", 2),
            "training loss": ("train_loss", 3),
        }
        found = {name: f"{float(run[-1][key]):.{digits}f}" for name, (key, digits) in keys.items()}
        for name in ("epoch 10", "20", "30", "40", "50", "last"):
            epoch = len(run) if name == "last" else int(name.removeprefix("epoch "))
            found[name] = f"{float(run[epoch - 1]['test_accuracy']):.2f}" if epoch <= len(run) else ""
        for name, epoch in (("fc1's angle after 10", 10), ("after 30", 30), ("after the last", len(run))):
            found[name] = f"{float(run[epoch - 1]['alignment_deg_fc1']):.1f}"
        assert row == found
    readme = (ROOT / "README.md").read_text()
    assert "with it DKP trains for {} and LAS for {} epochs".format(*lengths) in readme
    rows = {row[""]: row for row in table("docs/results-alexnet.md", "The defaults train", 2)}
    for mode in ("LAS", "DKP"):
        run = epochs_of(folder, f"{mode}-constant.csv")
        assert [rows[mode][name] for name in ("epoch 1", "2", "3")] == [
            f"{float(x['train_loss']):.3f}" for x in run[:3]
        ]


def test_steps_over_several_processes():
    rows = json.loads((RESULTS / "pipeline_cpu.json").read_text())["rows"]
    steps = {(row["net"], row["micro_batches"], row["variant"]): row for row in rows}
    seen = {key for key in steps if key[2] == "BP DDP"}
    for row in table("docs/speed.md", "The backward pass over several processes"):
        net, pieces = row.pop("net"), int(row.pop("micro-batches"))
        gpipe = steps[net, pieces, "BP GPipe"]
        assert row.pop("BP GPipe, ms") == f"{gpipe['ms'][1]:.0f}"
        pairs = zip(steps[net, 1, "BP DDP"]["seconds"], gpipe["seconds"], strict=True)
        assert row.pop("BP DDP") == f"{statistics.median(ddp / theirs for ddp, theirs in pairs):.2f}"
        for variant, cell in row.items():
            step = steps.get((net, pieces, variant))
            assert cell == (f"{step['to_gpipe'][1]:.2f}" if step else ""), (net, pieces, variant)
        seen |= {(net, pieces, variant) for variant in ("BP GPipe", *row)}
    assert steps.keys() <= seen
    best = {}
    for (net, _, variant), step in sorted(steps.items(), key=lambda item: -item[1]["ms"][1]):
        best[net, variant] = step["seconds"]  # the last is the fastest
    to = {base: [] for base in ("BP GPipe", "BP DDP")}
    for (net, variant), seconds in best.items():
        if variant.startswith("DKP"):
            for base, ratios in to.items():
                pairs = zip(seconds, best[net, base], strict=True)
                ratios.append(statistics.median(ours / theirs for ours, theirs in pairs))
    shown = "takes {:.2f} to {:.2f} of a GPipe pipeline's and {:.2f} to {:.2f} of data parallel"
    assert (
        shown.format(*(end(ratios) for ratios in to.values() for end in (min, max))) in (ROOT / "README.md").read_text()
    )


def test_other_steps_of_dkp():
    for row in table("docs/results-cifar10.md", "Other steps of DKP's B"):
        name = row["B's steps"].partition(":")[0]
        with open(RESULTS / "cifar10-dkp-steps" / f"{name}.csv", newline="") as file:
            last = list(csv.DictReader(file))[11]
        assert row["held out, %"] == f"{float(last['validation_accuracy']):.2f}"
        assert row["training loss"] == f"{float(last['train_loss']):.3f}"
        for point in ("conv1", "conv2", "fc1"):
            assert row[f"signal {point}"] == f"{float(last[f'alignment_deg_{point}']):.1f}"


def test_deeper_nets():
    with open(RESULTS / "deep-nets" / "runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    with open(RESULTS / "deep-nets" / "search.csv", newline="") as file:
        tried = list(csv.DictReader(file))
    runs = {(row["net"], row["rule"]): row for row in rows}
    assert len(runs) == len(rows)
    for heading, net in (("ResNet-20", "resnet20"), ("VGG-11", "vgg11")):
        for row in table("docs/results-deep.md", heading):
            run = runs.pop((net, row[""]))
            assert settings_of(run) == settings_in(row["settings"]) and row["angles, degrees"] == run["angles"]
            others = [other for other in tried if (other["net"], other["rule"]) == (net, row[""])]
            assert row["settings"].endswith(f" of {len(others)}")
            (same,) = [other for other in others if settings_of(other) == settings_of(run)]
            assert row["held out after 1 epoch, %"] == f"{float(same['accuracy']):.2f}"
            assert float(same["accuracy"]) == max(float(other["accuracy"]) for other in others)
            assert row["test accuracy, %"] == f"{float(run['accuracy']):.2f}"
            for name, key, digits in (("training loss", "train_loss", 3), ("last activation", "activation", 2)):
                number = float(run[key])
                assert row[name] == (f"{number:.{digits}f}" if number < 1000 else f"{number:.1e}")
            assert row["seconds an epoch"] == f"{float(run['seconds']):.0f}"
    assert not runs


def settings_of(run):
    return {flag: float(run[flag]) for flag in ("lr", "b_lr", "b_scale") if run[flag]}


def settings_in(cell):
    words = cell.split("`")[1].split()
    return {
        flag.strip("-").replace("-", "_"): float(value) for flag, value in zip(words[::2], words[1::2], strict=True)
    }
