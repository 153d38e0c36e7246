import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from caption_rt.errors import OptionsError
from caption_train.distributed import Distribution, distribution
from caption_train.files import read_json_lines
from shapes import write_flickr8k

pytestmark = pytest.mark.tf

# Ten photos of two captions, three photos a batch: one replica of two has nothing of the last batch of an epoch.
CHANGES = ("model.dropout=0", "training.batch_size=6", "training.epochs=2", "training.learning_rate=0.005")

# The data and the run are made in a folder that all processes see.
CHILD = """
    import os, signal, sys
    from pathlib import Path
    import tensorflow as tf
    from caption_train.distributed import Distribution, distribution
    from caption_train.training import Trainer
    from tiny_training import tiny_data, tiny_settings

    kind, folder, dies_at, changes = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    if kind == "devices":
        cpus = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], cpus)
        workers = Distribution(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]))
        assert (workers.replicas, workers.workers, workers.local) == (2, 1, 2)
    else:
        workers = distribution()
        assert (workers.replicas, workers.workers, workers.local) == (2, 2, 1)
    with workers.chief_first():
        made = tiny_data(folder / "data")
    if not workers.is_chief:
        loaded = []
        load = made.source.load
        made.source.load = lambda rows: (loaded.append(len(rows)), load(rows))[1]
    trainer = Trainer(tiny_settings(*changes), *made, folder / "run", workers=workers)

    def on_step(step, loss):
        if step == dies_at and workers.worker == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.run(on_step)
    with workers.chief_first():
        pass
    if not workers.is_chief:
        print("photos read:", sum(loaded))
        trainer.model.save_weights(folder / "worker.weights.h5")
"""


def started(command: list[str], config: dict[str, Any] | None = None) -> subprocess.Popen[str]:
    """A process, with what TF_CONFIG is to say."""
    environment = {key: value for key, value in os.environ.items() if key != "TF_CONFIG"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    if config is not None:
        environment["TF_CONFIG"] = json.dumps(config)
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def cluster() -> list[dict[str, Any]]:
    """Two workers on free ports of this machine."""
    sockets = [socket.create_server(("localhost", 0)) for _ in range(2)]
    addresses = [f"localhost:{s.getsockname()[1]}" for s in sockets]
    for open_socket in sockets:
        open_socket.close()
    return [{"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}} for index in range(2)]


def start(kind: str, folder: Path, *, dies_at: int = 0, config: dict[str, Any] | None = None) -> subprocess.Popen[str]:
    return started([sys.executable, "-c", textwrap.dedent(CHILD), kind, str(folder), str(dies_at), *CHANGES], config)


def start_pair(folder: Path, dies_at: int = 0) -> list[subprocess.Popen[str]]:
    return [start("workers", folder, dies_at=dies_at, config=config) for config in cluster()]


def ended(*processes: subprocess.Popen[str]) -> list[str]:
    """What they said; all ended well."""
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_json_lines(folder / "run" / "steps.jsonl")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one device, in a folder with its data."""
    from caption_train.training import Trainer
    from tiny_training import tiny_data, tiny_settings

    folder = tmp_path_factory.mktemp("alone")
    trainer = Trainer(tiny_settings(*CHANGES), *tiny_data(folder / "data"), folder / "run")
    trainer.run()
    trainer.model.save_weights(folder / "worker.weights.h5")
    return folder


def assert_same_run(folder: Path, alone: Path) -> None:
    """The losses of every step and what every epoch found, but for the order in which numbers are added up."""
    mine, theirs = losses(folder), losses(alone)
    assert len(mine) == len(theirs) == 8
    assert theirs[-1] < theirs[0]
    np.testing.assert_allclose(mine, theirs, rtol=1e-4)
    for one, other in zip(
        *(read_json_lines(where / "run" / "history.jsonl") for where in (folder, alone)), strict=True
    ):
        assert one["val_loss"] == pytest.approx(other["val_loss"], rel=1e-4)
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.slow
def test_two_devices_of_one_process(alone: Path, tmp_path: Path) -> None:
    ended(start("devices", tmp_path))
    assert_same_run(tmp_path, alone)


# Adam's first moments after one step, of one device and of two, at every limit.
CLIPPING = """
    import sys
    from pathlib import Path
    import numpy as np
    import tensorflow as tf
    from caption_train.distributed import Distribution
    from caption_train.training import Trainer
    from tiny_training import tiny_data, tiny_settings

    folder, changes = Path(sys.argv[1]), sys.argv[2:]
    cpus = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], cpus)
    made = tiny_data(folder / "data")

    def moments(workers, limit):
        settings = tiny_settings(*changes, f"training.clip_norm={limit}")
        trainer = Trainer(settings, *made, folder / "run", workers=workers)
        trainer._take_step(next(trainer._batches(0, 0)))
        return [np.asarray(moment) for moment in trainer.optimizer._momentums]

    for limit in (0, 0.05, 5):
        one = moments(None, limit)
        two = moments(Distribution(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])), limit)
        print("norm:", 10 * np.sqrt(sum((moment**2).sum() for moment in one)))
        for mine, theirs in zip(two, one, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-7 * np.abs(theirs).max())
