"""Whether keeping the outputs of a frozen vision tower fits and pays: decided from measurements, or forecast."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_sft.common.formats import size
from vlm_sft.data.engine_options import AUTO

DISK_SHARE = 0.5  # of the free disk that `--feature_cache auto` may fill


@dataclass(frozen=True, slots=True)
class FeatureCost:
    """What the features of one image cost.

    Attributes:
        bytes: on disk.
        tower_seconds: of computing them.
        read_seconds, write_seconds: of the disk.
    """

    bytes: float
    tower_seconds: float
    read_seconds: float
    write_seconds: float

    def objection(self, images: int, missing: int, uses: float, budget: int | str, free: float) -> str:
        """Why features are not kept.

        Args:
            images: different ones.
            missing: those of them whose features are not on disk yet.
            uses: how often the tower would run without them, over all images.
            budget: "auto", or bytes of disk that they may take.
            free: bytes that are free on the disk.

        Returns:
            One line for the user; "" where they are kept. What is there already is always used.
        """
        if not missing:
            return ""
        room = free * DISK_SHARE if budget == AUTO else float(budget)
        if self.bytes * missing > room:
            what = f"{size(self.bytes * missing)} do not fit into {size(room)}"
            return f"{what} (--feature_cache SIZE allows more)"
        saved = (uses - missing) * self.tower_seconds - uses * self.read_seconds - missing * self.write_seconds
        return f"recomputing is faster ({self.summary(uses / images)})" if budget == AUTO and saved <= 0 else ""

    def summary(self, uses: float) -> str:
        """The cost of one image that is used so often, for the user."""
        return (
            f"tower {self.tower_seconds * 1e3:.1f} ms, reading {self.read_seconds * 1e3:.1f} ms an image, "
            f"{uses:.1f} uses"
        )
