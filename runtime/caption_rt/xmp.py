"""XMP files (ISO 16684-1): a caption as Dublin Core's description, which photo managers show.

An existing file is never written anew from its parsed form: the description is put in at its place in the text, found
by expat, and everything else (other programs' edits, prefixes, comments, padding) stays byte for byte. A document type
declaration is refused, so that no entity is ever expanded.
"""

import codecs
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from xml.parsers import expat

from caption_rt.errors import CaptionError, printable

__all__ = ["describe", "new"]

_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_DC = "http://purl.org/dc/elements/1.1/"
_DESCRIPTION = f"{_DC}}}description"
_LANG = "http://www.w3.org/XML/1998/namespace}lang"

# XML 1.0, production 2: what no document may hold, escaped or not.
_NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_ATTRIBUTE = re.compile(rb"\s+([^\s=]+)\s*=\s*(?:\"[^\"]*\"|'[^']*')")

_PACKET = """\
<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="caption-rt">
 <rdf:RDF xmlns:rdf="{rdf}">
  <rdf:Description rdf:about="">
{description}
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>
"""


def new(caption: str) -> bytes:
    """A new XMP file, in UTF-8, that describes a photo by its caption.

    Args:
        caption: a line of text.
    """
    description = _description([caption], {"rdf": _RDF}, "   ")
    return _PACKET.format(rdf=_RDF, description=description).encode()


def describe(existing: bytes, caption: str, *, append: bool) -> bytes:
    """An XMP file with a caption in its description, all else as it was.

    Args:
        existing: the file; one with nothing in it counts as none.
        caption: a line of text.
        append: make it a further line of the description in the default language, unless it is one of its lines; False
            puts it in place of the description in every language.

    Raises:
        CaptionError: the file is not well-formed, not XMP, has a document type declaration, or states its description
            in a way that cannot be added to.
    """
    if not existing.strip():
        return new(caption)
    encoding, mark = _encoding(existing)
    try:
        source = existing[len(mark) :].decode(encoding).encode()
    except UnicodeDecodeError as exc:
        raise CaptionError(f"it is not text in {encoding.upper()}") from exc
    document = _Document(source)
    if document.rdf is None:
        raise CaptionError("it is not XMP: there is no rdf:RDF in it")
    edits = _added(document, caption) if append else _stated(document, [caption])
    for edit in sorted(edits, reverse=True):
        source = source[: edit.start] + edit.text.encode() + source[edit.end :]
    return mark + source.decode().encode(encoding)


class _Edit(NamedTuple):
    """A stretch of the source, in bytes, and what takes its place."""

    start: int
    end: int
    text: str


@dataclass
class _Element:
    """An element, and where in the source it stands."""

    name: str
    attributes: dict[str, str]
    """Value by name; names, of elements too, are namespace, "}", local name."""
    raw_names: dict[str, bytes]
    """The attributes' names as the source has them."""
    scope: dict[str, str]
    """Namespace by prefix."""
    start: int
    """Where "<" of the start tag is."""
    inside: int
    """Where the start tag is over."""
    inside_end: int = 0
    """Where "<" of the end tag is."""
    end: int = 0
    """Where the element is over."""
    text: str = ""
    """Its own characters."""
    children: "list[_Element]" = field(default_factory=list)

    def child(self, *names: str) -> "_Element | None":
        return next((child for child in self.children if child.name in names), None)


