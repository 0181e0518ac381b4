// Softmax and its gradient once more, a block for each row: mistakes in what is read, kept, staged and waited for.
#include "gpu_common.cuh"

constexpr int BLOCK = 64;
constexpr int WARPS = BLOCK / WARP;
constexpr int QUAD = 4;
constexpr int SHORTEST = 64;  // columns of a row that the packed kernels keep in shared memory, and twice as many
constexpr int TILE = 64;      // columns that are staged in shared memory at a time
constexpr int LONG = 1024;    // from so many columns on, a row is shared by several blocks
constexpr int SHARES = 8;

__device__ float minus_infinity() { return __int_as_float(0xff800000); }

__device__ float largest(const Storage* row, int columns) {
    float top = minus_infinity();
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

__device__ float sum_of_products(const Storage* g, const Storage* y, int columns) {
    float total = 0;
    for (int c = threadIdx.x; c < columns; c += blockDim.x) total += load(g + c) * load(y + c);
    return total;
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    right_gradient(const Storage* __restrict__ g, const Storage* __restrict__ y, Storage* __restrict__ dx, int rows,
                   int columns) {
    __shared__ float scratch[WARPS];
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const long long first = row * columns;
        const float inner = block_sum(sum_of_products(g + first, y + first, columns), scratch);
        for (int c = threadIdx.x; c < columns; c += BLOCK) {
            store(dx + first + c, load(y + first + c) * (load(g + first + c) - inner));
        }
    }
}

// The inner product runs over the first columns of a row alone, a thread for each.
extern "C" __global__ void __launch_bounds__(BLOCK)
    gradient_of_first_columns(const Storage* __restrict__ g, const Storage* __restrict__ y, Storage* __restrict__ dx,
                              int rows, int columns) {
    __shared__ float scratch[WARPS];
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const long long first = row * columns;
        const float inner = block_sum(sum_of_products(g + first, y + first, min(columns, BLOCK)), scratch);
        for (int c = threadIdx.x; c < columns; c += BLOCK) {
            store(dx + first + c, load(y + first + c) * (load(g + first + c) - inner));
        }
    }
}

// ------------------------------------------------------------------------------------------------------------- beyond

// The columns are rounded up to whole packs: the last reads past its row, and past the end of the array.
extern "C" __global__ void __launch_bounds__(BLOCK)
    reads_past_the_end(const Storage* __restrict__ x, Storage* __restrict__ y, int rows, int columns) {
    __shared__ float scratch[WARPS];
    const int rounded = (columns + QUAD - 1) / QUAD * QUAD;
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const Storage* from = x + row * columns;
        float top = block_max(largest(from, rounded), scratch);
        write_row(from, y + row * columns, columns, top, block_sum(sum_of_exp(from, columns, top), scratch));
    }
}

// The maximum is sought from the element before the row on: that of the row before, or of no array.
extern "C" __global__ void __launch_bounds__(BLOCK)
    reads_before_the_start(const Storage* __restrict__ x, Storage* __restrict__ y, int rows, int columns) {
    __shared__ float scratch[WARPS];
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const Storage* from = x + row * columns;
        float top = block_max(largest(from - 1, columns + 1), scratch);
        write_row(from, y + row * columns, columns, top, block_sum(sum_of_exp(from, columns, top), scratch));
    }
}

// Shared memory holds three numbers of the block, and the row behind them: no multiple of 16 bytes from its start.
extern "C" __global__ void __launch_bounds__(BLOCK)
    row_behind_three_numbers(const Storage* __restrict__ x, Storage* __restrict__ y, int rows, int columns) {
    __shared__ __align__(16) float shared[3 + 2 * SHORTEST];
    __shared__ float scratch[WARPS];
    const bool packs = columns == SHORTEST || columns == 2 * SHORTEST;
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const Storage* from = x + row * columns;
        float top = block_max(largest(from, columns), scratch), total = 0;
        if (packs) {
            for (int c = threadIdx.x; c < columns; c += BLOCK) shared[3 + c] = expf(load(from + c) - top);
            __syncthreads();
            if (threadIdx.x == 0) {
                const float4* kept = reinterpret_cast<const float4*>(shared + 3);
#pragma unroll
                for (int i = 0; i < SHORTEST / QUAD; ++i) {
                    const float4 pack = kept[i];
                    total += pack.x + pack.y + pack.z + pack.w;
                }
                for (int c = SHORTEST; c < columns; ++c) total += shared[3 + c];
            }
            __syncthreads();
        } else {
            total = sum_of_exp(from, columns, top);
        }
        write_row(from, y + row * columns, columns, top, block_sum(total, scratch));
    }
}

