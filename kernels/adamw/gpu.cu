// AdamW over flat arrays, the square norm of a gradient, and the scale that clips it.
//
// adamw_step           one pass: reads param, grad and both moments, writes param and moments, and the 16-bit shadow of
//                      param where there is one. Bound by memory: 28 bytes an element in float32, 28 with a shadow.
// square_norm_chunks   a partial sum for each fixed chunk of the array, so that the bits do not depend on the grid.
//                      Bound by memory: each element is read once.
// square_norm_total    the partial sums, added by one block in a fixed order: a few microseconds, whatever the size.
// clip_scale_elements  one number.
#include "gpu_common.cuh"

constexpr int STEP_THREADS = 256;
constexpr int NORM_THREADS = 256;
constexpr int TOTAL_THREADS = 1024;
constexpr int NUMBER_THREADS = 32;

// ------------------------------------------------------------------------------------------------------------- AdamW

__device__ __forceinline__ bool aligned(const void* p) { return reinterpret_cast<unsigned long long>(p) % 16 == 0; }

__device__ __forceinline__ void load_floats(const float* p, float (&values)[PACK]) {
#pragma unroll
    for (int i = 0; i < PACK; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(p + i);
        values[i] = four.x;
        values[i + 1] = four.y;
        values[i + 2] = four.z;
        values[i + 3] = four.w;
    }
}

__device__ __forceinline__ void store_floats(float* p, const float (&values)[PACK]) {
#pragma unroll
    for (int i = 0; i < PACK; i += 4) {
        *reinterpret_cast<float4*>(p + i) = make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
    }
}

struct Numbers {
    float rate;   // lr / (1 - beta1^t)
    float root;   // 1 / sqrt(1 - beta2^t)
    float decay;  // 1 - lr weight_decay
    float beta1, rest1, beta2, rest2;
    float eps, grad_scale;
};

__device__ __forceinline__ void update(float& param, float grad, float& exp_avg, float& exp_avg_sq, const Numbers& n) {
    grad *= n.grad_scale;
    exp_avg = exp_avg * n.beta1 + grad * n.rest1;
    exp_avg_sq = exp_avg_sq * n.beta2 + grad * grad * n.rest2;
    param = param * n.decay - exp_avg * n.rate / (sqrtf(exp_avg_sq) * n.root + n.eps);
}

// `shadow` is null where the model uses `param` itself. `live` holds rate, root and decay where a captured graph reads
// them anew at each step; else it is null, and the arguments count.
extern "C" __global__ void __launch_bounds__(STEP_THREADS)
    adamw_step(Storage* __restrict__ shadow, float* __restrict__ param, const Storage* __restrict__ grad,
               float* __restrict__ exp_avg, float* __restrict__ exp_avg_sq, const float* __restrict__ grad_scale,
               const float* __restrict__ live, long long count, float rate, float root, float decay, float beta1,
               float rest1, float beta2, float rest2, float eps) {
    Numbers n = {rate, root, decay, beta1, rest1, beta2, rest2, eps, *grad_scale};
    if (live != nullptr) {
        n.rate = live[0];
        n.root = live[1];
        n.decay = live[2];
    }
    const long long thread = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const long long threads = static_cast<long long>(gridDim.x) * blockDim.x;
    const bool wide = aligned(shadow) && aligned(param) && aligned(grad) && aligned(exp_avg) && aligned(exp_avg_sq);
    const long long packs = wide ? count / PACK : 0;

    for (long long pack = thread; pack < packs; pack += threads) {
        const long long at = pack * PACK;
        float p[PACK], g[PACK], m[PACK], v[PACK];
        load_floats(param + at, p);
        load_pack(grad + at, g);
        load_floats(exp_avg + at, m);
        load_floats(exp_avg_sq + at, v);
#pragma unroll
        for (int i = 0; i < PACK; ++i) update(p[i], g[i], m[i], v[i], n);
        store_floats(param + at, p);
        store_floats(exp_avg + at, m);
        store_floats(exp_avg_sq + at, v);
        if (shadow != nullptr) store_pack(shadow + at, p);
    }
    for (long long at = packs * PACK + thread; at < count; at += threads) {
        float p = param[at], m = exp_avg[at], v = exp_avg_sq[at];
        update(p, load(grad + at), m, v, n);
        param[at] = p;
        exp_avg[at] = m;
        exp_avg_sq[at] = v;
        if (shadow != nullptr) store(shadow + at, p);
    }
}

// ------------------------------------------------------------------------------------------------------ gradient norm

extern "C" __global__ void __launch_bounds__(NORM_THREADS)
    square_norm_chunks(const Storage* __restrict__ x, float* __restrict__ partial, long long count,
                       int chunk_size) {
    __shared__ float scratch[NORM_THREADS / WARP];
    const long long chunks = (count + chunk_size - 1) / chunk_size;
    for (long long chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        const Storage* part = x + chunk * chunk_size;
        const long long left = count - chunk * chunk_size;
        const int size = left < chunk_size ? static_cast<int>(left) : chunk_size;
        const int packs = aligned(part) ? size / PACK : 0;
        float total = 0;
        for (int pack = threadIdx.x; pack < packs; pack += NORM_THREADS) {
            float values[PACK];
            load_pack(part + pack * PACK, values);
#pragma unroll
            for (int i = 0; i < PACK; ++i) total += values[i] * values[i];
        }
        for (int i = packs * PACK + threadIdx.x; i < size; i += NORM_THREADS) {
            const float value = load(part + i);
            total += value * value;
        }
        total = block_sum(total, scratch);
        if (threadIdx.x == 0) partial[chunk] = total;
    }
}

extern "C" __global__ void __launch_bounds__(TOTAL_THREADS)
    square_norm_total(const float* __restrict__ partial, float* __restrict__ square_norm, int chunks) {
    __shared__ float scratch[TOTAL_THREADS / WARP];
    float total = 0;
    for (int chunk = threadIdx.x; chunk < chunks; chunk += TOTAL_THREADS) total += partial[chunk];
    total = block_sum(total, scratch);
    if (threadIdx.x == 0) *square_norm = total;
}

extern "C" __global__ void __launch_bounds__(NUMBER_THREADS)
    clip_scale_elements(const float* __restrict__ square_norm, float* __restrict__ scale, int count, float max_norm) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
        const float ratio = max_norm / (sqrtf(square_norm[i]) + 1e-6f);
        scale[i] = ratio > 1 ? 1.0f : ratio;  // NaN stays NaN
    }
}
