"""The pages say what the code does: the snippet runs, commands parse, flags are all of them, links lead somewhere."""

import json
import re
import shlex
from pathlib import Path

import main
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
