"""The words of captions, as the COCO evaluation cuts them, without the Java that it needs for that."""

from __future__ import annotations

import re

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_PLAIN = str.maketrans(
    {"‘": "'", "’": "'", "`": "'", "“": '"', "”": '"', "–": " - ", "—": " - ", "…": " ", "£": "#", "€": "$"}
    | {"¢": " cents ", "½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 "}
)
_IN_TWO = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "gimme": "gim me"} | {
    "lemme": "lem me",
    "'tis": "'t is",
    "'twas": "'t was",
}
# Abbreviations whose full stop belongs to them; those of the second line only where they begin with a capital.
_SHORT = (
    "st ste mr mrs ms messrs dr ave blvd rd ft sq mt jr sr co cos inc corp ltd bros etc vs al dept est gov sen rep gen "
    "col lt lieut capt sgt maj cpl pvt cmdr adm brig supt det insp prof rev hon pres treas atty ext intl univ assn mfg "
    "cie plc rt ph jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri ariz ark calif conn "
    "fla ga ind kan ky mich minn mont neb nev okla penn tenn va vt wis wyo mo md"
).replace(" ", "|")
_SHORT_NAMES = "Ala|Colo|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"
_WORD = re.compile(
    rf"""
      <[a-z/!?][^<>\n]*>                                   # a tag
    | https?://[^\s"<>]*[^\s"<>.,;:!?')]|www\.[\w.-]*\w   # an address
    | \w[\w.+-]*@\w[\w-]*(?:\.\w+)+
    | [@\#][a-z_]\w*                                       # a name, a topic
    | [:;=]-?[()]                                          # a smile
    | \b(?-i:[A-Z]+(?:&[A-Z]+)+)(?!\w)                     # AT&T, in capitals only
    | \b(?:[a-z]\.){{2,}}(?!\w)                            # a.m.
    | \bph\.d\.
    | \b(?:{_SHORT}|(?-i:{_SHORT_NAMES})|[a-z])\.(?!\w)
    | \b(?:nos?|pp|fig|art)\.(?=\s*\d)|\b\w+\.(?=[,;:])
    | (?<!\w)'(?:em|til|cause|tis|twas|\d\ds?)(?!\w)   # letters are left out in front
    | \b(?:[dol]'\w\w+|ma'am|ne'er|ol'|y'(?=(?:all|know)\b))|'n'|'n(?!\w)
    | \w+?(?=n't\b)|n't\b|'(?:s|re|ve|ll|d|m)\b
    | \d+(?::\d\d)+(?=[ap]m\b)                             # 3:45 of 3:45pm
    | (?<![\w.])[-+]?\.?\d+(?:[-.:,/]\d+)*(?!-?\w)         # a number, a date, a time
    | \w+(?:(?:[-./]|(?<=\d),(?=\d))\w+)*(?:\+\+|(?<=\bc)\#)?
    | [!?]{{2,}}|\*+
    | [()\[\]{{}}$\#%&+=~^|\\/<>@*°™©®¥]
    """,
    re.VERBOSE | re.IGNORECASE,
)


def words(text: str) -> str:
    """A caption in the form in which captions are compared: its words in lower case, with one space between them.

    Source: what Stanford's PTBTokenizer 3.4.1 makes of a caption when the COCO evaluation calls it (Chen et al. 2015,
    pycocoevalcap `tokenizer/ptbtokenizer.py`), written as rules. Full stops, commas, colons, quotation marks, dashes
    and single marks of exclamation and question go; brackets become `-lrb-`, …, other signs stay as words. Full stops
    of abbreviations, points and commas of numbers, and hyphens stay within a word; `n't`, `'s`, `'re`, … are words.
    Rare abbreviations, addresses and smiles may be cut otherwise than there.
    """
    found = (part.group().lower() for part in _WORD.finditer(text.translate(_PLAIN)))
    return " ".join(_IN_TWO.get(word, "".join(_BRACKETS.get(sign, sign) for sign in word)) for word in found)
