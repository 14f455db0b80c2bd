"""Tables of rows with columns of images: from the Hub or from local parquet, memory-mapped.

The published sets share this reader; each gives a `TableSource` that says its columns and how a row becomes samples.
"""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_sft.common.errors import DataError, quoted
from vlm_sft.data.sample import ImageRef, LeftOut, Sample
from vlm_sft.data.sources.arrow_tables import native_file
from vlm_sft.data.sources.files import files_by_split
from vlm_sft.data.sources.rows import RowProblem, finish_split, left_out
from vlm_sft.data.sources.spec import DatasetSpec
from vlm_sft.data.sources.splits import LoadedSplit, plan_split
from vlm_sft.data.sources.stream import first_rows, split_stream
from vlm_sft.data.threads import map_images

if TYPE_CHECKING:
    from datasets import Dataset

PROBE_SECONDS = 6.0  # a Hub that has not answered by then counts as unreachable


Row = Mapping[str, Any]
ToSamples = Callable[[Row, tuple[ImageRef, ...], str], Sequence[Sample | RowProblem]]


def one_question(to_sample: Callable[[dict[str, Any], ImageRef, str], Sample]) -> ToSamples:
    """The reader of a table that has one question and one image a row."""
    return lambda row, images, sample_id: [to_sample(dict(row), images[0], sample_id)]


@dataclass(frozen=True, slots=True)
class TableSource:
    """A published data set of rows with images.

    Attributes:
        name: the data set.
        title: its name for people.
        hub_ids: Hub ids in the order in which they are tried.
        official: for each of our splits, the split's name on the Hub. Splits that cannot be used are not in it.
        roles: for each split that a local file may be named after, the split of ours that it serves.
        columns: required columns besides those of images.
        hold_out_fraction: share of the train images held out where there is no validation split.
        to_samples: (row, images, id) -> the samples of a row, or why one cannot be used; raises RowProblem.
        config: the configuration on the Hub, where a repository has several; several are put in a row.
        image_columns: where images are.
        images_of: (row) -> which of these a row needs.
        passed_over: beginnings of the names of local files that are no part of the benchmark.
    """

    name: str
    title: str
    hub_ids: tuple[str, ...]
    official: Mapping[str, str]
    roles: Mapping[str, str]
    columns: tuple[str, ...]
    hold_out_fraction: float
    to_samples: ToSamples
    config: str | tuple[str, ...] | None = None
    image_columns: tuple[str, ...] = ("image",)
    images_of: Callable[[Row], Sequence[str]] = lambda row: ("image",)
    passed_over: tuple[str, ...] = ()

    @property
    def all_columns(self) -> tuple[str, ...]:
        """Columns of images, then those of texts."""
        return (*self.image_columns, *self.columns)


@dataclass(frozen=True, slots=True)
class RowBytes:
    """Reads one encoded image of a row when called; a small object, so that data loader workers can receive it."""

    rows: Dataset
    index: int
    column: str
    folder: Path | None

    def __call__(self) -> bytes:
        """Return the bytes; a row that only names a file is read from beside the table."""
        image = self.rows[self.index][self.column]
        if image is None:
            raise FileNotFoundError("the row has no image")
        if image["bytes"] is not None:
            return bytes(image["bytes"])
        if not image["path"] or self.folder is None:
            raise FileNotFoundError("the row has no image")
        # A table may stand in data/ beside the folder that its paths begin with.
        near = self.folder / image["path"]
        return (near if near.is_file() else self.folder.parent / image["path"]).read_bytes()


def load_table(source: TableSource, spec: DatasetSpec, split: str) -> LoadedSplit:
    """Load one split of a published data set from the Hub, or from the parquet files of `spec.path`.

    Args:
        source: the data set.
        spec: its path may name a parquet file or a folder of them.
        split: "train", "validation" or "test".

    Raises:
        DataError: no network and nothing cached, a missing split, file or column, or no usable row.
    """
    if spec.path is None:
        plan = plan_split(source.official, split, source.name)
        dataset, hub_id = open_hub(source, source.official[plan.source], spec.stream)
        label, folder = f"{hub_id} {source.official[plan.source]}", None
        if spec.stream is not None:
            label += f" (streamed: its first rows, {len(dataset):,} at most, mixed within a buffer)"
        wheres = [(0, label)]
    else:
        files = _local_files(source, spec.path)
        plan = plan_split(files, split, f"{source.name}@{spec.path}")
        dataset, counts = open_parquet(files[plan.source], source.image_columns, source.columns, plan.source)
        label, folder = str(spec.path), files[plan.source][0].parent
        starts = [0, *accumulate(counts)]
        wheres = [(start, str(file)) for start, file in zip(starts, files[plan.source], strict=False)]
    official = next(name for name, role in source.roles.items() if role == plan.source)
    samples, left = _read_rows(source, dataset, official, wheres, folder)
    if spec.stream is not None:
        plan, samples = split_stream(plan, samples, source.hold_out_fraction)
    return finish_split(plan, samples, left, source.hold_out_fraction, f"{source.title} {official} from {label}")


