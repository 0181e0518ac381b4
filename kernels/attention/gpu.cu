// Attention (formula in __init__.py) in float32 arithmetic, by tiles: neither scores nor probabilities reach memory.
//
//   flash_forward           a block per 64 queries of a sequence and head, over tiles of its keys: y and log sum exp
//   flash_grad_delta        sum of g y, per token and head
//   flash_grad_query        a block per 64 queries, over tiles of keys: dq
//   flash_grad_key_value    a block per 64 keys, over tiles of queries: dk and dv
//
// The last two compute the probabilities again from the log sum exp, each for itself: so every sum has one owner and
// one order, there are no atomics, and the bits do not depend on the grid. Arithmetic bounds all but flash_grad_delta
// (which memory does): 4 D flops a score forward, 14 D backward. Items of work are counted up to the longest sequence;
// an item beyond the end of its own is skipped.
#include "attention/gpu_tile.cuh"
#include "attention/gpu_flash.cuh"  // after it

extern "C" __global__ void __launch_bounds__(128, 2) flash_forward(
    const Storage* __restrict__ qkv, const int* __restrict__ cu_seqlens, Storage* __restrict__ y,
    float* __restrict__ lse, int sequences, int heads, int size, int tiles, float scale, unsigned drop, float kept,
    int quads, Stream stream) {
    run<Forward>({nullptr, qkv, nullptr, nullptr, cu_seqlens, y, sequences, heads, size, tiles, scale, drop, kept,
                  quads, stream, lse});
}

// Eight threads for each token and head.
extern "C" __global__ void __launch_bounds__(128) flash_grad_delta(
    const Storage* __restrict__ g, const Storage* __restrict__ y, float* __restrict__ delta, long long rows,
    int size) {
    const int lane = threadIdx.x % THREADS_A_ROW;
    const long long step = gridDim.x * (blockDim.x / THREADS_A_ROW);
    const bool packs = in_packs(size, g, y);
    // Counted by the warp's first row, so that all of its lanes meet in row_sum.
    for (long long first = (blockIdx.x * blockDim.x + threadIdx.x / WARP * WARP) / THREADS_A_ROW; first < rows;
         first += step) {
        const long long row = first + threadIdx.x % WARP / THREADS_A_ROW;
        float sum = 0;
        for (int d = lane * PACK; row < rows && d < size; d += THREADS_A_ROW * PACK) {
            float a[PACK] = {}, b[PACK] = {};
            if (packs) {
                load_pack(g + row * size + d, a);
                load_pack(y + row * size + d, b);
            } else {
#pragma unroll
                for (int k = 0; k < PACK; ++k) {
                    if (d + k >= size) continue;
                    a[k] = load(g + row * size + d + k);
                    b[k] = load(y + row * size + d + k);
                }
            }
#pragma unroll
            for (int k = 0; k < PACK; ++k) sum += a[k] * b[k];
        }
        sum = row_sum(sum);
        if (row < rows && lane == 0) delta[row] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(128, 2) flash_grad_query(
    const Storage* __restrict__ g, const Storage* __restrict__ qkv, const float* __restrict__ lse,
    const float* __restrict__ delta, const int* __restrict__ cu_seqlens, Storage* __restrict__ dqkv, int sequences,
    int heads, int size, int tiles, float scale, unsigned drop, float kept, int quads, Stream stream) {
    run<GradQuery>({g, qkv, lse, delta, cu_seqlens, dqkv, sequences, heads, size, tiles, scale, drop, kept, quads,
                    stream});
}

extern "C" __global__ void __launch_bounds__(128, 2) flash_grad_key_value(
    const Storage* __restrict__ g, const Storage* __restrict__ qkv, const float* __restrict__ lse,
    const float* __restrict__ delta, const int* __restrict__ cu_seqlens, Storage* __restrict__ dqkv, int sequences,
    int heads, int size, int tiles, float scale, unsigned drop, float kept, int quads, Stream stream) {
    run<GradKeyValue>({g, qkv, lse, delta, cu_seqlens, dqkv, sequences, heads, size, tiles, scale, drop, kept, quads,
                       stream});
}
