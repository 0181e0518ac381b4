// Kernels that are wrong, one mistake each. A comment `fault NAME` marks the line that the emulator must name for
// kernel NAME, and `other NAME` the line of the other thread. All are launched as (const float* x, float* y, int n).

#include <cuda_pipeline.h>

#define KERNEL(name) extern "C" __global__ void name(const float* x, float* y, int n)

__device__ int arrivals;

// --- races ---

KERNEL(read_without_barrier) {
    __shared__ float tile[64];
    tile[threadIdx.x] = x[threadIdx.x];  // other read_without_barrier
    y[threadIdx.x] = tile[63 - threadIdx.x];  // fault read_without_barrier
}

KERNEL(tile_overwritten_too_early) {
    extern __shared__ float tile[];
    for (int round = 0; round < 2; round++) {
        tile[threadIdx.x] = x[threadIdx.x] + round;  // fault tile_overwritten_too_early
        __syncthreads();
        y[threadIdx.x] = tile[63 - threadIdx.x];  // other tile_overwritten_too_early
    }
}

KERNEL(two_writers) {
    __shared__ float sum;
    sum = x[threadIdx.x];  // fault two_writers
    __syncthreads();
    y[threadIdx.x] = sum;
}

KERNEL(update_without_atomic) {
    __shared__ int count;
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    count += 1;  // fault update_without_atomic
    __syncthreads();
    y[threadIdx.x] = count;
}

KERNEL(lanes_without_syncwarp) {
    __shared__ float tile[64];
    const int warp = threadIdx.x / 32 * 32, lane = threadIdx.x % 32;
    tile[threadIdx.x] = x[threadIdx.x];  // other lanes_without_syncwarp
    const float sum = __shfl_xor_sync(0xffffffff, x[threadIdx.x], 1);  // lanes meet, but no memory is ordered
    y[threadIdx.x] = tile[warp + (lane + 1) % 32] + sum;  // fault lanes_without_syncwarp
}

KERNEL(half_warp_synchronised) {
    __shared__ float tile[32];
    const int lane = threadIdx.x;
    if (lane >= 32) return;
    tile[lane] = x[lane];  // other half_warp_synchronised
    if (lane < 16) __syncwarp(0x0000ffff);
    else __syncwarp(0xffff0000);
    y[lane] = tile[31 - lane];  // fault half_warp_synchronised
}

KERNEL(blocks_write_one_place) {
    y[threadIdx.x] = x[threadIdx.x] + blockIdx.x;  // fault blocks_write_one_place
}

KERNEL(block_reads_anothers) {
    if (blockIdx.x == 0) y[threadIdx.x] = x[threadIdx.x];  // other block_reads_anothers
    else y[64 + threadIdx.x] = y[threadIdx.x];  // fault block_reads_anothers
}

KERNEL(block_overwrites_what_another_read) {
    if (blockIdx.x == 0) y[64 + threadIdx.x] = x[threadIdx.x];  // other block_overwrites_what_another_read
    else const_cast<float*>(x)[threadIdx.x] = 0;  // fault block_overwrites_what_another_read
}

KERNEL(plain_read_of_atomic) {
    __shared__ int count;
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    atomicAdd(&count, 1);  // other plain_read_of_atomic
    y[threadIdx.x] = count;  // fault plain_read_of_atomic
}

KERNEL(blocks_update_variable) {
    if (threadIdx.x == 0) arrivals += 1;  // fault blocks_update_variable
}

// --- addresses ---

KERNEL(one_past_the_end) {
    y[blockIdx.x * 64 + threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x + 1];  // fault one_past_the_end
}

KERNEL(write_past_the_end) {
    y[blockIdx.x * 64 + threadIdx.x + 1] = 1;  // fault write_past_the_end
}

KERNEL(before_the_beginning) {
    y[threadIdx.x] = x[int(threadIdx.x) - 1];  // fault before_the_beginning
}

KERNEL(far_away) {
    y[threadIdx.x] = x[1 << 26];  // fault far_away
}

KERNEL(null_pointer) {
    const float* nothing = n < 0 ? x : nullptr;
    y[threadIdx.x] = nothing[threadIdx.x];  // fault null_pointer
}

