"""Images: decoded into plain RGB, checked, encoded to be shown."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import re
import threading
import warnings
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageOps

from vlm_sft.common.errors import DataError
from vlm_sft.data.sample import ImageRef
from vlm_sft.data.video import VIDEO, VIDEO_FIX, is_video_data

# Pillow can open many more formats; some of them (EPS) start other programs, so only picture formats are let in.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # a phone's MPO opens as JPEG
# What is often found where a picture is expected: a pattern of the first bytes, and what to call it.
_OTHERS = (
    (rb"%PDF", "a PDF document"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript"),
    (rb"version https://git-lfs", "the pointer of a Git LFS file that was not fetched"),
    (rb"(?is)\s*<(!doctype )?html", "an HTML page"),
    (rb"(?is)[^<]{0,9}<(svg|.{0,900}<svg)", "SVG, which is drawn and not made of pixels"),
    (rb"(?s).{4}ftyp(hei|hev|mif1|msf1)", "HEIC"),
)
_SNIFFED = 1024
MAX_IMAGE_PIXELS = 89_478_485  # Pillow's own threshold for "could be a decompression bomb": 256 MiB as RGB
LOSSLESS_UP_TO_PIXELS = 256 * 256  # artefacts show where a small picture is scaled up, and it is small anyway
READ_SECONDS = 40.0  # for one file; a hung network disk is told from a slow one within a minute
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # refused below, with its name
FIX = "replace the image, or remove the questions about it"


def read_bytes(ref: ImageRef) -> bytes:
    """Read the encoded bytes of an image, waiting at most `READ_SECONDS`.

    Raises:
        DataError: they cannot be read, or do not come.
    """
    found: list[bytes | OSError] = []

    def read() -> None:
        try:
            found.append(ref.load())
        except OSError as error:
            found.append(error)

    # A read that hangs cannot be called off; its thread is left behind.
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(READ_SECONDS)
    if not found:
        what = f"{ref.source}: the image cannot be read: nothing came within {READ_SECONDS:g} s"
        raise DataError(what, "look at the disk or network that it lies on")
    if isinstance(found[0], OSError):
        raise DataError(f"{ref.source}: the image cannot be read: {found[0].strerror or found[0]}", FIX) from found[0]
    return found[0]


def decode_rgb(data: bytes, source: str) -> Image.Image:
    """Decode one image into RGB as a viewer would show it on white paper.

    The EXIF rotation is applied, transparency is flattened on white, grey, CMYK, palette and 16-bit images are
    converted, and of an animation the first frame is taken.

    Args:
        data: the encoded bytes (PNG, JPEG, WebP, GIF, BMP, TIFF, PPM, AVIF).
        source: where the image is, for messages.

    Returns:
        An image of mode "RGB".

    Raises:
        DataError: the bytes are no such image, are truncated, or would decode to more than `MAX_IMAGE_PIXELS`.
    """
    if not data:
        raise DataError(f"{source}: the image is empty (0 bytes)", FIX)
    if is_video_data(data):
        raise DataError(f"{source}: {VIDEO}", VIDEO_FIX)
    try:
        with _opened(data) as image:
            width, height = image.size
            if width * height > MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(f"{width} x {height} pixels")
            image.load()
            return _to_rgb(_upright(image))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = f"the limit is {MAX_IMAGE_PIXELS:,} pixels"
        raise DataError(f"{source}: the image is too large to decode ({error}; {limit})", FIX) from error
    except Image.UnidentifiedImageError as error:
        found = next((f", but {name}" for pattern, name in _OTHERS if re.match(pattern, data[:_SNIFFED])), "")
        what = f"{source}: not an image in a known format ({len(data):,} bytes{found})"
        raise DataError(what, f"{FIX}; known are {', '.join(FORMATS)}") from error
    except Exception as error:  # broken files make Pillow raise anything from OSError to ZeroDivisionError
        raise DataError(f"{source}: the image cannot be decoded: {error or type(error).__name__}", FIX) from error


def pictures_of(images: Iterable[ImageRef]) -> list[Image.Image]:
    """Read and decode images, as `decode_rgb`.

    Raises:
        DataError: one cannot be read or decoded.
    """
    return [decode_rgb(read_bytes(image), image.source) for image in images]


def sources_of(images: Iterable[ImageRef]) -> str:
    """Where images are and how large, for messages."""
    sizes = [(image.source, f" ({image.width} x {image.height} pixels)" if image.width else "") for image in images]
    return ", ".join(map("".join, sizes))


def image_format(data: bytes) -> str:
    """Name of the format of an image that `decode_rgb` has decoded: "PNG", "JPEG", "MPO", ….

    Args:
        data: the encoded bytes.
    """
    with _opened(data) as image:
        return image.format or "PNG"


def encode_webp(picture: Image.Image, quality: int) -> bytes:
    """A picture as WebP, to be shown: lossless where it is small, else with a quality of 0 to 100."""
    buffer = io.BytesIO()
    lossless = picture.width * picture.height <= LOSSLESS_UP_TO_PIXELS
    picture.save(buffer, "WEBP", lossless=lossless, quality=quality, method=2)
    return buffer.getvalue()


def _opened(data: bytes) -> Image.Image:
    """Open an image; every place that opens one comes here, so that nothing but `FORMATS` is ever tried."""
    return Image.open(io.BytesIO(data), formats=_formats())


def check_image(ref: ImageRef) -> ImageRef:
    """Read and fully decode one image.

    Args:
        ref: the reference; one whose size is known was checked before and is returned as it is.

    Returns:
        The same reference with its width and height in pixels.

    Raises:
        DataError: the image cannot be read or decoded.
    """
    if ref.width and ref.height:
        return ref
    width, height = decode_rgb(read_bytes(ref), ref.source).size
    return dataclasses.replace(ref, width=width, height=height)


def scaled(ref: ImageRef, width: int, height: int) -> ImageRef:
    """Reference the same image at another size; it is read and scaled, once more, whenever its bytes are asked for.

    Args:
        ref: the image.
        width, height: what it shall have, in pixels.
    """
    key = hashlib.sha256(f"{ref.key} at {width} x {height}".encode()).hexdigest()
    return ImageRef(key, ref.source, functools.partial(_scaled_bytes, ref, width, height), width, height)


def _scaled_bytes(ref: ImageRef, width: int, height: int) -> bytes:
    """A smaller copy of an image, without loss (PPM).

    Raises:
        OSError: it cannot be read or decoded, as of `ImageRef.load`.
    """
    try:
        picture = decode_rgb(ref.load(), ref.source)
    except DataError as error:
        raise OSError(error.what) from error
    buffer = io.BytesIO()
    picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0).save(buffer, "PPM")
    return buffer.getvalue()


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with: it fails on a name that it does not know."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF rotation; damaged EXIF data is no reason to refuse a sound picture."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the EXIF reader raises struct.error, SyntaxError, TypeError, … on damaged data
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _eight_bit(image).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or image.has_transparency_data:
        straight = image.convert("RGBA")
        if straight.getchannel("A").getextrema() == (255, 255):
            return straight.convert("RGB")
        paper = Image.new("RGBA", straight.size, (255, 255, 255, 255))
        return Image.alpha_composite(paper, straight).convert("RGB")
    return image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit, 32-bit and float grey values to 0..255; Pillow's own conversion would clip them to white."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    top = float(values.max(initial=0.0))
    if image.mode.startswith("I;16") or (image.mode == "I" and top > 255):
        values = values / 257.0
    elif image.mode == "F" and top <= 1.0:
        values = values * 255.0
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
