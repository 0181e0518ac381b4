// GELU of one float in its two forms, for whatever ends in it.
#pragma once

constexpr float SQRT_HALF = 0.70710678118654752f;
constexpr float SQRT_2_OVER_PI = 0.79788456080286536f;
constexpr float CUBIC = 0.044715f;

__device__ __forceinline__ float tanh_of_cubic(float x) { return tanhf(SQRT_2_OVER_PI * (x + CUBIC * x * x * x)); }

__device__ __forceinline__ float gelu_by_erf(float x) { return x * 0.5f * (1 + erff(x * SQRT_HALF)); }

// Hendrycks and Gimpel 2016.
__device__ __forceinline__ float gelu_by_tanh(float x) { return x * 0.5f * (1 + tanh_of_cubic(x)); }
