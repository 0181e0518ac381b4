// What a GPU does and a CPU does not: kernels that rely on it, and kernels that trip over it. A comment `fault NAME`
// marks the line that the emulator must name for kernel NAME. All are launched as (const float* x, float* y, int n).

#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cuda_fp16.h>

namespace cg = cooperative_groups;

#define KERNEL(name) extern "C" __global__ void name(const float* x, float* y, int n)

struct __align__(16) Pair {
    double first, second;
};

// --- vectors at an address that is no multiple of their size: n is 64, and only the compiler knows the rest ---

KERNEL(float4_of_global) {
    const float4 v = *reinterpret_cast<const float4*>(x + 1);  // fault float4_of_global
    y[threadIdx.x] = v.x + v.y + v.z + v.w;
}

KERNEL(float4_of_shared) {
    __shared__ __align__(16) float tile[128];
    tile[threadIdx.x] = tile[64 + threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    const float4 v = *reinterpret_cast<const float4*>(tile + 3);  // fault float4_of_shared
    y[threadIdx.x] = v.x + v.y + v.z + v.w;
}

KERNEL(float4_to_dynamic_shared) {
    extern __shared__ float dynamic_tile[];
    if (threadIdx.x == 0) *reinterpret_cast<float4*>(&dynamic_tile[2]) = make_float4(1, 2, 3, 4);  // fault float4_to_dynamic_shared
    __syncthreads();
    y[threadIdx.x] = dynamic_tile[2 + threadIdx.x % 4];
}

KERNEL(float4_of_local) {
    float own[16];
    for (int i = 0; i < 16; ++i) own[i] = x[i];
    const float4 v = *reinterpret_cast<const float4*>(own + 1);  // fault float4_of_local
    y[threadIdx.x] = v.x + v.y + own[n % 16];
}

KERNEL(float2_to_global) {
    if (threadIdx.x == 0) *reinterpret_cast<float2*>(y + 1) = make_float2(x[0], x[1]);  // fault float2_to_global
}

KERNEL(int4_of_global) {
    const int4 v = reinterpret_cast<const int4*>(x + 2)[threadIdx.x % 4];  // fault int4_of_global
    y[threadIdx.x] = float(v.x + v.w);
}

KERNEL(uint4_copied) {
    if (threadIdx.x == 0) reinterpret_cast<uint4*>(y)[0] = reinterpret_cast<const uint4*>(x + 3)[0];  // fault uint4_copied
}

KERNEL(uint4_by_ldg) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(x + 1));  // fault uint4_by_ldg
    y[threadIdx.x] = float(v.x ^ v.w);
}

KERNEL(double2_of_global) {
    const double2 v = *reinterpret_cast<const double2*>(x + 2);  // fault double2_of_global
    y[threadIdx.x] = float(v.x + v.y);
}

KERNEL(half2_of_shared) {
    __shared__ __align__(16) __half tile[64];
    tile[threadIdx.x] = __float2half(x[0]);
    __syncthreads();
    const __half2 v = *reinterpret_cast<const __half2*>(tile + 1);  // fault half2_of_shared
    y[threadIdx.x] = __low2float(v) + __high2float(v);
}

KERNEL(long_long_of_global) {
    y[threadIdx.x] = float(*reinterpret_cast<const long long*>(x + 1));  // fault long_long_of_global
}

KERNEL(aligned_struct) {
    const Pair* pairs = reinterpret_cast<const Pair*>(x + 2);
    const Pair pair = pairs[threadIdx.x % 8];  // fault aligned_struct
    y[threadIdx.x] = float(pair.first + pair.second);
}

KERNEL(float4_at_a_computed_place) {
    const float4 v = *reinterpret_cast<const float4*>(x + n / 64 + 1);  // fault float4_at_a_computed_place
    y[threadIdx.x] = v.x + v.y + v.z + v.w;
}

// --- and right ones: structs of plain floats are copied float by float, a member is no vector, a cast of own arrays ---

struct Three {
    float a, b, c;
};
struct Four {
    float a, b, c, d;
};

KERNEL(aligned_enough) {
    const Four four = *reinterpret_cast<const Four*>(x + 1);
    const Three three = *reinterpret_cast<const Three*>(x + 1);
    const float member = reinterpret_cast<const float4*>(x + 1)->y;
    float own[4] = {four.a, three.b, member, four.d};
    const float4 v = *reinterpret_cast<const float4*>(own);
    __half halves[2] = {__float2half(v.x), __float2half(v.y)};
    const __half2 both = *reinterpret_cast<const __half2*>(halves);
    float pair[2] = {v.z, v.w};
    const float2 as_pair = *reinterpret_cast<const float2*>(pair);
    y[threadIdx.x] = as_pair.x + as_pair.y + __low2float(both) + __high2float(both);
}

KERNEL(divides_by_zero) {
    y[threadIdx.x] = float(int(threadIdx.x) / (n - 64));  // fault divides_by_zero
}

KERNEL(remainder_by_zero) {
    y[threadIdx.x] = float(threadIdx.x % unsigned(n - 64));  // fault remainder_by_zero
}

// --- loops without an end ---

