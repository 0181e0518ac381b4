// The gradient of attention, a block for each row and head, first as query, then as key: `right`, and kernels with one
// mistake each. What differs stands in `gradient_of`, under the name of the mistake.
#include "gpu_common.cuh"

constexpr int BLOCK = 64;

enum Mistake {
    NONE,
    WITHOUT_DELTA,    // ds lacks the term of sum g y
    WITHOUT_SCALE,    // dk and dq lack the factor of the scores
    MASK_OF_THE_KEY,  // dropout draws the words of (key, query), not of (query, key)
    ADDED_BY_QUERIES  // each query adds to dk and dv as it comes
};

struct Call {
    const float *g, *qkv, *y, *lse;
    int heads, size, width;
    float scale;
    unsigned limit;
    float kept;
    Stream stream;
};

__device__ float product(const float* a, const float* b, int size) {
    float total = 0;
    for (int d = 0; d < size; ++d) total += a[d] * b[d];
    return total;
}

// Of query `i` and key `j` (rows of the packed tokens), of a sequence that begins at row `first`: what dv takes of g,
// and what dq and dk take of k and q.
template <Mistake MISTAKE>
__device__ float2 weights(const Call& c, int head, long long first, long long i, long long j) {
    const int columns = c.heads * c.size;
    const float* q = c.qkv + i * 3 * columns + head * c.size;
    const float* k = c.qkv + j * 3 * columns + columns + head * c.size;
    const float* g = c.g + i * columns + head * c.size;
    const float p = expf(product(q, k, c.size) * c.scale - c.lse[i * c.heads + head]);
    const long long draws = MISTAKE == MASK_OF_THE_KEY ? j : i, at = (MISTAKE == MASK_OF_THE_KEY ? i : j) - first;
    const bool drops = c.limit > 0 && philox_word(c.stream, (draws * c.heads + head) * c.width + at) < c.limit;
    const float dp = drops ? 0.0f : product(g, k + columns, c.size) * c.kept;
    const float delta = product(g, c.y + i * columns + head * c.size, c.size);
    float ds = p * (dp - (MISTAKE == WITHOUT_DELTA ? 0.0f : delta));
    if (MISTAKE != WITHOUT_SCALE) ds *= c.scale;
    return make_float2(drops ? 0.0f : p * c.kept, ds);
}

// `kept` holds two numbers for each row of the longest sequence.
template <Mistake MISTAKE>
__device__ void gradient_of(const Call& c, const int* cu_seqlens, float* dqkv, int rows, float2* kept) {
    const int columns = c.heads * c.size;
    for (long long at = blockIdx.x; at < static_cast<long long>(rows) * c.heads; at += gridDim.x) {
        const long long row = at / c.heads;
        const int head = static_cast<int>(at % c.heads);
        int sequence = 0;
        while (cu_seqlens[sequence + 1] <= row) ++sequence;
        const int first = cu_seqlens[sequence], length = cu_seqlens[sequence + 1] - first;
        const long long head_of_first = static_cast<long long>(first) * 3 * columns + head * c.size;
        float* out = dqkv + row * 3 * columns + head * c.size;

        for (int j = threadIdx.x; j < length; j += BLOCK) kept[j] = weights<MISTAKE>(c, head, first, row, first + j);
        __syncthreads();
        for (int d = threadIdx.x; d < c.size; d += BLOCK) {
            float dq = 0;
            for (int j = 0; j < length; ++j) {
                const long long there = head_of_first + static_cast<long long>(j) * 3 * columns + d;
                dq += kept[j].y * c.qkv[there + columns];
                if (MISTAKE == ADDED_BY_QUERIES) {
                    atomicAdd(dqkv + there + columns, kept[j].y * c.qkv[row * 3 * columns + head * c.size + d]);
                    atomicAdd(dqkv + there + 2 * columns, kept[j].x * c.g[row * columns + head * c.size + d]);
                }
            }
            out[d] = dq;
        }
        __syncthreads();
        if (MISTAKE == ADDED_BY_QUERIES) continue;

        for (int i = threadIdx.x; i < length; i += BLOCK) kept[i] = weights<MISTAKE>(c, head, first, first + i, row);
        __syncthreads();
        for (int d = threadIdx.x; d < c.size; d += BLOCK) {
            float dk = 0, dv = 0;
            for (int i = 0; i < length; ++i) {
                dk += kept[i].y * c.qkv[head_of_first + static_cast<long long>(i) * 3 * columns + d];
                dv += kept[i].x * c.g[static_cast<long long>(first + i) * columns + head * c.size + d];
            }
            out[columns + d] = dk;
            out[2 * columns + d] = dv;
        }
        __syncthreads();
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    right(const float* __restrict__ g, const float* __restrict__ qkv, const float* __restrict__ y,
          const float* __restrict__ lse, const int* __restrict__ cu_seqlens, float* __restrict__ dqkv, int rows,
          int heads, int size, int width, float scale, unsigned limit, float kept, Stream stream) {
    extern __shared__ float2 room[];
    gradient_of<NONE>({g, qkv, y, lse, heads, size, width, scale, limit, kept, stream}, cu_seqlens, dqkv, rows, room);
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    without_delta(const float* __restrict__ g, const float* __restrict__ qkv, const float* __restrict__ y,
                  const float* __restrict__ lse, const int* __restrict__ cu_seqlens, float* __restrict__ dqkv,
                  int rows, int heads, int size, int width, float scale, unsigned limit, float kept, Stream stream) {
    extern __shared__ float2 room[];
    const Call call = {g, qkv, y, lse, heads, size, width, scale, limit, kept, stream};
    gradient_of<WITHOUT_DELTA>(call, cu_seqlens, dqkv, rows, room);
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    without_scale(const float* __restrict__ g, const float* __restrict__ qkv, const float* __restrict__ y,
                  const float* __restrict__ lse, const int* __restrict__ cu_seqlens, float* __restrict__ dqkv,
                  int rows, int heads, int size, int width, float scale, unsigned limit, float kept, Stream stream) {
    extern __shared__ float2 room[];
    const Call call = {g, qkv, y, lse, heads, size, width, scale, limit, kept, stream};
    gradient_of<WITHOUT_SCALE>(call, cu_seqlens, dqkv, rows, room);
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    mask_of_the_key(const float* __restrict__ g, const float* __restrict__ qkv, const float* __restrict__ y,
                    const float* __restrict__ lse, const int* __restrict__ cu_seqlens, float* __restrict__ dqkv,
                    int rows, int heads, int size, int width, float scale, unsigned limit, float kept, Stream stream) {
    extern __shared__ float2 room[];
    const Call call = {g, qkv, y, lse, heads, size, width, scale, limit, kept, stream};
    gradient_of<MASK_OF_THE_KEY>(call, cu_seqlens, dqkv, rows, room);
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    added_by_queries(const float* __restrict__ g, const float* __restrict__ qkv, const float* __restrict__ y,
                     const float* __restrict__ lse, const int* __restrict__ cu_seqlens, float* __restrict__ dqkv,
                     int rows, int heads, int size, int width, float scale, unsigned limit, float kept,
                     Stream stream) {
    extern __shared__ float2 room[];
    const Call call = {g, qkv, y, lse, heads, size, width, scale, limit, kept, stream};
    gradient_of<ADDED_BY_QUERIES>(call, cu_seqlens, dqkv, rows, room);
}
