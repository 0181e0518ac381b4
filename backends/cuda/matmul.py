"""Products by kernels of our own (matmul.cu), for what cuBLASLt refuses."""

from __future__ import annotations

from minibert.backends.cuda.driver import Product
from minibert.kernels.gpu.launch import CudaFile, Raw

THREADS = 256  # of a block
ROWS = 32  # that a block of operand_sums sums: its lanes

cuda = CudaFile(__file__, "matmul.cu")
matmul_any = cuda.kernel("matmul_any", block=THREADS)
gelu_rows = cuda.kernel("gelu_rows", block=THREADS)
operand_sums = cuda.kernel("operand_sums", block=THREADS)


def matmul_arguments(product: Product) -> list[bytes]:
    """What `matmul_any` takes for a product."""

    def strides(batch: int, leading: int, transposed: bool) -> tuple[int, int, int]:
        return (batch, 1, leading) if transposed else (batch, leading, 1)

    a, b, out = product.a, product.b, product.out
    pointers = (a.address, b.address, product.bias, product.before, out.address)
    arguments = (
        *map(Raw, pointers), product.m, product.n, product.k, product.batch,
        *strides(a.batch_stride, a.leading, a.transposed), *strides(b.batch_stride, b.leading, b.transposed),
        out.batch_stride, out.leading,
    )  # fmt: skip
    return matmul_any.pack(arguments)[0]


def gelu_arguments(product: Product) -> list[bytes]:
    """What `gelu_rows` takes once `before` is there."""
    out, sizes = product.out, (product.m, product.n, product.batch)
    return gelu_rows.pack((Raw(product.before), Raw(out.address), *sizes, out.batch_stride, out.leading))[0]


def sums_arguments(product: Product) -> list[bytes]:
    """What `operand_sums` takes for the bias gradient of a product."""
    a = product.a
    strides = (1, a.leading) if a.transposed else (a.leading, 1)
    return operand_sums.pack((Raw(a.address), Raw(product.bias), product.m, product.k, *strides))[0]