KERNEL(past_dynamic_shared) {
    extern __shared__ float tile[];
    tile[threadIdx.x + 1] = 0;  // fault past_dynamic_shared
}

KERNEL(past_static_shared) {
    __shared__ float tile[64];
    tile[threadIdx.x] = 1;
    y[threadIdx.x] = tile[threadIdx.x + n - 64];  // fault past_static_shared
}

KERNEL(misaligned_vector) {
    const float4 v = *reinterpret_cast<const float4*>(x + 1);  // fault misaligned_vector
    y[threadIdx.x] = v.x + v.y + v.z + v.w;
}

// --- memory that nobody wrote ---

KERNEL(unwritten_array) {
    y[threadIdx.x] = y[threadIdx.x] + 1;  // fault unwritten_array
}

KERNEL(unwritten_shared) {
    __shared__ float tile[64];
    if (threadIdx.x < 32) tile[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = tile[threadIdx.x];  // fault unwritten_shared
}

KERNEL(copy_read_before_it_arrives) {
    __shared__ float tile[64];
    __pipeline_memcpy_async(&tile[threadIdx.x], &x[threadIdx.x], sizeof(float));
    __pipeline_commit();
    y[threadIdx.x] = tile[threadIdx.x];  // fault copy_read_before_it_arrives
    __pipeline_wait_prior(0);
}

// --- barriers ---

KERNEL(barrier_in_two_branches) {
    if (threadIdx.x < 32) {
        __syncthreads();  // fault barrier_in_two_branches
    } else {
        __syncthreads();  // other barrier_in_two_branches
    }
}

KERNEL(barrier_after_return) {
    if (threadIdx.x >= 40) return;
    __syncthreads();  // fault barrier_after_return
    y[threadIdx.x] = 1;
}

KERNEL(collective_and_barrier) {
    float v = x[threadIdx.x];
    if (threadIdx.x % 32 < 31) v += __shfl_xor_sync(0xffffffff, v, 1);  // fault collective_and_barrier
    __syncthreads();  // other collective_and_barrier
    y[threadIdx.x] = v;
}

// --- warps ---

KERNEL(mask_without_caller) {
    __syncwarp(0x0000ffff);  // fault mask_without_caller
}

KERNEL(mask_names_absent_lanes) {  // in a block of 48 threads
    y[threadIdx.x] = __shfl_xor_sync(0xffffffff, x[threadIdx.x], 1);  // fault mask_names_absent_lanes
}

KERNEL(mask_names_exited_lanes) {
    if (threadIdx.x % 32 >= 16) return;
    y[threadIdx.x] = __shfl_xor_sync(0xffffffff, x[threadIdx.x], 1);  // fault mask_names_exited_lanes
}

KERNEL(shuffle_from_inactive) {
    if (threadIdx.x % 32 < 16) y[threadIdx.x] = __shfl_down_sync(0xffff, x[threadIdx.x], 8);  // fault shuffle_from_inactive
}

KERNEL(lanes_meet_elsewhere) {
    float v = x[threadIdx.x];
    if (threadIdx.x % 32 < 16) v = __shfl_xor_sync(0xffffffff, v, 1);  // fault lanes_meet_elsewhere
    else v = __shfl_xor_sync(0xffffffff, v, 2);  // other lanes_meet_elsewhere
    y[threadIdx.x] = v;
}

KERNEL(shuffle_of_odd_width) {
    y[threadIdx.x] = __shfl_xor_sync(0xffffffff, x[threadIdx.x], 1, 24);  // fault shuffle_of_odd_width
}

KERNEL(past_own_array) {
    float own[4] = {x[0], x[1], x[2], x[3]};
    float total = 0;
    for (int i = 0; i <= 4; ++i) total += own[i % (n / 16)];  // fault past_own_array
    y[threadIdx.x] = total;
}

// --- giving up ---

KERNEL(gives_up) {
    if (threadIdx.x == 5) __trap();  // fault gives_up
}

KERNEL(asserts) {
    assert(n < 0);  // fault asserts
}
