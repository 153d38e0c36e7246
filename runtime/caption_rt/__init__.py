"""caption-rt: a photo in, a sentence out, with ONNX Runtime and without TensorFlow.

from caption_rt import Captioner

captioner = Captioner.load()
print(captioner.caption("photo.jpg").text)
"""

import importlib
from typing import TYPE_CHECKING

from caption_rt.errors import BundleError, CaptionError, EngineError, ImageError, OptionsError

if TYPE_CHECKING:
    from caption_rt.bundle import Bundle
    from caption_rt.caption import Caption, Timing, Word
    from caption_rt.captioner import Captioner
    from caption_rt.image import PhotoLimits
    from caption_rt.options import DecodeOptions
    from caption_rt.search import Stepper
    from caption_rt.vocabulary import Vocabulary

__version__ = "0.1.0"

__all__ = [
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

# Looked up when they are first used (PEP 562): importing the package costs neither NumPy nor ONNX Runtime, which
# `caption-rt --help` and programs that caption rarely would otherwise pay for.
_LAZY = {
    "Bundle": "caption_rt.bundle",
    "Caption": "caption_rt.caption",
    "Captioner": "caption_rt.captioner",
    "DecodeOptions": "caption_rt.options",
    "PhotoLimits": "caption_rt.image",
    "Stepper": "caption_rt.search",
    "Timing": "caption_rt.caption",
    "Vocabulary": "caption_rt.vocabulary",
    "Word": "caption_rt.caption",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
