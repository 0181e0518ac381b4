// Layer norm over the rows of a matrix, alone or at the end of a BERT block: of z = dropout(x) + residual.
//
// Forward. The mean first, then the variance about it, from values that are still at hand: offsets do no harm.
// 1. layer_norm_block, for both: a block for each row, for rows of any length. Three passes, in each of which z is
//    computed anew; the second and third find x in L1 or L2. Bound by memory, and by Philox's integers where it draws.
// 2. layer_norm_warp, add_layer_norm_warp: a warp for each row, which it holds in registers: every array is moved once,
//    16 bytes a lane, and sums are shuffles. Bound by memory.
//
// Backward. The gradients of weight and bias are sums over all rows. Chunks of rows, as many as the matrix says and
// never the grid, each add up their own in float32; a last kernel adds up the chunks. One order, so no atomics.
// 3. layer_norm_grad_long: a block for each chunk, row by row, for rows of any length. The chunk's sums lie in memory
//    (in L1 or L2 after the first row), where the thread that owns a column adds to them. Bound by that traffic.
// 4. layer_norm_grad_columns: a block for each chunk, in which a thread owns columns, their weights and their sums, in
//    registers, and takes several rows at once: more bytes in flight, and one barrier for all of these rows. Every
//    array is moved once. Bound by memory.
// 5. layer_norm_sum_chunks: 32 columns to a block, whose 32 warps share out the chunks. Bound by latency.
#include "gpu_dropout.cuh"
#include "gpu_rows.cuh"

constexpr int BLOCK = 256;        // of the kernels that take rows of any length
constexpr int WARPS_BLOCK = 128;  // of the kernels that give each row to a warp
constexpr int GRAD_BLOCK = 128;
constexpr int GRAD_BLOCKS = 4;    // on a multiprocessor at once: 48 KiB in flight at 768 columns
constexpr int GRAD_WARPS = GRAD_BLOCK / WARP;
constexpr int GRAD_PACKS = 1024 / GRAD_BLOCK / PACK;  // that a thread owns: rows of up to 1024 columns
constexpr int GRAD_ROWS = PACK / 2;                   // taken at once: 2, or 4 of 16-bit elements
constexpr int SUM_BLOCK = 1024;
constexpr int SUM_WARPS = SUM_BLOCK / WARP;

// ------------------------------------------------------------------------------------------------------------- forward

// One pack of y = (z - mean) rstd weight + bias, from its deviations z - mean.
__device__ __forceinline__ void scale_and_shift(const Storage* weight, const Storage* bias, float rstd, Storage* y,
                                                int left, bool aligned, float (&deviations)[PACK]) {
    float scale[PACK], shift[PACK];
    load_part(weight, left, aligned, 0.0f, scale);
    load_part(bias, left, aligned, 0.0f, shift);
#pragma unroll
    for (int i = 0; i < PACK; ++i) deviations[i] = deviations[i] * rstd * scale[i] + shift[i];
    store_part(y, left, aligned, deviations);
}

// The mean, the rstd and the y of a row, from its values.
__device__ __forceinline__ void normalise_row(float (&values)[WARP_PACKS][PACK], const Storage* __restrict__ weight,
                                              const Storage* __restrict__ bias, Storage* __restrict__ y,
                                              float* __restrict__ mean, float* __restrict__ rstd, int columns,
                                              float eps, bool aligned) {
    int lane = threadIdx.x % WARP;
    float total = 0;
#pragma unroll
    for (int k = 0; k < WARP_PACKS; ++k) {
#pragma unroll
        for (int i = 0; i < PACK; ++i) total += values[k][i];
    }
    float row_mean = warp_sum(total) / columns;

    float squares = 0;
#pragma unroll
    for (int k = 0; k < WARP_PACKS; ++k) {
        int left = columns - (k * WARP + lane) * PACK;
#pragma unroll
        for (int i = 0; i < PACK; ++i) {
            values[k][i] = i < left ? values[k][i] - row_mean : 0.0f;
            squares += values[k][i] * values[k][i];
        }
    }
    float row_rstd = 1.0f / sqrtf(warp_sum(squares) / columns + eps);

#pragma unroll
    for (int k = 0; k < WARP_PACKS; ++k) {
        int column = (k * WARP + lane) * PACK;
        scale_and_shift(weight + column, bias + column, row_rstd, y + column, columns - column, aligned, values[k]);
    }
    if (lane == 0) {
        *mean = row_mean;
        *rstd = row_rstd;
    }
}

