// Which tile of which sequence and head a block works on, and the random words of its scores.
#pragma once

#include "gpu_common.cuh"

#ifndef HEAD_SIZE
#define HEAD_SIZE 64  // what a head is padded to
#endif

constexpr int THREADS = 128;  // of a block
constexpr int ROWS = 64;      // of a tile

template <class T> constexpr bool is_float16 = false;
template <> constexpr bool is_float16<__half> = true;

// The first row of the tile that a warp works on.
__device__ __forceinline__ int warp_row() { return threadIdx.x / WARP * (ROWS / (THREADS / WARP)); }

// A tile of the rows of one sequence and head.
struct Work {
    int first;   // packed row at which the sequence begins
    int length;  // of the sequence
    int head;
    int start;  // of the tile, counted in the sequence
    int rows;   // of the tile that the sequence has; none where <= 0
};

__device__ __forceinline__ Work work_at(long long item, const int* cu_seqlens, int heads, int tiles, int tile_rows) {
    Work work;
    int sequence = static_cast<int>(item / tiles / heads);
    work.first = cu_seqlens[sequence];
    work.length = cu_seqlens[sequence + 1] - work.first;
    work.head = static_cast<int>(item / tiles % heads);
    work.start = static_cast<int>(item % tiles) * tile_rows;
    work.rows = min(work.length - work.start, tile_rows);
    return work;
}

// Random words of keys 4 quad .. 4 quad + 3 against one query: a Philox block. `quads` is the mask's width in blocks.
struct Dropout {
    unsigned drop;  // a score whose word is below this is dropped; 0: none is
    float kept;     // the factor of the others
    int quads;
    unsigned seed, stream, step, layer, first_block;
};

__device__ __forceinline__ Dropout make_dropout(unsigned drop, float kept, int quads, const Stream& stream) {
    return {drop, kept, quads, stream.seed, stream.stream, stream_step(stream), stream.layer, stream.first_block};
}

// The number of a query and head among all, which names its random words.
__device__ __forceinline__ unsigned query_of(const Work& work, int place, int heads) {
    return static_cast<unsigned>(work.first + place) * heads + work.head;
}

// Which of keys 4 quad .. 4 quad + 3 a query keeps, as bits.
__device__ __forceinline__ unsigned keep_bits(const Dropout& dropout, unsigned query, int quad) {
    const unsigned block =
        dropout.first_block + query * static_cast<unsigned>(dropout.quads) + static_cast<unsigned>(quad);
    const uint4 words = philox(dropout.seed, dropout.stream, dropout.step, dropout.layer, block);
    return (words.x >= dropout.drop) | (words.y >= dropout.drop) << 1 | (words.z >= dropout.drop) << 2 |
           (words.w >= dropout.drop) << 3;
}
