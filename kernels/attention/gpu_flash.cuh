// The frame of attention's kernels, which gpu.cu runs on float32 and gpu_tensor_core.cu on 16 bits: a block takes tiles
// of rows of a sequence and head, one after the other, and walks over the tiles of columns of each.
//
//   Forward        rows are queries, columns keys: scores, softmax whose maximum and sum follow along (Milakov and
//                  Gimelshein 2018; Dao et al. 2022), sums of values
//   GradQuery      rows are queries, columns keys: dq
//   GradKeyValue   rows are keys, columns queries: dk and dv
//
// What a tile is, and which of its rows and columns are a thread's, is said by the header that is included before this
// one, gpu_tile.cuh or gpu_fragment.cuh: ROWS, KEYS, QUERIES, PITCH, STAGES, load_tile, dot_rows, add_weighted, ...
#pragma once

#include "attention/gpu_work.cuh"
#include "gpu_ptx.cuh"

// The arguments of a kernel. N packed tokens, C channels.
struct Call {
    const Storage* g;          // (N, C) the gradient of the output; null in Forward
    const Storage* qkv;        // (N, 3C)
    const float *lse, *delta;  // (N, heads); null in Forward
    const int* cu_seqlens;
    Storage* out;  // (N, C) the output, or (N, 3C) the gradient of qkv
    int sequences, heads, size, tiles;
    float scale;
    unsigned drop;
    float kept;
    int quads;
    Stream stream;
    float* lse_of_out = nullptr;  // (N, heads), written by Forward

    __device__ __forceinline__ int channels() const { return heads * size; }
};

// In shared memory: a tile of rows and one of columns, each a pair that follow one another: keys and their values, or
// queries and their g.
struct Tiles {
    const Element *rows, *columns;
    const float *log_sums, *means;  // of columns that are queries: log sum exp, and delta
    float* scratch;                 // of add_weighted
};

// Rows from `start` of the sequence on: keys and values, or queries and, where there is a gradient, their g.
template <bool ARE_KEYS, int COUNT, bool AS_COLUMNS>
__device__ __forceinline__ void load_pair(Element* tile, const Call& call, const Work& work, int start, bool packs) {
    const int count = work.length - start, channels = call.channels();
    const long long row = work.first + start;
    const Storage* query = call.qkv + row * 3 * channels + work.head * call.size;
    const Storage* from = ARE_KEYS ? query + channels : query;
    load_tile<COUNT, AS_COLUMNS>(tile, from, 3LL * channels, count, call.size, packs);
    if constexpr (ARE_KEYS) {
        load_tile<COUNT, AS_COLUMNS>(tile + COUNT * PITCH, from + channels, 3LL * channels, count, call.size, packs);
    } else if (call.g != nullptr) {
        const Storage* slope = call.g + row * channels + work.head * call.size;
        load_tile<COUNT, AS_COLUMNS>(tile + COUNT * PITCH, slope, channels, count, call.size, packs);
    }
}

// Shared memory: the pair of rows, STAGES pairs of columns, what add_weighted takes, and two numbers of each column.
template <class Kernel> __device__ __forceinline__ void run(const Call& call) {
    constexpr int COLUMNS = Kernel::COLUMNS, AHEAD = STAGES - 1;
    constexpr bool ROWS_ARE_KEYS = Kernel::ROWS_ARE_KEYS;
    extern __shared__ uint4 shared[];
    Element* rows = reinterpret_cast<Element*>(shared);
    Element* pairs = rows + Kernel::ROW_TILES * ROWS * PITCH;
    float* scratch = reinterpret_cast<float*>(pairs + STAGES * 2 * COLUMNS * PITCH);
    float* numbers = scratch + SCRATCH;

    const Dropout dropout = make_dropout(call.drop, call.kept, call.quads, call.stream);
    const bool packs = in_packs(call.size, call.qkv, call.g);
    Kernel kernel;
    const long long items = static_cast<long long>(call.sequences) * call.heads * call.tiles;
    for (long long item = blockIdx.x; item < items; item += gridDim.x) {
        const Work work = work_at(item, call.cu_seqlens, call.heads, call.tiles, ROWS);
        if (work.rows <= 0) continue;
        load_pair<ROWS_ARE_KEYS, ROWS, false>(rows, call, work, work.start, packs);
        kernel.begin(call, work);
        for (int start = -AHEAD * COLUMNS; start < work.length; start += COLUMNS) {  // below 0 only to load
            const int next = start + AHEAD * COLUMNS, place = next / COLUMNS % STAGES;
            if (next < work.length) {
                load_pair<!ROWS_ARE_KEYS, COLUMNS, true>(pairs + place * 2 * COLUMNS * PITCH, call, work, next, packs);
                if (ROWS_ARE_KEYS && static_cast<int>(threadIdx.x) < min(work.length - next, COLUMNS)) {
                    const long long row = work.first + next + threadIdx.x;
                    float* to = numbers + place * 2 * COLUMNS + threadIdx.x;
                    load_number(to, call.lse + row * call.heads + work.head);
                    load_number(to + COLUMNS, call.delta + row * call.heads + work.head);
                }
            }
            if constexpr (AHEAD > 0) commit_copies();
            if (start < 0) continue;
            if constexpr (AHEAD > 0) wait_for_copies<AHEAD>();
            __syncthreads();
            if (warp_row() < work.rows) {  // a whole warp, or none of it
                const int now = start / COLUMNS % STAGES;
                const float* log_sums = numbers + now * 2 * COLUMNS;
                const Tiles tiles = {rows, pairs + now * 2 * COLUMNS * PITCH, log_sums, log_sums + COLUMNS, scratch};
                kernel.add(call, dropout, work, tiles, start, min(work.length - start, COLUMNS));
            }
            __syncthreads();  // before the next tile, or the next item's rows, take the place of these
        }
        kernel.end(call, work);
    }
}

