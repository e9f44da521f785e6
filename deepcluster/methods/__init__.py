"""One file per method; importing this package registers them all."""

from deepcluster.methods import deepcluster, iic, sela, simclr  # noqa: F401
