"""Bundles that tests change."""

import hashlib
import json


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
