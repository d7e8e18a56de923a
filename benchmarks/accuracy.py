"""Accuracy and angles of the learning rules: rules x seeds by a training script, tables and plots.

Run:    python benchmarks/accuracy.py --data DIR --recipe original
        trains CIFAR-10's net; --net alexnet trains AlexNet on CIFAR-100
Search: python benchmarks/accuracy.py --data DIR --search, then --recipe runs/NAME/recipe.json
        --search best --epochs N begins at the best recipe instead of the original's settings
Everything goes to a folder under runs/; where benchmarks/results has a sweep of that name, the last line compares both.
Stop it with Ctrl-C; the same command goes on where it was, and several of them at once share the runs. Every flag that
is not listed below goes to each run of the training script.
"""

import csv
import json
import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import alexnet.main
import main as convnet
from feedback import RULES, learned_rules
from training.arguments import RECIPES, Parser, positive_int, seed
from training.checkpoint import NAMES
from training.console import run_script
from training.files import locked
from training.machine import REPOSITORY
from training.plot import Panel, Row, angle_titles, draw, read_metrics
from training.run import DIVERGED, plural
from training.synthetic import synthetic_images

RUNS, COMMITTED = REPOSITORY / "runs", REPOSITORY / "benchmarks" / "results"
LOCK = "lock"  # the name of a file: of a run that a process is at, and of the sweep while its results are written
VERSION = 3  # of the layout of sweep.json
# not for the user to give
OF_THE_SWEEP: tuple[str, ...] = ("--train-mode", "--seed", "--out", "--resume", "--validation", "--dry-run")
OF_THE_SWEEP += ("-e", "--evaluate", "--classify", "--save-model")
NAMED = ("best", "original")  # recipes that the scripts know
HELD_OUT = 5000  # training images on which a search of CIFAR-10's net chooses settings
DEVIATIONS = 2  # a reproduction further than this from what is committed is named

Changes = dict[str, str | None]  # flags of the script and their values, None for one that has no value


@dataclass(frozen=True)
class Run:
    """One run of a training script: rule, seed, the name of its settings, these as flags, and the sweep's own flags."""

    mode: str
    seed: int
    recipe: str
    settings: tuple[str, ...]
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.mode}-{self.recipe}-seed{self.seed}"


def convnet_stages(mode: str) -> list[list[Changes]]:
    """What a search of CIFAR-10's net tries, from the original's settings: ten runs for each rule.

    Learning rate and schedule of W first, with and without --fc-norm; then the learning rate, schedule, decay and start
    of B where those are its own, or the learning rate, schedule and shape of heads, else more of W's, and B's start;
    last, one step of W's learning rate beyond the edge of what was tried.
    """
    beyond: list[Changes] = [{"--lr": {"BP": "0.05", "DKP": "0.001", "LAS": "0.02"}.get(mode, "0.03")}]
    one_cycle: Changes = {"--schedule": "one-cycle"}
    if RULES[mode].head:
        heads: Changes = one_cycle | {"--b-lr": "1e-3"}
        weights = [heads | {"--lr": lr, "--fc-norm": None} for lr in ("0.005", "0.01", "0.02")]
        weights += [heads | {"--lr": "0.01"}]
        shape: list[Changes] = [{"--head-width": "256"}, {"--head-pool": "4"}]
        return [weights, [{"--b-lr": "3e-4"}, {"--b-lr": "3e-3"}], [{"--gamma": "1"}], shape, beyond]
    weights = [one_cycle | {"--lr": lr} for lr in ("0.002", "0.005")]
    weights += [one_cycle | {"--lr": lr, "--fc-norm": None} for lr in ("0.005", "0.01")]
    if RULES[mode].learns:
        b_lr: list[Changes] = [{"--b-lr": "3e-5"}, {"--b-lr": "3e-4"}]
        return [weights, b_lr, [{"--gamma": "1"}], [{"--b-wd": "1e-3"}], [{"--b-scale": "0"}], beyond]
    rest: list[Changes] = [{"--b-scale": "0.5"}, {"--b-scale": "2"}]
    if not RULES[mode].has_feedback:
        rest = [{"--lr": "0.03"}, {"--schedule": "constant", "--lr": "0.005"}]
    return [weights, [{"--lr": "0.02"}], [{"--wd": "1e-4"}, {"--wd": "1e-3"}], rest, beyond]