class _Document:
    """What `describe` needs to know of an XMP file.

    Raises:
        CaptionError: it is not well-formed, or has a document type declaration.
    """

    def __init__(self, source: bytes) -> None:
        self.source = source
        self.rdf: _Element | None = None
        self._open: list[_Element] = []
        self._scopes: dict[str, list[str]] = {}
        # The encoding is that of `source`, whatever the declaration says of the file.
        self._parser = parser = expat.ParserCreate("utf-8", "}")
        parser.namespace_prefixes = True
        parser.buffer_text = True
        parser.StartDoctypeDeclHandler = _refuse
        parser.StartNamespaceDeclHandler = self._declare
        parser.EndNamespaceDeclHandler = self._undeclare
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._characters
        try:
            parser.Parse(source, True)
        except expat.ExpatError as exc:
            reason = expat.errors.messages.get(exc.code, "an error")
            raise CaptionError(f"it is not well-formed XML: {reason} in line {exc.lineno}") from exc

    def described(self) -> tuple[_Element | None, _Element | None]:
        """The rdf:Description that has, or is to have, the photo's dc:description; and that, where it is an element.

        Only children and attributes of an rdf:Description are the photo's: one deeper down describes something else.
        """
        assert self.rdf is not None
        owners = [child for child in self.rdf.children if child.name == f"{_RDF}}}Description"]
        for owner in owners:
            if description := owner.child(_DESCRIPTION):
                return owner, description
        stated = [owner for owner in owners if _DESCRIPTION in owner.attributes]
        return next(iter(stated or owners), None), None

    def indent(self, element: _Element) -> str:
        """The space before an element that begins a line."""
        before = self.source[: element.start]
        space = before[before.rfind(b"\n") + 1 :]
        return space.decode() if not space.strip() else ""

    def _declare(self, prefix: str | None, uri: str | None) -> None:
        self._scopes.setdefault(prefix or "", []).append(uri or "")

    def _undeclare(self, prefix: str | None) -> None:
        self._scopes[prefix or ""].pop()

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        start = self._parser.CurrentByteIndex
        element = _Element(
            _short(name),
            {_short(key): value for key, value in attributes.items()},
            {_short(key): _raw(key).encode() for key in attributes},
            {prefix: uris[-1] for prefix, uris in self._scopes.items() if uris},
            start,
            _tag_end(self.source, start),
        )
        if self._open:
            self._open[-1].children.append(element)
        if self.rdf is None and element.name == f"{_RDF}}}RDF":
            self.rdf = element
        self._open.append(element)

    def _end(self, _: str) -> None:
        element = self._open.pop()
        if self.source[element.inside - 2 : element.inside] == b"/>":
            element.inside_end = element.end = element.inside
        else:
            element.inside_end = self._parser.CurrentByteIndex
            element.end = _tag_end(self.source, element.inside_end)

    def _characters(self, text: str) -> None:
        self._open[-1].text += text


def _refuse(*_: object) -> None:
    raise CaptionError("it has a document type declaration, which XMP does not have")


def _short(name: str) -> str:
    """Namespace and local name of what expat calls namespace, local name and prefix."""
    return "}".join(name.split("}")[:2])


def _raw(name: str) -> str:
    parts = name.split("}")
    return f"{parts[2]}:{parts[1]}" if len(parts) == 3 else parts[-1]


def _tag_end(source: bytes, start: int) -> int:
    """Where the tag that begins at `start` is over; a ">" in a quoted value does not end it."""
    match = re.compile(rb"(?:[^>\"']|\"[^\"]*\"|'[^']*')*>").match(source, start)
    assert match is not None  # expat has read it
    return match.end()


def _encoding(existing: bytes) -> tuple[str, bytes]:
    """The encoding and the byte order mark; XMP is in Unicode, and without a mark in UTF-8."""
    for mark, name in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ):
        if existing.startswith(mark):
            return name, mark
    declared = re.match(rb"<\?xml[^>]*?encoding\s*=\s*[\"']([^\"']*)", existing)
    if declared and declared[1].lower() not in (b"utf-8", b"us-ascii"):
        raise CaptionError(f"XMP is in UTF-8, and it says that it is in {printable(declared[1].decode('latin-1'))}")
    return "utf-8", b""


