import itertools
import tomllib
from pathlib import Path

import pytest

from caption_rt.command_options import OPTION_NAMES
from caption_rt.errors import OptionsError
from caption_train.settings import CONFIGS, KEYS, asked_for, load_settings, read_settings, render, shipped


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_files_are_complete_and_say_of_every_value_where_it_comes_from(name: str) -> None:
    said = tomllib.loads(shipped(name))
    assert tuple(f"{section}.{key}" for section, values in said.items() for key in values) == KEYS
    assert load_settings(name).as_dict() == said
    lines = shipped(name).splitlines()
    for before, line in itertools.pairwise(lines):
        if " = " in line and not line.startswith("#"):
            assert before.startswith("# "), line
            assert before.endswith((".", ";")), line
    assert render(load_settings(name), name) == shipped(name)


def test_the_three_differ_where_their_sources_do() -> None:
    default, tutorial, paper = (load_settings(name) for name in CONFIGS)
    assert [x.model.recurrence for x in (default, tutorial, paper)] == ["carry", "reset", "carry"]
    assert [x.model.initial_state for x in (default, tutorial, paper)] == ["mean", "zeros", "mean"]
    assert [x.captions.vocabulary_size for x in (default, tutorial, paper)] == [10000, 5000, 10000]
    assert (tutorial.training.epochs, tutorial.training.batch_size, tutorial.training.schedule) == (20, 64, "constant")
    assert (tutorial.training.learning_rate, tutorial.training.clip_norm, tutorial.model.dropout) == (1e-3, 0, 0)
    assert (tutorial.evaluation.sample, tutorial.evaluation.beam_size) == (True, 1)
    assert (paper.training.attention_penalty, paper.model.dropout, paper.evaluation.beam_size) == (1, 0.5, 5)
    options = tutorial.evaluation.decoding(tutorial.captions.max_words)
    assert (options.strategy, options.max_words, options.guard) == ("sample", 50, False)


def test_a_file_needs_to_hold_what_differs_alone_and_changes_come_last(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[training]\nepochs = 7\nlearning_rate = 1\n[model]\nrecurrence = "reset"\n')
    expected = load_settings().changed(
        {"training.epochs": 9, "training.learning_rate": 1.0, "model.recurrence": "reset", "evaluation.photos": 5}
    )
    assert load_settings(str(path), ["training.epochs=9", "evaluation.photos = 5"]) == expected
    assert type(expected.training.learning_rate) is float
    assert asked_for(str(path), []) == {"training.epochs": 7, "training.learning_rate": 1, "model.recurrence": "reset"}
    assert asked_for(None, ["model.units=3"]) == {"model.units": 3}


def test_what_is_rendered_is_read_back(tmp_path: Path) -> None:
    weights = 'a "quoted" \\ path, ä'
    settings = load_settings("paper", [f"extractor.weights={weights}", "evaluation.sample=false", "model.dropout=0.25"])
    assert settings.extractor.weights == weights
    path = tmp_path / "settings.toml"
    path.write_text(render(settings, "paper"), encoding="utf-8")
    assert read_settings(path) == settings
    assert "# Lambda of equation 14" in path.read_text(encoding="utf-8")
    path.write_text(render(settings, str(path)), encoding="utf-8")  # of a file of one's own: the default's comments
    assert read_settings(path) == settings
    path.write_text(render(settings).replace("units = 1800\n", ""), encoding="utf-8")
    with pytest.raises(OptionsError, match=r"settings\.toml has no model\.units"):
        read_settings(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("training.epoch=3", "there is no setting 'training.epoch'; did you mean training.epochs?"),
        ("epochs=3", "there is no setting 'epochs'; did you mean training.epochs?"),
        ("trainin.seed=3", "there is no setting 'trainin.seed'; did you mean training.seed?"),
        ("something=3", "there is no setting 'something': there are model.embedding_dim, "),
        ("training.epochs", "'training.epochs' is no setting: give section.key=value, such as training.epochs=3"),
        ("training.epochs=many", "training.epochs must be a whole number, not 'many'"),
        ("training.epochs=1.5", "training.epochs must be a whole number, not 1.5"),
        ("training.epochs=true", "training.epochs must be a whole number, not True"),
        ("training.epochs=", "training.epochs must be a whole number, not ''"),
        ("training.learning_rate=fast", "training.learning_rate must be a number, not 'fast'"),
        ("evaluation.sample=1", "evaluation.sample must be true or false, not 1"),
        ("training.epochs=0", "training.epochs must be at least 1, not 0"),
        ("training.seed=-1", "training.seed must lie in 0 to 2147483647, not -1"),
        ("training.seed=2147483648", "training.seed must lie in 0 to 2147483647, not 2147483648"),
        ("training.learning_rate=nan", "training.learning_rate must be a positive number, not nan"),
        ("training.clip_norm=inf", "training.clip_norm must be 0 or a positive number, not inf"),
        ("training.label_smoothing=1", "training.label_smoothing must lie in [0, 1), not 1.0"),
        ("training.schedule=linear", "training.schedule must be 'cosine' or 'constant', not 'linear'"),
        ("training.precision=float16", "training.precision must be 'auto', 'bfloat16' or 'float32', not 'float16'"),
        ("model.dropout=nan", "model.dropout must lie in [0, 1), not nan"),
        ("model.recurrence=carried", "model.recurrence must be 'carry' or 'reset', not 'carried'"),
        ("captions.max_words=1001", "captions.max_words must be a whole number from 1 to 1000, not 1001"),
        ("evaluation.beam_size=0", "evaluation.beam_size must be a whole number from 1 to 1000, not 0"),
        ("evaluation.length_penalty=-1", "evaluation.length_penalty must be a number of at least 0, not -1.0"),
        ("evaluation.sample=true", "sampling keeps no beam: evaluation.beam_size (in default) must be 1, not 3"),
    ],
)
def test_wrong_settings_are_one_sentence(change: str, sentence: str) -> None:
    with pytest.raises(OptionsError) as caught:
        load_settings(changes=[change])
    # As the command says it, which calls parameters of the runtime by its own options.
    assert sentence in str(caught.value.renamed(OPTION_NAMES))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"[training", "is not TOML: "),
        (b"\xff", "are not UTF-8 text"),
        (b"epochs = 3", "there is no section 'epochs'"),
        (b"[modle]\nunits = 3", "there is no section 'modle'; did you mean model?"),
        (b"[model]\nunit = 3", "there is no setting 'model.unit'; did you mean model.units?"),
        (b"[model]\nunits = 'many'", "model.units must be a whole number, not 'many'"),
        (b"[model]\ndropout = 1", "model.dropout (in {path}) must lie in [0, 1), not 1.0"),
        (b"[evaluation]\nsample = true\nbeam_size = 2", "evaluation.beam_size (in {path}) must be 1, not 2"),
    ],
)
def test_wrong_files_are_one_sentence_with_their_name(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(OptionsError) as caught:
        load_settings(str(path))
    assert str(path) in str(caught.value)
    assert sentence.format(path=path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="there is no configuration papr: give a TOML file, or one of default, tut"):
        load_settings("papr")
    with pytest.raises(OptionsError, match=r"gone\.toml cannot be read: No such file"):
        load_settings(str(tmp_path / "gone.toml"))
