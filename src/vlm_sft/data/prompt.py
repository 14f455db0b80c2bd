"""Prompt template and image settings: they travel with a base or an adapter."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from vlm_sft.common import artifacts
from vlm_sft.common.errors import ModelError, quoted

SHORT_ANSWER_TEMPLATE = "{question}\nAnswer the question using a single word or phrase."
OVERSIZED = ("keep", "leave_out", "scale")  # what may be done with samples that are too long
LENGTH_KEYS = ("max_length", "oversized")
PROMPT_KEYS = ("template", "own_template", "system", "min_pixels", "max_pixels")  # what changes an answer's wording


@dataclass(frozen=True, slots=True)
class PromptSettings:
    """How a question and its image are put to the model; the same in training, evaluation and export.

    Attributes:
        template: the user's text, with `{question}` where the question goes.
        system: system text; "" leaves the model's chat template as it is.
        min_pixels, max_pixels: bounds of an image's area in pixels after resizing; None keeps the processor's own.
        max_new_tokens: upper bound of a generated answer, in tokens, where a benchmark does not say otherwise.
        own_template: instead of `template` for own data and free questions; None where both are asked alike.
        answer_tokens: tokens of the longest answer of the own data that it was trained on; None where there was none.
        max_length, oversized: what its training did with samples that are too long, as in its recipe.
    """

    template: str = SHORT_ANSWER_TEMPLATE
    system: str = ""
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_new_tokens: int = 32
    own_template: str | None = None
    answer_tokens: int | None = None
    max_length: int | None = None
    oversized: str = OVERSIZED[0]

    def __post_init__(self) -> None:
        for template in (self.template, self.own_template):
            if template is not None and "{question}" not in template:
                raise ModelError(
                    f"the prompt template {quoted(template)} has no {{question}}",
                    "put {question} where the question goes",
                )

    def template_for(self, own: bool) -> str:
        """The template of own data and free questions, or that of the benchmarks."""
        return self.template if self.own_template is None or not own else self.own_template

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, with the schema number; without what is done with samples that are too long."""
        return {"schema": 1, **{key: value for key, value in asdict(self).items() if key not in LENGTH_KEYS}}

    def save(self, folder: str | Path) -> Path:
        """Write prompt.json into `folder`."""
        given = {key: getattr(self, key) for key in LENGTH_KEYS if getattr(self, key) != getattr(PromptSettings(), key)}
        return artifacts.write_json(Path(folder) / artifacts.PROMPT, self.to_dict() | given)

    @classmethod
    def find(cls, folder: str | Path) -> PromptSettings | None:
        """Read prompt.json of a model or adapter folder; None when there is none.

        Raises:
            ModelError: the file holds keys or values that this version does not know.
        """
        path = Path(folder) / artifacts.PROMPT
        if not path.is_file():
            return None
        values = artifacts.read_json(path)
        known = {field.name: field.type for field in fields(cls)}
        unknown = set(values) - known.keys() - {"schema"}
        if unknown or values.get("schema") != 1:
            raise ModelError(
                f"{path} has unknown keys {sorted(unknown)} or schema {quoted(values.get('schema'))}", "update vlm-sft"
            )
        for key in values.keys() & known.keys():
            _check_type(path, key, values[key], str(known[key]))
        if values.get("oversized", OVERSIZED[0]) not in OVERSIZED:
            what = f"{path}: oversized is {quoted(values['oversized'])}, not one of {', '.join(OVERSIZED)}"
            raise ModelError(what, "copy the file again, or delete it")
        return cls(**{key: value for key, value in values.items() if key in known})

    def with_texts(self, template: str | None, system: str | None) -> PromptSettings:
        """Return a copy in which the texts that are given replace the present ones; a template holds for all data.

        Raises:
            ModelError: the template has no `{question}`.
        """
        return replace(
            self,
            template=self.template if template is None else template,
            own_template=self.own_template if template is None else None,
            system=self.system if system is None else system,
        )

    def differences(self, other: PromptSettings) -> list[str]:
        """Name what changes an answer and differs in `other`, with both values."""
        return [
            f"{name} {quoted(getattr(other, name), 300)} instead of {quoted(getattr(self, name), 300)}"
            for name in PROMPT_KEYS
            if getattr(self, name) != getattr(other, name)
        ]

    def with_pixels(self, min_pixels: int | None, max_pixels: int | None) -> PromptSettings:
        """Return a copy in which the bounds that are given replace the own ones."""
        return replace(
            self,
            min_pixels=self.min_pixels if min_pixels is None else min_pixels,
            max_pixels=self.max_pixels if max_pixels is None else max_pixels,
        )


def _check_type(path: Path, key: str, value: Any, kind: str) -> None:
    """Refuse a value that is not of its field's type, or a number below 1.

    Raises:
        ModelError: with the file, the key and the value.
    """
    name = kind.removesuffix(" | None")
    kinds: dict[str, type] = {"str": str, "int": int, "bool": bool}
    below = isinstance(value, int) and not isinstance(value, bool) and value < 1
    if name in kinds and (type(value) is not kinds[name] or below) and not (value is None and kind != name):
        raise ModelError(f"{path}: {key} is {repr(value)[:80]}, not {kind}", "copy the file again, or delete it")
