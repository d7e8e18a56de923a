"""Accuracy and angles of the learning rules on CIFAR-10: rules x seeds by main.py, tables and plots.

Run:    python benchmarks/accuracy.py --data DIR
Search: python benchmarks/accuracy.py --data DIR --search, then --recipe benchmarks/results/NAME/recipe.json
        --recipe best is what such a search has found
Stop it with Ctrl-C; the same command goes on where it was, and several of them at once share the runs. Every flag that
is not listed below goes to each run of main.py.
"""

import csv
import fcntl
import json
import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import matplotlib
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main as script
from feedback import LEARNED, RULES
from training.arguments import Parser, positive_int, run_script, seed
from training.run import REPOSITORY
from training.synthetic import synthetic_images

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RUNS, RESULTS = REPOSITORY / "runs", REPOSITORY / "benchmarks" / "results"
BATCH_SIZE = 50
OF_THE_SWEEP = ("--train-mode", "--seed", "--out", "--resume", "--validation", "--dry-run")  # not for the user to give
# what begins the columns of metrics.csv that hold angles: the learning signal's at a point, and the weights' gradient's
ANGLES = {"alignment_deg_": "signal", "parameter_deg_": "gradient"}
HELD_OUT = 5000  # training images on which a search chooses settings
# shade, line and marker of each rule: any one of the three tells them apart
STYLES = [
    ("#000000", "-", "o"),
    ("#c0a000", "--", "s"),
    ("#6060c0", "-.", "^"),
    ("#909090", ":", "D"),
    ("#b03030", (0, (6, 2)), "v"),
    ("#208050", (0, (3, 1, 1, 1, 1, 1)), "X"),
]

Row = dict[str, str]
Changes = dict[str, str | None]  # flags of main.py and their values, None for one that has no value


@dataclass(frozen=True)
class Run:
    """One run of main.py: its rule, seed, the name of its settings, these as flags, and the whole sweep's flags."""

    mode: str
    seed: int
    recipe: str
    settings: tuple[str, ...]
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.mode}-{self.recipe}-seed{self.seed}"


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="benchmarks/accuracy.py", description=__doc__)
    add = parser.add_argument
    add("--data", default="data", metavar="DIR", help="folder where CIFAR-10 is found and kept (default: ./data)")
    add("--modes", nargs="+", choices=RULES, default=RULES, metavar="MODE", help=f"default: {' '.join(RULES)}")
    add("--seeds", nargs="+", type=seed, metavar="N", help="default: 1 2 3; 1 for a search")
    add("--epochs", type=positive_int, metavar="N", help="of every run (default: 50; 3 for a search)")
    add("--recipe", default="original", help="original, best, or a recipe.json that a search wrote (default: original)")
    add("--search", action="store_true", help=f"find settings for each rule on {HELD_OUT} held-out training images")
    add("--name", help="of the folders under runs/ and benchmarks/results/ (default: cifar10-RECIPE-N-epochs)")
    add("--quick", action="store_true", help="two epochs of a tiny set in a folder of their own, to see that it runs")
    return parser


def stages(mode: str) -> list[list[Changes]]:
    """What a search changes, stage by stage, each the changes to try on the best settings of the stages before.

    It starts from the original's settings, and is ten runs for each rule: learning rate and schedule of W first,
    with and without --fc-norm; then the learning rate, schedule, decay and start of B where those are its own, else
    more of W's, and B's start; last, one step of W's learning rate beyond the edge of what was tried.
    """
    beyond: list[Changes] = [{"--lr": {"BP": "0.05", "DKP": "0.001", "LAS": "0.02"}.get(mode, "0.03")}]
    one_cycle: Changes = {"--schedule": "one-cycle"}
    weights: list[Changes] = [one_cycle | {"--lr": lr} for lr in ("0.002", "0.005")]
    weights += [one_cycle | {"--lr": lr, "--fc-norm": None} for lr in ("0.005", "0.01")]
    if mode in LEARNED:
        b_lr: list[Changes] = [{"--b-lr": "3e-5"}, {"--b-lr": "3e-4"}]
        return [weights, b_lr, [{"--gamma": "1"}], [{"--b-wd": "1e-3"}], [{"--b-scale": "0"}], beyond]
    rest: list[Changes] = [{"--b-scale": "0.5"}, {"--b-scale": "2"}]
    if mode == "BP":
        rest = [{"--lr": "0.03"}, {"--schedule": "constant", "--lr": "0.005"}]
    return [weights, [{"--lr": "0.02"}], [{"--wd": "1e-4"}, {"--wd": "1e-3"}], rest, beyond]


