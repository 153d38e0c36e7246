"""The bundle: the contract between the exporter, which writes one, and the runtime, which opens one.

A bundle is a folder, or a zip file of it, that holds ``manifest.json``, three ONNX graphs in one precision or several,
``vocabulary.json``, ``selftest.json`` and a ``README.md``. docs/bundle.md describes the format.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from caption_rt._fields import parse_json
from caption_rt._graph_file import check_graph_file
from caption_rt.errors import BundleError, CaptionError, Parameter, printable, remedy_of
from caption_rt.manifest import (
    FORMAT_VERSION,
    GRAPH_TENSORS,
    MANIFEST_FILE,
    PRECISIONS,
    SELFTEST_FILE,
    VOCABULARY_FILE,
    DecodingSpec,
    FileSpec,
    GraphSpec,
    GridSpec,
    ImageSpec,
    Manifest,
    OtherFormat,
    TensorSpec,
)
from caption_rt.vocabulary import Vocabulary

__all__ = [
    "FORMAT_VERSION",
    "GRAPH_TENSORS",
    "MANIFEST_FILE",
    "PRECISIONS",
    "SELFTEST_FILE",
    "VOCABULARY_FILE",
    "Bundle",
    "DecodingSpec",
    "FileSpec",
    "GraphSpec",
    "GridSpec",
    "ImageSpec",
    "Manifest",
    "TensorSpec",
    "check_target",
    "copy_bundle",
    "default_bundle_path",
    "write_bundle",
]

# A manifest of the full-size model has a few kB.
_MAX_MANIFEST_SIZE = 4 * 2**20


class _Files(Protocol):
    """Where a bundle's files lie."""

    def read(self, name: str, limit: int) -> bytes:
        """At most `limit` + 1 bytes of a file: enough to see that it is too long, never more."""


class _Folder:
    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, name: str, limit: int) -> bytes:
        path = self._path / name
        # A link could lead anywhere, and what it leads to could change after the check.
        if not stat.S_ISREG(path.lstat().st_mode):
            raise BundleError(f"{name} is not a regular file, and links are not followed")
        with path.open("rb") as file:
            return file.read(limit + 1)


