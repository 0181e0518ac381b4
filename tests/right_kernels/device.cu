// Kernels in CUDA C that are right, and made otherwise than those of the project.

#include "gpu_common.cuh"

constexpr int TILE = 16;  // rows and columns of a tile of linear_tile, and how far it goes at a time
constexpr int TILE_THREADS = 256;
constexpr int LANES = 128;

// --- softmax: a warp for each row, its lanes' maxima and sums merged in a butterfly

extern "C" __global__ void __launch_bounds__(LANES)
    softmax_merged(const Storage* x, Storage* y, int rows, int columns) {
    const float none = __int_as_float(0xff800000);  // minus infinity
    const int lane = threadIdx.x % WARP;
    for (long long row = blockIdx.x * (LANES / WARP) + threadIdx.x / WARP; row < rows; row += gridDim.x * (LANES / WARP)) {
        const Storage* from = x + row * columns;
        float top = none, total = 0;
        for (int c = lane; c < columns; c += WARP) {
            const float z = load(from + c);
            if (z == none) continue;  // adds nothing
            const float larger = z > top ? z : top;
            total = total * expf(top - larger) + expf(z - larger);
            top = larger;
        }
        for (int step = 1; step < WARP; step *= 2) {
            const float other = __shfl_xor_sync(ALL_LANES, top, step), sum = __shfl_xor_sync(ALL_LANES, total, step);
            const float larger = fmaxf(top, other);
            const float safe = larger == none ? 0 : larger;
            total = total * expf(top - safe) + sum * expf(other - safe);
            top = larger;
        }
        const float scale = 1 / total;
        for (int c = lane; c < columns; c += WARP) store(y + row * columns + c, expf(load(from + c) - top) * scale);
    }
}

// --- layer norm: Welford in each lane, merged in a butterfly (Chan et al., 1979)

extern "C" __global__ void __launch_bounds__(LANES)
    layer_norm_merged(const Storage* x, const Storage* weight, const Storage* bias, Storage* y, float* means,
                      float* rstds, int rows, int columns, float eps) {
    const int lane = threadIdx.x % WARP;
    for (long long row = blockIdx.x * (LANES / WARP) + threadIdx.x / WARP; row < rows; row += gridDim.x * (LANES / WARP)) {
        const Storage* from = x + row * columns;
        float count = 0, mean = 0, squares = 0;
        for (int c = lane; c < columns; c += WARP) {
            const float off = load(from + c) - mean;
            count += 1;
            mean += off / count;
            squares += off * (load(from + c) - mean);
        }
        for (int step = 1; step < WARP; step *= 2) {
            const float n = __shfl_xor_sync(ALL_LANES, count, step), m = __shfl_xor_sync(ALL_LANES, mean, step);
            const float s = __shfl_xor_sync(ALL_LANES, squares, step);
            if (count + n > 0) {
                // both sides of a butterfly add the same numbers in the same order
                const bool first = (lane & step) == 0;
                const float n1 = first ? count : n, n2 = first ? n : count, m1 = first ? mean : m, m2 = first ? m : mean;
                const float off = m2 - m1;
                mean = m1 + off * (n2 / (n1 + n2));
                squares = (first ? squares + s : s + squares) + off * off * (n1 * n2 / (n1 + n2));
                count = n1 + n2;
            }
        }
        const float rstd = 1 / sqrtf(squares / columns + eps);
        for (int c = lane; c < columns; c += WARP)
            store(y + row * columns + c, (load(from + c) - mean) * rstd * load(weight + c) + load(bias + c));
        if (lane == 0) {
            means[row] = mean;
            rstds[row] = rstd;
        }
    }
}

// --- square norm: Kahan's sum in each thread, a tree over the block, one block

extern "C" __global__ void __launch_bounds__(LANES) square_norm_compensated(const Storage* x, float* y, long long n) {
    __shared__ float partial[LANES];
    float total = 0, lost = 0;
    for (long long i = threadIdx.x; i < n; i += LANES) {
        const float term = load(x + i) * load(x + i) - lost, next = total + term;
        if (isfinite(next)) lost = (next - total) - term;
        total = next;
    }
    partial[threadIdx.x] = total;
    for (int half = LANES / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    }
    if (threadIdx.x == 0) y[0] = partial[0];
}

// --- linear: tiles in shared memory, accumulators that begin with the bias

extern "C" __global__ void __launch_bounds__(TILE_THREADS)
    linear_tile(const Storage* x, const Storage* weight, const Storage* bias, Storage* y, int rows, int inputs,
                int outs) {
    __shared__ float a[TILE][TILE + 1], b[TILE][TILE + 1];
    const int i = threadIdx.x / TILE, j = threadIdx.x % TILE;
    const int across = (outs + TILE - 1) / TILE, tiles = (rows + TILE - 1) / TILE * across;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const long long row = tile / across * TILE + i, out = tile % across * TILE + j;
        const long long other = tile % across * TILE + i;  // the row of the weight that this thread loads
        float total = out < outs ? load(bias + out) : 0;
        for (int k = 0; k < inputs; k += TILE) {
            a[i][j] = row < rows && k + j < inputs ? load(x + row * inputs + k + j) : 0;
            b[i][j] = other < outs && k + j < inputs ? load(weight + other * inputs + k + j) : 0;
            __syncthreads();
            for (int step = 0; step < TILE && k + step < inputs; ++step) total += a[i][step] * b[j][step];
            __syncthreads();
        }
        if (row < rows && out < outs) store(y + row * outs + out, total);
    }
}

// --- scatter: a thread for each element of the table, which reads the ids from last to first

extern "C" __global__ void __launch_bounds__(LANES)
    scatter_backwards(const Storage* x, const int* index, Storage* y, int count, int columns, int rows, int skip) {
    const long long size = (long long)rows * columns;
    for (long long i = blockIdx.x * (long long)LANES + threadIdx.x; i < size; i += (long long)gridDim.x * LANES) {
        const int row = i / columns, column = i % columns;
        float total = 0;
        for (int n = count - 1; n >= 0; --n)
            if (index[n] == row && row != skip) total += load(x + (long long)n * columns + column);
        store(y + i, total);
    }
}