def words(changes: Changes) -> list[str]:
    """Flags and values as a command line has them."""
    return [word for pair in changes.items() for word in pair if word is not None]


def search_runs(mode: str, seeds: Sequence[int], flags: Sequence[str], folder: Path, epochs: int) -> list[Run]:
    """The runs of `mode` in a search, as far as they can be known: to the first stage that is not over."""
    settings: dict[str, Changes] = {}
    runs: list[Run] = []
    for stage in stages(mode):
        base: Changes = {}
        if runs:
            best = best_outcomes(outcomes_of(runs, folder, "validation_accuracy", epochs)).get(mode)
            if best is None or not all(is_over(folder / run.name, epochs) for run in runs):
                break
            base = settings[best.recipe]
        for changes in stage:
            name = "-".join(words(changes)).replace("--", "")
            settings[name] = base | changes
            runs += [Run(mode, seed, name, tuple(words(settings[name])), tuple(flags)) for seed in seeds]
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
    missing = [mode for mode in modes if mode not in recipe]
    if missing:
        raise ValueError(f"--recipe: {path} has nothing for {', '.join(missing)}")
    return recipe


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Within, the yielded value says whether this process has `folder` to itself; the end of a process frees it.

    With `wait` it comes when it is so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def metrics(folder: Path) -> list[Row]:
    """The rows of a run's metrics.csv so far."""
    path = folder / "metrics.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def is_over(folder: Path, epochs: int) -> bool:
    """Whether a run has done its epochs, or failed."""
    return len(metrics(folder)) >= epochs or (folder / "failed").exists()


def train(run: Run, folder: Path, args: Namespace) -> None:
    """Train `run` to its end, from where it is; leave a file "failed" if its loss or weights were not finite.

    A signal that comes while the last epoch is evaluated finds the run finished; a second one stops the next run.

    Raises:
        SystemExit: it was stopped by a signal, or main.py refused its command line.
    """
    if (folder / "checkpoint.pt").exists():
        flags = ["--resume", str(folder)]
    else:
        flags = ["--train-mode", run.mode, "--seed", str(run.seed), "--epochs", str(args.epochs)]
        flags += ["--batch-size", str(BATCH_SIZE), "--dataset", "cifar10", "--out", str(folder)]
        flags += [*run.settings, *run.flags]
        if args.validation is not None:
            flags += ["--validation", str(args.validation)]
    status = script.main(["--data", str(args.data), *flags])
    if status >= 128:
        print("the sweep's own command goes on from there, too", file=sys.stderr)
        raise SystemExit(status)
    if status:
        (folder / "failed").touch()


def sweep(runs: list[Run], to_come: int, runs_folder: Path, results: Path, args: Namespace) -> None:
    """Train all `runs` that are not over nor another process's; after each, write the results of the whole sweep.

    `to_come` is how many more runs will follow these.
    """
    for number, run in enumerate(runs, start=1):
        folder = runs_folder / run.name
        with locked(folder) as free:
            if not free:
                print(f"{run.name}: another process is at it, passed over", flush=True)
                continue
            if is_over(folder, args.epochs):
                continue
            left = what_is_left(runs, to_come, runs_folder, args.epochs)
            print(f"run {number}/{len(runs) + to_come}, {run.name}; {left}", flush=True)
            train(run, folder, args)
        publish(runs, runs_folder, results, args)
    publish(runs, runs_folder, results, args)


def publish(runs: list[Run], runs_folder: Path, results: Path, args: Namespace) -> None:
    """Write the results of the whole sweep, `runs` included.

    Raises:
        ValueError: as `remembered` does.
    """
    with locked(runs_folder, wait=True):
        write_results(remembered(results, runs, args), runs_folder, results, args)


