// Dropout inside a kernel that has other work: an element is kept or not by the Philox word of its place in the array.
#pragma once

#include "gpu_common.cuh"

// Element i is kept where word i of the stream is at least `threshold`; 0 keeps all of them and draws nothing.
struct Dropout {
    unsigned threshold;
    float scale;  // of those kept
    unsigned seed, stream, step, layer, first_block;

    __device__ __forceinline__ Dropout(unsigned threshold, float scale, const Stream& stream)
        : threshold(threshold), scale(scale), seed(stream.seed), stream(stream.stream), step(0), layer(stream.layer),
          first_block(stream.first_block) {
        if (threshold > 0) step = stream_step(stream);
    }

    __device__ __forceinline__ uint4 words(long long block) const {
        return philox(seed, stream, step, layer, first_block + static_cast<unsigned>(block));
    }
};

// Elements `first` .. `first` + PACK - 1 of an array. Four neighbours lie in one Philox block, or across two.
__device__ __forceinline__ void drop(const Dropout& dropout, long long first, float (&values)[PACK]) {
    if (dropout.threshold == 0) return;
    long long block = first / 4;
    int skipped = static_cast<int>(first % 4);
    uint4 here = dropout.words(block);
#pragma unroll
    for (int i = 0; i < PACK; i += 4) {
        uint4 next = here;
        if (skipped > 0 || i + 4 < PACK) next = dropout.words(++block);
        uint4 word = here;
        if (skipped == 1) word = make_uint4(here.y, here.z, here.w, next.x);
        if (skipped == 2) word = make_uint4(here.z, here.w, next.x, next.y);
        if (skipped == 3) word = make_uint4(here.w, next.x, next.y, next.z);
        values[i] = word.x >= dropout.threshold ? values[i] * dropout.scale : 0.0f;
        values[i + 1] = word.y >= dropout.threshold ? values[i + 1] * dropout.scale : 0.0f;
        values[i + 2] = word.z >= dropout.threshold ? values[i + 2] * dropout.scale : 0.0f;
        values[i + 3] = word.w >= dropout.threshold ? values[i + 3] * dropout.scale : 0.0f;
        here = next;
    }
}