extern "C" __global__ void __launch_bounds__(WARPS_BLOCK)
    layer_norm_warp(const Storage* __restrict__ x, const Storage* __restrict__ weight, const Storage* __restrict__ bias,
                    Storage* __restrict__ y, float* __restrict__ mean, float* __restrict__ rstd, int rows, int columns,
                    float eps) {
    long long warps = static_cast<long long>(gridDim.x) * (WARPS_BLOCK / WARP);
    long long warp = static_cast<long long>(blockIdx.x) * (WARPS_BLOCK / WARP) + threadIdx.x / WARP;
    bool aligned = in_packs(columns, x, weight, bias, y);

    for (long long row = warp; row < rows; row += warps) {
        Pack packs[WARP_PACKS];
        float values[WARP_PACKS][PACK];
        read_row<WARP>(x + row * columns, columns, aligned, 0.0f, packs);
        to_floats(packs, values);
        normalise_row(values, weight, bias, y + row * columns, mean + row, rstd + row, columns, eps, aligned);
    }
}

extern "C" __global__ void __launch_bounds__(WARPS_BLOCK)
    add_layer_norm_warp(const Storage* __restrict__ x, const Storage* __restrict__ residual,
                        const Storage* __restrict__ weight, const Storage* __restrict__ bias, Storage* __restrict__ y,
                        Storage* __restrict__ z, float* __restrict__ mean, float* __restrict__ rstd, int rows,
                        int columns, float eps, unsigned threshold, float scale, Stream stream) {
    int lane = threadIdx.x % WARP;
    long long warps = static_cast<long long>(gridDim.x) * (WARPS_BLOCK / WARP);
    long long warp = static_cast<long long>(blockIdx.x) * (WARPS_BLOCK / WARP) + threadIdx.x / WARP;
    bool aligned = in_packs(columns, x, weight, bias, y) && in_packs(columns, residual, z);
    Dropout dropout(threshold, scale, stream);

    for (long long row = warp; row < rows; row += warps) {
        long long start = row * columns;
        Pack packs[WARP_PACKS], added_packs[WARP_PACKS];
        read_row<WARP>(x + start, columns, aligned, 0.0f, packs);
        read_row<WARP>(residual + start, columns, aligned, 0.0f, added_packs);
        float values[WARP_PACKS][PACK], added[WARP_PACKS][PACK];
        to_floats(packs, values);
        to_floats(added_packs, added);
#pragma unroll
        for (int k = 0; k < WARP_PACKS; ++k) {
            int column = (k * WARP + lane) * PACK;
            if (column < columns) drop(dropout, start + column, values[k]);
#pragma unroll
            for (int i = 0; i < PACK; ++i) values[k][i] += added[k][i];
            store_part(z + start + column, columns - column, aligned, values[k]);
        }
        normalise_row(values, weight, bias, y + start, mean + row, rstd + row, columns, eps, aligned);
    }
}

// One pack of z = dropout(x) + residual, whose first element is element `first` of the arrays.
__device__ __forceinline__ void load_sum(const Storage* __restrict__ x, const Storage* __restrict__ residual,
                                         const Dropout& dropout, long long first, int left, bool aligned,
                                         float (&values)[PACK]) {
    load_part(x + first, left, aligned, 0.0f, values);
    if (residual == nullptr) return;
    float added[PACK];
    load_part(residual + first, left, aligned, 0.0f, added);
    drop(dropout, first, values);
#pragma unroll
    for (int i = 0; i < PACK; ++i) values[i] += added[i];
}