def alexnet_stages(mode: str) -> list[list[Changes]]:
    """What a search of AlexNet tries, from the original's settings: eight runs for each rule.

    W's learning rate first; then the learning rate of B or heads, or B's start, for BP and KP more of W's; then one
    more learning rate of W; last, what the edges of the stages before call for.
    """
    heads = [name for name, rule in RULES.items() if rule.head]
    first = {"DFA": ("0.0003", "0.001", "0.003"), "BP": ("0.01", "0.03", "0.1"), "KP": ("0.01", "0.03", "0.1")}
    b_lr: Changes = {"--b-lr": "1e-3" if mode in heads else "1e-4"} if RULES[mode].learns else {}
    weights: list[Changes] = [{"--lr": lr, **b_lr} for lr in first.get(mode, ("0.003", "0.01", "0.03"))]
    second: dict[str, list[Changes]] = {
        "FA": [{"--b-scale": "0.5"}, {"--b-scale": "2"}],
        "DFA": [{"--b-scale": "0.3"}, {"--b-scale": "0.1"}],
        **{learned: [{"--b-lr": "3e-5"}, {"--b-lr": "3e-4"}] for learned in learned_rules()},
        **{head: [{"--b-lr": "3e-4"}, {"--b-lr": "3e-3"}] for head in heads},
    }
    last: dict[str, list[Changes]] = {
        "FA": [{"--lr": "0.001"}, {"--wd": "3e-3"}],
        "DFA": [{"--lr": "0.003", "--b-scale": "0.1"}, {"--lr": "0.003", "--b-scale": "0.03"}],
        "DKP": [{"--lr": "0.05"}, {"--lr": "0.1"}],
        "LAS": [{"--b-lr": "1e-3"}, {"--lr": "0.05"}],
        "FDFA": [{"--b-lr": "1e-3"}, {"--lr": "0.05"}],
        **{head: [{"--head-width": "256"}, {"--lr": "0.05"}] for head in heads},
    }
    beyond: list[Changes] = [{"--lr": {"DFA": "0.01"}.get(mode, "0.02")}]
    more: list[Changes] = [{"--lr": "0.005"}, {"--lr": "0.05"}]
    return [weights, second.get(mode, more), beyond, last.get(mode, [{"--wd": "1e-3"}, {"--wd": "3e-3"}])]


def steps_from(best: Changes, mode: str, script: ModuleType) -> list[list[Changes]]:
    """What a search from the best recipe tries: the recipe itself and steps from it, seven runs for each rule.

    W's learning rate first, with --fc-norm where the recipe is without; then its decay; then the learning rate of B
    or heads and its schedule, where those are their own.
    """
    parser = script.make_parser()
    known = parser.parse_args(words(best))

    def times(name: str, *factors: float) -> list[Changes]:
        return [{f"--{name.replace('_', '-')}": f"{getattr(known, name) * factor:.2g}"} for factor in factors]

    if not RULES[mode].learns:
        return [[{}, *times("lr", 2, 1.4, 0.7, 0.5)], times("wd", 1 / 3, 3)]
    weights = times("lr", 2, 0.5)
    if not getattr(known, "fc_norm", True):
        weights = [changes | {"--fc-norm": None} for changes in times("lr", 5, 2.5)]
    gamma: Changes = {"--gamma": "0.8" if (known.gamma or parser.feedback_defaults["gamma"]) == 1 else "1"}
    return [[{}, *weights], times("wd", 1 / 3), times("b_lr", 3, 1 / 3), [gamma]]


@dataclass(frozen=True)
class Net:
    """What is swept over: a net, its script and data, and how a search of its settings goes.

    dataset: the set and its name. epochs: of a run, and of a run of a search. flags: of every run. search_flags: of
    every run of a search. score: of a row of metrics.csv, the higher the better.
    """

    script: ModuleType
    model: str
    data_flag: tuple[str, ...]
    dataset: str
    classes: int
    epochs: tuple[int, int]
    flags: tuple[str, ...]
    search_flags: tuple[str, ...]
    stages: Callable[[str], list[list[Changes]]]
    score: Callable[[Row], float]


