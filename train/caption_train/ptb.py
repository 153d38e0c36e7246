r"""COCO's tokens of a caption, without Java.

The COCO caption evaluation (Chen et al. 2015, https://arxiv.org/abs/1504.00325, section 3.1) parts captions with the
Penn Treebank tokenizer of Stanford CoreNLP 3.4.1 (``PTBTokenizer -preserveLines -lowerCase``) and leaves out 17
tokens of punctuation. The rules here were found by asking that program, which is a lexer: of all rules that match at a
place, the longest match wins. A test holds them against the program itself. Of what its own authors list as accidents,
those that real captions meet are kept, because scores are to be those of the program: brackets become "-lrb-" and,
being lower-cased, stay; so do "!!", and "&" and "#".
"""

from __future__ import annotations

import re

__all__ = ["ptb_tokens"]

# pycocoevalcap's list; what lower-casing leaves of its "-LRB-" and the like never matches, and is not in here.
_PUNCTUATION = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))

# The most of all words: nothing but letters up to the next space or comma.
_PLAIN = re.compile(r"[A-Za-z]+(?=[ ,]|$)")
_SPACE = re.compile(r"\s+")

_PARTED = {
    "cannot": ("can", "not"),
    "gimme": ("gim", "me"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "lemme": ("lem", "me"),
    "wanna": ("wan", "na"),
}

_ABBREVIATIONS = (
    # In whatever case.
    "(?i:adj|adm|adv|al|ala|alex|apr|ariz|assn|assoc|asst|atty|aug|ave|bhd|bldg|blvd|brig|bros|calif|capt|cf|cie|cmdr|"
    "col?|colo|comdr|conn|corp|cos|cpl|ct|dak|dec|dept|det|drs?|elec|ens|esq|est|etc|ext|feb|fla|fri|ft|ga|gen|govs?|"
    "hon|inc|ind|insp|intl|invt|jan|jos|jr|jul|jun|kans?|ky|lieut|lt|ltd|maj|mar|md|messrs|mich|minn|mlle|mme|mon?|"
    "mont|mrs?|ms|msgr|mt|natl|neb|nev|nov|oct|okla|penn|pfc|ph|plc|pres|profs?|pvt|rd|reps?|rev|rt|sens?|seps?|sept|"
    "seq|sfc|sgt|spc|sq|sr|ste?|supt|sys|tel|tenn|thurs?|treas|tues?|univ|va|vs|vt|wed|wisc?|wm|wyo)",
    "(?:[Mm](?:fg|tg)|[Pp](?:pte|pty|tes?|tys?))",
    # Names of states, but not the words that are written like them.
    "(?:A(?:rk|z|RK|Z)|D(?:el|EL)|I(?:ll|LL)|L[aA]|M(?:ass|iss|ASS|ISS)|O(?:re|RE)|P[aA]|T(?:ex|EX)|W(?:ash|ASH))",
)
# After these a full stop that follows a single letter ends a sentence; before other words it belongs to the letter.
_OPENERS = (
    "A(?i:bout|ccording|dditionally|fter|n|s|t)?|B(?i:ut)|E(?i:arlier)|H(?i:e|er|ere|owever)|I(?i:f|n|t)|L(?i:ast)|"
    "M(?i:any|ore)|N(?i:ow)|O(?i:nce|ne|ther|ur)|S(?i:he|ince|o|ome|uch)|T(?i:hat|he|heir|hen|here|hese|hey|his)|"
    "W(?i:e|hat|hen|hile)|Y(?i:et|ou)"
)

_FRACTION = "\u00b2\u00b3\u00b9\u00bc-\u00be\u2150-\u218f"  # and raised digits: to Python they are letters
_L = rf"[^\W\d_{_FRACTION}]"  # a letter
_LD = rf"[^\W_{_FRACTION}]"  # a letter or digit
_Q = "['\u2019\u0092]"  # apostrophes
_NUMBER = r"(?:\d*(?:[.,:]\d+)+|\d+)"
_INITIALS = r"[A-Za-z](?:\.[A-Za-z])+"
_PREFIXED = rf"(?:[dDoOlL]{_Q}(?={_L}{{2}}))?"  # d'oeuvre, o'clock
_SLASHED = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"

# One rule a line; of those that match, the longest is taken. What has to follow counts as well, where it stands outside
# the rule's group.
_RULES = tuple(
    re.compile(rule)
    for rule in (
        # Words: ab.cd is one, for want of a space after the full stop, and 12.cd is not.
        rf"{_L}{_LD}*(?:[.!?]{_L}{_LD}*)*",
        rf"{_PREFIXED}(?:{_LD}+|{_NUMBER})(?:[-_]{_PREFIXED}(?:{_LD}+|{_NUMBER}))*",
        r"[A-Za-z0-9][A-Za-z0-9%.,]*(?:-[A-Za-z0-9]+)+",
        rf"{_SLASHED}(?:/{_SLASHED}){{1,2}}",
        r"[A-Z]+(?:[+&][A-Z]+)+",
        # Apostrophes within words: Hawai'i, Q'eros; c'mon.
        rf"[A-Za-z]+[aeiouyAEIOUY]{_Q}[aeiouAEIOU][A-Za-z]*",
        rf"[A-HJ-XZn]{_Q}{_L}{{2,}}",
        rf"(?i:c{_Q}mon|cap{_Q}n|li{_Q}l|e{_Q}er|d{_Q}ye|ol{_Q}|dunkin{_Q}|somethin{_Q})(?!{_L})",
        rf"[dDjJlLyY]{_Q}(?![dmsDMS])",
        # Contractions.
        rf"(?i:({_L}+?)n{_Q}t(?!{_LD}))",
        rf"(?i:n{_Q}t)(?!{_LD})",
        rf"(?i:{_Q}(?:s|d|m|ll|re|ve))(?!{_L})",
        rf"(?i:{_Q}(?:em|til)|{_Q}t(?=is|was))",
        rf"(?i:{_Q}n{_Q}|{_Q}n(?!{_LD}))",
        rf"{_Q}\d\d(?:s|(?!\d))",
        # Abbreviations, initials.
        *(rf"{abbreviation}\." for abbreviation in _ABBREVIATIONS),
        r"(?i:art|ca|figs?|nos?|op|pp|prop)\.(?=\s*\d)",
        rf"{_INITIALS}\.",
        rf"[A-Za-z]\.(?!\s*$|\s+(?:{_OPENERS})(?:\s|$)|\s+<)",
        r"(?i:ph\.d\.)",
        rf"{_LD}+(?:[-_]{_LD}+)*\.(?=[,;:])",  # whatever it is, if the sentence goes on
        # Numbers, money.
        rf"[-+]?{_NUMBER}",
        r"(?:\d{1,4}[- ])?\d{1,4}/\d{1,4}",
        r"\(\d{3}\) ?\d{3}-\d{4}",
        r"[A-Z]*\$",
        # The net.
        r"(?i:https?://)[^\s<>|(){}]+",
        r"(?:[\w.%+-]+)@[\w-]+(?:\.[\w-]+)*|@[A-Za-z_]\w*",
        rf"#{_L}\w*",
        r"</?[A-Za-z!?][^<>]*>",
        r"&(?:amp|lt|gt);",
        # Signs.
        r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]](?!\w)",
        r"[?!]+",
        r"\.\.\.|\. \. \.|\u2026",
        r"-{2,}",
        r"\*+|#+|@+|_+|<<|>>|''|``|\|+",
        r"[\u201c\u201d\u00ab\u00bb\"]",
    )
)
_SIGNS = str.maketrans(
    {
        "(": "-lrb-",
        ")": "-rrb-",
        "[": "-lsb-",
        "]": "-rsb-",
        "{": "-lcb-",
        "}": "-rcb-",
        "\u2019": "'",
        "\u0092": "'",
        "\u2018": "`",
        "\u201c": "``",
        "\u201d": "''",
        "\u2013": "--",
        "\u2014": "--",
        "\u2026": "...",
        "\u00a3": "#",
        "\u20ac": "$",
        "\u00a2": "cents",
        "\u00bd": "1/2",
        "\u00bc": "1/4",
        "\u00be": "3/4",
        " ": "\u00a0",
    }
)


