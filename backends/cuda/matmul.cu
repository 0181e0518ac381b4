// For what cuBLASLt refuses: any strides, any alignment, any grid.
//
// matmul_any: out = a b, then bias and GELU. A thread sums each of its elements, one term after the other: slow.
// gelu_rows:  GELU by itself, beside a product that the library does do. Bound by memory.
// operand_sums: likewise the sums of a over k, the gradient of a bias. Bound by memory, where a's rows are neighbours.
#include "gpu_common.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int CHAINS = 8;  // sums of one thread that do not wait for one another; errors of one sign stay fewer, too

constexpr float SQRT_2_OVER_PI = 0.7978845608028654f;
constexpr float CUBIC = 0.044715f;

// The tanh form (Hendrycks and Gimpel 2016).
__device__ __forceinline__ float gelu(float x) {
    return 0.5f * x * (1.0f + tanhf(SQRT_2_OVER_PI * (x + CUBIC * x * x * x)));
}

// Strides are in elements; `bias` and `before` may be null, and with `before` comes GELU.
extern "C" __global__ void __launch_bounds__(256) matmul_any(
    const Storage* __restrict__ a, const Storage* __restrict__ b, const Storage* __restrict__ bias,
    Storage* __restrict__ before, Storage* __restrict__ out, int m, int n, int k, int batch, long long a_batch,
    long long a_row, long long a_column, long long b_batch, long long b_row, long long b_column, long long out_batch,
    long long out_row) {
    const long long count = static_cast<long long>(batch) * m * n;
    const long long step = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
        const long long column = i % n;
        const long long row = i / n % m;
        const long long matrix = i / n / m;
        const Storage* x = a + matrix * a_batch + row * a_row;
        const Storage* y = b + matrix * b_batch + column * b_column;
        float sum = 0;
        for (int j = 0; j < k; ++j) sum = fmaf(load(x + j * a_column), load(y + j * b_row), sum);
        if (bias != nullptr) sum += load(bias + column);
        const long long at = matrix * out_batch + row * out_row + column;
        if (before != nullptr) {
            store(before + at, sum);
            sum = gelu(sum);
        }
        store(out + at, sum);
    }
}

// out = GELU(before), rows of both laid out alike.
extern "C" __global__ void __launch_bounds__(256) gelu_rows(const Storage* __restrict__ before,
                                                            Storage* __restrict__ out, int m, int n, int batch,
                                                            long long out_batch, long long out_row) {
    const long long count = static_cast<long long>(batch) * m * n;
    const long long step = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
        const long long at = i / n / m * out_batch + i / n % m * out_row + i % n;
        store(out + at, gelu(load(before + at)));
    }
}

// sums (m,) of a (m, k) over k, in an order that depends on k alone. A block sums WARP rows, a lane each: its warps take
// every WARPS-th column, and their sums are added in order.
extern "C" __global__ void __launch_bounds__(256) operand_sums(const Storage* __restrict__ a,
                                                               Storage* __restrict__ sums, int m, int k,
                                                               long long a_row, long long a_column) {
    __shared__ float scratch[WARPS * WARP];
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    const long long step = static_cast<long long>(gridDim.x) * WARP;
    for (long long first = static_cast<long long>(blockIdx.x) * WARP; first < m; first += step) {
        const long long row = first + lane;
        float chains[CHAINS] = {};
        for (long long j = warp; j < k && row < m; j += WARPS * CHAINS) {
#pragma unroll
            for (int c = 0; c < CHAINS; ++c) {
                const long long column = j + c * WARPS;
                if (column < k) chains[c] += load(a + row * a_row + column * a_column);
            }
        }
        float sum = 0;
#pragma unroll
        for (int c = 0; c < CHAINS; ++c) sum += chains[c];
        __syncthreads();  // the rows before have been read
        scratch[warp * WARP + lane] = sum;
        __syncthreads();
        if (warp == 0 && row < m) {
            float total = 0;
            for (int w = 0; w < WARPS; ++w) total += scratch[w * WARP + lane];
            store(sums + row, total);
        }
    }
}
