"""Bundles that tests change."""

import hashlib
import json
import zipfile

from caption_rt.manifest import PRECISIONS

ONE_GRAPH_TOLERANCES = {"fp32": 1e-5, "fp16": 2e-3, "int8": 2e-3}
"""How far a word's log-probability of the one graph may be from caption-rt's, by precision: in fewer bits than 32 a CPU
rounds where one graph ends and another begins, and the one graph has other ends."""


def exactest_precision(bundle):
    """Of the precisions that an open bundle has, the one nearest to float32, which `caption-export graph` takes."""
    return next(name for name in PRECISIONS if name in bundle.manifest.precisions)


def edit_manifest(folder, change):
    """Apply `change` to the manifest's object; what it states of the files stays as it is."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def replace_file(folder, name, data):
    """Put another file in the bundle and state it truthfully in the manifest."""
    (folder / name).write_bytes(data)
    state = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    edit_manifest(folder, lambda manifest: manifest["files"].update({name: state}))


def change_file(folder, name, change):
    """Change a JSON file of a bundle, and its manifest with it."""
    if name == "manifest.json":
        edit_manifest(folder, change)
        return
    data = json.loads((folder / name).read_text())
    change(data)
    replace_file(folder, name, json.dumps(data).encode())


def zipped(folder, *, replaced=None, method=zipfile.ZIP_DEFLATED, more=()):
    """The folder as a zip file; `replaced` and `more` are entries by their ZipInfo or name, with their bytes."""
    path = folder.with_suffix(".zip")
    entries = {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in [*(entries | (replaced or {})).items(), *more]:
            archive.writestr(name, data)
    return path
