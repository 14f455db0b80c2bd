"""easy-VQA: 5,000 small pictures of one coloured shape, from the PyPI package easy-vqa."""

from __future__ import annotations

import importlib
from types import ModuleType

from vlm_sft.common.errors import DataError
from vlm_sft.data.sample import ImageRef, LeftOut, Sample
from vlm_sft.data.sources.rows import RowProblem, clean_text, finish_split, left_out
from vlm_sft.data.sources.spec import DatasetSpec
from vlm_sft.data.sources.splits import HOLD_OUT_FRACTION, LoadedSplit, plan_split
from vlm_sft.data.threads import map_images

SHAPES = {"circle", "rectangle", "triangle"}


def question_type(answer: str) -> str:
    """What a question asks for, told from its answer: "yes/no", "shape" or "colour"."""
    if answer in {"yes", "no"}:
        return "yes/no"
    return "shape" if answer in SHAPES else "colour"


def load(spec: DatasetSpec, split: str) -> LoadedSplit:
    """Load one split of easy-VQA; validation is a tenth of the train images, which train then excludes.

    Args:
        spec: name "easy_vqa".
        split: "train", "validation" or "test".

    Raises:
        DataError: the package is not installed.
    """
    package = _package()
    plan = plan_split(("train", "test"), split, spec.name)
    texts, answers, image_ids = getattr(package, f"get_{plan.source}_questions")()
    paths = getattr(package, f"get_{plan.source}_image_paths")()
    ids = sorted(paths)
    refs = dict(
        zip(
            ids,
            map_images(lambda i: ImageRef.from_path(paths[i]), ids, len(ids), "hashing easy-VQA images"),
            strict=True,
        )
    )
    samples: list[Sample] = []
    left: list[LeftOut] = []
    for index, (text, answer, image_id) in enumerate(zip(texts, answers, image_ids, strict=True)):
        sample_id = f"easy_vqa/{plan.source}/{index:06d}"
        try:
            if image_id not in refs:
                raise RowProblem("image missing", f"the package has no image {image_id}")
            target = clean_text(answer, "answer")
            samples.append(
                Sample(
                    sample_id,
                    "easy_vqa",
                    "",
                    (refs[image_id],),
                    clean_text(text, "question"),
                    target,
                    (target,),
                    metadata={"question_type": question_type(target)},
                )
            )
        except RowProblem as problem:
            left.append(left_out(sample_id, f"easy_vqa {plan.source} question {index}", problem))
    return finish_split(plan, samples, left, HOLD_OUT_FRACTION, f"easy-VQA {plan.source} from the easy-vqa package")


def _package() -> ModuleType:
    try:
        return importlib.import_module("easy_vqa")
    except ImportError as error:
        raise DataError(
            "easy_vqa needs the package easy-vqa, which is not installed", "pip install vlm-sft[easy-vqa]"
        ) from error
