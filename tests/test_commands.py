"""The command line that users have learned: every command, its arguments and its options."""

import re
from pathlib import Path

import pytest
import typer

from llmprune.cli import app

ROOT = Path(__file__).parents[1]

# A name that goes, or changes, breaks somebody's script: CHANGELOG must say so.
COMMANDS = {
    "inspect": "model --revision --json",
    "prune": "recipe --out --set --resume --dry-run",
    "plan": "folder --budget --out",
    "verify": "folder",
    "eval": "model --suite --tasks --baseline --data --limit --text --window --max-windows --dtype "
    "--out --json",
    "bench": "model --against --batch --batch-size --context --new-tokens --rounds --backend "
    "--dtype --check --memory --no-memory --out --json",
    "compare": "recipes --out --methods --seeds --refit --recover --max-windows --final-windows "
    "--report-only",
    "report": "folder --out --compare",
    "export": "folder out --format --dtype --json",
    "push": "folder repo --private --revision --create-pr --dry-run --message",
}


def found_commands():
    """What there is: command -> its arguments and options, as in `COMMANDS`."""
    commands = typer.main.get_command(app).commands
    return {
        name: {
            word
            for parameter in command.params
            for word in (*parameter.opts, *parameter.secondary_opts)
        }
        for name, command in commands.items()
    }


def test_the_commands_and_options_are_these():
    assert found_commands() == {name: set(words.split()) for name, words in COMMANDS.items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_readme_and_in_the_docs(name):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    usage = re.search(r"^## Use it\n\n```\n(.*?)```", readme, re.MULTILINE | re.DOTALL)[1]
    assert re.search(rf"^llmprune {name} ", usage, re.MULTILINE)
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")]
    assert any(re.search(rf"\bllmprune {name}\b", page) for page in pages)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_readme_or_in_the_docs(name):
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = " ".join(page.read_text(encoding="utf-8") for page in pages)
    known = set(re.findall(r"--[a-z][a-z-]*", text))
    for parameter in typer.main.get_command(app).commands[name].params:
        # one spelling of it is enough
        words = {*parameter.opts, *parameter.secondary_opts}
        assert words & known or parameter.param_type_name == "argument", words
