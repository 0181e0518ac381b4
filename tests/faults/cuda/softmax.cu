// Softmax over the rows of a matrix, a block for each row: `right`, and kernels of which each has one mistake.
#include "gpu_common.cuh"

constexpr int BLOCK = 64;
constexpr int WARPS = BLOCK / WARP;
constexpr int ONE_WARP = 32;
constexpr int WIDE = 1024;  // threads of the kernel that gives each column a thread
constexpr int HALF_WARP = 16;
constexpr int LONGEST = 2048;  // columns of a row that is kept in shared memory as a whole
constexpr int QUAD = 4;
constexpr float SMALLEST_POSITIVE = 1.17549435e-38f;  // FLT_MIN

__device__ float minus_infinity() { return __int_as_float(0xff800000); }

// Of this thread's columns of a row: the largest, from `top` on, and the sum of exp(x - top).
__device__ float largest(const Storage* row, int columns, float top) {
    for (int c = threadIdx.x; c < columns; c += blockDim.x) top = fmaxf(top, load(row + c));
    return top;
}

__device__ float sum_of_exp(const Storage* row, int columns, float top) {
    float total = 0;
    for (int c = threadIdx.x; c < columns; c += blockDim.x) total += expf(load(row + c) - top);
    return total;
}

__device__ void write_row(const Storage* row, Storage* out, int columns, float top, float total) {
    for (int c = threadIdx.x; c < columns; c += blockDim.x) store(out + c, expf(load(row + c) - top) / total);
}

// What comes after a row's maximum.
__device__ void finish(const Storage* row, Storage* out, int columns, float top, float* scratch) {
    write_row(row, out, columns, top, block_sum(sum_of_exp(row, columns, top), scratch));
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    right(const Storage* __restrict__ x, Storage* __restrict__ y, int rows, int columns) {
    __shared__ float scratch[WARPS];
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const Storage* from = x + row * columns;
        float top = block_max(largest(from, columns, minus_infinity()), scratch);
        finish(from, y + row * columns, columns, top, scratch);
    }
}

// ------------------------------------------------------------------------------------------------------------ values

// A row that is negative throughout has another maximum: far below zero all exponentials vanish, and 0 / 0 is NaN.
extern "C" __global__ void __launch_bounds__(BLOCK)
    maximum_starts_at_zero(const Storage* __restrict__ x, Storage* __restrict__ y, int rows, int columns) {
    __shared__ float scratch[WARPS];
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const Storage* from = x + row * columns;
        float top = block_max(largest(from, columns, 0.0f), scratch);
        finish(from, y + row * columns, columns, top, scratch);
    }
}

// The same by one pass: FLT_MIN is the smallest positive number, not the lowest.
extern "C" __global__ void __launch_bounds__(BLOCK)
    online_from_smallest_positive(const Storage* __restrict__ x, Storage* __restrict__ y, int rows, int columns) {
    __shared__ float scratch[WARPS];
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const Storage* from = x + row * columns;
        float top = SMALLEST_POSITIVE, total = 0;
        for (int c = threadIdx.x; c < columns; c += BLOCK) {
            float value = load(from + c), higher = fmaxf(top, value);
            total = total * expf(top - higher) + expf(value - higher);
            top = higher;
        }
        float highest = block_max(top, scratch);
        total = block_sum(total * expf(top - highest), scratch);
        write_row(from, y + row * columns, columns, highest, total);
    }
}

// The maximum of the bits as integers: those of negative numbers rise the other way, and the lowest is found.
extern "C" __global__ void __launch_bounds__(BLOCK)
    maximum_of_bits(const Storage* __restrict__ x, Storage* __restrict__ y, int rows, int columns) {
    __shared__ float scratch[WARPS];
    __shared__ int top;
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const Storage* from = x + row * columns;
        if (threadIdx.x == 0) top = static_cast<int>(0x80000000);
        __syncthreads();
        for (int c = threadIdx.x; c < columns; c += BLOCK) atomicMax(&top, __float_as_int(load(from + c)));
        __syncthreads();
        const float highest = __int_as_float(top);
        finish(from, y + row * columns, columns, highest, scratch);
    }
}

// No shift at all: exp overflows from 88.8 on.
extern "C" __global__ void __launch_bounds__(BLOCK)
    no_shift(const Storage* __restrict__ x, Storage* __restrict__ y, int rows, int columns) {
    __shared__ float scratch[WARPS];
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        finish(x + row * columns, y + row * columns, columns, 0.0f, scratch);
    }
}

