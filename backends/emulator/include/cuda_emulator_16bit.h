// What __half and __nv_bfloat16 have in common: arithmetic in float, rounded to nearest even after each operation.
#pragma once

namespace cuda_emulator {

// A double to the float from which a second rounding, to 16 bits, gives what a single one would ("round to odd").
CUDA_EMULATOR_INLINE float narrowed(double x) {
    const float nearest = float(x);
    if (double(nearest) == x || x != x) {
        return nearest;
    }
    unsigned bits = same_bits<unsigned>(nearest);
    if (fabs(double(nearest)) > fabs(x)) {
        bits--;
    }
    return same_bits<float>(bits | 1);
}
CUDA_EMULATOR_INLINE float narrowed(float x) { return x; }
template <class Integer>
CUDA_EMULATOR_INLINE float narrowed(Integer x) {
    return narrowed(double(x));
}

}  // namespace cuda_emulator

// `Half` and `Half2` are the types, `to` and `from` functions between their bits and float, `name` what signatures say.
#define CUDA_EMULATOR_16_BIT_TYPE(Half, Half2, to, from, name)                                                   \
    struct Half {                                                                                                \
        unsigned short bits;                                                                                     \
        Half() = default;                                                                                        \
        template <class Number, class = std::enable_if_t<std::is_arithmetic<Number>::value>>                     \
        Half(Number x) : bits(from(cuda_emulator::narrowed(x))) {}                                               \
        operator float() const { return to(bits); }                                                              \
        static constexpr const char* emulator_name() { return name; }                                            \
    };                                                                                                           \
    struct alignas(4) Half2 {                                                                                    \
        Half x, y;                                                                                               \
        Half2() = default;                                                                                       \
        Half2(Half low, Half high) : x(low), y(high) {}                                                          \
    };                                                                                                           \
    CUDA_EMULATOR_INLINE Half operator+(Half a, Half b) { return Half(float(a) + float(b)); }                    \
    CUDA_EMULATOR_INLINE Half operator-(Half a, Half b) { return Half(float(a) - float(b)); }                    \
    CUDA_EMULATOR_INLINE Half operator*(Half a, Half b) { return Half(float(a) * float(b)); }                    \
    CUDA_EMULATOR_INLINE Half operator/(Half a, Half b) { return Half(float(a) / float(b)); }                    \
    CUDA_EMULATOR_INLINE Half operator-(Half a) { return Half(-float(a)); }                                      \
    CUDA_EMULATOR_INLINE Half& operator+=(Half& a, Half b) { return a = a + b; }                                 \
    CUDA_EMULATOR_INLINE Half& operator-=(Half& a, Half b) { return a = a - b; }                                 \
    CUDA_EMULATOR_INLINE Half& operator*=(Half& a, Half b) { return a = a * b; }                                 \
    CUDA_EMULATOR_INLINE Half& operator/=(Half& a, Half b) { return a = a / b; }                                 \
    CUDA_EMULATOR_INLINE bool operator==(Half a, Half b) { return float(a) == float(b); }                        \
    CUDA_EMULATOR_INLINE bool operator!=(Half a, Half b) { return float(a) != float(b); }                        \
    CUDA_EMULATOR_INLINE bool operator<(Half a, Half b) { return float(a) < float(b); }                          \
    CUDA_EMULATOR_INLINE bool operator>(Half a, Half b) { return float(a) > float(b); }                          \
    CUDA_EMULATOR_INLINE bool operator<=(Half a, Half b) { return float(a) <= float(b); }                        \
    CUDA_EMULATOR_INLINE bool operator>=(Half a, Half b) { return float(a) >= float(b); }                        \
    CUDA_EMULATOR_INLINE Half2 operator+(Half2 a, Half2 b) { return {a.x + b.x, a.y + b.y}; }                    \
    CUDA_EMULATOR_INLINE Half2 operator-(Half2 a, Half2 b) { return {a.x - b.x, a.y - b.y}; }                    \
    CUDA_EMULATOR_INLINE Half2 operator*(Half2 a, Half2 b) { return {a.x * b.x, a.y * b.y}; }                    \
    CUDA_EMULATOR_INLINE Half __hadd(Half a, Half b) { return a + b; }                                           \
    CUDA_EMULATOR_INLINE Half __hsub(Half a, Half b) { return a - b; }                                           \
    CUDA_EMULATOR_INLINE Half __hmul(Half a, Half b) { return a * b; }                                           \
    CUDA_EMULATOR_INLINE Half __hdiv(Half a, Half b) { return a / b; }                                           \
    CUDA_EMULATOR_INLINE Half __hneg(Half a) { return -a; }                                                      \
    CUDA_EMULATOR_INLINE Half __habs(Half a) { return Half(fabsf(a)); }                                          \
    CUDA_EMULATOR_INLINE Half __hmin(Half a, Half b) { return Half(fminf(a, b)); }                               \
    CUDA_EMULATOR_INLINE Half __hmax(Half a, Half b) { return Half(fmaxf(a, b)); }                               \
    CUDA_EMULATOR_INLINE Half __hfma(Half a, Half b, Half c) { return Half(fma(double(a), double(b), double(c))); } \
    CUDA_EMULATOR_INLINE bool __hisnan(Half a) { return float(a) != float(a); }                                  \
    CUDA_EMULATOR_INLINE Half2 __hadd2(Half2 a, Half2 b) { return a + b; }                                       \
    CUDA_EMULATOR_INLINE Half2 __hsub2(Half2 a, Half2 b) { return a - b; }                                       \
    CUDA_EMULATOR_INLINE Half2 __hmul2(Half2 a, Half2 b) { return a * b; }                                       \
    CUDA_EMULATOR_INLINE Half2 __hfma2(Half2 a, Half2 b, Half2 c) {                                              \
        return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};                                                   \
    }                                                                                                            \
    CUDA_EMULATOR_INLINE Half2 __hmin2(Half2 a, Half2 b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }        \
    CUDA_EMULATOR_INLINE Half2 __hmax2(Half2 a, Half2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }        \
    CUDA_EMULATOR_INLINE Half2 __habs2(Half2 a) { return {__habs(a.x), __habs(a.y)}; }                           \
    CUDA_EMULATOR_INLINE Half2 __hneg2(Half2 a) { return {-a.x, -a.y}; }                                         \
    CUDA_EMULATOR_INLINE float __low2float(Half2 a) { return a.x; }                                              \
    CUDA_EMULATOR_INLINE float __high2float(Half2 a) { return a.y; }                                             \
    CUDA_EMULATOR_ATOMIC(atomicAdd, Half, old + value)
