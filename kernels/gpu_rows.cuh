// Rows in registers: the share of a row that one thread of a team (a warp, or a block) holds, in packs.
//
// Pack k of thread t of a team of n begins at column (k n + t) PACK, whatever the row's length and address: the order
// of a sum, and so its bits, depends on neither. Rows that are aligned are moved 16 bytes at a time, others element by
// element. What a pack holds beyond the end of its row is filled up and never stored.
#pragma once

#include "gpu_common.cuh"

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

// A thread's packs of the row that begins at `row`, shared out to teams of TEAM threads. One branch for all of them, so
// that all their loads are in flight.
template <int TEAM, int PACKS>
__device__ __forceinline__ void load_row(const Storage* row, int columns, bool aligned, float fill,
                                         float (&values)[PACKS][PACK]) {
    int thread = threadIdx.x % TEAM;
    if (aligned) {
#pragma unroll
        for (int k = 0; k < PACKS; ++k) {
            int column = (k * TEAM + thread) * PACK;
            load_part(row + column, columns - column, true, fill, values[k]);
        }
    } else {
#pragma unroll
        for (int k = 0; k < PACKS; ++k) {
            int column = (k * TEAM + thread) * PACK;
            load_part(row + column, columns - column, false, fill, values[k]);
        }
    }
}
