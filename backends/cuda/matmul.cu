// For what cuBLASLt refuses: any strides, any alignment, any grid.
//
// matmul_any: out = a b, then bias and GELU. A thread sums each of its elements, one term after the other: slow.
// gelu_rows:  GELU by itself, beside a product that the library does do. Bound by memory.
#include "gpu_common.cuh"

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
