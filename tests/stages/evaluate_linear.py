"""A network without BatchNorm, for tests that compare sharded with whole batches."""

from torch import nn


def linear(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, num_classes))
