// Attention of 16-bit arrays by tensor cores (mma.sync), in the kernels of gpu.cu: a block per 64 queries of a sequence
// and head, or per 64 keys; flash_grad_delta is shared. Scores, probabilities and sums are float32 in registers and
// never reach memory, not even shared; gpu_fragment.cuh says which roundings happen. The tensor cores bound it, and
// beside them exp and the random words: tiles are copied while the ones before them are worked on.
#include "attention/gpu_fragment.cuh"

// Shared memory: queries; keys and values, twice.
extern "C" __global__ void __launch_bounds__(128, 2) flash_forward_16(
    const Storage* __restrict__ qkv, const int* __restrict__ cu_seqlens, Storage* __restrict__ y,
    float* __restrict__ lse, int sequences, int heads, int size, int tiles, float scale, unsigned drop, float kept,
    int quads, Stream stream) {
    extern __shared__ uint4 shared[];
    Element* queries = reinterpret_cast<Element*>(shared);
    Element* tiles_of_keys = queries + ROWS * PITCH;

    const int lane = threadIdx.x % WARP;
    const int row0 = threadIdx.x / WARP * 16;
    const float minus_infinity = __int_as_float(0xff800000);
    const float unit = is_float16<Element> ? 0x1p-14f : 1.0f;  // in which float16 counts probabilities: most are small
    const Dropout dropout = make_dropout(drop, kept, quads, stream);
    const int channels = heads * size;
    const bool packs = in_packs(size, qkv);

    const long long items = static_cast<long long>(sequences) * heads * tiles;
    for (long long item = blockIdx.x; item < items; item += gridDim.x) {
        const Work work = work_at(item, cu_seqlens, heads, tiles, ROWS);
        if (work.rows <= 0) continue;
        const Storage* sequence = qkv + work.first * 3LL * channels + work.head * size;
        load_tile<ROWS>(queries, sequence + work.start * 3LL * channels, 3LL * channels, work.rows, size, packs);

        float top[2] = {minus_infinity, minus_infinity}, total[2] = {0, 0}, sums[SIZE_PARTS][4];
        clear(sums);
        for (int start = -KEYS; start < work.length; start += KEYS) {  // the first time only to copy
            const int next = start + KEYS;
            if (next < work.length) {
                const Storage* key = sequence + channels + next * 3LL * channels;
                Element* to = tiles_of_keys + next / KEYS % 2 * 2 * KEYS * PITCH;
                load_tile<KEYS>(to, key, 3LL * channels, work.length - next, size, packs);
                load_tile<KEYS>(to + KEYS * PITCH, key + channels, 3LL * channels, work.length - next, size, packs);
            }
            commit_copies();
            if (start < 0) continue;
            wait_for_copies<1>();
            __syncthreads();
            const Element* keys = tiles_of_keys + start / KEYS % 2 * 2 * KEYS * PITCH;
            const Element* values = keys + KEYS * PITCH;
            const int columns = min(work.length - start, KEYS);
            if (row0 < work.rows) {  // a whole warp, or none of it
                float scores[KEYS / 8][4];
                dot_rows(queries + row0 * PITCH, keys, columns, scores);
                float new_top[2] = {top[0], top[1]};
#pragma unroll
                for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const bool real = 8 * n + lane % 4 * 2 + i % 2 < columns;
                        scores[n][i] = real ? scores[n][i] * scale : minus_infinity;
                        new_top[i / 2] = fmaxf(new_top[i / 2], scores[n][i]);
                    }
                }
                float shrink[2];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    new_top[half] = row_max(new_top[half]);
                    shrink[half] = expf(top[half] - new_top[half]);
                    top[half] = new_top[half];
                    total[half] *= shrink[half];
                }
#pragma unroll
                for (int n = 0; n < SIZE_PARTS; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) sums[n][i] *= shrink[i / 2];
                }
                unsigned keep[2] = {ALL_LANES, ALL_LANES};
                if (drop > 0) keep_keys(dropout, work, heads, work.start + row0, start, columns, keep);
#pragma unroll
                for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float e = expf(scores[n][i] - top[i / 2]) * (1 / unit);
                        total[i / 2] += e;  // of this lane's columns; the four are added at the end
                        scores[n][i] = keep[i / 2] >> (4 * n + i % 2) & 1 ? e : 0.0f;
                    }
                }
                add_weighted(scores, values, columns, sums);
            }
            __syncthreads();  // before the next tile, or the next item's queries, take the place of these
        }

        const float sum[2] = {row_sum(total[0]), row_sum(total[1])};
        const float factor[2] = {kept / sum[0], kept / sum[1]};
        const long long row = work.first + work.start + row0;
        store_rows(y + row * channels + work.head * size, channels, work.rows - row0, size, sums, factor);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int offset = lane / 4 + 8 * half;
            if (lane % 4 == 0 && row0 + offset < work.rows) {
                lse[(row + offset) * heads + work.head] = top[half] + logf(sum[half] * unit);
            }
        }
    }
}

