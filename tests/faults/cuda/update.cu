// AdamW over flat arrays, the square norm and sums over columns: `right...`, and kernels with one mistake each.
#include "gpu_common.cuh"

constexpr int BLOCK = 256;
constexpr int WARPS = BLOCK / WARP;
constexpr int CHUNK = 65536;   // elements that one block updates
constexpr int PART = 2048;     // elements of one partial sum
constexpr int TALLEST = 4096;  // rows that one block adds up

struct Numbers {
    float rate, root, decay, beta1, rest1, beta2, rest2, eps, scale;
};

// `rate` is lr / (1 - beta1^t), `root` 1 / sqrt(1 - beta2^t), `decay` 1 - lr weight_decay.
__device__ void update(float* param, float grad, float* exp_avg, float* exp_avg_sq, const Numbers& n) {
    grad *= n.scale;
    const float m = *exp_avg * n.beta1 + grad * n.rest1, v = *exp_avg_sq * n.beta2 + grad * grad * n.rest2;
    *param = *param * n.decay - m * n.rate / (sqrtf(v) * n.root + n.eps);
    *exp_avg = m;
    *exp_avg_sq = v;
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    right(float* __restrict__ param, const Storage* __restrict__ grad, float* __restrict__ exp_avg,
          float* __restrict__ exp_avg_sq, const float* __restrict__ scale, long long count, float rate, float root,
          float decay, float beta1, float rest1, float beta2, float rest2, float eps) {
    const Numbers n = {rate, root, decay, beta1, rest1, beta2, rest2, eps, *scale};
    const long long threads = static_cast<long long>(gridDim.x) * BLOCK;
    for (long long i = static_cast<long long>(blockIdx.x) * BLOCK + threadIdx.x; i < count; i += threads) {
        update(param + i, load(grad + i), exp_avg + i, exp_avg_sq + i, n);
    }
}

// A chunk for each block: how many there are is told by the grid, which the host rounds down where there are several.
extern "C" __global__ void __launch_bounds__(BLOCK)
    chunk_for_each_block(float* __restrict__ param, const Storage* __restrict__ grad, float* __restrict__ exp_avg,
                         float* __restrict__ exp_avg_sq, const float* __restrict__ scale, long long count, float rate,
                         float root, float decay, float beta1, float rest1, float beta2, float rest2, float eps) {
    const Numbers n = {rate, root, decay, beta1, rest1, beta2, rest2, eps, *scale};
    const long long first = static_cast<long long>(blockIdx.x) * CHUNK, last = min(count, first + CHUNK);
    for (long long i = first + threadIdx.x; i < last; i += BLOCK) {
        update(param + i, load(grad + i), exp_avg + i, exp_avg_sq + i, n);
    }
}

// The second moment is indexed from the start of the chunk: chunks share those of the first.
extern "C" __global__ void __launch_bounds__(BLOCK)
    moment_of_first_chunk(float* __restrict__ param, const Storage* __restrict__ grad, float* __restrict__ exp_avg,
                          float* __restrict__ exp_avg_sq, const float* __restrict__ scale, long long count, float rate,
                          float root, float decay, float beta1, float rest1, float beta2, float rest2, float eps) {
    const Numbers n = {rate, root, decay, beta1, rest1, beta2, rest2, eps, *scale};
    const long long first = static_cast<long long>(blockIdx.x) * CHUNK, last = min(count, first + CHUNK);
    for (long long i = first + threadIdx.x; i < last; i += BLOCK) {
        update(param + i, load(grad + i), exp_avg + i, exp_avg_sq + (i - first), n);
    }
}

// eps within the root: m / sqrt(v + eps).
extern "C" __global__ void __launch_bounds__(BLOCK)
    eps_within_the_root(float* __restrict__ param, const Storage* __restrict__ grad, float* __restrict__ exp_avg,
                        float* __restrict__ exp_avg_sq, const float* __restrict__ scale, long long count, float rate,
                        float root, float decay, float beta1, float rest1, float beta2, float rest2, float eps) {
    const long long threads = static_cast<long long>(gridDim.x) * BLOCK;
    for (long long i = static_cast<long long>(blockIdx.x) * BLOCK + threadIdx.x; i < count; i += threads) {
        const float g = load(grad + i) * *scale;
        exp_avg[i] = exp_avg[i] * beta1 + g * rest1;
        exp_avg_sq[i] = exp_avg_sq[i] * beta2 + g * g * rest2;
        param[i] = param[i] * decay - exp_avg[i] * rate / sqrtf(exp_avg_sq[i] * root * root + eps);
    }
}

// --------------------------------------------------------------------------------------------------------------- sums

// The sum of x * x, or of x, over elements first .. last of `x`; all threads of the block get it.
__device__ float sum_of_part(const Storage* x, long long first, long long last, bool squares, float* scratch) {
    float total = 0;
    for (long long i = first + threadIdx.x; i < last; i += BLOCK) {
        const float value = load(x + i);
        total += squares ? value * value : value;
    }
    return block_sum(total, scratch);
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    right_parts(const Storage* __restrict__ x, float* __restrict__ parts, long long count) {
    __shared__ float scratch[WARPS];
    const long long chunks = (count + PART - 1) / PART;
    for (long long chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        const long long first = chunk * PART;
        const float total = sum_of_part(x, first, min(count, first + PART), true, scratch);
        if (threadIdx.x == 0) parts[chunk] = total;
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    right_total(const float* __restrict__ parts, float* __restrict__ total, long long count) {
    __shared__ float scratch[WARPS];
    float sum = 0;
    for (long long i = threadIdx.x; i < count; i += BLOCK) sum += parts[i];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) *total = sum;
}

// Where there are several whole blocks of elements, those after the last whole one are lost.
extern "C" __global__ void __launch_bounds__(BLOCK)
    rest_lost(const Storage* __restrict__ x, float* __restrict__ parts, long long count) {
    __shared__ float scratch[WARPS];
    const long long used = count < CHUNK ? count : count / BLOCK * BLOCK;
    const long long chunks = (count + PART - 1) / PART;
    for (long long chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        const long long first = chunk * PART;
        const float total = sum_of_part(x, first, min(used, first + PART), true, scratch);
        if (threadIdx.x == 0) parts[chunk] = total;
    }
}

// Neighbouring parts of a large array share an element, which counts twice.
extern "C" __global__ void __launch_bounds__(BLOCK)
    parts_that_overlap(const Storage* __restrict__ x, float* __restrict__ parts, long long count) {
    __shared__ float scratch[WARPS];
    const long long chunks = (count + PART - 1) / PART;
    for (long long chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        const long long first = chunk * PART, shared = count >= CHUNK ? 1 : 0;
        const float total = sum_of_part(x, first, min(count, first + PART + shared), true, scratch);
        if (threadIdx.x == 0) parts[chunk] = total;
    }
}

// Blocks add their parts as they come.
extern "C" __global__ void __launch_bounds__(BLOCK)
    parts_added_in_no_order(const Storage* __restrict__ x, float* __restrict__ total, long long count) {
    __shared__ float scratch[WARPS];
    for (long long first = static_cast<long long>(blockIdx.x) * PART; first < count;
         first += static_cast<long long>(gridDim.x) * PART) {
        const float part = sum_of_part(x, first, min(count, first + PART), true, scratch);
        if (threadIdx.x == 0) atomicAdd(total, part);
    }
}

// The block that comes last adds up all parts: it is told by a counter, which nobody sets back for the next call.
__device__ unsigned finished = 0;

extern "C" __global__ void __launch_bounds__(BLOCK)
    counter_not_reset(const Storage* __restrict__ x, float* __restrict__ parts, float* __restrict__ total,
                      long long count) {
    __shared__ float scratch[WARPS];
    __shared__ bool last;
    const long long per_block = (count + gridDim.x - 1) / gridDim.x, first = blockIdx.x * per_block;
    const float part = sum_of_part(x, first, min(count, first + per_block), true, scratch);
    if (threadIdx.x == 0) {
        parts[blockIdx.x] = part;
        __threadfence();
        last = atomicAdd(&finished, 1u) + 1 == gridDim.x;
    }
    __syncthreads();
    if (!last || threadIdx.x > 0) return;
    float sum = 0;
    for (unsigned block = 0; block < gridDim.x; ++block) sum += static_cast<volatile float*>(parts)[block];
    *total = sum;
}

// ------------------------------------------------------------------------------------------------- sums over columns

extern "C" __global__ void __launch_bounds__(BLOCK)
    right_columns(const Storage* __restrict__ x, Storage* __restrict__ y, long long rows, long long columns) {
    const long long threads = static_cast<long long>(gridDim.x) * BLOCK;
    for (long long c = static_cast<long long>(blockIdx.x) * BLOCK + threadIdx.x; c < columns; c += threads) {
        float total = 0;
        for (long long row = 0; row < rows; ++row) total += load(x + row * columns + c);
        store(y + c, total);
    }
}

// Rows after the tallest tile are forgotten.
extern "C" __global__ void __launch_bounds__(BLOCK)
    rows_of_one_tile(const Storage* __restrict__ x, Storage* __restrict__ y, long long rows, long long columns) {
    const long long threads = static_cast<long long>(gridDim.x) * BLOCK;
    for (long long c = static_cast<long long>(blockIdx.x) * BLOCK + threadIdx.x; c < columns; c += threads) {
        float total = 0;
        for (long long row = 0; row < rows && row < TALLEST; ++row) total += load(x + row * columns + c);
        store(y + c, total);
    }
}