NETS = {
    "convnet": Net(
        script=convnet,
        model="ConvNet",
        data_flag=("--data",),
        dataset="cifar10",
        classes=10,
        epochs=(50, 3),
        flags=("--batch-size", "50"),
        search_flags=("--validation", str(HELD_OUT)),
        stages=convnet_stages,
        score=lambda row: float(row["validation_accuracy"]),
    ),
    "alexnet": Net(
        script=alexnet.main,
        model="AlexNet",
        data_flag=(),
        dataset="cifar100",
        classes=100,
        epochs=(90, 1),
        flags=(),
        search_flags=("--limit-batches", "100"),
        stages=alexnet_stages,
        score=lambda row: -float(row["train_loss"]),
    ),
}


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="benchmarks/accuracy.py", description=__doc__)
    add = parser.add_argument
    add("--net", choices=NETS, default="convnet", help="and its data: convnet, CIFAR-10; alexnet, CIFAR-100")
    add("--data", default="data", metavar="DIR", help="folder where data are found and kept (default: ./data)")
    modes: dict[str, Any] = {"type": str.upper, "choices": RULES, "default": list(RULES)}
    add("--modes", nargs="+", **modes, metavar="MODE", help=f"default: {' '.join(RULES)}")
    add("--seeds", nargs="+", type=seed, metavar="N", help="default: 1 2 3; 1 for a search")
    add("--epochs", type=positive_int, metavar="N", help="of every run (default: 50, alexnet 90; of a search 3 and 1)")
    add("--recipe", default="best", help="best, original, or a recipe.json that a search wrote (default: best)")
    start: dict[str, Any] = {"nargs": "?", "const": "original", "choices": NAMED, "metavar": "START"}
    add("--search", **start, help="find settings for each rule, from original, or best; no test image chooses any")
    add("--name", help="of the folder under runs/ (default: DATASET-RECIPE-N-epochs)")
    add("--quick", action="store_true", help="two epochs of a tiny set in a folder of their own, to see that it runs")
    return parser


def words(changes: Changes) -> list[str]:
    """Flags and values as a command line has them."""
    return [word for pair in changes.items() for word in pair if word is not None]


def stages_of(mode: str, args: Namespace) -> list[list[Changes]]:
    """What the search tries for `mode`, stage by stage."""
    net = NETS[args.net]
    return net.stages(mode) if args.search == "original" else steps_from(best_settings(mode, net), mode, net.script)


def best_settings(mode: str, net: Net) -> Changes:
    """The best recipe's flags, but for those of every run."""
    flags = " ".join(json.loads(RECIPES.read_text())[net.model]["best"][mode]).split("--")[1:]
    pairs = (flag.strip().partition(" ") for flag in flags)
    return {f"--{name}": value or None for name, _, value in pairs if f"--{name}" not in net.flags}


def search_runs(mode: str, folder: Path, args: Namespace, flags: Sequence[str]) -> list[Run]:
    """The runs of `mode` in a search, as far as they can be known: to the first stage that is not over.

    Each stage changes the best settings of the stages before.
    """
    settings: dict[str, Changes] = {}
    runs: list[Run] = []
    for stage in stages_of(mode, args):
        base = best_settings(mode, NETS[args.net]) if args.search == "best" else {}
        if runs:
            best = best_outcomes(outcomes_of(runs, folder, args)).get(mode)
            if best is None or not all(is_over(folder / run.name, args.epochs) for run in runs):
                break
            base = settings[best.recipe]
        for changes in stage:
            name = "-".join(words(changes)).replace("--", "") or "best-itself"
            settings[name] = base | changes
            runs += [Run(mode, seed, name, tuple(words(settings[name])), tuple(flags)) for seed in args.seeds]
    return runs


def read_recipe(path: Path, modes: Sequence[str]) -> dict[str, list[str]]:
    """The flags of each rule, from a search's recipe.json.

    Raises:
        ValueError: the file cannot be read, or lacks one of `modes`.
    """
    try:
        recipe = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"--recipe: cannot read {path}, expected original, best or a recipe.json ({error})") from error
    lists = [list(map(str, flags)) == flags for flags in recipe.values()]
    if not all(lists) or path.stem in NAMED:
        raise ValueError(f"--recipe: {path} is no recipe: expected lists of flags, and another name than best.json")
    missing = [mode for mode in modes if mode not in recipe]
    if missing:
        raise ValueError(f"--recipe: {path} has nothing for {', '.join(missing)}")
    return recipe


def is_over(folder: Path, epochs: int) -> bool:
    """Whether a run has done its epochs, or failed."""
    return len(read_metrics(folder)) >= epochs or (folder / "failed").exists()


