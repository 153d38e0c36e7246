"""A small MS-COCO as a web server has it, and `caption-train` as a process that fetches it."""

import io
import json
import random
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image

PROGRAM = "import sys; from caption_train.cli import main; sys.exit(main())"
TENSORFLOW = ("h5py", "keras", "matplotlib", "pycocoevalcap", "tensorflow")
NAMES = {"annotations": "annotations_trainval2014.zip", "train": "train2014.zip", "val": "val2014.zip"}


def photo(seed: int) -> bytes:
    """A small JPEG of noise."""
    buffer = io.BytesIO()
    Image.frombytes("RGB", (24, 24), random.Random(seed).randbytes(1728)).save(buffer, "JPEG")
    return buffer.getvalue()


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip file of them."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def captions(subset: str, numbers: range) -> bytes:
    """The JSON with a caption for each of these photos."""
    images = [{"id": i, "file_name": f"COCO_{subset}_{i:012d}.jpg"} for i in numbers]
    texts = [{"id": i, "image_id": i, "caption": f"A dog number {i}."} for i in numbers]
    return json.dumps({"images": images, "annotations": texts}).encode()


def photos(subset: str, numbers: range) -> dict[str, bytes]:
    """These photos by their names."""
    return {f"{subset}/COCO_{subset}_{i:012d}.jpg": photo(i) for i in numbers}


TRAIN, VALIDATION = range(60), range(60, 70)
FILES = {
    "/annotations/annotations_trainval2014.zip": zipped(
        {
            "annotations/instances_train2014.json": b"{}" * 1000,
            "annotations/captions_train2014.json": captions("train2014", TRAIN),
            "annotations/captions_val2014.json": captions("val2014", VALIDATION),
        },
        zipfile.ZIP_DEFLATED,
    ),
    "/zips/train2014.zip": zipped({"train2014/": b"", **photos("train2014", TRAIN)}),
    "/zips/val2014.zip": zipped(photos("val2014", VALIDATION)),
}
"""What the server has, by path."""
EXPECTED = {
    **photos("train2014", TRAIN),
    **photos("val2014", VALIDATION),
    "annotations/captions_train2014.json": captions("train2014", TRAIN),
    "annotations/captions_val2014.json": captions("val2014", VALIDATION),
}
"""What is to be in the folder when all is fetched."""


def command(*arguments: object) -> list[str]:
    """`caption-train` as a process of its own, on a machine without TensorFlow."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({TENSORFLOW}, None)); "
    return [sys.executable, "-c", blocked + PROGRAM, *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command, run to its end; whatever comes of it, there is no traceback and nothing on stdout."""
    result = subprocess.run(
        command(*arguments), capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=60
    )
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    return result


def content(folder: Path) -> dict[str, bytes]:
    """All that was unpacked."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.parent != folder]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def started(*arguments: object) -> subprocess.Popen[str]:
    """The command, begun."""
    return subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until it is so, a minute at most."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