class Bundle:
    """A verified bundle: every file had the size and the SHA-256 that the manifest states when it was opened.

    Open one with `Bundle.open`.
    """

    def __init__(self, path: Path, files: _Files) -> None:
        """Read and verify everything; for `Bundle.open`."""
        self._path = path
        self._location = path.absolute()
        self._files = files
        try:
            self._manifest = self._read_manifest()
            self._contents = self._verified_contents()
            self._vocabulary = Vocabulary.from_json(parse_json(self._contents[VOCABULARY_FILE], VOCABULARY_FILE))
            self._check_vocabulary()
        except OtherFormat as exc:
            raise self._located(exc) from exc
        except BundleError as exc:
            raise self.spoilt(exc) from exc

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Bundle":
        """Open a bundle and verify every file of it.

        Args:
            path: the folder, or the zip file of it.

        Raises:
            BundleError: it does not exist, is not a bundle, has another format version, lacks a key or a file, or a
                file is not the one that the manifest states.
        """
        where = Path(path)
        try:
            if where.is_dir():
                return cls(where, _Folder(where.absolute()))
            if not where.exists():
                raise BundleError(f"the bundle {printable(where)} does not exist: check the path")
            if not where.is_file():
                raise BundleError(
                    f"{printable(where)} is not a bundle, neither a folder nor a whole zip file: name what "
                    "caption-export wrote"
                )
            from caption_rt._zipped import Zipped  # most bundles are folders

            return cls(where, Zipped(where))
        except (OSError, ValueError) as exc:
            raise BundleError(
                f"the bundle {printable(where)} cannot be read ({printable(exc)}): check its path and permissions"
            ) from exc

    @property
    def path(self) -> Path:
        """The folder or zip file, as it was named."""
        return self._path

    @property
    def location(self) -> Path:
        """The same as an absolute path: a process may change its working folder."""
        return self._location

    @property
    def sha256(self) -> str:
        """SHA-256 of the manifest, 64 hexadecimal digits; it states those of all files."""
        return self._sha256

    @property
    def manifest(self) -> Manifest:
        """The facts about the bundle."""
        return self._manifest

    @property
    def vocabulary(self) -> Vocabulary:
        """The words the model knows."""
        return self._vocabulary

    def read(self, name: str) -> bytes:
        """The verified bytes of a file: one that the manifest lists, or the manifest itself.

        They are handed out once from memory, so that an open bundle does not hold a second copy of its graphs; a later
        call reads the file again and verifies it again. So does the first one for a file that is not kept: a graph that
        only a larger precision than the bundle's smallest has, and what is there for people.

        Raises:
            BundleError: the manifest lists no such file, or it has changed since the bundle was opened.
        """
        if name not in self._manifest.files and name != MANIFEST_FILE:
            raise self._located(BundleError(f"the manifest lists no file {printable(name)}"))
        data = self._contents.pop(name, None)
        if data is not None:
            return data
        try:
            return self._verified(name)
        except BundleError as exc:
            raise self.spoilt(exc) from exc

    def let_go(self, name: str) -> None:
        """Do not hold a file's bytes in memory any longer; `read` gives them from the disk."""
        self._contents.pop(name, None)

    def selftest(self) -> dict[str, Any]:
        """The object of ``selftest.json``: inputs, and the results the training side got for them.

        Raises:
            BundleError: the file is not a JSON object.
        """
        data = parse_json(self.read(SELFTEST_FILE), SELFTEST_FILE)
        if not isinstance(data, dict):
            raise self.spoilt(BundleError(f"{SELFTEST_FILE} is not a JSON object"))
        return data

    def spoilt(self, error: BundleError) -> BundleError:
        """The error that says what is wrong with which bundle, and what to do about it.

        Args:
            error: what is wrong with one of its files.
        """
        return self._located(error, "; copy it again from its source, or export the model again")

    def _read_manifest(self) -> Manifest:
        data = self._read_file(MANIFEST_FILE, _MAX_MANIFEST_SIZE)
        if len(data) > _MAX_MANIFEST_SIZE:
            raise BundleError(f"{MANIFEST_FILE} is above {_MAX_MANIFEST_SIZE} bytes")
        self._sha256, self._manifest_size = hashlib.sha256(data).hexdigest(), len(data)
        return Manifest.from_json(parse_json(data, MANIFEST_FILE))

    def _verified_contents(self) -> dict[str, bytes]:
        """Verify every file, and keep those that are likely to be read."""
        precisions, files = self._manifest.precisions, self._manifest.files
        graphs = {precision: {graph.file for graph in precisions[precision].values()} for precision in precisions}
        # What only a larger precision needs is verified and let go: it would be twice as much memory, or more.
        smallest = min(graphs.values(), key=lambda names: sum(files[name].size for name in names))
        kept = smallest | {VOCABULARY_FILE, SELFTEST_FILE}
        contents = {}
        for name in files:
            data = self._verified(name)
            for graph in (graph for of_precision in precisions.values() for graph in of_precision.values()):
                if graph.file == name:
                    check_graph_file(data, graph)
            if name in kept:
                contents[name] = data
        return contents

    def _verified(self, name: str) -> bytes:
        itself = FileSpec(self._sha256, self._manifest_size)
        spec = itself if name == MANIFEST_FILE else self._manifest.files[name]
        data = self._read_file(name, spec.size)
        if len(data) != spec.size:
            relation = "longer" if len(data) > spec.size else "shorter"
            raise BundleError(f"{name} is {relation} than the {spec.size} bytes that the manifest states")
        if hashlib.sha256(data).hexdigest() != spec.sha256:
            raise BundleError(f"{name} is damaged or was changed: its SHA-256 is not the one that the manifest states")
        return data

    def _read_file(self, name: str, limit: int) -> bytes:
        try:
            return self._files.read(name, limit)
        except FileNotFoundError as exc:
            raise BundleError(f"{name} is missing") from exc
        except OSError as exc:
            raise BundleError(f"{name} cannot be read: {printable(exc)}") from exc

    def _check_vocabulary(self) -> None:
        any_precision = next(iter(self._manifest.precisions.values()))
        size = any_precision["decoder"].outputs[0].shape[1]
        if len(self._vocabulary) != size:
            raise BundleError(f"the decoder gives {size} log-probabilities for {len(self._vocabulary)} words")
        if self._vocabulary.special_ids != self._manifest.special_ids:
            raise BundleError("the special ids of manifest.json and vocabulary.json differ")

    def _located(self, error: BundleError, end: str = "") -> BundleError:
        return BundleError(f"the bundle {printable(self._path)}: {error}{end}")