def command_line(run: Run, folder: Path, args: Namespace) -> list[str]:
    """The training script's command line for a new run in `folder`."""
    net = NETS[args.net]
    flags = [*net.data_flag, str(args.data), "--train-mode", run.mode, "--seed", str(run.seed)]
    flags += ["--epochs", str(args.epochs), "--dataset", net.dataset, "--out", str(folder)]
    flags += ["--recipe", run.recipe if run.recipe in NAMED else "original"]
    return [*flags, *net.flags, *(search_flags(args) if args.search else ()), *run.settings, *run.flags]


def train(run: Run, folder: Path, args: Namespace) -> None:
    """Train `run` to its end, from where it is; leave a file "failed" if its loss or weights were not finite.

    A signal that comes while the last epoch is evaluated finds the run finished; a second one stops the next run.

    Raises:
        SystemExit: it was stopped by a signal, could not write its files, or the script refused its command line.
    """
    net = NETS[args.net]
    if (folder / NAMES[net.model]).exists():
        flags = [*net.data_flag, str(args.data), "--resume", str(folder)]
    else:
        flags = command_line(run, folder, args)
    status = net.script.main(flags)
    if status == DIVERGED:
        (folder / "failed").touch()
    elif status:
        print("the sweep's own command goes on from there, too", file=sys.stderr)
        raise SystemExit(status)


def search_flags(args: Namespace) -> Sequence[str]:
    """The flags that a search adds to every run; with --quick, for the tiny set."""
    return ("--validation", "16") if args.quick and args.net == "convnet" else NETS[args.net].search_flags


def sweep(runs: list[Run], to_come: int, folder: Path, args: Namespace) -> None:
    """Train all `runs` that are not over nor another process's; after each, write the results of the whole sweep.

    The plots are drawn at the end. `to_come` is how many more runs will follow these.
    """
    for number, run in enumerate(runs, start=1):
        with locked(folder / run.name / LOCK) as free:
            if not free:
                print(f"{run.name}: another process is at it, passed over", flush=True)
                continue
            if is_over(folder / run.name, args.epochs):
                continue
            left = what_is_left(runs, to_come, folder, args.epochs)
            print(f"run {number}/{len(runs) + to_come}, {run.name}; {left}", flush=True)
            train(run, folder / run.name, args)
        publish(runs, folder, args)
    publish(runs, folder, args)
    draw_results(folder, args)


def publish(runs: list[Run], folder: Path, args: Namespace) -> None:
    """Write the results of the whole sweep, `runs` included.

    Raises:
        ValueError: as `remembered` does.
    """
    with locked(folder / LOCK, wait=True):
        write_results(remembered(folder, runs, args), folder, args)


def what_is_left(runs: list[Run], to_come: int, runs_folder: Path, epochs: int) -> str:
    """The epochs to train, and for about how long by the mean of those that are done."""
    done = {run: read_metrics(runs_folder / run.name) for run in runs}
    left = sum(epochs - len(rows) for run, rows in done.items() if not is_over(runs_folder / run.name, epochs))
    left += epochs * to_come
    seconds = [float(row["seconds"]) for rows in done.values() for row in rows]
    if not seconds:
        return f"{plural(left, 'epoch')} to go"
    return f"{plural(left, 'epoch')} to go, about {timedelta(seconds=round(left * statistics.mean(seconds)))} left"


def write_results(runs: list[Run], folder: Path, args: Namespace) -> None:
    """Write metrics.csv and table.md; for a search recipe.json and runner-up.json too."""
    rows = [
        {"mode": run.mode, "seed": str(run.seed), "recipe": run.recipe}
        | {"settings": " ".join(run.settings), "flags": " ".join(run.flags)}
        | row
        for run in runs
        for row in read_metrics(folder / run.name)
    ]
    if not rows:
        return
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    split = split_of(rows)
    outcomes = outcomes_of(runs, folder, args)
    configs = [folder / run.name / "config.json" for run in runs if read_metrics(folder / run.name)]
    (folder / "table.md").write_text(table(outcomes, split, args) + where(configs))
    if args.search:
        for place, name in enumerate(("recipe.json", "runner-up.json")):
            found = best_outcomes(outcomes, place)
            recipe = {mode: NETS[args.net].flags + found[mode].settings for mode in RULES if mode in found}
            (folder / name).write_text(json.dumps(recipe, indent=2) + "\n")


