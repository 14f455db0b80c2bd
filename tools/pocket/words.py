"""What the pictures say: words by category, made-up words, numbers of every form."""

from __future__ import annotations

import string
from random import Random

from vlm_sft.data.demo.vocabulary import KINDS, PERCENT_MEASURES, SERIES_NAMES

WORDS: dict[str, tuple[str, ...]] = {
    name: tuple(words.split())
    for name, words in {
        "sign": "stop exit open closed push pull sale taxi bus police parking danger warning private welcome office "
        "toilet lift entry slow wait yield street road avenue park museum station airport harbour bridge "
        "tunnel school library",
        "shop": "bakery books coffee pizza burger pharmacy hotel bar cafe bank market flowers shoes jewels barber "
        "salon music toys fish meat bread cheese wine beer tea juice noodles sushi tacos grill kitchen garden "
        "studio fashion",
        "thing": "window pencil bottle basket ladder hammer ticket camera mirror blanket button candle carpet cushion "
        "engine hanger jacket kettle magnet napkin pillow ribbon saddle spoon towel umbrella violin wallet "
        "zipper",
        "nature": "river forest desert island valley meadow canyon glacier ocean storm thunder breeze sunrise autumn "
        "winter spring summer maple willow cactus orchid tulip daisy pebble coral amber crystal",
        "name": "Anna Boris Clara David Emma Felix Greta Henry Irene Jonas Karen Louis Maria Nora Oscar Paula Quinn "
        "Robert Sofia Thomas Ulla Victor Wendy Xavier Yusuf Zoe Smith Brown Jones Miller Garcia Lopez Kumar "
        "Tanaka",
        "quality": "big small fresh hot cold new old fast free best super happy lucky royal grand magic golden silver "
        "smart clean quiet sweet spicy crispy tasty daily local organic natural classic modern vintage",
    }.items()
}
_CHART_WORDS = (
    tuple(word for kind in KINDS for word in (*kind.labels, *kind.measures) if not word.isdigit())
    + PERCENT_MEASURES
    + tuple(name for names in SERIES_NAMES for name in names if not name.isdigit())
)
_ALL = tuple(word for words in WORDS.values() for word in words) + _CHART_WORDS

_LISTED = frozenset(word.lower() for word in _ALL)

_VOWELS, _CONSONANTS = "aeiou", "bcdfghjklmnprstvwxyz"


def number(rng: Random) -> str:
    """A number as charts and signs print it."""
    form = rng.random()
    if form < 0.5:
        return str(rng.randrange(10 ** rng.randint(1, 4)))
    if form < 0.65:
        return f"{rng.uniform(0, 100):.1f}"
    if form < 0.75:
        return f"{rng.randrange(101)}%"
    if form < 0.82:
        return f"{rng.uniform(0, 100):.1f}%"
    if form < 0.88:
        return f"${rng.randrange(100)}.{rng.randrange(100):02d}"
    if form < 0.93:
        return f"{rng.randrange(24)}:{rng.randrange(60):02d}"
    return f"{rng.randint(1, 99)},{rng.randrange(1000):03d}"


def made_up(rng: Random) -> str:
    """Letters that form no word: half of them can be pronounced."""
    length = rng.randint(2, 8)
    if rng.random() < 0.5:
        start = rng.randrange(2)
        return "".join(rng.choice(_VOWELS if (place + start) % 2 else _CONSONANTS) for place in range(length))
    return "".join(rng.choice(string.ascii_lowercase) for _ in range(length))


def plate(rng: Random) -> str:
    """A licence plate or an article number."""
    letters = "".join(rng.choice(string.ascii_uppercase) for _ in range(rng.randint(1, 3)))
    return f"{letters}{rng.choice(' -')}{rng.randrange(10 ** rng.randint(2, 4))}"


def is_listed(text: str) -> bool:
    """Whether a text is one of the words of the lists, in any letters; what is made up may be one by chance."""
    return text.lower() in _LISTED


def word(rng: Random, invented: float = 0.4) -> str:
    """A word in small, capital or title letters; `invented` is the share of made-up ones."""
    text = made_up(rng) if rng.random() < invented else rng.choice(_ALL)
    return rng.choice((str, str.lower, str.upper, str.title, str.capitalize))(text)


def text(rng: Random) -> str:
    """Anything that is read as one piece: a word, a number, a plate."""
    form = rng.random()
    if form < 0.6:
        return word(rng)
    return number(rng) if form < 0.93 else plate(rng)
