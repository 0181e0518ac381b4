// softmax and its gradient over the rows of a matrix. All are bound by memory: 2 and 3 arrays are moved, each once.
//
// 1. softmax_block, softmax_grad_block: a block for each row, for rows of any length. The row is read once per pass,
//    the first time from memory, then from L1 or L2; each pass ends in a reduction over the block, which it waits for.
// 2. softmax_warp, softmax_grad_warp: a warp for each row, which it holds in registers: read once, reduced by shuffles,
//    no barrier. Bound by the bytes that a multiprocessor's warps have in flight: up to 4 KiB each.
// 3. softmax_short, softmax_grad_short: the same for rows of a pack per lane or less. One such row per warp would leave
//    too few bytes in flight, so a warp takes several rows at once.
#include "gpu_rows.cuh"

constexpr int SHORT_ROWS = 4;  // that a warp of variant 3 takes at once
constexpr int BLOCK = 256;
constexpr int GRAD_BLOCK = 128;

// exp of it is 0 and it is no maximum, so it stands for what lies beyond the end of a row.
__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

// ------------------------------------------------------------------------------------------------------ a warp per row

template <int ROWS, int OWN>
__device__ __forceinline__ void softmax_by_warps(const Storage* __restrict__ x, Storage* __restrict__ y, int rows,
                                                 int columns) {
    int lane = threadIdx.x % WARP;
    long long warps = static_cast<long long>(gridDim.x) * blockDim.x / WARP;
    long long warp = static_cast<long long>(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP;
    bool aligned = in_packs(columns, x, y);

    for (long long first = warp * ROWS; first < rows; first += warps * ROWS) {
        Pack packs[ROWS][OWN];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            int present = first + r < rows ? columns : 0;  // of a row after the last one: nothing
            read_row<WARP>(x + (first + r) * columns, present, aligned, minus_infinity(), packs[r]);
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            float values[OWN][PACK];
            to_floats(packs[r], values);
            float top = values[0][0];
#pragma unroll
            for (int k = 0; k < OWN; ++k) {
#pragma unroll
                for (int i = 0; i < PACK; ++i) top = fmaxf(top, values[k][i]);
            }
            top = warp_max(top);

            float total = 0;
#pragma unroll
            for (int k = 0; k < OWN; ++k) {
#pragma unroll
                for (int i = 0; i < PACK; ++i) {
                    values[k][i] = expf(values[k][i] - top);
                    total += values[k][i];
                }
            }
            float share = 1.0f / warp_sum(total);

            int present = first + r < rows ? columns : 0;
#pragma unroll
            for (int k = 0; k < OWN; ++k) {
                int column = (k * WARP + lane) * PACK;
#pragma unroll
                for (int i = 0; i < PACK; ++i) values[k][i] *= share;
                store_part(y + (first + r) * columns + column, present - column, aligned, values[k]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK) softmax_short(const Storage* __restrict__ x,
                                                                  Storage* __restrict__ y, int rows, int columns) {
    softmax_by_warps<SHORT_ROWS, 1>(x, y, rows, columns);
}

extern "C" __global__ void __launch_bounds__(BLOCK) softmax_warp(const Storage* __restrict__ x, Storage* __restrict__ y,
                                                                 int rows, int columns) {
    softmax_by_warps<1, WARP_PACKS>(x, y, rows, columns);
}

template <int ROWS, int OWN>
__device__ __forceinline__ void softmax_grad_by_warps(const Storage* __restrict__ g, const Storage* __restrict__ y,
                                                      Storage* __restrict__ dx, int rows, int columns) {
    int lane = threadIdx.x % WARP;
    long long warps = static_cast<long long>(gridDim.x) * blockDim.x / WARP;
    long long warp = static_cast<long long>(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP;
    bool aligned = in_packs(columns, g, y, dx);

    for (long long first = warp * ROWS; first < rows; first += warps * ROWS) {
        Pack gradients[ROWS][OWN], outputs[ROWS][OWN];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            int present = first + r < rows ? columns : 0;
            read_row<WARP>(g + (first + r) * columns, present, aligned, 0.0f, gradients[r]);
            read_row<WARP>(y + (first + r) * columns, present, aligned, 0.0f, outputs[r]);
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            float gradient[OWN][PACK], value[OWN][PACK];
            to_floats(gradients[r], gradient);
            to_floats(outputs[r], value);
            float total = 0;
#pragma unroll
            for (int k = 0; k < OWN; ++k) {
#pragma unroll
                for (int i = 0; i < PACK; ++i) total += gradient[k][i] * value[k][i];
            }
            total = warp_sum(total);

            int present = first + r < rows ? columns : 0;
#pragma unroll
            for (int k = 0; k < OWN; ++k) {
                int column = (k * WARP + lane) * PACK;
#pragma unroll
                for (int i = 0; i < PACK; ++i) gradient[k][i] = value[k][i] * (gradient[k][i] - total);
                store_part(dx + (first + r) * columns + column, present - column, aligned, gradient[k]);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(GRAD_BLOCK)
    softmax_grad_short(const Storage* __restrict__ g, const Storage* __restrict__ y, Storage* __restrict__ dx, int rows,
                       int columns) {
    softmax_grad_by_warps<SHORT_ROWS, 1>(g, y, dx, rows, columns);
}

extern "C" __global__ void __launch_bounds__(GRAD_BLOCK)
    softmax_grad_warp(const Storage* __restrict__ g, const Storage* __restrict__ y, Storage* __restrict__ dx, int rows,
                      int columns) {
    softmax_grad_by_warps<1, WARP_PACKS>(g, y, dx, rows, columns);
}

// ----------------------------------------------------------------------------------------------------- a block per row

extern "C" __global__ void __launch_bounds__(BLOCK) softmax_block(const Storage* __restrict__ x,
                                                                  Storage* __restrict__ y, int rows, int columns) {
    __shared__ float scratch[BLOCK / WARP];
    bool aligned = in_packs(columns, x, y);
    int first = threadIdx.x * PACK, stride = blockDim.x * PACK;

    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const Storage* from = x + row * columns;
        Storage* to = y + row * columns;
        float values[PACK];

        float top = minus_infinity();
        for (int column = first; column < columns; column += stride) {
            load_part(from + column, columns - column, aligned, minus_infinity(), values);
#pragma unroll
            for (int i = 0; i < PACK; ++i) top = fmaxf(top, values[i]);
        }
        top = block_max(top, scratch);

        float total = 0;
        for (int column = first; column < columns; column += stride) {
            load_part(from + column, columns - column, aligned, minus_infinity(), values);
#pragma unroll
            for (int i = 0; i < PACK; ++i) total += expf(values[i] - top);
        }
        float share = 1.0f / block_sum(total, scratch);

        for (int column = first; column < columns; column += stride) {
            load_part(from + column, columns - column, aligned, minus_infinity(), values);
#pragma unroll
            for (int i = 0; i < PACK; ++i) values[i] = expf(values[i] - top) * share;
            store_part(to + column, columns - column, aligned, values);
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    softmax_grad_block(const Storage* __restrict__ g, const Storage* __restrict__ y, Storage* __restrict__ dx, int rows,
                       int columns) {
    __shared__ float scratch[BLOCK / WARP];
    bool aligned = in_packs(columns, g, y, dx);
    int first = threadIdx.x * PACK, stride = blockDim.x * PACK;

    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const Storage *gradients = g + row * columns, *outputs = y + row * columns;
        float gradient[PACK], value[PACK];

        float total = 0;
        for (int column = first; column < columns; column += stride) {
            load_part(gradients + column, columns - column, aligned, 0.0f, gradient);
            load_part(outputs + column, columns - column, aligned, 0.0f, value);
#pragma unroll
            for (int i = 0; i < PACK; ++i) total += gradient[i] * value[i];
        }
        total = block_sum(total, scratch);

        for (int column = first; column < columns; column += stride) {
            load_part(gradients + column, columns - column, aligned, 0.0f, gradient);
            load_part(outputs + column, columns - column, aligned, 0.0f, value);
#pragma unroll
            for (int i = 0; i < PACK; ++i) gradient[i] = value[i] * (gradient[i] - total);
            store_part(dx + row * columns + column, columns - column, aligned, gradient);
        }
    }
}