// float16 has few exponents: weights of any size are multiplied in units of a power of two for each row, which makes
// the largest so far 2^14 to 2^15. `sums`, in the unit so far, follow. Other types have the exponents of float32.
constexpr float SMALLEST_UNIT = is_float16<Element> ? 0x1p-100f : 1.0f;

template <int COLUMNS>
__device__ __forceinline__ void scale_to_unit(Scores<COLUMNS>& weights, float (&unit)[ROWS_A_THREAD], Sums& sums) {
    if constexpr (is_float16<Element>) {
#pragma unroll
        for (int i = 0; i < ROWS_A_THREAD; ++i) {
            float largest = 0;
#pragma unroll
            for (int j = 0; j < COLUMNS / THREADS_A_ROW; ++j) largest = fmaxf(largest, fabsf(at(weights, i, j)));
            const float power = __uint_as_float(__float_as_uint(row_max(largest)) & 0x7f800000u);
            const float next = fmaxf(unit[i], power * 0x1p-14f);
            const float shrink = unit[i] / next, grow = 1 / next;
            unit[i] = next;
#pragma unroll
            for (int n = 0; n < SIZE_A_THREAD; ++n) at(sums, i, n) *= shrink;
#pragma unroll
            for (int j = 0; j < COLUMNS / THREADS_A_ROW; ++j) at(weights, i, j) *= grow;
        }
    }
}

// ----------------------------------------------------------------------------------------------------- the kernels

struct Forward {
    static constexpr bool ROWS_ARE_KEYS = false;
    static constexpr int ROW_TILES = 1, COLUMNS = KEYS;
    static constexpr float UNIT = is_float16<Element> ? 0x1p-14f : 1.0f;  // of probabilities: most are small

    float top[ROWS_A_THREAD], total[ROWS_A_THREAD];
    Sums sums;

    __device__ __forceinline__ void begin(const Call&, const Work&) {
#pragma unroll
        for (int i = 0; i < ROWS_A_THREAD; ++i) {
            top[i] = __int_as_float(0xff800000);  // minus infinity
            total[i] = 0;
        }
        clear(sums);
    }

    __device__ __forceinline__ void add(const Call& call, const Dropout& dropout, const Work& work, const Tiles& tiles,
                                        int start, int columns) {
        Scores<KEYS> scores;
        dot_rows(tiles.rows, tiles.columns, columns, scores);
        const auto keep = keep_keys(dropout, work, call.heads, start, columns);
#pragma unroll
        for (int i = 0; i < ROWS_A_THREAD; ++i) {
            float new_top = top[i];
#pragma unroll
            for (int j = 0; j < KEYS / THREADS_A_ROW; ++j) {
                float& score = at(scores, i, j);
                score = column_of(j) < columns ? score * call.scale : __int_as_float(0xff800000);
                new_top = fmaxf(new_top, score);
            }
            new_top = row_max(new_top);
            const float shrink = expf(top[i] - new_top);
            top[i] = new_top;
            total[i] *= shrink;
#pragma unroll
            for (int n = 0; n < SIZE_A_THREAD; ++n) at(sums, i, n) *= shrink;
#pragma unroll
            for (int j = 0; j < KEYS / THREADS_A_ROW; ++j) {
                const float e = expf(at(scores, i, j) - new_top) * (1 / UNIT);
                total[i] += e;  // of this thread's columns; those of the others are added at the end
                at(scores, i, j) = keep(i, j) ? e : 0.0f;
            }
        }
        add_weighted(scores, tiles.columns + KEYS * PITCH, columns, tiles.scratch, sums);
    }

    __device__ __forceinline__ void end(const Call& call, const Work& work) {
        const long long row = work.first + work.start;
        float factor[ROWS_A_THREAD];
#pragma unroll
        for (int i = 0; i < ROWS_A_THREAD; ++i) {
            const float sum = row_sum(total[i]);
            factor[i] = call.kept / sum;
            if (threadIdx.x % THREADS_A_ROW == 0 && row_of(i) < work.rows) {
                call.lse_of_out[(row + row_of(i)) * call.heads + work.head] = top[i] + logf(sum * UNIT);
            }
        }
        Storage* out = call.out + row * call.channels() + work.head * call.size;
        store_rows(out, call.channels(), work.rows, call.size, sums, factor);
    }
};

