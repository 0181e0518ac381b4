// Atomics. Threads run one after another, so that a plain read and write are one step; the runtime is told before.
#pragma once

#define CUDA_EMULATOR_ATOMIC(name, type, expression)                                                        \
    CUDA_EMULATOR_RAW inline type name(type* address, type value) {                                         \
        cuda_emulator_atomic(address, sizeof(type), __builtin_return_address(0));                           \
        const type old = *address;                                                                          \
        *address = static_cast<type>(expression);                                                                  \
        return old;                                                                                         \
    }                                                                                                       \
    CUDA_EMULATOR_INLINE type name##_block(type* address, type value) { return name(address, value); }      \
    CUDA_EMULATOR_INLINE type name##_system(type* address, type value) { return name(address, value); }

#define CUDA_EMULATOR_ATOMIC_COMPARE(type)                                                                      \
    CUDA_EMULATOR_RAW inline type atomicCAS(type* address, type expected, type value) {                         \
        cuda_emulator_atomic(address, sizeof(type), __builtin_return_address(0));                               \
        const type old = *address;                                                                              \
        *address = old == expected ? value : old;                                                               \
        return old;                                                                                             \
    }

#define CUDA_EMULATOR_ATOMIC_INTEGER(type)                         \
    CUDA_EMULATOR_ATOMIC(atomicAdd, type, old + value)             \
    CUDA_EMULATOR_ATOMIC(atomicSub, type, old - value)             \
    CUDA_EMULATOR_ATOMIC(atomicExch, type, value)                  \
    CUDA_EMULATOR_ATOMIC(atomicMin, type, old < value ? old : value) \
    CUDA_EMULATOR_ATOMIC(atomicMax, type, old > value ? old : value) \
    CUDA_EMULATOR_ATOMIC(atomicAnd, type, old & value)             \
    CUDA_EMULATOR_ATOMIC(atomicOr, type, old | value)              \
    CUDA_EMULATOR_ATOMIC(atomicXor, type, old ^ value)             \
    CUDA_EMULATOR_ATOMIC_COMPARE(type)

CUDA_EMULATOR_ATOMIC_INTEGER(int)
CUDA_EMULATOR_ATOMIC_INTEGER(unsigned)
CUDA_EMULATOR_ATOMIC_INTEGER(unsigned long long)
CUDA_EMULATOR_ATOMIC(atomicMin, long long, old < value ? old : value)
CUDA_EMULATOR_ATOMIC(atomicMax, long long, old > value ? old : value)
CUDA_EMULATOR_ATOMIC(atomicAdd, float, old + value)
CUDA_EMULATOR_ATOMIC(atomicExch, float, value)
CUDA_EMULATOR_ATOMIC(atomicAdd, double, old + value)
CUDA_EMULATOR_ATOMIC(atomicInc, unsigned, old >= value ? 0 : old + 1)
CUDA_EMULATOR_ATOMIC(atomicDec, unsigned, old == 0 || old > value ? value : old - 1)
CUDA_EMULATOR_ATOMIC_COMPARE(unsigned short)
#undef CUDA_EMULATOR_ATOMIC_INTEGER
#undef CUDA_EMULATOR_ATOMIC_COMPARE
