// Rows in registers: the share of a row that one thread of a team (a warp, or a block) holds, in packs.
//
// Pack k of thread t of a team of n begins at column (k n + t) PACK, whatever the row's length and address: the order
// of a sum, and so its bits, depends on neither. Rows that are aligned are moved 16 bytes at a time, others element by
// element. What a pack holds beyond the end of its row is filled up and never stored.
#pragma once

#include "gpu_packs.cuh"

constexpr int WARP_COLUMNS = 1024;                     // the longest row that a warp holds in registers
constexpr int WARP_PACKS = WARP_COLUMNS / WARP / PACK;  // packs of each lane then: 32 floats

// The pack that begins at `p`, `left` elements before the end of its row.
__device__ __forceinline__ void load_part(const Storage* p, int left, bool aligned, float fill, float (&values)[PACK]) {
#pragma unroll
    for (int i = 0; i < PACK; ++i) values[i] = fill;
    if (aligned) {
        if (left > 0) load_pack(p, values);
    } else {
#pragma unroll
        for (int i = 0; i < PACK; ++i) {
            if (i < left) values[i] = load(p + i);
        }
    }
}

__device__ __forceinline__ void store_part(Storage* p, int left, bool aligned, const float (&values)[PACK]) {
    if (aligned) {
        if (left > 0) store_pack(p, values);
    } else {
#pragma unroll
        for (int i = 0; i < PACK; ++i) {
            if (i < left) store(p + i, values[i]);
        }
    }
}

// The slow way to a pack, of which `left` elements are in the row. Not inlined: copies of it would take registers from
// the kernels whose rows are aligned.
__device__ __noinline__ Pack gather(const Storage* p, int left, float fill) {
    Pack pack;
#pragma unroll
    for (int i = 0; i < PACK; ++i) pack.element[i] = i < left ? p[i] : from_float<Storage>(fill);
    return pack;
}

// A thread's packs of the row that begins at `row`, shared out to teams of TEAM threads. Not yet converted: nothing
// waits for the reads of one row before those of the next are on their way.
template <int TEAM, int OWN>
__device__ __forceinline__ void read_row(const Storage* row, int columns, bool aligned, float fill,
                                         Pack (&packs)[OWN]) {
#pragma unroll
    for (int k = 0; k < OWN; ++k) {
#pragma unroll
        for (int i = 0; i < PACK; ++i) packs[k].element[i] = from_float<Storage>(fill);
    }
    int first = threadIdx.x % TEAM * PACK;
    if (aligned) {
#pragma unroll
        for (int k = 0; k < OWN; ++k) {
            int column = first + k * TEAM * PACK;
            if (column < columns) packs[k] = read_pack(row + column);
        }
    } else {
#pragma unroll
        for (int k = 0; k < OWN; ++k) {
            int column = first + k * TEAM * PACK;
            if (column < columns) packs[k] = gather(row + column, columns - column, fill);
        }
    }
}

__device__ __forceinline__ void to_floats(const Pack& pack, float (&values)[PACK]) {
#pragma unroll
    for (int i = 0; i < PACK; ++i) values[i] = to_float(pack.element[i]);
}

template <int OWN>
__device__ __forceinline__ void to_floats(const Pack (&packs)[OWN], float (&values)[OWN][PACK]) {
#pragma unroll
    for (int k = 0; k < OWN; ++k) to_floats(packs[k], values[k]);
}
