// nvcuda::wmma: matrix products of a warp. Every lane keeps a scattered share of each fragment, as on a GPU, so that
// code which relies on more than the interface promises gives wrong numbers here too.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace nvcuda {
namespace wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

namespace precision {
struct tf32 {};
}  // namespace precision

// float to 10 bits of mantissa, to nearest with ties away from zero (PTX: cvt.rna.tf32.f32).
CUDA_EMULATOR_INLINE float __float_to_tf32(float x) {
    return cuda_emulator::same_bits<float>((cuda_emulator::same_bits<unsigned>(x) + 0x1000) & ~0x1fffu);
}

namespace emulated {

template <class Type>
struct Stored {
    using type = Type;
};
template <>
struct Stored<precision::tf32> {
    using type = float;
};

template <class Use, int m, int n, int k>
struct Shape;
template <int m, int n, int k>
struct Shape<matrix_a, m, n, k> {
    static constexpr int rows = m, columns = k;
};
template <int m, int n, int k>
struct Shape<matrix_b, m, n, k> {
    static constexpr int rows = k, columns = n;
};
template <int m, int n, int k>
struct Shape<accumulator, m, n, k> {
    static constexpr int rows = m, columns = n;
};

template <class Type, int m, int n, int k>
constexpr bool supported() {
    constexpr bool by_16 = k == 16 && m * n == 256 && (m == 16 || m == 32 || m == 8);
    return std::is_same<Type, precision::tf32>::value ? m == 16 && n == 16 && k == 8
           : sizeof(Type) == 4                        ? by_16 || (m == 16 && n == 16 && k == 8)
                                                      : by_16;
}

}  // namespace emulated

template <class Use, int m, int n, int k, class Type, class Layout = void>
struct fragment {
    static_assert(emulated::supported<Type, m, n, k>(), "wmma has no fragment of this type and shape, or the emulator");
    using Shape = emulated::Shape<Use, m, n, k>;
    using element_type = typename emulated::Stored<Type>::type;
    static constexpr int num_elements = Shape::rows * Shape::columns / 32;
    element_type x[num_elements];

    // Element i of a lane is number 32 i + lane of the matrix, row by row.
    static int row(int i, int lane) { return (32 * i + lane) / Shape::columns; }
    static int column(int i, int lane) { return (32 * i + lane) % Shape::columns; }
};

template <class Fragment, class Value>
CUDA_EMULATOR_INLINE void fill_fragment(Fragment& to, Value value) {
    for (int i = 0; i < Fragment::num_elements; i++) {
        to.x[i] = value;
    }
}

namespace emulated {

template <class Type>
CUDA_EMULATOR_INLINE void check_address(const Type* from, unsigned leading) {
    if (reinterpret_cast<uintptr_t>(from) % 32) {
        cuda_emulator_fail("misaligned access", "a wmma fragment's address must be a multiple of 32 bytes");
    }
    if (leading * sizeof(Type) % 16) {
        cuda_emulator_fail("misaligned access", "a wmma leading dimension must be a multiple of 16 bytes");
    }
}

template <class Fragment, class Type>
CUDA_EMULATOR_INLINE void load(Fragment& to, const Type* from, unsigned leading, bool by_rows) {
    check_address(from, leading);
    cuda_emulator::meet();
    const int lane = cuda_emulator::lane();
    for (int i = 0; i < Fragment::num_elements; i++) {
        const int row = Fragment::row(i, lane), column = Fragment::column(i, lane);
        to.x[i] = from[by_rows ? row * leading + column : column * leading + row];
    }
}

}  // namespace emulated

template <class Use, int m, int n, int k, class Type, class Stored>
CUDA_EMULATOR_INLINE void load_matrix_sync(fragment<Use, m, n, k, Type, row_major>& to, const Stored* from,
                                           unsigned leading) {
    emulated::load(to, from, leading, true);
}
template <class Use, int m, int n, int k, class Type, class Stored>
CUDA_EMULATOR_INLINE void load_matrix_sync(fragment<Use, m, n, k, Type, col_major>& to, const Stored* from,
                                           unsigned leading) {
    emulated::load(to, from, leading, false);
}
template <int m, int n, int k, class Type>
CUDA_EMULATOR_INLINE void load_matrix_sync(fragment<accumulator, m, n, k, Type>& to, const Type* from,
                                           unsigned leading, layout_t layout) {
    emulated::load(to, from, leading, layout == mem_row_major);
}

template <int m, int n, int k, class Type>
CUDA_EMULATOR_INLINE void store_matrix_sync(Type* to, const fragment<accumulator, m, n, k, Type>& from,
                                            unsigned leading, layout_t layout) {
    using Fragment = fragment<accumulator, m, n, k, Type>;
    emulated::check_address(to, leading);
    cuda_emulator::meet();
    const int lane = cuda_emulator::lane();
    for (int i = 0; i < Fragment::num_elements; i++) {
        const int row = Fragment::row(i, lane), column = Fragment::column(i, lane);
        to[layout == mem_row_major ? row * leading + column : column * leading + row] = from.x[i];
    }
}

// d = a b + c, summed in float.
template <int m, int n, int k, class TypeA, class LayoutA, class TypeB, class LayoutB, class Sum>
CUDA_EMULATOR_RAW void mma_sync(fragment<accumulator, m, n, k, Sum>& d,
                                const fragment<matrix_a, m, n, k, TypeA, LayoutA>& a,
                                const fragment<matrix_b, m, n, k, TypeB, LayoutB>& b,
                                const fragment<accumulator, m, n, k, Sum>& c) {
    using A = fragment<matrix_a, m, n, k, TypeA, LayoutA>;
    using B = fragment<matrix_b, m, n, k, TypeB, LayoutB>;
    struct Operands {
        const A* a;
        const B* b;
    };
    const Operands(&given)[32] = cuda_emulator::warp_exchange(cuda_emulator_all_lanes, Operands{&a, &b});
    const int lane = cuda_emulator::lane();
    Sum sums[fragment<accumulator, m, n, k, Sum>::num_elements];
    for (int i = 0; i < d.num_elements; i++) {
        const int row = d.row(i, lane), column = d.column(i, lane);
        float sum = float(c.x[i]);
        for (int j = 0; j < k; j++) {
            const int in_a = row * k + j, in_b = j * n + column;
            sum += float(given[in_a % 32].a->x[in_a / 32]) * float(given[in_b % 32].b->x[in_b / 32]);
        }
        sums[i] = Sum(sum);
    }
    cuda_emulator::meet();  // no lane may overwrite its operands before all have read them
    for (int i = 0; i < d.num_elements; i++) {
        d.x[i] = sums[i];
    }
}

}  // namespace wmma
}  // namespace nvcuda
