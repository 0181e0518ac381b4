// Kernels for arrays of 16 bits: `right...`, and kernels of which each has one mistake.
#include "gpu_common.cuh"

constexpr int BLOCK = 128;
constexpr int WARPS = BLOCK / WARP;
constexpr float SQRT_2_OVER_PI = 0.7978845608028654f;
constexpr float CUBIC = 0.044715f;

__device__ Storage stored(float x) { return from_float<Storage>(x); }

extern "C" __global__ void __launch_bounds__(BLOCK)
    right_gelu_grad(const Storage* __restrict__ g, const Storage* __restrict__ x, Storage* __restrict__ dx,
                    long long count, int by_tanh) {
    const long long threads = static_cast<long long>(gridDim.x) * BLOCK;
    for (long long i = static_cast<long long>(blockIdx.x) * BLOCK + threadIdx.x; i < count; i += threads) {
        const float v = load(x + i), t = tanhf(SQRT_2_OVER_PI * (v + CUBIC * v * v * v));
        const float slope = v * (1 - t * t) * SQRT_2_OVER_PI * (1 + 3 * CUBIC * v * v);
        const float density = v * expf(-0.5f * v * v) * 0.3989422804f;
        const float by_erf = 0.5f * (1 + erff(v * 0.70710678f)) + density;
        store(dx + i, load(g + i) * (by_tanh ? 0.5f * (1 + t + slope) : by_erf));
    }
}

// x^2 and x^3 are rounded to 16 bits: from 41 on they are infinite, and 0 times infinity is NaN.
extern "C" __global__ void __launch_bounds__(BLOCK)
    powers_in_16_bits(const Storage* __restrict__ g, const Storage* __restrict__ x, Storage* __restrict__ dx,
                      long long count, int by_tanh) {
    const long long threads = static_cast<long long>(gridDim.x) * BLOCK;
    for (long long i = static_cast<long long>(blockIdx.x) * BLOCK + threadIdx.x; i < count; i += threads) {
        const float v = load(x + i), square = to_float(stored(v * v)), cube = to_float(stored(square * v));
        const float t = tanhf(SQRT_2_OVER_PI * (v + CUBIC * cube));
        const float slope = v * (1 - t * t) * SQRT_2_OVER_PI * (1 + to_float(stored(3 * CUBIC * square)));
        const float density = v * expf(-0.5f * v * v) * 0.3989422804f;
        const float by_erf = 0.5f * (1 + erff(v * 0.70710678f)) + density;
        store(dx + i, load(g + i) * (by_tanh ? 0.5f * (1 + t + slope) : by_erf));
    }
}

// The deviation plus eps is rounded to 16 bits: an eps of 1e-12 is lost, and rows whose elements are equal divide by 0.
extern "C" __global__ void __launch_bounds__(BLOCK)
    variance_in_16_bits(const Storage* __restrict__ x, const Storage* __restrict__ weight,
                        const Storage* __restrict__ bias, Storage* __restrict__ y, float* __restrict__ means,
                        float* __restrict__ rstds, int rows, int columns, float eps) {
    __shared__ float scratch[WARPS];
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const Storage* from = x + row * columns;
        float total = 0, squares = 0;
        for (int c = threadIdx.x; c < columns; c += BLOCK) total += load(from + c);
        const float mean = block_sum(total, scratch) / columns;
        for (int c = threadIdx.x; c < columns; c += BLOCK) squares += (load(from + c) - mean) * (load(from + c) - mean);
        const float rstd = 1 / sqrtf(to_float(stored(block_sum(squares, scratch) / columns + eps)));
        for (int c = threadIdx.x; c < columns; c += BLOCK) {
            store(y + row * columns + c, (load(from + c) - mean) * rstd * load(weight + c) + load(bias + c));
        }
        if (threadIdx.x == 0) {
            means[row] = mean;
            rstds[row] = rstd;
        }
    }
}

// A relu that was written for float32, and given 16 bits by a cast.
extern "C" __global__ void __launch_bounds__(BLOCK)
    float_for_storage(const Storage* __restrict__ x, Storage* __restrict__ y, long long count) {
    const float* from = reinterpret_cast<const float*>(x);
    float* to = reinterpret_cast<float*>(y);
    const long long threads = static_cast<long long>(gridDim.x) * BLOCK;
    for (long long i = static_cast<long long>(blockIdx.x) * BLOCK + threadIdx.x; i < count; i += threads) {
        to[i] = from[i] <= 0 ? 0.0f : from[i];
    }
}

// Two elements at a time: of an odd number the last is left as it was.
extern "C" __global__ void __launch_bounds__(BLOCK)
    pairs_alone(const Storage* __restrict__ x, Storage* __restrict__ y, long long count) {
    const long long threads = static_cast<long long>(gridDim.x) * BLOCK;
    for (long long i = static_cast<long long>(blockIdx.x) * BLOCK + threadIdx.x; i < count / 2; i += threads) {
        for (long long k = 2 * i; k < 2 * i + 2; ++k) store(y + k, load(x + k) <= 0 ? 0.0f : load(x + k));
    }
}

// Sums of 16-bit arrays are kept in 16 bits.
extern "C" __global__ void __launch_bounds__(BLOCK)
    sums_as_stored(const Storage* __restrict__ x, Storage* __restrict__ y, long long rows, long long columns) {
    const long long threads = static_cast<long long>(gridDim.x) * BLOCK;
    for (long long c = static_cast<long long>(blockIdx.x) * BLOCK + threadIdx.x; c < columns; c += threads) {
        Storage total = from_float<Storage>(0);
        for (long long row = 0; row < rows; ++row) {
            total = from_float<Storage>(to_float(total) + load(x + row * columns + c));
        }
        y[c] = total;
    }
}