struct GradQuery {
    static constexpr bool ROWS_ARE_KEYS = false;
    static constexpr int ROW_TILES = 2, COLUMNS = KEYS;

    float log_sum[ROWS_A_THREAD], mean[ROWS_A_THREAD], unit[ROWS_A_THREAD];
    Sums sums;

    __device__ __forceinline__ void begin(const Call& call, const Work& work) {
        const long long row = work.first + work.start;
#pragma unroll
        for (int i = 0; i < ROWS_A_THREAD; ++i) {
            const bool real = row_of(i) < work.rows;
            const long long number = (row + row_of(i)) * call.heads + work.head;
            log_sum[i] = real ? call.lse[number] : 0.0f;
            mean[i] = real ? call.delta[number] : 0.0f;
            unit[i] = SMALLEST_UNIT;
        }
        clear(sums);
    }

    __device__ __forceinline__ void add(const Call& call, const Dropout& dropout, const Work& work, const Tiles& tiles,
                                        int start, int columns) {
        Scores<KEYS> scores, grad;
        dot_rows(tiles.rows, tiles.columns, columns, scores);
        const auto keep = keep_keys(dropout, work, call.heads, start, columns);
        dot_rows(tiles.rows + ROWS * PITCH, tiles.columns + KEYS * PITCH, columns, grad);
#pragma unroll
        for (int j = 0; j < KEYS / THREADS_A_ROW; ++j) {
#pragma unroll
            for (int i = 0; i < ROWS_A_THREAD; ++i) {
                const float p = expf(at(scores, i, j) * call.scale - log_sum[i]);
                const float slope = keep(i, j) ? at(grad, i, j) * call.kept : 0.0f;
                at(grad, i, j) = column_of(j) < columns ? p * (slope - mean[i]) * call.scale : 0.0f;
            }
        }
        scale_to_unit<KEYS>(grad, unit, sums);
        add_weighted(grad, tiles.columns, columns, tiles.scratch, sums);
    }

    __device__ __forceinline__ void end(const Call& call, const Work& work) {
        const long long row = work.first + work.start;
        Storage* out = call.out + row * 3 * call.channels() + work.head * call.size;
        store_rows(out, 3LL * call.channels(), work.rows, call.size, sums, unit);
    }
};

struct GradKeyValue {
    static constexpr bool ROWS_ARE_KEYS = true;
    static constexpr int ROW_TILES = 2, COLUMNS = QUERIES;

    float key_unit[ROWS_A_THREAD], value_unit[ROWS_A_THREAD];
    Sums key_sums, value_sums;

    __device__ __forceinline__ void begin(const Call&, const Work&) {
#pragma unroll
        for (int i = 0; i < ROWS_A_THREAD; ++i) key_unit[i] = value_unit[i] = SMALLEST_UNIT;
        clear(key_sums);
        clear(value_sums);
    }

    __device__ __forceinline__ void add(const Call& call, const Dropout& dropout, const Work& work, const Tiles& tiles,
                                        int start, int columns) {
        Scores<QUERIES> share, grad;
        dot_rows(tiles.rows, tiles.columns, columns, share);
        dot_rows(tiles.rows + ROWS * PITCH, tiles.columns + QUERIES * PITCH, columns, grad);
        const auto keep = keep_queries(dropout, work, call.heads, start, columns);
#pragma unroll
        for (int j = 0; j < QUERIES / THREADS_A_ROW; ++j) {
            const bool real = column_of(j) < columns;
            const float log_sum = real ? tiles.log_sums[column_of(j)] : 0.0f;
            const float mean = real ? tiles.means[column_of(j)] : 0.0f;
#pragma unroll
            for (int i = 0; i < ROWS_A_THREAD; ++i) {
                const float p = expf(at(share, i, j) * call.scale - log_sum);
                const float slope = keep(i, j) ? at(grad, i, j) * call.kept : 0.0f;
                at(share, i, j) = real && keep(i, j) ? p * call.kept : 0.0f;
                at(grad, i, j) = real ? p * (slope - mean) * call.scale : 0.0f;
            }
        }
        scale_to_unit<QUERIES>(share, value_unit, value_sums);
        add_weighted(share, tiles.columns + QUERIES * PITCH, columns, tiles.scratch, value_sums);
        scale_to_unit<QUERIES>(grad, key_unit, key_sums);
        add_weighted(grad, tiles.columns, columns, tiles.scratch, key_sums);
    }

    __device__ __forceinline__ void end(const Call& call, const Work& work) {
        const long long row = work.first + work.start;
        Storage* out = call.out + row * 3 * call.channels() + call.channels() + work.head * call.size;
        store_rows(out, 3LL * call.channels(), work.rows, call.size, key_sums, key_unit);
        store_rows(out + call.channels(), 3LL * call.channels(), work.rows, call.size, value_sums, value_unit);
    }
};
