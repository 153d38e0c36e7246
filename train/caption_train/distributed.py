"""Training on several GPUs or machines: `tf.distribute` behind the few things that a training loop needs of it.

One process and several GPUs: `tf.distribute.MirroredStrategy`. Several processes or machines:
`tf.distribute.MultiWorkerMirroredStrategy`, described by the environment variable TF_CONFIG in TensorFlow's own format;
its first worker (or its task ``chief``) is the chief, which alone writes. A *replica* is one copy of the model on one
device. Each step, every replica takes its share of the batch; gradients are summed over all of them, so that all copies
stay equal and a step is that of one device with the whole batch. What is random in a step follows from seed, step and
replica.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from caption_rt.errors import OptionsError
from caption_train.checkpoints import tensorflow_errors

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PORT = re.compile(r"[^:]:(\d+)$", re.ASCII)


class Distribution:
    """The replicas of a run, and this process' part in them; one replica if no strategy is given."""

    def __init__(self, strategy: tf.distribute.Strategy | None = None) -> None:
        """Take a strategy; None for one process with one device."""
        self._strategy = strategy
        self.replicas: int = strategy.num_replicas_in_sync if strategy else 1
        """In all processes together."""
        resolver = strategy.cluster_resolver if strategy else None
        self.workers, self.worker = _workers(resolver)
        """Number of processes, and which one this is, from 0; 0 is the chief."""
        self.local = self.replicas // self.workers
        """Replicas of this process: those from ``worker * local`` on."""

        @tf.function(input_signature=[tf.TensorSpec((None,), tf.float64)])
        def total(values: tf.Tensor) -> tf.Tensor:
            # Of this process' replicas one counts.
            return self.run(lambda replica, _: self.all_reduce([tf.zeros_like(values) if replica else values])[0])

        self._total = total

    @property
    def is_chief(self) -> bool:
        """Whether this process writes checkpoints, logs and everything else; of several processes one does."""
        return self.worker == 0

    def scope(self) -> AbstractContextManager[Any]:
        """Within it variables are made on every replica."""
        return self._strategy.scope() if self._strategy else contextlib.nullcontext()

    def shares(self, photo_of: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Share a batch among the replicas: photos are dealt in turn, each with all of its captions.

        Args:
            photo_of: The photo of each caption of the whole batch, int64 [m].

        Returns:
            For each replica of this process the places of its captions in the batch, int64; empty where the batch has
            fewer photos than there are replicas.
        """
        _, first, photos = np.unique(photo_of, return_index=True, return_inverse=True)
        turns = np.argsort(np.argsort(first))[photos]  # photos by their first caption's place: 0, 1, ...
        mine = range(self.worker * self.local, (self.worker + 1) * self.local)
        return [np.flatnonzero(turns % self.replicas == replica) for replica in mine]

    def run(self, function: Callable[[int, int], T]) -> T:
        """Call a function once on each of this process' replicas; to be called within a `tf.function`.

        Args:
            function: Given the replica's number in this process and in all. What it returns must be equal on all of
                them, as what `all_reduce` gives is.

        Returns:
            What it returned.
        """
        strategy = self._strategy
        if strategy is None:
            return function(0, 0)

        def on_replica() -> T:
            replica = tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group)
            return function(replica % self.local, replica)

        def first(value: Any) -> Any:
            return strategy.experimental_local_results(value)[0]

        made: T = tf.nest.map_structure(first, strategy.run(on_replica))
        return made

    def all_reduce(self, values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Sums over all replicas; to be called by every replica, within the function that `run` is given."""
        if self.replicas == 1:
            return list(values)
        # Of embeddings there are gradients in slices; and what was made elsewhere has no device of this replica.
        dense = [tf.identity(tf.convert_to_tensor(value)) for value in values]
        return list(tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, dense))

    def from_chief(self, values: Sequence[float]) -> list[float]:
        """Numbers that the chief knows, to be called by all processes at the same point; 64 bits wide.

        Args:
            values: The chief's are what all get; those of others only have to be as many.

        Raises:
            TrainingError: A worker has ended.
        """
        if self.workers == 1:
            return list(values)
        mine = np.asarray(values if self.is_chief else np.zeros(len(values)), np.float64)
        return self._sum(mine).tolist()  # type: ignore[no-any-return]

    def agree(self, value: int) -> bool:
        """Whether a number is the same in all processes, which all call at the same point."""
        if self.workers == 1:
            return True
        (chiefs,) = self.from_chief([value])
        return float(self._sum(np.array([value != chiefs], np.float64))[0]) == 0

    @contextlib.contextmanager
    def chief_first(self) -> Iterator[None]:
        """The chief goes through a block, then the others do: it has made what they find there."""
        if not self.is_chief:
            self.from_chief([0.0])
        yield
        if self.is_chief:
            self.from_chief([0.0])

    def _sum(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Over all processes."""
        with tensorflow_errors("waiting for the other workers"):
            return np.asarray(self._total(tf.constant(values)))


def distribution() -> Distribution:
    """What this process is to take part in: TF_CONFIG's workers, all GPUs of this machine, or one device.

    It is to be called before TensorFlow has computed anything. Which GPUs are used is CUDA_VISIBLE_DEVICES' to say.

    Raises:
        OptionsError: TF_CONFIG cannot be understood.
        TrainingError: This process cannot be had at its address.
    """
    processes, address = _cluster()
    if processes > 1:
        logger.info("waiting for the other workers of TF_CONFIG, %d in all", processes)
        with tensorflow_errors(f"starting the server at {address}"):
            return Distribution(tf.distribute.MultiWorkerMirroredStrategy())
    gpus = tf.config.list_logical_devices("GPU")
    if len(gpus) > 1:
        logger.info("training on %d GPUs", len(gpus))
        return Distribution(tf.distribute.MirroredStrategy([gpu.name for gpu in gpus]))
    return Distribution()


def _cluster() -> tuple[int, str]:
    """How many workers TF_CONFIG names, the chief among them, and the address of this one; 0 and "" without it.

    Raises:
        OptionsError: It is not what TensorFlow describes.
    """
    text = os.environ.get("TF_CONFIG")
    if not text:
        return 0, ""
    try:
        described = json.loads(text)
        addresses = {kind: list(described["cluster"][kind]) for kind in described["cluster"]}
        kind, index = described["task"]["type"], int(described["task"]["index"])
        address = addresses[kind][index]
    except (ValueError, LookupError, TypeError, AttributeError) as exc:
        raise OptionsError(
            f"TF_CONFIG is not as TensorFlow describes it ({type(exc).__name__}: {exc}): it wants "
            '{"cluster": {"worker": ["HOST:PORT", ...]}, "task": {"type": "worker", "index": 0}}'
        ) from exc
    everyone = [str(each) for kind in addresses for each in addresses[kind]]
    unusable = [each for each in everyone if not ((port := _PORT.search(each)) and 0 < int(port[1]) < 2**16)]
    if others := set(addresses) - {"chief", "worker"}:
        wrong = f"it has tasks of the type {min(others)!r}"
    elif len(addresses.get("chief", ())) > 1:
        wrong = f"it has {len(addresses['chief'])} chiefs"
    elif index < 0:
        wrong = f"the task is {kind} {index}"
    elif unusable:
        raise OptionsError(f"TF_CONFIG: {unusable[0]!r} is no address: give HOST:PORT")
    else:
        return len(everyone), str(address)
    raise OptionsError(f"TF_CONFIG: {wrong}; there are workers and at most one chief")


def _workers(resolver: Any) -> tuple[int, int]:
    """How many processes there are, and the number of this one; the chief's is 0."""
    if resolver is None or not (cluster := resolver.cluster_spec().as_dict()):
        return 1, 0
    chiefs = len(cluster.get("chief", ()))
    number = resolver.task_id if resolver.task_type == "chief" else chiefs + resolver.task_id
    return sum(map(len, cluster.values())), number
