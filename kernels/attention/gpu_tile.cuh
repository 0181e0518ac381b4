// Tiles of float32 in shared memory, and the two products on them that attention and its gradients are made of.
//
// A block works on ROWS x COLUMNS scores: eight threads side by side share ROWS_A_THREAD rows that follow one another,
// and each of them owns COLUMNS_A_THREAD columns. Both products read 16 bytes at a time, free of bank conflicts, and do
// 32 multiply-adds for every three such reads.
#pragma once

#include "attention/gpu_work.cuh"

using Element = float;

constexpr int THREADS_A_ROW = 8;  // side by side
constexpr int ROWS_A_THREAD = 4;  // a Philox block, where rows are keys
constexpr int COLUMNS_A_THREAD = HEAD_SIZE > 64 ? 4 : 8;  // Philox blocks, where columns are keys
constexpr int COLUMNS = THREADS_A_ROW * COLUMNS_A_THREAD;
constexpr int KEYS = COLUMNS, QUERIES = COLUMNS;
constexpr int STAGES = 1;                                 // a tile of columns at a time
constexpr int SIZE_A_THREAD = HEAD_SIZE / THREADS_A_ROW;  // elements of an output row
constexpr int PITCH = HEAD_SIZE + 4;  // a step of 16 bytes: neighbouring rows begin in different banks
constexpr int SCORE_PITCH = COLUMNS + 4;
constexpr int SCRATCH = ROWS * SCORE_PITCH;  // floats: the weights of a product, for the threads that share their rows

template <int> using Scores = float[ROWS_A_THREAD][COLUMNS_A_THREAD];  // of this thread
using Sums = float[ROWS_A_THREAD][SIZE_A_THREAD];

template <int N> __device__ __forceinline__ float& at(float (&x)[ROWS_A_THREAD][N], int i, int j) { return x[i][j]; }

// This thread's place among those of its rows, and where its row i lies in its tile.
__device__ __forceinline__ int place_in_row() { return threadIdx.x % THREADS_A_ROW; }
__device__ __forceinline__ int row_of(int i) { return threadIdx.x / THREADS_A_ROW * ROWS_A_THREAD + i; }

__device__ __forceinline__ void read_four(const float* p, float (&x)[4]) {
    float4 four = *reinterpret_cast<const float4*>(p);
    x[0] = four.x;
    x[1] = four.y;
    x[2] = four.z;
    x[3] = four.w;
}

// Where a column lies in its tile. A thread owns columns in fours that follow one another (one Philox block each), and
// the eight threads read rows of the tile that follow one another (no bank conflict): so the tile is stored shuffled.
__device__ __forceinline__ int slot_of(int column) {
    return (column & ~31) | ((column & 3) << 3) | ((column >> 2) & 7);
}

// Where this thread's column j lies in its tile: in slot 8 j + place_in_row().
__device__ __forceinline__ int column_of(int j) { return j / 4 * 32 + place_in_row() * 4 + j % 4; }

// `count` rows of one head, `stride` elements apart -> a tile of TILE_ROWS; what the sequence or the head lacks is 0.
template <int TILE_ROWS, bool AS_COLUMNS>
__device__ __forceinline__ void load_tile(float* tile, const Storage* source, long long stride, int count, int size,
                                          bool packs) {
    constexpr int PACKS_A_ROW = HEAD_SIZE / PACK;
    static_assert(TILE_ROWS * PACKS_A_ROW % THREADS == 0, "the block loads whole rounds of packs");
#pragma unroll 2
    for (int round = 0; round < TILE_ROWS * PACKS_A_ROW / THREADS; ++round) {
        const int pack = round * THREADS + threadIdx.x, row = pack / PACKS_A_ROW, column = pack % PACKS_A_ROW * PACK;
        const Storage* from = source + row * stride + column;
        float values[PACK] = {};
        if (packs) {
            if (row < count && column < size) load_pack(from, values);
        } else {
#pragma unroll
            for (int k = 0; k < PACK; ++k) {
                if (row < count && column + k < size) values[k] = load(from + k);
            }
        }
        float* to = tile + (AS_COLUMNS ? slot_of(row) : row) * PITCH + column;
#pragma unroll
        for (int k = 0; k < PACK; k += 4) {
            *reinterpret_cast<float4*>(to + k) = make_float4(values[k], values[k + 1], values[k + 2], values[k + 3]);
        }
    }
}

__device__ __forceinline__ void load_number(float* to, const float* from) { *to = *from; }

// scores = a b', of which the first `count` columns are real.
__device__ __forceinline__ void dot_rows(const float* a, const float* b, int, Scores<COLUMNS>& scores) {
    a += row_of(0) * PITCH;
    b += place_in_row() * PITCH;
#pragma unroll
    for (int i = 0; i < ROWS_A_THREAD; ++i) {
#pragma unroll
        for (int j = 0; j < COLUMNS_A_THREAD; ++j) scores[i][j] = 0;
    }
#pragma unroll 2
    for (int d = 0; d < HEAD_SIZE; d += 4) {
        float x[ROWS_A_THREAD][4];
#pragma unroll
        for (int i = 0; i < ROWS_A_THREAD; ++i) read_four(a + i * PITCH + d, x[i]);
#pragma unroll
        for (int j = 0; j < COLUMNS_A_THREAD; ++j) {
            float y[4];
            read_four(b + j * THREADS_A_ROW * PITCH + d, y);
#pragma unroll
            for (int i = 0; i < ROWS_A_THREAD; ++i) {
#pragma unroll
                for (int k = 0; k < 4; ++k) scores[i][j] += x[i][k] * y[k];
            }
        }
    }
}