"""


@pytest.mark.slow
def test_gradients_are_clipped_as_those_of_the_whole_batch(tmp_path: Path) -> None:
    (said,) = ended(started([sys.executable, "-c", textwrap.dedent(CLIPPING), str(tmp_path), *CHANGES]))
    free, *norms = (float(line.split()[1]) for line in said.splitlines() if line.startswith("norm:"))
    assert 0.05 < free < 5
    assert norms == pytest.approx([0.05, free], rel=1e-4)


@pytest.mark.slow
def test_two_processes(alone: Path, tmp_path: Path) -> None:
    _, second = ended(*start_pair(tmp_path))
    assert_same_run(tmp_path, alone)
    # In each of two epochs ten photos in batches of three, three, three and one. The second process has one of three,
    # and of the last batch, which has one photo, it computes something that does not count.
    assert "photos read: 8\n" in second
    # One has written, the other nothing; and what one has written is what a single process writes.
    written = [sorted(path.name for path in (folder / "run").iterdir()) for folder in (tmp_path, alone)]
    assert written[0] == written[1]


@pytest.mark.slow
def test_a_process_that_is_killed(alone: Path, tmp_path: Path) -> None:
    """The other one ends with a sentence; both called again go on, and the losses are those of one alone."""
    pair = start_pair(tmp_path, dies_at=6)
    outputs = [process.communicate(timeout=120)[0] for process in pair]
    assert pair[1].returncode == -signal.SIGKILL
    assert pair[0].returncode == 1, outputs[0]
    assert "caption_train.errors.TrainingError: step 6: Collective ops is aborted by: " in outputs[0]
    assert len(losses(tmp_path)) == 6
    _, second = ended(*start_pair(tmp_path))
    assert_same_run(tmp_path, alone)
    assert "photos read: 2\n" in second  # steps 7 and 8


@pytest.mark.slow
def test_another_number_of_processes_goes_on(alone: Path, tmp_path: Path) -> None:
    """Nothing in the run folder depends on how many there are."""
    from caption_train.training import Trainer
    from tiny_training import tiny_data, tiny_settings

    for process in start_pair(tmp_path, dies_at=6):
        process.communicate(timeout=120)
    trainer = Trainer(tiny_settings(*CHANGES), *tiny_data(tmp_path / "data"), tmp_path / "run")
    assert int(trainer.step) == 6
    trainer.run()
    assert_same_run(tmp_path, alone)


@pytest.mark.slow
def test_fine_tuning_by_the_command_in_two_processes(tmp_path: Path) -> None:
    """The whole path: one makes the run and the cache, both have the network that learns, one scores."""
    data = write_flickr8k(tmp_path / "set", range(0, 24, 3), (27, 30, 33), captions=["{}"] * 5)
    settings = (
        *("extractor.weights=none", "extractor.width=0.1", "extractor.size=75", "extractor.layer=mixed1"),
        *("extractor.trainable_from=mixed1", "extractor.learning_rate=0.002", "captions.min_count=1"),
        *("model.embedding_dim=12", "model.units=16", "model.dropout=0", "training.precision=float32"),
        *("training.batch_size=10", "training.epochs=2", "training.learning_rate=0.005"),
    )
    changes = [word for setting in settings for word in ("--set", setting)]

    def command(folder: Path, config: dict[str, Any] | None) -> subprocess.Popen[str]:
        run = [sys.executable, "-c", "import sys; from caption_train.cli import main; sys.exit(main())", "train"]
        return started([*run, str(data), str(folder / "run"), "--cache", str(tmp_path / "grids"), *changes], config)

    (alone, one) = (tmp_path / "alone", tmp_path / "pair")
    ended(command(alone, None))
    first, second = ended(*(command(one, config) for config in cluster()))
    assert "CIDEr" in first
    assert "CIDEr" not in second
    np.testing.assert_allclose(losses(one), losses(alone), rtol=1e-3)
    assert losses(one)[-1] < losses(one)[0]


@pytest.mark.slow
def test_a_port_that_another_program_has(tmp_path: Path) -> None:
    with socket.create_server(("localhost", 0)) as taken:
        config = cluster()[0]
        config["cluster"]["worker"][0] = address = f"localhost:{taken.getsockname()[1]}"
        (said, _) = (process := start("workers", tmp_path, config=config)).communicate(timeout=120)
    assert process.returncode == 1
    assert f"caption_train.errors.TrainingError: starting the server at {address}: " in said


def test_photos_are_dealt_with_all_of_their_captions() -> None:
    (whole,) = Distribution().shares(np.array([4, 4, 0, 7, 0]))
    assert whole.tolist() == [0, 1, 2, 3, 4]
    pair = Distribution()
    pair.replicas = pair.local = 2
    first, second = pair.shares(np.array([4, 4, 0, 7, 0, 4]))
    assert (first.tolist(), second.tolist()) == ([0, 1, 3, 5], [2, 4])
    pair.worker, pair.workers, pair.local = 1, 2, 1
    assert [share.tolist() for share in pair.shares(np.array([4, 4, 0, 7, 0, 4]))] == [[2, 4]]
    assert [share.tolist() for share in pair.shares(np.array([4, 4]))] == [[]]


def test_one_worker_is_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_CONFIG", '{"cluster": {"worker": ["localhost:1"]}, "task": {"type": "worker", "index": 0}}')
    workers = distribution()
    assert (workers.replicas, workers.is_chief) == (1, True)
    assert workers.from_chief([0.5]) == [0.5]
    assert workers.agree(3)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("worker 0", "TF_CONFIG is not as TensorFlow describes it"),
        ('{"cluster": {"worker": ["a:1", "b:1"]}}', "TF_CONFIG is not as TensorFlow describes it .*'task'"),
        (
            '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 2}}',
            "TF_CONFIG is not as TensorFlow describes it .*index out of range",
        ),
        (
            '{"cluster": {"worker": ["a:1"], "ps": ["b:1"]}, "task": {"type": "worker", "index": 0}}',
            "TF_CONFIG: it has tasks of the type 'ps'; there are workers and at most one chief",
        ),
        (
            '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": -1}}',
            "TF_CONFIG: the task is worker -1",
        ),
        (
            '{"cluster": {"chief": ["a:1", "b:1"], "worker": ["c:1"]}, "task": {"type": "chief", "index": 0}}',
            "TF_CONFIG: it has 2 chiefs; there are workers and at most one chief",
        ),
        *(
            (
                f'{{"cluster": {{"worker": ["a:1", {other}]}}, "task": {{"type": "worker", "index": 0}}}}',
                f"TF_CONFIG: '{shown}' is no address: give HOST:PORT",
            )
            for other, shown in (('"b"', "b"), ('"b:"', "b:"), ('":1"', ":1"), ('"b:70000"', "b:70000"), ("7", "7"))
        ),
    ],
)
def test_a_tf_config_that_cannot_be(monkeypatch: pytest.MonkeyPatch, text: str, sentence: str) -> None:
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(OptionsError, match=sentence):
        distribution()
