// gumbel: y = x - log(-log v), v of the element's own Philox word; y is float32 whatever x is stored in.
//
// A thread takes the four elements whose words one Philox block gives. Two logarithms and a quarter of a block an element:
// arithmetic bounds it, not memory.

#include "gpu_common.cuh"

constexpr int THREADS = 256;
constexpr int WORDS = 4;  // of a Philox block

__device__ __forceinline__ float noise(unsigned word) {
    const float v = static_cast<float>((word >> 9) * 2 + 1) * 0x1p-24f;  // exact
    return logf(-logf(v));
}

extern "C" __global__ void __launch_bounds__(THREADS)
    gumbel(const Storage* __restrict__ x, float* __restrict__ y, long long count, Stream stream) {
    const long long turn = static_cast<long long>(gridDim.x) * THREADS;
    const unsigned step = stream_step(stream);
    for (long long block = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x; block * WORDS < count;
         block += turn) {
        const unsigned at = stream.first_block + static_cast<unsigned>(block);
        const uint4 words = philox(stream.seed, stream.stream, step, stream.layer, at);
        const unsigned word[WORDS] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int k = 0; k < WORDS; ++k) {
            const long long i = block * WORDS + k;
            if (i < count) y[i] = load(x + i) - noise(word[k]);
        }
    }
}
