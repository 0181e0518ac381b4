// add, mul, scale, where: y = f(...) element by element, over operands that broadcast as in NumPy.
//
//   scale, add_number, mul_number   one array and one number: a plain grid-stride loop
//   add, mul                        two arrays of any shapes that broadcast
//   where                           three of them, the condition in bytes
//
// Each byte is touched once and hardly any arithmetic done with it, so memory bandwidth bounds them all: 16 bytes an
// access, several on their way for each thread, and no division but one for each row or chunk.

#include "gpu_packs.cuh"

constexpr int THREADS = 256;
constexpr int CHUNK = PACKS * WARP * PACK;  // neighbours that a warp takes at a time; PACKS as in gpu_packs.cuh

// ------------------------------------------------------------------------------------------ one array, one number

extern "C" __global__ void __launch_bounds__(THREADS)
    scale(const Storage* __restrict__ x, Storage* __restrict__ y, long long count, float factor) {
    each(x, y, count, [=](float v) { return v * factor; });
}

// The number is float32 whatever the array is stored in: the gradient of a loss, say.
extern "C" __global__ void __launch_bounds__(THREADS)
    add_number(const Storage* __restrict__ x, const float* __restrict__ number, Storage* __restrict__ y,
               long long count) {
    const float b = *number;
    each(x, y, count, [=](float v) { return v + b; });
}

extern "C" __global__ void __launch_bounds__(THREADS)
    mul_number(const Storage* __restrict__ x, const float* __restrict__ number, Storage* __restrict__ y,
               long long count) {
    const float b = *number;
    each(x, y, count, [=](float v) { return v * b; });
}

// -------------------------------------------------------------------------------------------- operands that broadcast

// The result is (outer, middle, inner). An operand has a step along each of these axes, 0 where it is repeated; along
// `inner` it is 0 or 1. Arrays of one shape are a single row: (1, 1, count).

// body(o, m, start) once for every chunk of every row (o, m), by a whole warp.
template <class Body>
__device__ __forceinline__ void for_chunks(long long outer, long long middle, long long inner, Body body) {
    const int warps_of_block = blockDim.x / WARP;
    const long long warp = static_cast<long long>(blockIdx.x) * warps_of_block + threadIdx.x / WARP;
    const long long warps = static_cast<long long>(gridDim.x) * warps_of_block;
    const long long chunks = (inner + CHUNK - 1) / CHUNK;
    for (long long i = warp; i < outer * middle * chunks; i += warps) {
        const long long row = i / chunks, o = row / middle;
        body(o, row - o * middle, (i - row * chunks) * CHUNK);
    }
}

// How many elements of each row can be moved in packs: rows that follow one another must all begin at 16 bytes.
__device__ __forceinline__ long long in_whole_packs(long long rows, long long inner, bool aligned) {
    return aligned && (rows == 1 || inner % PACK == 0) ? inner - inner % PACK : 0;
}

// PACK neighbours of a row, or its one element PACK times.
__device__ __forceinline__ Pack read_row(const Storage* row, long long step, long long j) {
    if (step != 0) return read_pack(row + j);
    Pack pack;
#pragma unroll
    for (int k = 0; k < PACK; ++k) pack.element[k] = *row;
    return pack;
}

// The same of a condition, which is in bytes.
union Flags {
    uint2 bits;
    unsigned char element[8];
};

__device__ __forceinline__ Flags read_flags(const unsigned char* row, long long step, long long j) {
    Flags flags;
    if (step == 0) {
#pragma unroll
        for (int k = 0; k < PACK; ++k) flags.element[k] = *row;
    } else if constexpr (PACK == 8) {
        flags.bits = *reinterpret_cast<const uint2*>(row + j);
    } else {
        flags.bits.x = *reinterpret_cast<const unsigned*>(row + j);
    }
    return flags;
}

