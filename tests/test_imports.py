"""Who may import whom (DESIGN: caption_export -> caption_train -> caption_rt), held against the code."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import caption_rt

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "caption_rt": ROOT / "runtime" / "caption_rt",
    "caption_train": ROOT / "train" / "caption_train",
    "caption_export": ROOT / "export" / "caption_export",
}


def imports(path):
    """Every module that a file imports anywhere in it, as a full name, those of `from x import y` as x.y too."""
    package = path.parent.name
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = f"{package}.{node.module or ''}".rstrip(".") if node.level else node.module
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return found


def files(package):
    return sorted(PACKAGES[package].rglob("*.py"))


def importers(package, banned):
    """The files of a package that import a top-level module."""
    return [path.name for path in files(package) if banned in {name.split(".")[0] for name in imports(path)}]


def test_there_is_code_to_look_at():
    assert {"engine.py", "search.py", "captioner.py", "cli.py"} <= {path.name for path in files("caption_rt")}
    assert "onnxruntime" in imports(PACKAGES["caption_rt"] / "engine.py")
    assert "caption_rt.bundle.Bundle" in imports(PACKAGES["caption_rt"] / "engine.py")


@pytest.mark.parametrize(
    "banned", ["tensorflow", "keras", "tf2onnx", "onnx", "tf_keras", "caption_train", "caption_export"]
)
def test_the_runtime_knows_nothing_of_training_and_export(banned):
    assert importers("caption_rt", banned) == []


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("onnxruntime", ["engine.py"]),
        ("matplotlib", ["attention.py"]),
        # The driver; and a reference that a forked process must not drop.
        ("ctypes", ["_cuda.py", "sessions.py"]),
        ("urllib", ["_http.py"]),
        ("sqlite3", ["ledger.py"]),
        ("pillow_heif", ["image.py"]),
    ],
)
def test_few_files_of_the_runtime_alone_import(module, allowed):
    assert importers("caption_rt", module) == allowed


def test_training_does_not_know_the_exporter():
    assert importers("caption_train", "caption_export") == []


@pytest.mark.parametrize("package", ["caption_train", "caption_export"])
def test_producers_reach_onnxruntime_through_the_runtime(package):
    tools = "onnxruntime.quantization", "onnxruntime.transformers"  # which change graphs, and run none
    found = {name for path in files(package) for name in imports(path) if name.split(".")[0] == "onnxruntime"}
    assert [name for name in found if not name.startswith(tools)] == []


@pytest.mark.parametrize("file", ["search.py", "strategies.py", "filters.py", "guard.py"])
def test_decoding_knows_neither_onnx_nor_files(file):
    found = imports(PACKAGES["caption_rt"] / file)
    modules = {".".join(name.split(".")[:2]) for name in found if name.startswith("caption_rt.")}
    decoding = {f"caption_rt.{name}" for name in ("errors", "filters", "options", "search", "strategies")}
    assert modules <= decoding
    standard = {name.split(".")[0] for name in found} - {"caption_rt"}
    assert standard <= {"collections", "dataclasses", "math", "numpy", "typing"}


def test_the_contract_needs_neither_the_engine_nor_numpy():
    for file in ("errors.py", "_fields.py", "vocabulary.py", "manifest.py", "_graph_file.py", "bundle.py"):
        found = {name.split(".")[0] for name in imports(PACKAGES["caption_rt"] / file)}
        assert not found & {"numpy", "PIL", "onnxruntime", "click"}, file


def run(script, *arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


LOADED = "import json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"


def test_a_real_caption_loads_nothing_of_training(tiny_bundle, photos):
    script = (
        "import sys\n"
        "from caption_rt import Captioner\n"
        "assert Captioner.load(sys.argv[1]).caption(sys.argv[2]).text == 'in dog cat ball cat'\n"
    )
    loaded = set(run(script + LOADED, tiny_bundle, photos[2]))
    assert {"caption_rt", "onnxruntime", "numpy", "PIL"} <= loaded
    banned = {
        "tensorflow",
        "keras",
        "tf2onnx",
        "onnx",
        "caption_train",
        "caption_export",
        "matplotlib",
        "click",
        "torch",
    }
    assert not loaded & banned


def test_importing_the_package_is_light():
    loaded = set(run("import caption_rt\n" + LOADED))
    assert "caption_rt" in loaded
    assert not loaded & {"numpy", "PIL", "onnxruntime", "click", "matplotlib"}


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_touch_neither_numpy_nor_onnxruntime(option):
    script = (
        "import contextlib, io, sys\n"
        "from caption_rt.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    assert main([sys.argv[1]]) == 0\n"
    )
    assert not set(run(script + LOADED, option)) & {"numpy", "PIL", "onnxruntime", "matplotlib"}


def test_the_public_names_are_exactly_these():
    assert caption_rt.__all__ == [
        "Bundle",
        "BundleError",
        "Caption",
        "CaptionError",
        "Captioner",
        "DecodeOptions",
        "EngineError",
        "ImageError",
        "OptionsError",
        "PhotoLimits",
        "Stepper",
        "Timing",
        "Vocabulary",
        "Word",
        "__version__",
    ]
    for name in caption_rt.__all__:
        assert getattr(caption_rt, name) is not None
    assert dir(caption_rt) == sorted(caption_rt.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Caption2'"):
        caption_rt.Caption2  # noqa: B018


@pytest.mark.parametrize("path", files("caption_rt"), ids=lambda path: path.name)
def test_every_module_says_what_it_exports(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assigned = [
        node
        for node in tree.body
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
    ]
    if path.name == "__main__.py":
        assert assigned == []
        return
    (exported,) = [ast.literal_eval(node.value) for node in assigned]
    assert exported == sorted(exported, key=lambda name: (not name.isupper(), not name[:1].isupper(), name))
    defined = {
        node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"
    }
    # What is public is exported; the command object is the shell's, not another module's.
    assert defined - {"command"} <= set(exported)


def test_packages_are_marked_as_typed():
    for name, folder in PACKAGES.items():
        if folder.is_dir():
            assert (folder / "py.typed").is_file(), name