def what_is_left(runs: list[Run], to_come: int, runs_folder: Path, epochs: int) -> str:
    """The epochs to train, and for about how long by the mean of those that are done."""
    done = {run: metrics(runs_folder / run.name) for run in runs}
    left = sum(epochs - len(rows) for run, rows in done.items() if not is_over(runs_folder / run.name, epochs))
    left += epochs * to_come
    seconds = [float(row["seconds"]) for rows in done.values() for row in rows]
    if not seconds:
        return f"{left} epochs to go"
    return f"{left} epochs to go, about {timedelta(seconds=round(left * statistics.mean(seconds)))} left"


def write_results(runs: list[Run], runs_folder: Path, results: Path, args: Namespace) -> None:
    """Write metrics.csv and table.md to `results`; for a search recipe.json too, else the plots."""
    rows = [
        {"mode": run.mode, "seed": str(run.seed), "recipe": run.recipe}
        | {"settings": " ".join(run.settings), "flags": " ".join(run.flags)}
        | row
        for run in runs
        for row in metrics(runs_folder / run.name)
    ]
    if not rows:
        return
    with open(results / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    split = "test" if args.validation is None else "validation"
    outcomes = outcomes_of(runs, runs_folder, f"{split}_accuracy", args.epochs)
    configs = [runs_folder / run.name / "config.json" for run in runs if metrics(runs_folder / run.name)]
    (results / "table.md").write_text(table(outcomes, split, args.epochs) + where(configs))
    if args.search:
        batch, best = ("--batch-size", str(BATCH_SIZE)), best_outcomes(outcomes)
        recipe = {mode: batch + best[mode].settings for mode in RULES if mode in best}
        (results / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    else:
        plot(rows, {f"{split}_accuracy": ""}, f"{split} accuracy, %", results / "accuracy.png", height_px=450)
        for what in ANGLES.values():
            titles = {key: title for key, title in angle_titles(rows[0]).items() if title.startswith(what)}
            plot(rows, titles, "angle to BP's, degrees", results / f"{what}_angles.png", height_px=350)


def angle_titles(row: Row) -> dict[str, str]:
    """The columns of `row` that hold angles, each with what it is the angle of."""
    return {
        key: f"{what} {key.removeprefix(prefix).removesuffix('.weight')}"
        for prefix, what in ANGLES.items()
        for key in row
        if key.startswith(prefix)
    }


@dataclass
class Outcome:
    """What came of the runs of one rule and settings: accuracies in percent and last angles of whole runs, counts."""

    mode: str
    recipe: str
    settings: tuple[str, ...]
    flags: tuple[str, ...]
    last: list[float] = field(default_factory=list)
    best: list[float] = field(default_factory=list)
    angles: dict[str, list[float]] = field(default_factory=dict)
    runs: int = 0
    failed: int = 0


def outcomes_of(runs: list[Run], runs_folder: Path, accuracy: str, epochs: int) -> list[Outcome]:
    """An outcome for each rule and settings, in the order of `runs`; `accuracy` is a column of metrics.csv."""
    outcomes: dict[tuple[str, str], Outcome] = {}
    for run in runs:
        outcome = outcomes.setdefault((run.mode, run.recipe), Outcome(run.mode, run.recipe, run.settings, run.flags))
        rows = metrics(runs_folder / run.name)
        accuracies = [float(row[accuracy]) for row in rows]
        outcome.runs += 1
        outcome.failed += (runs_folder / run.name / "failed").exists()
        if len(accuracies) == epochs:
            outcome.last.append(accuracies[-1])
            outcome.best.append(max(accuracies))
            for key in angle_titles(rows[-1]):
                if rows[-1][key]:  # none of a signal or a gradient that is zero
                    outcome.angles.setdefault(key, []).append(float(rows[-1][key]))
    return list(outcomes.values())


def table(outcomes: list[Outcome], split: str, epochs: int) -> str:
    """The markdown table, a line for each rule and settings, and below it what its figures are."""
    lines = [
        "| rule | settings | last epoch, % | std | best epoch, % | std | n | failed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        flags = " ".join(outcome.settings + outcome.flags)
        flags = f" `{flags}`" if flags else ""
        cells = [outcome.mode, outcome.recipe + flags]
        for values in (outcome.last, outcome.best):
            cells.append(f"{statistics.mean(values):.2f}" if values else "")
            cells.append(f"{statistics.stdev(values):.2f}" if len(values) > 1 else "")
        lines.append("| " + " | ".join([*cells, str(len(outcome.last)), str(outcome.failed)]) + " |")
    lines += [
        "",
        f"Accuracy on the {split} images after {epochs} epochs, batch {BATCH_SIZE} unless named: mean and standard",
        f"deviation over n seeds. The best epoch is picked on the {split} images themselves, so it flatters: the last",
        "is the result. failed: runs that ended early because their loss or weights were not finite.",
    ]
    whole = [outcome for outcome in outcomes if outcome.angles]
    if whole:
        titles = angle_titles({key: "" for outcome in whole for key in outcome.angles})
        lines += ["", f"| rule | settings | {' | '.join(titles.values())} |", "|---|---|" + "---|" * len(titles)]
        for outcome in whole:
            angles = {key: f"{statistics.mean(values):.1f}" for key, values in outcome.angles.items()}
            cells = (angles.get(key, "") for key in titles)
            lines.append(f"| {outcome.mode} | {outcome.recipe} | {' | '.join(cells)} |")
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


def best_outcomes(outcomes: list[Outcome]) -> dict[str, Outcome]:
    """Of each rule, the one of best mean accuracy at the last epoch, among those whose runs are all whole.

    Of several that are as good, the last by its name.
    """
    whole = (outcome for outcome in outcomes if len(outcome.last) == outcome.runs)
    ranked = sorted(whole, key=lambda outcome: (statistics.mean(outcome.last), outcome.recipe))
    return {outcome.mode: outcome for outcome in ranked}


def plot(rows: list[Row], titles: dict[str, str], label: str, path: Path, height_px: int) -> None:
    """Draw the columns `titles` per epoch, a panel each: a line per rule, its mean, and a band of a standard deviation.

    800 pixels wide, as a README shows it, and told apart without colour.
    """
    with plt.rc_context({"font.size": 9}):
        figure, panels = plt.subplots(
            1, len(titles), figsize=(8, height_px / 100), dpi=100, sharey=True, squeeze=False, layout="constrained"
        )
        for panel, (key, title) in zip(panels[0], titles.items(), strict=True):
            for mode in dict.fromkeys(row["mode"] for row in rows):
                by_epoch: dict[int, list[float]] = {}
                for row in rows:
                    if row["mode"] == mode and row.get(key):
                        by_epoch.setdefault(int(row["epoch"]), []).append(float(row[key]))
                epochs = sorted(by_epoch)
                mean = np.array([statistics.mean(by_epoch[epoch]) for epoch in epochs])
                std = np.array([np.std(by_epoch[epoch], ddof=len(by_epoch[epoch]) > 1) for epoch in epochs])
                shade, line, marker = STYLES[RULES.index(mode) % len(STYLES)]
                every = max(1, len(epochs) // 8)
                panel.plot(epochs, mean, color=shade, linestyle=line, marker=marker, markevery=every, ms=4, label=mode)
                panel.fill_between(epochs, mean - std, mean + std, color=shade, alpha=0.2, linewidth=0)
            panel.set_title(title, fontsize=9)
            panel.set_xlabel("epoch")
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.grid(alpha=0.3)
        panels[0][0].set_ylabel(label)
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), handlelength=4)
        figure.savefig(path)
        plt.close(figure)


def make_runs(args: Namespace, flags: list[str], folder: Path) -> list[Run]:
    """The runs, all rules before the next seed; of a search, as far as `folder` lets them be known. `flags` go to each.

    Raises:
        ValueError: the recipe cannot be read.
    """
    if args.search:
        return [run for mode in args.modes for run in search_runs(mode, args.seeds, flags, folder, args.epochs)]
    name, recipe = args.recipe, dict.fromkeys(args.modes, ("--recipe", "best") if args.recipe == "best" else ())
    if args.recipe not in ("original", "best"):
        name, recipe = "best", read_recipe(Path(args.recipe), args.modes)
    return [Run(mode, seed, name, tuple(recipe[mode]), tuple(flags)) for seed in args.seeds for mode in args.modes]


def remembered(results: Path, runs: list[Run], args: Namespace) -> list[Run]:
    """All runs of the sweep in `results`: those of earlier command lines, kept in its sweep.json, and `runs`.

    Raises:
        ValueError: the folder's sweep has other epochs or held-out images, or other flags for one of `runs`; or it is
            a search by other seeds.
    """
    path = results / "sweep.json"
    common = {"epochs": args.epochs, "validation": args.validation, "seeds": args.seeds if args.search else None}
    kept = json.loads(path.read_text()) if path.exists() else common | {"runs": []}
    kept_runs = [Run(**{k: tuple(v) if isinstance(v, list) else v for k, v in run.items()}) for run in kept["runs"]]
    known = {run.name: run for run in kept_runs}
    if common | {"runs": kept["runs"]} != kept or any(known.get(run.name, run) != run for run in runs):
        raise ValueError(f"{results} has a sweep with other settings (see {path.name}): name another --name")
    known |= {run.name: run for run in runs}
    everything = sorted(known.values(), key=lambda run: (RULES.index(run.mode), run.recipe, run.seed))
    path.write_text(json.dumps(common | {"runs": [asdict(run) for run in everything]}, indent=2) + "\n")
    return everything


def main(argv: list[str] | None = None) -> int:
    """Run the sweep that the command line asks for; return 0, or 1 where there is nothing to show or recommend."""
    parser = make_parser()
    args, flags = parser.parse_known_args(argv)
    args.modes = list(dict.fromkeys(args.modes))
    args.seeds = list(dict.fromkeys(args.seeds or ([1] if args.search else [1, 2, 3])))
    args.epochs = args.epochs or (3 if args.search else 50)
    args.validation = HELD_OUT if args.search else None
    for flag in flags:
        if flag.partition("=")[0] in OF_THE_SWEEP:
            parser.error(f"{flag} is for the sweep itself to give to main.py")
    if args.search:
        for flag in {flag for mode in args.modes for stage in stages(mode) for changes in stage for flag in changes}:
            if any(given.partition("=")[0] == flag for given in flags):
                parser.error(f"{flag} is what a search tries")
    if args.search and args.recipe != "original":
        parser.error("--recipe does not go with --search: a search finds one")
    with tempfile.TemporaryDirectory() if args.quick else nullcontext() as scratch:
        runs_folder, results_folder = RUNS, RESULTS
        if scratch is not None:
            args.data = Path(scratch)
            runs_folder, results_folder = args.data / "runs", args.data / "results"
            np.savez(args.data / "cifar10.npz", **synthetic_images(10, 64, 32))
            args.seeds, args.epochs, args.validation = args.seeds[:2], 2, args.validation and 16
        kind = "search" if args.search else "original" if args.recipe == "original" else "best"
        name = args.name or f"cifar10-{kind}-{args.epochs}-epochs"
        runs_folder, results = runs_folder / name, results_folder / name
        in_all = sum(len(stage) for mode in args.modes for stage in stages(mode)) * len(args.seeds)
        runs: list[Run] = []
        while not runs or args.search:
            before = runs
            try:
                runs = make_runs(args, flags, runs_folder)
                results.mkdir(parents=True, exist_ok=True)
                with locked(runs_folder, wait=True):
                    remembered(results, runs, args)
            except (ValueError, OSError) as error:
                parser.error(str(error))
            if runs == before:  # the runs that are over tell no more of a search
                break
            sweep(runs, in_all - len(runs) if args.search else 0, runs_folder, results, args)
        return report(runs, in_all, runs_folder, results, args)


def report(runs: list[Run], in_all: int, runs_folder: Path, results: Path, args: Namespace) -> int:
    """Print what came of it, and what is missing; return the exit status."""
    if not (results / "table.md").exists():
        print("no epoch is done", file=sys.stderr)
        return 1
    print((results / "table.md").read_text(), end="")
    print(f"see {', '.join(sorted(file.name for file in results.iterdir()))} in {results}")
    others = [run.name for run in runs if not is_over(runs_folder / run.name, args.epochs)]
    if others:
        print(f"not over: another process is at {', '.join(others)}")
    elif args.search and len(runs) < in_all:
        print("the search ends early: of some rule, no setting came to its end", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_script(main)
