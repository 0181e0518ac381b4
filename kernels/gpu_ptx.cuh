// Everything that is written in PTX: tensor cores and how their operands are loaded (PTX ISA, "Matrix multiply-accumulate
// operations using mma instruction", m16n8k16). Each has a twin in C++ that the emulator runs, where no assembly can be.
//
// Fragments, with g = lane / 4 and t = lane % 4; a register holds two neighbours, the first in its lower half:
//   A (16 x 16)   a[0]: row g, columns 2t and 2t + 1; a[1]: row g + 8; a[2], a[3]: the same rows, 8 columns on
//   B (16 x 8)    b0: rows 2t and 2t + 1, column g; b1: the same, 8 rows on
//   D (16 x 8)    d[0], d[1]: row g, columns 2t and 2t + 1; d[2], d[3]: row g + 8
// So two D side by side are an A, register by register: what one product gives can be the operand of the next.
#pragma once

#include "gpu_common.cuh"

#ifdef CUDA_EMULATOR

union Pair {
    unsigned bits;
    unsigned short half[2];
};

// The lower or upper half of a register, as a number.
template <class T> inline float half_of(unsigned bits, int upper) {
    Pair pair{bits};
    T x;
    memcpy(&x, &pair.half[upper], sizeof x);
    return to_float(x);
}

template <class T> inline unsigned round_pair(float low, float high) {
    const T pair[2] = {from_float<T>(low), from_float<T>(high)};
    unsigned bits;
    memcpy(&bits, pair, sizeof bits);
    return bits;
}

struct MmaOperands {
    unsigned a[4], b[2];
};

template <class T> inline void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    const MmaOperands mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    const void* given = cuda_emulator_exchange(ALL_LANES, &mine, sizeof mine, __FILE__, __LINE__);
    const MmaOperands* lanes = static_cast<const MmaOperands*>(given);
    const int g = cuda_emulator_lane() / 4, t = cuda_emulator_lane() % 4;
    for (int q = 0; q < 4; ++q) {  // the four lanes that share a row of A, a column of B
        const MmaOperands &row = lanes[4 * g + q], &left = lanes[8 * t + q], &right = lanes[8 * t + 4 + q];
        for (int k = 0; k < 4; ++k) {  // the four elements that each of them holds
            const float top = half_of<T>(row.a[k / 2 * 2], k % 2), below = half_of<T>(row.a[k / 2 * 2 + 1], k % 2);
            const float x = half_of<T>(left.b[k / 2], k % 2), y = half_of<T>(right.b[k / 2], k % 2);
            d[0] += top * x;
            d[1] += top * y;
            d[2] += below * x;
            d[3] += below * y;
        }
    }
}

inline void load_matrices(unsigned (&x)[4], const void* row) {
    const unsigned long long mine = reinterpret_cast<unsigned long long>(row);
    const void* given = cuda_emulator_exchange(ALL_LANES, &mine, sizeof mine, __FILE__, __LINE__);
    const unsigned long long* rows = static_cast<const unsigned long long*>(given);
    const int g = cuda_emulator_lane() / 4, t = cuda_emulator_lane() % 4;
    for (int m = 0; m < 4; ++m) x[m] = reinterpret_cast<const unsigned*>(rows[8 * m + g])[t];
}

inline void load_matrices_transposed(unsigned (&x)[4], const void* row) {
    const unsigned long long mine = reinterpret_cast<unsigned long long>(row);
    const void* given = cuda_emulator_exchange(ALL_LANES, &mine, sizeof mine, __FILE__, __LINE__);
    const unsigned long long* rows = static_cast<const unsigned long long*>(given);
    const int g = cuda_emulator_lane() / 4, t = cuda_emulator_lane() % 4;
    for (int m = 0; m < 4; ++m) {
        const unsigned low = reinterpret_cast<const unsigned short*>(rows[8 * m + 2 * t])[g];
        const unsigned high = reinterpret_cast<const unsigned short*>(rows[8 * m + 2 * t + 1])[g];
        x[m] = low | high << 16;
    }
}

#else

// The lower or upper half of a register, as a number.
template <class T> __device__ __forceinline__ float half_of(unsigned bits, int upper);

template <> __device__ __forceinline__ float half_of<__half>(unsigned bits, int upper) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(upper ? bits >> 16 : bits)));
}

template <> __device__ __forceinline__ float half_of<__nv_bfloat16>(unsigned bits, int upper) {
    return __uint_as_float(upper ? bits & 0xffff0000u : bits << 16);
}

// Two numbers rounded to nearest even, in one register.
template <class T> __device__ __forceinline__ unsigned round_pair(float low, float high);

template <> __device__ __forceinline__ unsigned round_pair<__half>(float low, float high) {
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

template <> __device__ __forceinline__ unsigned round_pair<__nv_bfloat16>(float low, float high) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// d += a b, summed in float32: one product of 16 x 16 by 16 x 8, of the whole warp.
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);

template <>
__device__ __forceinline__ void mma<__half>(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane i names row i % 8 of matrix i / 8 (16 bytes, aligned),
// and gets of each matrix row lane / 4, columns 2 (lane % 4) and the next.
__device__ __forceinline__ void load_matrices(unsigned (&x)[4], const void* row) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
}

// The same, transposed: it gets column lane / 4, rows 2 (lane % 4) and the next.
__device__ __forceinline__ void load_matrices_transposed(unsigned (&x)[4], const void* row) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
}

#endif
