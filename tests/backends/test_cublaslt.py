"""Products as cuBLASLt is told them: on a library that computes in columns, and on the real one's descriptors.

Where the real library is installed its own descriptors are made and read back, which needs no GPU. Nothing here has
seen one.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from minibert.backends.base import BackendUnavailable
from minibert.backends.cuda import cublaslt
from minibert.backends.cuda.cublaslt import PROTOTYPES, Algorithm, CublasError, CublasLt, NoAlgorithm
from tests.column_major import SIZES, STREAM, Case, ColumnMajor


@pytest.mark.parametrize("epilogue", [None, "bias", "gelu"])
@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize("batch, shared", [(1, ""), (3, ""), (3, "a"), (3, "b")])
@pytest.mark.parametrize("padding", [0, 8])
def test_products_of_every_layout(
    epilogue: str | None, a_transposed: bool, b_transposed: bool, batch: int, shared: str, padding: int
) -> None:
    case = Case(
        batch=batch, shared=shared, a_transposed=a_transposed, b_transposed=b_transposed, epilogue=epilogue,
        padding=padding,
    )  # fmt: skip
    case.check(ColumnMajor())


@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize("padding", [0, 8])
def test_a_bias_gradient_is_the_sum_of_a_over_k(a_transposed: bool, b_transposed: bool, padding: int) -> None:
    layout = {"a_transposed": a_transposed, "b_transposed": b_transposed, "padding": padding}
    for shape in ((6, 8, 5), (1, 1, 1), (9, 2, 33)):
        Case(*shape, epilogue="bias_gradient", **layout).check(ColumnMajor())


def test_the_sum_of_the_other_operand_is_no_bias_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cublaslt.EPILOGUE, "bias_gradient", 256)  # CUBLASLT_EPILOGUE_BGRADA
    with pytest.raises(AssertionError, match="Not equal"):
        Case(6, 6, 6, epilogue="bias_gradient").check(ColumnMajor())


def test_a_bias_gradient_goes_where_each_call_says_and_not_to_a_copy() -> None:
    library, case = ColumnMajor(), Case(epilogue="bias_gradient")
    lt = case.check(library)
    elsewhere = case.host.place(np.full(6, np.nan, np.float32))
    lt.matmul(STREAM, case.product._replace(bias=elsewhere.ctypes.data))
    np.testing.assert_allclose(elsewhere, case.expected_sums, atol=1e-5)
    assert library.offered == 1 and case.host.copied == []
    with pytest.raises(NoAlgorithm, match="epilogue bias_gradient"):
        Case(epilogue="bias_gradient", bias_offset=4).check(library)


@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (1, 7, 3), (5, 1, 4), (2, 3, 1), (64, 128, 192)])
def test_products_of_narrow_and_odd_shapes(m: int, n: int, k: int) -> None:
    Case(m, n, k, epilogue="bias").check(ColumnMajor())


@pytest.mark.parametrize("epilogue", ["gelu", "bias_gradient"])
def test_products_of_16_bits_are_summed_in_float32(epilogue: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for number, dtype in ((2, np.float16), (14, ml_dtypes.bfloat16)):
        library = ColumnMajor()
        library.types[number] = np.dtype(dtype)
        Case(dtype=dtype, mode="tf32", epilogue=epilogue, b_transposed=True).check(library)
        assert library.calls[0]["compute"] == 68


@pytest.mark.parametrize("mode, compute", [("float32", 68), ("tf32", 77)])
def test_tf32_is_used_where_it_is_asked_for_and_nowhere_else(mode: str, compute: int) -> None:
    library = ColumnMajor()
    Case(mode=mode).check(library)
    assert library.calls[0]["compute"] == compute


def test_a_fake_that_is_told_a_wrong_layout_gives_a_wrong_product() -> None:
    case = Case(m=6, n=6, k=6, a_transposed=True)
    case.product = case.product._replace(a=case.product.a._replace(transposed=False))
    with pytest.raises(AssertionError, match="Not equal"):
        case.check(ColumnMajor())


def test_preferences_say_how_addresses_are_aligned_and_forbid_rounded_or_unordered_partial_sums() -> None:
    library, case = ColumnMajor(), Case()
    shifted = case.host.place(np.zeros((6, 5), np.float32), offset=4)
    case.product = case.product._replace(a=case.product.a._replace(address=shifted.ctypes.data))
    CublasLt(library, case.host.allocate, case.host.copy).matmul(STREAM, case.product)
    assert library.preferences == [{1: 32 * 2**20, 3: 2, 5: 256, 6: 4, 7: 256, 8: 256}]  # its B is our a


def test_a_plan_is_made_once_for_a_kind_of_product_and_again_for_another_alignment() -> None:
    library, case = ColumnMajor(), Case(epilogue="bias")
    lt = case.check(library)
    other = case.host.place(np.ones(8, np.float32))
    lt.matmul(STREAM, case.product._replace(bias=other.ctypes.data))
    assert library.offered == 1
    np.testing.assert_allclose(case.out - 1, case.expected - _bias(case), atol=1e-5)
    elsewhere = case.host.place(np.full((6, 8), np.nan, np.float32), offset=16)
    lt.matmul(STREAM, case.product._replace(out=case.product.out._replace(address=elsewhere.ctypes.data)))
    assert library.offered == 2


def test_epilogues_of_one_shape_have_plans_of_their_own_and_write_where_each_call_says() -> None:
    library, case = ColumnMajor(), Case(epilogue="gelu")
    lt = CublasLt(library, case.host.allocate, case.host.copy)
    for epilogue in ("bias", None):
        lt.matmul(STREAM, case.product._replace(epilogue=epilogue))
        np.testing.assert_allclose(case.out, case.expected_before - (0 if epilogue else _bias(case)), atol=1e-5)
    lt.matmul(STREAM, case.product)
    case.compare()
    elsewhere = case.host.place(np.full((6, 8), np.nan, np.float32))
    lt.matmul(STREAM, case.product._replace(before=elsewhere.ctypes.data))
    np.testing.assert_allclose(elsewhere, case.expected_before[0], atol=1e-5)
    assert library.offered == 3


def _bias(case: Case) -> np.ndarray:
    return np.frombuffer((ctypes.c_char * (4 * case.n)).from_address(case.product.bias), np.float32)


def test_a_bias_that_vector_loads_cannot_read_is_copied_to_where_they_can() -> None:
    library, case = ColumnMajor(), Case(epilogue="bias", bias_offset=4)
    lt = case.check(library)
    lt.matmul(STREAM, case.product)
    assert case.host.copied == [32, 32]  # each time, since the bias changes
    assert case.host.allocated == [32, cublaslt.WORKSPACE]


def test_each_stream_has_a_workspace_of_its_own_that_stays_where_it_is() -> None:
    library, case = ColumnMajor(), Case()
    lt = case.check(library)
    for stream in (STREAM, 78, STREAM):
        lt.matmul(stream, case.product)
    spaces = [(call["stream"], call["workspace"]) for call in library.calls]
    assert spaces[0] == spaces[1] == spaces[3] and spaces[2][1] != spaces[0][1]
    assert all(call["size"] == cublaslt.WORKSPACE and call["workspace"] % 256 == 0 for call in library.calls)


def test_an_algorithm_that_refuses_is_followed_by_the_next_and_not_asked_again() -> None:
    library = ColumnMajor()
    library.offers = [_algorithm(1), _algorithm(2, state=15), _algorithm(3, workspace=2**30), _algorithm(4)]
    library.refuses = {1: cublaslt.NOT_SUPPORTED, 2: 13, 3: 13}
    case = Case()
    lt = case.check(library)
    library.refuses = {1: 13}
    lt.matmul(STREAM, case.product)
    assert len(library.calls) == 2


def _algorithm(number: int, state: int = 0, workspace: int = 0) -> Algorithm:
    made = Algorithm(state=state, workspace=workspace)
    made.algorithm[0] = number
    return made


@pytest.mark.parametrize("status, offers", [(0, []), (15, [_algorithm(1)]), (7, [_algorithm(1)])])
def test_where_there_is_no_algorithm_the_error_says_of_what(status: int, offers: list[Algorithm]) -> None:
    library = ColumnMajor()
    library.heuristic_status, library.offers = status, offers
    with pytest.raises(NoAlgorithm, match=r"cuBLASLt 12\.9\.1 .*m 6, n 8, k 5, batch 1\) of float32"):
        Case().check(library)
    assert library.calls == []


def test_gelu_beside_rows_at_odd_places_is_not_asked_of_the_library() -> None:
    for case in (Case(n=7, epilogue="gelu"), Case(epilogue="gelu", padding=4)):
        library = ColumnMajor()
        with pytest.raises(NoAlgorithm, match="epilogue gelu"):
            case.check(library)
        assert library.offered == 0


def test_a_failure_is_no_refusal() -> None:
    library = ColumnMajor()
    library.refuses = {0: 13}
    with pytest.raises(CublasError, match=r"cublasLtMatmul: CUBLAS_STATUS_13 \(13\), in a product \(m 6") as failure:
        Case().check(library)
    assert not isinstance(failure.value, NoAlgorithm)
    library.heuristic_status = 1
    with pytest.raises(CublasError, match="cublasLtMatmulAlgoGetHeuristic: CUBLAS_STATUS_1"):
        Case(m=7).check(library)


def test_alignment_is_the_power_of_two_that_divides_an_address() -> None:
    addresses = (0, 1, 2, 12, 4096 + 16, 2**40 + 256, 2**40)
    assert [cublaslt.alignment(a) for a in addresses] == [256, 1, 2, 4, 16, 256, 256]


# --------------------------------------------------------------------------------------------------- finding it


def test_a_library_that_is_not_there_is_named_with_the_wheel_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cublaslt, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailable, match=r"libcublasLt\.so\.99 .*pip install 'nvidia-cublas==99\.\*'"):
        cublaslt.load(99)


@pytest.mark.parametrize("folder", ["nvidia/cu98/lib", "nvidia/cublas/lib", "toolkit/lib64"])
def test_wheels_and_toolkits_are_looked_through(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(cublaslt, "find_spec", lambda name: wheels)
    path = tmp_path / folder / "libcublasLt.so.98"
    path.parent.mkdir(parents=True)
    path.touch()
    opened = []
    monkeypatch.setattr(cublaslt.ctypes, "CDLL", lambda name: opened.append(name) or ColumnMajorLike())
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    cublaslt.load(98)
    assert opened == [str(path)]


class ColumnMajorLike:
    """Has every function, to be declared."""

    def __getattr__(self, name: str) -> Callable[..., int]:
        self.__dict__[name] = function = lambda *arguments: 0
        return function


# ---------------------------------------------------------------------------- the real library, which needs no GPU


@pytest.fixture(params=[12, 13])
def real(request: pytest.FixtureRequest) -> Iterator[ctypes.CDLL]:
    try:
        yield cublaslt.load(request.param)
    except BackendUnavailable as missing:
        pytest.skip(str(missing))


class WithoutDevice(ColumnMajor):
    """The real library's descriptors, read back when it would multiply; only what needs a GPU is made up."""

    def __init__(self, library: Any) -> None:
        super().__init__()
        self.library = library
        self.told: dict[str, int] = {}
        for name in PROTOTYPES:
            if name not in ("cublasLtCreate", "cublasLtMatmulAlgoGetHeuristic", "cublasLtMatmul"):
                setattr(self, name, getattr(library, name))

    def _read(self, kind: str, descriptor: int, attribute: int, size: int) -> int:
        held, written = ctypes.create_string_buffer(size), ctypes.c_size_t()
        function = getattr(self.library, f"cublasLt{kind}GetAttribute")
        function.argtypes = (
            ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(ctypes.c_size_t)
        )  # fmt: skip
        assert function(descriptor, attribute, held, size, ctypes.byref(written)) == 0, (kind, attribute)
        assert written.value == size, (kind, attribute)
        return int.from_bytes(held.raw, "little")

    def _layout(self, descriptor: int) -> int:
        numbers = {"kind": (0, 4), "rows": (2, 8), "columns": (3, 8), "leading": (4, 8), 5: (5, 4), 6: (6, 8)}
        self.descriptors[descriptor] = {n: self._read("MatrixLayout", descriptor, *x) for n, x in numbers.items()}
        return descriptor

    def _MatmulAlgoGetHeuristic(self, *arguments: Any) -> int:
        preference = arguments[6]
        self.preferences.append(
            {n: self._read("MatmulPreference", preference, n, s) for n, s in SIZES["MatmulPreference"].items()}
        )
        return super()._MatmulAlgoGetHeuristic(*arguments)

    def _Matmul(self, *arguments: int) -> int:
        operation = arguments[1]
        read = {n: self._read("MatmulDesc", operation, n, s) for n, s in SIZES["MatmulDesc"].items()}
        read |= {name: self._read("MatmulDesc", operation, n, 4) for n, name in enumerate(("compute", "scale"))}
        self.descriptors[operation] = read
        for position in (4, 6, 9, 11):
            self._layout(arguments[position])
        return super()._Matmul(*arguments)


