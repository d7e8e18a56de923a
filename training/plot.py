"""Curves of training runs, from their metrics.csv.

Run: python -m training.plot RUN [RUN ...]

Draws a PNG of loss, accuracies and angles per epoch: of one run into its own folder, of several side by side into this
one; --out names another file.
"""

import csv
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

from training.arguments import Parser
from training.console import run_script

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Row = dict[str, str]
# what begins the columns of metrics.csv that hold angles: the learning signal's at a point, and the weights' gradient's
ANGLES = {"alignment_deg_": "signal", "parameter_deg_": "gradient"}
COLUMNS = {
    "train_loss": "training loss",
    "train_accuracy": "training accuracy, %",
    "test_accuracy": "test accuracy, %",
    "validation_accuracy": "validation accuracy, %",
}
PER_ROW, PANEL_INCHES = 3, (3.2, 2.6)
# shade, line and marker of each curve: any one of the three tells them apart
STYLES = [
    ("#000000", "-", "o"),
    ("#c0a000", "--", "s"),
    ("#6060c0", "-.", "^"),
    ("#909090", ":", "D"),
    ("#b03030", (0, (6, 2)), "v"),
    ("#208050", (0, (3, 1, 1, 1, 1, 1)), "X"),
    ("#00a0c0", (0, (1, 3)), "P"),
    ("#e07000", "-", "*"),
    ("#70a000", "--", "<"),
    ("#a040a0", "-.", ">"),
]


class Panel(NamedTuple):
    """A column of metrics.csv to draw, with its title and a label for the axis."""

    column: str
    title: str
    label: str = ""


def read_metrics(run: Path) -> list[Row]:
    """The rows of a run's metrics.csv so far; none where there is no such file.

    Raises:
        ValueError: the file is damaged.
    """
    path = run / "metrics.csv"
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if any(None in row or None in row.values() for row in rows):
        raise ValueError(f"{path} is damaged: a row has more or fewer cells than the first line")
    return rows


def angle_titles(columns: Collection[str]) -> dict[str, str]:
    """The columns that hold angles, each with what it is the angle of."""
    return {
        column: f"{what} {column.removeprefix(prefix).removesuffix('.weight')}"
        for prefix, what in ANGLES.items()
        for column in columns
        if column.startswith(prefix)
    }


def draw(
    curves: Mapping[str, Sequence[Row]],
    panels: Sequence[Panel],
    path: Path,
    inches: tuple[float, float],
    per_row: int,
    shared: bool = False,
    minutes: Mapping[str, float] | None = None,
) -> None:
    """Draw a panel per column: a curve for each entry of `curves`, and a band of a standard deviation around it.

    Args:
        curves: label to rows of metrics.csv; of several rows of one epoch the mean is drawn. A label without rows
            keeps its style for others to leave out.
        panels: in the order of drawing.
        path: of the PNG.
        inches: width and height of the picture, at 100 pixels an inch.
        per_row: panels side by side.
        shared: one scale for all panels.
        minutes: of an epoch of each curve, where they are to be drawn over time.
    """
    with plt.rc_context({"font.size": 9}):
        rows = -(-len(panels) // per_row)
        figure, grid = plt.subplots(
            rows, per_row, figsize=inches, dpi=100, sharey=shared, squeeze=False, layout="constrained"
        )
        for spare in grid.flat[len(panels) :]:
            spare.remove()
        for place, (axes, panel) in enumerate(zip(grid.flat, panels, strict=False)):
            for number, (name, of_curve) in enumerate(curves.items()):
                by_epoch: dict[int, list[float]] = {}
                for row in of_curve:
                    if row.get(panel.column):
                        by_epoch.setdefault(int(row["epoch"]), []).append(float(row[panel.column]))
                if not of_curve:
                    continue
                epochs = sorted(by_epoch)
                mean = np.array([np.mean(by_epoch[epoch]) for epoch in epochs])
                std = np.array([np.std(by_epoch[epoch], ddof=len(by_epoch[epoch]) > 1) for epoch in epochs])
                shade, line, marker = STYLES[number % len(STYLES)]
                every = max(1, len(epochs) // 8)
                x = [epoch * (1 if minutes is None else minutes[name]) for epoch in epochs]
                axes.plot(x, mean, color=shade, linestyle=line, marker=marker, markevery=every, ms=4, label=name)
                axes.fill_between(x, mean - std, mean + std, color=shade, alpha=0.2, linewidth=0)
            axes.set_title(panel.title, fontsize=9)
            axes.set_xlabel("epoch" if minutes is None else "training time, minutes")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
            if not shared or place % per_row == 0:
                axes.set_ylabel(panel.label)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), handlelength=4)
        figure.savefig(path)
        plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Draw the curves of the runs on the command line; return 0."""
    parser = Parser(prog="python -m training.plot", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="PNG (default: RUN/curves.png, of several curves.png)")
    args = parser.parse_args(argv)
    if len(args.runs) > len(STYLES):
        parser.error(f"got {len(args.runs)} runs, expected at most {len(STYLES)}: more cannot be told apart")
    curves = {}
    for run in args.runs:
        try:
            curves[run.resolve().name if len(args.runs) == 1 else str(run)] = rows = read_metrics(run)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        if not rows:
            parser.error(f"{run} has no metrics.csv with an epoch in it")
    columns = list(dict.fromkeys(column for rows in curves.values() for row in rows for column in row if row[column]))
    panels = [Panel(column, title) for column, title in COLUMNS.items() if column in columns]
    panels += [Panel(column, title, "angle to BP's, degrees") for column, title in angle_titles(columns).items()]
    out = args.out or (args.runs[0] / "curves.png" if len(args.runs) == 1 else Path("curves.png"))
    width, height = PANEL_INCHES
    try:
        draw(curves, panels, out, (PER_ROW * width, -(-len(panels) // PER_ROW) * height + 0.4), PER_ROW)
    except (OSError, ValueError) as error:
        parser.error(f"cannot draw {out}: {error}")
    print(f"see {out}")
    return 0


if __name__ == "__main__":
    run_script(main)
