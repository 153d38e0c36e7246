"""How a command ends, whatever ends it."""

import contextlib
import signal

import click
import pytest

from caption_rt.console import echo, run_command, say
from caption_rt.errors import BundleError, CaptionError, EngineError


def ending(error, **options):
    """Run a command that ends with an error."""

    @click.command()
    def command():
        raise error

    return run_command(command, "try", [], **options)


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (BundleError("two\nlines"), 3, "two\\nlines"),
        (CaptionError("it failed"), 1, "it failed"),
        (click.UsageError("What is that?"), 2, "What is that? (see try --help)"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.Abort(), 130, "interrupted"),
        (OSError(28, "No space left on device", "run/log.jsonl"), 1, "run/log.jsonl: No space left on device"),
        (OSError(28, "No space left on device"), 1, "the output cannot be written: No space left on device"),
        (
            ModuleNotFoundError("none", name="keras.src"),
            2,
            "keras.src is not installed: pip install 'caption-rt' brings",
        ),
    ],
)
def test_each_error_is_one_sentence_and_its_exit_code(capsys, error, code, sentence):
    assert ending(error) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    # After Ctrl-C, click begins a new line first.
    assert printed.err.lstrip("\n").startswith(f"try: error: {sentence}")
    assert printed.err.strip("\n").count("\n") == 0


def test_a_command_says_what_to_do_next(capsys):
    assert ending(ModuleNotFoundError("none", name="keras"), extra="train") == 2
    assert "pip install 'caption-rt[train]' brings it" in capsys.readouterr().err
    assert ending(KeyboardInterrupt(), interrupted="interrupted; call again") == 130
    assert capsys.readouterr().err.strip() == "try: error: interrupted; call again"


def test_a_mistake_in_our_own_imports_is_not_hidden():
    with pytest.raises(ModuleNotFoundError):
        ending(ModuleNotFoundError("none", name="caption_rt.nothing"), extra="train")


def test_ctrl_c_that_a_module_in_c_took_for_its_own_failure_is_one(capsys):
    def module(error):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise error

    @click.command()
    @click.option("--wrapped", is_flag=True)
    def command(wrapped):
        try:
            module(ImportError("initialization failed"))
        except ImportError as exc:
            if wrapped:
                raise EngineError("cannot be imported") from exc
            raise

    before = signal.getsignal(signal.SIGINT)
    for arguments in ([], ["--wrapped"]):
        assert run_command(command, "try", arguments) == 130
        assert capsys.readouterr().err.strip() == "try: error: interrupted"
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(ImportError, match="really"):
        ending(ImportError("it is really broken"))


def test_what_a_command_returns_is_its_code(capsys):
    @click.command()
    @click.option("--code", type=int)
    def command(code):
        echo("a result")
        return code

    assert run_command(command, "try", []) == 0
    assert run_command(command, "try", ["--code", "4"]) == 4
    assert run_command(command, "try", ["--help"]) == 0
    assert capsys.readouterr().out.startswith("a result\na result\nUsage: try")


def test_bytes_go_out_as_they_are(capfdbinary):
    echo(b"two\nlines \xff\n")
    echo("a line")
    say("try", "it\ngoes on")
    assert capfdbinary.readouterr() == (b"two\nlines \xff\na line\n", b"try: it\\ngoes on\n")
