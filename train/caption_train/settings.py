"""The settings of a training run: one TOML file, of which three are shipped.

``configs/default.toml`` says of every setting what it is and where its value comes from; ``tutorial.toml`` and
``paper.toml`` are the runs of TensorFlow's tutorial and of Xu et al. 2015. Another file may hold what differs from the
default alone. Nothing here needs TensorFlow: a wrong setting is found before it is loaded.
"""

from __future__ import annotations

import difflib
import importlib.resources
import json
import math
import re
import tomllib
import typing
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from caption_rt.errors import OptionsError, Parameter
from caption_rt.options import DecodeOptions

CONFIGS = ("default", "tutorial", "paper")
"""Names of the shipped files."""

_LARGEST_SEED = 2**31 - 1  # TensorFlow's stateless random numbers take two of 32 bits

Recurrence = Literal["carry", "reset"]
InitialState = Literal["mean", "zeros"]
Grouping = Literal["photos", "lengths", "random"]
Schedule = Literal["cosine", "constant"]
Precision = Literal["auto", "bfloat16", "float32"]
Objective = Literal["cross_entropy", "self_critical"]
Baseline = Literal["greedy", "samples"]


@dataclass(frozen=True)
class _Section:
    """What the sections share: the checks of their values."""

    def __post_init__(self) -> None:
        """Check what has a list of values.

        Raises:
            OptionsError: A value is not among them.
        """
        for name, kind in typing.get_type_hints(type(self)).items():
            allowed, value = get_args(kind), getattr(self, name)
            if allowed and value not in allowed:
                choices = ", ".join(map(repr, allowed[:-1])) + f" or {allowed[-1]!r}" if allowed[1:] else allowed[0]
                raise OptionsError(self._name(name), f" must be {choices}, not {value!r}")

    def _at_least(self, least: int, *names: str) -> None:
        for name in names:
            if getattr(self, name) < least:
                raise OptionsError(self._name(name), f" must be at least {least}, not {getattr(self, name)}")

    def _within(self, name: str, range_: str, *, fits: bool) -> None:
        if not fits:
            raise OptionsError(self._name(name), f" must {range_}, not {getattr(self, name)}")

    def _decoding(self, **options: Any) -> DecodeOptions:
        """Options of a search, whose errors name the settings that they come from."""
        try:
            return DecodeOptions(**options)
        except OptionsError as exc:
            raise exc.renamed({field.name: self._name(field.name) for field in fields(self)}) from exc

    def _name(self, name: str) -> Parameter:
        return Parameter(f"{type(self).__name__.removesuffix('Settings').lower()}.{name}")


@dataclass(frozen=True)
class ModelSettings(_Section):
    """Sizes of encoder and decoder, and how the recurrence goes; see ``configs/default.toml``."""

    embedding_dim: int
    units: int
    recurrence: Recurrence
    initial_state: InitialState
    dropout: float

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            OptionsError: One is out of its range.
        """
        super().__post_init__()
        self._at_least(1, "embedding_dim", "units")
        self._within("dropout", "lie in [0, 1)", fits=0 <= self.dropout < 1)


@dataclass(frozen=True)
class CaptionsSettings(_Section):
    """Which words are known and how long captions are; see ``configs/default.toml``."""

    vocabulary_size: int
    min_count: int
    max_words: int

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            OptionsError: One is out of its range.
        """
        self._at_least(1, "vocabulary_size", "min_count", "max_words")
        self._decoding(max_words=self.max_words)


@dataclass(frozen=True)
class ExtractorSettings(_Section):
    """The extractor of a new run; see ``configs/default.toml``. `caption_train.inception` checks the values."""

    weights: str
    width: float
    size: int
    layer: str
    trainable_from: str
    learning_rate: float

    def __post_init__(self) -> None:
        """Check the values that say how it learns.

        Raises:
            OptionsError: One is out of its range.
        """
        self._within("learning_rate", "be a positive number", fits=0 < self.learning_rate < math.inf)

    @property
    def learns_from(self) -> str | None:
        """The first block that learns; None where none does."""
        return None if self.trainable_from == "none" else self.trainable_from


