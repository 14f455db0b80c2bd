"""Questions about how a chart looks: its colours, its parts, its title, what stands where."""

from __future__ import annotations

from vlm_sft.data.demo.chart_reader import ChartQuestion, ChartReader, Maker, drawn_parts, make_question


def _colour_of(ask: ChartReader) -> ChartQuestion | None:
    if ask.part == "row":
        return None
    if ask.spec.category_paints:
        owner, paint = ask.rng.choice(list(zip(ask.spec.categories, ask.spec.category_paints, strict=True)))
    else:
        one = ask.rng.choice(ask.spec.series)
        assert one.paint is not None
        owner, paint = one.name, one.paint
    parts = ask.part + ("s" if ask.part == "bar" and not ask.spec.category_paints else "")
    verb = "are" if parts == "bars" else "is"
    spelling = ask.rng.choice(("color", "colour"))
    if not owner:
        return make_question("colour", f"What {spelling} {verb} the {parts}?", paint.name)
    text = ask.text(
        "What {spelling} {verb} the {parts} for {owner}?",
        "What {spelling} stands for {owner}?",
        spelling=spelling,
        verb=verb,
        parts=parts,
        owner=owner,
    )
    return make_question("colour", text, paint.name)


def _owner_of_colour(ask: ChartReader) -> ChartQuestion | None:
    if ask.spec.category_paints:
        category, paint = ask.rng.choice(list(zip(ask.spec.categories, ask.spec.category_paints, strict=True)))
        text = ask.text(
            "Which {noun} does the {colour} {part} represent?", "Which {noun} is shown in {colour}?", colour=paint.name
        )
        return make_question("colour", text, category)
    if ask.single or ask.part == "row":
        return None
    one = ask.rng.choice(ask.spec.series)
    assert one.paint is not None
    text = ask.text("What is shown in {colour}?", "What does {colour} stand for?", colour=one.paint.name)
    return make_question("colour", text, one.name)


def _value_of_colour(ask: ChartReader) -> ChartQuestion | None:
    if not ask.spec.category_paints:
        return None
    index = ask.rng.randrange(len(ask.spec.categories))
    text = ask.text(
        "What is the value of the {colour} {part}?",
        "How much does the {colour} {part} show?",
        colour=ask.spec.category_paints[index].name,
    )
    return make_question("colour", text, ask.spec.series[0].values[index])


def _how_many(ask: ChartReader) -> ChartQuestion | None:
    categories = len(ask.spec.categories)
    if ask.rng.random() < 0.5:
        text = ask.text("How many {plural} are shown?", "How many {plural} are there?")
        return make_question("structure", text, categories)
    if ask.part == "row":
        return make_question("structure", f"How many rows of {ask.spec.plural} does the table have?", categories)
    text = ask.text("How many {part}s are there in total?", "How many {part}s does the chart have?")
    return make_question("structure", text, drawn_parts(ask.spec))


def _title(ask: ChartReader) -> ChartQuestion | None:
    if not ask.spec.title:
        return None
    return make_question("structure", ask.text("What is the title?", "What is the title of the chart?"), ask.spec.title)


def _at_the_end(ask: ChartReader) -> ChartQuestion | None:
    if ask.part == "slice":
        return None
    first = ask.rng.random() < 0.5
    sides = ("top", "bottom") if ask.spec.chart_type in ("horizontal_bar", "table") else ("far left", "far right")
    text = ask.text("Which {noun} is at the {side}?", side=sides[0 if first else 1])
    return make_question("structure", text, ask.spec.categories[0 if first else -1])


# Each maker with its weight.
APPEARANCE: tuple[tuple[Maker, float], ...] = (
    (_colour_of, 1.5),
    (_owner_of_colour, 2),
    (_value_of_colour, 1.5),
    (_how_many, 1.5),
    (_title, 0.4),
    (_at_the_end, 0.8),
)
