"""Questions about synthetic signs, each with ten answers as different people would give them.

In the spirit of TextVQA (Singh et al. 2019, arXiv 1904.08920, section 3): most of ten annotators agree, some read a
letter wrongly, leave a word out, or keep the upper case of the sign. The target is the answer that most of them gave.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from random import Random

from vlm_sft.data.demo.signs import SIGN_TYPES, SignSpec

ANNOTATORS = 10
MAX_ATTEMPTS = 200
# How many annotators agree -> how often, in percent. VQA accuracy of the target is 1 from four on, 0.9 and 0.6 below.
AGREEMENT = {10: 34, 9: 22, 8: 14, 7: 10, 6: 7, 5: 5, 4: 4, 3: 3, 2: 1}

# Role of a line -> phrasings of the question for it.
ROLE_QUESTIONS: dict[str, tuple[str, ...]] = {
    "notice": ("what does the large text say?", "what are we told by this sign?"),
    "note": ("what is the note under the large text?", "what does the small text say?"),
    "name": ("what is the name of the shop?", "whose shop is this?", "what is this store called?"),
    "shop": ("what kind of shop is this?", "what does this shop sell?"),
    "item": ("what item is on the price tag?", "what is sold at this price?"),
    "price": ("what is the price?", "how much does it cost?", "what price is shown?"),
    "region": ("which state is the plate from?", "what state is named on the license plate?"),
    "plate": ("what is the license plate number?", "what does the license plate read?"),
    "bus number": ("what number is on the bus?", "what is the bus number?", "which line is this bus?"),
    "destination": ("where does the bus go?", "what is the destination of the bus?"),
    "time": ("what time is it?", "what time does the screen show?"),
    "date": ("what is the date?", "which date does the screen show?"),
    "brand": ("what is the brand?", "what brand is on the label?"),
    "product": ("what product is this?", "what is in the package?"),
    "amount": ("how much is in the package?", "what amount is on the label?"),
    "street": ("what is the name of the street?", "what street is this?"),
    "block": ("what number is on the street sign?", "which block is this?"),
    "limit text": ("what is written above the number?", "what words are on the sign?"),
    "limit": ("what is the speed limit?", "what number is on the sign?"),
    "player": ("what name is on the jersey?", "what is the name of the player?"),
    "number": ("what number is on the jersey?", "what is the player's number?"),
    "title": ("what is the title of the book?", "what is this book called?"),
    "author": ("who wrote this book?", "who is the author of the book?"),
}


@dataclass(frozen=True, slots=True)
class SignQuestion:
    """A question with its ten answers.

    Attributes:
        target: the most common answer.
        answers: of ten annotators.
        question_type: what is asked for: the role of a line, "whole", "top", "bottom", "first word" or "last word".
    """

    text: str
    target: str
    answers: tuple[str, ...]
    question_type: str


def sign_questions(spec: SignSpec, rng: Random, count: int) -> list[SignQuestion]:
    """Ask `count` different things about a sign.

    Args:
        spec: the sign.
        rng: the only source of randomness.
        count: how many questions, at most four.
    """
    facts = _facts(spec)
    # What a line means is asked more often than where a word stands.
    weights = [4.0 if kind in ROLE_QUESTIONS else 1.0 for kind, _, _ in facts]
    questions = []
    for _ in range(count):
        index = rng.choices(range(len(facts)), weights=weights)[0]
        kind, phrases, answer = facts.pop(index)
        weights.pop(index)
        answers = annotate(answer, rng)
        questions.append(SignQuestion(rng.choice(phrases), Counter(answers).most_common(1)[0][0], answers, kind))
    return questions


def _facts(spec: SignSpec) -> list[tuple[str, tuple[str, ...], str]]:
    """Everything that can be asked: (question type, phrasings, answer as it stands on the sign)."""
    thing = SIGN_TYPES[spec.sign_type].thing
    whole = " ".join(line.text for line in spec.lines)
    words = whole.split()
    facts = [(line.role, ROLE_QUESTIONS[line.role], line.text) for line in spec.lines]
    facts.append(("whole", (f"what does the {thing} say?", f"what is written on the {thing}?"), whole))
    facts.append(("first word", (f"what is the first word on the {thing}?", "which word comes first?"), words[0]))
    facts.append(("last word", (f"what is the last word on the {thing}?", "which word comes last?"), words[-1]))
    top, bottom = spec.lines[0].text, spec.lines[-1].text
    word = "word" if " " not in top else "text"
    facts.append(("top", (f"what is the {word} at the top?", "what is written at the top?"), top))
    word = "word" if " " not in bottom else "text"
    facts.append(("bottom", (f"what is the {word} at the bottom?", "what is written at the bottom?"), bottom))
    return facts


def annotate(text: str, rng: Random) -> tuple[str, ...]:
    """Ten answers of people who read a text.

    Args:
        text: what the sign says.
        rng: decides how many agree, and on what the others differ.

    Returns:
        Ten answers in random order. Those who agree write lower case and outnumber every variant.
    """
    usual = text.lower()
    agreeing = rng.choices(tuple(AGREEMENT), weights=tuple(AGREEMENT.values()))[0]
    # A variant may be shared, but never by as many people as the usual answer.
    counts: Counter[str] = Counter()
    for _ in range(MAX_ATTEMPTS):
        missing = ANNOTATORS - agreeing - counts.total()
        if missing == 0:
            break
        variant = _variant(text, rng)
        repeat = min(rng.choice((1, 1, 1, 2, 3)), missing, agreeing - 1 - counts[variant])
        if variant != usual and repeat > 0:
            counts[variant] += repeat
    # Very short texts do not have enough variants.
    answers = [*counts.elements(), *[usual] * (ANNOTATORS - counts.total())]
    rng.shuffle(answers)
    return tuple(answers)


def _variant(text: str, rng: Random) -> str:
    """What one person writes who does not give the usual answer."""
    usual = text.lower()
    words = usual.split()
    choice = rng.random()
    if choice < 0.25 and text != usual:
        return text
    if choice < 0.4 and len(words) > 1:
        return rng.choice((words[0], words[-1], " ".join(words[:-1])))
    if choice < 0.5 and usual.startswith("$"):
        return usual[1:]
    if choice < 0.6:
        return f"the {usual}" if usual.isalpha() and rng.random() < 0.5 else f"{usual}."
    if choice < 0.66:
        return "unanswerable"
    return _misspelt(usual, rng)


def _misspelt(text: str, rng: Random) -> str:
    """One character doubled, dropped, or mistaken for its neighbour."""
    position = rng.randrange(len(text))
    character = text[position]
    if character.isdigit():
        return text[:position] + str((int(character) + rng.randint(1, 9)) % 10) + text[position + 1 :]
    kind = rng.choice(("double", "drop", "swap"))
    if kind == "double" or len(text) < 3:
        return text[:position] + character + text[position:]
    if kind == "drop":
        return text[:position] + text[position + 1 :]
    return text[:position] + text[position : position + 2][::-1] + text[position + 2 :]
