// Tiles of 16-bit elements in shared memory, and the two products on them by tensor cores that attention and its
// gradients are made of.
//
// A block of 4 warps works on ROWS x KEYS or ROWS x QUERIES scores, 16 rows a warp. Scores and sums stay in registers,
// as D fragments (gpu_ptx.cuh): of the 8 columns of part n a lane holds [n][0] and [n][1], columns 2 (lane % 4) and the
// next of row lane / 4, and [n][2] and [n][3], the same columns of row lane / 4 + 8. Tiles of columns are copied while
// those before them are worked on.
//
// The arrays' elements are exact as operands, and their products are summed in float32. Probabilities and gradients of
// scores are float32, and operands of the next product: each is rounded to TERMS numbers of 16 bits that sum to it. One
// is what flash attention keeps, and what the formula calls `stored`. Two in float16, or three in bfloat16, would lose
// no digit of float32; in products, forward takes then 3 or 4 instead of 2, and backward 10 or 13 instead of 7.
#pragma once

#include "attention/gpu_work.cuh"
#include "gpu_ptx.cuh"

using Element = Storage;  // __half or __nv_bfloat16

constexpr int TERMS = 1;  // see above
constexpr int THREADS_A_ROW = 4;
constexpr int ROWS_A_THREAD = 2;
constexpr int KEYS = HEAD_SIZE > 64 ? 32 : 64;  // columns where rows are queries; fewer where registers are fewer
constexpr int QUERIES = 32;                     // columns where rows are keys
constexpr int STAGES = 2;                       // tiles of columns at a time
constexpr int SIZE_PARTS = HEAD_SIZE / 8;
constexpr int SIZE_A_THREAD = HEAD_SIZE / THREADS_A_ROW;  // elements of an output row
constexpr int PITCH = HEAD_SIZE + 8;  // an odd number of 16 bytes: eight rows that follow one another share no bank
constexpr int SCRATCH = 0;            // weights of a product stay in registers

template <int COLUMNS> using Scores = float[COLUMNS / 8][4];  // of this thread
using Sums = float[SIZE_PARTS][4];

// Column j of the thread's row i.
template <int PARTS> __device__ __forceinline__ float& at(float (&x)[PARTS][4], int i, int j) {
    return x[j / 2][2 * i + j % 2];
}

// Where they lie in their tile.
__device__ __forceinline__ int row_of(int i) { return warp_row() + threadIdx.x % WARP / 4 + 8 * i; }
__device__ __forceinline__ int column_of(int j) { return j / 2 * 8 + threadIdx.x % 4 * 2 + j % 2; }

// `count` rows of one head, `stride` elements apart -> a tile of TILE_ROWS; what the sequence or the head lacks is 0.
// In packs the tile has come when the group of copies that is committed next has.
template <int TILE_ROWS, bool>  // rows and columns lie alike
__device__ __forceinline__ void load_tile(Element* tile, const Storage* source, long long stride, int count, int size,
                                          bool packs) {
    constexpr int PACK_SIZE = 16 / sizeof(Element), PACKS_A_ROW = HEAD_SIZE / PACK_SIZE;
    static_assert(TILE_ROWS * PACKS_A_ROW % THREADS == 0, "the block loads whole rounds of packs");
    const Element* elements = reinterpret_cast<const Element*>(source);
    if (packs) {
#pragma unroll 1  // nothing waits for a copy, and addresses take registers
        for (int round = 0; round < TILE_ROWS * PACKS_A_ROW / THREADS; ++round) {
            const int pack = round * THREADS + threadIdx.x;
            const int row = pack / PACKS_A_ROW, column = pack % PACKS_A_ROW * PACK_SIZE;
            const bool real = row < count && column < size;
            copy_async<16>(tile + row * PITCH + column, real ? elements + row * stride + column : elements, real);
        }
    } else {
        for (int i = threadIdx.x; i < TILE_ROWS * HEAD_SIZE; i += THREADS) {
            const int row = i / HEAD_SIZE, column = i % HEAD_SIZE;
            const bool real = row < count && column < size;
            tile[row * PITCH + column] = real ? elements[row * stride + column] : from_float<Element>(0.0f);
        }
    }
}

__device__ __forceinline__ void load_number(float* to, const float* from) { copy_async<4>(to, from, true); }

