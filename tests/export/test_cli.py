import json
import os
import subprocess
import sys

import pytest

from caption_export import exporting
from caption_export.errors import ExportError
from caption_export.reduced import Limits
from shapes import write_flickr8k

pytestmark = pytest.mark.tf


def test_importing_the_package_and_its_command_loads_no_tensorflow():
    code = (
        "import sys, caption_export, caption_export.cli, caption_export.errors\n"
        "heavy = 'tensorflow', 'keras', 'onnx', 'tf2onnx', 'onnxruntime', 'matplotlib'\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("run", "place", "code", "message"),
    [
        ("run", "nowhere", 6, "nowhere: there is no such folder of photos"),
        ("run", "empty", 6, "empty: no photo is in this folder or below it"),
        ("empty", "photos", 7, "empty is no run folder: it has no run.json"),
        ("nowhere", "photos", 7, "nowhere is no run folder: it has no run.json"),
    ],
)
def test_a_mistake_is_one_sentence_and_its_exit_code(call, run_folder, photos, tmp_path, run, place, code, message):
    (tmp_path / "empty").mkdir()
    places = {"run": run_folder, "photos": photos[0].parent}
    where, images = (places.get(name, tmp_path / name) for name in (run, place))
    result = call(where, tmp_path / "out", "--photos", images)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("caption-export: error: ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_difference_ends_with_its_exit_code(call, run_folder, photos, tmp_path, monkeypatch):
    def differ(*_, **__):
        raise ExportError("the encoder graph: output keys differs")

    monkeypatch.setattr(exporting, "verify", differ)
    monkeypatch.setattr(exporting, "build_graphs", lambda run: {})
    result = call(run_folder, tmp_path / "out", "--photos", photos[0].parent, "--limit-photos", 1)
    assert (result.exit_code, result.stdout) == (8, "")
    assert result.stderr.splitlines()[-1] == "caption-export: error: the encoder graph: output keys differs"
    assert list(tmp_path.iterdir()) == []


def test_options_reach_the_export(call, run_folder, photos, tmp_path, monkeypatch):
    seen = {}

    def export_bundle(run, paths, out, **options):
        seen.update(run=run, paths=paths, out=out, **options)
        raise ExportError("seen enough")

    monkeypatch.setattr(exporting, "export_bundle", export_bundle)
    (tmp_path / "notes.md").write_text("## What it is bad at\n\nNaïve cats.\n", encoding="utf-8")
    options = ("--limit-photos", 2, "--checkpoint", "last", "--beam", 5, "--length-penalty", 0.5, "--overwrite")
    told = ("--description", "D.", "--teacher", run_folder, "--notes", tmp_path / "notes.md")
    call(run_folder, tmp_path / "out", "--photos", photos[0].parent, *options, *told)
    assert seen.pop("run").facts["checkpoint"] == {"which": "last", "step": 30}
    assert [path.name for path in seen.pop("paths")] == ["astronaut.jpg", "chelsea.jpg"]
    assert seen == {
        "out": tmp_path / "out",
        "name": "out",
        "license": "not stated",
        "description": "D.",
        "teacher_scores": json.loads((run_folder / "scores.json").read_text()),
        "notes": "## What it is bad at\n\nNaïve cats.\n",
        "beam_size": 5,
        "length_penalty": 0.5,
        "overwrite": True,
        "fp32": True,
        "reduction": None,
    }


def test_notes_that_are_no_text_and_a_teacher_without_scores(call, run_folder, photos, tmp_path):
    (tmp_path / "notes.md").write_bytes(b"caf\xe9")
    arguments = (run_folder, tmp_path / "out", "--photos", photos[0].parent)
    result = call(*arguments, "--notes", tmp_path / "notes.md")
    assert (result.exit_code, "notes.md is not UTF-8" in result.stderr) == (2, True)
    result = call(*arguments, "--notes", tmp_path / "none.md")
    assert (result.exit_code, "none.md cannot be read: No such file" in result.stderr) == (2, True)
    result = call(*arguments, "--teacher", tmp_path)
    assert (result.exit_code, f"{tmp_path} is no run folder: it has no scores.json" in result.stderr) == (7, True)
    assert not (tmp_path / "out").exists()


def test_without_the_extra_it_says_what_to_install(photos, tmp_path):
    (tmp_path / "tensorflow.py").write_text("raise ModuleNotFoundError('none', name='tensorflow')")
    code = "import sys; from caption_export.cli import main; sys.exit(main())"
    arguments = [sys.executable, "-c", code, tmp_path, tmp_path / "out", "--photos", photos[0].parent]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    sentence = "tensorflow is not installed: pip install 'caption-rt[export]' brings it"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"caption-export: error: {sentence}\n")


def test_ctrl_c_ends_with_130(call, run_folder, photos, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "export_bundle", interrupt)
    result = call(run_folder, tmp_path / "out", "--photos", photos[0].parent)
    assert (result.exit_code, result.stderr.strip()) == (130, "caption-export: error: interrupted")


