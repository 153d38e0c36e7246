"""What a data set is like: counts, lengths of captions, words and how many a vocabulary has, duplicates, damage."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from caption_rt.errors import printable
from caption_rt.vocabulary import Vocabulary, normalize_caption
from caption_train.captioned import CaptionedImage, Dataset
from caption_train.photo_facts import PhotoFacts, look_at, near_pairs

SIZES = (1000, 2000, 5000, 10_000)
"""Sizes of vocabularies that are tried."""

_EXAMPLES = 20
_LONG = 40  # words; what the tutorial's users cut captions at

Parts = Mapping[str, Sequence[CaptionedImage]]


def report(
    dataset: Dataset,
    *,
    sizes: Iterable[int] = SIZES,
    read_photos: bool = True,
    on_photo: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Examine a data set.

    Args:
        dataset: The set.
        sizes: Sizes of vocabularies, in words beside the special ones.
        read_photos: Whether every photo is read, for damage and duplicates; if not, none has to be there.
        on_photo: Called after each photo that is read.

    Returns:
        A JSON object; `docs/data.md` says what is in it.
    """
    everything = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    parts: Parts = {name: images for name, images in everything.items() if images}
    words = {
        name: [normalize_caption(text) for image in images for text in image.captions] for name, images in parts.items()
    }
    found: dict[str, Any] = {
        "name": dataset.name,
        "split": "own" if dataset.own_split else "drawn",
        "captions_without_words": dataset.wordless,
        "parts": {name: _part(images, words[name]) for name, images in parts.items()},
        "vocabulary": _vocabulary(words, sizes),
        "same_captions": _same_captions(words),
    }
    if read_photos:
        found["missing_photos"] = dataset.missing
        facts = {name: look_at([image.path for image in images], on_photo) for name, images in parts.items()}
        unreadable = [one for group in facts.values() for one in group if one.trouble is not None]
        found["unreadable_photos"] = [{"path": str(one.path), "reason": one.trouble} for one in unreadable]
        found["same_photos"] = _same_photos(facts)
    return found


def _part(images: Sequence[CaptionedImage], words: Sequence[Sequence[str]]) -> dict[str, Any]:
    lengths = np.array([len(caption) for caption in words])
    a_photo = Counter(len(image.captions) for image in images)
    return {
        "photos": len(images),
        "captions": len(words),
        "captions_a_photo": {str(count): photos for count, photos in sorted(a_photo.items())},
        "words": {
            "total": int(lengths.sum()),
            "mean": round(float(lengths.mean()), 2),
            **{f"percentile_{q}": int(np.percentile(lengths, q, method="higher")) for q in (5, 50, 95, 99)},
            "longest": int(lengths.max()),
            "longer_than_40": int((lengths > _LONG).sum()),
            "counts": {str(length): int(count) for length, count in enumerate(np.bincount(lengths)) if count},
        },
    }


def _vocabulary(words: Mapping[str, Sequence[Sequence[str]]], sizes: Iterable[int]) -> dict[str, Any]:
    """How much of each part the most frequent words of training cover."""
    counts = {name: Counter(itertools.chain.from_iterable(captions)) for name, captions in words.items()}
    train = counts["train"]
    whole = Vocabulary.build((" ".join(caption) for caption in words["train"]), max(1, len(train)))
    ranked = whole.words[4:]  # without the special ones
    table = []
    for size in sorted({min(size, len(ranked)) for size in sizes}):
        known = frozenset(ranked[:size])
        row: dict[str, Any] = {"size": size, "rarest_seen": train[ranked[size - 1]] if size else 0}
        for name, count in counts.items():
            unknown = sum(times for word, times in count.items() if word not in known)
            row[f"{name}_unk_share"] = round(unknown / count.total(), 5)
            row[f"{name}_words_known_share"] = round(sum(word in known for word in count) / len(count), 5)
        table.append(row)
    return {
        "distinct_words": {name: len(count) for name, count in counts.items()},
        "seen_once": sum(times == 1 for times in train.values()),
        "sizes": table,
    }


def _same_captions(words: Mapping[str, Sequence[Sequence[str]]]) -> dict[str, Any]:
    """Captions of the same words: within training, and those of other parts that stand in training too."""
    texts = {name: [" ".join(caption) for caption in captions] for name, captions in words.items()}
    known = set(texts["train"])
    found: dict[str, Any] = {"within_train": len(texts["train"]) - len(known)}
    for name, captions in texts.items():
        if name != "train":
            same = sum(text in known for text in captions)
            found[f"{name}_in_train"] = {"captions": same, "share": round(same / len(captions), 5)}
    return found


