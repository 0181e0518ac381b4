// Device functions that the C++ library lacks, but for the approximate ones (cuda_emulator_approximate.h).
#pragma once

// --- bits ---

namespace cuda_emulator {

template <class To, class From>
CUDA_EMULATOR_INLINE To same_bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "the same number of bits");
    To result;
    __builtin_memcpy(&result, &value, sizeof result);
    return result;
}

}  // namespace cuda_emulator

CUDA_EMULATOR_INLINE int __float_as_int(float x) { return cuda_emulator::same_bits<int>(x); }
CUDA_EMULATOR_INLINE unsigned __float_as_uint(float x) { return cuda_emulator::same_bits<unsigned>(x); }
CUDA_EMULATOR_INLINE float __int_as_float(int x) { return cuda_emulator::same_bits<float>(x); }
CUDA_EMULATOR_INLINE float __uint_as_float(unsigned x) { return cuda_emulator::same_bits<float>(x); }
CUDA_EMULATOR_INLINE long long __double_as_longlong(double x) { return cuda_emulator::same_bits<long long>(x); }
CUDA_EMULATOR_INLINE double __longlong_as_double(long long x) { return cuda_emulator::same_bits<double>(x); }

CUDA_EMULATOR_INLINE int __popc(unsigned x) { return __builtin_popcount(x); }
CUDA_EMULATOR_INLINE int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
CUDA_EMULATOR_INLINE int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
CUDA_EMULATOR_INLINE int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
CUDA_EMULATOR_INLINE int __ffs(int x) { return __builtin_ffs(x); }
CUDA_EMULATOR_INLINE int __ffsll(long long x) { return __builtin_ffsll(x); }
CUDA_EMULATOR_INLINE unsigned __brev(unsigned x) {
    unsigned reversed = 0;
    for (int bit = 0; bit < 32; bit++) {
        reversed |= (x >> bit & 1) << (31 - bit);
    }
    return reversed;
}
CUDA_EMULATOR_INLINE unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const unsigned long long bytes = (unsigned long long)y << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        result |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    }
    return result;
}
CUDA_EMULATOR_INLINE unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return unsigned(((unsigned long long)high << 32 | low) << (shift & 31) >> 32);
}
CUDA_EMULATOR_INLINE unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return unsigned(((unsigned long long)high << 32 | low) >> (shift & 31));
}

// --- integers ---

CUDA_EMULATOR_INLINE unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)a * b >> 32); }
CUDA_EMULATOR_INLINE int __mulhi(int a, int b) { return int((long long)a * b >> 32); }
CUDA_EMULATOR_INLINE unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
CUDA_EMULATOR_INLINE int __mul24(int a, int b) { return (a << 8 >> 8) * (b << 8 >> 8); }
CUDA_EMULATOR_INLINE unsigned __umul24(unsigned a, unsigned b) { return (a & 0xffffff) * (b & 0xffffff); }
namespace cuda_emulator {

// Four products of bytes added to `sum`, which may go round.
template <class Byte, class Word>
CUDA_EMULATOR_INLINE Word dot_of_bytes(Word a, Word b, Word sum) {
    unsigned total = unsigned(sum);
    for (int shift = 0; shift < 32; shift += 8) {
        total += unsigned(int(Byte(unsigned(a) >> shift)) * int(Byte(unsigned(b) >> shift)));
    }
    return Word(total);
}

}  // namespace cuda_emulator

CUDA_EMULATOR_INLINE int __dp4a(int a, int b, int sum) { return cuda_emulator::dot_of_bytes<signed char>(a, b, sum); }
CUDA_EMULATOR_INLINE unsigned __dp4a(unsigned a, unsigned b, unsigned sum) {
    return cuda_emulator::dot_of_bytes<unsigned char>(a, b, sum);
}
CUDA_EMULATOR_INLINE unsigned __sad(int x, int y, unsigned z) { return z + unsigned(x < y ? y - x : x - y); }

// --- minimum and maximum: of NaN and a number, the number ---

#define CUDA_EMULATOR_EXTREMES(type)                                               \
    CUDA_EMULATOR_INLINE type min(type a, type b) { return a < b ? a : b; }        \
    CUDA_EMULATOR_INLINE type max(type a, type b) { return a > b ? a : b; }
CUDA_EMULATOR_EXTREMES(int)
CUDA_EMULATOR_EXTREMES(unsigned)
CUDA_EMULATOR_EXTREMES(long)
CUDA_EMULATOR_EXTREMES(unsigned long)
CUDA_EMULATOR_EXTREMES(long long)
CUDA_EMULATOR_EXTREMES(unsigned long long)
#undef CUDA_EMULATOR_EXTREMES
CUDA_EMULATOR_INLINE unsigned min(int a, unsigned b) { return min(unsigned(a), b); }
CUDA_EMULATOR_INLINE unsigned min(unsigned a, int b) { return min(a, unsigned(b)); }
CUDA_EMULATOR_INLINE unsigned max(int a, unsigned b) { return max(unsigned(a), b); }
CUDA_EMULATOR_INLINE unsigned max(unsigned a, int b) { return max(a, unsigned(b)); }
CUDA_EMULATOR_INLINE float min(float a, float b) { return fminf(a, b); }
CUDA_EMULATOR_INLINE float max(float a, float b) { return fmaxf(a, b); }
CUDA_EMULATOR_INLINE double min(double a, double b) { return fmin(a, b); }
CUDA_EMULATOR_INLINE double max(double a, double b) { return fmax(a, b); }
CUDA_EMULATOR_INLINE double min(float a, double b) { return fmin(double(a), b); }
CUDA_EMULATOR_INLINE double min(double a, float b) { return fmin(a, double(b)); }
CUDA_EMULATOR_INLINE double max(float a, double b) { return fmax(double(a), b); }
CUDA_EMULATOR_INLINE double max(double a, float b) { return fmax(a, double(b)); }

