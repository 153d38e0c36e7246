"""The default bundle's run, exported as a person would: a minute and more, so marked slow."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from caption_rt import Bundle, Captioner
from caption_rt.manifest import PRECISIONS

pytestmark = [pytest.mark.tf, pytest.mark.data, pytest.mark.slow]

RUN = Path(__file__).parents[2] / "models" / "checkpoints" / "default"
COMMAND = [sys.executable, "-c", "import sys; from caption_export.cli import main; sys.exit(main())"]


def export(out, shared, seed, *more):
    """Have a process of its own write the bundle, with ranges from training photos."""
    data = shared / "flickr8k"
    command = [*COMMAND, RUN, out, "--photos", shared / "photos" / "images", "--limit-photos", 8, "--dataset", data]
    command += ["--calibration-photos", 16, "--scored-photos", 60, "--max-cider-loss", 0.1, "--beam", 3, *more]
    command += ["--name", "default"]
    environment = os.environ | {"PYTHONHASHSEED": str(seed)}
    done = subprocess.run([str(x) for x in command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Bundle.open(out)


def all_precisions():
    return [x for precision in PRECISIONS for x in ("--precision", precision)]


@pytest.fixture(scope="module")
def exported(shared, tmp_path_factory):
    return export(tmp_path_factory.mktemp("real") / "default", shared, 1, *all_precisions())


def test_every_precision_is_verified_on_real_photos(exported, call, shared):
    result = call("verify", exported.path, "--photos", shared / "photos" / "images")
    assert (result.exit_code, result.stderr) == (0, "")
    equal = {}
    for line in result.stdout.splitlines():
        for precision in ("fp16", "int8"):
            if line.startswith(f"ok  {precision} photos"):
                equal[precision] = int(line.split(" captioned, ")[1].split()[0])
    assert equal["fp16"] >= 15
    assert equal["int8"] >= 10
    result = call("inspect", exported.path, "--json")
    assert list(json.loads(result.stdout)["precisions"]) == list(PRECISIONS)


def test_another_process_exports_the_same_bytes(exported, shared, tmp_path):
    again = export(tmp_path / "default", shared, 2, *all_precisions())
    for path in exported.path.iterdir():
        assert (again.path / path.name).read_bytes() == path.read_bytes(), path.name


CAPTION = """
import sys, numpy
from caption_rt import Bundle
from caption_rt.engine import Graph
from caption_rt.image import read_photo
bundle = Bundle.open(sys.argv[1])
spec = bundle.manifest.precisions["int8"]["extractor"]
photo = read_photo(sys.argv[2], bundle.manifest.image.size)
numpy.save(sys.argv[3], Graph(bundle.read(spec.file), spec).run(photo[None])[0])
"""


@pytest.mark.program("qemu-x86_64")
def test_weights_of_7_bits_give_the_same_numbers_without_vnni(exported, photos, shared, tmp_path):
    """QEMU's Haswell has AVX2 alone, where products of 8 bits saturate."""
    small = export(tmp_path / "small", shared, 1, "--precision", "int8", "--reduce-range")
    assert json.loads(small.read("verification.json"))["int8"]["weight_bits"] == 7
    grids = {}
    for bits, bundle in ((8, exported), (7, small)):
        for before in ([], [shutil.which("qemu-x86_64"), "-cpu", "Haswell"]):
            out = tmp_path / "grid.npy"
            command = [*before, sys.executable, "-c", CAPTION, bundle.path, photos[0], out]
            subprocess.run([str(x) for x in command], check=True, capture_output=True)
            grids[bits, bool(before)] = np.load(out)
    np.testing.assert_array_equal(grids[7, True], grids[7, False])
    if "vnni" in Path("/proc/cpuinfo").read_text():
        noise = np.square(grids[8, True] - grids[8, False]).sum() / np.square(grids[8, False]).sum()
        assert noise > 0.005
    with Captioner.load(small, "cpu") as captioner:
        assert captioner.self_test().precision == "int8"
