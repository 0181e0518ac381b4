// __nv_bfloat16: the upper half of a float.
#pragma once

#include "cuda_emulator_16bit.h"

namespace cuda_emulator {

CUDA_EMULATOR_INLINE float bfloat16_to_float(unsigned short bits) { return same_bits<float>(unsigned(bits) << 16); }

CUDA_EMULATOR_INLINE unsigned short float_to_bfloat16(float x) {
    const unsigned bits = same_bits<unsigned>(x);
    if ((bits & 0x7fffffff) > 0x7f800000) {
        return 0x7fff;
    }
    return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace cuda_emulator

CUDA_EMULATOR_16_BIT_TYPE(__nv_bfloat16, __nv_bfloat162, cuda_emulator::bfloat16_to_float,
                          cuda_emulator::float_to_bfloat16, "b2")
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

CUDA_EMULATOR_INLINE float __bfloat162float(__nv_bfloat16 x) { return x; }
CUDA_EMULATOR_INLINE __nv_bfloat16 __float2bfloat16(float x) { return x; }
CUDA_EMULATOR_INLINE __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
CUDA_EMULATOR_INLINE __nv_bfloat16 __double2bfloat16(double x) { return x; }
CUDA_EMULATOR_INLINE __nv_bfloat16 __int2bfloat16_rn(int x) { return x; }
CUDA_EMULATOR_INLINE float2 __bfloat1622float2(__nv_bfloat162 x) { return {x.x, x.y}; }
CUDA_EMULATOR_INLINE __nv_bfloat162 __float22bfloat162_rn(float2 x) { return {x.x, x.y}; }
CUDA_EMULATOR_INLINE __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
CUDA_EMULATOR_INLINE __nv_bfloat162 __float2bfloat162_rn(float x) { return {x, x}; }
CUDA_EMULATOR_INLINE __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
CUDA_EMULATOR_INLINE __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 x) { return {x, x}; }
CUDA_EMULATOR_INLINE __nv_bfloat162 make_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
CUDA_EMULATOR_INLINE __nv_bfloat16 __low2bfloat16(__nv_bfloat162 x) { return x.x; }
CUDA_EMULATOR_INLINE __nv_bfloat16 __high2bfloat16(__nv_bfloat162 x) { return x.y; }
CUDA_EMULATOR_INLINE unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
CUDA_EMULATOR_INLINE short __bfloat16_as_short(__nv_bfloat16 x) { return short(x.bits); }
CUDA_EMULATOR_INLINE __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) {
    return cuda_emulator::same_bits<__nv_bfloat16>(x);
}
CUDA_EMULATOR_INLINE __nv_bfloat16 __short_as_bfloat16(short x) { return cuda_emulator::same_bits<__nv_bfloat16>(x); }