// "No probability is above 1": fminf takes the number where the other is NaN.
extern "C" __global__ void __launch_bounds__(BLOCK)
    clamped(const Storage* __restrict__ x, Storage* __restrict__ y, int rows, int columns) {
    __shared__ float scratch[WARPS];
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const Storage* from = x + row * columns;
        float top = block_max(largest(from, columns, minus_infinity()), scratch);
        float total = block_sum(sum_of_exp(from, columns, top), scratch);
        for (int c = threadIdx.x; c < columns; c += BLOCK) {
            store(y + row * columns + c, fminf(expf(load(from + c) - top) / total, 1.0f));
        }
    }
}

// ------------------------------------------------------------------------------------------------------------- sizes

// No loop over rows: those after the last block are left as they were.
extern "C" __global__ void __launch_bounds__(BLOCK)
    a_row_for_each_block(const Storage* __restrict__ x, Storage* __restrict__ y, int rows, int columns) {
    __shared__ float scratch[WARPS];
    const long long row = blockIdx.x;
    if (row >= rows) return;
    const Storage* from = x + row * columns;
    float top = block_max(largest(from, columns, minus_infinity()), scratch);
    finish(from, y + row * columns, columns, top, scratch);
}

// A thread for each column: columns after the last thread take no part, and get nothing.
extern "C" __global__ void __launch_bounds__(WIDE)
    a_thread_for_each_column(const Storage* __restrict__ x, Storage* __restrict__ y, int rows, int columns) {
    __shared__ float scratch[WIDE / WARP];
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const bool there = static_cast<int>(threadIdx.x) < columns;
        const float value = there ? load(x + row * columns + threadIdx.x) : minus_infinity();
        const float top = block_max(value, scratch);
        const float e = expf(value - top), total = block_sum(e, scratch);
        if (there) store(y + row * columns + threadIdx.x, e / total);
    }
}

// The row is kept in shared memory, of which there is too little for long ones: what does not fit is forgotten.
extern "C" __global__ void __launch_bounds__(BLOCK)
    longest_row_that_fits(const Storage* __restrict__ x, Storage* __restrict__ y, int rows, int columns) {
    __shared__ float kept[LONGEST];
    __shared__ float scratch[WARPS];
    const int fitting = columns < LONGEST ? columns : LONGEST;
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        for (int c = threadIdx.x; c < fitting; c += BLOCK) kept[c] = load(x + row * columns + c);
        float top = minus_infinity(), total = 0;
        for (int c = threadIdx.x; c < fitting; c += BLOCK) top = fmaxf(top, kept[c]);
        top = block_max(top, scratch);
        for (int c = threadIdx.x; c < fitting; c += BLOCK) total += expf(kept[c] - top);
        total = block_sum(total, scratch);
        write_row(x + row * columns, y + row * columns, columns, top, total);
    }
}

// Where a row begins is kept in 16 bits.
extern "C" __global__ void __launch_bounds__(BLOCK)
    offsets_of_16_bits(const Storage* __restrict__ x, Storage* __restrict__ y, int rows, int columns) {
    __shared__ float scratch[WARPS];
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        const unsigned short first = static_cast<unsigned short>(row * columns);
        float top = block_max(largest(x + first, columns, minus_infinity()), scratch);
        finish(x + first, y + static_cast<long long>(row) * columns, columns, top, scratch);
    }
}

// Sums in packs of four, and forgets what is left over at the end of a row.
extern "C" __global__ void __launch_bounds__(BLOCK)
    rest_of_packs_forgotten(const Storage* __restrict__ x, Storage* __restrict__ y, int rows, int columns) {
    __shared__ float scratch[WARPS];
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const Storage* from = x + row * columns;
        float top = block_max(largest(from, columns, minus_infinity()), scratch), total = 0;
        for (int c = QUAD * threadIdx.x; c + QUAD <= columns; c += QUAD * BLOCK) {
            for (int k = 0; k < QUAD; ++k) total += expf(load(from + c + k) - top);
        }
        write_row(from, y + row * columns, columns, top, block_sum(total, scratch));
    }
}

// ------------------------------------------------------------------------------------------- races, barriers and warps

// A warp that runs ahead stores its sum where others still read the maximum.
__device__ float max_without_first_barrier(float x, float* scratch) {
    x = warp_max(x);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    for (int warp = 0; warp < WARPS; ++warp) x = fmaxf(x, scratch[warp]);
    return x;
}

