"""How often the guard steps in: on captions that people wrote, and on those of a model.

    python benchmarks/guard.py Flickr8k/Flickr8k.token.txt Flickr8k/images --names Flickr8k/Flickr_8k.devImages.txt

With the extra `train` it also scores greedy and beam search with and without the guard, as `caption-train evaluate`
does.

Captions of people are degenerate by definition of nobody: the share of them that the guard would reject is its rate of
false alarms. `low_log_prob` needs a model and is counted on the model's captions alone.
"""

import argparse
import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np

from caption_rt import Captioner, DecodeOptions
from caption_rt.guard import faults_of
from caption_rt.strategies import Hypothesis
from caption_rt.vocabulary import normalize_caption


def people(file: Path) -> None:
    """Count faults in the captions of a Flickr8k token file."""
    ids: dict[str, int] = {}
    counts: Counter[str] = Counter()
    lines = file.read_text(encoding="utf-8").splitlines()
    for line in lines:
        words = normalize_caption(line.partition("\t")[2])
        tokens = tuple(ids.setdefault(word, len(ids)) for word in words)
        ended = "max_words" if len(tokens) >= 20 else "end"
        empty = np.zeros((0, 1), np.float32)
        counts.update(faults_of(Hypothesis(tokens, (), 0.0, empty, ended, 0.0)))
    print(f"{file.name}: {len(lines)} captions of people")
    print(f"  repetition {counts['repetition'] / len(lines):.3%}, 20 words or more {counts['no_end'] / len(lines):.3%}")


def model(bundle: str | None, photos: list[Path]) -> None:
    """Count faults in a model's captions, as asked and after the guard."""
    captioner = Captioner.load(bundle)
    print(
        f"{captioner.bundle.manifest.name}: {len(photos)} photos; log-probability a word: lowest, 1 % and 50 % quantile"
    )
    settings = {
        "greedy": DecodeOptions(),
        "greedy, 40 words": DecodeOptions(max_words=40),
        "beam of 3": DecodeOptions(beam_size=3),
        "sample, temperature 0.7": DecodeOptions(sample=True, temperature=0.7),
        "sample (the tutorial's)": DecodeOptions(sample=True),
    }
    for name, options in settings.items():
        captions = list(captioner.caption_many(photos, options))
        first: Counter[str] = Counter()
        left: Counter[str] = Counter()
        strategies: Counter[str] = Counter()
        means = []
        for caption in captions:
            first.update(caption.retried_for)
            left.update(caption.faults)
            if caption.retried_for:
                strategies[caption.strategy] += 1
            means.append(caption.log_prob / (len(caption.words) + (caption.ended == "end") or 1))
        low, percent, middle = np.quantile(means, [0, 0.01, 0.5])
        print(f"  {name}: {low:.2f} {percent:.2f} {middle:.2f}; decoded again for {dict(first)}")
        print(f"    which gave {dict(strategies)}, and left {dict(left)}")


def scores(bundle: str | None, photos: list[Path], file: Path) -> None:
    """Score a model's captions with and without the guard."""
    from caption_train.scores import score_captions

    references: dict[str, list[str]] = {photo.name: [] for photo in photos}
    for line in file.read_text(encoding="utf-8").splitlines():
        name, _, caption = line.partition("\t")
        references.get(name.partition("#")[0], []).append(caption)
    captioner = Captioner.load(bundle)
    for beam_size in (1, 3):
        for guard in (False, True):
            options = DecodeOptions(beam_size=beam_size, max_words=40, guard=guard)
            captions = captioner.caption_many(photos, options)
            found = {photo.name: caption.text for photo, caption in zip(photos, captions, strict=True)}
            score = score_captions(found, references)
            bleu = " / ".join(f"{score[f'BLEU-{n}']:.1f}" for n in range(1, 5))
            print(
                f"  {captioner.precision}, beam of {beam_size}, {'with' if guard else 'without'} the guard: "
                f"BLEU-1 to 4 {bleu}, CIDEr {score['CIDEr']:.3f}"
            )


def main() -> None:
    """Read the arguments and print both counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", type=Path, help="a Flickr8k token file")
    parser.add_argument("photos", type=Path, help="a folder of photos")
    parser.add_argument("--names", type=Path, help="a file with the names of the photos to take, one a line")
    parser.add_argument("--model", help="a bundle; the default one without")
    arguments = parser.parse_args()
    people(arguments.captions)
    names = arguments.names.read_text(encoding="utf-8").split() if arguments.names else None
    photos = sorted(path for path in arguments.photos.iterdir() if names is None or path.name in names)
    model(arguments.model, photos)
    if importlib.util.find_spec("pycocoevalcap"):
        scores(arguments.model, photos, arguments.captions)


if __name__ == "__main__":
    main()
