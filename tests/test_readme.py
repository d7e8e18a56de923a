"""The README says what the code does: its snippet runs, its commands parse, its flags are all of them."""

import re
import shlex
from pathlib import Path

import main

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_snippet_runs(capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(snippet, "README.md", "exec"), {})
    assert 0 < float(capsys.readouterr().out) < 180


def test_every_command_of_main_parses():
    commands = re.findall(r"^python main\.py (.*)$", README, re.M)
    assert len(commands) > 3
    for command in commands:
        main.parse_arguments(shlex.split(command))


def test_every_flag_is_explained():
    flags = {flag for action in main.make_parser()._actions for flag in action.option_strings} - {"-h", "--help"}
    table = README.partition("## Flags of main.py")[2].partition("\n## ")[0]
    assert set(re.findall(r"`(--[a-z-]+)", table)) == flags
