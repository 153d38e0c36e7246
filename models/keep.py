"""Keeps of a run what evaluation and export read: its best checkpoint without the optimisers' state.

    python models/keep.py RUN models/checkpoints/default

The settings keep the name of what the extractor began with, not where it lay. What was at OUT is replaced.
"""

import argparse
import shutil
from pathlib import Path

from caption_train.console import quiet_stderr

with quiet_stderr():
    import tensorflow as tf

from caption_train.checkpoints import Checkpoints
from caption_train.finetune import upper_part
from caption_train.inception import save_extractor
from caption_train.logs import HISTORY
from caption_train.runs import RUN, SCORES, SETTINGS, VOCABULARY, open_run
from caption_train.settings import render
from caption_train.training import BEST, LOSS_CURVE


def main() -> None:
    """Read the arguments and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    run, out = open_run(arguments.run), arguments.out
    if out.exists():
        shutil.rmtree(out)
    save_extractor(run.extractor, run.extractor_config, out)
    for name in (RUN, VOCABULARY, HISTORY, LOSS_CURVE, *([SCORES] if run.scores else [])):
        shutil.copy(arguments.run / name, out / name)
    began_with = Path(run.settings.extractor.weights).name
    (out / SETTINGS).write_text(render(run.settings.changed({"extractor.weights": began_with})), encoding="utf-8")
    step = tf.Variable(run.facts["checkpoint"]["step"], dtype=tf.int64, trainable=False)
    parts = {"encoder": run.model.encoder, "decoder": run.model.decoder, "step": step}
    if (block := run.settings.extractor.learns_from) is not None:
        parts["extractor"] = upper_part(run.extractor, block)
    Checkpoints(out / BEST, 1, parts).save(int(step))
    print(f"{out}: {sum(x.stat().st_size for x in out.rglob('*') if x.is_file()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