// sums += weights b, over the columns of `b` of which the first `count` are real. `scratch` is the block's; a warp
// reads of it what its own threads write.
__device__ __forceinline__ void add_weighted(const Scores<COLUMNS>& weights, const float* b, int count, float* scratch,
                                             Sums& sums) {
    scratch += row_of(0) * SCORE_PITCH;
    b += place_in_row() * 4;
#pragma unroll
    for (int i = 0; i < ROWS_A_THREAD; ++i) {
#pragma unroll
        for (int j = 0; j < COLUMNS_A_THREAD; ++j) {
            scratch[i * SCORE_PITCH + j * THREADS_A_ROW + place_in_row()] = weights[i][j];
        }
    }
    __syncwarp();  // what the others read is there
#pragma unroll 1
    for (int s = 0; s < min(COLUMNS, (count + 31) & ~31); s += 4) {
        float w[ROWS_A_THREAD][4];
#pragma unroll
        for (int i = 0; i < ROWS_A_THREAD; ++i) read_four(scratch + i * SCORE_PITCH + s, w[i]);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
            for (int n = 0; n < SIZE_A_THREAD; n += 4) {
                float x[4];
                read_four(b + (s + k) * PITCH + n * THREADS_A_ROW, x);
#pragma unroll
                for (int i = 0; i < ROWS_A_THREAD; ++i) {
#pragma unroll
                    for (int m = 0; m < 4; ++m) sums[i][n + m] += w[i][k] * x[m];
                }
            }
        }
    }
    __syncwarp();  // before the next weights take the place of these
}

__device__ __forceinline__ void clear(Sums& sums) {
#pragma unroll
    for (int i = 0; i < ROWS_A_THREAD; ++i) {
#pragma unroll
        for (int n = 0; n < SIZE_A_THREAD; ++n) sums[i][n] = 0;
    }
}

// Rows of which the tile has `rows`, row i times factor[i], to memory: `out` at the tile's first row and column, of an
// array that begins on a multiple of 16 bytes.
__device__ __forceinline__ void store_rows(Storage* out, long long stride, int rows, int size, const Sums& sums,
                                           const float (&factor)[ROWS_A_THREAD]) {
#pragma unroll
    for (int i = 0; i < ROWS_A_THREAD; ++i) {
        if (row_of(i) >= rows) continue;
#pragma unroll
        for (int n = 0; n < SIZE_A_THREAD; n += 4) {
            const int column = n * THREADS_A_ROW + place_in_row() * 4;
            Storage* to = out + row_of(i) * stride + column;
            float x[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) x[k] = sums[i][n + k] * factor[i];
            if (sizeof(Storage) == sizeof(float) && size % 4 == 0) {
                if (column < size) *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
                continue;
            }
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                if (column + k < size) store(to + k, x[k]);
            }
        }
    }
}

// Over the eight threads that share rows.
__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
    for (int offset = THREADS_A_ROW / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
    return x;
}

__device__ __forceinline__ float row_max(float x) {
#pragma unroll
    for (int offset = THREADS_A_ROW / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, offset));
    return x;
}

// ---------------------------------------------------------------------------------------------------------- dropout

// Which scores of this thread are kept: bit COLUMNS_A_THREAD i + j where rows are queries, 4 j + i where they are keys.
// The random words are drawn in a loop: unrolled, every bit would be a register.
struct KeptKeys {
    unsigned bits;
    __device__ __forceinline__ bool operator()(int i, int j) const { return bits >> (COLUMNS_A_THREAD * i + j) & 1; }
};

struct KeptQueries {
    unsigned bits;
    __device__ __forceinline__ bool operator()(int i, int j) const { return bits >> (4 * j + i) & 1; }
};

// Rows are queries, columns are keys from `start` of the sequence on.
__device__ __forceinline__ KeptKeys keep_keys(const Dropout& dropout, const Work& work, int heads, int start, int) {
    if (dropout.drop == 0) return {ALL_LANES};
    unsigned bits = 0;
#pragma unroll 1
    for (int bit = 0; bit < ROWS_A_THREAD * COLUMNS_A_THREAD; bit += 4) {
        const unsigned query = query_of(work, work.start + row_of(bit / COLUMNS_A_THREAD), heads);
        bits |= keep_bits(dropout, query, (start + column_of(bit % COLUMNS_A_THREAD)) / 4) << bit;
    }
    return {bits};
}

// Rows are keys, columns are queries from `start` of the sequence on.
__device__ __forceinline__ KeptQueries keep_queries(const Dropout& dropout, const Work& work, int heads, int start,
                                                    int) {
    if (dropout.drop == 0) return {ALL_LANES};
    unsigned bits = 0;
#pragma unroll 1
    for (int j = 0; j < COLUMNS_A_THREAD; ++j) {
        const unsigned query = query_of(work, start + column_of(j), heads);
        bits |= keep_bits(dropout, query, (work.start + row_of(0)) / 4) << 4 * j;
    }
    return {bits};
}
