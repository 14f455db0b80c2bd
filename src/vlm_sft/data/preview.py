"""The HTML page of a data check: pictures, questions, counts."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Sequence
from typing import Any

from PIL import Image

from vlm_sft.data.audit import AuditReport
from vlm_sft.data.images import decode_rgb
from vlm_sft.data.sample import ImageRef, LeftOut, Sample

THUMBNAIL_PIXELS = 320  # longest side
SHOWN = 24
SHOWN_LEFT_OUT = 20

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Data check: {{ title }}</title>
<style>
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c2126; --soft: #5b6670; --line: #d8dde2; --bar: #3b78c3; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181c; --ink: #e6eaee; --soft: #9aa6b1; --line: #333c45; --bar: #6ea4e8; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 76rem; padding: 1.5rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p.soft, .soft { color: var(--soft); } table { border-collapse: collapse; }
td, th { padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.bar { display: inline-block; height: .7rem; background: var(--bar); min-width: 1px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem; align-items: start; }
article { border: 1px solid var(--line); border-radius: .5rem; padding: .8rem; }
article img { max-width: 100%; display: block; margin: 0 0 .5rem; background: #fff; }
.text { white-space: pre-wrap; } dl { margin: .4rem 0 0; } dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0 0 .3rem; }
</style></head><body>
<h1>Data check: {{ title }}</h1>
<p class="soft">{% for line in descriptions %}{{ line }}<br>{% endfor %}</p>
<h2>Counts</h2>
<table>{% for name, value in counts %}
<tr><td>{{ name }}</td><td class="number">{{ value }}</td></tr>{% endfor %}</table>
<h2>Questions per image</h2>
<table><tr><th>questions</th><th>images</th><th></th></tr>{% for k, images, width in histogram %}
<tr><td class="number">{{ k }}</td><td class="number">{{ images }}</td>
<td><span class="bar" style="width: calc({{ width }} * min(20rem, 40vw))"></span></td></tr>{% endfor %}</table>
{% if left_out %}<h2>Left out</h2>
<table><tr><th>sample</th><th>reason</th><th>detail</th></tr>{% for item in left_out %}
<tr><td>{{ item.id }}</td><td>{{ item.reason }}</td><td>{{ item.detail }}</td></tr>{% endfor %}</table>
{% if more_left_out %}<p class="soft">and {{ more_left_out }} more in left_out.jsonl</p>{% endif %}{% endif %}
<h2>{{ cards|length }} samples</h2>
<p class="soft">A seeded draw over data sets, parts and numbers of questions per image.</p>
<div class="cards">{% for card in cards %}
<article>{% for picture in card.pictures %}
<img src="{{ picture }}" alt="image of {{ card.id }}" loading="lazy">{% endfor %}
{% for turn in card.history %}<div class="text soft">{{ turn.role }}: {{ turn.text }}</div>{% endfor %}
<div class="text"><b>{{ card.question }}</b></div>
<dl><dt>target (supervised)</dt><dd class="text">{{ card.target }}</dd>
<dt>all answers</dt><dd class="text">{{ card.answers }}</dd>
<dt>part</dt><dd>{{ card.part }}</dd><dt>questions on this image</dt><dd>{{ card.k }}</dd>
<dt>id</dt><dd>{{ card.id }}</dd></dl></article>{% endfor %}
</div></body></html>
"""


def render_preview(
    title: str,
    descriptions: Sequence[str],
    samples: Sequence[Sample],
    left_out: Sequence[LeftOut],
    report: AuditReport,
    seed: int = 0,
) -> str:
    """Render the preview as one self-contained HTML page; every text of the data is escaped.

    Args:
        title: the dataset argument.
        descriptions: one line a loaded split.
        samples: checked samples.
        left_out: those left out; the first of them are shown.
        report: their counts.
        seed: of the choice of samples.

    Returns:
        The page; thumbnails are embedded as JPEG data URIs of at most `THUMBNAIL_PIXELS` a side.
    """
    from jinja2 import Environment, StrictUndefined

    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(TEMPLATE)
    questions = _questions_per_image(samples)
    by_k = report.questions_per_image
    most = max(by_k.values(), default=1)
    return template.render(
        title=title,
        descriptions=descriptions,
        counts=count_rows(report),
        histogram=[(k, f"{images:,}", round(images / most, 4)) for k, images in by_k.items()],
        left_out=list(left_out)[:SHOWN_LEFT_OUT],
        more_left_out=max(0, len(left_out) - SHOWN_LEFT_OUT),
        cards=[_card(sample, questions[sample.image_key]) for sample in choose(samples, SHOWN, seed)],
    )


def count_rows(report: AuditReport) -> list[tuple[str, str]]:
    """The counts as name and value, for the page and for the terminal."""
    rows = [
        ("questions", f"{report.samples:,}"),
        ("images", f"{report.images:,}"),
        ("questions per image, mean", f"{report.mean_questions_per_image:.2f}"),
    ]
    rows += [(f"questions in {part}", f"{count:,}") for part, count in (report.splits or report.datasets).items()]
    if report.answer_characters:
        spread = report.answer_characters
        rows.append(
            (
                "answer length in characters",
                f"{spread['minimum']:g} to {spread['maximum']:g}, median {spread['median']:g}",
            )
        )
    if report.image_pixels:
        spread = report.image_pixels
        rows.append(
            (
                "image size in pixels",
                f"{spread['minimum']:,g} to {spread['maximum']:,.0f}, median {spread['median']:,.0f}",
            )
        )
    rows += [(f"{kind} tokens", f"{count:,}") for kind, count in report.tokens.items()]
    names = {"duplicate": "asked again, same answer", "contradiction": "asked again, another answer"}
    rows += [(names[kind], f"{count:,}") for kind, count in report.repeats.items()]
    rows += [(f"note: {note}", f"{count:,}") for note, count in report.notes.items()]
    rows += [(f"left out: {reason}", f"{count:,}") for reason, count in report.left_out.items()]
    return rows + [("left out, share", f"{report.left_out_fraction:.2%}")]


def choose(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """Draw samples in turn from every combination of data set, part and number of questions per image.

    Args:
        samples: to choose from.
        count: how many at most.
        seed: of the draw.
    """
    questions = _questions_per_image(samples)
    groups: dict[tuple[str, str, int], list[Sample]] = {}
    for sample in samples:
        k = min(4, questions[sample.image_key])  # four and more look alike
        groups.setdefault((sample.dataset, sample.split, k), []).append(sample)
    generator = random.Random(seed)
    queues = [groups[key] for key in sorted(groups)]
    for queue in queues:
        generator.shuffle(queue)
    chosen: list[Sample] = []
    while len(chosen) < count and any(queues):
        chosen += [queue.pop() for queue in queues if queue]
    return chosen[:count]


def _questions_per_image(samples: Sequence[Sample]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for sample in samples:
        counts[sample.image_key] = counts.get(sample.image_key, 0) + 1
    return counts


def _card(sample: Sample, questions: int) -> dict[str, Any]:
    part = " / ".join(text for text in (sample.dataset, sample.split, sample.metadata.get("question_type")) if text)
    return {
        "id": sample.id,
        "pictures": [thumbnail(image) for image in sample.images],
        "history": sample.history,
        "question": sample.question,
        "target": sample.target,
        "answers": " | ".join(sample.answers),
        "part": part,
        "k": questions,
    }


def thumbnail(ref: ImageRef) -> str:
    """A JPEG data URI of the image, at most `THUMBNAIL_PIXELS` a side.

    Raises:
        DataError: the image cannot be decoded.
    """
    picture = decode_rgb(ref.load(), ref.source)
    picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
