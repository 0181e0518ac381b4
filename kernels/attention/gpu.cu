// Attention (formula in __init__.py) in float32 arithmetic, by tiles: neither scores nor probabilities reach memory.
//
//   flash_forward           a block per 64 queries of a sequence and head, over tiles of its keys: scores, softmax
//                           whose maximum and sum follow along (Milakov and Gimelshein 2018; Dao et al. 2022), sums
//                           of values
//   flash_grad_delta        sum of g y, per token and head
//   flash_grad_query        a block per 64 queries, over tiles of keys: dq
//   flash_grad_key_value    a block per 64 keys, over tiles of queries: dk and dv
//
// The last two compute the probabilities again from the log sum exp, each for itself: so every sum has one owner and
// one order, there are no atomics, and the bits do not depend on the grid. Arithmetic bounds all but flash_grad_delta
// (which memory does): 4 D flops a score forward, 14 D backward. Items of work are counted up to the longest sequence;
// an item beyond the end of its own is skipped.
#include "attention/gpu_tile.cuh"

// Shared memory: queries, keys, values, and the shares that this block's rows give to the values of the tile.
extern "C" __global__ void __launch_bounds__(128, 2) flash_forward(
    const Storage* __restrict__ qkv, const int* __restrict__ cu_seqlens, Storage* __restrict__ y,
    float* __restrict__ lse, int sequences, int heads, int size, int tiles, float scale, unsigned drop, float kept,
    int quads, Stream stream) {
    extern __shared__ float4 shared[];
    float* queries = reinterpret_cast<float*>(shared);
    float* keys = queries + ROWS * PITCH;
    float* values = keys + COLUMNS * PITCH;
    float* shares = values + COLUMNS * PITCH;

    const int lane = threadIdx.x % SIDE_BY_SIDE;
    const int row0 = threadIdx.x / SIDE_BY_SIDE * ROWS_A_THREAD;
    const int warp_row0 = threadIdx.x / WARP * (ROWS / 4);
    const float minus_infinity = __int_as_float(0xff800000);
    const Dropout dropout = make_dropout(drop, kept, quads, stream);
    const int channels = heads * size;
    const bool packs = in_packs(size, qkv);

    const long long items = static_cast<long long>(sequences) * heads * tiles;
    for (long long item = blockIdx.x; item < items; item += gridDim.x) {
        const Work work = work_at(item, cu_seqlens, heads, tiles, ROWS);
        if (work.rows <= 0) continue;
        const Storage* sequence = qkv + work.first * 3LL * channels + work.head * size;
        load_tile<ROWS, false>(queries, sequence + work.start * 3LL * channels, 3LL * channels, work.rows, size, packs);

        float top[ROWS_A_THREAD], total[ROWS_A_THREAD], sums[ROWS_A_THREAD][SIZE_A_THREAD];
#pragma unroll
        for (int i = 0; i < ROWS_A_THREAD; ++i) {
            top[i] = minus_infinity;
            total[i] = 0;
#pragma unroll
            for (int n = 0; n < SIZE_A_THREAD; ++n) sums[i][n] = 0;
        }

        for (int start = 0; start < work.length; start += COLUMNS) {
            const int columns = min(work.length - start, COLUMNS);
            const Storage* key = sequence + channels + start * 3LL * channels;
            load_tile<COLUMNS, true>(keys, key, 3LL * channels, columns, size, packs);
            load_tile<COLUMNS, true>(values, key + channels, 3LL * channels, columns, size, packs);
            __syncthreads();
            if (warp_row0 < work.rows) {  // a whole warp, or none of it
                float scores[ROWS_A_THREAD][COLUMNS_A_THREAD];
                dot_rows(queries + row0 * PITCH, keys + lane * PITCH, scores);
#pragma unroll
                for (int i = 0; i < ROWS_A_THREAD; ++i) {
                    float new_top = top[i];
#pragma unroll
                    for (int j = 0; j < COLUMNS_A_THREAD; ++j) {
                        scores[i][j] = column_of(lane, j) < columns ? scores[i][j] * scale : minus_infinity;
                        new_top = fmaxf(new_top, scores[i][j]);
                    }
                    new_top = row_max(new_top);
                    const float shrink = expf(top[i] - new_top);
                    top[i] = new_top;
                    total[i] *= shrink;
#pragma unroll
                    for (int n = 0; n < SIZE_A_THREAD; ++n) sums[i][n] *= shrink;
#pragma unroll
                    for (int j = 0; j < COLUMNS_A_THREAD; ++j) {
                        scores[i][j] = expf(scores[i][j] - new_top);
                        total[i] += scores[i][j];  // of this thread's columns; the eight are added at the end
                    }
                    if (drop > 0) {
                        const unsigned query = query_of(work, work.start + row0 + i, heads);
#pragma unroll
                        for (int j = 0; j < COLUMNS_A_THREAD; j += 4) {
                            bool keep[4];
                            keep_four(dropout, query, (start + column_of(lane, j)) / 4, keep);
#pragma unroll
                            for (int k = 0; k < 4; ++k) scores[i][j + k] = keep[k] ? scores[i][j + k] : 0.0f;
                        }
                    }
                }
                write_scores(shares + row0 * SCORE_PITCH + lane, scores);
                __syncwarp();
                add_weighted(shares + row0 * SCORE_PITCH, values + lane * 4, columns, sums);
            }
            __syncthreads();  // before the next tile, or the next item's queries, take the place of these
        }

#pragma unroll
        for (int i = 0; i < ROWS_A_THREAD; ++i) {
            const float sum = row_sum(total[i]);
            if (row0 + i >= work.rows) continue;
            const long long row = work.first + work.start + row0 + i;
            store_row(y + row * channels + work.head * size + lane * 4, sums[i], kept / sum, lane * 4, size);
            if (lane == 0) lse[row * heads + work.head] = top[i] + logf(sum);
        }
    }
}