// scores = a b', of which the first `count` columns are real (the scores of others may be 0).
template <int PARTS>
__device__ __forceinline__ void dot_rows(const Element* a, const Element* b, int count, float (&scores)[PARTS][4]) {
    const int lane = threadIdx.x % WARP;
    a += (warp_row() + lane % 16) * PITCH + lane / 16 * 8;
    b += (lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * 8;
#pragma unroll
    for (int n = 0; n < PARTS; ++n) scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0;
#pragma unroll 2
    for (int d = 0; d < HEAD_SIZE; d += 16) {
        unsigned x[4];
        load_matrices(x, a + d);
#pragma unroll
        for (int n = 0; n < PARTS; n += 2) {
            if (n * 8 >= count) continue;
            unsigned y[4];
            load_matrices(y, b + n * 8 * PITCH + d);
            mma<Element>(scores[n], x, y[0], y[1]);
            mma<Element>(scores[n + 1], x, y[2], y[3]);
        }
    }
}

// Two neighbours of a fragment, as TERMS registers that sum to them; the largest first.
__device__ __forceinline__ void take_apart(float low, float high, unsigned (&terms)[TERMS][4], int place) {
#pragma unroll
    for (int term = 0; term < TERMS; ++term) {
        terms[term][place] = round_pair<Element>(low, high);
        low -= half_of<Element>(terms[term][place], 0);
        high -= half_of<Element>(terms[term][place], 1);
    }
}

// sums += weights b, over the first `count` rows of `b`; weights of others must be 0.
template <int PARTS>
__device__ __forceinline__ void add_weighted(const float (&weights)[PARTS][4], const Element* b, int count, float*,
                                             Sums& sums) {
    const int lane = threadIdx.x % WARP;
    b += lane % 16 * PITCH + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < PARTS; k += 2) {
        if (k * 8 >= count) continue;
        unsigned x[TERMS][4];
        take_apart(weights[k][0], weights[k][1], x, 0);
        take_apart(weights[k][2], weights[k][3], x, 1);
        take_apart(weights[k + 1][0], weights[k + 1][1], x, 2);
        take_apart(weights[k + 1][2], weights[k + 1][3], x, 3);
#pragma unroll
        for (int n = 0; n < SIZE_PARTS; n += 2) {
            unsigned y[4];
            load_matrices_transposed(y, b + k * 8 * PITCH + n * 8);
#pragma unroll
            for (int term = TERMS - 1; term >= 0; --term) {
                mma<Element>(sums[n], x[term], y[0], y[1]);
                mma<Element>(sums[n + 1], x[term], y[2], y[3]);
            }
        }
    }
}

__device__ __forceinline__ void clear(Sums& sums) {
#pragma unroll
    for (int n = 0; n < SIZE_PARTS; ++n) sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0;
}

// Over the four lanes that share rows.
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

// Rows of which the tile has `rows`, row i times factor[i], to memory: `out` at the tile's first row and column, of an
// array that begins on a multiple of 4 bytes.
__device__ __forceinline__ void store_rows(Storage* out, long long stride, int rows, int size, const Sums& sums,
                                           const float (&factor)[ROWS_A_THREAD]) {
#pragma unroll
    for (int i = 0; i < ROWS_A_THREAD; ++i) {
        if (row_of(i) >= rows) continue;
#pragma unroll
        for (int n = 0; n < SIZE_PARTS; ++n) {
            const int column = column_of(2 * n);
            const float left = sums[n][2 * i] * factor[i], right = sums[n][2 * i + 1] * factor[i];
            Storage* to = out + row_of(i) * stride + column;
            if (size % 2 == 0) {
                if (column < size) *reinterpret_cast<unsigned*>(to) = round_pair<Element>(left, right);
            } else {
                if (column < size) store(to, left);
                if (column + 1 < size) store(to + 1, right);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------- dropout

// Which scores of this thread are kept. Rows are queries: bit 4 n + odd of bits[i] tells of column 2 n + odd of row i.
struct KeptKeys {
    unsigned bits[2];
    __device__ __forceinline__ bool operator()(int i, int j) const { return bits[i] >> (j / 2 * 4 + j % 2) & 1; }
};

// Rows are keys: bit 4 n of bits[2 i + odd] tells of column 2 n + odd of row i.
struct KeptQueries {
    unsigned bits[4];
    __device__ __forceinline__ bool operator()(int i, int j) const { return bits[2 * i + j % 2] >> j / 2 * 4 & 1; }
};

// Rows are queries, columns are keys from `start` of the sequence on, the first `count` of them real. Two lanes share
// the random words of two rows: each draws those of one.
__device__ __forceinline__ KeptKeys keep_keys(const Dropout& dropout, const Work& work, int heads, int start,
                                              int count) {
    if (dropout.drop == 0) return {ALL_LANES, ALL_LANES};
    const int odd = threadIdx.x % 2, quad = start / 4 + threadIdx.x % 4 / 2;
    const unsigned query = query_of(work, work.start + row_of(odd), heads);
    unsigned mine = 0;
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
        if (n * 8 < count) mine |= keep_bits(dropout, query, quad + 2 * n) << 4 * n;
    }
    const unsigned other = __shfl_xor_sync(ALL_LANES, mine, 1);
    return {(odd ? other : mine) >> 2 * odd, (odd ? mine : other) >> 2 * odd};
}

// Rows are keys, columns are queries from `start` of the sequence on, the first `count` of them real. Four lanes share
// the random words of four keys against four queries: each draws those of one query.
__device__ __forceinline__ KeptQueries keep_queries(const Dropout& dropout, const Work& work, int heads, int start,
                                                    int count) {
    if (dropout.drop == 0) return {ALL_LANES, ALL_LANES, ALL_LANES, ALL_LANES};
    const int lane = threadIdx.x % WARP, key = lane / 4, half = key % 4 / 2, odd = key % 2;
    const int quad = (work.start + warp_row()) / 4 + 2 * half + key / 4;
    unsigned mine = 0;
#pragma unroll
    for (int n = 0; n < QUERIES / 8; ++n) {
        const unsigned query = query_of(work, start + column_of(2 * n) + odd, heads);
        if (n * 8 < count) mine |= keep_bits(dropout, query, quad) << 4 * n;
    }
    KeptQueries kept;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        kept.bits[i] = __shfl_sync(ALL_LANES, mine, (key / 4 * 4 + i) * 4 + lane % 4) >> key % 4;
    }
    return kept;
}