def draw_results(folder: Path, args: Namespace) -> None:
    """Draw the plots of the sweep in `folder`, from its metrics.csv; none of a search."""
    rows = read_metrics(folder)
    if args.search or not rows:
        return
    split = split_of(rows)
    curves = {mode: [row for row in rows if row["mode"] == mode] for mode in RULES}
    accuracy = [Panel(f"{split}_accuracy", "", f"{split} accuracy, %")]
    draw(curves, accuracy, folder / "accuracy.png", (8, 4.5), per_row=1)
    for what in ("signal", "gradient"):
        panels = [
            Panel(column, title, "angle to BP's, degrees")
            for column, title in angle_titles(list(rows[0])).items()
            if title.startswith(what)
        ]
        if panels:
            draw(curves, panels, folder / f"{what}_angles.png", (8, 3.5), per_row=len(panels), shared=True)


def split_of(rows: Sequence[Row]) -> str:
    """What the accuracies of these rows are of, "test" or "validation" images."""
    return "validation" if "validation_accuracy" in rows[0] else "test"


@dataclass
class Outcome:
    """What came of the runs of one rule and settings: accuracies in percent and last angles of whole runs, counts."""

    mode: str
    recipe: str
    settings: tuple[str, ...]
    flags: tuple[str, ...]
    scores: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)
    best: list[float] = field(default_factory=list)
    angles: dict[str, list[float]] = field(default_factory=dict)
    runs: int = 0
    failed: int = 0


def outcomes_of(runs: list[Run], folder: Path, args: Namespace) -> list[Outcome]:
    """An outcome for each rule and settings, in the order of `runs`."""
    outcomes: dict[tuple[str, str], Outcome] = {}
    for run in runs:
        outcome = outcomes.setdefault((run.mode, run.recipe), Outcome(run.mode, run.recipe, run.settings, run.flags))
        rows = read_metrics(folder / run.name)
        outcome.runs += 1
        outcome.failed += (folder / run.name / "failed").exists()
        if len(rows) == args.epochs:
            accuracies = [float(row[f"{split_of(rows)}_accuracy"]) for row in rows]
            outcome.last.append(accuracies[-1])
            outcome.best.append(max(accuracies))
            outcome.losses.append(float(rows[-1]["train_loss"]))
            if args.search:
                outcome.scores.append(NETS[args.net].score(rows[-1]))
            for key in angle_titles(rows[-1]):
                if rows[-1][key]:  # none of a signal or a gradient that is zero
                    outcome.angles.setdefault(key, []).append(float(rows[-1][key]))
    return list(outcomes.values())