// Eight threads for each token and head.
extern "C" __global__ void __launch_bounds__(128) flash_grad_delta(
    const Storage* __restrict__ g, const Storage* __restrict__ y, float* __restrict__ delta, long long rows,
    int size) {
    const int lane = threadIdx.x % SIDE_BY_SIDE;
    const long long step = gridDim.x * (blockDim.x / SIDE_BY_SIDE);
    const bool packs = in_packs(size, g, y);
    // Counted by the warp's first row, so that all of its lanes meet in row_sum.
    for (long long first = (blockIdx.x * blockDim.x + threadIdx.x / WARP * WARP) / SIDE_BY_SIDE; first < rows;
         first += step) {
        const long long row = first + threadIdx.x % WARP / SIDE_BY_SIDE;
        float sum = 0;
        for (int d = lane * PACK; row < rows && d < size; d += SIDE_BY_SIDE * PACK) {
            float a[PACK] = {}, b[PACK] = {};
            if (packs) {
                load_pack(g + row * size + d, a);
                load_pack(y + row * size + d, b);
            } else {
#pragma unroll
                for (int k = 0; k < PACK; ++k) {
                    if (d + k >= size) continue;
                    a[k] = load(g + row * size + d + k);
                    b[k] = load(y + row * size + d + k);
                }
            }
#pragma unroll
            for (int k = 0; k < PACK; ++k) sum += a[k] * b[k];
        }
        sum = row_sum(sum);
        if (row < rows && lane == 0) delta[row] = sum;
    }
}