// Packs of a row from its second element on: none of them lies on a multiple of 16 bytes.
extern "C" __global__ void __launch_bounds__(BLOCK)
    packs_from_the_second_element(const float* __restrict__ x, float* __restrict__ y, int rows, int columns) {
    __shared__ float scratch[WARPS];
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const float* from = x + row * columns;
        float top = minus_infinity(), total = 0;
        for (int c = threadIdx.x; c < columns; c += BLOCK) top = fmaxf(top, from[c]);
        top = block_max(top, scratch);
        for (int c = 1 + QUAD * threadIdx.x; c + QUAD <= columns; c += QUAD * BLOCK) {
            const float4 pack = *reinterpret_cast<const float4*>(from + c);
            total += expf(pack.x - top) + expf(pack.y - top) + expf(pack.z - top) + expf(pack.w - top);
        }
        const int rest = columns > 0 ? 1 + (columns - 1) / QUAD * QUAD : 0;
        if (threadIdx.x == 0) total += expf(from[0] - top);
        for (int c = rest + threadIdx.x; c < columns; c += BLOCK) total += expf(from[c] - top);
        total = block_sum(total, scratch);
        for (int c = threadIdx.x; c < columns; c += BLOCK) y[row * columns + c] = expf(from[c] - top) / total;
    }
}

// ---------------------------------------------------------------------------------------------------- shared memory

// The last sum goes over as many warps as a block may have, not over those that it has.
extern "C" __global__ void __launch_bounds__(BLOCK)
    sums_of_absent_warps(const Storage* __restrict__ x, Storage* __restrict__ y, int rows, int columns) {
    __shared__ float scratch[WARP];
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const Storage* from = x + row * columns;
        const float top = block_max(largest(from, columns), scratch);
        float total = warp_sum(sum_of_exp(from, columns, top));
        __syncthreads();
        if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = total;
        __syncthreads();
        total = warp_sum(scratch[threadIdx.x % WARP]);
        write_row(from, y + row * columns, columns, top, total);
    }
}

// Two buffers, of which one is filled while the other is read; whose turn it is is never changed.
extern "C" __global__ void __launch_bounds__(BLOCK)
    always_the_same_buffer(const Storage* __restrict__ x, Storage* __restrict__ y, int rows, int columns) {
    __shared__ float staged[2][TILE];
    __shared__ float scratch[WARPS];
    const int me = threadIdx.x;
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const Storage* from = x + row * columns;
        const float top = block_max(largest(from, columns), scratch);
        float total = 0;
        int turn = 0;
        if (me < columns) staged[turn][me] = load(from + me);
        for (int start = 0; start < columns; start += TILE) {
            if (start + TILE + me < columns) staged[turn ^ 1][me] = load(from + start + TILE + me);
            __syncthreads();
            if (start + me < columns) total += expf(staged[turn][me] - top);
            __syncthreads();
        }
        write_row(from, y + row * columns, columns, top, block_sum(total, scratch));
    }
}

// A tile is overwritten by the next while slower threads still read their neighbours' elements of it.
extern "C" __global__ void __launch_bounds__(BLOCK)
    tile_overwritten_early(const Storage* __restrict__ x, Storage* __restrict__ y, int rows, int columns) {
    __shared__ float tile[TILE];
    __shared__ float scratch[WARPS];
    const int me = threadIdx.x;
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const Storage* from = x + row * columns;
        const float top = block_max(largest(from, columns), scratch);
        float total = 0;
        for (int start = 0; start < columns; start += TILE) {
            tile[me] = start + me < columns ? load(from + start + me) : minus_infinity();
            __syncthreads();
            total += expf(tile[TILE - 1 - me] - top);
        }
        write_row(from, y + row * columns, columns, top, block_sum(total, scratch));
    }
}