def _added(document: _Document, caption: str) -> list[_Edit]:
    """How the caption becomes a further line of the description."""
    owner, description = document.described()
    if description is None:
        lines = _lines(owner.attributes.get(_DESCRIPTION, "") if owner else "")
    else:
        container = description.child(*(f"{_RDF}}}{kind}" for kind in ("Alt", "Bag", "Seq")))
        items = [child for child in container.children if child.name == f"{_RDF}}}li"] if container else []
        if items:
            # The default language's, which is what a reader takes first, or the first.
            item = next((item for item in items if item.attributes.get(_LANG, "").lower() == "x-default"), items[0])
            return _extended(document, item, caption)
        if description.children and not container:
            raise CaptionError("its dc:description is stated in a way that cannot be added to")
        lines = _lines(description.text)
    return [] if caption in lines else _stated(document, [*lines, caption])


def _extended(document: _Document, item: _Element, caption: str) -> list[_Edit]:
    """How the caption becomes the last line of an rdf:li."""
    if item.children:
        raise CaptionError("its dc:description is stated in a way that cannot be added to")
    lines = _lines(item.text)
    if caption in lines:
        return []
    if lines:
        return [_Edit(item.inside_end, item.inside_end, "\n" + _escaped(caption))]
    return [_inside(document, item, _escaped(caption))]


def _stated(document: _Document, lines: Sequence[str]) -> list[_Edit]:
    """How the lines become the whole description."""
    owner, description = document.described()
    if owner and description:
        indent = document.indent(description)
        # What the old element declares goes with it.
        text = _description(lines, owner.scope, indent).removeprefix(indent)
        return [_Edit(description.start, description.end, text)]
    if owner is None:
        assert document.rdf is not None
        indent = document.indent(document.rdf) + " "
        inner = _description(lines, {**document.rdf.scope, "rdf": _RDF}, indent + " ")
        opening = f'{indent}<rdf:Description rdf:about="" xmlns:rdf="{_RDF}">'
        return [_last_child(document, document.rdf, f"{opening}\n{inner}\n{indent}</rdf:Description>")]
    edits = [_last_child(document, owner, _description(lines, owner.scope, document.indent(owner) + " "))]
    if _DESCRIPTION in owner.attributes:
        for attribute in _ATTRIBUTE.finditer(document.source, owner.start, owner.inside):
            if attribute[1] == owner.raw_names[_DESCRIPTION]:
                edits.append(_Edit(attribute.start(), attribute.end(), ""))
    return edits


def _last_child(document: _Document, parent: _Element, child: str) -> _Edit:
    if parent.inside_end == parent.inside:
        return _inside(document, parent, f"\n{child}\n{document.indent(parent)}")
    # After what is there rather than right before the end tag, whose indentation stays.
    end = parent.inside + len(document.source[parent.inside : parent.inside_end].rstrip())
    return _Edit(end, end, f"\n{child}")


def _inside(document: _Document, parent: _Element, text: str) -> _Edit:
    """How a text becomes all that an element without children or text holds."""
    if document.source[parent.inside - 2 : parent.inside] != b"/>":
        return _Edit(parent.inside, parent.inside_end, text)
    tag = re.compile(rb"<([^\s/>]+)").match(document.source, parent.start)
    assert tag is not None  # expat has read it
    return _Edit(parent.inside - 2, parent.inside, f">{text}</{tag[1].decode()}>")


def _description(lines: Sequence[str], scope: dict[str, str], indent: str) -> str:
    """The element dc:description; the prefixes that are not in scope are declared in it."""
    declared = "".join(
        f' xmlns:{prefix}="{namespace}"'
        for prefix, namespace in (("dc", _DC), ("rdf", _RDF))
        if scope.get(prefix) != namespace
    )
    return (
        f"{indent}<dc:description{declared}>\n"
        f"{indent} <rdf:Alt>\n"
        f'{indent}  <rdf:li xml:lang="x-default">{_escaped(chr(10).join(lines))}</rdf:li>\n'
        f"{indent} </rdf:Alt>\n"
        f"{indent}</dc:description>"
    )


def _lines(text: str) -> list[str]:
    """The lines, without the space around the whole."""
    return text.strip().splitlines()


def _escaped(text: str) -> str:
    return html.escape(_NO_XML.sub("\ufffd", text), quote=False)