def ptb_tokens(caption: str) -> list[str]:
    """The tokens of a caption, as the COCO caption evaluation has them.

    Args:
        caption: as people, or a model, wrote it.

    Returns:
        Lower-case tokens without punctuation. As in the original, a token that holds a space ("22 3/4") holds a
        no-break space in its place.
    """
    found: list[str] = []
    at, end = 0, len(caption)
    while at < end:
        if space := _SPACE.match(caption, at):
            at = space.end()
            continue
        if plain := _PLAIN.match(caption, at):
            token, at = plain[0], plain.end()
        else:
            matches = [match for rule in _RULES if (match := rule.match(caption, at))]
            longest = max(matches, key=re.Match.end, default=None)
            token = caption[at] if longest is None else longest[longest.lastindex or 0]
            at += len(token)
        found += _written(token)
    return [token for token in found if token not in _PUNCTUATION]


def _written(token: str) -> tuple[str, ...]:
    """What stands in the output for a token."""
    lower = token.lower()
    if lower in _PARTED:
        return _PARTED[lower]
    if token == '"':
        return ("''",)
    if len(token) > 2 and not token.strip("-"):
        return ("--",)
    if token == ". . .":
        return ("...",)
    if lower in ("&amp;", "&lt;", "&gt;"):
        return ({"&amp;": "&", "&lt;": "<", "&gt;": ">"}[lower],)
    if token > "\uffff" and len(token) == 1:  # beyond the lexer's 16 bits: left out
        return ()
    return (lower.translate(_SIGNS),)
