"""Images from the web, only when asked: http and https, bounded in size and time."""

from __future__ import annotations

import http.client
import time
import urllib.request

from vlm_sft.common.errors import without_secrets
from vlm_sft.data.sources.rows import RowProblem

MAX_BYTES = 32 * 1024**2
SECONDS = 30.0  # for one image, from the first look-up to the last byte
HANDLERS = (  # no file:, no ftp:; a redirection that leads there is refused
    urllib.request.ProxyHandler,
    urllib.request.HTTPHandler,
    urllib.request.HTTPSHandler,
    urllib.request.HTTPRedirectHandler,
    urllib.request.HTTPDefaultErrorHandler,
    urllib.request.HTTPErrorProcessor,
    urllib.request.UnknownHandler,
)
_CHUNK = 64 * 1024
_WAIT_SECONDS = 10.0  # for one answer of the server


def fetch(url: str, max_bytes: int = MAX_BYTES, seconds: float = SECONDS) -> bytes:
    """Download one image.

    Args:
        url: http or https.
        max_bytes: a longer answer is refused.
        seconds: a slower one is given up.

    Raises:
        RowProblem: it cannot be had within these limits.
    """
    opener = urllib.request.OpenerDirector()
    for handler in HANDLERS:
        opener.add_handler(handler())
    end, named = time.monotonic() + seconds, without_secrets(url)[:200]
    request = urllib.request.Request(url, headers={"User-Agent": "vlm-sft", "Accept": "image/*"})
    data = bytearray()
    try:
        with opener.open(request, timeout=min(seconds, _WAIT_SECONDS)) as answer:
            while chunk := answer.read1(_CHUNK):
                data += chunk
                if len(data) > max_bytes:
                    raise RowProblem("image URL failed", f"{named}: more than {max_bytes:,} bytes")
                if time.monotonic() > end:
                    raise RowProblem("image URL failed", f"{named}: not done within {seconds:g} s")
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        raise RowProblem("image URL failed", f"{named}: {error}") from error
    return bytes(data)
