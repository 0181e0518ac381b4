"""The kernels for what cuBLASLt refuses (backends/cuda/matmul.cu), on the emulator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minibert.backends.base import BackendUnavailable
from minibert.backends.cuda.driver import Product
from minibert.backends.cuda.matmul import (
    gelu_arguments,
    gelu_rows,
    matmul_any,
    matmul_arguments,
    operand_sums,
    sums_arguments,
)
from minibert.backends.emulator.driver import EmulatorDriver, KernelFault
from minibert.kernels.gpu.launch import STORAGE, CudaFile
from tests.column_major import Case


@pytest.fixture(scope="module")
def emulator() -> Any:
    try:
        return EmulatorDriver()
    except BackendUnavailable as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("epilogue", [None, "bias", "gelu"])
@pytest.mark.parametrize("a_transposed, b_transposed, shared", [(0, 0, "a"), (0, 1, "b"), (1, 0, ""), (1, 1, "")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_for_what_the_library_refuses_multiplies(
    emulator: EmulatorDriver, epilogue: str | None, a_transposed: int, b_transposed: int, shared: str, dtype: str
) -> None:
    held = np.dtype(dtype if dtype == "float32" else pytest.importorskip("ml_dtypes").bfloat16)
    case = Case(
        5, 7, 9, batch=2, a_transposed=bool(a_transposed), b_transposed=bool(b_transposed), shared=shared, dtype=held,
        epilogue=epilogue, padding=3, bias_offset=held.itemsize,
    )  # fmt: skip
    product, fetch = moved(case, emulator)
    arguments = matmul_arguments(product)
    emulator.launch(matmul_any, {"STORAGE": STORAGE[dtype]}, (1, 1, 1), 0, arguments, "product")
    roundings = 32 if dtype == "float32" else 1  # float32: those of the sum as well
    fetch()
    case.compare(roundings)
    if epilogue == "gelu" and dtype == "float32":  # GELU by itself, from what is before it
        emulator.fill(product.out.address, case.out.nbytes, 0xFF)
        arguments = gelu_arguments(product)
        emulator.launch(gelu_rows, {"STORAGE": STORAGE[dtype]}, (1, 1, 1), 0, arguments, "product")
        fetch()
        case.compare(roundings)


def moved(case: Case, emulator: EmulatorDriver) -> tuple[Product, Callable[[], None]]:
    """The case's product on an emulated device, and what fetches all that is written there."""
    places = {}  # address on the host -> on the device
    for room in case.host.held:
        address = emulator.allocate(room.nbytes)
        emulator.recycle(address, room.nbytes)
        buffer = emulator.host_buffer(room.nbytes)
        buffer[: room.nbytes] = room
        emulator.upload(buffer[: room.nbytes], address)
        emulator.synchronize()
        places[room.ctypes.data] = address

    def there(address: int) -> int:
        start = max((a for a in places if a <= address), default=address)
        return places[start] + address - start if address else 0

    def fetch() -> None:
        for room in case.host.held:
            room[...] = emulator.download(places[room.ctypes.data], room.nbytes)

    product = case.product
    a, b, out = (x._replace(address=there(x.address)) for x in (product.a, product.b, product.out))
    product = product._replace(a=a, b=b, out=out, bias=there(product.bias), before=there(product.before))
    return product, fetch


@pytest.mark.parametrize("m, k", [(1, 1), (70, 200), (33, 64), (5, 7)])
@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_beside_a_refused_bias_gradient_sums_over_k(
    emulator: EmulatorDriver, m: int, k: int, a_transposed: bool, dtype: str
) -> None:
    held = np.dtype(dtype if dtype == "float32" else pytest.importorskip("ml_dtypes").bfloat16)
    case = Case(m, 3, k, a_transposed=a_transposed, dtype=held, padding=3, epilogue="bias_gradient", bias_offset=4)
    product, fetch = moved(case, emulator)
    sums = set()
    for grid in (1, 2):  # fewer blocks than there are strips of rows
        emulator.fill(product.bias, case.bias.nbytes, 0xFF)
        arguments = sums_arguments(product)
        emulator.launch(operand_sums, {"STORAGE": STORAGE[dtype]}, (grid, 1, 1), 0, arguments, "product")
        fetch()
        sums.add(case.bias.tobytes())
        close = 1e-5 if dtype == "float32" else 2.0**-7
        np.testing.assert_allclose(case.bias.astype(np.float64), case.expected_sums, rtol=close, atol=close)
    assert len(sums) == 1


@pytest.mark.parametrize("barrier", [1, 2])
def test_the_barriers_of_that_kernel_are_needed(emulator: EmulatorDriver, barrier: int, tmp_path: Path) -> None:
    deleted = "__syncthreads();"
    parts = operand_sums.file.path.read_text(encoding="utf-8").split(deleted)
    assert len(parts) == 3
    text = deleted.join(parts[:barrier]) + deleted.join(parts[barrier:])
    (tmp_path / "matmul.cu").write_text(text, encoding="utf-8")
    kernel = CudaFile(str(tmp_path / "matmul.py"), "matmul.cu").kernel("operand_sums", block=256)
    product, _ = moved(Case(70, 3, 200, epilogue="bias_gradient"), emulator)
    emulator.launch(kernel, {"STORAGE": "float"}, (1, 1, 1), 0, sums_arguments(product), "product")
    with pytest.raises(KernelFault, match="race"):
        emulator.synchronize()
