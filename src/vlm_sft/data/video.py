"""Videos are refused by name, in one sentence, wherever data or a picture is taken."""

from __future__ import annotations

import re
from pathlib import PurePath

VIDEO = "a video cannot be learned or asked about here: questions are about images"
VIDEO_FIX = "cut frames out of it and name these as images, e.g. ffmpeg -i CLIP -vf fps=1 frame_%03d.png"
PARTS = ("video", "video_url", "input_video")  # types of a message's parts in the chat formats in use
ENDINGS = (
    ".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .wmv .flv .3gp .ogv".split()  # as they stand in names of files
)
_BEGINNINGS = re.compile(
    rb"(?s).{4}ftyp(?!hei|hev|mif1|msf1|avi[fs])|.{4}(moov|mdat|wide)"
    rb"|\x1a\x45\xdf\xa3|RIFF.{4}AVI |FLV\x01|\x00\x00\x01\xba"
)


def is_video_name(name: object) -> bool:
    """Whether a text names a video: a path or URL with such an ending, or a data URI."""
    if not isinstance(name, str):
        return False
    ending = PurePath(name[-200:].partition("?")[0]).suffix.lower()
    return ending in ENDINGS or name[:11].lower() == "data:video/"


def is_video_data(data: bytes) -> bool:
    """Whether bytes begin as a video file does: MP4, QuickTime, Matroska, WebM, AVI, FLV, MPEG."""
    return _BEGINNINGS.match(data[:16]) is not None