// Shared memory: queries and their g, keys, values, and the gradients of this block's scores of the tile.
extern "C" __global__ void __launch_bounds__(128, 2) flash_grad_query(
    const Storage* __restrict__ g, const Storage* __restrict__ qkv, const float* __restrict__ lse,
    const float* __restrict__ delta, const int* __restrict__ cu_seqlens, Storage* __restrict__ dqkv, int sequences,
    int heads, int size, int tiles, float scale, unsigned drop, float kept, int quads, Stream stream) {
    extern __shared__ float4 shared[];
    float* queries = reinterpret_cast<float*>(shared);
    float* slopes = queries + ROWS * PITCH;
    float* keys = slopes + ROWS * PITCH;
    float* values = keys + COLUMNS * PITCH;
    float* grads = values + COLUMNS * PITCH;

    const int lane = threadIdx.x % SIDE_BY_SIDE;
    const int row0 = threadIdx.x / SIDE_BY_SIDE * ROWS_A_THREAD;
    const int warp_row0 = threadIdx.x / WARP * (ROWS / 4);
    const Dropout dropout = make_dropout(drop, kept, quads, stream);
    const int channels = heads * size;
    const bool packs = in_packs(size, qkv, g);

    const long long items = static_cast<long long>(sequences) * heads * tiles;
    for (long long item = blockIdx.x; item < items; item += gridDim.x) {
        const Work work = work_at(item, cu_seqlens, heads, tiles, ROWS);
        if (work.rows <= 0) continue;
        const long long row = work.first + work.start;
        const Storage* sequence = qkv + work.first * 3LL * channels + work.head * size;
        load_tile<ROWS, false>(queries, sequence + work.start * 3LL * channels, 3LL * channels, work.rows, size, packs);
        load_tile<ROWS, false>(slopes, g + row * channels + work.head * size, channels, work.rows, size, packs);

        float log_sum[ROWS_A_THREAD], mean[ROWS_A_THREAD], sums[ROWS_A_THREAD][SIZE_A_THREAD];
#pragma unroll
        for (int i = 0; i < ROWS_A_THREAD; ++i) {
            const bool real = row0 + i < work.rows;
            log_sum[i] = real ? lse[(row + row0 + i) * heads + work.head] : 0.0f;
            mean[i] = real ? delta[(row + row0 + i) * heads + work.head] : 0.0f;
#pragma unroll
            for (int n = 0; n < SIZE_A_THREAD; ++n) sums[i][n] = 0;
        }

        for (int start = 0; start < work.length; start += COLUMNS) {
            const int columns = min(work.length - start, COLUMNS);
            const Storage* key = sequence + channels + start * 3LL * channels;
            load_tile<COLUMNS, true>(keys, key, 3LL * channels, columns, size, packs);
            load_tile<COLUMNS, true>(values, key + channels, 3LL * channels, columns, size, packs);
            __syncthreads();
            if (warp_row0 < work.rows) {
                float scores[ROWS_A_THREAD][COLUMNS_A_THREAD], grad[ROWS_A_THREAD][COLUMNS_A_THREAD];
                dot_rows(queries + row0 * PITCH, keys + lane * PITCH, scores);
                dot_rows(slopes + row0 * PITCH, values + lane * PITCH, grad);
#pragma unroll
                for (int i = 0; i < ROWS_A_THREAD; ++i) {
#pragma unroll
                    for (int j = 0; j < COLUMNS_A_THREAD; j += 4) {
                        bool keep[4] = {true, true, true, true};
                        if (drop > 0) {
                            const unsigned query = query_of(work, work.start + row0 + i, heads);
                            keep_four(dropout, query, (start + column_of(lane, j)) / 4, keep);
                        }
#pragma unroll
                        for (int k = 0; k < 4; ++k) {
                            const float p = expf(scores[i][j + k] * scale - log_sum[i]);
                            const float slope = keep[k] ? grad[i][j + k] * kept : 0.0f;
                            const bool real = column_of(lane, j + k) < columns;
                            grad[i][j + k] = real ? p * (slope - mean[i]) * scale : 0.0f;
                        }
                    }
                }
                write_scores(grads + row0 * SCORE_PITCH + lane, grad);
                __syncwarp();
                add_weighted(grads + row0 * SCORE_PITCH, keys + lane * 4, columns, sums);
            }
            __syncthreads();
        }

#pragma unroll
        for (int i = 0; i < ROWS_A_THREAD; ++i) {
            if (row0 + i >= work.rows) continue;
            Storage* out = dqkv + (row + row0 + i) * 3 * channels + work.head * size;
            store_row(out + lane * 4, sums[i], 1.0f, lane * 4, size);
        }
    }
}

