// Attention of packed sequences, a block for each query and head: `right`, and kernels of which each has one mistake.
//
// What differs stands in `attend`, under the name of the mistake.
#include "gpu_common.cuh"

constexpr int BLOCK = 64;
constexpr int WARPS = BLOCK / WARP;
constexpr int QUAD = 4;
constexpr int PADDED = 64;    // the size that heads of more than 32 elements are padded to
constexpr int LONGEST = 256;  // keys whose scores one kernel holds
constexpr int TILE = 16;      // keys that one kernel takes at a time

enum Mistake {
    NONE,
    NEIGHBOURS_ELEMENTS,   // a head of 33 to 63 elements is padded by those of the next
    WHOLE_PACKS,           // heads of more than 32 elements are read in packs of four, and the rest is forgotten
    FIRST_256_KEYS,        // keys after the scores that fit are forgotten
    MAXIMUM_FROM_ZERO,     // the maximum starts at 0
    WHOLE_TILES,           // keys go on to the end of the tile, into the next sequence
    FIRST_SEQUENCE_THERE,  // an empty sequence is taken for that of the row
    TEN_BITS,              // q and k are rounded to 10 bits, as tf32 does
    NO_BARRIER,            // scores are read before other threads have written them
};

__device__ float as_tf32(float x) { return __int_as_float(__float_as_int(x) & 0xffffe000); }

template <Mistake MISTAKE>
__device__ float product(const Storage* q, const Storage* k, int size) {
    int last = size;
    if (MISTAKE == NEIGHBOURS_ELEMENTS && size > WARP && size < PADDED) last = PADDED;
    if (MISTAKE == WHOLE_PACKS && size > WARP) last = size / QUAD * QUAD;
    float total = 0;
    for (int d = 0; d < last; ++d) {
        const float a = load(q + d), b = load(k + d);
        total += MISTAKE == TEN_BITS ? as_tf32(a) * as_tf32(b) : a * b;
    }
    return total;
}

// One query and head: y of `size` elements, and log sum exp. `scores` holds a number for each key.
template <Mistake MISTAKE>
__device__ void attend(const Storage* qkv, const int* cu_seqlens, Storage* y, float* lse, int sequences, int heads,
                       int size, int width, float scale, unsigned limit, float kept, const Stream& stream,
                       float* scores, float* scratch, long long row, int head) {
    int sequence = 0;
    if (MISTAKE == FIRST_SEQUENCE_THERE) {
        while (sequence < sequences - 1 && cu_seqlens[sequence] < row && cu_seqlens[sequence + 1] <= row) ++sequence;
    } else {
        for (int after = sequences; after - sequence > 1;) {  // the last that begins at the row or before
            const int middle = (sequence + after) / 2;
            (cu_seqlens[middle] <= row ? sequence : after) = middle;
        }
    }
    const int first = cu_seqlens[sequence], all = cu_seqlens[sequences];
    int length = cu_seqlens[sequence + 1] - first;
    if (MISTAKE == FIRST_256_KEYS) length = min(length, LONGEST);
    if (MISTAKE == WHOLE_TILES) length = min(all - first, (length + TILE - 1) / TILE * TILE);

    const int columns = heads * size;
    const Storage* q = qkv + row * 3 * columns + head * size;
    const Storage* k = qkv + static_cast<long long>(first) * 3 * columns + columns + head * size;
    float top = MISTAKE == MAXIMUM_FROM_ZERO ? 0.0f : __int_as_float(0xff800000);
    for (int j = threadIdx.x; j < length; j += BLOCK) {
        scores[j] = product<MISTAKE>(q, k + static_cast<long long>(j) * 3 * columns, size) * scale;
        top = fmaxf(top, scores[j]);
    }
    top = block_max(top, scratch);
    float total = 0;
    for (int j = threadIdx.x; j < length; j += BLOCK) total += expf(scores[j] - top);
    total = block_sum(total, scratch);
    for (int j = threadIdx.x; j < length; j += BLOCK) {
        const float p = expf(scores[j] - top) / total;
        const bool drops = limit > 0 && philox_word(stream, (row * heads + head) * width + j) < limit;
        scores[j] = drops ? 0.0f : p * kept;
    }
    if (MISTAKE != NO_BARRIER) __syncthreads();
    const Storage* v = k + columns;
    for (int d = threadIdx.x; d < size; d += BLOCK) {
        float sum = 0;
        for (int j = 0; j < length; ++j) sum += scores[j] * load(v + static_cast<long long>(j) * 3 * columns + d);
        store(y + row * columns + head * size + d, sum);
    }
    if (threadIdx.x == 0) lse[row * heads + head] = top + logf(total);
    __syncthreads();
}

