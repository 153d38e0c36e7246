"""Peak memory of a folder run of many photos against one of few.

    python benchmarks/memory.py PHOTOS... --few 500 --many 10000

Links to the photos below the folders PHOTOS, as many times as it takes, are made into two folders, and
`caption-rt FOLDER -o FILE` is run over each, in turns. Prints the peak resident memory of each process and the ratio of
the medians.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from caption_rt._sniff import PHOTO_SUFFIXES


def make_folder(originals, folder, count):
    """A folder of so many links, a thousand to a subfolder."""
    for number, original in enumerate(itertools.islice(itertools.cycle(originals), count)):
        link = folder / f"{number // 1000:03d}" / f"{number:06d}{original.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(original)
    return folder


def peak_mib(folder, output):
    """The peak resident memory of a run over a folder, in MiB."""
    command = [sys.executable, "-m", "caption_rt", str(folder), "-o", str(output)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        said = process.stderr.read()
        # Not getrusage(RUSAGE_CHILDREN), which has the largest of all children so far.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"caption-rt failed over {folder}: {said}")
    with output.open(encoding="utf-8") as lines:
        count = sum(1 for _ in lines)
    return usage.ru_maxrss / (1024 if sys.platform != "darwin" else 1024 * 1024), count


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, nargs="+")
    parser.add_argument("--few", type=int, default=500)
    parser.add_argument("--many", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    originals = [
        p.resolve() for top in arguments.photos for p in sorted(top.rglob("*")) if p.suffix.lower() in PHOTO_SUFFIXES
    ]
    if not originals:
        parser.error(f"there is no photo in {', '.join(map(str, arguments.photos))}")
    peaks = {arguments.few: [], arguments.many: []}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {count: make_folder(originals, Path(scratch, str(count)), count) for count in peaks}
        for run in range(arguments.runs):
            for count, folder in folders.items():
                peak, lines = peak_mib(folder, Path(scratch, f"{count}-{run}.jsonl"))
                if lines != count:
                    sys.exit(f"{lines} records of {count} photos")
                peaks[count].append(peak)
    few, many = (statistics.median(peaks[count]) for count in (arguments.few, arguments.many))
    for count, values in peaks.items():
        print(f"{count:7d} photos  {statistics.median(values):7.1f} MiB  ({min(values):.1f} to {max(values):.1f})")
    print(f"ratio           {many / few:.3f}")


if __name__ == "__main__":
    main()
