"""What tests of an output file share: records as lines, and outputs that are opened, written and closed."""

import json

from caption_rt.errors import ImageError
from caption_rt.output_file import FileOutput
from caption_rt.outputs import Entry, RunKey, digest_of
from caption_rt.records import Record
from caption_rt.sources import Source
from caption_rt.writers import LineWriter

KEY = RunKey(b"caption", b"error")


class Said(str):
    """A caption, as far as these tests need one."""

    text = property(str)


def entry(name, content=b"photo", text="a dog"):
    return Entry(Source(name, name), digest_of(content), Record(name, Said(text)))


def bad(name, content=None, message="it is bad", error=None):
    source = Source(name, name, error=error)
    return Entry(
        source, None if content is None else digest_of(content), Record(name, ImageError(message, reason="is bad"))
    )


def line(record):
    return json.dumps([record.path, str(record.result)]).encode() + b"\n"


WRITER = LineWriter(b"# header\n", line)


def opened(out, existing="resume", key=KEY, name="lines", writer=WRITER):
    return FileOutput(out, name, writer, existing, key)


def written(out, *entries, finish=True, **keywords):
    output = opened(out, **keywords)
    try:
        for one in entries:
            output.write([one])
        if finish:
            output.finish()
    finally:
        output.close()


def names(out):
    return [json.loads(text)[0] for text in out.read_text().splitlines()[1:]]
