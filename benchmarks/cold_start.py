"""From the start of a process to the first caption, against the imports alone.

    python benchmarks/cold_start.py photo.jpg

Alternates whole processes: `python -c "import numpy, PIL.Image, onnxruntime"`, `caption-rt PHOTO`, the same without the
graphs that are kept in the user's cache, `caption-rt --help`, and `python -c "import caption_rt"` beside `python -c
"import numpy"`. Prints medians and ratios to the first.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    """Read the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path)
    parser.add_argument("--model", help="a bundle; the default one without")
    parser.add_argument("--runs", type=int, default=15, help="rounds; one more, not counted, warms up")
    arguments = parser.parse_args()
    command = [str(Path(sys.executable).with_name("caption-rt"))]
    model = ["--model", arguments.model] if arguments.model else []
    photo = [*command, "--device", "cpu", *model, str(arguments.photo)]
    ways = {
        "import numpy, PIL.Image, onnxruntime": [sys.executable, "-c", "import numpy, PIL.Image, onnxruntime"],
        "caption-rt PHOTO": photo,
        "the same without kept graphs": photo,
        "caption-rt --help": [*command, "--help"],
        "import numpy": [sys.executable, "-c", "import numpy"],
        "import numpy, caption_rt": [sys.executable, "-c", "import numpy, caption_rt"],
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(arguments.runs + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            environment = os.environ | ({"CAPTION_RT_CACHE": "off"} if "without" in name else {})
            subprocess.run(way, check=True, stdout=subprocess.DEVNULL, env=environment)
            if run:
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    first = next(iter(medians.values()))
    for name, value in medians.items():
        print(f"{name:38} {value * 1e3:6.0f} ms  {value / first:5.2f} x")
    beyond = medians["import numpy, caption_rt"] - medians["import numpy"]
    print(f"import caption_rt beyond numpy: {beyond * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
