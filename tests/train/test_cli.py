import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from caption_train.cli import main
from caption_train.datasets import load_dataset
from caption_train.files import read_json_lines
from caption_train.scores import score_captions
from caption_train.settings import load_settings
from shapes import shape_photo, write_flickr8k

pytestmark = pytest.mark.tf

PROGRAM = "import sys; from caption_train.cli import main; sys.exit(main())"
EXTRA = ("h5py", "keras", "matplotlib", "pycocoevalcap", "tensorflow")
SETTINGS = (
    *("extractor.weights=none", "extractor.width=0.1", "extractor.size=75", "extractor.layer=mixed0"),
    *("model.embedding_dim=24", "model.units=32", "model.dropout=0", "captions.min_count=1", "captions.max_words=12"),
    *("training.batch_size=8", "training.epochs=6", "training.learning_rate=0.02", "training.checkpoint_steps=2"),
    *("training.grouping=random", "training.label_smoothing=0", "training.attention_penalty=0", "training.patience=0"),
    "evaluation.beam_size=1",
)
TINY = tuple(f"--set={setting}" for setting in SETTINGS)


def command(*arguments: object, without: tuple[str, ...] = ()) -> list[str]:
    """`caption-train` as a process of its own; on a machine that lacks some packages."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({without}, None)); " if without else ""
    return [sys.executable, "-c", blocked + PROGRAM, *map(str, arguments)]


def run(*arguments: object, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        command(*arguments, without=without), capture_output=True, text=True, check=False, encoding="utf-8"
    )
    assert "Traceback" not in result.stderr
    return result


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flickr8k(tmp_path_factory.mktemp("data") / "set", range(0, 24, 3), (27, 30, 33), captions=["{}"] * 5)


@pytest.fixture(scope="module")
def interrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, int, int]:
    """A run that Ctrl-C ended after its first epoch: its folder, what it said, its exit code.

    And that of the same command while it was trained.
    """
    folder = tmp_path_factory.mktemp("runs") / "run"
    child = subprocess.Popen(command("train", data, folder, *TINY), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (folder / "history.jsonl").exists() or not (folder / "history.jsonl").read_text():
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGSTOP)
    refused = main(["train", str(data), str(folder), *TINY])
    child.send_signal(signal.SIGINT)
    child.send_signal(signal.SIGCONT)
    _, said = child.communicate(timeout=120)
    return folder, said, child.returncode, refused


@pytest.fixture(scope="module")
def trained(data: Path, interrupted: tuple[Path, str, int, int]) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The same run after the same command was given again: its folder, and how that ended."""
    folder, *_ = interrupted
    return folder, run("train", data, folder, *TINY)


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C comes to a child otherwise on Windows")
def test_ctrl_c_says_how_to_go_on(interrupted: tuple[Path, str, int, int]) -> None:
    folder, said, code, refused = interrupted
    assert (code, refused) == (130, 7)
    assert said.splitlines()[-1] == "caption-train: error: interrupted; give the same command again to go on"
    assert "Traceback" not in said
    assert 0 < len(read_json_lines(folder / "history.jsonl")) < 6


