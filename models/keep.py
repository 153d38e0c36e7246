"""Keeps of a run what evaluation and export read: its best checkpoint without the optimisers' state.

    python models/keep.py RUN models/checkpoints/default

The settings keep the name of what the extractor began with, not where it lay, and the extractor with what it learnt is
in its own file alone. What was kept at OUT before is replaced; anything else that is there is not.
"""

import argparse
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from caption_train.console import quiet_stderr

with quiet_stderr():
    import tensorflow as tf

from caption_train.checkpoints import Checkpoints
from caption_train.inception import save_extractor
from caption_train.logs import HISTORY
from caption_train.runs import RUN, SCORES, SETTINGS, VOCABULARY, Run, open_run
from caption_train.settings import render
from caption_train.training import BEST, LAST, LOSS_CURVE


def refusal(run: Path, out: Path) -> str:
    """Why nothing may be written at `out`; nothing if it may.

    Args:
        run: Folder of the run, resolved.
        out: Where its copy shall be, resolved.
    """
    if out == run or out in run.parents or run in out.parents:
        return f"{out} and the run {run} lie in one another: name another folder"
    if not os.path.lexists(out):
        return ""
    if not (out / RUN).is_file():
        return f"{out} is there and is no run: name another folder"
    if (out / LAST).exists():
        return f"{out} is a run that can go on, and only what was kept of one is replaced: name another folder"
    return ""


def keep(run: Run, out: Path) -> None:
    """Write what is kept of a run into a new folder."""
    save_extractor(run.extractor, run.extractor_config, out)
    for name in (RUN, VOCABULARY, HISTORY, LOSS_CURVE, *([SCORES] if run.scores else [])):
        shutil.copy(run.folder / name, out / name)
    began_with = Path(run.settings.extractor.weights).name
    (out / SETTINGS).write_text(render(run.settings.changed({"extractor.weights": began_with})), encoding="utf-8")
    step = tf.Variable(run.facts["checkpoint"]["step"], dtype=tf.int64, trainable=False)
    parts = {"encoder": run.model.encoder, "decoder": run.model.decoder, "step": step}
    Checkpoints(out / BEST, 1, parts).save(int(step))


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments and write the folder: wholly, or not at all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    asked = parser.parse_args(arguments)
    out = asked.out.resolve()
    if reason := refusal(asked.run.resolve(), out):
        parser.error(reason)
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        keep(open_run(asked.run), temporary)
        if out.exists():
            shutil.rmtree(out)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{out}: {sum(x.stat().st_size for x in out.rglob('*') if x.is_file()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