// `residual` and `z` are null where there is nothing to add: then z is x.
extern "C" __global__ void __launch_bounds__(BLOCK)
    layer_norm_block(const Storage* __restrict__ x, const Storage* __restrict__ residual,
                     const Storage* __restrict__ weight, const Storage* __restrict__ bias, Storage* __restrict__ y,
                     Storage* __restrict__ z, float* __restrict__ mean, float* __restrict__ rstd, int rows, int columns,
                     float eps, unsigned threshold, float scale, Stream stream) {
    __shared__ float scratch[BLOCK / WARP];
    bool aligned = in_packs(columns, x, weight, bias, y) && in_packs(columns, residual, z);
    Dropout dropout(threshold, scale, stream);
    int first = threadIdx.x * PACK, stride = BLOCK * PACK;

    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        long long start = row * columns;
        float values[PACK];

        float total = 0;
        for (int column = first; column < columns; column += stride) {
            load_sum(x, residual, dropout, start + column, columns - column, aligned, values);
            if (residual != nullptr) store_part(z + start + column, columns - column, aligned, values);
#pragma unroll
            for (int i = 0; i < PACK; ++i) total += values[i];
        }
        float row_mean = block_sum(total, scratch) / columns;

        float squares = 0;
        for (int column = first; column < columns; column += stride) {
            load_sum(x, residual, dropout, start + column, columns - column, aligned, values);
#pragma unroll
            for (int i = 0; i < PACK; ++i) {
                float deviation = column + i < columns ? values[i] - row_mean : 0.0f;
                squares += deviation * deviation;
            }
        }
        float row_rstd = 1.0f / sqrtf(block_sum(squares, scratch) / columns + eps);

        for (int column = first; column < columns; column += stride) {
            load_sum(x, residual, dropout, start + column, columns - column, aligned, values);
#pragma unroll
            for (int i = 0; i < PACK; ++i) values[i] -= row_mean;
            scale_and_shift(weight + column, bias + column, row_rstd, y + start + column, columns - column, aligned,
                            values);
        }
        if (threadIdx.x == 0) {
            mean[row] = row_mean;
            rstd[row] = row_rstd;
        }
    }
}

// ------------------------------------------------------------------------------------------------------------ backward

// What one pack adds: g n to dweight, g to dbias, h and h n to the sums over its row, with n = (z - mean) rstd and
// h = g weight.
__device__ __forceinline__ void add_up(const float (&z)[PACK], const float (&g)[PACK], const float (&weight)[PACK],
                                       float mean, float rstd, float (&dweight)[PACK], float (&dbias)[PACK],
                                       float& sum_h, float& sum_hn) {
#pragma unroll
    for (int i = 0; i < PACK; ++i) {
        float n = (z[i] - mean) * rstd;
        float h = g[i] * weight[i];
        dweight[i] += g[i] * n;
        dbias[i] += g[i];
        sum_h += h;
        sum_hn += h * n;
    }
}

// One pack of dz = (h - mean h - n mean(h n)) rstd, and of dx = dropout(dz) where `dx` is not null.
__device__ __forceinline__ void store_gradient(const float (&z)[PACK], const float (&g)[PACK],
                                               const float (&weight)[PACK], float mean, float rstd, float mean_h,
                                               float mean_hn, Storage* __restrict__ dz, Storage* __restrict__ dx,
                                               const Dropout& dropout, long long first, int left, bool aligned) {
    if (left <= 0) return;
    float values[PACK];
#pragma unroll
    for (int i = 0; i < PACK; ++i) {
        float n = (z[i] - mean) * rstd;
        values[i] = (g[i] * weight[i] - mean_h - n * mean_hn) * rstd;
    }
    store_part(dz + first, left, aligned, values);
    if (dx == nullptr) return;
    drop(dropout, first, values);
    store_part(dx + first, left, aligned, values);
}

// A pack of sums, in float32 whatever Storage is.
__device__ __forceinline__ void load_sums(const float* p, int left, float (&values)[PACK]) {
#pragma unroll
    for (int i = 0; i < PACK; ++i) values[i] = i < left ? p[i] : 0.0f;
}

__device__ __forceinline__ void store_sums(float* p, int left, bool aligned, const float (&values)[PACK]) {
    if (left <= 0) return;
    if (aligned) {
#pragma unroll
        for (int i = 0; i < PACK; i += 4) {
            *reinterpret_cast<float4*>(p + i) = make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < PACK; ++i) {
            if (i < left) p[i] = values[i];
        }
    }
}

