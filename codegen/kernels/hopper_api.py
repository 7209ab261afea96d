"""The names of Gluon, Triton's experimental low-level language, that the Hopper kernels use.

Nothing of it is promised to stay. A name that moves is mended here and nowhere else; where this file cannot be imported,
the portable kernels serve (codegen/hopper.py).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

try:  # since Triton 3.7
    from triton.experimental.gluon.language.nvidia.hopper.tma import async_load as tma_load
    from triton.experimental.gluon.language.nvidia.hopper.tma import async_store as tma_store
    from triton.experimental.gluon.language.nvidia.hopper.tma import store_wait as tma_store_wait
except ImportError:
    from triton.experimental.gluon.language.nvidia.hopper.tma import async_copy_global_to_shared as tma_load
    from triton.experimental.gluon.language.nvidia.hopper.tma import async_copy_shared_to_global as tma_store
    from triton.experimental.gluon.language.nvidia.hopper.tma import store_wait as tma_store_wait

try:  # since Triton 3.7
    from triton.experimental.gluon.language.nvidia.hopper.tma import async_atomic_add as tma_add
except ImportError:
    from triton._C.libtriton import ir
    from triton.experimental.gluon.language._core import builtin

    @builtin
    def tma_add(tensor_desc, coord, src, _semantic=None):
        """Add a tile in shared memory to one in global memory, whose first element must lie within the tensor."""
        where = _semantic._convert_to_ir_values(coord, require_i64=False)
        _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, where, src.handle)