def _same_photos(facts: Mapping[str, Sequence[PhotoFacts]]) -> dict[str, Any]:
    """Photos that are there twice in a part, and those that two parts share: by content, and by their looks."""
    found: dict[str, Any] = {}
    for name, group in facts.items():
        digests = Counter(one.digest for one in group if one.digest is not None)
        found[f"within_{name}"] = sum(count - 1 for count in digests.values())
    for first, second in itertools.combinations(facts, 2):
        by_content: dict[str, list[PhotoFacts]] = defaultdict(list)
        for one in facts[first]:
            if one.digest is not None:
                by_content[one.digest].append(one)
        same = [(twins[0], one) for one in facts[second] if one.digest and (twins := by_content.get(one.digest))]
        near = [
            (facts[first][i], facts[second][j])
            for i, j in near_pairs(
                [one.fingerprint for one in facts[first]], [one.fingerprint for one in facts[second]]
            )
            if facts[first][i].digest != facts[second][j].digest
        ]
        found[f"{first}_and_{second}"] = {
            "same": len(same),
            "near": len({other.path for _, other in near}),
            "examples": [[str(one.path), str(other.path)] for one, other in (same + near)[:_EXAMPLES]],
        }
    return found


def as_text(found: Mapping[str, Any]) -> str:
    """A report for a person.

    Args:
        found: What `report` gave.

    Returns:
        Lines of text.
    """
    split = "in its own split" if found["split"] == "own" else "split at random"
    lines = [f"{printable(found['name'])}, {split}", ""]
    lines += _counts_text(found["parts"])
    lines += ["", *_lengths_text(found["parts"]["train"]["words"]), "", *_vocabulary_text(found["vocabulary"])]
    lines.append("")
    if "unreadable_photos" in found:
        lines.append(f"missing      {found['missing_photos']:,} photos")
        lines.append(f"unreadable   {len(found['unreadable_photos']):,} photos")
        lines += [f"  {printable(one['reason'])}" for one in found["unreadable_photos"][:_EXAMPLES]]
    lines.append(f"wordless     {found['captions_without_words']:,} captions, left out")
    return "\n".join([*lines, "", *_duplicates_text(found)])


def _counts_text(parts: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{'':12}{'photos':>9}{'captions':>10}{'a photo':>9}"
        f"{'words: mean':>13}{'median':>8}{'95 %':>6}{'99 %':>6}{'longest':>9}"
    ]
    for name, part in parts.items():
        words, counts = part["words"], list(part["captions_a_photo"])
        a_photo = counts[0] if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        lines.append(
            f"{name:12}{part['photos']:9,}{part['captions']:10,}{a_photo:>9}{words['mean']:13.1f}"
            f"{words['percentile_50']:8}{words['percentile_95']:6}{words['percentile_99']:6}{words['longest']:9}"
        )
    return lines


def _lengths_text(words: Mapping[str, Any]) -> list[str]:
    """A histogram of at most sixteen lines."""
    counts = {int(length): count for length, count in words["counts"].items()}
    step = max(1, -(-words["percentile_99"] // 15))
    last = words["percentile_99"] // step
    bars: Counter[int] = Counter()
    for length, count in counts.items():
        bars[min(length // step, last + 1)] += count
    total, most = sum(counts.values()), max(bars.values())
    lines = ["words a caption, in training"]
    for bar in range(min(bars), max(bars) + 1):
        low, high = bar * step, bar * step + step - 1
        label = f"{low} and more" if bar > last else str(low) if low == high else f"{low} to {high}"
        lines.append(f"  {label:12}{bars[bar] / total:7.1%}  {'#' * round(40 * bars[bar] / most)}".rstrip())
    return lines


def _vocabulary_text(vocabulary: Mapping[str, Any]) -> list[str]:
    distinct = vocabulary["distinct_words"]
    lines = [
        f"vocabulary: {distinct['train']:,} words in training, {vocabulary['seen_once']:,} of them once",
        f"{'':2}{'size':>8}{'rarest seen':>13}" + "".join(f"{f'<unk> {name}':>18}" for name in distinct),
    ]
    for row in vocabulary["sizes"]:
        shares = "".join(f"{row[f'{name}_unk_share']:18.2%}" for name in distinct)
        lines.append(f"{'':2}{row['size']:8,}{row['rarest_seen']:13,}{shares}")
    return lines


def _duplicates_text(found: Mapping[str, Any]) -> list[str]:
    captions = found["same_captions"]
    lines = ["duplicates", f"  {captions['within_train']:,} captions of training are there before"]
    for key, same in captions.items():
        if key != "within_train":
            part = key.removesuffix("_in_train")
            lines.append(f"  {same['captions']:,} captions of {part} ({same['share']:.1%}) stand in training too")
    for key, same in found.get("same_photos", {}).items():
        if isinstance(same, int):
            lines.append(f"  {same:,} photos of {key.removeprefix('within_')} are there before, byte for byte")
            continue
        first, second = key.split("_and_")
        lines.append(
            f"  {same['same']:,} photos of {second} are in {first} too, byte for byte; "
            f"{same['near']:,} look like one there"
        )
        lines += [f"    {printable(one)}  {printable(other)}" for one, other in same["examples"]]
    return lines
