"""The command, in real processes: what is printed where, exit codes, one bad photo among good ones."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

import caption_rt
from caption_rt import cli
from running import complaints

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path, tiny_bundle):
    """Run the command in a process of its own, in an empty folder, with the tiny bundle unless told otherwise."""

    def call(*arguments, model=tiny_bundle, text=True, **keywords):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | keywords.pop("env", {})
        chosen = [] if model is None else ["--model", model]
        return subprocess.run(
            [sys.executable, "-m", "caption_rt", *chosen, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=text,
            check=False,
            **keywords,
        )

    return call


def test_one_photo_prints_its_caption_alone(run, photos):
    done = run(photos[2])
    assert (done.returncode, done.stdout, done.stderr) == (0, "in dog cat ball cat\n", "")


def test_several_photos_print_path_tab_caption(run, photos):
    done = run(*photos)
    captions = ["runs dog ball", "on cat", "in dog cat ball cat"]
    assert done.stdout == "".join(f"{path}\t{caption}\n" for path, caption in zip(photos, captions, strict=True))
    assert (done.returncode, done.stderr) == (0, "")


def test_json_lines(run, photos):
    done = run("--json", *photos[1:])
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["path"] for record in records] == [str(path) for path in photos[1:]]
    assert records[1]["caption"] == "in dog cat ball cat"
    assert records[1]["words"] == ["in", "dog", "cat", "ball", "cat"]
    assert records[1]["log_prob"] == pytest.approx(-9.743782, abs=1e-4)
    assert len(records[1]["word_log_probs"]) == 5
    assert [record["status"] for record in records] == ["ok", "ok"]
    assert [record["strategy"] for record in records] == ["sample", "greedy"]
    assert [record["retried_for"] for record in records] == [["repetition"], []]


def test_beam_and_max_words(run, photos):
    greedy = json.loads(run("--json", photos[0], "--max-words", "12", "--no-guard").stdout)
    beam = json.loads(run("--json", photos[0], "--max-words", "12", "--no-guard", "--beam", "8").stdout)
    assert (greedy["strategy"], beam["strategy"]) == ("greedy", "beam")
    assert beam["log_prob"] > greedy["log_prob"] + 0.1
    assert run(photos[0], "--max-words", "2").stdout == "grass runs\n"


def bad_photos(folder, good):
    """Bad photos of each kind, by path, with what is said of them."""
    data = good.read_bytes()
    contents = {
        "empty.jpg": (b"", "is empty (0 bytes)"),
        "truncated.jpg": (data[: len(data) // 3], "is cut short"),
        "text.jpg": (b"this is a text\n" * 50, "is named like a photo and holds text"),
        "noise.png": (bytes(range(1, 256)) * 9, "is not an image"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    sentences = {folder / name: sentence for name, (_, sentence) in contents.items()}
    return sentences | {folder / "missing.jpg": "does not exist"}


def test_each_bad_photo_alone_is_one_sentence_and_exit_code_4(tiny_bundle, photos, tmp_path, capfd):
    for path, sentence in bad_photos(tmp_path, photos[0]).items():
        assert cli.main(["--model", str(tiny_bundle), str(path)]) == 4
        printed = capfd.readouterr()
        assert printed.out == ""
        assert printed.err.startswith(f"caption-rt: error: {path} ")
        assert sentence in printed.err
        assert printed.err.count("\n") == 1


def test_bad_photos_among_good_ones_cost_only_themselves(run, photos, tmp_path):
    sentences = bad_photos(tmp_path, photos[0])
    bad = list(sentences)
    mixed = [*bad[:1], photos[0], *bad[1:4], photos[1], *bad[4:], photos[2]]
    done = run(*mixed)
    assert done.returncode == 6
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == [str(path) for path in photos]
    assert len(complaints(done)) == len(sentences)
    for line, (path, sentence) in zip(complaints(done), sentences.items(), strict=True):
        assert line.startswith(f"{path} ")
        assert sentence in line
    records = [json.loads(line) for line in run("--json", *mixed).stdout.splitlines()]
    assert [record["path"] for record in records] == [str(path) for path in mixed]
    assert [record["status"] == "ok" for record in records] == [path in photos for path in mixed]
    assert records[0]["caption"] is None
    assert records[0]["error"] == {"class": "ImageError", "reason": "is empty", "message": complaints(done)[0]}


def test_names_with_odd_characters_keep_their_line(run, photos, tmp_path):
    names = ["two\nlines.jpg", "tab\there.jpg", "\x1b[31mred.jpg", "Grüße 猫.jpg"]
    if sys.platform == "linux":
        names.append(os.fsdecode(b"undecodable\xff.jpg"))
    for name in names:
        shutil.copy(photos[2], tmp_path / name)
    done = run(*names, "no\nsuch\x1b[2J.jpg", text=False)
    lines = done.stdout.decode().splitlines()
    assert [line.split("\t")[1] for line in lines] == ["in dog cat ball cat"] * len(names)
    shown = [
        '"two\\nlines.jpg"',
        '"tab\\there.jpg"',
        '"\\u001b[31mred.jpg"',
        "Grüße 猫.jpg",
        '"undecodable\\udcff.jpg"',
    ]
    assert [line.split("\t")[0] for line in lines] == shown[: len(names)]
    assert done.stderr == b"caption-rt: error: no\\nsuch\\x1b[2J.jpg does not exist: check the path\n"
    records = [json.loads(line) for line in run("--json", *names).stdout.splitlines()]
    assert [record["path"] for record in records] == names


def test_a_terminal_without_unicode(run, photos, tmp_path):
    shutil.copy(photos[2], tmp_path / "猫.jpg")
    done = run("猫.jpg", "猫.jpg", "犬.jpg", text=False, env={"PYTHONIOENCODING": "latin-1"})
    assert done.stdout == b"\\u732b.jpg\tin dog cat ball cat\n" * 2
    assert done.stderr == b"caption-rt: error: \\u72ac.jpg does not exist: check the path\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "name at least one photo, or --self-test or --doctor alone"),
        (["--self-test", "a.jpg"], "name at least one photo, or --self-test or --doctor alone"),
        (["--doctor", "--self-test"], "name at least one photo, or --self-test or --doctor alone"),
        (["--nonsense", "a.jpg"], "No such option"),
        (["a.jpg", "--beam", "many"], "'many' is not a valid integer"),
        (["a.jpg", "--beam", "0"], "--beam must be a whole number from 1 to 1000, not 0"),
        (["a.jpg", "--max-words", "-3"], "--max-words must be a whole number from 1 to 1000, not -3"),
        (["a.jpg", "--max-words", "5000"], "--max-words must be a whole number from 1 to 1000, not 5000"),
        (["a.jpg", "--min-words", "5000"], "--min-words must be a whole number from 0 to 1000, not 5000"),
        (["a.jpg", "--json", "--n-best", "5000"], "--n-best must be a whole number from 1 to 1000, not 5000"),
        (["a.jpg", "--beam", "2", "--json", "--n-best", "3"], "a beam of 2 has no 3 best captions: raise --beam"),
        (["a.jpg", "--beam", "2", "--sample"], "sampling keeps no beam: --beam must be 1, not 2"),
        (["a.jpg", "--temperature", "2"], "--temperature needs --sample"),
        (["a.jpg", "--seed", "0"], "--seed needs --sample"),
        (["a.jpg", "--sample", "--top-p", "2"], "--top-p must be a number above 0 and at most 1, not 2.0"),
        (["a.jpg", "--ban", "two words"], "--ban takes words, and 'two words' is not one word"),
        (["a.jpg", "--min-words", "5", "--max-words", "3"], "at most 3: lower --min-words or raise --max-words"),
        (["a.jpg", "--device", "gpu"], "the device is one of auto, cpu, cuda, cuda:N, not 'gpu'"),
        (["a.jpg", "--threads", "0"], "0 is not in the range 1<=x<=1024"),
        (["a.jpg", "--max-bytes", "much"], "'much' is not a number such as 300M"),
        (["a.jpg", "--max-pixels", "0"], "--max-pixels must be a whole number from 1 to 4294967296, not 0"),
        (["a.jpg", "--shard", "3/2"], "a shard is 1/8 to 8/8, say, not 3/2"),
        (
            ["a.jpg", "--format", "txt", "-o", "a.txt"],
            "--format txt writes a file beside each photo: leave out --output",
        ),
        (["a.jpg", "--json", "--format", "csv"], "leave out one of --json and --format csv"),
        (["a.jpg", "-o", "a.xlsx"], "the ending of a.xlsx names no format"),
        (["a.jpg", "-o", "none/a.csv"], "the folder of the output none/a.csv does not exist: make it first"),
        (["a.jpg", "--existing", "append"], "--existing is about a file that is written: name it with --output"),
        (["a.jpg", "--errors", "none/e.jsonl"], "the folder of none/e.jsonl does not exist: make it first"),
        (["a.jpg", "b.jpg", "--plot", "p.png"], "--plot takes one photo"),
        (["a.jpg", "--show", "-o", "a.csv"], "--show takes one photo, and its caption goes to standard output"),
        ([".", "--plot", "p.png"], "--plot takes one photo"),
        (["--self-test", "--plot", "p.png"], "alone: leave out --plot"),
        (
            ["--self-test", "--beam", "3"],
            "--self-test goes with --model, --device, --precision, --threads and --json alone: leave out",
        ),
        (
            ["--doctor", "--no-guard"],
            "--doctor goes with --model, --device, --precision, --threads and --json alone: leave out --guard",
        ),
        (["a.jpg", "--plot", "p.gif"], "a plot's name ends in one of .png, .svg, .pdf, and p.gif does not"),
        (["a.jpg", "-o", ""], "Invalid value for '-o' / '--output': the name is empty"),
        (["a.jpg", "--errors", ""], "the name is empty"),
        (["a.jpg", "--model", ""], "the name is empty"),
        (
            ["a.jpg", "--model", "https://host/b.zip"],
            "https://host/b.zip is an address: fetch the bundle, and name its",
        ),
        (["a.jpg", "-0"], "-0 is about the list on standard input: name that with -"),
        (["a.jpg", "--include", ""], "a pattern of --include is empty and matches nothing"),
        (
            ["a.jpg", "--n-best", "3"],
            "the format jsonl alone has more than one caption a photo: add --json to --n-best",
        ),
        (["a.jpg", "--n-best", "3", "-o", "a.csv"], "add --json to --n-best"),
        (["a.jpg", "-o", "a.jsonl", "--format", "csv"], "the name a.jsonl says jsonl, and the format is to be csv"),
        (["a.jpg", "-o", "a.HTM", "--json"], "the name a.HTM says html, and the format is to be jsonl: choose one"),
        (["a.jpg", "--ledger", "l"], "--ledger is about a run that writes files: name one with --output"),
        (
            ["a.jpg", "-o", "a.csv", "--ledger", "none/l"],
            "the folder of the ledger none/l does not exist: make it first",
        ),
        (["a.jpg", "-o", "a.csv", "--ledger", "."], "the ledger . is a folder: name a file with --ledger"),
        (["a.jpg", "-o", "b.JPG", "--json"], "b.JPG is named like a photo: name another file to write to"),
        (["a.jpg", "--errors", "-"], "--errors writes a file: on standard error the errors are anyway"),
        (["a.jpg", "-o", "x.csv", "--errors", "./x.csv"], "./x.csv is named twice, and would be written over"),
        (["a.csv", "-o", "a.csv", "--existing", "overwrite"], "a.csv is named twice, and would be written over"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capfd, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    # Before anything else is looked at: there is no such model.
    assert cli.main(["--model", "none", *arguments]) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("caption-rt: error: ")
    assert printed.err.count("\n") == 1
    assert sentence in printed.err
    assert os.listdir(tmp_path) == []


def test_wrong_usage_names_the_help(run):
    assert complaints(run("--nonsense"))[0].endswith(" (see caption-rt --help)")


def test_wrong_usage_of_standard_input_names_the_options(run, photos, tmp_path):
    for given, arguments, sentence in (
        (b"a.jpg\0b.jpg\0", ["-"], "standard input has a zero byte between its names: say -0"),
        (
            b"a.jpg\nb.jpg\n",
            ["-", "-0"],
            "standard input has line breaks between its names and no zero byte: leave out -0",
        ),
        (photos[0].read_bytes(), ["-", "-0"], "standard input is a photo, and -0 is about a list: leave it out"),
    ):
        done = run(*arguments, input=given, text=False)
        assert (done.returncode, done.stdout) == (2, b"")
        assert done.stderr.decode() == f"caption-rt: error: {sentence}\n"
    done = run("-", "--max-bytes", "1k", input=photos[0].read_bytes(), text=False)
    assert done.returncode == 4
    assert done.stderr == b"caption-rt: error: standard input has more than 1.0 KiB: raise --max-bytes to read it\n"


def test_options_that_change_nothing_are_noted(run, photos):
    done = run(photos[2], "--include", "*.png", "--ban", "Zebra", "--ban", "cat", "--ban", "unicorn", "--no-guard")
    assert done.returncode == 0
    assert "cat" not in done.stdout
    assert done.stderr.splitlines() == [
        "caption-rt: note: --include and --exclude choose among what folders hold, and no folder is named",
        "caption-rt: note: --ban names what the model does not know, and would never say: unicorn, zebra",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            "--beam 1 --length-penalty 1",
            "--length-penalty chooses among a beam's captions, and a beam of 1 has one",
        ),
        ("--sample --length-penalty 0", "--length-penalty chooses among a beam's captions, and sampling keeps no beam"),
        ("--no-repeat-ngram 5 --max-words 5", "--no-repeat-ngram 5 forbids nothing: captions have at most 5 words"),
        ("--beam 2 --length-penalty 1 --no-repeat-ngram 4 --max-words 5", None),
    ],
)
def test_options_of_decoding_that_change_nothing_are_noted(run, photos, arguments, said):
    done = run(photos[2], *arguments.split())
    assert done.returncode == 0
    assert done.stderr.splitlines() == ([f"caption-rt: note: {said}"] if said else [])


def test_a_package_that_is_missing_is_one_sentence_and_exit_code_2(run, tmp_path, photos):
    for package in ("numpy", "click"):
        (tmp_path / package).mkdir()
        (tmp_path / package / f"{package}.py").write_text(f"raise ModuleNotFoundError('none', name={package!r})")
        path = os.pathsep.join([str(tmp_path / package), *filter(None, sys.path)])
        done = run(photos[0], env={"PYTHONPATH": path})
        assert (done.returncode, done.stdout) == (2, "")
        assert complaints(done) == [f"{package} is not installed: pip install 'caption-rt' brings it"]


def test_a_bad_bundle_is_one_sentence_and_exit_code_3(run, photos, tiny_bundle, tmp_path):
    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
    graph = bytearray((copy / "encoder.onnx").read_bytes())
    graph[100] ^= 1
    (copy / "encoder.onnx").write_bytes(graph)
    (tmp_path / "not.zip").write_text("no bundle")
    for model, sentence in {
        copy: "encoder.onnx is damaged or was changed",
        tmp_path / "nothing": "does not exist",
        tmp_path / "not.zip": "is not a bundle",
        photos[0]: "is not a bundle",
    }.items():
        done = run(photos[0], model=model)
        assert (done.returncode, done.stdout) == (3, "")
        (line,) = complaints(done)
        assert sentence in line
    assert run("--self-test", model=copy).returncode == 3


def test_a_device_that_is_not_there_is_one_sentence_and_exit_code_5(run, photos):
    # No driver is found where the loader finds no libcuda; a machine with a GPU would caption.
    done = run(photos[0], "--device", "cuda", env={"CUDA_VISIBLE_DEVICES": ""})
    assert (done.returncode, done.stdout) == (5, "")
    (line,) = complaints(done)
    assert line.startswith("cuda:0 cannot be used: ")


def test_the_self_test(run, tiny_bundle, tmp_path):
    done = run("--self-test", "--device", "cpu")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("self-test passed: tiny, 2 photos on CPUExecutionProvider in fp32, log-")
    record = json.loads(run("--self-test", "--json", "--device", "cpu").stdout)
    assert (record["status"], record["photos"], record["precision"], record["tolerance"]) == ("ok", 2, "fp32", 0.001)
    shutil.make_archive(str(tmp_path / "zipped"), "zip", tiny_bundle)
    assert run("--self-test", model="zipped.zip").stdout.startswith("self-test passed")


def test_a_plot(run, photos, tmp_path):
    pytest.importorskip("matplotlib")
    done = run(photos[1], "--plot", "attention.png")
    assert (done.returncode, done.stdout) == (0, "on cat\n")
    with Image.open(tmp_path / "attention.png") as plot:
        assert plot.width > plot.height > 300
    assert os.listdir(tmp_path) == ["attention.png"]
    done = run(photos[1], "--plot", "missing/attention.png")
    assert (done.returncode, done.stdout) == (2, "")
    assert complaints(done) == ["the folder missing of the plot does not exist: make it first"]
    done = run("none.jpg", "--plot", "none.png")
    assert done.returncode == 4
    assert not (tmp_path / "none.png").exists()


def test_version_and_help_are_quick(run):
    done = run("--version", model=None)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"caption-rt {caption_rt.__version__}\n", "")
    for option in ("--help", "-h"):
        text = run(option, model=None).stdout
        assert text.startswith("Usage: caption-rt [OPTIONS] [IMAGE|FOLDER|ADDRESS|-]...\n")
        headings = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
        assert headings == ["Photos:", "Output:", "Words (defaults are the model's):", "Model and machine:", "Other:"]
        for parameter in cli.command.params:
            assert parameter.name == "images" or max(parameter.opts, key=len) in text


def test_the_distributions_version_is_the_packages():
    """There is one place for it, so the two cannot differ."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["project"]["dynamic"] == ["version"]
    assert settings["tool"]["hatch"]["version"]["path"] == "runtime/caption_rt/__init__.py"
    assert caption_rt.__version__ in (ROOT / "runtime" / "caption_rt" / "__init__.py").read_text()
