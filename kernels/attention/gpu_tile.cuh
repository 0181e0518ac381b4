// Tiles of float32 in shared memory, and the two products on them that attention and its gradients are made of.
//
// A block of 128 threads works on ROWS x COLUMNS scores: eight threads side by side share ROWS_A_THREAD rows that
// follow one another, and each of them owns COLUMNS_A_THREAD columns. Both products read 16 bytes at a time, free of
// bank conflicts, and do 32 multiply-adds for every three such reads.
#pragma once

#include "attention/gpu_work.cuh"

constexpr int THREADS = 128;
constexpr int SIDE_BY_SIDE = 8;   // threads that share their rows
constexpr int ROWS_A_THREAD = 4;  // a Philox block, where rows are keys
constexpr int ROWS = 64;
constexpr int COLUMNS_A_THREAD = HEAD_SIZE > 64 ? 4 : 8;  // Philox blocks, where columns are keys
constexpr int COLUMNS = SIDE_BY_SIDE * COLUMNS_A_THREAD;
constexpr int SIZE_A_THREAD = HEAD_SIZE / SIDE_BY_SIDE;  // elements of an output row
constexpr int PITCH = HEAD_SIZE + 4;        // a step of 16 bytes: neighbouring rows begin in different banks
constexpr int SCORE_PITCH = COLUMNS + 4;

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

// Column j of thread `lane` of the eight: it lies in slot 8 j + lane.
__device__ __forceinline__ int column_of(int lane, int j) { return j / 4 * 32 + lane * 4 + j % 4; }

// `count` rows of one head, `stride` elements apart -> a tile of TILE_ROWS; what the sequence or the head lacks is 0.
template <int TILE_ROWS, bool IN_SLOTS>
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
        float* to = tile + (IN_SLOTS ? slot_of(row) : row) * PITCH + column;
#pragma unroll
        for (int k = 0; k < PACK; k += 4) {
            *reinterpret_cast<float4*>(to + k) = make_float4(values[k], values[k + 1], values[k + 2], values[k + 3]);
        }
    }
}

// scores[i][j] = a_i . b_j, `a` at this thread's first row, `b` at its first slot.
__device__ __forceinline__ void dot_rows(const float* a, const float* b,
                                         float (&scores)[ROWS_A_THREAD][COLUMNS_A_THREAD]) {
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
            read_four(b + j * SIDE_BY_SIDE * PITCH + d, y);
#pragma unroll
            for (int i = 0; i < ROWS_A_THREAD; ++i) {
#pragma unroll
                for (int k = 0; k < 4; ++k) scores[i][j] += x[i][k] * y[k];
            }
        }
    }
}

// sums[i] += sum over slots s of weights[i][s] b[s], over the slots of `count` columns; `weights` at this thread's
// first row, `b` at its first column: it owns fours of columns, 32 apart.
__device__ __forceinline__ void add_weighted(const float* weights, const float* b, int count,
                                             float (&sums)[ROWS_A_THREAD][SIZE_A_THREAD]) {
#pragma unroll 1
    for (int s = 0; s < min(COLUMNS, (count + 31) & ~31); s += 4) {
        float w[ROWS_A_THREAD][4];
#pragma unroll
        for (int i = 0; i < ROWS_A_THREAD; ++i) read_four(weights + i * SCORE_PITCH + s, w[i]);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
            for (int n = 0; n < SIZE_A_THREAD; n += 4) {
                float x[4];
                read_four(b + (s + k) * PITCH + n * SIDE_BY_SIDE, x);
#pragma unroll
                for (int i = 0; i < ROWS_A_THREAD; ++i) {
#pragma unroll
                    for (int m = 0; m < 4; ++m) sums[i][n + m] += w[i][k] * x[m];
                }
            }
        }
    }
}

// This thread's scores into the tile that add_weighted reads; only threads of its warp read them.
__device__ __forceinline__ void write_scores(float* tile, const float (&scores)[ROWS_A_THREAD][COLUMNS_A_THREAD]) {
#pragma unroll
    for (int i = 0; i < ROWS_A_THREAD; ++i) {
#pragma unroll
        for (int j = 0; j < COLUMNS_A_THREAD; ++j) tile[i * SCORE_PITCH + j * SIDE_BY_SIDE] = scores[i][j];
    }
}

// A row's share of this thread, times `factor`, to memory: `out` at the thread's first column, which is `column`, of an
// array that begins on a multiple of 16 bytes.
__device__ __forceinline__ void store_row(Storage* out, const float (&sums)[SIZE_A_THREAD], float factor, int column,
                                          int size) {
#pragma unroll
    for (int n = 0; n < SIZE_A_THREAD; n += 4) {
        const int offset = n * SIDE_BY_SIDE;
        const float x[4] = {sums[n] * factor, sums[n + 1] * factor, sums[n + 2] * factor, sums[n + 3] * factor};
        if (sizeof(Storage) == sizeof(float) && size % 4 == 0) {
            if (column + offset < size) *reinterpret_cast<float4*>(out + offset) = make_float4(x[0], x[1], x[2], x[3]);
            continue;
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            if (column + offset + k < size) store(out + offset + k, x[k]);
        }
    }
}

// Over the eight threads that share rows.
__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
    for (int offset = SIDE_BY_SIDE / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
    return x;
}

__device__ __forceinline__ float row_max(float x) {
#pragma unroll
    for (int offset = SIDE_BY_SIDE / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, offset));
    return x;
}