@dataclass(frozen=True)
class TrainingSettings(_Section):
    """What is learnt and how; see ``configs/default.toml``."""

    objective: Objective
    samples: int
    baseline: Baseline
    epochs: int
    batch_size: int
    grouping: Grouping
    learning_rate: float
    schedule: Schedule
    warmup: float
    clip_norm: float
    label_smoothing: float
    attention_penalty: float
    precision: Precision
    patience: int
    checkpoint_steps: int
    seed: int

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            OptionsError: One is out of its range.
        """
        super().__post_init__()
        self._at_least(1, "epochs", "batch_size", "checkpoint_steps")
        # Of one sample alone there are no others.
        self._at_least(2 if self.baseline == "samples" else 1, "samples")
        self._at_least(0, "patience")
        self._within("seed", f"lie in 0 to {_LARGEST_SEED}", fits=0 <= self.seed <= _LARGEST_SEED)
        self._within("learning_rate", "be a positive number", fits=0 < self.learning_rate < math.inf)
        for name in ("clip_norm", "attention_penalty"):
            self._within(name, "be 0 or a positive number", fits=0 <= getattr(self, name) < math.inf)
        for name in ("warmup", "label_smoothing"):
            self._within(name, "lie in [0, 1)", fits=0 <= getattr(self, name) < 1)


@dataclass(frozen=True)
class EvaluationSettings(_Section):
    """How validation photos are captioned; see ``configs/default.toml``."""

    photos: int
    beam_size: int
    length_penalty: float
    sample: bool

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            OptionsError: One is out of its range.
        """
        self._at_least(1, "photos")
        self.decoding(1)

    def decoding(self, max_words: int) -> DecodeOptions:
        """As options of a search, for captions of at most so many words."""
        return self._decoding(
            beam_size=self.beam_size,
            length_penalty=self.length_penalty,
            sample=self.sample,
            max_words=max_words,
            guard=False,
        )


