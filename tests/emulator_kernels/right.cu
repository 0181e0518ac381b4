// Kernels without a mistake, of the kinds that a checker could take for one.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <mma.h>

#include "scale.cuh"

constexpr unsigned ALL = 0xffffffff;

__constant__ float table[4] = {1, 2, 3, 4};
__device__ unsigned arrivals;

struct Step {
    float rate;
    int count;
    const float* offset;
};

// --- neighbours in one word ---

extern "C" __global__ void neighbours_16_bit(__nv_bfloat16* y, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = __float2bfloat16(float(i));
}

extern "C" __global__ void neighbours_8_bit(unsigned char* y, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = (unsigned char)i;
}

// --- shared memory ---

template <int size, class T>
__device__ void reverse(const T* x, T* y) {
    __shared__ T tile[size];
    tile[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = tile[size - 1 - threadIdx.x];
    __syncthreads();
}

extern "C" __global__ void template_shared(const float* x, float* y, const int* k, int* l) {
    reverse<64, float>(x, y);
    reverse<64, int>(k, l);
}

extern "C" __global__ void warp_in_order(const float* x, float* y) {
    __shared__ float tile[64];
    const int warp = threadIdx.x / 32 * 32, lane = threadIdx.x % 32;
    float v = x[threadIdx.x];
    for (int step = 1; step < 32; step *= 2) {  // a prefix sum through shared memory
        tile[warp + lane] = v;
        __syncwarp();
        if (lane >= step) v += tile[warp + lane - step];
        __syncwarp();
    }
    y[threadIdx.x] = v;
}

extern "C" __global__ void half_warps_in_order(const float* x, float* y) {
    __shared__ float tile[32];
    const int lane = threadIdx.x, half = lane / 16;
    const unsigned mask = half ? 0xffff0000 : 0x0000ffff;
    for (int round = 0; round < 3 + half; round++) {  // one half goes round more often
        tile[lane] = x[lane] + round;
        __syncwarp(mask);
        y[lane] = tile[lane ^ 5];
        __syncwarp(mask);
    }
}

extern "C" __global__ void calls_neighbour(const float* x, float* y) {  // the one that is wrong
    static __shared__ float tile[64];
    y[threadIdx.x] = neighbour(tile, x[threadIdx.x]);  // call neighbour
}

extern "C" __global__ void dynamic_tile(const float* x, float* y) {
    extern __shared__ __align__(16) unsigned char raw[];
    float* tile = reinterpret_cast<float*>(raw);
    tile[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
    __syncthreads();
    y[blockIdx.x * blockDim.x + threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x] * SCALE;
}

extern "C" __global__ void copies(const float* x, float* y) {
    __shared__ float4 tile[2][32];
    const float4* from = reinterpret_cast<const float4*>(x);
    for (int stage = 0; stage < 2; stage++) {
        __pipeline_memcpy_async(&tile[stage][threadIdx.x], &from[32 * stage + threadIdx.x], 16, stage ? 4 : 0);
        __pipeline_commit();
    }
    for (int stage = 0; stage < 2; stage++) {
        if (stage == 0) __pipeline_wait_prior(1);
        else __pipeline_wait_prior(0);
        __syncwarp();
        reinterpret_cast<float4*>(y)[32 * stage + threadIdx.x] = tile[stage][31 - threadIdx.x];
    }
}

// --- warps and blocks ---

extern "C" __global__ void collectives(const int* x, int* y) {
    const int lane = threadIdx.x, v = x[lane];
    int* out = y + lane * 16;
    out[0] = __shfl_sync(ALL, v, 3, 8);
    out[1] = __shfl_up_sync(ALL, v, 2, 16);
    out[2] = __shfl_down_sync(ALL, v, 5);
    out[3] = __shfl_xor_sync(ALL, v, 16);
    out[4] = int(__ballot_sync(ALL, v > 0));
    out[5] = __any_sync(ALL, v == x[7]);
    out[6] = __all_sync(ALL, v == x[7]);
    out[7] = __reduce_add_sync(ALL, v);
    out[8] = __reduce_max_sync(ALL, v);
    out[9] = __reduce_min_sync(ALL, v);
    out[10] = int(__match_any_sync(ALL, v % 4));
    out[11] = __syncthreads_count(v > 0);
    out[12] = __syncthreads_or(v == x[7]);
    out[13] = __syncthreads_and(v == x[7]);
    const int(&given)[32] = cuda_emulator::warp_exchange(ALL, v);
    int sum = 0;
    for (int other = 0; other <= lane; other++) sum += given[other];
    out[14] = sum;
    out[15] = int(cuda_emulator::lane());
}

extern "C" __global__ void atomics(int* sum, float* total, unsigned* ring, unsigned* seen) {
    atomicAdd(sum, 1);
    atomicAdd(total, 0.5f);
    atomicInc(ring, 9);
    atomicAdd(&arrivals, 1);
    int expected = 0;
    for (int before = 0; (before = atomicCAS(sum + 1, expected, expected + 2)) != expected;) expected = before;
    atomicMax(sum + 2, int(blockIdx.x * blockDim.x + threadIdx.x));
    if (threadIdx.x == 0) atomicExch(seen + blockIdx.x, 7u);
}

extern "C" __global__ void arguments(float* y, Step step, bool negate, long long big, unsigned char small, double wide) {
    const int i = threadIdx.x;
    if (i >= step.count) return;
    y[i] = (step.rate * table[i % 4] + step.offset[i]) * (negate ? -1 : 1) + float(big) + small + float(wide);
}

// --- tensor cores ---

using namespace nvcuda;

extern "C" __global__ void product(const __half* a, const __half* b, float* c) {  // 16 x 16 by (16 x 16) transposed
    __shared__ __align__(32) __half tile[2][16 * 16];
    for (int i = threadIdx.x; i < 256; i += 32) {
        tile[0][i] = a[i];
        tile[1][i] = b[i];
    }
    __syncwarp();
    wmma::fragment<wmma::matrix_a, 16, 16, 16, __half, wmma::row_major> left;
    wmma::fragment<wmma::matrix_b, 16, 16, 16, __half, wmma::col_major> right;
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
    wmma::fill_fragment(sum, 1.0f);
    wmma::load_matrix_sync(left, tile[0], 16);
    wmma::load_matrix_sync(right, tile[1], 16);
    wmma::mma_sync(sum, left, right, sum);
    wmma::store_matrix_sync(c, sum, 16, wmma::mem_row_major);
}

extern "C" __global__ void roundings(const float* x, __half* half, __nv_bfloat16* bfloat, float* back, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    half[i] = __float2half_rn(x[i]);
    bfloat[i] = __float2bfloat16_rn(x[i]);
    back[2 * i] = __half2float(half[i]);
    back[2 * i + 1] = __bfloat162float(bfloat[i]);
}