// --- floating point ---

using std::isfinite;
using std::isinf;
using std::isnan;
using std::signbit;

namespace cuda_emulator {

CUDA_EMULATOR_INLINE float reciprocal_cube_root(float x) { return float(1 / cbrt(double(x))); }
CUDA_EMULATOR_INLINE float sine_of_pi(float x) { return float(sin(double(x) * 3.14159265358979323846)); }
CUDA_EMULATOR_INLINE float cosine_of_pi(float x) { return float(cos(double(x) * 3.14159265358979323846)); }

}  // namespace cuda_emulator

// Macros, since C libraries declare these names, or will.
#define rcbrtf(x) cuda_emulator::reciprocal_cube_root(x)
#define sinpif(x) cuda_emulator::sine_of_pi(x)
#define cospif(x) cuda_emulator::cosine_of_pi(x)

CUDA_EMULATOR_INLINE float normcdff(float x) { return float(0.5 * erfc(-double(x) * 0.70710678118654752440)); }
CUDA_EMULATOR_INLINE float fdividef(float x, float y) { return x / y; }
CUDA_EMULATOR_INLINE float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }
CUDA_EMULATOR_INLINE float __fadd_rn(float x, float y) { return x + y; }
CUDA_EMULATOR_INLINE float __fsub_rn(float x, float y) { return x - y; }
CUDA_EMULATOR_INLINE float __fmul_rn(float x, float y) { return x * y; }
CUDA_EMULATOR_INLINE float __fdiv_rn(float x, float y) { return x / y; }
CUDA_EMULATOR_INLINE float __frcp_rn(float x) { return 1 / x; }
CUDA_EMULATOR_INLINE float __fsqrt_rn(float x) { return sqrtf(x); }
CUDA_EMULATOR_INLINE float __frsqrt_rn(float x) { return float(1 / sqrt(double(x))); }
CUDA_EMULATOR_INLINE float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
CUDA_EMULATOR_INLINE double __dadd_rn(double x, double y) { return x + y; }
CUDA_EMULATOR_INLINE double __dmul_rn(double x, double y) { return x * y; }
CUDA_EMULATOR_INLINE double __fma_rn(double x, double y, double z) { return fma(x, y, z); }

// Beyond its range an integer takes its nearest value, and NaN gives 0.
CUDA_EMULATOR_INLINE int __float2int_rz(float x) {
    return x != x ? 0 : x >= 2147483648.0f ? INT_MAX : x <= -2147483648.0f ? INT_MIN : int(x);
}
CUDA_EMULATOR_INLINE int __float2int_rn(float x) { return __float2int_rz(nearbyintf(x)); }
CUDA_EMULATOR_INLINE int __float2int_rd(float x) { return __float2int_rz(floorf(x)); }
CUDA_EMULATOR_INLINE int __float2int_ru(float x) { return __float2int_rz(ceilf(x)); }
CUDA_EMULATOR_INLINE unsigned __float2uint_rz(float x) {
    return !(x > 0) ? 0 : x >= 4294967296.0f ? UINT_MAX : unsigned(x);
}
CUDA_EMULATOR_INLINE unsigned __float2uint_rn(float x) { return __float2uint_rz(nearbyintf(x)); }
CUDA_EMULATOR_INLINE float __int2float_rn(int x) { return float(x); }
CUDA_EMULATOR_INLINE float __uint2float_rn(unsigned x) { return float(x); }
CUDA_EMULATOR_INLINE float __ll2float_rn(long long x) { return float(x); }
CUDA_EMULATOR_INLINE float __ull2float_rn(unsigned long long x) { return float(x); }
CUDA_EMULATOR_INLINE float __double2float_rn(double x) { return float(x); }

// --- loads and stores with a cache hint ---

#define CUDA_EMULATOR_LOAD(name)                                             \
    template <class Type>                                                    \
    CUDA_EMULATOR_INLINE Type name(const Type* address) {                    \
        return *address;                                                     \
    }
#define CUDA_EMULATOR_STORE(name)                                            \
    template <class Type>                                                    \
    CUDA_EMULATOR_INLINE void name(Type* address, Type value) {              \
        *address = value;                                                    \
    }
CUDA_EMULATOR_LOAD(__ldg)
CUDA_EMULATOR_LOAD(__ldca)
CUDA_EMULATOR_LOAD(__ldcg)
CUDA_EMULATOR_LOAD(__ldcs)
CUDA_EMULATOR_LOAD(__ldlu)
CUDA_EMULATOR_LOAD(__ldcv)
CUDA_EMULATOR_STORE(__stwb)
CUDA_EMULATOR_STORE(__stcg)
CUDA_EMULATOR_STORE(__stcs)
CUDA_EMULATOR_STORE(__stwt)
#undef CUDA_EMULATOR_LOAD
#undef CUDA_EMULATOR_STORE

// --- the rest ---

CUDA_EMULATOR_INLINE void __trap() { cuda_emulator_trap(); }
CUDA_EMULATOR_INLINE void __nanosleep(unsigned) {}
CUDA_EMULATOR_INLINE void __builtin_assume(bool) {}
CUDA_EMULATOR_INLINE long long clock64() { return 0; }