template <Mistake MISTAKE>
__device__ void all_rows(const Storage* qkv, const int* cu_seqlens, Storage* y, float* lse, int rows, int sequences,
                         int heads, int size, int width, float scale, unsigned limit, float kept,
                         const Stream& stream) {
    extern __shared__ float scores[];
    __shared__ float scratch[WARPS];
    for (long long i = blockIdx.x; i < static_cast<long long>(rows) * heads; i += gridDim.x) {
        attend<MISTAKE>(qkv, cu_seqlens, y, lse, sequences, heads, size, width, scale, limit, kept, stream, scores,
                        scratch, i / heads, static_cast<int>(i % heads));
    }
}

#define ALL qkv, cu_seqlens, y, lse, rows, sequences, heads, size, width, scale, limit, kept, stream

extern "C" __global__ void __launch_bounds__(BLOCK)
    right(const Storage* __restrict__ qkv, const int* __restrict__ cu_seqlens, Storage* __restrict__ y,
          float* __restrict__ lse, int rows, int sequences, int heads, int size, int width, float scale,
          unsigned limit, float kept, Stream stream) {
    all_rows<NONE>(ALL);
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    neighbours_elements(const Storage* __restrict__ qkv, const int* __restrict__ cu_seqlens, Storage* __restrict__ y,
                        float* __restrict__ lse, int rows, int sequences, int heads, int size, int width, float scale,
                        unsigned limit, float kept, Stream stream) {
    all_rows<NEIGHBOURS_ELEMENTS>(ALL);
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    whole_packs(const Storage* __restrict__ qkv, const int* __restrict__ cu_seqlens, Storage* __restrict__ y,
                float* __restrict__ lse, int rows, int sequences, int heads, int size, int width, float scale,
                unsigned limit, float kept, Stream stream) {
    all_rows<WHOLE_PACKS>(ALL);
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    first_256_keys(const Storage* __restrict__ qkv, const int* __restrict__ cu_seqlens, Storage* __restrict__ y,
                   float* __restrict__ lse, int rows, int sequences, int heads, int size, int width, float scale,
                   unsigned limit, float kept, Stream stream) {
    all_rows<FIRST_256_KEYS>(ALL);
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    maximum_from_zero(const Storage* __restrict__ qkv, const int* __restrict__ cu_seqlens, Storage* __restrict__ y,
                      float* __restrict__ lse, int rows, int sequences, int heads, int size, int width, float scale,
                      unsigned limit, float kept, Stream stream) {
    all_rows<MAXIMUM_FROM_ZERO>(ALL);
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    whole_tiles(const Storage* __restrict__ qkv, const int* __restrict__ cu_seqlens, Storage* __restrict__ y,
                float* __restrict__ lse, int rows, int sequences, int heads, int size, int width, float scale,
                unsigned limit, float kept, Stream stream) {
    all_rows<WHOLE_TILES>(ALL);
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    first_sequence_there(const Storage* __restrict__ qkv, const int* __restrict__ cu_seqlens, Storage* __restrict__ y,
                         float* __restrict__ lse, int rows, int sequences, int heads, int size, int width, float scale,
                         unsigned limit, float kept, Stream stream) {
    all_rows<FIRST_SEQUENCE_THERE>(ALL);
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    ten_bits(const Storage* __restrict__ qkv, const int* __restrict__ cu_seqlens, Storage* __restrict__ y,
             float* __restrict__ lse, int rows, int sequences, int heads, int size, int width, float scale,
             unsigned limit, float kept, Stream stream) {
    all_rows<TEN_BITS>(ALL);
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    no_barrier(const Storage* __restrict__ qkv, const int* __restrict__ cu_seqlens, Storage* __restrict__ y,
               float* __restrict__ lse, int rows, int sequences, int heads, int size, int width, float scale,
               unsigned limit, float kept, Stream stream) {
    all_rows<NO_BARRIER>(ALL);
}
