"""The unit of recovery: what one actor optimises on its own and commits as one shard."""

from __future__ import annotations

from cluster.resources import Frozen


class RecoverUnit(Frozen):
    """One IPC index of one chunk of classes; a row of the plan.

    Attributes:
        ipc: IPC index i.
        chunk: index of the class chunk.
        classes: labels of its images, ascending.
        logit_teachers: names that give the cross-entropy.
        bn_teachers: names that give the BN loss: the set B_i itself (``fixed``, ``per_index``) or the pool that
            every step draws from (``per_step``, ``round_robin``).
        iterations: T_i.
        seed: of all that is random inside the unit.
        sources: (shard index, row) of the initial real image of each class; empty for noise.
    """

    ipc: int
    chunk: int
    classes: list[int]
    logit_teachers: list[str]
    bn_teachers: list[str]
    iterations: int
    seed: int
    sources: list[tuple[int, int]] = []

    @property
    def id(self) -> str:
        """``unit-IIIII-CCCCC``, the shard's name."""
        return f"unit-{self.ipc:05d}-{self.chunk:05d}"