def test_photos_must_be_given(call, tmp_path):
    result = call(tmp_path, tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr == "caption-export: error: Missing option '--photos' (see caption-export export --help)\n"


@pytest.mark.parametrize("arguments", [(), ("--photos", "."), ("export",)])
def test_what_names_no_command_is_an_export(call, arguments):
    result = call(*arguments)
    assert result.exit_code == 2
    assert "Missing argument 'RUN' (see caption-export export --help)" in result.stderr


@pytest.mark.parametrize(("word", "said"), [("verfy", "the nearest is 'verify'"), ("zzz", "there are export, graph,")])
def test_a_word_that_is_neither_command_nor_run_is_named(call, tmp_path, word, said):
    result = call(word, tmp_path / "a.zip")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"there is no command and no run '{word}'; of commands {said}" in result.stderr
    assert result.stderr.endswith("(see caption-export --help)\n")


def test_help_lists_the_commands_and_version_is_the_groups(call):
    assert "  export " in call("--help").stdout
    assert "--limit-photos" in call("export", "--help").stdout
    assert call("--version").stdout.startswith("caption-export ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--calibration", "."),
        ("--calibration-photos", 64),  # though it is the default
        ("--scored-photos", 9),
        ("--max-cider-loss", 1),
    ],
)
def test_an_option_of_fewer_bits_needs_a_precision_of_fewer_bits(call, run_folder, photos, tmp_path, arguments):
    result = call(run_folder, tmp_path / "out", "--photos", photos[0].parent, *arguments)
    assert result.exit_code == 2
    assert f"{arguments[0]} is about fp16 and int8: add --precision int8, or leave it out" in result.stderr
    for precision in ("fp32", "fp16"):
        result = call(
            *(run_folder, tmp_path / "out", "--photos", photos[0].parent),
            *("--precision", precision, "--reduce-range"),
        )
        assert result.exit_code == 2
        assert "--reduce-range is about int8: add --precision int8, or leave it out" in result.stderr


def test_errors_name_the_option_and_the_place(call, run_folder, photos, tmp_path):
    """Not a parameter of ours, and not a temporary file; and before anything is converted."""
    data = write_flickr8k(tmp_path / "data", range(8), range(8, 14))
    (tmp_path / "file").write_text("no folder")
    bundle = tmp_path / "file" / "bundle"
    int8 = ("--precision", "int8", "--dataset", data)
    for out, more, code, sentence in (
        (tmp_path / "out", ("--length-penalty", "nan"), 2, "--length-penalty must be a number of at least 0, not nan"),
        (tmp_path / "out", (*int8, "--max-cider-loss", "nan"), 2, "--max-cider-loss must be a number, not nan"),
        (tmp_path / "out", (*int8, "--min-equal-captions", "nan"), 2, "--min-equal-captions must be a number, not nan"),
        (tmp_path / "out", (*int8, "--min-sqnr", "inf"), 2, "--min-sqnr must be a number, not inf"),
        (tmp_path / "file", (), 3, "file exists already: name another folder, or replace it with --overwrite"),
        (
            tmp_path / "out",
            (*int8, "--calibration", photos[0].parent),
            2,
            "compared or scored: name others with --calibration (see caption-export export --help)",
        ),
        (bundle, (), 1, f"the bundle {bundle} cannot be written: {tmp_path / 'file'} is not a folder"),
    ):
        result = call(run_folder, out, "--photos", photos[0].parent, "--limit-photos", 3, *more)
        assert (result.exit_code, result.stdout) == (code, "")
        assert result.stderr.splitlines()[-1].endswith(sentence)
        assert "converting" not in result.stderr


def test_weights_of_7_bits_reach_the_export(call, run_folder, photos, tmp_path, monkeypatch):
    seen = {}

    def export_bundle(run, paths, out, *, reduction, **options):
        seen.update(asked=reduction(75))
        raise ExportError("seen enough")

    monkeypatch.setattr(exporting, "export_bundle", export_bundle)
    data = write_flickr8k(tmp_path / "data", range(8), range(8, 14))
    arguments = (run_folder, tmp_path / "out", "--photos", photos[0].parent, "--dataset", data, "--precision", "int8")
    for more, bits in ((), 8), (("--reduce-range",), 7):
        call(*arguments, *more, "--max-cider-loss", 0.5, "--calibration-photos", 4, "--scored-photos", 3)
        asked = seen["asked"]
        assert (asked.precisions, asked.weight_bits) == (("int8",), bits)
        assert asked.limits["int8"] == Limits(20.0, 0.5, 0.5)
        assert (len(asked.calibration), len(asked.scored.photos)) == (4, 3)


def test_a_reduced_precision_needs_photos_with_captions(call, run_folder, photos, tmp_path):
    result = call(run_folder, tmp_path / "out", "--photos", photos[0].parent, "--precision", "int8")
    assert result.exit_code == 2
    assert "int8 is scored on photos with captions: name them with --dataset" in result.stderr
