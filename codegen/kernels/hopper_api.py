"""The names of Gluon, Triton's experimental low-level language, that the Hopper kernels use.

Nothing of it is promised to stay. A name that moves is mended here and nowhere else; where this file cannot be imported,
the portable kernels serve (codegen/hopper.py).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