// Rows are keys here and columns queries. Shared memory: keys, values, queries and their g, the shares and then the
// gradients of this block's scores of the tile, and log sum exp and delta of its queries.
extern "C" __global__ void __launch_bounds__(128, 2) flash_grad_key_value(
    const Storage* __restrict__ g, const Storage* __restrict__ qkv, const float* __restrict__ lse,
    const float* __restrict__ delta, const int* __restrict__ cu_seqlens, Storage* __restrict__ dqkv, int sequences,
    int heads, int size, int tiles, float scale, unsigned drop, float kept, int quads, Stream stream) {
    extern __shared__ float4 shared[];
    float* keys = reinterpret_cast<float*>(shared);
    float* values = keys + ROWS * PITCH;
    float* queries = values + ROWS * PITCH;
    float* slopes = queries + COLUMNS * PITCH;
    float* shares = slopes + COLUMNS * PITCH;
    float* log_sums = shares + ROWS * SCORE_PITCH;
    float* means = log_sums + COLUMNS;

    const int lane = threadIdx.x % SIDE_BY_SIDE;
    const int row0 = threadIdx.x / SIDE_BY_SIDE * ROWS_A_THREAD;
    const int warp_row0 = threadIdx.x / WARP * (ROWS / 4);
    const Dropout dropout = make_dropout(drop, kept, quads, stream);
    const int channels = heads * size;
    const bool packs = in_packs(size, qkv, g);

    const long long items = static_cast<long long>(sequences) * heads * tiles;
    for (long long item = blockIdx.x; item < items; item += gridDim.x) {
        const Work work = work_at(item, cu_seqlens, heads, tiles, ROWS);
        if (work.rows <= 0) continue;
        const Storage* sequence = qkv + work.first * 3LL * channels + work.head * size;
        const Storage* key = sequence + channels + work.start * 3LL * channels;
        load_tile<ROWS, false>(keys, key, 3LL * channels, work.rows, size, packs);
        load_tile<ROWS, false>(values, key + channels, 3LL * channels, work.rows, size, packs);

        float key_sums[ROWS_A_THREAD][SIZE_A_THREAD], value_sums[ROWS_A_THREAD][SIZE_A_THREAD];
#pragma unroll
        for (int i = 0; i < ROWS_A_THREAD; ++i) {
#pragma unroll
            for (int n = 0; n < SIZE_A_THREAD; ++n) key_sums[i][n] = value_sums[i][n] = 0;
        }

        for (int start = 0; start < work.length; start += COLUMNS) {
            const int columns = min(work.length - start, COLUMNS);
            const long long row = work.first + start;
            load_tile<COLUMNS, true>(queries, sequence + start * 3LL * channels, 3LL * channels, columns, size, packs);
            load_tile<COLUMNS, true>(slopes, g + row * channels + work.head * size, channels, columns, size, packs);
            if (static_cast<int>(threadIdx.x) < columns) {
                log_sums[slot_of(threadIdx.x)] = lse[(row + threadIdx.x) * heads + work.head];
                means[slot_of(threadIdx.x)] = delta[(row + threadIdx.x) * heads + work.head];
            }
            __syncthreads();
            if (warp_row0 < work.rows) {
                float share[ROWS_A_THREAD][COLUMNS_A_THREAD], grad[ROWS_A_THREAD][COLUMNS_A_THREAD];
                dot_rows(keys + row0 * PITCH, queries + lane * PITCH, share);
                dot_rows(values + row0 * PITCH, slopes + lane * PITCH, grad);
#pragma unroll
                for (int j = 0; j < COLUMNS_A_THREAD; ++j) {
                    const bool real = column_of(lane, j) < columns;
                    const float log_sum = real ? log_sums[j * SIDE_BY_SIDE + lane] : 0.0f;
                    const float mean = real ? means[j * SIDE_BY_SIDE + lane] : 0.0f;
                    bool keep[4] = {true, true, true, true};
                    if (drop > 0) {
                        const unsigned query = query_of(work, start + column_of(lane, j), heads);
                        keep_four(dropout, query, (work.start + row0) / 4, keep);
                    }
#pragma unroll
                    for (int i = 0; i < ROWS_A_THREAD; ++i) {
                        const float p = expf(share[i][j] * scale - log_sum);
                        const float slope = keep[i] ? grad[i][j] * kept : 0.0f;
                        share[i][j] = real && keep[i] ? p * kept : 0.0f;
                        grad[i][j] = real ? p * (slope - mean) * scale : 0.0f;
                    }
                }
                write_scores(shares + row0 * SCORE_PITCH + lane, share);
                __syncwarp();
                add_weighted(shares + row0 * SCORE_PITCH, slopes + lane * 4, columns, value_sums);
                __syncwarp();
                write_scores(shares + row0 * SCORE_PITCH + lane, grad);
                __syncwarp();
                add_weighted(shares + row0 * SCORE_PITCH, queries + lane * 4, columns, key_sums);
            }
            __syncthreads();
        }

#pragma unroll
        for (int i = 0; i < ROWS_A_THREAD; ++i) {
            if (row0 + i >= work.rows) continue;
            const long long row = work.first + work.start + row0 + i;
            Storage* out = dqkv + row * 3 * channels + channels + work.head * size + lane * 4;
            store_row(out, key_sums[i], 1.0f, lane * 4, size);
            store_row(out + channels, value_sums[i], 1.0f, lane * 4, size);
        }
    }
}
