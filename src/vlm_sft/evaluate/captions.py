"""Rules of captions with several references: CIDEr, BLEU-4 and ROUGE-L, computed by pycocoevalcap without Java."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_sft.common.errors import EvaluationError
from vlm_sft.evaluate.caption_words import words

if TYPE_CHECKING:
    import numpy as np

EXTRA = "pip install 'vlm-sft[captions]'"
CAPTION_RULES = {
    "cider": "CIDEr against all references, 0 to 10",
    "bleu4": "BLEU-4 of each caption against all references, 0 to 1",
    "rouge_l": "ROUGE-L against all references, 0 to 1",
}
_ORDER = 4  # words of the longest n-gram

_Row = Mapping[str, Any]


def caption_scores(rule: str, rows: Sequence[_Row], verdicts: Path | None = None) -> list[float]:
    """Score captions by one of `CAPTION_RULES`; the words are those of `words`.

    Source: Vedantam et al. 2015 (CIDEr, arXiv 1411.5726), with the clipping and length penalty of CIDEr-D; Papineni et
    al. 2002 (BLEU), with the closest reference length; Lin 2004 (ROUGE-L, beta 1.2). All as the COCO evaluation
    (Chen et al. 2015, arXiv 1504.00325) computes them, by its code in pycocoevalcap.

    Args:
        rule: "cider", whose weights of n-grams come from the references of all rows; "bleu4" or "rouge_l".
        rows: each with `prediction` and `answers`, the references.
        verdicts: nothing is kept there.

    Returns:
        One score a row.

    Raises:
        EvaluationError: pycocoevalcap is not installed.
    """
    require_captions()
    pairs = [(words(row["prediction"]), [words(answer) for answer in row["answers"]]) for row in rows]
    if rule == "cider":
        return _cider(pairs)
    if rule == "rouge_l":
        from pycocoevalcap.rouge.rouge import Rouge

        rouge = Rouge()
        return [float(rouge.calc_score([text], references)) if text else 0.0 for text, references in pairs]
    return [min(1.0, float(score)) for score in _bleu(pairs).compute_score(option="closest")[1][_ORDER - 1]]


def _cider(pairs: Sequence[tuple[str, list[str]]]) -> list[float]:
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer = CiderScorer(n=_ORDER)
    for pair in pairs:
        scorer += pair
    scorer.compute_doc_freq()
    return [float(score) for score in scorer.compute_cider()]


def _bleu(pairs: Sequence[tuple[str, list[str]]]) -> Any:
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=_ORDER)
    for pair in pairs:
        scorer += pair
    return scorer


def corpus_bleu(rows: Sequence[_Row]) -> dict[str, Any]:
    """BLEU-4 of all captions together, which papers report, with a bootstrap interval over images.

    Returns:
        `n`, `accuracy` (the score, 0 to 1), `interval` ([low, high], 95 %).
    """
    import numpy as np

    from vlm_sft.evaluate import statistics

    pairs = [(words(row["prediction"]), [words(answer) for answer in row["answers"]]) for row in rows]
    counted = _bleu(pairs).ctest
    nearest = [min((abs(length - one["testlen"]), length) for length in one["reflen"])[1] for one in counted]
    columns = [
        [*one["correct"], *one["guess"], one["testlen"], length] for one, length in zip(counted, nearest, strict=True)
    ]
    clusters = [statistics.cluster_of(row) for row in rows]
    score, interval = statistics.bootstrap(np.asarray(columns, dtype=float), clusters, _bleu_of_counts)
    return {"n": len(rows), "accuracy": score, "interval": list(interval)}


def _bleu_of_counts(sums: np.ndarray) -> np.ndarray:
    """BLEU-4 of summed counts: matching n-grams of 1 to 4 words, all of them, length, nearest reference length."""
    import numpy as np

    correct, guessed = sums[..., :_ORDER], sums[..., _ORDER : 2 * _ORDER]
    length, reference = sums[..., 2 * _ORDER], sums[..., 2 * _ORDER + 1]
    precision = np.prod((correct + 1e-15) / (guessed + 1e-9), axis=-1) ** (1 / _ORDER)
    ratio = (length + 1e-15) / (reference + 1e-9)
    bleu: np.ndarray = precision * np.exp(np.minimum(0.0, 1 - 1 / ratio))
    return bleu


def require_captions() -> None:
    """Make sure that the library is there.

    Raises:
        EvaluationError: it is not.
    """
    try:
        import pycocoevalcap.cider.cider_scorer  # noqa: F401
    except ImportError as error:
        rules = ", ".join(CAPTION_RULES)
        raise EvaluationError(f"--metric {rules}: pycocoevalcap is not installed ({error})", EXTRA) from error
