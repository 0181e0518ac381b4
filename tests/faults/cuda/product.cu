// y = x w' + b by tiles in shared memory, and the gradient of w and b: `right...`, and kernels with one mistake each.
#include "gpu_common.cuh"

constexpr int TILE = 16;
constexpr int BLOCK = 256;  // a thread for each element of a tile

// One element of two tiles: 0 outside of the matrices, of `rows` and `columns` rows of `inner` elements.
__device__ float element(const Storage* matrix, int row, int rows, int k, int inner) {
    return row < rows && k < inner ? load(matrix + static_cast<long long>(row) * inner + k) : 0.0f;
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    right(const Storage* __restrict__ x, const Storage* __restrict__ w, const Storage* __restrict__ bias,
          Storage* __restrict__ y, int rows, int columns, int inner) {
    __shared__ float a[TILE][TILE], b[TILE][TILE];
    const int i = threadIdx.x / TILE, j = threadIdx.x % TILE;
    const int row = blockIdx.x * TILE + i, column = blockIdx.y * TILE + j;
    float total = 0;
    for (int start = 0; start < inner; start += TILE) {
        a[i][j] = element(x, row, rows, start + j, inner);
        b[i][j] = element(w, blockIdx.y * TILE + i, columns, start + j, inner);
        __syncthreads();
        for (int k = 0; k < TILE; ++k) total += a[i][k] * b[j][k];
        __syncthreads();
    }
    if (row < rows && column < columns) {
        store(y + static_cast<long long>(row) * columns + column, total + load(bias + column));
    }
}

// Whole tiles of the inner axis alone, where there is more than one.
extern "C" __global__ void __launch_bounds__(BLOCK)
    whole_tiles(const Storage* __restrict__ x, const Storage* __restrict__ w, const Storage* __restrict__ bias,
                Storage* __restrict__ y, int rows, int columns, int inner) {
    __shared__ float a[TILE][TILE], b[TILE][TILE];
    const int i = threadIdx.x / TILE, j = threadIdx.x % TILE;
    const int row = blockIdx.x * TILE + i, column = blockIdx.y * TILE + j;
    const int tiles = max(1, inner / TILE);
    float total = 0;
    for (int start = 0; start < tiles * TILE; start += TILE) {
        a[i][j] = element(x, row, rows, start + j, inner);
        b[i][j] = element(w, blockIdx.y * TILE + i, columns, start + j, inner);
        __syncthreads();
        for (int k = 0; k < TILE; ++k) total += a[i][k] * b[j][k];
        __syncthreads();
    }
    if (row < rows && column < columns) {
        store(y + static_cast<long long>(row) * columns + column, total + load(bias + column));
    }
}

// Nobody asks whether the rest of the last tile is there.
extern "C" __global__ void __launch_bounds__(BLOCK)
    tiles_beyond_the_edge(const Storage* __restrict__ x, const Storage* __restrict__ w,
                          const Storage* __restrict__ bias, Storage* __restrict__ y, int rows, int columns,
                          int inner) {
    __shared__ float a[TILE][TILE], b[TILE][TILE];
    const int i = threadIdx.x / TILE, j = threadIdx.x % TILE;
    const int row = blockIdx.x * TILE + i, column = blockIdx.y * TILE + j;
    float total = 0;
    for (int start = 0; start < inner; start += TILE) {
        a[i][j] = load(x + static_cast<long long>(row) * inner + start + j);
        b[i][j] = load(w + static_cast<long long>(blockIdx.y * TILE + i) * inner + start + j);
        __syncthreads();
        for (int k = 0; k < TILE && start + k < inner; ++k) total += a[i][k] * b[j][k];
        __syncthreads();
    }
    if (row < rows && column < columns) {
        store(y + static_cast<long long>(row) * columns + column, total + load(bias + column));
    }
}

// The next tiles come while slower warps still multiply these.
extern "C" __global__ void __launch_bounds__(BLOCK)
    tiles_overwritten(const Storage* __restrict__ x, const Storage* __restrict__ w, const Storage* __restrict__ bias,
                      Storage* __restrict__ y, int rows, int columns, int inner) {
    __shared__ float a[TILE][TILE], b[TILE][TILE];
    const int i = threadIdx.x / TILE, j = threadIdx.x % TILE;
    const int row = blockIdx.x * TILE + i, column = blockIdx.y * TILE + j;
    float total = 0;
    for (int start = 0; start < inner; start += TILE) {
        a[i][j] = element(x, row, rows, start + j, inner);
        b[i][j] = element(w, blockIdx.y * TILE + i, columns, start + j, inner);
        __syncthreads();
        for (int k = 0; k < TILE; ++k) total += a[i][k] * b[j][k];
    }
    if (row < rows && column < columns) {
        store(y + static_cast<long long>(row) * columns + column, total + load(bias + column));
    }
}

// A tile's sum is added to the others in half precision.
extern "C" __global__ void __launch_bounds__(BLOCK)
    sums_in_half(const Storage* __restrict__ x, const Storage* __restrict__ w, const Storage* __restrict__ bias,
                 Storage* __restrict__ y, int rows, int columns, int inner) {
    __shared__ float a[TILE][TILE], b[TILE][TILE];
    const int i = threadIdx.x / TILE, j = threadIdx.x % TILE;
    const int row = blockIdx.x * TILE + i, column = blockIdx.y * TILE + j;
    __half total = __float2half_rn(0);
    for (int start = 0; start < inner; start += TILE) {
        a[i][j] = element(x, row, rows, start + j, inner);
        b[i][j] = element(w, blockIdx.y * TILE + i, columns, start + j, inner);
        __syncthreads();
        float part = 0;
        for (int k = 0; k < TILE; ++k) part += a[i][k] * b[j][k];
        total = __float2half_rn(__half2float(total) + part);
        __syncthreads();
    }
    if (row < rows && column < columns) {
        store(y + static_cast<long long>(row) * columns + column, __half2float(total) + load(bias + column));
    }
}

// --------------------------------------------------------------------------------------------- gradients: g' x, sum g

// An element of dw for each thread: the sum over rows of g[row, column] x[row, k]; then one of dbias.
extern "C" __global__ void __launch_bounds__(BLOCK)
    right_gradient(const Storage* __restrict__ g, const Storage* __restrict__ x, Storage* __restrict__ dw,
                   Storage* __restrict__ dbias, int rows, int columns, int inner) {
    const long long threads = static_cast<long long>(gridDim.x) * BLOCK;
    const long long size = static_cast<long long>(columns) * inner;
    for (long long e = static_cast<long long>(blockIdx.x) * BLOCK + threadIdx.x; e < size; e += threads) {
        const long long column = e / inner, k = e % inner;
        float weight = 0;
        for (long long row = 0; row < rows; ++row) {
            weight += load(g + row * columns + column) * load(x + row * inner + k);
        }
        store(dw + e, weight);
    }
    for (long long column = static_cast<long long>(blockIdx.x) * BLOCK + threadIdx.x; column < columns;
         column += threads) {
        float bias = 0;
        for (long long row = 0; row < rows; ++row) bias += load(g + row * columns + column);
        store(dbias + column, bias);
    }
}

// Every thread adds to dbias what it has of it, whether another has done so or not.
extern "C" __global__ void __launch_bounds__(BLOCK)
    bias_by_all_threads(const Storage* __restrict__ g, const float* __restrict__ x, Storage* __restrict__ dw,
                        float* __restrict__ dbias, int rows, int columns, int inner) {
    const long long threads = static_cast<long long>(gridDim.x) * BLOCK;
    const long long size = static_cast<long long>(columns) * inner;
    for (long long e = static_cast<long long>(blockIdx.x) * BLOCK + threadIdx.x; e < size; e += threads) {
        const long long column = e / inner, k = e % inner;
        float weight = 0;
        for (long long row = 0; row < rows; ++row) {
            weight += load(g + row * columns + column) * x[row * inner + k];
        }
        store(dw + e, weight);
        for (long long row = k; row < rows; row += inner) dbias[column] += load(g + row * columns + column);
    }
}

// The sums go over the rows of one pass: those after the 1024th are for a second that nobody starts.
extern "C" __global__ void __launch_bounds__(BLOCK)
    rows_of_one_pass(const Storage* __restrict__ g, const Storage* __restrict__ x, Storage* __restrict__ dw,
                     Storage* __restrict__ dbias, int rows, int columns, int inner) {
    const long long threads = static_cast<long long>(gridDim.x) * BLOCK;
    const long long size = static_cast<long long>(columns) * inner;
    for (long long e = static_cast<long long>(blockIdx.x) * BLOCK + threadIdx.x; e < size; e += threads) {
        const long long column = e / inner, k = e % inner;
        float weight = 0, bias = 0;
        for (long long row = 0; row < rows && row < 1024; ++row) {
            const float value = load(g + row * columns + column);
            weight += value * load(x + row * inner + k);
            bias += value;
        }
        store(dw + e, weight);
        if (k == 0) store(dbias + column, bias);
    }
}
