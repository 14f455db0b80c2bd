"""The images folder of an imported or exported data set: each different image once, under its hash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm_sft.common.artifacts import write_bytes_atomic
from vlm_sft.common.errors import DataError, RunError, without_secrets
from vlm_sft.data.exchange.download import fetch
from vlm_sft.data.images import decode_rgb, image_format, read_bytes
from vlm_sft.data.sample import ImageRef
from vlm_sft.data.sources.locate import image_text, is_url, locate_image
from vlm_sft.data.sources.rows import RowProblem

FOLDER = "images"
ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}


class ImageStore:
    """Writes images beside a data set's files.

    Args:
        output: the folder of the data set; its subfolder "images" is made.
        allow_urls: whether images may be fetched from the web.
    """

    def __init__(self, output: Path, allow_urls: bool = False) -> None:
        self.output = output
        self.allow_urls = allow_urls
        try:
            (output / FOLDER).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot write {output}: {error.strerror}", "choose another --output") from error
        self.looked_up = False  # whether an image was looked for in a folder of the records
        self._names = {path.stem: f"{FOLDER}/{path.name}" for path in (output / FOLDER).iterdir()}

    def find(self, folder: Path, image: Any) -> ImageRef:
        """Find an image of a record; see `locate_image`. A name without ending finds the one file that has one.

        Raises:
            RowProblem: it cannot be found, or fetched.
        """
        text = image_text(image)
        if is_url(text) and self.allow_urls:
            return ImageRef.from_bytes(fetch(text), without_secrets(text)[:200])
        self.looked_up |= isinstance(text, str) and not text.startswith(("data:", "/", "file://"))
        if isinstance(text, str) and text.strip() and not Path(text).suffix and "*" not in text and len(text) < 255:
            found = sorted(path for path in folder.glob(f"{text}.*") if path.is_file()) if folder.is_dir() else []
            if len(found) == 1 and not Path(text).is_absolute():
                return ImageRef.from_path(found[0])
        return locate_image(folder, image)

    def keep(self, ref: ImageRef) -> str:
        """Decode an image once and write it, unless it is there.

        Returns:
            Its path, relative to the folder of the data set.

        Raises:
            RowProblem: it cannot be read.
            RunError: it cannot be written.
        """
        stem = ref.key[:32]
        if stem in self._names:
            return self._names[stem]
        try:
            data = read_bytes(ref)
            decode_rgb(data, ref.source)
        except DataError as error:
            raise RowProblem("image cannot be read", error.what) from error
        kind = image_format(data)
        name = f"{FOLDER}/{stem}.{ENDINGS.get(kind, kind.lower())}"
        try:
            write_bytes_atomic(self.output / name, data)
        except OSError as error:
            raise RunError(f"cannot write {self.output / name}: {error.strerror}", "make room, then again") from error
        self._names[stem] = name
        return name
