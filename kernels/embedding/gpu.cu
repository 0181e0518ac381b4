// Rows of tables: added up (embedding), copied (gather), and summed into the rows they came from (scatter).
//
// embedding_warp   a warp for each row: three rows read, one written. Bound by memory.
// gather_warp      a warp for each row. Bound by memory.
// scatter_runs     x's rows in the order of where they go, so that each row of y is the sum of one run: no atomics, the
//                  same order each time, and rows nobody names are the sums of empty runs (with `add`, onto what y
//                  holds, they are left alone). A warp for a run and a tile
//                  of its columns; runs of more than `longest` rows are left to the two kernels below.
//                  Bound by memory: y is written once, x read once.
// scatter_pieces   a long run (a word of every sentence; the token type of all) in pieces of `longest` rows, each
//                  summed by warps of its own in float32, whatever the storage.
// scatter_long     the pieces of each long run, added in a fixed order. Bound by latency.
#include "gpu_common.cuh"

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / WARP;

__device__ __forceinline__ int warp_in_grid() { return blockIdx.x * WARPS + threadIdx.x / WARP; }
__device__ __forceinline__ int warps_in_grid() { return gridDim.x * WARPS; }
__device__ __forceinline__ int lane() { return threadIdx.x % WARP; }

template <class Element> __device__ __forceinline__ Element* row_of(Element* table, int row, int columns) {
    return table + static_cast<long long>(row) * columns;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    embedding_warp(const Storage* __restrict__ word, const Storage* __restrict__ position,
                   const Storage* __restrict__ token_type, const int* __restrict__ input_ids,
                   const int* __restrict__ position_ids, const int* __restrict__ token_type_ids,
                   Storage* __restrict__ y, int rows, int columns) {
    const bool packs = in_packs(columns, word, position, token_type, y);
    for (int row = warp_in_grid(); row < rows; row += warps_in_grid()) {
        const Storage* first = row_of(word, input_ids[row], columns);
        const Storage* second = row_of(position, position_ids[row], columns);
        const Storage* third = row_of(token_type, token_type_ids[row], columns);
        Storage* out = row_of(y, row, columns);
        if (packs) {
            for (int j = lane() * PACK; j < columns; j += WARP * PACK) {
                float a[PACK], b[PACK], c[PACK];
                load_pack(first + j, a);
                load_pack(second + j, b);
                load_pack(third + j, c);
#pragma unroll
                for (int i = 0; i < PACK; ++i) a[i] = a[i] + b[i] + c[i];
                store_pack(out + j, a);
            }
        } else {
            for (int j = lane(); j < columns; j += WARP) {
                store(out + j, load(first + j) + load(second + j) + load(third + j));
            }
        }
    }
}

// Rows whose index is `skip` become 0; -1 skips none.
extern "C" __global__ void __launch_bounds__(THREADS)
    gather_warp(const Storage* __restrict__ x, const int* __restrict__ index, Storage* __restrict__ y, int rows,
                int columns, int skip) {
    const bool packs = in_packs(columns, x, y);
    for (int row = warp_in_grid(); row < rows; row += warps_in_grid()) {
        const int from = index[row];
        const Storage* in = row_of(x, from, columns);
        Storage* out = row_of(y, row, columns);
        if (packs) {
            for (int j = lane() * PACK; j < columns; j += WARP * PACK) {
                float values[PACK] = {};
                if (from != skip) load_pack(in + j, values);
                store_pack(out + j, values);
            }
        } else {
            for (int j = lane(); j < columns; j += WARP) store(out + j, from == skip ? 0.0f : load(in + j));
        }
    }
}

// ------------------------------------------------------------------------------------------------------------- scatter

// A warp takes a tile of columns: each lane a pack of them, or one where rows do not begin on 16 bytes.
// Tiles lie along the grid's y.

// total = x[order[first]] + .. + x[order[last - 1]], at `width` columns from `column` on.
__device__ __forceinline__ void sum_rows(const Storage* __restrict__ x, const int* __restrict__ order, int first,
                                         int last, int columns, int column, int width, float (&total)[PACK]) {
#pragma unroll
    for (int i = 0; i < PACK; ++i) total[i] = 0;
    if (width == 1) {
#pragma unroll 4
        for (int k = first; k < last; ++k) total[0] += load(row_of(x, order[k], columns) + column);
        return;
    }
#pragma unroll 4
    for (int k = first; k < last; ++k) {
        float values[PACK];
        load_pack(row_of(x, order[k], columns) + column, values);
#pragma unroll
        for (int i = 0; i < PACK; ++i) total[i] += values[i];
    }
}

// total += what y holds, at `width` columns.
__device__ __forceinline__ void add_to(float (&total)[PACK], const Storage* y, int width) {
    if (width == 1) {
        total[0] += load(y);
        return;
    }
    float values[PACK];
    load_pack(y, values);
#pragma unroll
    for (int i = 0; i < PACK; ++i) total[i] += values[i];
}

// y[row] = the sum of x[order[k]] over offsets[row] <= k < offsets[row + 1]; with `add`, on top of what y holds.
extern "C" __global__ void __launch_bounds__(THREADS)
    scatter_runs(const Storage* __restrict__ x, const int* __restrict__ order, const int* __restrict__ offsets,
                 Storage* __restrict__ y, int rows, int columns, int longest, int add) {
    const int width = in_packs(columns, x, y) ? PACK : 1;
    for (int column = (blockIdx.y * WARP + lane()) * width; column < columns; column += gridDim.y * WARP * width) {
        for (int row = warp_in_grid(); row < rows; row += warps_in_grid()) {
            const int first = offsets[row], last = offsets[row + 1];
            if (last - first > longest) continue;
            if (add && first == last) continue;
            float total[PACK];
            sum_rows(x, order, first, last, columns, column, width, total);
            Storage* out = row_of(y, row, columns) + column;
            if (add) add_to(total, out, width);
            if (width == 1) {
                store(out, total[0]);
            } else {
                store_pack(out, total);
            }
        }
    }
}

// partial[piece] = the sum of x[order[k]] over bounds[2 piece] <= k < bounds[2 piece + 1].
extern "C" __global__ void __launch_bounds__(THREADS)
    scatter_pieces(const Storage* __restrict__ x, const int* __restrict__ order, const int* __restrict__ bounds,
                   float* __restrict__ partial, int pieces, int columns) {
    const int width = in_packs(columns, x) ? PACK : 1;
    for (int column = (blockIdx.y * WARP + lane()) * width; column < columns; column += gridDim.y * WARP * width) {
        for (int piece = warp_in_grid(); piece < pieces; piece += warps_in_grid()) {
            float total[PACK];
            sum_rows(x, order, bounds[2 * piece], bounds[2 * piece + 1], columns, column, width, total);
            float* out = row_of(partial, piece, columns) + column;
#pragma unroll
            for (int i = 0; i < PACK; ++i) {
                if (i < width) out[i] = total[i];
            }
        }
    }
}

// y[row] = the sum of partial[piece] over first <= piece < last, for each run of (row, first, last). Empty runs fill the
// list up at its end, to a size that does not depend on the indices. With `add`, on top of what y holds.
// A warp takes 8 columns, 4 lanes to each: they add every fourth piece, then one another's sums. Runs lie along y.
extern "C" __global__ void __launch_bounds__(THREADS)
    scatter_long(const float* __restrict__ partial, const int* __restrict__ runs, Storage* __restrict__ y, int count,
                 int columns, int add) {
    constexpr int COLUMNS = 8, SHARES = WARP / COLUMNS;
    const int tiles = (columns + COLUMNS - 1) / COLUMNS;
    const int share = lane() / COLUMNS;
    for (int run = blockIdx.y; run < count; run += gridDim.y) {
        const int row = runs[3 * run], first = runs[3 * run + 1], last = runs[3 * run + 2];
        if (first == last) return;
        for (int tile = warp_in_grid(); tile < tiles; tile += warps_in_grid()) {
            const int column = tile * COLUMNS + lane() % COLUMNS;
            float total = 0;
            if (column < columns) {
#pragma unroll 4
                for (int piece = first + share; piece < last; piece += SHARES) {
                    total += row_of(partial, piece, columns)[column];
                }
            }
            total += __shfl_xor_sync(ALL_LANES, total, COLUMNS);
            total += __shfl_xor_sync(ALL_LANES, total, 2 * COLUMNS);
            if (add && share == 0 && column < columns) total += load(row_of(y, row, columns) + column);
            if (share == 0 && column < columns) store(row_of(y, row, columns) + column, total);
        }
    }
}
