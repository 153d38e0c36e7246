import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf

from caption_rt.errors import OptionsError
from caption_train.cli import main
from caption_train.errors import TrainingError
from caption_train.importing import import_tutorial
from caption_train.inception import ExtractorConfig, build_extractor, save_extractor
from caption_train.runs import open_run
from caption_train.tutorial import read_tutorial

pytestmark = pytest.mark.tf

CHANNELS, SIZE, UNITS, TOP_K = 32, 6, 7, 12
CAPTIONS = ["a dog runs", "a dog sleeps on a mat", "a red boat on the water .\n", "a man with a hat", "it is a zebra"]


class Attention(keras.Model):
    """Additive attention: a score for each place from the features and the last state."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.W1, self.W2, self.V = (keras.layers.Dense(size) for size in (units, units, 1))

    def call(self, features: tf.Tensor, state: tf.Tensor) -> tf.Tensor:
        places = self.V(tf.tanh(self.W1(features) + self.W2(state[:, None])))
        return tf.reduce_sum(tf.nn.softmax(places, axis=1) * features, axis=1)


class Encoder(keras.Model):
    """One dense layer on every place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = keras.layers.Dense(SIZE)

    def call(self, grid: tf.Tensor) -> tf.Tensor:
        return tf.nn.relu(self.fc(grid))


class Decoder(keras.Model):
    """Embedding, attention, a GRU that is called without a state, two dense layers."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.embedding = keras.layers.Embedding(words, SIZE)
        self.gru = keras.layers.GRU(
            UNITS, return_sequences=True, return_state=True, recurrent_initializer="glorot_uniform"
        )
        self.fc1 = keras.layers.Dense(UNITS)
        self.fc2 = keras.layers.Dense(words)
        self.attention = Attention(UNITS)

    def call(self, word: tf.Tensor, features: tf.Tensor, state: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        context = self.attention(features, state)
        output, state = self.gru(tf.concat([context[:, None], self.embedding(word)], axis=-1))
        return self.fc2(tf.reshape(self.fc1(output), (-1, UNITS))), state


class Theirs(NamedTuple):
    """What somebody who ran the tutorial has."""

    folder: Path
    tokenizer: Path
    ids: dict[str, int]
    logits: Callable[[np.ndarray, list[int]], np.ndarray]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    """A checkpoint after a step of training, and the tokenizer as Keras writes it."""
    folder = tmp_path_factory.mktemp("tutorial")
    tokenizer = tf.keras.preprocessing.text.Tokenizer(
        num_words=TOP_K, oov_token="<unk>", filters='!"#$%&()*+.,-/:;=?@[\\]^_`{|}~ '
    )
    tokenizer.fit_on_texts([f"<start> {caption} <end>" for caption in CAPTIONS])
    tokenizer.word_index["<pad>"] = 0
    tokenizer.index_word[0] = "<pad>"
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    keras.utils.set_random_seed(3)
    encoder, decoder, optimizer = Encoder(), Decoder(TOP_K + 1), keras.optimizers.Adam(0.01)

    def logits(grid: np.ndarray, tokens: list[int]) -> tf.Tensor:
        features, state = encoder(grid[None]), tf.zeros((1, UNITS))
        steps = []
        for token in tokens:
            step, state = decoder(tf.constant([[token]]), features, state)
            steps.append(step[0])
        return tf.stack(steps)

    grid = np.random.default_rng(0).normal(size=(9, CHANNELS)).astype(np.float32)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(logits(grid, [2, 1, 3]) ** 2)
    variables = encoder.trainable_variables + decoder.trainable_variables
    for variable in variables:  # biases are not zero after a training
        variable.assign_add(tf.random.stateless_normal(variable.shape, (1, len(variable.shape)), stddev=0.3))
    optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
    checkpoint = tf.train.Checkpoint(encoder=encoder, decoder=decoder, optimizer=optimizer)
    tf.train.CheckpointManager(checkpoint, str(folder / "train"), max_to_keep=5).save()
    return Theirs(folder / "train", folder / "tokenizer.json", dict(tokenizer.word_index), logits)


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small extractor with as many channels."""
    folder = tmp_path_factory.mktemp("extractor")
    config = ExtractorConfig(width=0.1, size=75, layer="mixed0")
    model = build_extractor(config)
    assert model.output_shape[-1] == CHANNELS
    save_extractor(model, config, folder)
    return folder