def test_the_same_command_goes_on(trained: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, result = trained
    assert result.returncode == 0
    assert re.search(r"^going on after step \d+ of 30$", result.stderr, re.MULTILINE)
    assert result.stderr.splitlines()[-1].startswith("epoch 6 of 6: loss ")
    assert [row["epoch"] for row in read_json_lines(folder / "history.jsonl")] == list(range(1, 7))
    names = [line.split()[0] for line in result.stdout.splitlines()]
    assert names == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr", "photos"]
    assert result.stdout.splitlines()[-1].split() == ["photos", "3"]
    scores = json.loads((folder / "scores.json").read_text())["validation"]
    assert float(result.stdout.split()[1]) == pytest.approx(scores["BLEU-1"], abs=1e-3)
    assert scores["checkpoint"] == "best"


# Holds a run folder as a training does, without the minutes of one.
HOLDER = """
import sys, time
from pathlib import Path
from caption_train.errors import TrainingError
from caption_train.files import one_process
with one_process(Path(sys.argv[1]), TrainingError("")):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(os.name == "nt", reason="nothing is held on Windows")
def test_one_process_trains_in_a_folder_until_it_is_killed(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    arguments = ["train", str(data), str(folder), *TINY, "--until", "features"]
    with subprocess.Popen([sys.executable, "-c", HOLDER, folder / "lock"], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        assert main(arguments) == 7
        assert capsys.readouterr().err == (
            f"caption-train: error: another process trains in {folder}: wait for it, or end it\n"
        )
        assert [path.name for path in folder.iterdir()] == ["lock"]
        child.kill()
    assert main([*arguments, "--set=training.seed=-1"]) == 2
    assert not folder.exists()  # no run has come of it
    assert main(arguments) == 0
    assert (folder / "grids").exists()


def test_nothing_but_ours_on_stderr(trained: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    lines = trained[1].stderr.splitlines()
    assert all(line.startswith(("going on after step", "epoch ")) for line in lines), lines


def test_evaluate_json(data: Path, trained: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    folder, _ = trained
    page = tmp_path / "worst.html"
    arguments = ("--split", "train", "--checkpoint", "last", "--page", page, "--no-java", "--json")
    result = run("evaluate", data, folder, *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert list(found["scores"]) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"]
    indexes = sorted(range(0, 24, 3), key=str)  # by file name
    assert [row["path"] for row in found["captions"]] == [str(data / "images" / f"{index}.jpg") for index in indexes]
    assert [row["references"] for row in found["captions"]] == [[shape_photo(index)[1]] * 5 for index in indexes]
    said = {row["path"]: row["caption"] for row in found["captions"]}
    real = {row["path"]: row["references"] for row in found["captions"]}
    assert found["scores"] == score_captions(said, real)
    assert found["scores"]["BLEU-1"] > 50
    words = {word for caption in said.values() for word in caption.split()}
    assert found["statistics"]["words_used"] == len(words)
    assert found["statistics"]["words_known"] == len({word for texts in real.values() for word in texts[0].split()})
    assert page.read_text().count("<figure>") == 8
    assert "run, train photos" in page.read_text()


def test_evaluate_shows_generated_beside_real(
    data: Path, trained: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = trained
    arguments = ["evaluate", data, folder, "--beam", "3", "--show", "2", "--max-words", "4", "--length-penalty", "0.5"]
    assert main([*map(str, arguments), "--no-java"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[6].split() == ["photos", "3"]
    assert re.fullmatch(r"words a caption: \d\.\d on average, \d to 4", lines[7])
    assert [line for line in lines if line.endswith(".jpg")] == ["27.jpg", "30.jpg"]
    generated = [line.split()[1:] for line in lines if line.startswith("  generated  ")]
    assert len(generated) == 2
    assert all(len(words) <= 4 and words[0] == "a" for words in generated)
    assert lines[-1] == f"  real       {shape_photo(30)[1]}"
    record = json.loads((folder / "scores.json").read_text())["validation"]
    assert (record["beam_size"], record["length_penalty"]) == (3, 0.5)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="a folder that takes no file from anybody is of Linux")
def test_evaluate_samples_and_prints_before_it_writes_the_page(
    data: Path, trained: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = trained
    arguments = ["evaluate", data, folder, "--sample", "--seed", "3", "--no-java", "--page", "/proc/worst.html"]
    assert main(list(map(str, arguments))) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("BLEU-1")
    assert "worst.html" in captured.err
    record = json.loads((folder / "scores.json").read_text())["validation"]
    assert (record["sample"], record["beam_size"], record["max_words"]) == (True, 1, 12)


def test_scores_of_other_data_are_not_the_runs(
    trained: tuple[Path, subprocess.CompletedProcess[str]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = trained
    before = (folder / "scores.json").read_bytes()
    other = write_flickr8k(tmp_path / "other", (0, 3), (6, 9), captions=["{} \x1b[31m"])
    assert main(["evaluate", str(other), str(folder), "--show", "1", "--no-java"]) == 0
    assert "not the data that" in caplog.text
    # Whoever wrote the data set has no say over the terminal.
    assert capsys.readouterr().out.endswith(f"  real       {shape_photo(6)[1]} \\x1b[31m\n")
    assert (folder / "scores.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (
            ["train", "{data}", "{run}", *TINY, "--set=training.epochs=9"],
            7,
            "training.epochs was 6 and is now 9; give the",
        ),
        (["train", "{data}", "{run}", "--set", "extractor.width=0.2"], 7, "extractor.width was 0.1 and is now 0.2"),
        (["train", "{data}", "{run}", "--config", "paper"], 7, "model.embedding_dim was 24 and is now 512"),
        (["train", "{data}", "{run}", *TINY, "--data-seed", "3"], 7, "another dataset: seed was 0 and is now 3"),
        (["train", "{data}", "{tmp}/new", "--set", "model.dropout=1.5"], 2, "dropout must lie in [0, 1), not 1.5"),
        (["train", "{data}", "{tmp}/new", "--set", "extractor.size=20"], 2, "extractor size 20 is too small"),
        (
            ["train", "{data}", "{tmp}/new", "--set", "extractor.layer=mixed99"],
            2,
            "'mixed99' does not exist: choose one of mixed0,",
        ),
        (
            ["train", "{data}", "{tmp}/new", "--set", "extractor.weights=gone.h5"],
            7,
            "gone.h5 do not exist: give a file,",
        ),
        (["train", "{data}", "{data}/Flickr8k.token.txt/x", *TINY], 1, "Flickr8k.token.txt/x: Not a directory"),
        (["evaluate", "{data}", "{run}", "--split", "test"], 2, "the data set flickr8k has no test split"),
        (["evaluate", "{data}", "{tmp}"], 7, "is no run folder: it has no run.json"),
        (["evaluate", "{data}", "{run}", "--beam", "1001"], 2, "beam must be a whole number from 1 to 1000, not 1001"),
        (["evaluate", "{data}", "{run}", "--sample", "--beam", "3"], 2, "sampling keeps no beam: --beam must be 1"),
        (["evaluate", "{data}", "{run}", "--seed", "3"], 2, "--seed needs --sample"),
        (["evaluate", "{data}", "{run}", "--page", "{data}"], 2, "set is a folder: name a file"),
        (["evaluate", "{data}", "{run}", "--page", ""], 2, "--page . is a folder: name a file"),
        (["evaluate", "{data}", "{run}", "--page", "gone/a.html"], 2, "the folder gone of the page does not exist"),
        (
            ["distill", "{data}/images", "--out", "{tmp}/d", "--learning-rate", "0"],
            2,
            "learning_rate must be a positive",
        ),
        (
            ["distill", "{data}/images", "--out", "{tmp}/d", "--exclude", "{tmp}/none.txt"],
            2,
            "No such file or directory",
        ),
    ],
)
def test_wrong_calls_are_one_sentence(
    data: Path,
    trained: tuple[Path, subprocess.CompletedProcess[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    sentence: str,
) -> None:
    filled = [argument.format(data=data, run=trained[0], tmp=tmp_path) for argument in arguments]
    assert main(filled) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("caption-train: error: ")
    assert captured.err.count("\n") == 1
    assert sentence in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ([], 2, "(see caption-train --help)"),
        (["learn"], 2, "No such command 'learn'"),
        (["train"], 2, "Missing argument 'DATA' (see caption-train train --help)"),
        (["train", "{tmp}/gone", "{tmp}/run"], 6, "gone: there is no such data set"),
        (["train", "{tmp}", "{tmp}/run"], 6, "holds no captions in a known format"),
        (["train", "{tmp}/empty.json", "{tmp}/run"], 6, "it has no list 'images'"),
        (["train", "{tmp}/empty.json", "{tmp}/run", "--images", "{tmp}"], 6, "it has no list 'images'"),
        (["train", "{tmp}/set", "{tmp}/run"], 6, "2 of the 4 photos of"),
        (["train", "{tmp}/set", "{tmp}/run", "--limit", "1"], 2, "1 is not in the range x>=2"),
        (["train", "{tmp}/set", "{tmp}/run", "--set", "training.epochs=many"], 2, "must be a whole number, not 'many'"),
        (["train", "{tmp}/set", "{tmp}/run", "--set", "epochs=3"], 2, "'epochs'; did you mean training.epochs?"),
        (
            ["train", "{tmp}/set", "{tmp}/run", "--config", "papr"],
            2,
            "there is no configuration papr: give a TOML file",
        ),
        (["train", "{tmp}/set", "{tmp}/run", "--config", "{tmp}/empty.json"], 2, "empty.json is not TOML: "),
        (["train", "{tmp}/set", "{tmp}/run", "--start-from", "{tmp}/run"], 6, "2 of the 4 photos of"),
        (["settings", "papers"], 2, "'papers' is not one of 'default', 'tutorial', 'paper'"),
        (["train", "{tmp}/set", "{tmp}/empty.json"], 2, "is a file"),
        (["distill", "{tmp}", "--out", "{tmp}/run", "--captions", "{tmp}"], 2, "give both or neither"),
        (["distill", "{tmp}/gone", "--out", "{tmp}/run"], 6, "gone: there is no such folder of photos"),
    ],
)
def test_wrong_calls_are_found_without_tensorflow(
    tmp_path: Path, arguments: list[str], code: int, sentence: str
) -> None:
    (tmp_path / "empty.json").write_text("{}")
    write_flickr8k(tmp_path / "set", (0, 1), (2, 3))
    for index in (0, 3):
        (tmp_path / "set" / "images" / f"{index}.jpg").unlink()
    result = run(*(argument.format(tmp=tmp_path) for argument in arguments), without=EXTRA)
    assert result.returncode == code
    assert result.stdout == ""
    assert result.stderr.startswith("caption-train: error: ")
    assert result.stderr.count("\n") == 1
    assert sentence in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["tensorflow", "matplotlib", "all"])
def test_without_the_extra(data: Path, tmp_path: Path, missing: str) -> None:
    without = EXTRA if missing == "all" else (missing,)
    result = run("train", data, tmp_path / "run", *TINY, without=without)
    assert result.returncode == 2
    name = "[a-z]+" if missing == "all" else missing
    sentence = f"{name}[a-z_.]* is not installed: pip install 'caption-rt\\[train\\]' brings it"
    assert re.fullmatch(f"caption-train: error: {sentence}\n", result.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [None, "train", "settings", "evaluate", "caption", "distill", "import-tutorial"])
def test_help_needs_no_tensorflow(name: str | None) -> None:
    result = run(*([name] if name else []), "--help", without=(*EXTRA, "numpy.random"))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"Usage: caption-train {name or '[OPTIONS]'}")
    # Every option says what it does.
    options = re.findall(r"^  (-\S.*)$", result.stdout, re.MULTILINE)
    assert options
    text = re.sub(r"\n {10,}", "  ", result.stdout)
    for line in re.findall(r"^  (-\S.*)$", text, re.MULTILINE):
        assert re.search(r"\S {2,}[A-Z'A]", line), line


def test_settings_are_printed_as_a_file_that_train_takes(tmp_path: Path) -> None:
    result = run("settings", "tutorial", without=EXTRA)
    assert (result.returncode, result.stderr) == (0, "")
    (tmp_path / "mine.toml").write_text(result.stdout)
    assert load_settings(str(tmp_path / "mine.toml")) == load_settings("tutorial")


def test_version() -> None:
    from caption_rt import __version__

    result = run("--version", without=EXTRA)
    assert (result.returncode, result.stdout) == (0, f"caption-train {__version__}\n")


def test_some_photos_missing(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_flickr8k(tmp_path / "set", range(0, 12, 3), (27, 30), captions=["{}"])
    (folder / "images" / "3.jpg").unlink()
    (folder / "images" / "6.jpg").write_bytes(b"cut")
    arguments = ["train", folder, tmp_path / "run", *TINY, "--max-missing-share", "0.2", "--until", "features"]
    assert main([*map(str, arguments)]) == 0
    assert "1 of the 6 photos" in caplog.text
    assert "6.jpg" in caplog.text
    assert "1 of 5 photos could not be read and are left out" in caplog.text
    assert json.loads((tmp_path / "run" / "run.json").read_text())["dataset"]["training_photos"] == 3
    assert not (tmp_path / "run" / "last").exists()


@pytest.mark.slow
@pytest.mark.data
def test_coco(shared: Path, tmp_path: Path) -> None:
    """The real annotation file, of whose 5,000 photos 20 are there."""
    captions, images = shared / "coco" / "captions_val2017.json", shared / "photos" / "images"
    arguments = ("train", captions, tmp_path / "run", "--images", images, *TINY, "--set=training.epochs=1")
    refused = run(*arguments)
    assert refused.returncode == 6
    assert "raise max_missing_share from 0 to 0.996" in refused.stderr
    result = run(*arguments, "--max-missing-share", "0.996", "--until", "training")
    assert (result.returncode, result.stdout) == (0, "")
    assert "4,980 of the 5,000 photos" in result.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text())["dataset"]
    assert (record["name"], record["training_photos"], record["validation_photos"]) == ("coco", 16, 4)
    assert 80 <= record["training_captions"] <= 84
    (row,) = read_json_lines(tmp_path / "run" / "history.jsonl")
    assert row["step"] == -(-record["training_captions"] // 8)
    assert 1 < row["val_loss"] < 8
    with Image.open(tmp_path / "run" / "loss.png") as curve:
        assert curve.format == "PNG"


@pytest.mark.slow
def test_a_distilled_extractor_trains_a_captioner(data: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    arguments = ["train", data, teacher, *TINY, "--set=extractor.width=1.0"]
    assert main([*map(str, arguments)]) == 0
    student = tmp_path / "student"
    validation = [image.path.name for image in load_dataset(data).validation]
    (tmp_path / "unseen.txt").write_text("\n".join(validation))
    arguments = [
        *("distill", data / "images", "--captioner", teacher, "--captions", data),
        *("--teacher-weights", teacher / "extractor.weights.h5", "--teacher-layer", "mixed0", "--teacher-size", "75"),
        *("--width", "0.1", "--layer", "mixed0", "--size", "75"),
        *("--rounds", "2", "--passes", "2", "--batch-size", "4"),
    ]
    seen = run(*arguments, "--out", tmp_path / "seen")
    assert seen.returncode == 2
    assert "are among PHOTOS: --exclude them" in seen.stderr
    distill = run(*arguments, "--out", student, "--exclude", tmp_path / "unseen.txt")
    assert (distill.returncode, distill.stdout) == (0, f"{student}\n"), distill.stderr
    records = read_json_lines(student / "distill.jsonl")
    assert [0 <= record["CIDEr"] <= 10 for record in records if record["round"] in (1, 2)] == [True, True]
    assert json.loads((student / "distillation.json").read_text())["distillation"]["photos"] == 7  # one is held out
    arguments = ["train", data, tmp_path / "run", "--set", f"extractor.weights={student}", "--until", "features"]
    assert main([*map(str, arguments)]) == 0
    extractor = json.loads((tmp_path / "run" / "run.json").read_text())["extractor"]
    assert (extractor["width"], extractor["size"], extractor["layer"]) == (0.1, 75, "mixed0")
    assert extractor["weights"] == "student"
    assert extractor["distillation"]["teacher"]["weights"] == "extractor.weights.h5"


def test_what_keras_downloads_is_no_result(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(**options: object) -> None:
        print("Downloading data from https://example.org")
        raise Exception("URL fetch failure")

    monkeypatch.setattr("keras.applications.InceptionV3", download)
    assert main(["train", str(data), str(tmp_path / "run")]) == 7
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "could not download the ImageNet weights (URL fetch failure): give a weights file" in captured.err
    assert list(tmp_path.iterdir()) == []