def _local_files(source: TableSource, path: Path) -> dict[str, list[Path]]:
    found_by_split = files_by_split(path, (".parquet",)).items()
    named = {
        name: [file for file in found if not file.name.startswith(source.passed_over)] for name, found in found_by_split
    }
    named = {name: found for name, found in named.items() if found}
    files = {source.roles[name]: found for name, found in named.items() if name in source.roles}
    if not files:
        raise DataError(
            f"{path} holds only {source.title} files without public answers: {', '.join(sorted(named))}",
            f"pass the {' or '.join(source.roles)} files",
        )
    return files


def open_parquet(
    files: list[Path], image_columns: tuple[str, ...], columns: tuple[str, ...], split: str
) -> tuple[Dataset, list[int]]:
    """Open parquet files as one memory-mapped table (converted once into the datasets cache).

    Args:
        files: the files, in order.
        image_columns, columns: columns of images and others that must be there; what else there is is not loaded.
        split: what the files hold, for the progress bar of the conversion.

    Returns:
        The table with undecoded images, and the number of rows of each file.

    Raises:
        DataError: a file is no parquet or misses a column.
    """
    import datasets
    import pyarrow
    import pyarrow.parquet

    counts, problems, columns = [], [], (*image_columns, *columns)
    for file in files:
        try:
            with native_file(file) as stream, pyarrow.parquet.ParquetFile(stream) as table:
                there, count = table.schema_arrow.names, table.metadata.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            problems.append(f"{file} cannot be read as parquet: {error}")
            continue
        counts.append(count)
        problems += [
            f"{file} has no column {quoted(name)} (it has: {', '.join(there)})" for name in columns if name not in there
        ]
    if problems:
        raise DataError("; ".join(problems), f"the columns needed are {', '.join(columns)}")
    try:
        names = [str(file) for file in files]
        table = datasets.Dataset.from_parquet(names, split=datasets.NamedSplit(split), columns=list(columns))
    except (datasets.exceptions.DatasetGenerationError, pyarrow.ArrowException, OSError) as error:
        cause = error.__cause__ or error
        raise DataError(
            f"{files[0].parent}: the parquet files cannot be read: {cause}",
            "download them again; the files of one split must share one schema",
        ) from error
    return _undecoded(table, image_columns, str(files[0])), counts


def open_hub(source: TableSource, hub_split: str, rows: int | None = None) -> tuple[Dataset, str]:
    """Open a split of a Hub data set, from the local cache where it is already there.

    Args:
        source: the data set.
        hub_split: the split's name on the Hub.
        rows: fetch so many rows only; None for all.

    Returns:
        The memory-mapped table with undecoded images, and the Hub id it came from.

    Raises:
        DataError: the Hub cannot be reached and nothing is cached, no id can be loaded, or a number of rows is
            asked for of a set of several configurations.
    """
    if rows is not None and isinstance(source.config, tuple):
        raise DataError(f"{source.name}@stream: it has {len(source.config)} parts", f"write {source.name} alone")
    online = hub_reachable()
    failures = []
    for hub_id in source.hub_ids:
        try:
            with offline(not online):
                table = _rows_of(source, hub_id, hub_split, rows)
            _require_columns(table, source, hub_id)
            return _undecoded(table.select_columns(list(source.all_columns)), source.image_columns, hub_id), hub_id
        except DataError as error:
            failures.append(error.what)
        except Exception as error:  # the Hub client raises dozens of unrelated classes
            failures.append(f"{hub_id}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    fix = (
        f"pass {source.name}@FOLDER with parquet files in that schema (columns {', '.join(source.all_columns)}), "
        "or set HF_HOME to the cache of a machine that has downloaded it"
    )
    if not online:
        raise DataError(
            f"{source.title} is on the Hugging Face Hub ({source.hub_ids[0]}), which cannot be reached "
            "from here, and it is not in the local cache",
            fix,
        )
    raise DataError(f"{source.title} cannot be loaded from the Hub: {'; '.join(failures)}", fix)


