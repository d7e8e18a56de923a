"""The pages say what the code does: the snippet runs, commands parse, flags are all of them, links lead somewhere."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import main
from benchmarks import step_time
from feedback import RULES
from training.arguments import RECIPES

ROOT = Path(__file__).parent.parent
NAMES = ("README.md", "alexnet/README.md", "benchmarks/README.md")
PAGES = {path: path.read_text() for path in [*(ROOT / name for name in NAMES), *ROOT.glob("docs/*.md")]}
README = PAGES[ROOT / "README.md"]


def test_the_snippet_trains_a_network(capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(snippet, "README.md", "exec"), {})
    accuracy, angle = map(float, capsys.readouterr().out.split())
    assert accuracy > 70 and 0 < angle < 80


def test_every_command_parses(alexnet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no run to resume
    commands = re.findall(r"^python ((?:alexnet/)?main\.py) (.*)$", "\n".join(PAGES.values()), re.M)
    assert len(commands) > 5
    for script, line in commands:
        flags = shlex.split(line)
        if "--resume" in flags:
            continue
        (main if script == "main.py" else alexnet).parse_arguments(flags)


def test_the_table_has_the_recipes_learning_rates():
    rows = [[cell.strip() for cell in line.split("|")] for line in README.splitlines() if line.startswith("| ")]
    shown = {row[1].partition(",")[0]: row[6] for row in rows if row[1].partition(",")[0] in RULES}
    recipes = json.loads(RECIPES.read_text())
    assert shown.keys() == RULES.keys()
    for rule, rates in shown.items():
        flags = [recipes[net]["best"][rule] for net in ("ConvNet", "AlexNet")]
        assert rates == "; ".join(words[words.index("--lr") + 1] for words in flags)


def test_every_flag_is_explained(alexnet):
    for page, parser in (("docs/main.md", main.make_parser()), ("alexnet/README.md", alexnet.make_parser())):
        flags = {flag for action in parser._actions for flag in action.option_strings} - {"-h", "--help"}
        rows = [row.split("|")[1] for row in PAGES[ROOT / page].splitlines() if row.startswith("| `")]
        assert {flag for row in rows for flag in re.findall(r"`(-[a-z0-9-]+)`", row)} == flags


def test_every_link_leads_to_a_file_and_a_heading():
    links = [(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    assert len(links) > 30
    for page, link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{page}: {link}"


def test_gpu_sh_goes_on_where_it_was_cut_off(alexnet, tmp_path, monkeypatch):
    """With a python that notes its arguments and is stopped in every training once, as by the time limit."""
    stub = tmp_path / "bin" / "python"
    stub.parent.mkdir()
    stub.write_text(
        """#!/usr/bin/env bash
echo "$*" >>"$NOTES"
[[ $* == *" --out "*/cifar* ]] || exit 0
mkdir -p "$3" && touch "$3/checkpoint.pt" && exit 143
"""
    )
    stub.chmod(0o755)
    notes = tmp_path / "notes"
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path / "out"), "DATA", "3"]
    environment = os.environ | {"PATH": f"{stub.parent}:{os.environ['PATH']}", "NOTES": str(notes)}
    once = lambda: subprocess.run(command, env=environment, capture_output=True, timeout=60)  # noqa: E731
    assert once().returncode == 0
    lines = [shlex.split(line) for line in notes.read_text().splitlines()]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(step_time, "cells", lambda *args: sys.exit("parsed"))
    trained, timed = {"main.py": [], "alexnet/main.py": []}, 0
    for script, *flags in lines:
        if script == "benchmarks/step_time.py":
            monkeypatch.setattr(sys, "argv", [script, *flags])
            with pytest.raises(SystemExit, match="parsed"):
                step_time.main()
            timed += 1
        elif "--resume" in flags:
            assert flags[0] == "--resume" and Path(flags[1]).parent == tmp_path / "out"
            assert ("--cuda-graph" in flags) == (script == "main.py")
        elif script in trained:
            args = {"main.py": main, "alexnet/main.py": alexnet}[script].parse_arguments(flags)
            trained[script].append((args[0] if script == "main.py" else args).train_mode)
    assert timed == 3
    assert sorted(trained["main.py"]) == sorted(RULES)
    assert sorted(trained["alexnet/main.py"]) == sorted({*RULES} - {"FA", "KP", "DRTP", "FDFA"})
    assert sum("--resume" in line for line in lines) == sum(map(len, trained.values()))
    assert once().returncode == 0 and len(notes.read_text().splitlines()) == len(lines)
