// Everything that is written in PTX: tensor cores, how their operands are loaded (PTX ISA, "Matrix multiply-accumulate
// operations using mma instruction", m16n8k16), and copies that nobody waits for (cp.async). Each has a twin in C++
// that the emulator runs, where no assembly can be.
//
// Fragments, with g = lane / 4 and t = lane % 4; a register holds two neighbours, the first in its lower half:
//   A (16 x 16)   a[0]: row g, columns 2t and 2t + 1; a[1]: row g + 8; a[2], a[3]: the same rows, 8 columns on
//   B (16 x 8)    b0: rows 2t and 2t + 1, column g; b1: the same, 8 rows on
//   D (16 x 8)    d[0], d[1]: row g, columns 2t and 2t + 1; d[2], d[3]: row g + 8
// So two D side by side are an A, register by register: what one product gives can be the operand of the next.
#pragma once

#include "gpu_common.cuh"

#ifdef CUDA_EMULATOR

// The lower or upper half of a register, as a number.
template <class T> __device__ __forceinline__ float half_of(unsigned bits, int upper) {
    const unsigned short half = static_cast<unsigned short>(upper ? bits >> 16 : bits);
    T x;
    memcpy(&x, &half, sizeof x);
    return to_float(x);
}

template <class T> __device__ __forceinline__ unsigned round_pair(float low, float high) {
    const T pair[2] = {from_float<T>(low), from_float<T>(high)};
    unsigned bits;
    memcpy(&bits, pair, sizeof bits);
    return bits;
}

struct MmaOperands {
    float a[4][2], b[2][2];
};

template <class T> CUDA_EMULATOR_RAW void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    MmaOperands mine;
    for (int upper = 0; upper < 2; ++upper) {
        for (int i = 0; i < 4; ++i) mine.a[i][upper] = half_of<T>(a[i], upper);
        mine.b[0][upper] = half_of<T>(b0, upper);
        mine.b[1][upper] = half_of<T>(b1, upper);
    }
    const MmaOperands(&lanes)[WARP] = cuda_emulator::warp_exchange(ALL_LANES, mine);
    const int g = cuda_emulator::lane() / 4, t = cuda_emulator::lane() % 4;
    for (int q = 0; q < 4; ++q) {  // the four lanes that share a row of A, a column of B
        const MmaOperands &row = lanes[4 * g + q], &left = lanes[8 * t + q], &right = lanes[8 * t + 4 + q];
        for (int k = 0; k < 2; ++k) {
            for (int upper = 0; upper < 2; ++upper) {
                d[0] += row.a[2 * k][upper] * left.b[k][upper];
                d[1] += row.a[2 * k][upper] * right.b[k][upper];
                d[2] += row.a[2 * k + 1][upper] * left.b[k][upper];
                d[3] += row.a[2 * k + 1][upper] * right.b[k][upper];
            }
        }
    }
}

// Of four matrices: the rows `first` and `first` + 1 that lanes named. Reading them is left to who is watched.
CUDA_EMULATOR_RAW static void matrix_rows(const void* row, int first, const unsigned short* (&rows)[4][2]) {
    const void* const(&given)[WARP] = cuda_emulator::warp_exchange(ALL_LANES, row);
    if (reinterpret_cast<unsigned long long>(row) % 16 != 0) {
        cuda_emulator_fail("misaligned access", "ldmatrix takes rows at multiples of 16 bytes");
    }
    for (int m = 0; m < 4; ++m) {
        for (int i = 0; i < 2; ++i) rows[m][i] = static_cast<const unsigned short*>(given[8 * m + (first + i) % 8]);
    }
}

__device__ __forceinline__ void load_matrices(unsigned (&x)[4], const void* row) {
    const unsigned short* rows[4][2];
    matrix_rows(row, cuda_emulator::lane() / 4, rows);
    const int t = cuda_emulator::lane() % 4;
    for (int m = 0; m < 4; ++m) x[m] = reinterpret_cast<const unsigned*>(rows[m][0])[t];
}

__device__ __forceinline__ void load_matrices_transposed(unsigned (&x)[4], const void* row) {
    const unsigned short* rows[4][2];
    matrix_rows(row, 2 * (cuda_emulator::lane() % 4), rows);
    const int g = cuda_emulator::lane() / 4;
    for (int m = 0; m < 4; ++m) x[m] = rows[m][0][g] | static_cast<unsigned>(rows[m][1][g]) << 16;
}

template <int BYTES> __device__ __forceinline__ void copy_async(void* to, const void* from, bool real) {
    cuda_emulator_copy_async(to, from, BYTES, real ? 0 : BYTES);
}

__device__ __forceinline__ void commit_copies() { cuda_emulator_copy_async_commit(); }

template <int GROUPS> __device__ __forceinline__ void wait_for_copies() { cuda_emulator_copy_async_wait(GROUPS); }

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

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane i names row i % 8 of matrix i / 8 (16 bytes,
// aligned), and gets of each matrix row lane / 4, columns 2 (lane % 4) and the next.
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

// 4 or 16 bytes from global memory to shared memory, both aligned to that; zeros where not `real`. `from` is valid
// memory.
template <int BYTES> __device__ __forceinline__ void copy_async(void* to, const void* from, bool real) {
    static_assert(BYTES == 4 || BYTES == 16, "what cp.async copies");
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    const int bytes = real ? BYTES : 0;
    if constexpr (BYTES == 16) {  // past the first cache: no other block of this multiprocessor may want them
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
    }
}

// The copies of this thread since the last commit are a group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all groups of this thread but the newest GROUPS have arrived; a barrier then tells the other threads.
template <int GROUPS> __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

#endif
