"""Bundles that tests change."""

import hashlib
import json


def change_file(folder, name, change):
    """Change a JSON file of a bundle, and its manifest with it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    data = manifest if name == "manifest.json" else json.loads((folder / name).read_text())
    change(data)
    if name != "manifest.json":
        text = json.dumps(data).encode()
        (folder / name).write_bytes(text)
        manifest["files"][name] = {"sha256": hashlib.sha256(text).hexdigest(), "size": len(text)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