__device__ float sum_without_first_barrier(float x, float* scratch) {
    x = warp_sum(x);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
    float total = 0;
    for (int warp = 0; warp < WARPS; ++warp) total += scratch[warp];
    return total;
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    scratch_used_twice(const Storage* __restrict__ x, Storage* __restrict__ y, int rows, int columns) {
    __shared__ float scratch[WARPS];
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const Storage* from = x + row * columns;
        float top = max_without_first_barrier(largest(from, columns, minus_infinity()), scratch);
        float total = sum_without_first_barrier(sum_of_exp(from, columns, top), scratch);
        write_row(from, y + row * columns, columns, top, total);
    }
}

// A tree in shared memory whose last levels are left to the warp, as if its lanes still ran in step.
extern "C" __global__ void __launch_bounds__(BLOCK)
    last_warp_not_synchronised(const Storage* __restrict__ x, Storage* __restrict__ y, int rows, int columns) {
    __shared__ float scratch[WARPS];
    __shared__ volatile float tree[BLOCK];
    const int me = threadIdx.x;
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const Storage* from = x + row * columns;
        float top = block_max(largest(from, columns, minus_infinity()), scratch);
        tree[me] = sum_of_exp(from, columns, top);
        __syncthreads();
        for (int half = BLOCK / 2; half >= WARP; half /= 2) {
            if (me < half) tree[me] = tree[me] + tree[me + half];
            __syncthreads();
        }
        if (me < WARP) {
            for (int half = WARP / 2; half > 0; half /= 2) tree[me] = tree[me] + tree[me + half];
        }
        __syncthreads();
        write_row(from, y + row * columns, columns, top, tree[0]);
    }
}

// The reduction stands where only threads with a column come.
extern "C" __global__ void __launch_bounds__(BLOCK)
    barrier_in_a_branch(const Storage* __restrict__ x, Storage* __restrict__ y, int rows, int columns) {
    __shared__ float tops[BLOCK];
    __shared__ float scratch[WARPS];
    const int me = threadIdx.x;
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const Storage* from = x + row * columns;
        float top = minus_infinity();
        if (me < columns) {
            tops[me] = largest(from, columns, top);
            __syncthreads();
            for (int i = 0; i < BLOCK && i < columns; ++i) top = fmaxf(top, tops[i]);
        }
        finish(from, y + row * columns, columns, top, scratch);
    }
}

// Threads without a column leave, and the others wait for them.
extern "C" __global__ void __launch_bounds__(BLOCK)
    leaves_before_a_barrier(const Storage* __restrict__ x, Storage* __restrict__ y, int rows, int columns) {
    __shared__ float tops[BLOCK];
    __shared__ float scratch[WARPS];
    const long long row = blockIdx.x;
    const Storage* from = x + row * columns;
    if (static_cast<int>(threadIdx.x) >= columns) return;
    tops[threadIdx.x] = largest(from, columns, minus_infinity());
    __syncthreads();
    float top = minus_infinity();
    for (int i = 0; i < BLOCK && i < columns; ++i) top = fmaxf(top, tops[i]);
    finish(from, y + row * columns, columns, top, scratch);
}

// A warp for each row, whose lanes without a column take no part in shuffles that name all lanes.
extern "C" __global__ void __launch_bounds__(ONE_WARP)
    shuffles_without_some_lanes(const Storage* __restrict__ x, Storage* __restrict__ y, int rows, int columns) {
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const Storage* from = x + row * columns;
        if (static_cast<int>(threadIdx.x) < columns) {
            float top = warp_max(largest(from, columns, minus_infinity()));
            write_row(from, y + row * columns, columns, top, warp_sum(sum_of_exp(from, columns, top)));
        }
    }
}

// Launched with half a warp: the other half of those that shuffle is not there.
extern "C" __global__ void __launch_bounds__(HALF_WARP)
    half_a_warp(const Storage* __restrict__ x, Storage* __restrict__ y, int rows, int columns) {
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const Storage* from = x + row * columns;
        float top = warp_max(largest(from, columns, minus_infinity()));
        write_row(from, y + row * columns, columns, top, warp_sum(sum_of_exp(from, columns, top)));
    }
}

// The butterfly stays within halves of the warp.
extern "C" __global__ void __launch_bounds__(ONE_WARP)
    shuffles_of_width_16(const Storage* __restrict__ x, Storage* __restrict__ y, int rows, int columns) {
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const Storage* from = x + row * columns;
        float top = warp_max(largest(from, columns, minus_infinity())), total = sum_of_exp(from, columns, top);
        for (int offset = HALF_WARP / 2; offset > 0; offset /= 2) {
            total += __shfl_xor_sync(ALL_LANES, total, offset, HALF_WARP);
        }
        write_row(from, y + row * columns, columns, top, total);
    }
}
