// Attention of 16-bit arrays by tensor cores (mma.sync), in the kernels of gpu.cu: a block per 64 queries of a sequence
// and head, or per 64 keys; flash_grad_delta is shared. Scores, probabilities and sums are float32 in registers and
// never reach memory, not even shared; gpu_fragment.cuh says which roundings happen. The tensor cores bound it, and
// beside them exp and the random words.
#include "attention/gpu_fragment.cuh"
#include "attention/gpu_flash.cuh"  // after it

// Heads of 32 take little shared memory: registers decide how many blocks a multiprocessor holds.
extern "C" __global__ void __launch_bounds__(128, HEAD_SIZE <= 32 ? 4 : 2) flash_forward_16(
    const Storage* __restrict__ qkv, const int* __restrict__ cu_seqlens, Storage* __restrict__ y,
    float* __restrict__ lse, int sequences, int heads, int size, int tiles, float scale, unsigned drop, float kept,
    int quads, Stream stream) {
    run<Forward>({nullptr, qkv, nullptr, nullptr, cu_seqlens, y, sequences, heads, size, tiles, scale, drop, kept,
                  quads, stream, lse});
}

extern "C" __global__ void __launch_bounds__(128, 3) flash_grad_query_16(
    const Storage* __restrict__ g, const Storage* __restrict__ qkv, const float* __restrict__ lse,
    const float* __restrict__ delta, const int* __restrict__ cu_seqlens, Storage* __restrict__ dqkv, int sequences,
    int heads, int size, int tiles, float scale, unsigned drop, float kept, int quads, Stream stream) {
    run<GradQuery>({g, qkv, lse, delta, cu_seqlens, dqkv, sequences, heads, size, tiles, scale, drop, kept, quads,
                    stream});
}

extern "C" __global__ void __launch_bounds__(128, 2) flash_grad_key_value_16(
    const Storage* __restrict__ g, const Storage* __restrict__ qkv, const float* __restrict__ lse,
    const float* __restrict__ delta, const int* __restrict__ cu_seqlens, Storage* __restrict__ dqkv, int sequences,
    int heads, int size, int tiles, float scale, unsigned drop, float kept, int quads, Stream stream) {
    run<GradKeyValue>({g, qkv, lse, delta, cu_seqlens, dqkv, sequences, heads, size, tiles, scale, drop, kept, quads,
                       stream});
}
