// cooperative_groups::reduce over a tile: every lane gets the result.
#pragma once

#include <cooperative_groups.h>

namespace cooperative_groups {

#define CUDA_EMULATOR_OPERATION(name, expression)                                   \
    template <class Type>                                                           \
    struct name {                                                                   \
        Type operator()(Type a, Type b) const { return expression; }                \
    };
CUDA_EMULATOR_OPERATION(plus, a + b)
CUDA_EMULATOR_OPERATION(less, b < a ? b : a)
CUDA_EMULATOR_OPERATION(greater, a < b ? b : a)
CUDA_EMULATOR_OPERATION(bit_and, a & b)
CUDA_EMULATOR_OPERATION(bit_or, a | b)
CUDA_EMULATOR_OPERATION(bit_xor, a ^ b)
#undef CUDA_EMULATOR_OPERATION

template <unsigned lanes, class Parent, class Type, class Operation>
CUDA_EMULATOR_INLINE Type reduce(const thread_block_tile<lanes, Parent>& tile, Type value, Operation operation,
                                 CUDA_EMULATOR_PLACE) {
    for (unsigned by = lanes / 2; by > 0; by /= 2) {
        value = operation(value, tile.shfl_xor(value, by, file, line));
    }
    return value;
}

}  // namespace cooperative_groups
