// Barriers, and what the lanes of a warp do together.
#pragma once

// The caller's source line: lanes and threads that meet must come from the same one.
#define CUDA_EMULATOR_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

constexpr unsigned cuda_emulator_all_lanes = 0xffffffff;

CUDA_EMULATOR_INLINE void __syncthreads(CUDA_EMULATOR_PLACE) {
    cuda_emulator_barrier(cuda_emulator::Barrier::plain, 0, file, line);
}
CUDA_EMULATOR_INLINE int __syncthreads_or(int predicate, CUDA_EMULATOR_PLACE) {
    return cuda_emulator_barrier(cuda_emulator::Barrier::any, predicate, file, line);
}
CUDA_EMULATOR_INLINE int __syncthreads_and(int predicate, CUDA_EMULATOR_PLACE) {
    return cuda_emulator_barrier(cuda_emulator::Barrier::all, predicate, file, line);
}
CUDA_EMULATOR_INLINE int __syncthreads_count(int predicate, CUDA_EMULATOR_PLACE) {
    return cuda_emulator_barrier(cuda_emulator::Barrier::count, predicate, file, line);
}
CUDA_EMULATOR_INLINE void __syncwarp(unsigned mask = cuda_emulator_all_lanes, CUDA_EMULATOR_PLACE) {
    cuda_emulator_synchronise_warp(mask, file, line);
}

// Of what a warp does together only __syncwarp orders memory (CUDA C++ guide, "Warp Shuffle Functions"): what one lane
// wrote another may read after a __syncwarp or a __syncthreads, not after a shuffle or a vote.

CUDA_EMULATOR_INLINE void __threadfence() { cuda_emulator_fence(1); }
CUDA_EMULATOR_INLINE void __threadfence_block() { cuda_emulator_fence(0); }
CUDA_EMULATOR_INLINE void __threadfence_system() { cuda_emulator_fence(1); }

// --- shuffles ---

namespace cuda_emulator {

template <class Type>
CUDA_EMULATOR_INLINE Type shuffle(Shuffle mode, unsigned mask, Type value, int operand, int width, const char* file,
                                  int line) {
    static_assert(sizeof(Type) <= 8, "a shuffle moves at most 8 bytes");
    uint64_t bits = 0;
    __builtin_memcpy(&bits, &value, sizeof value);
    bits = cuda_emulator_shuffle(bits, mask, mode, operand, width, file, line);
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace cuda_emulator

#define CUDA_EMULATOR_SHUFFLE(name, mode)                                                            \
    template <class Type>                                                                            \
    CUDA_EMULATOR_INLINE Type name(unsigned mask, Type value, int operand, int width = warpSize,     \
                                   CUDA_EMULATOR_PLACE) {                                            \
        return cuda_emulator::shuffle(cuda_emulator::Shuffle::mode, mask, value, operand, width, file, line); \
    }

CUDA_EMULATOR_SHUFFLE(__shfl_sync, indexed)
CUDA_EMULATOR_SHUFFLE(__shfl_up_sync, up)
CUDA_EMULATOR_SHUFFLE(__shfl_down_sync, down)
CUDA_EMULATOR_SHUFFLE(__shfl_xor_sync, exclusive_or)
#undef CUDA_EMULATOR_SHUFFLE

// --- votes, matches, reductions ---

CUDA_EMULATOR_INLINE unsigned __ballot_sync(unsigned mask, int predicate, CUDA_EMULATOR_PLACE) {
    return cuda_emulator_ballot(mask, predicate, file, line);
}
CUDA_EMULATOR_INLINE int __any_sync(unsigned mask, int predicate, CUDA_EMULATOR_PLACE) {
    return cuda_emulator_ballot(mask, predicate, file, line) != 0;
}
CUDA_EMULATOR_INLINE int __all_sync(unsigned mask, int predicate, CUDA_EMULATOR_PLACE) {
    return cuda_emulator_ballot(mask, !predicate, file, line) == 0;
}

template <class Type>
CUDA_EMULATOR_INLINE unsigned __match_any_sync(unsigned mask, Type value, CUDA_EMULATOR_PLACE) {
    static_assert(sizeof(Type) <= 8, "a match compares at most 8 bytes");
    uint64_t bits = 0;
    __builtin_memcpy(&bits, &value, sizeof value);
    return cuda_emulator_match(mask, bits, file, line);
}
template <class Type>
CUDA_EMULATOR_INLINE unsigned __match_all_sync(unsigned mask, Type value, int* predicate, CUDA_EMULATOR_PLACE) {
    const unsigned equal = __match_any_sync(mask, value, file, line);
    *predicate = equal == mask;
    return *predicate ? mask : 0;
}

#define CUDA_EMULATOR_REDUCE(name, type, operation)                                                         \
    CUDA_EMULATOR_INLINE type name(unsigned mask, type value, CUDA_EMULATOR_PLACE) {                        \
        return type(cuda_emulator_reduce(mask, unsigned(value), cuda_emulator::Reduce::operation, file, line)); \
    }

CUDA_EMULATOR_REDUCE(__reduce_add_sync, int, add)
CUDA_EMULATOR_REDUCE(__reduce_add_sync, unsigned, add)
CUDA_EMULATOR_REDUCE(__reduce_min_sync, int, minimum)
CUDA_EMULATOR_REDUCE(__reduce_min_sync, unsigned, minimum_unsigned)
CUDA_EMULATOR_REDUCE(__reduce_max_sync, int, maximum)
CUDA_EMULATOR_REDUCE(__reduce_max_sync, unsigned, maximum_unsigned)
CUDA_EMULATOR_REDUCE(__reduce_and_sync, unsigned, all)
CUDA_EMULATOR_REDUCE(__reduce_or_sync, unsigned, any)
CUDA_EMULATOR_REDUCE(__reduce_xor_sync, unsigned, exclusive_or)
#undef CUDA_EMULATOR_REDUCE

// Lanes run one after another here, so which are "active" has no meaning.
unsigned __activemask() __attribute__((error("the emulator has no __activemask: pass the mask of lanes that must meet")));

// --- for twins of inline PTX ---

namespace cuda_emulator {

CUDA_EMULATOR_INLINE unsigned lane() { return cuda_emulator_lane(); }

// All lanes of the warp wait for each other; no memory is ordered.
CUDA_EMULATOR_INLINE void meet(CUDA_EMULATOR_PLACE) { cuda_emulator_ballot(cuda_emulator_all_lanes, 1, file, line); }

// Every lane of the mask gives a value, and gets those of all: [lane] is undefined for lanes outside of the mask.
// The values stay until this lane's next collective or barrier.
template <class Type>
CUDA_EMULATOR_INLINE const Type (&warp_exchange(unsigned mask, const Type& value, CUDA_EMULATOR_PLACE))[32] {
    static_assert(sizeof(Type) <= 64, "a lane gives at most 64 bytes");
    static_assert(std::is_trivially_copyable<Type>::value, "a lane gives plain bytes");
    return *static_cast<const Type(*)[32]>(cuda_emulator_exchange(mask, &value, sizeof(Type), file, line));
}

}  // namespace cuda_emulator
