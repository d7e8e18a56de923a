"""The README says what the code does: its snippet runs, its commands parse, its flags are all of them."""

import re
import shlex
from pathlib import Path

import main

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_snippet_runs(capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(snippet, "README.md", "exec"), {})
    angles = [float(line) for line in capsys.readouterr().out.split()]
    assert len(angles) == 2 and all(0 < angle < 180 for angle in angles)


def test_every_command_of_main_parses():
    commands = re.findall(r"^python main\.py (.*)$", README, re.M)
    assert len(commands) > 3
    for command in commands:
        main.parse_arguments(shlex.split(command))


def test_every_flag_is_explained(alexnet):
    for heading, parser in (("## Flags of main.py", main.make_parser()), ("## AlexNet, in one", alexnet.make_parser())):
        flags = {flag for action in parser._actions for flag in action.option_strings} - {"-h", "--help"}
        section = README.partition(heading)[2].partition("\n## ")[0]
        rows = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]
        assert {flag for row in rows for flag in re.findall(r"`(-[a-z-]+)`", row)} == flags