__device__ __forceinline__ float waits_for(const float* flag) {
    float seen = 0;
    while (*reinterpret_cast<const volatile float*>(flag) != -1) seen += 1;  // inner waits_in_a_function
    return seen;
}

KERNEL(waits_in_a_function) {
    if (threadIdx.x < 32) __syncthreads();  // barrier waits_in_a_function
    if (threadIdx.x == 40) y[0] = waits_for(x);  // loop waits_in_a_function, end waits_in_a_function
    if (threadIdx.x <= 40) __syncwarp(0x000001ff);
}

KERNEL(steps_of_zero) {
    float sum = 0;
    if (blockIdx.x < 2) return;
    for (int i = 0; i < n; i += n / 65) {  // loop steps_of_zero
        sum += x[i];
        sum *= 0.5f;  // end steps_of_zero
    }
    y[threadIdx.x] = sum;
}

KERNEL(computes_for_ever) {
    unsigned word = n;
    while (word) word = word * 2 + 1;  // loop computes_for_ever, end computes_for_ever
    y[threadIdx.x] = word;
}

// --- approximate functions: 16 numbers for each x, whose number is n ---

extern "C" __global__ void approximations(const float* x, float* y, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float a = x[i];
    float sine, cosine;
    __sincosf(a, &sine, &cosine);
    const float made[] = {
        __expf(a), __exp10f(a), __logf(a), __log2f(a), __log10f(a), __sinf(a), __cosf(a), __tanf(a), __tanhf(a),
        rsqrtf(a), __fdividef(a, 3), __fdividef(3, a), __powf(a, 1.5f), __frcp_rn(a), __fsqrt_rn(a), sine + cosine,
    };
    for (int k = 0; k < 16; ++k) y[16 * i + k] = made[k];
}

// --- one place, several writers ---

KERNEL(flag_raised_by_all) {
    __shared__ float flag;
    flag = x[n / 64];  // note flag_raised_by_all
    if (threadIdx.x == 0 && blockIdx.x == 0) y[1] = 0;
    y[0] = 7;  // note flag_raised_by_all
    __syncthreads();
    if (blockIdx.x == 0) y[2 + threadIdx.x] = flag;
}

KERNEL(struct_written_by_all) {
    reinterpret_cast<Four*>(y)[1] = {x[1], x[2], x[3], threadIdx.x == 63 ? 5 : x[4]};  // fault struct_written_by_all
}

KERNEL(all_but_the_last_agree) {
    __shared__ float flag;
    flag = threadIdx.x == 63 ? 2 : 1;  // fault all_but_the_last_agree
    __syncthreads();
    y[threadIdx.x] = flag;
}

KERNEL(flag_read_too_early) {
    __shared__ float flag;
    if (threadIdx.x < 32) flag = 1;  // fault flag_read_too_early
    else y[threadIdx.x] = flag;  // fault flag_read_too_early
}

KERNEL(beyond_an_integer) {
    y[threadIdx.x] = float(int(x[threadIdx.x] * 1e9f));  // note beyond_an_integer
}

// --- hand-overs between blocks: the last one to come adds up what all have left ---

__device__ unsigned come;  // blocks, so far

// Whether this block is the last of all; the counter is as it was.
__device__ bool last_to_come() {
    __shared__ bool last;
    if (threadIdx.x == 0) {
        last = atomicAdd(&come, 1u) == gridDim.x - 1;
        if (last) come = 0;
    }
    __syncthreads();
    return last;
}

KERNEL(left_by_one_thread) {
    if (threadIdx.x == 0) {
        y[blockIdx.x] = x[blockIdx.x];
        __threadfence();
    }
    if (last_to_come() && threadIdx.x < gridDim.x) y[64 + threadIdx.x] = y[threadIdx.x];
}

KERNEL(left_by_all_threads) {
    if (threadIdx.x < 4) y[4 * blockIdx.x + threadIdx.x] = x[threadIdx.x] + blockIdx.x;
    __threadfence();
    __syncthreads();
    if (last_to_come() && threadIdx.x < 4 * gridDim.x) y[64 + threadIdx.x] = y[threadIdx.x];
}

KERNEL(fence_after_the_barrier) {
    if (threadIdx.x < 4) y[4 * blockIdx.x + threadIdx.x] = x[threadIdx.x] + blockIdx.x;
    __syncthreads();
    __threadfence();
    if (last_to_come() && threadIdx.x < 4 * gridDim.x) y[64 + threadIdx.x] = y[threadIdx.x];
}

KERNEL(no_fence) {
    if (threadIdx.x == 0) y[blockIdx.x] = x[blockIdx.x];
    if (last_to_come() && threadIdx.x < gridDim.x) y[64 + threadIdx.x] = y[threadIdx.x];  // fault no_fence
}

KERNEL(fence_for_the_block_only) {
    if (threadIdx.x == 0) {
        y[blockIdx.x] = x[blockIdx.x];
        __threadfence_block();
    }
    if (last_to_come() && threadIdx.x < gridDim.x) y[64 + threadIdx.x] = y[threadIdx.x];  // fault fence_for_the_block_only
}

