"""The unit of relabelling: what one pass of the pipeline labels and commits as one shard."""

from __future__ import annotations

from cluster.resources import Frozen
from stages.relabel.options import RelabelOptions

# A shard of 1000 classes is then about 17 MB: large enough for object stores, seconds to minutes of work.
MAX_SHARD_ROWS = 8192
# With many classes fewer rows: 64 MB of float32 that each teacher hands on for a unit, 32 MB as a shard.
MAX_SHARD_LOGITS = 2**24
# At least so many units where there are epochs enough: actors share work, and a kill loses little of it.
MIN_UNITS = 16


class LabelUnit(Frozen):
    """Some whole epochs, or a range of positions of one; a row of the plan.

    Attributes:
        epoch_start, epoch_stop: epochs, stop excluded.
        position_start, position_stop: positions of each of them, stop excluded; the start is a multiple of
            ``relabel.batch``.
        num_images: N, positions of a whole epoch.
    """

    epoch_start: int
    epoch_stop: int
    position_start: int
    position_stop: int
    num_images: int

    @property
    def id(self) -> str:
        """``labels-EEEEE-PPPPPPP``, the shard's name: first epoch and first position."""
        return f"labels-{self.epoch_start:05d}-{self.position_start:07d}"

    @property
    def num_rows(self) -> int:
        """Rows of the shard."""
        return (self.epoch_stop - self.epoch_start) * (self.position_stop - self.position_start)

    def batches(self, batch: int) -> list[tuple[int, int, int]]:
        """(epoch, first position, stop) of every label batch, in the shard's order of rows."""
        return [
            (epoch, at, min(at + batch, self.position_stop))
            for epoch in range(self.epoch_start, self.epoch_stop)
            for at in range(self.position_start, self.position_stop, batch)
        ]


def plan_units(num_images: int, num_classes: int, options: RelabelOptions) -> list[LabelUnit]:
    """Cut epochs × positions into units of at most about ``MAX_SHARD_ROWS`` rows and ``MAX_SHARD_LOGITS`` logits.

    Label batches are never cut, so the ensemble's norms, and with them every label, do not depend on the
    partition.
    """
    rows = min(MAX_SHARD_ROWS, MAX_SHARD_LOGITS // num_classes)
    epochs = max(1, min(rows // num_images, -(-options.epochs // MIN_UNITS)))
    parts = -(-num_images // max(rows, options.batch))
    positions = -(-num_images // (parts * options.batch)) * options.batch
    return [
        LabelUnit(
            epoch_start=epoch,
            epoch_stop=min(epoch + epochs, options.epochs),
            position_start=at,
            position_stop=min(at + positions, num_images),
            num_images=num_images,
        )
        for epoch in range(0, options.epochs, epochs)
        for at in range(0, num_images, positions)
    ]


def label_bytes(num_images: int, num_classes: int, epochs: int) -> int:
    """Estimated size of all label shards: fp16 logits and 60 bytes for the view of every row."""
    return num_images * epochs * (2 * num_classes + 60)