// Shared memory: queries and their g; keys and values, twice.
extern "C" __global__ void __launch_bounds__(128, HEAD_SIZE > 64 ? 2 : 3) flash_grad_query_16(
    const Storage* __restrict__ g, const Storage* __restrict__ qkv, const float* __restrict__ lse,
    const float* __restrict__ delta, const int* __restrict__ cu_seqlens, Storage* __restrict__ dqkv, int sequences,
    int heads, int size, int tiles, float scale, unsigned drop, float kept, int quads, Stream stream) {
    extern __shared__ uint4 shared[];
    Element* queries = reinterpret_cast<Element*>(shared);
    Element* slopes = queries + ROWS * PITCH;
    Element* tiles_of_keys = slopes + ROWS * PITCH;

    const int lane = threadIdx.x % WARP;
    const int row0 = threadIdx.x / WARP * 16;
    const Dropout dropout = make_dropout(drop, kept, quads, stream);
    const int channels = heads * size;
    const bool packs = in_packs(size, qkv, g);

    const long long items = static_cast<long long>(sequences) * heads * tiles;
    for (long long item = blockIdx.x; item < items; item += gridDim.x) {
        const Work work = work_at(item, cu_seqlens, heads, tiles, ROWS);
        if (work.rows <= 0) continue;
        const long long row = work.first + work.start;
        const Storage* sequence = qkv + work.first * 3LL * channels + work.head * size;
        load_tile<ROWS>(queries, sequence + work.start * 3LL * channels, 3LL * channels, work.rows, size, packs);
        load_tile<ROWS>(slopes, g + row * channels + work.head * size, channels, work.rows, size, packs);

        float log_sum[2], mean[2], unit[2], sums[SIZE_PARTS][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int offset = row0 + lane / 4 + 8 * half;
            const bool real = offset < work.rows;
            log_sum[half] = real ? lse[(row + offset) * heads + work.head] : 0.0f;
            mean[half] = real ? delta[(row + offset) * heads + work.head] : 0.0f;
            unit[half] = is_float16<Element> ? SMALLEST_UNIT : 1.0f;
        }
        clear(sums);

        for (int start = -KEYS; start < work.length; start += KEYS) {  // the first time only to copy
            const int next = start + KEYS;
            if (next < work.length) {
                const Storage* key = sequence + channels + next * 3LL * channels;
                Element* to = tiles_of_keys + next / KEYS % 2 * 2 * KEYS * PITCH;
                load_tile<KEYS>(to, key, 3LL * channels, work.length - next, size, packs);
                load_tile<KEYS>(to + KEYS * PITCH, key + channels, 3LL * channels, work.length - next, size, packs);
            }
            commit_copies();
            if (start < 0) continue;
            wait_for_copies<1>();
            __syncthreads();
            const Element* keys = tiles_of_keys + start / KEYS % 2 * 2 * KEYS * PITCH;
            const Element* values = keys + KEYS * PITCH;
            const int columns = min(work.length - start, KEYS);
            if (row0 < work.rows) {
                float scores[KEYS / 8][4], grad[KEYS / 8][4];
                dot_rows(queries + row0 * PITCH, keys, columns, scores);
                dot_rows(slopes + row0 * PITCH, values, columns, grad);
                unsigned keep[2] = {ALL_LANES, ALL_LANES};
                if (drop > 0) keep_keys(dropout, work, heads, work.start + row0, start, columns, keep);
#pragma unroll
                for (int n = 0; n < KEYS / 8; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float p = expf(scores[n][i] * scale - log_sum[i / 2]);
                        const float slope = keep[i / 2] >> (4 * n + i % 2) & 1 ? grad[n][i] * kept : 0.0f;
                        const bool real = 8 * n + lane % 4 * 2 + i % 2 < columns;
                        grad[n][i] = real ? p * (slope - mean[i / 2]) * scale : 0.0f;
                    }
                }
                scale_to_unit(grad, unit, sums);
                add_weighted(grad, keys, columns, sums);
            }
            __syncthreads();
        }

        Storage* out = dqkv + (row + row0) * 3 * channels + work.head * size;
        store_rows(out, 3LL * channels, work.rows - row0, size, sums, unit);
    }
}

