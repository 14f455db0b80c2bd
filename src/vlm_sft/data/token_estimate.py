"""Token counts of texts without a tokenizer: expected ones for forecasts, careful ones for budgets and limits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenEstimate:
    """How many tokens texts and the chat template around them are taken for.

    Attributes:
        prefix: of the template around the images that questions share.
        question, answer: of the template around one question, and around one answer.
        characters_per_token: of English text.
    """

    prefix: int
    question: int
    answer: int
    characters_per_token: int

    def text(self, *texts: str) -> int:
        """Tokens of some texts, without the template."""
        return sum(len(text) // self.characters_per_token for text in texts)


EXPECTED = TokenEstimate(18, 6, 2, 4)
CAREFUL = TokenEstimate(24, 24, 1, 3)  # the template's share of a question covers a short instruction too
