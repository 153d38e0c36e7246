"""The documents held against the code: their commands parse, their links lead somewhere, their snippets run."""

import re
import shlex
from pathlib import Path

import click
import pytest

import caption_export.cli
import caption_rt.cli
import caption_train.cli
from caption_train.settings import KEYS

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "models" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = {
    "caption-rt": caption_rt.cli.command,
    **{f"caption-export {name}": command for name, command in caption_export.cli.command.commands.items()},
    "caption-export": caption_export.cli.command.commands["export"],
    **{f"caption-train {name}": command for name, command in caption_train.cli.command.commands.items()},
}
every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def code(text):
    """What a document sets as code, line by line: fenced, indented, or between backticks."""
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    blocks += re.findall(r"^    (.*)", text, re.MULTILINE) + re.findall(r"`([^`\n]+)`", text)
    return [line for block in blocks for line in block.splitlines()]


def calls(path):
    """The calls of our commands in a document: name and arguments."""
    tools = "|".join(caption_export.cli.command.commands)
    found = re.compile(rf"(?:^|[ /])(caption-(?:rt|export (?:{tools})(?= )|export|train [\w-]+)) ([^&|]+)")
    for line in code(path.read_text(encoding="utf-8")):
        for name, arguments in found.findall(line.removeprefix("$ ")):
            yield name, shlex.split(arguments, comments=True)


@every_document
def test_commands_in_documents_are_understood(path):
    for name, arguments in calls(path):
        try:
            COMMANDS[name].make_context(name, list(arguments))
        except click.MissingParameter:
            pass  # a sentence may name an option without the rest of the command
        except click.UsageError as error:
            pytest.fail(f"{name} {shlex.join(arguments)}: {error.format_message()}")


def test_there_are_commands_to_look_at():
    names = {name for path in DOCUMENTS for name, _ in calls(path)}
    assert names == {
        "caption-rt",
        "caption-export",
        *(f"caption-export {name}" for name in ("inspect", "verify", "pack", "unpack", "graph")),
        "caption-train train",
        "caption-train settings",
        "caption-train evaluate",
        *["caption-train distill", "caption-train fetch", "caption-train report"],
        *["caption-train caption", "caption-train import-tutorial"],
    }
    assert sum(len(list(calls(path))) for path in DOCUMENTS) > 25


@every_document
def test_links_in_documents_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, heading = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        assert there.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)", there.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in anchors, target


def test_options_of_training_in_the_documents_are_there():
    """The tables name options without a command."""
    known = {option for command in COMMANDS.values() for param in command.params for option in param.opts}
    known |= {"--help", "--version"}
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    text = re.sub(r"`python [^`]+`", "", text)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= known


def test_settings_in_the_documents_are_there():
    sections = "|".join(sorted({key.partition(".")[0] for key in KEYS}))
    found = {
        key
        for path in DOCUMENTS
        for line in code(path.read_text(encoding="utf-8"))
        for key in re.findall(rf"(?<![\w./-])((?:{sections})\.[a-z]\w+)(?![\w./(])", line)
    }
    assert "training.epochs" in found
    files = {name for name in found if name.endswith((".csv", ".json", ".jsonl", ".onnx"))}
    assert found - files <= set(KEYS)


def test_two_pages_that_stand_alone_enlarge_attention_alike():
    """The gallery is one file and docs/browser a folder of its own, so neither can take the function from the other."""
    pages = [ROOT / "docs" / "browser" / "page.js", ROOT / "runtime" / "caption_rt" / "gallery.js"]
    found = [re.findall(r"^function taps.*?^}", page.read_text(encoding="utf-8"), re.M | re.S) for page in pages]
    assert len(found[0]) == 1
    assert found[0] == found[1]