// Rows are keys here and columns queries. Shared memory: keys and values; queries and their g, twice; log sum exp and
// delta of the queries, twice.
extern "C" __global__ void __launch_bounds__(128, 2) flash_grad_key_value_16(
    const Storage* __restrict__ g, const Storage* __restrict__ qkv, const float* __restrict__ lse,
    const float* __restrict__ delta, const int* __restrict__ cu_seqlens, Storage* __restrict__ dqkv, int sequences,
    int heads, int size, int tiles, float scale, unsigned drop, float kept, int quads, Stream stream) {
    extern __shared__ uint4 shared[];
    Element* keys = reinterpret_cast<Element*>(shared);
    Element* values = keys + ROWS * PITCH;
    Element* tiles_of_queries = values + ROWS * PITCH;
    float* statistics = reinterpret_cast<float*>(tiles_of_queries + 4 * QUERIES * PITCH);

    const int lane = threadIdx.x % WARP;
    const int row0 = threadIdx.x / WARP * 16;
    const Dropout dropout = make_dropout(drop, kept, quads, stream);
    const int channels = heads * size;
    const bool packs = in_packs(size, qkv, g);

    const long long items = static_cast<long long>(sequences) * heads * tiles;
    for (long long item = blockIdx.x; item < items; item += gridDim.x) {
        const Work work = work_at(item, cu_seqlens, heads, tiles, ROWS);
        if (work.rows <= 0) continue;
        const Storage* sequence = qkv + work.first * 3LL * channels + work.head * size;
        const Storage* key = sequence + channels + work.start * 3LL * channels;
        load_tile<ROWS>(keys, key, 3LL * channels, work.rows, size, packs);
        load_tile<ROWS>(values, key + channels, 3LL * channels, work.rows, size, packs);

        const float one = is_float16<Element> ? SMALLEST_UNIT : 1.0f;
        float key_unit[2] = {one, one}, value_unit[2] = {one, one};
        float key_sums[SIZE_PARTS][4], value_sums[SIZE_PARTS][4];
        clear(key_sums);
        clear(value_sums);

        for (int start = -QUERIES; start < work.length; start += QUERIES) {
            const int next = start + QUERIES;
            if (next < work.length) {
                const long long row = work.first + next;
                const int count = work.length - next, place = next / QUERIES % 2;
                Element* to = tiles_of_queries + place * 2 * QUERIES * PITCH;
                load_tile<QUERIES>(to, sequence + next * 3LL * channels, 3LL * channels, count, size, packs);
                load_tile<QUERIES>(to + QUERIES * PITCH, g + row * channels + work.head * size, channels, count, size,
                                   packs);
                if (static_cast<int>(threadIdx.x) < min(count, QUERIES)) {
                    float* numbers = statistics + place * 2 * QUERIES + threadIdx.x;
                    copy_async<4>(numbers, lse + (row + threadIdx.x) * heads + work.head, true);
                    copy_async<4>(numbers + QUERIES, delta + (row + threadIdx.x) * heads + work.head, true);
                }
            }
            commit_copies();
            if (start < 0) continue;
            wait_for_copies<1>();
            __syncthreads();
            const Element* queries = tiles_of_queries + start / QUERIES % 2 * 2 * QUERIES * PITCH;
            const Element* slopes = queries + QUERIES * PITCH;
            const float* log_sums = statistics + start / QUERIES % 2 * 2 * QUERIES;
            const float* means = log_sums + QUERIES;
            const int columns = min(work.length - start, QUERIES);
            if (row0 < work.rows) {
                float share[QUERIES / 8][4], grad[QUERIES / 8][4];
                dot_rows(keys + row0 * PITCH, queries, columns, share);
                dot_rows(values + row0 * PITCH, slopes, columns, grad);
                unsigned keep[4] = {ALL_LANES, ALL_LANES, ALL_LANES, ALL_LANES};
                if (drop > 0) keep_queries(dropout, work, heads, work.start + row0, start, columns, keep);
#pragma unroll
                for (int n = 0; n < QUERIES / 8; ++n) {
#pragma unroll
                    for (int odd = 0; odd < 2; ++odd) {
                        const int column = 8 * n + lane % 4 * 2 + odd;
                        const bool real = column < columns;
                        const float log_sum = real ? log_sums[column] : 0.0f, mean = real ? means[column] : 0.0f;
#pragma unroll
                        for (int i = odd; i < 4; i += 2) {
                            const bool is_kept = keep[i] >> 4 * n & 1;
                            const float p = expf(share[n][i] * scale - log_sum);
                            const float slope = is_kept ? grad[n][i] * kept : 0.0f;
                            share[n][i] = real && is_kept ? p * kept : 0.0f;
                            grad[n][i] = real ? p * (slope - mean) * scale : 0.0f;
                        }
                    }
                }
                scale_to_unit(share, value_unit, value_sums);
                add_weighted(share, slopes, columns, value_sums);
                scale_to_unit(grad, key_unit, key_sums);
                add_weighted(grad, queries, columns, key_sums);
            }
            __syncthreads();
        }

        const long long row = work.first + work.start + row0;
        Storage* out = dqkv + row * 3 * channels + channels + work.head * size;
        store_rows(out, 3LL * channels, work.rows - row0, size, key_sums, key_unit);
        store_rows(out + channels, 3LL * channels, work.rows - row0, size, value_sums, value_unit);
    }
}