@pytest.fixture(scope="module")
def imported(theirs: Theirs, extractor: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    import_tutorial(run, theirs.folder, theirs.tokenizer, str(extractor), 30)
    return run


def test_the_same_logits(theirs: Theirs, imported: Path) -> None:
    run = open_run(imported)
    assert (run.model.config.recurrence, run.max_words) == ("reset", 30)
    words = run.vocabulary.words
    # Rows keep their order; the line break, which is a word to the tutorial's tokenizer, is left out.
    by_id = sorted(theirs.ids, key=theirs.ids.__getitem__)[: TOP_K + 1]
    assert "\n" in theirs.ids
    assert list(words) == [word for word in by_id if word.isprintable()]
    assert words[:2] == ("<pad>", "<unk>")
    grid = np.random.default_rng(5).normal(size=(run.model.config.places, CHANNELS)).astype(np.float32)
    spoken = ["<start>", "a", "dog", "<unk>", "on"]
    expected = theirs.logits(grid, [theirs.ids[word] for word in spoken]).numpy()
    found = run.model(grid[None], tf.constant([[words.index(word) for word in spoken]], tf.int64))[0]
    np.testing.assert_allclose(found, expected[:, [theirs.ids[word] for word in words]], rtol=1e-4, atol=1e-5)


def test_the_run_captions_and_says_where_it_is_from(
    imported: Path, photos: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plot = tmp_path / "plot.png"
    arguments = [photos[0], imported, "--no-guard", "--min-words", "3", "--max-words", "5", "--plot", plot]
    assert main(["caption", *map(str, arguments)]) == 0
    words = capsys.readouterr().out.split()
    assert 3 <= len(words) <= 5
    assert set(words) <= set(open_run(imported).vocabulary.words)
    assert plot.read_bytes()[:4] == b"\x89PNG"
    record = json.loads((imported / "run.json").read_text())
    assert record["imported_from"] == {"checkpoint": "ckpt-1", "tokenizer": "tokenizer.json"}
    facts = open_run(imported).facts
    assert facts["model"]["recurrence"] == "reset"
    assert not facts.keys() & {"training", "evaluation"}  # how it was trained is not known


def test_several_photos_and_one_that_cannot_be_read(
    imported: Path, photos: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    gone = tmp_path / "gone.jpg"
    assert main(["caption", *map(str, (photos[0], gone, photos[1], imported))]) == 4
    captured = capsys.readouterr()
    assert [line.split("\t")[0] for line in captured.out.splitlines()] == [str(photos[0]), str(photos[1])]
    assert captured.err == f"caption-train: error: {gone} does not exist: check the path\n"


def test_beams_and_samples_are_the_runtimes(
    imported: Path, photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def captioned(*options: object) -> list[dict[str, Any]]:
        assert main(["caption", *map(str, (*photos[:2], imported, "--json", "--no-guard", *options))]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    beams = captioned("--beam", 3, "--n-best", 2)
    assert [(row["path"], row["strategy"], len(row["alternatives"])) for row in beams] == [
        (str(photo), "beam", 1) for photo in photos[:2]
    ]
    samples = captioned("--sample", "--seed", 4, "--temperature", 2)
    assert [row["strategy"] for row in samples] == ["sample", "sample"]
    assert samples == captioned("--sample", "--seed", 4, "--temperature", 2)
    assert samples != captioned("--sample", "--seed", 5, "--temperature", 2)
    assert {row["provider"] for row in samples} == {"TensorFlow"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{run}"], "Missing argument 'IMAGE...'"),
        (["{photo}", "{run}", "--seed", "3"], "--seed needs --sample"),
        (["{photo}", "{photo}", "{run}", "--plot", "a.png"], "--plot takes one photo"),
        (["{photo}", "{run}", "--plot", "a.txt"], "a plot's name ends in one of .png, .svg, .pdf, and a.txt does not"),
        (["{photo}", "{run}", "--plot", "gone/a.png"], "the folder gone of the plot does not exist: make it first"),
        (["{photo}", "{run}", "--n-best", "3"], "JSON alone has more than one caption a photo: add --json to --n-best"),
        (["{photo}", "{run}", "--sample", "--top-p", "2"], "must be a number above 0 and at most 1, not 2.0"),
    ],
)
def test_wrong_calls_of_caption_are_one_sentence(
    imported: Path, photos: list[Path], capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert main(["caption", *(text.format(run=imported, photo=photos[0]) for text in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert sentence in captured.err


def test_a_prefix_and_a_file_name_a_checkpoint_too(theirs: Theirs, tmp_path: Path) -> None:
    shutil.copytree(theirs.folder, tmp_path / "train[1]")  # a pattern that does not match itself
    named = [theirs.folder / name for name in ("ckpt-1", "ckpt-1.index", "ckpt-1.data-00000-of-00001")]
    paths = (theirs.folder, tmp_path / "train[1]", *named)
    weights = [read_tutorial(path, theirs.tokenizer).weights["encoder/fc/kernel"] for path in paths]
    assert all(np.array_equal(weights[0], other) for other in weights[1:])


class Part(tf.Module):
    """A node of an object graph, with what it is given as attributes."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def save(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> Path:
    """A checkpoint with the names of Keras 2: a variable's own name is the attribute that leads to it."""
    shapes: dict[str, tuple[int, ...]] = {
        "encoder/fc/kernel": (CHANNELS, SIZE),
        "encoder/fc/bias": (SIZE,),
        "decoder/embedding/embeddings": (TOP_K + 1, SIZE),
        "decoder/gru/cell/kernel": (2 * SIZE, 3 * UNITS),
        "decoder/gru/cell/recurrent_kernel": (UNITS, 3 * UNITS),
        "decoder/gru/cell/bias": (2, 3 * UNITS),
    }
    for name, rows, columns in (
        ("fc1", UNITS, UNITS),
        ("fc2", UNITS, TOP_K + 1),
        ("attention/W1", SIZE, UNITS),
        ("attention/W2", UNITS, UNITS),
        ("attention/V", UNITS, 1),
    ):
        shapes |= {f"decoder/{name}/kernel": (rows, columns), f"decoder/{name}/bias": (columns,)}
    values = {name: np.full(shape, number, np.float32) for number, (name, shape) in enumerate(shapes.items())}
    change(values)
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = tf.Variable(value)

    def part(node: Any) -> Any:
        return Part(**{name: part(child) for name, child in node.items()}) if isinstance(node, dict) else node

    return Path(tf.train.Checkpoint(**{name: part(node) for name, node in tree.items()}).write(str(folder / "ckpt-5")))


def test_the_names_of_keras_2(theirs: Theirs, tmp_path: Path) -> None:
    checkpoint = save(tmp_path, lambda values: None)
    assert "decoder/gru/cell/kernel/.ATTRIBUTES/VARIABLE_VALUE" in dict(tf.train.list_variables(str(checkpoint)))
    found = read_tutorial(checkpoint, theirs.tokenizer)
    assert (found.channels, found.embedding_dim, found.units) == (CHANNELS, SIZE, UNITS)
    assert [found.weights[name].flat[0] for name in found.weights] == list(range(16))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda values: values.pop("decoder/attention/W2/bias"), "has no decoder/attention/W2/bias: it is not of the"),
        (
            lambda values: values.update({"decoder/fc1/kernel": np.zeros((UNITS, 3), np.float32)}),
            r"decoder/fc1/kernel has the shape \(7, 3\) rather than \(7, 7\)",
        ),
        (
            lambda values: values.update({"decoder/gru/cell/bias": np.zeros(3 * UNITS, np.float32)}),
            r"decoder/gru/cell/bias has the shape \(21,\) rather than \(2, 21\)",
        ),
        (
            lambda values: values.update({"encoder/fc/kernel": np.zeros(CHANNELS, np.float32)}),
            r"encoder/fc/kernel has the shape \(32,\) rather than",
        ),
        (
            lambda values: values["decoder/fc2/bias"].__setitem__(3, np.nan),
            r"ckpt-5 is of a training that failed: decoder/fc2/bias holds values that are no numbers; take an earlier",
        ),
    ],
)
def test_another_model_is_one_sentence(
    theirs: Theirs, tmp_path: Path, change: Callable[[dict[str, np.ndarray]], Any], sentence: str
) -> None:
    with pytest.raises(TrainingError, match=sentence):
        read_tutorial(save(tmp_path, change), theirs.tokenizer)


def test_what_is_no_checkpoint(theirs: Theirs, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"there is no checkpoint .*gone: it would have a file gone\.index"):
        read_tutorial(tmp_path / "gone", theirs.tokenizer)
    with pytest.raises(TrainingError, match="holds no checkpoint: name one"):
        read_tutorial(tmp_path, theirs.tokenizer)
    (tmp_path / "text.index").write_text("not a checkpoint")
    with pytest.raises(TrainingError, match=r"the checkpoint .*text cannot be read: "):
        read_tutorial(tmp_path / "text", theirs.tokenizer)
    cut = save(tmp_path, lambda values: None)
    data = cut.with_name(f"{cut.name}.data-00000-of-00001")
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(TrainingError, match=r"the checkpoint .*ckpt-5 cannot be read: "):
        read_tutorial(cut, theirs.tokenizer)


def changed(theirs: Theirs, **config: Any) -> dict[str, Any]:
    content = json.loads(theirs.tokenizer.read_text())
    content["config"].update(config)
    return content


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (lambda theirs: [], "its word_index, oov_token or num_words is missing"),
        (lambda theirs: {"config": {"word_index": "{}"}}, "its word_index, oov_token or num_words is missing"),
        (lambda theirs: changed(theirs, word_index="not JSON"), "its word_index, oov_token or num_words is missing"),
        (lambda theirs: changed(theirs, word_index='{"a": 1, "b": 1}'), "two words have the same number"),
        (lambda theirs: changed(theirs, num_words=5000), "keeps 5000 words and the checkpoint 13: they are not of one"),
        (lambda theirs: changed(theirs, num_words=None, word_index='{"a": 1}'), "has 1 words and the checkpoint 13"),
        (lambda theirs: changed(theirs, oov_token=None), r"has no unknown word \(its oov_token\) among"),
        (
            lambda theirs: changed(theirs, word_index=json.dumps({"<unk>": 1, "start": 2, "end": 3})),
            "has no <start> among the checkpoint's 13 words",
        ),
    ],
)
def test_a_wrong_tokenizer_is_one_sentence(
    theirs: Theirs, tmp_path: Path, content: Callable[[Theirs], Any], sentence: str
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content(theirs)))
    with pytest.raises(TrainingError, match=sentence):
        read_tutorial(theirs.folder, path)


def test_tokenizers_that_are_no_json(theirs: Theirs, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="does not exist"):
        read_tutorial(theirs.folder, tmp_path / "gone.json")
    (tmp_path / "tokenizer.pickle").write_bytes(b"\x80\x04")
    with pytest.raises(TrainingError, match=r"is no tokenizer that Keras' Tokenizer\.to_json wrote"):
        read_tutorial(theirs.folder, tmp_path / "tokenizer.pickle")
    # json.dump(tokenizer.to_json(), file): JSON in JSON.
    (tmp_path / "twice.json").write_text(json.dumps(theirs.tokenizer.read_text()))
    assert read_tutorial(theirs.folder, tmp_path / "twice.json").vocabulary.end_id > 0


def test_another_name_for_unknown_words(theirs: Theirs, tmp_path: Path) -> None:
    text = theirs.tokenizer.read_text().replace("<unk>", "UNKNOWN")
    (tmp_path / "tokenizer.json").write_text(text)
    vocabulary = read_tutorial(theirs.folder, tmp_path / "tokenizer.json").vocabulary
    assert vocabulary.words[:2] == ("<pad>", "<unk>")


def test_the_command(
    theirs: Theirs, imported: Path, extractor: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [theirs.folder, tmp_path / "run", "--tokenizer", theirs.tokenizer, "--extractor-weights", extractor]
    assert main(["import-tutorial", *map(str, arguments)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run'}\n"
    assert open_run(tmp_path / "run").max_words == 50
    assert main(["import-tutorial", *map(str, arguments)]) == 7
    assert "holds a run already: take another folder" in capsys.readouterr().err
    arguments[1:] = [tmp_path / "other", "--tokenizer", theirs.tokenizer, "--extractor-weights", "none"]
    assert main(["import-tutorial", *map(str, arguments)]) == 7
    sentence = "was trained on a grid of 32 channels, and the extractor's has 2048: give the weights of another one"
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    with pytest.raises(OptionsError, match="max_words"):
        import_tutorial(tmp_path / "other", theirs.folder, theirs.tokenizer, str(extractor), 2000)
