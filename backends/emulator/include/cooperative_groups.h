// cooperative_groups: the block, and tiles of a warp. The grid, clusters and coalesced groups are refused (toolchain.py).
#pragma once

namespace cooperative_groups {

class thread_block {
  public:
    static void sync(CUDA_EMULATOR_PLACE) { __syncthreads(file, line); }
    static unsigned thread_rank() {
        return (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    }
    static unsigned num_threads() { return blockDim.x * blockDim.y * blockDim.z; }
    static unsigned size() { return num_threads(); }
    static dim3 group_index() { return dim3(blockIdx); }
    static dim3 thread_index() { return dim3(threadIdx); }
    static dim3 group_dim() { return blockDim; }
    static dim3 dim_threads() { return blockDim; }
};

CUDA_EMULATOR_INLINE thread_block this_thread_block() { return {}; }

// `lanes` neighbours of a warp. What they do together is done by the functions of warps, with the mask of the tile.
template <unsigned lanes, class Parent = void>
class thread_block_tile {
    static_assert(lanes >= 1 && lanes <= 32 && (lanes & (lanes - 1)) == 0, "a tile has a power of two up to 32 lanes");

  public:
    thread_block_tile() = default;
    template <class Other>
    thread_block_tile(const thread_block_tile<lanes, Other>&) {}

    static unsigned thread_rank() { return cuda_emulator::lane() % lanes; }
    static constexpr unsigned num_threads() { return lanes; }
    static constexpr unsigned size() { return lanes; }
    static unsigned meta_group_rank() { return thread_block::thread_rank() / lanes; }
    static unsigned meta_group_size() { return (thread_block::num_threads() + lanes - 1) / lanes; }

    static void sync(CUDA_EMULATOR_PLACE) { __syncwarp(mask(), file, line); }

    template <class Type>
    static Type shfl(Type value, int rank, CUDA_EMULATOR_PLACE) {
        return __shfl_sync(mask(), value, rank, lanes, file, line);
    }
    template <class Type>
    static Type shfl_up(Type value, unsigned by, CUDA_EMULATOR_PLACE) {
        return __shfl_up_sync(mask(), value, int(by), lanes, file, line);
    }
    template <class Type>
    static Type shfl_down(Type value, unsigned by, CUDA_EMULATOR_PLACE) {
        return __shfl_down_sync(mask(), value, int(by), lanes, file, line);
    }
    template <class Type>
    static Type shfl_xor(Type value, unsigned by, CUDA_EMULATOR_PLACE) {
        return __shfl_xor_sync(mask(), value, int(by), lanes, file, line);
    }

    static int any(int predicate, CUDA_EMULATOR_PLACE) { return __any_sync(mask(), predicate, file, line); }
    static int all(int predicate, CUDA_EMULATOR_PLACE) { return __all_sync(mask(), predicate, file, line); }
    static unsigned ballot(int predicate, CUDA_EMULATOR_PLACE) {
        return __ballot_sync(mask(), predicate, file, line) >> first_lane();
    }
    template <class Type>
    static unsigned match_any(Type value, CUDA_EMULATOR_PLACE) {
        return __match_any_sync(mask(), value, file, line) >> first_lane();
    }

  private:
    static unsigned first_lane() { return cuda_emulator::lane() / lanes * lanes; }
    static unsigned mask() { return (cuda_emulator_all_lanes >> (32 - lanes)) << first_lane(); }
};

template <unsigned lanes>
CUDA_EMULATOR_INLINE thread_block_tile<lanes, thread_block> tiled_partition(const thread_block&) {
    return {};
}
template <unsigned lanes, unsigned of, class Parent>
CUDA_EMULATOR_INLINE thread_block_tile<lanes, thread_block_tile<of, Parent>> tiled_partition(
    const thread_block_tile<of, Parent>&) {
    static_assert(lanes <= of, "a part of a tile is no larger than the tile");
    return {};
}

template <class Group>
CUDA_EMULATOR_INLINE void sync(const Group&, CUDA_EMULATOR_PLACE) {
    Group::sync(file, line);
}
template <class Group>
CUDA_EMULATOR_INLINE unsigned thread_rank(const Group&) {
    return Group::thread_rank();
}
template <class Group>
CUDA_EMULATOR_INLINE unsigned group_size(const Group&) {
    return Group::size();
}

}  // namespace cooperative_groups
