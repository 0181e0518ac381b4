// dropout: y = x * scale where the element's Philox word reaches `limit`, else 0.
//
// A Philox block gives the words of four neighbours: a pack of 16 bytes takes one block in float32 and two in 16 bits,
// about a dozen integer instructions an element. Memory bandwidth bounds it in float32; in 16 bits arithmetic is close.

#include "gpu_packs.cuh"

constexpr int THREADS = 256;
constexpr int WORDS = 4;  // of a Philox block

extern "C" __global__ void __launch_bounds__(THREADS)
    dropout(const Storage* __restrict__ x, Storage* __restrict__ y, long long count, unsigned limit, float scale,
            Stream stream) {
    const long long packs = in_packs(0, x, y) ? count / PACK : 0;
    const long long turn = static_cast<long long>(gridDim.x) * THREADS * PACKS;
    const unsigned step = stream_step(stream);  // read once, not for every pack
    for (long long first = static_cast<long long>(blockIdx.x) * THREADS * PACKS + threadIdx.x; first < packs;
         first += turn) {
        Pack pack[PACKS];
#pragma unroll
        for (int p = 0; p < PACKS; ++p) {
            if (first + p * THREADS < packs) pack[p] = read_pack(x + (first + p * THREADS) * PACK);
        }
#pragma unroll
        for (int p = 0; p < PACKS; ++p) {
            const long long i = first + p * THREADS;
            if (i >= packs) break;
#pragma unroll
            for (int k = 0; k < PACK; k += WORDS) {
                const unsigned block = stream.first_block + static_cast<unsigned>((i * PACK + k) / WORDS);
                const uint4 words = philox(stream.seed, stream.stream, step, stream.layer, block);
                const bool keep[WORDS] = {words.x >= limit, words.y >= limit, words.z >= limit, words.w >= limit};
#pragma unroll
                for (int word = 0; word < WORDS; ++word) {
                    Storage* element = &pack[p].element[k + word];
                    store(element, keep[word] ? load(element) * scale : 0);
                }
            }
            write_pack(y + i * PACK, pack[p]);
        }
    }
    const long long thread = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    const long long threads = static_cast<long long>(gridDim.x) * THREADS;
    for (long long i = packs * PACK + thread; i < count; i += threads) {
        store(y + i, philox_word(stream, i) >= limit ? load(x + i) * scale : 0);
    }
}
