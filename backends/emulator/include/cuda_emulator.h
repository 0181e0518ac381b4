// CUDA C for g++: included before every .cu file that the emulator compiles.
//
// What it gives: threadIdx and so on, barriers, shuffles, votes, warp reductions, atomics, vector types, the math
// functions and intrinsics, and through headers of their own names __half (cuda_fp16.h), __nv_bfloat16 (cuda_bf16.h),
// wmma (mma.h) and asynchronous copies (cuda_pipeline.h). `CUDA_EMULATOR` is defined, `__CUDA_ARCH__` is not.
//
// Inline PTX needs a twin under `#ifdef CUDA_EMULATOR`. For one that involves the whole warp, as mma.sync does:
//
//     CUDA_EMULATOR_RAW static void twin(...) {
//         const T (&given)[32] = cuda_emulator::warp_exchange(0xffffffff, mine);  // T: at most 64 bytes
//         ... given[lane] is what that lane gave; it stays until this lane's next collective or barrier ...
//     }
//
// `cuda_emulator::lane()` is the caller's lane. CUDA_EMULATOR_RAW keeps a function's own accesses from being watched:
// right for a twin, which works on registers, and wrong for anything that touches device or shared memory.
//
// What is not emulated is listed in docs/emulator.md, and refused when the file is compiled where it can be told by then.
//
// What is not found: a pointer that a function which is not inlined takes past the end of a thread's own array, or of a
// __shared__ variable into another of the same kernel; a race that three or more earlier reads or writes of one address
// have pushed out of its shadow (another schedule may show it).
#pragma once

#define CUDA_EMULATOR 1

#include <cassert>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cuda_emulator_interface.h"

// `__global__` and `__shared__` are left for toolchain.py, which finds kernels by the one and gives the other its place.
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __grid_constant__
#define CUDA_EMULATOR_RAW __attribute__((no_sanitize("thread,alignment"), noinline))
#define CUDA_EMULATOR_INLINE static inline __attribute__((always_inline, unused))

#include "cuda_emulator_vectors.h"

// Constants to the compiler, since a thread never sees its own change; so they stay in registers and are not watched.
extern "C" {
extern const uint3 threadIdx;
extern const uint3 blockIdx;
extern const dim3 blockDim;
extern const dim3 gridDim;
}
constexpr int warpSize = 32;

#include "cuda_emulator_atomics.h"
#include "cuda_emulator_math.h"
#include "cuda_emulator_approximate.h"
#include "cuda_emulator_warp.h"

// --- what toolchain.py appends for every kernel ---

namespace cuda_emulator {

template <class Type>
constexpr const char* scalar_name() {
    if (std::is_floating_point<Type>::value) {
        return sizeof(Type) == 8 ? "f8" : "f4";
    }
    if (std::is_integral<Type>::value || std::is_enum<Type>::value) {
        constexpr bool is_signed = std::is_signed<Type>::value;
        return sizeof(Type) == 1   ? (is_signed ? "i1" : "u1")
               : sizeof(Type) == 2 ? (is_signed ? "i2" : "u2")
               : sizeof(Type) == 4 ? (is_signed ? "i4" : "u4")
                                   : (is_signed ? "i8" : "u8");
    }
    return "struct";
}

// Types of other headers say their own names: `using emulator_name`.
template <class Type, class = void>
struct TypeName {
    static constexpr const char* value = scalar_name<Type>();
};
template <>
struct TypeName<void> {
    static constexpr const char* value = "u1";
};
template <class Type>
struct TypeName<Type, std::void_t<decltype(Type::emulator_name())>> {
    static constexpr const char* value = Type::emulator_name();
};

template <class Type>
void describe_argument() {
    if constexpr (std::is_pointer<Type>::value) {
        using Element = std::remove_pointer_t<Type>;
        cuda_emulator_argument("pointer", TypeName<std::remove_cv_t<Element>>::value, std::is_const<Element>::value,
                               sizeof(Type));
    } else {
        cuda_emulator_argument(TypeName<Type>::value, "", 0, sizeof(Type));
    }
}

template <auto kernel, class... Parameters>
struct Kernel {
    template <size_t... index>
    __attribute__((no_sanitize("thread"))) static void call(void** arguments, std::index_sequence<index...>) {
        kernel(*static_cast<std::remove_cv_t<Parameters>*>(arguments[index])...);
    }

    __attribute__((no_sanitize("thread"))) static void enter(void** arguments) {
        call(arguments, std::index_sequence_for<Parameters...>());
    }
};

template <auto kernel, class... Parameters>
void register_kernel(const char* name, void (*)(Parameters...)) {
    cuda_emulator_kernel(name, Kernel<kernel, Parameters...>::enter);
    (describe_argument<std::remove_cv_t<Parameters>>(), ...);
}

}  // namespace cuda_emulator

#define CUDA_EMULATOR_KERNEL(kernel)                                               \
    __attribute__((constructor)) static void cuda_emulator_register_##kernel() {   \
        cuda_emulator::register_kernel<kernel>(#kernel, kernel);                   \
    }
