// Tiles of 16-bit elements in shared memory, and the two products on them by tensor cores that attention and its
// gradients are made of.
//
// A block of 4 warps works on ROWS x KEYS or ROWS x QUERIES scores, 16 rows a warp. Scores and sums stay in registers,
// as D fragments (gpu_ptx.cuh): of the 8 columns of part n a lane holds [n][0] and [n][1], columns 2 (lane % 4) and the
// next of row lane / 4, and [n][2] and [n][3], the same columns of row lane / 4 + 8.
//
// The arrays' elements are exact as operands, and their products are summed in float32. Probabilities and gradients of
// scores are float32, and operands of the next product: each is rounded to TERMS numbers of 16 bits that sum to it. One
// is what flash attention keeps, and what the formula calls `stored`. Two in float16, or three in bfloat16, would lose no
// digit of float32; in products, forward takes then 3 or 4 instead of 2, and backward 10 or 13 instead of 7.
#pragma once

#include "attention/gpu_work.cuh"
#include "gpu_ptx.cuh"

using Element = Storage;  // __half or __nv_bfloat16

template <class T> constexpr bool is_float16 = false;
template <> constexpr bool is_float16<__half> = true;

constexpr int TERMS = 1;  // see above
constexpr int THREADS = 128;
constexpr int ROWS = 64;
constexpr int KEYS = HEAD_SIZE > 64 ? 32 : 64;  // columns where rows are queries; fewer where registers are fewer
constexpr int QUERIES = 32;                     // columns where rows are keys
constexpr int SIZE_PARTS = HEAD_SIZE / 8;
constexpr int PITCH = HEAD_SIZE + 8;  // an odd number of 16 bytes: eight rows that follow one another share no bank

// `count` rows of one head, `stride` elements apart -> a tile of TILE_ROWS; what the sequence or the head lacks is 0.
// In packs the tile has come when the group of copies that is committed next has.
template <int TILE_ROWS>
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

// scores = a b': `a` at the warp's first row, the first `count` rows of `b` are real (the scores of others may be 0).
template <int PARTS>
__device__ __forceinline__ void dot_rows(const Element* a, const Element* b, int count, float (&scores)[PARTS][4]) {
    const int lane = threadIdx.x % WARP;
    a += lane % 16 * PITCH + lane / 16 * 8;
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
__device__ __forceinline__ void add_weighted(const float (&weights)[PARTS][4], const Element* b, int count,
                                             float (&sums)[SIZE_PARTS][4]) {
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

__device__ __forceinline__ void clear(float (&sums)[SIZE_PARTS][4]) {
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

// float16 has few exponents: weights of any size are multiplied in units of a power of two for each row, which makes
// the largest so far 2^14 to 2^15. `sums`, in the unit so far, follow. bfloat16 has the exponents of float32.
constexpr float SMALLEST_UNIT = 0x1p-100f;

template <int PARTS>
__device__ __forceinline__ void scale_to_unit(float (&weights)[PARTS][4], float (&unit)[2],
                                              float (&sums)[SIZE_PARTS][4]) {
    if constexpr (is_float16<Element>) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float largest = 0;
#pragma unroll
            for (int n = 0; n < PARTS; ++n) {
                largest = fmaxf(largest, fmaxf(fabsf(weights[n][2 * half]), fabsf(weights[n][2 * half + 1])));
            }
            const float power = __uint_as_float(__float_as_uint(row_max(largest)) & 0x7f800000u);
            const float next = fmaxf(unit[half], power * 0x1p-14f);
            const float shrink = unit[half] / next, grow = 1 / next;
            unit[half] = next;
#pragma unroll
            for (int n = 0; n < SIZE_PARTS; ++n) {
                sums[n][2 * half] *= shrink;
                sums[n][2 * half + 1] *= shrink;
            }
#pragma unroll
            for (int n = 0; n < PARTS; ++n) {
                weights[n][2 * half] *= grow;
                weights[n][2 * half + 1] *= grow;
            }
        }
    }
}

// The rows that the warp has (`rows` in all), times `factor`, to memory: `out` at the warp's first row, of an array
// that begins on a multiple of 4 bytes.
__device__ __forceinline__ void store_rows(Storage* out, long long stride, int rows, int size,
                                           const float (&sums)[SIZE_PARTS][4], const float (&factor)[2]) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = lane / 4 + 8 * half;
        if (row >= rows) continue;
#pragma unroll
        for (int n = 0; n < SIZE_PARTS; ++n) {
            const int column = 8 * n + lane % 4 * 2;
            const float left = sums[n][2 * half] * factor[half], right = sums[n][2 * half + 1] * factor[half];
            Storage* to = out + row * stride + column;
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

// Which of 4 keys a query keeps, as bits.
__device__ __forceinline__ unsigned keep_bits(const Dropout& dropout, unsigned query, int quad) {
    bool keep[4];
    keep_four(dropout, query, quad, keep);
    return keep[0] | keep[1] << 1 | keep[2] << 2 | keep[3] << 3;
}

// Rows are queries, from `row` of the sequence on, columns are keys from `start` on: bit 4 n + i of keep[half] tells of
// scores[n][2 half + i]. Two lanes share the random words of two rows: each draws those of one.
__device__ __forceinline__ void keep_keys(const Dropout& dropout, const Work& work, int heads, int row, int start,
                                          int count, unsigned (&keep)[2]) {
    const int lane = threadIdx.x % WARP, odd = lane % 2;
    const unsigned query = query_of(work, row + lane / 4 + 8 * odd, heads);
    unsigned mine = 0;
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n) {
        if (n * 8 < count) mine |= keep_bits(dropout, query, start / 4 + 2 * n + lane % 4 / 2) << 4 * n;
    }
    const unsigned other = __shfl_xor_sync(ALL_LANES, mine, 1);
    keep[0] = (odd ? other : mine) >> 2 * odd;
    keep[1] = (odd ? mine : other) >> 2 * odd;
}

// Rows are keys, columns are queries: bit 4 n of keep[i] tells of scores[n][i]. Four lanes share the random words of
// four keys against four queries: each draws those of one query.
__device__ __forceinline__ void keep_queries(const Dropout& dropout, const Work& work, int heads, int row, int start,
                                             int count, unsigned (&keep)[4]) {
    const int lane = threadIdx.x % WARP, key = lane / 4, half = key % 4 / 2, odd = key % 2;
    const int quad = row / 4 + 2 * half + key / 4;
    unsigned mine = 0;
#pragma unroll
    for (int n = 0; n < QUERIES / 8; ++n) {
        const unsigned query = query_of(work, start + 8 * n + lane % 4 * 2 + odd, heads);
        if (n * 8 < count) mine |= keep_bits(dropout, query, quad) << 4 * n;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        keep[i] = __shfl_sync(ALL_LANES, mine, (key / 4 * 4 + i) * 4 + lane % 4) >> key % 4;
    }
}
