// What every kernel shares: the type that arrays are stored in, packs of 16 bytes, reductions, and Philox.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#ifndef STORAGE
#define STORAGE float
#endif

typedef STORAGE Storage;  // float, __half or __nv_bfloat16, by -D; arithmetic is in float throughout

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int PACK = 16 / sizeof(Storage);  // elements of one vector load

// ---------------------------------------------------------------------------------------------- storage <-> float

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

__device__ __forceinline__ float load(const Storage* p) { return to_float(*p); }
__device__ __forceinline__ void store(Storage* p, float x) { *p = from_float<Storage>(x); }

// PACK neighbours by one 16-byte access; `p` must be a multiple of 16 bytes.
__device__ __forceinline__ void load_pack(const Storage* p, float (&values)[PACK]) {
    union { uint4 bits; Storage element[PACK]; } pack;
    pack.bits = *reinterpret_cast<const uint4*>(p);
#pragma unroll
    for (int i = 0; i < PACK; ++i) values[i] = to_float(pack.element[i]);
}

__device__ __forceinline__ void store_pack(Storage* p, const float (&values)[PACK]) {
    union { uint4 bits; Storage element[PACK]; } pack;
#pragma unroll
    for (int i = 0; i < PACK; ++i) pack.element[i] = from_float<Storage>(values[i]);
    *reinterpret_cast<uint4*>(p) = pack.bits;
}

// Whether every row of `columns` elements that begins at one of these pointers can be read in packs.
__device__ __forceinline__ bool in_packs(int columns, const void* a, const void* b = nullptr, const void* c = nullptr,
                                         const void* d = nullptr) {
    unsigned long long all = reinterpret_cast<unsigned long long>(a) | reinterpret_cast<unsigned long long>(b) |
                             reinterpret_cast<unsigned long long>(c) | reinterpret_cast<unsigned long long>(d);
    return columns % PACK == 0 && all % 16 == 0;
}

// ------------------------------------------------------------------------------------------------------ reductions

// Butterflies: every lane ends with the same bits, in an order that depends on nothing but the lane.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, offset));
    return x;
}

// Over a block of whole warps; `scratch` holds a float for each warp. The barrier before lets `scratch` be used again.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    float total = 0;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / WARP; ++warp) total += scratch[warp];
    return total;
}

__device__ __forceinline__ float block_max(float x, float* scratch) {
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    float top = scratch[0];
    for (int warp = 1; warp < static_cast<int>(blockDim.x) / WARP; ++warp) top = fmaxf(top, scratch[warp]);
    return top;
}

// ---------------------------------------------------------------------------------------------------------- Philox

// The name of a stream of random words (minibert.kernels.philox.Stream), and the block that it begins with. A captured
// graph reads its step from memory.
struct Stream {
    unsigned seed, stream, step, layer;
    const unsigned* live_step;
    unsigned first_block;
};

__device__ __forceinline__ unsigned stream_step(const Stream& stream) {
    return stream.live_step == nullptr ? stream.step : *stream.live_step;
}

// Words 4 block .. 4 block + 3 of a stream, by Philox4x32-10 (Salmon et al. 2011).
__device__ __forceinline__ uint4 philox(unsigned seed, unsigned stream, unsigned step, unsigned layer, unsigned block) {
    unsigned c0 = block, c1 = layer, c2 = step, c3 = 0, k0 = seed, k1 = stream;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        unsigned high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
        unsigned high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return make_uint4(c0, c1, c2, c3);
}

__device__ __forceinline__ uint4 philox(const Stream& stream, unsigned block) {
    return philox(stream.seed, stream.stream, stream_step(stream), stream.layer, stream.first_block + block);
}

// Word `index` of a stream: for single elements. Neighbours are cheaper by the four words of a block.
__device__ __forceinline__ unsigned philox_word(const Stream& stream, unsigned long long index) {
    uint4 words = philox(stream, static_cast<unsigned>(index / 4));
    unsigned word[4] = {words.x, words.y, words.z, words.w};
    return word[index % 4];
}
