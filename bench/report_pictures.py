"""The pictures of a report on the first page of the project, light and dark, from a real run.

python bench/report_pictures.py outputs/quickstart
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

from common import ROOT
from tests import chromium
from vlm_sft.common.console import say
from vlm_sft.report.html import write_report

FIGURES = ROOT / "docs" / "figures"
WIDTH, HEIGHT = 1150, 1180  # CSS pixels: the headline, six answers, and the start of the first table


def main() -> int:
    """Write the report of a run again, and a picture of its first screen in each colour scheme."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    args = parser.parse_args()
    if chromium.find() is None:
        parser.error("no Chromium is installed; install one (apt-get install chromium)")
    page = write_report([args.run], args.run / "report.html").resolve()
    for name, dark in (("light", False), ("dark", True)):
        with chromium.Chromium(WIDTH, HEIGHT, dark=dark) as browser:
            browser.open(page)
            path = browser.screenshot(FIGURES / f"report_{name}.png", whole=False)
        with Image.open(path) as picture:  # a page has few colours: a quarter of the bytes
            few = picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)
        few.save(path, optimize=True)
        say(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
