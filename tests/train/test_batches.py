from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from caption_rt.vocabulary import Vocabulary
from caption_train.batches import CaptionData, batches_of_epoch, caption_data, load_batch, make_batch, tutorial_loss
from caption_train.datasets import CaptionedImage
from caption_train.errors import DatasetError

VOCABULARY = Vocabulary.build(["a red circle on the ground"])
IDS = {word: index for index, word in enumerate(VOCABULARY.words)}


def made(captions: Sequence[Sequence[str]], rows: Sequence[int] | None = None, max_words: int = 12) -> CaptionData:
    images = [CaptionedImage(Path(f"{i}.jpg"), tuple(texts)) for i, texts in enumerate(captions)]
    return caption_data(images, np.array(rows or range(len(images))), VOCABULARY, max_words)


def random_data(photos: int, captions: int = 5) -> CaptionData:
    rng = np.random.default_rng(0)
    return made([["a " * length for length in rng.integers(1, 38, captions)] for _ in range(photos)], max_words=99)


class Rows:
    """A source whose photos are their rows."""

    def load(self, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        return rows.astype(np.float16)


def test_captions_become_tokens() -> None:
    data = made([["a red circle", "A circle!"], ["the ground"]], rows=[7, 3])
    start, end = VOCABULARY.start_id, VOCABULARY.end_id
    assert data.captions == (
        (start, IDS["a"], IDS["red"], IDS["circle"], end),
        (start, IDS["a"], IDS["circle"], end),
        (start, IDS["the"], IDS["ground"], end),
    )
    assert data.rows.tolist() == [7, 3]
    assert data.photo_of.tolist() == [0, 0, 1]
    assert data.lengths.tolist() == [5, 4, 4]
    assert (len(data), data.words) == (3, 10)


def test_long_captions_are_cut_and_unread_photos_left_out() -> None:
    data = made([["a red circle"], ["a circle of something red"]], rows=[-1, 7], max_words=3)
    assert data.rows.tolist() == [7]
    assert [image.path.name for image in data.images] == ["1.jpg"]
    assert data.captions == ((VOCABULARY.start_id, IDS["a"], IDS["circle"], VOCABULARY.unk_id, VOCABULARY.end_id),)
    with pytest.raises(DatasetError, match="none of the 2 photos has a grid"):
        made([["a"], ["a"]], rows=[-1, -1])


def test_a_batch_has_every_photo_once_and_the_longest_caption_first() -> None:
    data = made([["a", "a red circle"], ["the"], ["a red"]], rows=[5, 6, 7])
    batch, photos = load_batch(data, np.array([3, 0, 1]), Rows(), VOCABULARY.pad_id)
    assert photos.tolist() == [0, 2]
    assert batch.loaded.tolist() == [5, 7]
    assert batch.photos.tolist() == [0, 1, 0]
    assert [(row != VOCABULARY.pad_id).sum() for row in batch.tokens] == [5, 4, 3]
    assert batch.tokens.shape == (3, 5)
    assert batch.weights.tolist() == [1, 1, 1]
    assert (batch.photos.dtype, batch.tokens.dtype, batch.weights.dtype) == (np.int32, np.int64, np.float32)


def test_weights_go_with_their_captions() -> None:
    weights = np.array([0.5, -1, 2], np.float32)
    batch = make_batch(np.zeros(1, np.float16), np.zeros(3, int), [[1], [1, 2, 3], [1, 2]], 0, weights, length=5)
    assert batch.weights.tolist() == [-1, 2, 0.5]
    assert batch.tokens.tolist() == [[1, 2, 3, 0, 0], [1, 2, 0, 0, 0], [1, 0, 0, 0, 0]]


@pytest.mark.parametrize("grouping", ["photos", "lengths", "random"])
def test_an_epoch_has_every_caption_once(grouping: str) -> None:
    data = random_data(143, 7)
    batches = batches_of_epoch(data, 10, 1, 2, grouping)
    assert sorted(np.concatenate(batches).tolist()) == list(range(1001))
    assert sorted(map(len, batches)) == [1, *[10] * 100]
    again = batches_of_epoch(data, 10, 1, 2, grouping)
    for one, other in zip(batches, again, strict=True):
        np.testing.assert_array_equal(one, other)
    for seed, epoch in ((1, 3), (2, 2)):
        other = batches_of_epoch(data, 10, seed, epoch, grouping)
        assert [b.tolist() for b in batches] != [b.tolist() for b in other]


def test_captions_of_a_photo_come_together() -> None:
    data = random_data(400)
    photos = {
        grouping: np.mean([len(set(data.photo_of[b])) for b in batches_of_epoch(data, 20, 0, 0, grouping)])
        for grouping in ("photos", "random")
    }
    assert photos["photos"] == 4
    assert photos["random"] > 18
    first = np.concatenate(batches_of_epoch(data, 20, 0, 0, "photos"))[:5]
    assert first.tolist() != sorted(first.tolist())  # in any order


def test_captions_of_a_batch_are_of_similar_length_and_batches_in_any_order() -> None:
    data = random_data(400)
    batches = batches_of_epoch(data, 10, 0, 0, "lengths")
    padding = sum(len(b) * int(data.lengths[b].max()) - int(data.lengths[b].sum()) for b in batches)
    assert padding / data.lengths.sum() < 0.05
    means = [data.lengths[b].mean() for b in batches]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2


def test_the_tutorials_loss() -> None:
    """The tutorial: for each word the batch's mean, masked at padding, summed over words, divided by the length."""
    data = made([["a red circle", "a"], ["the ground", "a circle on the ground"]])
    longest = int(data.lengths.max())
    cross_entropy = np.random.default_rng(0).uniform(0, 3, (4, longest - 1))
    cross_entropy *= np.arange(1, longest) < data.lengths[:, None]
    batches = cross_entropy.reshape(2, 2, -1)
    expected = np.mean([batch.mean(axis=0).sum() / longest for batch in batches])
    assert tutorial_loss(float(cross_entropy.sum()), data) == pytest.approx(expected)