@pytest.mark.parametrize("epilogue", [None, "bias", "gelu", "bias_gradient"])
@pytest.mark.parametrize("b_transposed", [False, True])
def test_the_real_librarys_descriptors_hold_what_gives_the_product(
    real: ctypes.CDLL, epilogue: str | None, b_transposed: bool
) -> None:
    library = WithoutDevice(real)
    batch = 1 if epilogue == "bias_gradient" else 2
    case = Case(batch=batch, epilogue=epilogue, b_transposed=b_transposed, mode="tf32")
    case.check(library)
    assert library.calls[0]["compute"] == 77
    assert library.preferences[0] == {1: 32 * 2**20, 3: 2, 5: 256, 6: 256, 7: 256, 8: 256} | {
        5: cublaslt.alignment(case.product.b.address),
        6: cublaslt.alignment(case.product.a.address),
    }


def test_the_real_library_takes_no_value_of_another_size(real: ctypes.CDLL) -> None:
    lt = CublasLt(WithoutDevice(real), lambda nbytes: 0, lambda *arguments: None)
    operation = lt._new("cublasLtMatmulDescCreate", 68, 0)
    with pytest.raises(CublasError, match=rf"cublasLtMatmulDescSetAttribute 7: .*\({cublaslt.INVALID_VALUE}\)"):
        lt._describe(operation, cublaslt.EPILOGUE_KIND._replace(type=ctypes.c_uint64), 4)