// ------------------------------------------------------------------------------------------------ precision and state

extern "C" __global__ void __launch_bounds__(BLOCK)
    fast_exponential(const Storage* __restrict__ x, Storage* __restrict__ y, int rows, int columns) {
    __shared__ float scratch[WARPS];
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const Storage* from = x + row * columns;
        float top = block_max(largest(from, columns), scratch), total = 0;
        for (int c = threadIdx.x; c < columns; c += BLOCK) total += __expf(load(from + c) - top);
        total = block_sum(total, scratch);
        for (int c = threadIdx.x; c < columns; c += BLOCK) {
            store(y + row * columns + c, __fdividef(__expf(load(from + c) - top), total));
        }
    }
}

// The largest element that was ever seen serves as the maximum of every row: that of earlier calls, too.
__device__ float highest_so_far = -1e30f;

extern "C" __global__ void __launch_bounds__(BLOCK)
    maximum_of_earlier_calls(const Storage* __restrict__ x, Storage* __restrict__ y, int rows, int columns) {
    __shared__ float scratch[WARPS];
    float top = highest_so_far;
    for (long long row = 0; row < rows; ++row) {
        top = fmaxf(top, block_max(largest(x + row * columns, columns), scratch));
    }
    for (long long row = 0; row < rows; ++row) {
        const Storage* from = x + row * columns;
        write_row(from, y + row * columns, columns, top, block_sum(sum_of_exp(from, columns, top), scratch));
    }
    if (threadIdx.x == 0) highest_so_far = top;
}

// The sum runs over the first columns of a row alone, a thread for each.
extern "C" __global__ void __launch_bounds__(BLOCK)
    sums_of_first_columns(const Storage* __restrict__ x, Storage* __restrict__ y, int rows, int columns) {
    __shared__ float scratch[WARPS];
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const Storage* from = x + row * columns;
        const float top = block_max(largest(from, columns), scratch);
        const float total = block_sum(sum_of_exp(from, min(columns, BLOCK), top), scratch);
        write_row(from, y + row * columns, columns, top, total);
    }
}

// --------------------------------------------------------------------------------------------------------------- hangs

// The step of the loop is a share of the row, and 0 where the row is short.
extern "C" __global__ void __launch_bounds__(BLOCK)
    step_of_zero(const Storage* __restrict__ x, Storage* __restrict__ y, int rows, int columns) {
    __shared__ float scratch[WARPS];
    const int share = columns < BLOCK ? columns : columns / SHARES / BLOCK * BLOCK;
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const Storage* from = x + row * columns;
        const float top = block_max(largest(from, columns), scratch);
        float total = 0;
        for (int start = 0; start < columns; start += share) {
            const int end = min(columns, start + share);
            for (int c = start + threadIdx.x; c < end; c += BLOCK) total += expf(load(from + c) - top);
        }
        write_row(from, y + row * columns, columns, top, block_sum(total, scratch));
    }
}

// The block of a long row waits until the block after it has counted itself, which the last has not.
__device__ volatile int arrived = 0;

extern "C" __global__ void __launch_bounds__(BLOCK)
    waits_for_nobody(const Storage* __restrict__ x, Storage* __restrict__ y, int rows, int columns) {
    __shared__ float scratch[WARPS];
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        if (columns >= LONG && threadIdx.x == 0) {
            while (arrived <= static_cast<int>(row)) {}
        }
        __syncthreads();
        const Storage* from = x + row * columns;
        const float top = block_max(largest(from, columns), scratch);
        write_row(from, y + row * columns, columns, top, block_sum(sum_of_exp(from, columns, top), scratch));
    }
}
