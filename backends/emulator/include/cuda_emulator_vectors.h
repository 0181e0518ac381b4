// CUDA's vector types: float4, int2, uint3, dim3 and so on, with the alignments that CUDA gives them.
#pragma once

#define CUDA_EMULATOR_VECTORS(name, scalar, align2, align4)                                      \
    struct name##1 {                                                                             \
        scalar x;                                                                                \
    };                                                                                           \
    struct alignas(align2) name##2 {                                                             \
        scalar x, y;                                                                             \
    };                                                                                           \
    struct name##3 {                                                                             \
        scalar x, y, z;                                                                          \
    };                                                                                           \
    struct alignas(align4) name##4 {                                                             \
        scalar x, y, z, w;                                                                       \
    };                                                                                           \
    CUDA_EMULATOR_INLINE name##1 make_##name##1(scalar x) { return {x}; }                            \
    CUDA_EMULATOR_INLINE name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }               \
    CUDA_EMULATOR_INLINE name##3 make_##name##3(scalar x, scalar y, scalar z) { return {x, y, z}; }  \
    CUDA_EMULATOR_INLINE name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) {            \
        return {x, y, z, w};                                                                     \
    }

CUDA_EMULATOR_VECTORS(char, signed char, 2, 4)
CUDA_EMULATOR_VECTORS(uchar, unsigned char, 2, 4)
CUDA_EMULATOR_VECTORS(short, short, 4, 8)
CUDA_EMULATOR_VECTORS(ushort, unsigned short, 4, 8)
CUDA_EMULATOR_VECTORS(int, int, 8, 16)
CUDA_EMULATOR_VECTORS(uint, unsigned, 8, 16)
CUDA_EMULATOR_VECTORS(longlong, long long, 16, 16)
CUDA_EMULATOR_VECTORS(ulonglong, unsigned long long, 16, 16)
CUDA_EMULATOR_VECTORS(float, float, 8, 16)
CUDA_EMULATOR_VECTORS(double, double, 16, 16)
#undef CUDA_EMULATOR_VECTORS

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
    constexpr dim3(uint3 other) : x(other.x), y(other.y), z(other.z) {}
};
