// The approximate functions of CUDA, as far off as NVIDIA allows them to be: CUDA C++ programming guide, "Mathematical
// functions", "Intrinsic functions"; for rsqrtf and __tanhf the PTX ISA (rsqrt.approx, tanh.approx), which is narrower.
//
// A GPU's own error is not known in public, so it is drawn: sign and size depend on the function and the bits of its
// arguments and on nothing else, and go up to the bound. A kernel that relies on more than is promised so shows itself.
#pragma once

namespace cuda_emulator {

constexpr double two_to_minus_21_41 = 3.5887e-7, two_to_minus_21_19 = 4.1799e-7, two_to_minus_22_9 = 1.2776e-7;

// Number -> its part of the largest error, in (-1, 1). The mixing is that of SplitMix64 (Steele et al. 2014).
CUDA_EMULATOR_INLINE double drawn(unsigned function, float x, float y = 0) {
    uint64_t bits = (uint64_t(same_bits<unsigned>(x)) << 32 | same_bits<unsigned>(y)) + function * 0x9e3779b97f4a7c15;
    bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9;
    bits = (bits ^ bits >> 27) * 0x94d049bb133111eb;
    return double(int64_t(bits ^ bits >> 31)) / 9223372036854775808.0;
}

// The distance of neighbouring floats about a finite number.
CUDA_EMULATOR_INLINE double spacing(double value) {
    const int exponent = value == 0 ? -126 : ilogb(value);
    return ldexp(1.0, (exponent < -126 ? -126 : exponent) - 23);
}

// `exact`, off by `part` of `limit`; what rounding adds belongs to the limit.
CUDA_EMULATOR_INLINE float off_by(double exact, double limit, double part) {
    return float(exact + part * (limit - 0.5 * spacing(fabs(exact) + limit)));
}
CUDA_EMULATOR_INLINE float off_by_ulps(double exact, double ulps, double part) {
    return isfinite(exact) ? off_by(exact, ulps * spacing(exact), part) : float(exact);
}

CUDA_EMULATOR_INLINE float exp_about(unsigned function, double exact, float x, double per_unit) {
    if (x == 0 || isinf(x)) {
        return float(exact);  // PTX ISA: ex2.approx
    }
    const float result = off_by_ulps(exact, 2 + floor(fabs(per_unit * x)), drawn(function, x));
    return result < 0 ? 0 : result;
}

// Near 1 the absolute error is bounded, elsewhere the relative one.
CUDA_EMULATOR_INLINE float log_about(unsigned function, double exact, float x, double near_one, double ulps) {
    if (x == 1 || !isfinite(exact)) {
        return float(exact);
    }
    const double part = drawn(function, x);
    return x >= 0.5f && x <= 2 ? off_by(exact, near_one, part) : off_by_ulps(exact, ulps, part);
}

// Within [-pi, pi] the absolute error is bounded; "larger" outside is taken as in proportion to the argument.
CUDA_EMULATOR_INLINE float wave_about(unsigned function, double exact, float x, double within) {
    if (x == 0 || !isfinite(x)) {
        return float(exact);
    }
    const double periods = fabs(double(x)) / 3.14159265358979323846;
    return off_by(exact, within * (periods > 1 ? periods : 1), drawn(function, x));
}

CUDA_EMULATOR_INLINE float fast_exp(float x) { return exp_about(1, exp(double(x)), x, 1.173); }
CUDA_EMULATOR_INLINE float fast_exp10(float x) { return exp_about(2, pow(10.0, double(x)), x, 2.97); }
CUDA_EMULATOR_INLINE float fast_log(float x) { return log_about(3, log(double(x)), x, two_to_minus_21_41, 3); }
CUDA_EMULATOR_INLINE float fast_log2(float x) { return log_about(4, log2(double(x)), x, 0x1p-22, 2); }
CUDA_EMULATOR_INLINE float fast_log10(float x) { return log_about(5, log10(double(x)), x, 0x1p-24, 3); }
CUDA_EMULATOR_INLINE float fast_sin(float x) { return wave_about(6, sin(double(x)), x, two_to_minus_21_41); }
CUDA_EMULATOR_INLINE float fast_cos(float x) { return wave_about(7, cos(double(x)), x, two_to_minus_21_19); }
CUDA_EMULATOR_INLINE float fast_divide(float x, float y) {
    const float size = fabsf(y);
    if (size > 0x1p126f && isfinite(y)) {
        return isinf(x) ? NAN : copysignf(0.0f, x) * copysignf(1.0f, y);
    }
    return x == 0 || !isfinite(y) ? x / y : off_by_ulps(double(x) / double(y), 2, drawn(8, x, y));
}
CUDA_EMULATOR_INLINE float fast_tan(float x) { return fast_divide(fast_sin(x), fast_cos(x)); }
CUDA_EMULATOR_INLINE float fast_power(float x, float y) {
    const float exponent = y * fast_log2(x);
    return exponent == 0 ? 1.0f : off_by_ulps(exp2(double(exponent)), 2, drawn(9, exponent));
}
CUDA_EMULATOR_INLINE void fast_sine_and_cosine(float x, float* sine, float* cosine) {
    *sine = fast_sin(x);
    *cosine = fast_cos(x);
}
CUDA_EMULATOR_INLINE float fast_tanh(float x) {
    const double exact = tanh(double(x));
    return float(exact * (1 + drawn(10, x) * (0x1p-11 - 0x1p-24)));
}
CUDA_EMULATOR_INLINE float fast_reciprocal_root(float x) {
    const double exact = 1 / sqrt(double(x));
    return float(exact * (1 + drawn(11, x) * (two_to_minus_22_9 - 0x1p-24)));
}
CUDA_EMULATOR_INLINE double fast_reciprocal_root(double x) { return 1 / sqrt(x); }

}  // namespace cuda_emulator

// Macros, since C libraries declare these names, or will.
#define __expf(x) cuda_emulator::fast_exp(x)
#define __exp10f(x) cuda_emulator::fast_exp10(x)
#define __logf(x) cuda_emulator::fast_log(x)
#define __log2f(x) cuda_emulator::fast_log2(x)
#define __log10f(x) cuda_emulator::fast_log10(x)
#define __powf(x, y) cuda_emulator::fast_power(x, y)
#define __sinf(x) cuda_emulator::fast_sin(x)
#define __cosf(x) cuda_emulator::fast_cos(x)
#define __tanf(x) cuda_emulator::fast_tan(x)
#define __tanhf(x) cuda_emulator::fast_tanh(x)
#define __sincosf(x, sine, cosine) cuda_emulator::fast_sine_and_cosine(x, sine, cosine)
#define __fdividef(x, y) cuda_emulator::fast_divide(x, y)
#define rsqrtf(x) cuda_emulator::fast_reciprocal_root(float(x))
#define rsqrt(x) cuda_emulator::fast_reciprocal_root(x)