KERNEL(fence_of_another_thread) {
    if (threadIdx.x == 32) y[blockIdx.x] = x[blockIdx.x];
    if (threadIdx.x == 0) __threadfence();
    if (last_to_come() && threadIdx.x < gridDim.x) y[64 + threadIdx.x] = y[threadIdx.x];  // fault fence_of_another_thread
}

KERNEL(read_before_the_atomic) {
    if (threadIdx.x == 0) {
        y[blockIdx.x] = x[blockIdx.x];
        __threadfence();
    }
    const float early = blockIdx.x ? y[threadIdx.x % blockIdx.x] : 0;  // fault read_before_the_atomic
    if (last_to_come()) y[64 + threadIdx.x] = early;
}

KERNEL(no_barrier_after_the_atomic) {
    __shared__ volatile unsigned before;
    if (threadIdx.x == 0) {
        y[blockIdx.x] = x[blockIdx.x];
        __threadfence();
        before = atomicAdd(&come, 1u) % gridDim.x;
    }
    if (threadIdx.x == 32 && blockIdx.x == gridDim.x - 1) y[64] = y[0];  // fault no_barrier_after_the_atomic
}

KERNEL(handed_over_within_a_block) {
    __shared__ unsigned warps;
    __shared__ float sums[2];
    if (threadIdx.x == 0) warps = 0;
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        sums[threadIdx.x / 32] = x[threadIdx.x];
        __threadfence_block();
        if (atomicAdd(&warps, 1u) == 1) y[blockIdx.x] = sums[0] + sums[1];
    }
}

// --- variables that nobody has set ---

KERNEL(sum_from_nothing) {
    float sum;
    for (int i = 0; i < n; ++i) sum += x[i];  // note sum_from_nothing
    y[threadIdx.x] = sum;  // note sum_from_nothing
}

KERNEL(index_of_nothing) {
    int index;
    y[threadIdx.x] = x[index];  // fault index_of_nothing
}

KERNEL(own_array_from_nothing) {
    float own[4];
    for (int i = 0; i < n; ++i) own[i % 4] += x[i];
    y[threadIdx.x] = own[0] + own[1] + own[2] + own[3];
}

// --- cooperative groups ---

KERNEL(groups) {
    __shared__ float tile_sums[2];
    cg::thread_block block = cg::this_thread_block();
    cg::thread_block_tile<32> warp = cg::tiled_partition<32>(block);
    const auto quarter = cg::tiled_partition<8>(warp);
    const float mine = x[block.thread_rank()];
    const float sum = cg::reduce(warp, mine, cg::plus<float>{}), most = cg::reduce(quarter, mine, cg::greater<float>());
    if (warp.thread_rank() == 0) tile_sums[warp.meta_group_rank()] = sum;
    block.sync();
    float* own = y + 4 * blockIdx.x;
    if (block.thread_rank() != 17) return;
    own[0] = tile_sums[0] + tile_sums[1];
    own[1] = most;
    own[2] = warp.size() + 100 * quarter.size() + 10000 * warp.meta_group_size();
    own[3] = quarter.thread_rank() + 100 * quarter.meta_group_rank();
}

KERNEL(tile_without_sync) {
    __shared__ float tile[64];
    const auto half = cg::tiled_partition<16>(cg::this_thread_block());
    tile[threadIdx.x] = x[threadIdx.x];
    if (n < 0) half.sync();
    y[threadIdx.x] = tile[threadIdx.x ^ 1] + half.shfl(x[threadIdx.x], 3);  // fault tile_without_sync
}

KERNEL(tile_with_sync) {
    __shared__ float tile[64];
    const auto half = cg::tiled_partition<16>(cg::this_thread_block());
    tile[threadIdx.x] = x[threadIdx.x];
    cg::sync(half);
    y[threadIdx.x] = tile[threadIdx.x ^ 1] + half.shfl(x[threadIdx.x], 3) + half.ballot(half.thread_rank() < 2);
}

// --- pointers out of an array that the compiler knows ---

__device__ __forceinline__ float element(const float* array, int i) {
    return array[i];  // fault past_own_array_by_pointer, fault into_the_next_array
}

KERNEL(past_own_array_by_pointer) {
    float own[8];
    for (int i = 0; i < 8; ++i) own[i] = x[i];
    y[threadIdx.x] = element(own, n / 8);
}

KERNEL(into_the_next_array) {
    __shared__ float first[64], second[64];
    first[threadIdx.x] = second[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = element(first, threadIdx.x + n - 63) + second[threadIdx.x];
}

KERNEL(write_past_own_array) {
    float own[8];
    float* place = own;
    for (int i = 0; i <= n / 8; ++i) place[i] = x[i];  // fault write_past_own_array
    y[threadIdx.x] = own[n % 8] + own[n % 7];
}

KERNEL(whole_of_a_table) {
    __shared__ float table[8][8];
    float* flat = &table[0][0];
    flat[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    float own[2][4];
    for (int i = 0; i < 8; ++i) (&own[0][0])[i] = flat[(threadIdx.x + i) % n];
    y[threadIdx.x] = own[1][n % 4] + own[0][3];
}