// y = f(a, b). Everything is read before anything is written, so that PACKS reads of each operand wait together.
template <class Function>
__device__ __forceinline__ void combine(const Storage* __restrict__ a, const Storage* __restrict__ b,
                                        Storage* __restrict__ y, long long outer, long long middle, long long inner,
                                        long long a_outer, long long a_middle, long long a_inner, long long b_outer,
                                        long long b_middle, long long b_inner, Function f) {
    const int lane = threadIdx.x % WARP;
    const bool aligned = in_packs(0, y, a_inner ? a : nullptr, b_inner ? b : nullptr);
    const long long packed = in_whole_packs(outer * middle, inner, aligned);
    for_chunks(outer, middle, inner, [&](long long o, long long m, long long start) {
        const Storage* a_row = a + o * a_outer + m * a_middle;
        const Storage* b_row = b + o * b_outer + m * b_middle;
        Storage* y_row = y + (o * middle + m) * inner;
        const long long first = start + lane * PACK;
        Pack a_pack[PACKS], b_pack[PACKS];
#pragma unroll
        for (int p = 0; p < PACKS; ++p) {
            const long long j = first + p * WARP * PACK;
            if (j >= packed) break;
            a_pack[p] = read_row(a_row, a_inner, j);
            b_pack[p] = read_row(b_row, b_inner, j);
        }
#pragma unroll
        for (int p = 0; p < PACKS; ++p) {
            const long long j = first + p * WARP * PACK;
            if (j >= packed) break;
#pragma unroll
            for (int k = 0; k < PACK; ++k) {
                store(&a_pack[p].element[k], f(load(&a_pack[p].element[k]), load(&b_pack[p].element[k])));
            }
            write_pack(y_row + j, a_pack[p]);
        }
        for (long long j = max(start, packed) + lane; j < min(start + CHUNK, inner); j += WARP) {
            store(y_row + j, f(load(a_row + j * a_inner), load(b_row + j * b_inner)));
        }
    });
}

extern "C" __global__ void __launch_bounds__(THREADS)
    add(const Storage* __restrict__ a, const Storage* __restrict__ b, Storage* __restrict__ y, long long outer,
        long long middle, long long inner, long long a_outer, long long a_middle, long long a_inner, long long b_outer,
        long long b_middle, long long b_inner) {
    combine(a, b, y, outer, middle, inner, a_outer, a_middle, a_inner, b_outer, b_middle, b_inner,
            [](float v, float w) { return v + w; });
}

extern "C" __global__ void __launch_bounds__(THREADS)
    mul(const Storage* __restrict__ a, const Storage* __restrict__ b, Storage* __restrict__ y, long long outer,
        long long middle, long long inner, long long a_outer, long long a_middle, long long a_inner, long long b_outer,
        long long b_middle, long long b_inner) {
    combine(a, b, y, outer, middle, inner, a_outer, a_middle, a_inner, b_outer, b_middle, b_inner,
            [](float v, float w) { return v * w; });
}

extern "C" __global__ void __launch_bounds__(THREADS)
    where(const unsigned char* __restrict__ condition, const Storage* __restrict__ a, const Storage* __restrict__ b,
          Storage* __restrict__ y, long long outer, long long middle, long long inner, long long condition_outer,
          long long condition_middle, long long condition_inner, long long a_outer, long long a_middle,
          long long a_inner, long long b_outer, long long b_middle, long long b_inner) {
    const int lane = threadIdx.x % WARP;
    const bool aligned = in_packs(0, y, condition_inner ? condition : nullptr, a_inner ? a : nullptr,
                                  b_inner ? b : nullptr);
    const long long packed = in_whole_packs(outer * middle, inner, aligned);
    for_chunks(outer, middle, inner, [&](long long o, long long m, long long start) {
        const unsigned char* condition_row = condition + o * condition_outer + m * condition_middle;
        const Storage* a_row = a + o * a_outer + m * a_middle;
        const Storage* b_row = b + o * b_outer + m * b_middle;
        Storage* y_row = y + (o * middle + m) * inner;
        const long long first = start + lane * PACK;
        Flags flags[PACKS];
        Pack a_pack[PACKS], b_pack[PACKS];
#pragma unroll
        for (int p = 0; p < PACKS; ++p) {
            const long long j = first + p * WARP * PACK;
            if (j >= packed) break;
            flags[p] = read_flags(condition_row, condition_inner, j);
            a_pack[p] = read_row(a_row, a_inner, j);
            b_pack[p] = read_row(b_row, b_inner, j);
        }
#pragma unroll
        for (int p = 0; p < PACKS; ++p) {
            const long long j = first + p * WARP * PACK;
            if (j >= packed) break;
#pragma unroll
            for (int k = 0; k < PACK; ++k) {
                if (!flags[p].element[k]) a_pack[p].element[k] = b_pack[p].element[k];
            }
            write_pack(y_row + j, a_pack[p]);
        }
#pragma unroll 1
        for (long long j = max(start, packed) + lane; j < min(start + CHUNK, inner); j += WARP) {
            y_row[j] = condition_row[j * condition_inner] ? a_row[j * a_inner] : b_row[j * b_inner];
        }
    });
}
