// Pooling of packed sequences, and rows divided by their norm. All are bound by memory.
//
// mean_pool        a block for each sequence and WARP columns: every WARPS-th row by the same warp, whose sums are added
//                  in order. Neighbouring lanes read neighbouring columns.
// mean_pool_grad   a warp for each row of dx, which finds its sequence by bisection. Rows of g are read from L1 and L2.
// normalize, normalize_grad   a block for each row: read from memory for the sum, from L1 for the rest.
#include "gpu_rows.cuh"

constexpr int POOL_THREADS = 256;
constexpr int POOL_WARPS = POOL_THREADS / WARP;
constexpr int ROW_THREADS = 128;

extern "C" __global__ void __launch_bounds__(POOL_THREADS)
    mean_pool(const Storage* __restrict__ x, const int* __restrict__ cu_seqlens, Storage* __restrict__ y, int sequences,
              int columns) {
    __shared__ float scratch[POOL_WARPS][WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int strips = (columns + WARP - 1) / WARP;
    for (long long tile = blockIdx.x; tile < static_cast<long long>(sequences) * strips; tile += gridDim.x) {
        const long long sequence = tile / strips;
        const int column = static_cast<int>(tile - sequence * strips) * WARP + lane;
        const int first = cu_seqlens[sequence], last = cu_seqlens[sequence + 1];
        float total = 0;
        if (column < columns) {
            for (long long row = first + warp; row < last; row += POOL_WARPS) total += load(x + row * columns + column);
        }
        __syncthreads();  // the tile before has been read
        scratch[warp][lane] = total;
        __syncthreads();
        if (warp == 0 && column < columns) {
            total = 0;
            for (int other = 0; other < POOL_WARPS; ++other) total += scratch[other][lane];
            store(y + sequence * columns + column, last > first ? total / static_cast<float>(last - first) : 0.0f);
        }
    }
}

extern "C" __global__ void __launch_bounds__(POOL_THREADS)
    mean_pool_grad(const Storage* __restrict__ g, const int* __restrict__ cu_seqlens, Storage* __restrict__ dx,
                   int sequences, int rows, int columns) {
    const int lane = threadIdx.x % WARP;
    const bool aligned = in_packs(columns, g, dx);
    for (long long row = static_cast<long long>(blockIdx.x) * POOL_WARPS + threadIdx.x / WARP; row < rows;
         row += static_cast<long long>(gridDim.x) * POOL_WARPS) {
        int low = 0, high = sequences;  // the last sequence that begins at or before this row: an empty one does not
        while (low < high) {
            const int middle = (low + high + 1) / 2;
            if (cu_seqlens[middle] <= row) low = middle;
            else high = middle - 1;
        }
        const bool inside = low < sequences;  // not after the last one
        const float length = inside ? static_cast<float>(cu_seqlens[low + 1] - cu_seqlens[low]) : 1.0f;
        for (int column = lane * PACK; column < columns; column += WARP * PACK) {
            float values[PACK] = {};
            if (inside) {
                load_part(g + static_cast<long long>(low) * columns + column, columns - column, aligned, 0.0f, values);
            }
#pragma unroll
            for (int i = 0; i < PACK; ++i) values[i] /= length;
            store_part(dx + row * columns + column, columns - column, aligned, values);
        }
    }
}

extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    normalize(const Storage* __restrict__ x, Storage* __restrict__ y, float* __restrict__ norm, int rows, int columns,
              float eps) {
    __shared__ float scratch[ROW_THREADS / WARP];
    const bool aligned = in_packs(columns, x, y);
    const int first = threadIdx.x * PACK, stride = ROW_THREADS * PACK;
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        float values[PACK], squares = 0;
        for (int column = first; column < columns; column += stride) {
            load_part(x + row * columns + column, columns - column, aligned, 0.0f, values);
#pragma unroll
            for (int i = 0; i < PACK; ++i) squares += values[i] * values[i];
        }
        const float root = sqrtf(block_sum(squares, scratch));
        const float d = root <= eps ? eps : root;  // a NaN goes on
        if (threadIdx.x == 0) norm[row] = root;
        for (int column = first; column < columns; column += stride) {
            load_part(x + row * columns + column, columns - column, aligned, 0.0f, values);
#pragma unroll
            for (int i = 0; i < PACK; ++i) values[i] /= d;
            store_part(y + row * columns + column, columns - column, aligned, values);
        }
    }
}

extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    normalize_grad(const Storage* __restrict__ g, const Storage* __restrict__ x, const float* __restrict__ norm,
                   Storage* __restrict__ dx, int rows, int columns, float eps) {
    __shared__ float scratch[ROW_THREADS / WARP];
    const bool aligned = in_packs(columns, g, x, dx);
    const int first = threadIdx.x * PACK, stride = ROW_THREADS * PACK;
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const bool clamped = norm[row] <= eps;
        const float d = clamped ? eps : norm[row];
        float gradient[PACK], values[PACK], along = 0;
        for (int column = first; column < columns && !clamped; column += stride) {
            load_part(g + row * columns + column, columns - column, aligned, 0.0f, gradient);
            load_part(x + row * columns + column, columns - column, aligned, 0.0f, values);
#pragma unroll
            for (int i = 0; i < PACK; ++i) along += gradient[i] * (values[i] / d);
        }
        along = block_sum(along, scratch);
        for (int column = first; column < columns; column += stride) {
            load_part(g + row * columns + column, columns - column, aligned, 0.0f, gradient);
            load_part(x + row * columns + column, columns - column, aligned, 0.0f, values);
#pragma unroll
            for (int i = 0; i < PACK; ++i) gradient[i] = (gradient[i] - values[i] / d * along) / d;
            store_part(dx + row * columns + column, columns - column, aligned, gradient);
        }
    }
}