@dataclass(frozen=True)
class Settings:
    """All settings of a run, by sections."""

    model: ModelSettings
    captions: CaptionsSettings
    extractor: ExtractorSettings
    training: TrainingSettings
    evaluation: EvaluationSettings

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Sections to keys to values."""
        return asdict(self)

    def changed(self, changes: Mapping[str, Any]) -> Settings:
        """With other values, by ``section.key``.

        Raises:
            OptionsError: An unknown key, or a value of the wrong type or out of its range.
        """
        sections: dict[str, dict[str, Any]] = {}
        for key, value in changes.items():
            section, _, name = key.partition(".")
            sections.setdefault(section, {})[name] = _checked(key, value)
        return replace(self, **{name: replace(getattr(self, name), **values) for name, values in sections.items()})


_SECTIONS: Mapping[str, type[_Section]] = typing.get_type_hints(Settings)
_KINDS = {f"{section}.{field.name}": field.type for section, kind in _SECTIONS.items() for field in fields(kind)}
KEYS = tuple(_KINDS)
"""Every setting as ``section.key``."""


def shipped(name: str) -> str:
    """The text of a shipped file: ``default``, ``tutorial`` or ``paper``."""
    return importlib.resources.files("caption_train").joinpath("configs", f"{name}.toml").read_text(encoding="utf-8")


def load_settings(config: str = "default", changes: Sequence[str] = ()) -> Settings:
    """The settings that a command asks for.

    Args:
        config: The name of a shipped file, or the path of another one, which may hold some settings alone.
        changes: ``section.key=value`` each, the value in TOML's notation; words need no quotes.

    Raises:
        OptionsError: There is no such file, it is no TOML, or a setting in it or among the changes is unknown, of the
            wrong type or out of its range.
    """
    return settings_from(_parsed(shipped("default"), "default.toml"), config, changes)


def settings_from(
    before: Settings, config: str | None, changes: Sequence[str], *, without: Container[str] = ()
) -> Settings:
    """Other settings, but for what a command asks for.

    Args:
        before: The other ones.
        config: As in `load_settings`, if there is one.
        changes: As there.
        without: Keys that stay as they were, whatever is asked for.

    Raises:
        OptionsError: As there.
    """
    asked, said = asked_for(config, changes), asked_for(None, changes)
    try:
        return before.changed({key: value for key, value in asked.items() if key not in without})
    except OptionsError as exc:
        raise exc.renamed({key: f"{key} (in {config})" for key in asked if key not in said}) from exc


def asked_for(config: str | None, changes: Sequence[str]) -> dict[str, Any]:
    """What a configuration, if there is one, and changes to it say, by ``section.key``; see `load_settings`.

    Raises:
        OptionsError: As there.
    """
    said: dict[str, Any] = {}
    if config is not None:
        said = _flat(_toml(shipped(config), config), f"{config}.toml") if config in CONFIGS else _read(Path(config))
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise OptionsError(f"{change!r} is no setting: give section.key=value, such as training.epochs=3")
        said[key.strip()] = _checked(key.strip(), _value(key.strip(), text.strip()))
    return said


def read_settings(path: Path) -> Settings:
    """What `render` wrote.

    Raises:
        OptionsError: The file cannot be read or is not complete.
    """
    return _parsed(_text(path), str(path))


def render(settings: Settings, config: str = "default") -> str:
    """A TOML file of settings, with the comments of a shipped one.

    Args:
        settings: All values.
        config: Whose comments; those of the default, if this is not the name of a shipped file.
    """
    values, lines, section = settings.as_dict(), [], ""
    for line in shipped(config if config in CONFIGS else "default").splitlines():
        if found := re.fullmatch(r"\[(\w+)\]", line):
            section = found[1]
        elif found := re.fullmatch(r"(\w+) = (.*)", line):
            value = values[section][found[1]]
            if tomllib.loads(line)[found[1]] != value:
                line = f"{found[1]} = {json.dumps(value)}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def _parsed(text: str, source: str) -> Settings:
    """A complete file."""
    said = _flat(_toml(text, source), source)
    if missing := [key for key in KEYS if key not in said]:
        raise OptionsError(f"{source} has no {missing[0]}")
    checked = {key: _checked(key, value) for key, value in said.items()}
    return Settings(
        **{
            section: kind(**{field.name: checked[f"{section}.{field.name}"] for field in fields(kind)})  # type: ignore[arg-type]
            for section, kind in _SECTIONS.items()
        }
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.exists() and path.suffix != ".toml":
        raise OptionsError(f"there is no configuration {path}: give a TOML file, or one of {', '.join(CONFIGS)}")
    return _flat(_toml(_text(path), str(path)), str(path))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as exc:
        raise OptionsError(f"the settings {path} cannot be read: {exc.strerror or exc}") from exc
    except UnicodeDecodeError as exc:
        raise OptionsError(f"the settings {path} are not UTF-8 text") from exc


def _toml(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise OptionsError(f"{source} is not TOML: {exc}") from exc


def _flat(sections: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Sections of a file as ``section.key``, each known and of the right type."""
    said: dict[str, Any] = {}
    for section, values in sections.items():
        if section not in _SECTIONS or not isinstance(values, dict):
            raise OptionsError(f"{source}: {_unknown(section, _SECTIONS, 'section')}")
        for name, value in values.items():
            try:
                said[f"{section}.{name}"] = _checked(f"{section}.{name}", value)
            except OptionsError as exc:
                raise OptionsError(f"{source}: {exc}") from exc
    return said


def _value(key: str, text: str) -> Any:
    """The value of a ``--set``: TOML, or a word as it is."""
    if key in _KINDS and _plain_type(key) is str and not text.startswith(('"', "'")):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _checked(key: str, value: Any) -> Any:
    """A setting's value, if there is such a setting and it is of its type."""
    if key not in _KINDS:
        raise OptionsError(_unknown(key, KEYS, "setting"))
    kind = _plain_type(key)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise OptionsError(f"{key} must be {names[kind]}, not {value!r}")
    return value


def _plain_type(key: str) -> type:
    section, _, name = key.partition(".")
    kind = typing.get_type_hints(_SECTIONS[section])[name]
    return type(get_args(kind)[0]) if get_args(kind) else kind


def _unknown(name: str, known: Iterable[str], what: str) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not near:  # the key alone, in another section
        near = [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]][:1]
    hint = f"; did you mean {near[0]}?" if near else f": there are {', '.join(known)}"
    return f"there is no {what} {name!r}{hint}"