// `sums` (chunks, 2, columns) takes each chunk's share of dweight, then of dbias. `dx` is null where nothing drops.
extern "C" __global__ void __launch_bounds__(GRAD_BLOCK, GRAD_BLOCKS)
    layer_norm_grad_columns(const Storage* __restrict__ g, const Storage* __restrict__ z,
                            const Storage* __restrict__ weight, const float* __restrict__ mean,
                            const float* __restrict__ rstd, Storage* __restrict__ dz, Storage* __restrict__ dx,
                            float* __restrict__ sums, int rows, int columns, int chunk_rows, unsigned threshold,
                            float scale, Stream stream) {
    __shared__ float shared[2][GRAD_WARPS][2 * GRAD_ROWS];  // the first is written while the second may still be read
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    bool aligned = in_packs(columns, g, z, weight, dz) && in_packs(columns, dx, sums);
    Dropout dropout(threshold, scale, stream);
    int chunks = (rows - 1) / chunk_rows + 1;
    int turn = 0;

    Pack weights[GRAD_PACKS];
    float scales[GRAD_PACKS][PACK];
    read_row<GRAD_BLOCK>(weight, columns, aligned, 0.0f, weights);
    to_floats(weights, scales);

    for (int chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        float dweight[GRAD_PACKS][PACK] = {}, dbias[GRAD_PACKS][PACK] = {};
        int first = chunk * chunk_rows;
        int present = min(chunk_rows, rows - first);

        for (int done = 0; done < present; done += GRAD_ROWS) {
            Pack z_packs[GRAD_ROWS][GRAD_PACKS], g_packs[GRAD_ROWS][GRAD_PACKS];  // kept: in 16 bits half of the floats
            float row_mean[GRAD_ROWS], row_rstd[GRAD_ROWS], total[2 * GRAD_ROWS] = {};
            long long start = static_cast<long long>(first + done) * columns;
#pragma unroll
            for (int r = 0; r < GRAD_ROWS; ++r) {
                int own_columns = done + r < present ? columns : 0;  // of a row after the last one: nothing, so zeros
                read_row<GRAD_BLOCK>(z + start + r * columns, own_columns, aligned, 0.0f, z_packs[r]);
                read_row<GRAD_BLOCK>(g + start + r * columns, own_columns, aligned, 0.0f, g_packs[r]);
            }
#pragma unroll
            for (int r = 0; r < GRAD_ROWS; ++r) {
                row_mean[r] = done + r < present ? mean[first + done + r] : 0.0f;
                row_rstd[r] = done + r < present ? rstd[first + done + r] : 0.0f;
#pragma unroll
                for (int k = 0; k < GRAD_PACKS; ++k) {
                    float z_values[PACK], g_values[PACK];
                    to_floats(z_packs[r][k], z_values);
                    to_floats(g_packs[r][k], g_values);
                    add_up(z_values, g_values, scales[k], row_mean[r], row_rstd[r], dweight[k], dbias[k], total[2 * r],
                           total[2 * r + 1]);
                }
            }

#pragma unroll
            for (int j = 0; j < 2 * GRAD_ROWS; ++j) {
                total[j] = warp_sum(total[j]);
                if (lane == 0) shared[turn][warp][j] = total[j];
            }
            __syncthreads();
#pragma unroll
            for (int j = 0; j < 2 * GRAD_ROWS; ++j) {
                total[j] = 0;
#pragma unroll
                for (int other = 0; other < GRAD_WARPS; ++other) total[j] += shared[turn][other][j];
            }
            turn = 1 - turn;

#pragma unroll
            for (int r = 0; r < GRAD_ROWS; ++r) {
                int own_columns = done + r < present ? columns : 0;
                float mean_h = total[2 * r] / columns, mean_hn = total[2 * r + 1] / columns;
#pragma unroll
                for (int k = 0; k < GRAD_PACKS; ++k) {
                    int column = (k * GRAD_BLOCK + threadIdx.x) * PACK;
                    float z_values[PACK], g_values[PACK];
                    to_floats(z_packs[r][k], z_values);
                    to_floats(g_packs[r][k], g_values);
                    store_gradient(z_values, g_values, scales[k], row_mean[r], row_rstd[r], mean_h, mean_hn, dz, dx,
                                   dropout, start + r * columns + column, own_columns - column, aligned);
                }
            }
        }

        float* chunk_sums = sums + static_cast<long long>(chunk) * 2 * columns;
#pragma unroll
        for (int k = 0; k < GRAD_PACKS; ++k) {
            int column = (k * GRAD_BLOCK + threadIdx.x) * PACK;
            store_sums(chunk_sums + column, columns - column, aligned, dweight[k]);
            store_sums(chunk_sums + columns + column, columns - column, aligned, dbias[k]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    layer_norm_grad_long(const Storage* __restrict__ g, const Storage* __restrict__ z,
                         const Storage* __restrict__ weight, const float* __restrict__ mean,
                         const float* __restrict__ rstd, Storage* __restrict__ dz, Storage* __restrict__ dx,
                         float* __restrict__ sums, int rows, int columns, int chunk_rows, unsigned threshold,
                         float scale, Stream stream) {
    __shared__ float scratch[BLOCK / WARP];
    bool aligned = in_packs(columns, g, z, weight, dz) && in_packs(columns, dx, sums);
    Dropout dropout(threshold, scale, stream);
    int first_column = threadIdx.x * PACK, stride = BLOCK * PACK;
    int chunks = (rows - 1) / chunk_rows + 1;

    for (int chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        float* chunk_sums = sums + static_cast<long long>(chunk) * 2 * columns;
        int first = chunk * chunk_rows;
        int present = min(chunk_rows, rows - first);

        for (int row = first; row < first + present; ++row) {
            long long start = static_cast<long long>(row) * columns;
            float row_mean = mean[row], row_rstd = rstd[row];
            float z_values[PACK], g_values[PACK], scales[PACK];

            float sum_h = 0, sum_hn = 0;
            for (int column = first_column; column < columns; column += stride) {
                int left = columns - column;
                int known = row > first ? left : 0;  // nothing was summed up before the first row
                float dweight[PACK], dbias[PACK];
                load_part(z + start + column, left, aligned, 0.0f, z_values);
                load_part(g + start + column, left, aligned, 0.0f, g_values);
                load_part(weight + column, left, aligned, 0.0f, scales);
                load_sums(chunk_sums + column, known, dweight);
                load_sums(chunk_sums + columns + column, known, dbias);
                add_up(z_values, g_values, scales, row_mean, row_rstd, dweight, dbias, sum_h, sum_hn);
                store_sums(chunk_sums + column, left, aligned, dweight);
                store_sums(chunk_sums + columns + column, left, aligned, dbias);
            }
            float mean_h = block_sum(sum_h, scratch) / columns, mean_hn = block_sum(sum_hn, scratch) / columns;

            for (int column = first_column; column < columns; column += stride) {
                int left = columns - column;
                load_part(z + start + column, left, aligned, 0.0f, z_values);
                load_part(g + start + column, left, aligned, 0.0f, g_values);
                load_part(weight + column, left, aligned, 0.0f, scales);
                store_gradient(z_values, g_values, scales, row_mean, row_rstd, mean_h, mean_hn, dz, dx, dropout,
                               start + column, left, aligned);
            }
        }
    }
}

// (chunks, 2, columns) -> dweight and dbias. Each warp adds up every 32nd chunk, then the first warp the warps.
extern "C" __global__ void __launch_bounds__(SUM_BLOCK)
    layer_norm_sum_chunks(const float* __restrict__ sums, Storage* __restrict__ dweight, Storage* __restrict__ dbias,
                          int chunks, int columns) {
    __shared__ float shared[SUM_WARPS][WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int both = 2 * columns;

    for (int base = blockIdx.x * WARP; base < both; base += gridDim.x * WARP) {
        int column = base + lane;
        float total = 0;
        if (column < both) {
#pragma unroll 8
            for (int chunk = warp; chunk < chunks; chunk += SUM_WARPS) {
                total += sums[static_cast<long long>(chunk) * both + column];
            }
        }
        shared[warp][lane] = total;
        __syncthreads();
        if (warp == 0 && column < both) {
            total = shared[0][lane];
#pragma unroll
            for (int other = 1; other < SUM_WARPS; ++other) total += shared[other][lane];
            store(column < columns ? dweight + column : dbias + (column - columns), total);
        }
        __syncthreads();
    }
}