def _rows_of(source: TableSource, hub_id: str, hub_split: str, rows: int | None) -> Dataset:
    """A split on the Hub: all of it, or its first rows."""
    import datasets

    if rows is not None:
        assert not isinstance(source.config, tuple)
        return first_rows(hub_id, source.config, hub_split, rows)
    configs = source.config if isinstance(source.config, tuple) else (source.config,)
    tables = [datasets.load_dataset(hub_id, config, split=hub_split) for config in configs]
    return tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables)


def hub_reachable() -> bool:
    """True when the Hub answers within seconds; False at once when HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    answered: list[bool] = []

    def probe() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)
            answered.append(True)
        except Exception:  # no name server, no route, refused, a proxy's answer: all mean "not from here"
            answered.append(False)

    thread = threading.Thread(target=probe, daemon=True)  # a name look-up knows no timeout, a join does
    thread.start()
    thread.join(PROBE_SECONDS)
    return bool(answered and answered[0])


@contextmanager
def offline(active: bool) -> Iterator[None]:
    """Make the Hub client look into its cache only: without this it retries for minutes."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if active:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _require_columns(table: Dataset, source: TableSource, where: str) -> None:
    missing = [name for name in source.all_columns if name not in table.column_names]
    if missing:
        raise DataError(
            f"{where} has no column {', '.join(map(repr, missing))} (it has: {', '.join(table.column_names)})"
        )


def _undecoded(table: Dataset, columns: Sequence[str], where: str) -> Dataset:
    """Leave images encoded: their bytes then stay in the memory-mapped file until they are needed."""
    import datasets

    for column in columns:
        try:
            table = table.cast_column(column, datasets.Image(decode=False))
        except Exception as error:  # pyarrow and datasets raise different classes for each wrong type
            raise DataError(
                f"{where}: column {column!r} is {table.features[column]}, not images",
                "it must hold the encoded bytes: struct<bytes: binary, path: string>",
            ) from error
    return table


def _read_rows(
    source: TableSource, table: Dataset, official: str, wheres: list[tuple[int, str]], folder: Path | None
) -> tuple[list[Sample], list[LeftOut]]:
    """Hash every image once and turn the rows into samples; refs of equal images share one reader."""
    pictures = {name: table.select_columns([name]) for name in source.image_columns}
    starts = [start for start, _ in wheres]
    rows = table.select_columns(list(source.columns))
    needed = [source.images_of(row) for row in rows] if len(pictures) > 1 else [source.image_columns] * len(table)
    readers = [[RowBytes(pictures[name], index, name, folder) for name in names] for index, names in enumerate(needed)]
    flat = list(chain.from_iterable(readers))
    keys = iter(map_images(_key, flat, len(flat), f"hashing {source.title} images"))
    samples: list[Sample] = []
    left: list[LeftOut] = []
    refs: dict[str, ImageRef] = {}
    for index, row in enumerate(rows):
        start, file = wheres[bisect_right(starts, index) - 1]
        where, sample_id = f"{file} row {index - start}", f"{source.name}/{official}/{index:06d}"
        found = list(zip(islice(keys, len(readers[index])), readers[index], strict=True))
        try:
            images = tuple(_ref(refs, key, where, reader) for key, reader in found)
            for number, one in enumerate(source.to_samples(row, images, sample_id)):
                if isinstance(one, RowProblem):
                    left.append(left_out(f"{sample_id}/{number}", where, one))
                else:
                    samples.append(one)
        except RowProblem as problem:
            left.append(left_out(sample_id, where, problem))
    return samples, left


def _ref(refs: dict[str, ImageRef], key: str | OSError, where: str, reader: RowBytes) -> ImageRef:
    """The reference to an image; equal ones share it.

    Raises:
        RowProblem: the image cannot be read.
    """
    if isinstance(key, OSError):
        raise RowProblem("image missing", f"the image cannot be read: {key}")
    return refs.setdefault(key, ImageRef(key, where, reader))


def _key(reader: RowBytes) -> str | OSError:
    try:
        return hashlib.sha256(reader()).hexdigest()
    except OSError as error:
        return error