def write_bundle(
    folder: str | os.PathLike[str],
    *,
    name: str,
    description: str,
    license: str,
    precisions: Mapping[str, Mapping[str, GraphSpec]],
    image: ImageSpec,
    grid: GridSpec,
    recurrence: str,
    special_ids: Mapping[str, int],
    decoding: DecodingSpec,
    training: Mapping[str, Any],
    scores: Mapping[str, Any],
    versions: Mapping[str, str],
    contents: Mapping[str, bytes],
    overwrite: bool = False,
) -> Bundle:
    """Write a bundle: wholly, or not at all.

    Everything is written into a folder beside the final one, opened and verified there, and renamed. The same arguments
    give the same bytes.

    Args:
        folder: where the bundle shall be.
        name: see `Manifest`, as for all arguments up to `versions`.
        description: see `Manifest`.
        license: see `Manifest`.
        precisions: see `Manifest`.
        image: see `Manifest`.
        grid: see `Manifest`.
        recurrence: see `Manifest`.
        special_ids: see `Manifest`.
        decoding: see `Manifest`.
        training: see `Manifest`; JSON values only.
        scores: see `Manifest`; JSON values only.
        versions: see `Manifest`.
        contents: every file by name: the graphs, ``vocabulary.json``, ``selftest.json``, ``README.md``.
        overwrite: replace a bundle that is already there.

    Returns:
        The bundle, opened.

    Raises:
        BundleError: the facts or files contradict each other, a fact is not a JSON value, or there is already something
            in that place.
        CaptionError: the files cannot be written.
    """
    target = Path(folder)
    files = {n: FileSpec(hashlib.sha256(data).hexdigest(), len(data)) for n, data in contents.items()}
    manifest = Manifest(
        name=name,
        description=description,
        license=license,
        files=files,
        precisions=precisions,
        image=image,
        grid=grid,
        recurrence=recurrence,
        special_ids=special_ids,
        decoding=decoding,
        training=training,
        scores=scores,
        versions=versions,
    )
    check_target(target, overwrite=overwrite)
    try:
        text = json.dumps(manifest.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as exc:
        raise BundleError(f"the bundle {printable(target)}: its facts are not JSON values: {printable(exc)}") from exc
    return _place(target, {**contents, MANIFEST_FILE: text.encode()}.items())


def copy_bundle(bundle: Bundle, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Bundle:
    """Write an open bundle, of a folder or a zip file, as a folder: wholly, or not at all, and byte for byte.

    Args:
        bundle: what to write; files that its manifest does not list stay behind.
        folder: where the bundle shall be.
        overwrite: replace a bundle that is already there.

    Returns:
        The new bundle, opened.

    Raises:
        BundleError: there is already something in that place, or a file has changed since the bundle was opened.
        CaptionError: the files cannot be written.
    """
    target = Path(folder)
    check_target(target, overwrite=overwrite)
    return _place(target, ((name, bundle.read(name)) for name in (*sorted(bundle.manifest.files), MANIFEST_FILE)))


def _place(target: Path, files: Iterable[tuple[str, bytes]]) -> Bundle:
    """Write a bundle's files, verify them and give them their place."""
    import secrets
    import shutil  # these two cost every start of the runtime, which only reads

    temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}.tmp"
    try:
        temporary.mkdir(parents=True)
        for file_name, data in files:
            (temporary / file_name).write_bytes(data)
        Bundle.open(temporary)
        _move(temporary, target)
    except OSError as exc:
        remedy = remedy_of(exc)
        reason = f"{printable(exc.strerror or exc)}{remedy and ': '}{remedy}"
        raise CaptionError(f"the bundle {printable(target)} cannot be written: {reason}") from exc
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Bundle.open(target)


def check_target(target: Path, *, overwrite: bool) -> None:
    """See that nothing is lost where a bundle shall be; `write_bundle` and `copy_bundle` do so themselves.

    Args:
        target: the folder.
        overwrite: whether a bundle that is already there is to be replaced.

    Raises:
        BundleError: there is already something: a bundle that is not to be replaced, or what is none.
    """
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise BundleError(
            f"{printable(target)} exists already: name another folder, or replace it with ", Parameter("overwrite")
        )
    # Overwriting removes the whole folder: what is not a bundle is not ours to remove.
    if (
        target.is_symlink()
        or not target.is_dir()
        or not ((target / MANIFEST_FILE).exists() or not any(target.iterdir()))
    ):
        raise BundleError(f"{printable(target)} is not a bundle, and only a bundle is overwritten")


def _move(source: Path, target: Path) -> None:
    """Rename, with what is there already out of the way first and put back if that fails."""
    import secrets
    import shutil

    if not target.exists():
        source.rename(target)
        return
    old = target.parent / f".{target.name}.{secrets.token_hex(4)}.old.tmp"
    target.rename(old)
    try:
        source.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def default_bundle_path() -> Path:
    """The bundle that travels inside the installed package; in a source checkout, its ``models/default``.

    Raises:
        BundleError: there is none.
    """
    package = Path(__file__).resolve().parent
    candidates = [package / "models" / "default"]
    if package.parent.name == "runtime":
        candidates.append(package.parent.parent / "models" / "default")
    for candidate in candidates:
        if (candidate / MANIFEST_FILE).is_file():
            return candidate
    raise BundleError("no bundle came with this installation: name one (on the command line with --model)")