def test_the_real_library_says_its_version_and_its_errors(real: ctypes.CDLL) -> None:
    lt = CublasLt(WithoutDevice(real), lambda nbytes: 0, lambda *arguments: None)
    lt._library = real
    assert re.fullmatch(r"1[23]\.\d+\.\d+", lt.version())
    assert "NOT_SUPPORTED" in lt._status(cublaslt.NOT_SUPPORTED).upper().replace(" ", "_")


def test_numbers_are_those_of_the_real_header(real: ctypes.CDLL) -> None:
    folder = Path(real._name).parent.parent / "include"
    if not (folder / "cublasLt.h").is_file():
        pytest.skip(f"no cublasLt.h in {folder}")
    text = (folder / "cublasLt.h").read_text() + (folder / "cublas_api.h").read_text()
    numbers = {name: int(value, 0) for name, value in re.findall(r"(CUBLAS\w+) = (0x\w+|\d+),", text)}
    ours = {
        "CUBLAS_COMPUTE_32F": cublaslt.COMPUTE_TYPE["float32"],
        "CUBLAS_COMPUTE_32F_FAST_TF32": cublaslt.COMPUTE_TYPE["tf32"],
        "CUBLASLT_EPILOGUE_DEFAULT": cublaslt.EPILOGUE[None],
        "CUBLASLT_EPILOGUE_BIAS": cublaslt.EPILOGUE["bias"],
        "CUBLASLT_EPILOGUE_BGRADB": cublaslt.EPILOGUE["bias_gradient"],
        "CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE": cublaslt.REDUCTION_IN_FLOAT32,
        "CUBLAS_STATUS_INVALID_VALUE": cublaslt.INVALID_VALUE,
        "CUBLAS_STATUS_ARCH_MISMATCH": cublaslt.ARCH_MISMATCH,
        "CUBLAS_STATUS_NOT_SUPPORTED": cublaslt.NOT_SUPPORTED,
        "CUBLASLT_MATMUL_DESC_TRANSA": cublaslt.TRANSPOSE_A.number,
        "CUBLASLT_MATMUL_DESC_TRANSB": cublaslt.TRANSPOSE_B.number,
        "CUBLASLT_MATMUL_DESC_EPILOGUE": cublaslt.EPILOGUE_KIND.number,
        "CUBLASLT_MATMUL_DESC_BIAS_POINTER": cublaslt.BIAS_POINTER.number,
        "CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER": cublaslt.AUX_POINTER.number,
        "CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD": cublaslt.AUX_LEADING.number,
        "CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_BATCH_STRIDE": cublaslt.AUX_BATCH_STRIDE.number,
        "CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT": cublaslt.BATCH_COUNT.number,
        "CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET": cublaslt.BATCH_STRIDE.number,
        "CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES": cublaslt.MOST_WORKSPACE.number,
        "CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK": cublaslt.REDUCTION_SCHEMES.number,
        **{f"CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_{x}_BYTES": cublaslt.ALIGNMENT_OF[x].number for x in "ABCD"},
    }
    assert {name: numbers[name] for name in ours} == ours
    gelu_epilogue = re.search(r"CUBLASLT_EPILOGUE_GELU_AUX = \(CUBLASLT_EPILOGUE_GELU \| (\d+)\)", text)
    assert gelu_epilogue is not None
    gelu_aux_bias = numbers["CUBLASLT_EPILOGUE_GELU"] | int(gelu_epilogue[1]) | numbers["CUBLASLT_EPILOGUE_BIAS"]
    assert cublaslt.EPILOGUE["gelu"] == gelu_aux_bias
    result = re.search(r"uint64_t data\[(\d+)\];\n} cublasLtMatmulAlgo_t;", text)
    assert result is not None and ctypes.sizeof(Algorithm) == 8 * int(result[1]) + 8 + 4 + 4 + 16
