// gelu (erf and tanh form), relu, tanh and their gradients: y = f(x), dx = f(g, x), element by element.
//
//   relu, relu_grad, tanh_grad   a comparison or two products: memory bandwidth bounds them
//   tanh, gelu_*, gelu_*_grad    some 20 to 60 instructions an element: bandwidth in float32; in 16 bits a byte brings
//                                twice as many elements, and arithmetic is not far behind

#include "activation/gpu_gelu.cuh"
#include "gpu_packs.cuh"

constexpr int THREADS = 256;
constexpr float DENSITY_AT_0 = 0.39894228040143268f;  // 1 / sqrt(2 pi), of the normal distribution

// --------------------------------------------------------------------------------------------------------- forward

extern "C" __global__ void __launch_bounds__(THREADS)
    gelu_erf(const Storage* __restrict__ x, Storage* __restrict__ y, long long count) {
    each(x, y, count, [](float v) { return gelu_by_erf(v); });
}

extern "C" __global__ void __launch_bounds__(THREADS)
    gelu_tanh(const Storage* __restrict__ x, Storage* __restrict__ y, long long count) {
    each(x, y, count, [](float v) { return gelu_by_tanh(v); });
}

extern "C" __global__ void __launch_bounds__(THREADS)
    relu(const Storage* __restrict__ x, Storage* __restrict__ y, long long count) {
    each(x, y, count, [](float v) { return v < 0 ? 0 : v; });  // NaN stays NaN, which fmaxf would drop
}

extern "C" __global__ void __launch_bounds__(THREADS)
    tanh_of(const Storage* __restrict__ x, Storage* __restrict__ y, long long count) {
    each(x, y, count, [](float v) { return tanhf(v); });
}

// ------------------------------------------------------------------------------------------------------- gradients

extern "C" __global__ void __launch_bounds__(THREADS)
    gelu_erf_grad(const Storage* __restrict__ g, const Storage* __restrict__ x, Storage* __restrict__ dx,
                  long long count) {
    each(g, x, dx, count, [](float gradient, float v) {
        const float below = 0.5f * (1 + erff(v * SQRT_HALF));
        const float density = DENSITY_AT_0 * expf(-0.5f * v * v);
        return gradient * (below + v * density);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS)
    gelu_tanh_grad(const Storage* __restrict__ g, const Storage* __restrict__ x, Storage* __restrict__ dx,
                   long long count) {
    each(g, x, dx, count, [](float gradient, float v) {
        const float t = tanh_of_cubic(v);
        const float slope = SQRT_2_OVER_PI * (1 + 3 * CUBIC * v * v);
        return gradient * 0.5f * ((1 + t) + v * (1 - t * t) * slope);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS)
    relu_grad(const Storage* __restrict__ g, const Storage* __restrict__ x, Storage* __restrict__ dx,
              long long count) {
    each(g, x, dx, count, [](float gradient, float v) { return v > 0 ? gradient : 0; });
}

extern "C" __global__ void __launch_bounds__(THREADS)
    tanh_grad(const Storage* __restrict__ g, const Storage* __restrict__ y, Storage* __restrict__ dx,
              long long count) {
    each(g, y, dx, count, [](float gradient, float t) { return gradient * (1 - t * t); });
}
