// __half: IEEE 754 binary16.
#pragma once

#include "cuda_emulator_16bit.h"

namespace cuda_emulator {

CUDA_EMULATOR_INLINE float half_to_float(unsigned short bits) {
    const unsigned sign = unsigned(bits & 0x8000) << 16;
    const unsigned magnitude = bits & 0x7fff;
    if (magnitude >= 0x7c00) {  // infinity and NaN
        return same_bits<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    }
    if (magnitude < 0x0400) {  // subnormal: a multiple of 2^-24
        return same_bits<float>(sign | same_bits<unsigned>(float(magnitude) * 5.9604644775390625e-8f));
    }
    return same_bits<float>(sign | ((magnitude << 13) + (112u << 23)));
}

CUDA_EMULATOR_INLINE unsigned short float_to_half(float x) {
    const unsigned bits = same_bits<unsigned>(x);
    const unsigned sign = bits >> 16 & 0x8000;
    const unsigned magnitude = bits & 0x7fffffff;
    if (magnitude >= 0x47800000) {  // 65536 and more, infinity, NaN
        return (unsigned short)(magnitude > 0x7f800000 ? 0x7fff : sign | 0x7c00);
    }
    if (magnitude < 0x38800000) {  // subnormal: adding 0.5 rounds to a multiple of 2^-24
        return (unsigned short)(sign | (same_bits<unsigned>(same_bits<float>(magnitude) + 0.5f) - 0x3f000000));
    }
    const unsigned rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return (unsigned short)(sign | (rounded - (112u << 23)) >> 13);
}

}  // namespace cuda_emulator

CUDA_EMULATOR_16_BIT_TYPE(__half, __half2, cuda_emulator::half_to_float, cuda_emulator::float_to_half, "f2")
using half = __half;
using half2 = __half2;

CUDA_EMULATOR_INLINE float __half2float(__half x) { return x; }
CUDA_EMULATOR_INLINE __half __float2half(float x) { return x; }
CUDA_EMULATOR_INLINE __half __float2half_rn(float x) { return x; }
CUDA_EMULATOR_INLINE __half __double2half(double x) { return x; }
CUDA_EMULATOR_INLINE __half __int2half_rn(int x) { return x; }
CUDA_EMULATOR_INLINE float2 __half22float2(__half2 x) { return {x.x, x.y}; }
CUDA_EMULATOR_INLINE __half2 __float22half2_rn(float2 x) { return {x.x, x.y}; }
CUDA_EMULATOR_INLINE __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
CUDA_EMULATOR_INLINE __half2 __float2half2_rn(float x) { return {x, x}; }
CUDA_EMULATOR_INLINE __half2 __halves2half2(__half x, __half y) { return {x, y}; }
CUDA_EMULATOR_INLINE __half2 __half2half2(__half x) { return {x, x}; }
CUDA_EMULATOR_INLINE __half2 make_half2(__half x, __half y) { return {x, y}; }
CUDA_EMULATOR_INLINE __half __low2half(__half2 x) { return x.x; }
CUDA_EMULATOR_INLINE __half __high2half(__half2 x) { return x.y; }
CUDA_EMULATOR_INLINE unsigned short __half_as_ushort(__half x) { return x.bits; }
CUDA_EMULATOR_INLINE short __half_as_short(__half x) { return short(x.bits); }
CUDA_EMULATOR_INLINE __half __ushort_as_half(unsigned short x) { return cuda_emulator::same_bits<__half>(x); }
CUDA_EMULATOR_INLINE __half __short_as_half(short x) { return cuda_emulator::same_bits<__half>(x); }