def table(outcomes: list[Outcome], split: str, args: Namespace) -> str:
    """The markdown table, a line for each rule and settings, and below it what its figures are."""
    lines = [
        "| rule | settings | last epoch, % | std | best epoch, % | std | training loss | n | failed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        flags = " ".join(outcome.settings + outcome.flags)
        flags = f" `{flags}`" if flags else ""
        cells = [outcome.mode, outcome.recipe + flags]
        for values in (outcome.last, outcome.best):
            cells.append(f"{statistics.mean(values):.2f}" if values else "")
            cells.append(f"{statistics.stdev(values):.2f}" if len(values) > 1 else "")
        cells.append(f"{statistics.mean(outcome.losses):.4g}" if outcome.losses else "")
        lines.append("| " + " | ".join([*cells, str(len(outcome.last)), str(outcome.failed)]) + " |")
    common = [*NETS[args.net].flags, *(search_flags(args) if args.search else ())]
    lines += [
        "",
        f"Accuracy on the {split} images after {plural(args.epochs, 'epoch')}: mean and standard deviation over n",
        f"seeds. The best epoch is picked on the {split} images themselves, so it flatters: the last is the result.",
        "The training loss is the last epoch's mean. failed: runs whose loss or weights diverged.",
        *([f"Every run: `{' '.join(common)}`, unless its settings say otherwise."] if common else []),
    ]
    whole = [outcome for outcome in outcomes if outcome.angles]
    if whole:
        titles = angle_titles({key: "" for outcome in whole for key in outcome.angles})
        lines += ["", f"| rule | settings | {' | '.join(titles.values())} |", "|---|---|" + "---|" * len(titles)]
        for outcome in whole:
            angles = {key: f"{statistics.mean(values):.1f}" for key, values in outcome.angles.items()}
            shown = " | ".join(angles.get(key, "") for key in titles)
            lines.append(f"| {outcome.mode} | {outcome.recipe} | {shown} |")
        lines += [
            "",
            "Angles to BP's in degrees after the last epoch, mean over the n seeds: of the learning signal at each",
            "point, per image and then averaged, and of the gradient of the weights, from the same images together.",
            "",
        ]
    return "\n".join(lines) + "\n"


def where(configs: list[Path]) -> str:
    """A line that says on what hardware, torch and commit the runs with these config.json began."""
    found = [json.loads(path.read_text()) for path in configs]
    lines = (f"{c['hardware']}, torch {c['versions']['torch']}, commit {c['git']}." for c in found)
    return "\n".join(dict.fromkeys(lines)) + "\n"


def best_outcomes(outcomes: list[Outcome], place: int = 0) -> dict[str, Outcome]:
    """Of each rule, the outcome of best mean score at the last epoch, among those whose runs are all whole.

    `place` 1 is the second best. Of several that are as good, the last by its name comes first.
    """
    whole = (outcome for outcome in outcomes if len(outcome.scores) == outcome.runs)
    ranked = sorted(whole, key=lambda outcome: (statistics.mean(outcome.scores), outcome.recipe), reverse=True)
    by_mode: dict[str, list[Outcome]] = {}
    for outcome in ranked:
        by_mode.setdefault(outcome.mode, []).append(outcome)
    return {mode: of_mode[place] for mode, of_mode in by_mode.items() if len(of_mode) > place}


def compare(outcomes: list[Outcome], committed: Path) -> str:
    """One line: how far each rule's mean accuracy after the last epoch is from the committed sweep's.

    In standard deviations over the committed seeds, or in points where there is one seed.
    """
    rows = read_metrics(committed)
    parts, far = [], []
    for outcome in outcomes:
        of_mode = [row for row in rows if row["mode"] == outcome.mode]
        last = max((int(row["epoch"]) for row in of_mode), default=0)
        values = [float(row[f"{split_of(rows)}_accuracy"]) for row in of_mode if int(row["epoch"]) == last]
        if not values or not outcome.last:
            continue
        difference, unit = statistics.mean(outcome.last) - statistics.mean(values), "points"
        if len(values) > 1:
            difference, unit = difference / statistics.stdev(values), "sd"
            far += [outcome.mode] if abs(difference) > DEVIATIONS else []
        parts.append(f"{outcome.mode} {difference:+.1f} {unit}")
    beyond = f"beyond {DEVIATIONS} sd: {', '.join(far)}" if far else f"none beyond {DEVIATIONS} sd"
    return f"against the committed {committed.name}: {', '.join(parts)}; {beyond}"


def make_runs(args: Namespace, flags: list[str], folder: Path) -> list[Run]:
    """The runs, all rules before the next seed; of a search, as far as `folder` lets them be known. `flags` go to each.

    Raises:
        ValueError: the recipe cannot be read.
    """
    if args.search:
        return [run for mode in args.modes for run in search_runs(mode, folder, args, flags)]
    recipe: Mapping[str, Sequence[str]] = dict.fromkeys(args.modes, ())
    name = args.recipe
    if name not in NAMED:
        name, recipe = Path(args.recipe).stem, read_recipe(Path(args.recipe), args.modes)
    return [Run(mode, seed, name, tuple(recipe[mode]), tuple(flags)) for seed in args.seeds for mode in args.modes]


def remembered(folder: Path, runs: list[Run], args: Namespace) -> list[Run]:
    """All runs of the sweep in `folder`: those of earlier command lines, kept in its sweep.json, and `runs`.

    Raises:
        ValueError: sweep.json has another layout; the folder's sweep has another net or other epochs, or other flags
            for one of `runs`; or it is a search, or a search by other seeds.
    """
    path = folder / "sweep.json"
    common = {"version": VERSION, "net": args.net, "epochs": args.epochs, "search": False}
    if args.search:
        common["search"] = args.seeds if args.search == "original" else [args.search, *args.seeds]
    kept = json.loads(path.read_text()) if path.exists() else common | {"runs": []}
    if kept.get("version") != VERSION:
        raise ValueError(f"{path} is of layout {kept.get('version')}, expected {VERSION}: name another --name")
    kept_runs = [Run(**run | {key: tuple(run[key]) for key in ("settings", "flags")}) for run in kept["runs"]]
    known = {run.name: run for run in kept_runs}
    if common | {"runs": kept["runs"]} != kept or any(known.get(run.name, run) != run for run in runs):
        raise ValueError(f"{folder} has a sweep with other settings (see {path.name}): name another --name")
    known |= {run.name: run for run in runs}
    everything = sorted(known.values(), key=lambda run: (list(RULES).index(run.mode), run.recipe, run.seed))
    path.write_text(json.dumps(common | {"runs": [asdict(run) for run in everything]}, indent=2) + "\n")
    return everything


def main(argv: list[str] | None = None) -> int:
    """Run the sweep that the command line asks for; return 0, or 1 where there is nothing to show or recommend."""
    parser = make_parser()
    args, flags = parser.parse_known_args(argv)
    net = NETS[args.net]
    args.modes = list(dict.fromkeys(args.modes))
    args.seeds = list(dict.fromkeys(args.seeds or ([1] if args.search else [1, 2, 3])))
    args.epochs = args.epochs or net.epochs[bool(args.search)]
    for flag in flags:
        if flag.partition("=")[0] in OF_THE_SWEEP:
            parser.error(f"{flag} is for the sweep itself to give to {net.script.make_parser().prog}")
    if args.search:
        tried = [changes for mode in args.modes for stage in stages_of(mode, args) for changes in stage]
        tried += [best_settings(mode, net) for mode in args.modes if args.search == "best"]
        for flag in {flag for changes in tried for flag in changes}:
            if any(given.partition("=")[0] == flag for given in flags):
                parser.error(f"{flag} is what a search tries")
        if args.recipe != "best":
            parser.error("--recipe does not go with --search: a search finds one")
        if args.search == "best" and any(given.partition("=")[0] == "--b-update" for given in flags):
            parser.error("--b-update does not go with --search best, which begins at B's recipe for Adam")
    kind = {None: Path(args.recipe).stem, "original": "search", "best": "search-from-best"}[args.search]
    args.name = args.name or f"{net.dataset}-{kind}-{plural(args.epochs, 'epoch').replace(' ', '-')}"
    with tempfile.TemporaryDirectory() if args.quick else nullcontext() as scratch:
        folder = RUNS / args.name
        if scratch is not None:
            args.data, folder = Path(scratch), Path(scratch) / "runs" / args.name
            images: Mapping[str, Any] = synthetic_images(net.classes, 64, 32)
            np.savez(args.data / f"{net.dataset}.npz", **images)
            args.seeds, args.epochs = args.seeds[:2], 2
        in_all = sum(len(stage) for mode in args.modes for stage in stages_of(mode, args)) * len(args.seeds)
        runs: list[Run] = []
        while not runs or args.search:
            before = runs
            try:
                runs = make_runs(args, flags, folder)
                for run in runs:  # a mistake in them is told before anything is written
                    net.script.parse_arguments(command_line(run, folder / run.name, args))
                with locked(folder / LOCK, wait=True):
                    remembered(folder, runs, args)
            except (ValueError, OSError) as error:
                parser.error(str(error))
            if runs == before:  # the runs that are over tell no more of a search
                break
            sweep(runs, in_all - len(runs) if args.search else 0, folder, args)
        return report(runs, in_all, folder, args)


def report(runs: list[Run], in_all: int, folder: Path, args: Namespace) -> int:
    """Print what came of it, what is missing, and how it compares; return the exit status."""
    if not (folder / "table.md").exists():
        print("no epoch is done", file=sys.stderr)
        return 1
    print((folder / "table.md").read_text(), end="")
    if not args.quick:
        print(f"see {', '.join(sorted(file.name for file in folder.iterdir() if file.suffix))} in {folder}")
    others = [run.name for run in runs if not is_over(folder / run.name, args.epochs)]
    if others:
        print(f"not over: another process is at {', '.join(others)}")
    elif args.search and len(runs) < in_all:
        print("the search ends early: of some rule, no setting came to its end", file=sys.stderr)
        return 1
    if (COMMITTED / args.name / "metrics.csv").exists() and not args.search:
        print(compare(outcomes_of(runs, folder, args), COMMITTED / args.name))
    return 0


if __name__ == "__main__":
    run_script(main)
