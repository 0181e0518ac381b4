// Layer norm and its gradient, a block for each row or for each run of rows: `right...`, and kernels with a mistake.
#include "gpu_common.cuh"

constexpr int BLOCK = 64;
constexpr int WARPS = BLOCK / WARP;
constexpr int QUAD = 4;
constexpr int AMD_WARP = 64;

__device__ float sum_of(const Storage* row, int columns) {
    float total = 0;
    for (int c = threadIdx.x; c < columns; c += BLOCK) total += load(row + c);
    return total;
}

__device__ float sum_of_squares(const Storage* row, int columns, float mean) {
    float total = 0;
    for (int c = threadIdx.x; c < columns; c += BLOCK) {
        const float d = load(row + c) - mean;
        total += d * d;
    }
    return total;
}

__device__ void write_row(const Storage* row, const Storage* weight, const Storage* bias, Storage* out, int columns,
                          float mean, float rstd) {
    for (int c = threadIdx.x; c < columns; c += BLOCK) {
        store(out + c, (load(row + c) - mean) * rstd * load(weight + c) + load(bias + c));
    }
}

__device__ void keep(float* means, float* rstds, long long row, float mean, float rstd) {
    if (threadIdx.x == 0) {
        means[row] = mean;
        rstds[row] = rstd;
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    right(const Storage* __restrict__ x, const Storage* __restrict__ weight, const Storage* __restrict__ bias,
          Storage* __restrict__ y, float* __restrict__ means, float* __restrict__ rstds, int rows, int columns,
          float eps) {
    __shared__ float scratch[WARPS];
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const Storage* from = x + row * columns;
        const float mean = block_sum(sum_of(from, columns), scratch) / columns;
        const float rstd = 1 / sqrtf(block_sum(sum_of_squares(from, columns, mean), scratch) / columns + eps);
        write_row(from, weight, bias, y + row * columns, columns, mean, rstd);
        keep(means, rstds, row, mean, rstd);
    }
}

// ------------------------------------------------------------------------------------------------------------ forward

// Var x = E x^2 - (E x)^2, which cancels where the mean is large.
extern "C" __global__ void __launch_bounds__(BLOCK)
    difference_of_squares(const Storage* __restrict__ x, const Storage* __restrict__ weight,
                          const Storage* __restrict__ bias, Storage* __restrict__ y, float* __restrict__ means,
                          float* __restrict__ rstds, int rows, int columns, float eps) {
    __shared__ float scratch[WARPS];
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const Storage* from = x + row * columns;
        const float mean = block_sum(sum_of(from, columns), scratch) / columns;
        const float squares = block_sum(sum_of_squares(from, columns, 0.0f), scratch) / columns;
        const float rstd = 1 / sqrtf(squares - mean * mean + eps);
        write_row(from, weight, bias, y + row * columns, columns, mean, rstd);
        keep(means, rstds, row, mean, rstd);
    }
}

// eps is added to the deviation, not to the variance.
extern "C" __global__ void __launch_bounds__(BLOCK)
    eps_outside_the_root(const Storage* __restrict__ x, const Storage* __restrict__ weight,
                         const Storage* __restrict__ bias, Storage* __restrict__ y, float* __restrict__ means,
                         float* __restrict__ rstds, int rows, int columns, float eps) {
    __shared__ float scratch[WARPS];
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const Storage* from = x + row * columns;
        const float mean = block_sum(sum_of(from, columns), scratch) / columns;
        const float rstd = 1 / (sqrtf(block_sum(sum_of_squares(from, columns, mean), scratch) / columns) + eps);
        write_row(from, weight, bias, y + row * columns, columns, mean, rstd);
        keep(means, rstds, row, mean, rstd);
    }
}

// The root by its bits and one step of Newton's: right to 0.2 %.
extern "C" __global__ void __launch_bounds__(BLOCK)
    root_by_its_bits(const Storage* __restrict__ x, const Storage* __restrict__ weight,
                     const Storage* __restrict__ bias, Storage* __restrict__ y, float* __restrict__ means,
                     float* __restrict__ rstds, int rows, int columns, float eps) {
    __shared__ float scratch[WARPS];
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const Storage* from = x + row * columns;
        const float mean = block_sum(sum_of(from, columns), scratch) / columns;
        const float variance = block_sum(sum_of_squares(from, columns, mean), scratch) / columns + eps;
        float rstd = __int_as_float(0x5f3759df - (__float_as_int(variance) >> 1));
        rstd *= 1.5f - 0.5f * variance * rstd * rstd;
        write_row(from, weight, bias, y + row * columns, columns, mean, rstd);
        keep(means, rstds, row, mean, rstd);
    }
}

// No loop over rows.
extern "C" __global__ void __launch_bounds__(BLOCK)
    a_row_for_each_block(const Storage* __restrict__ x, const Storage* __restrict__ weight,
                         const Storage* __restrict__ bias, Storage* __restrict__ y, float* __restrict__ means,
                         float* __restrict__ rstds, int rows, int columns, float eps) {
    __shared__ float scratch[WARPS];
    const long long row = blockIdx.x;
    const Storage* from = x + row * columns;
    const float mean = block_sum(sum_of(from, columns), scratch) / columns;
    const float rstd = 1 / sqrtf(block_sum(sum_of_squares(from, columns, mean), scratch) / columns + eps);
    write_row(from, weight, bias, y + row * columns, columns, mean, rstd);
    keep(means, rstds, row, mean, rstd);
}

// The mean is read by all threads while a quick warp already writes its sum of squares to the same place.
extern "C" __global__ void __launch_bounds__(BLOCK)
    mean_overwritten(const Storage* __restrict__ x, const Storage* __restrict__ weight,
                     const Storage* __restrict__ bias, Storage* __restrict__ y, float* __restrict__ means,
                     float* __restrict__ rstds, int rows, int columns, float eps) {
    __shared__ float sums[WARPS];
    const int warp = threadIdx.x / WARP;
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const Storage* from = x + row * columns;
        float statistics[2];
        for (int pass = 0; pass < 2; ++pass) {
            float mine = warp_sum(pass == 0 ? sum_of(from, columns) : sum_of_squares(from, columns, statistics[0]));
            if (threadIdx.x % WARP == 0) sums[warp] = mine;
            __syncthreads();
            float total = 0;
            for (int i = 0; i < WARPS; ++i) total += sums[i];
            statistics[pass] = total / columns;
        }
        __syncthreads();
        const float rstd = 1 / sqrtf(statistics[1] + eps);
        write_row(from, weight, bias, y + row * columns, columns, statistics[0], rstd);
        keep(means, rstds, row, statistics[0], rstd);
    }
}

// -------------------------------------------------------------------------------------- gradient: dx, dweight, dbias

// dx of one row, from the sums of h and h n over it, h = g w and n = (x - mean) rstd.
__device__ void write_dx(const Storage* g, const Storage* x, const Storage* weight, Storage* dx, int columns,
                         float mean, float rstd, float h, float hn) {
    for (int c = threadIdx.x; c < columns; c += BLOCK) {
        const float n = (load(x + c) - mean) * rstd;
        store(dx + c, (load(g + c) * load(weight + c) - h / columns - n * (hn / columns)) * rstd);
    }
}

__device__ void sums_of_row(const Storage* g, const Storage* x, const Storage* weight, int columns, float mean,
                            float rstd, float& h, float& hn) {
    for (int c = threadIdx.x; c < columns; c += BLOCK) {
        const float product = load(g + c) * load(weight + c);
        h += product;
        hn += product * ((load(x + c) - mean) * rstd);
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    right_dx(const Storage* __restrict__ g, const Storage* __restrict__ x, const Storage* __restrict__ weight,
             const float* __restrict__ mean, const float* __restrict__ rstd, Storage* __restrict__ dx, int rows,
             int columns) {
    __shared__ float scratch[WARPS];
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const long long at = row * columns;
        float h = 0, hn = 0;
        sums_of_row(g + at, x + at, weight, columns, mean[row], rstd[row], h, hn);
        h = block_sum(h, scratch);
        hn = block_sum(hn, scratch);
        write_dx(g + at, x + at, weight, dx + at, columns, mean[row], rstd[row], h, hn);
    }
}

// The term that comes from the deviation is left out.
extern "C" __global__ void __launch_bounds__(BLOCK)
    dx_without_deviation(const Storage* __restrict__ g, const Storage* __restrict__ x,
                         const Storage* __restrict__ weight, const float* __restrict__ mean,
                         const float* __restrict__ rstd, Storage* __restrict__ dx, int rows, int columns) {
    __shared__ float scratch[WARPS];
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const long long at = row * columns;
        float h = 0, hn = 0;
        sums_of_row(g + at, x + at, weight, columns, mean[row], rstd[row], h, hn);
        write_dx(g + at, x + at, weight, dx + at, columns, mean[row], rstd[row], block_sum(h, scratch), 0.0f);
    }
}

// Sums over rows `first` .. `last` of g n and g, a thread for each column.
__device__ void column_sums(const Storage* g, const Storage* x, const float* mean, const float* rstd, int column,
                            int columns, int first, int last, float& dweight, float& dbias) {
    for (long long row = first; row < last; ++row) {
        const float value = load(g + row * columns + column);
        dweight += value * ((load(x + row * columns + column) - mean[row]) * rstd[row]);
        dbias += value;
    }
}

// A partial sum for each chunk of rows: (chunks, 2, columns), which `right_total` adds up.
extern "C" __global__ void __launch_bounds__(BLOCK)
    right_parts(const Storage* __restrict__ g, const Storage* __restrict__ x, const float* __restrict__ mean,
                const float* __restrict__ rstd, float* __restrict__ parts, int rows, int columns, int chunk_rows) {
    const int chunks = (rows + chunk_rows - 1) / chunk_rows;
    for (int chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        for (int c = threadIdx.x; c < columns; c += BLOCK) {
            float dweight = 0, dbias = 0;
            const int first = chunk * chunk_rows;
            column_sums(g, x, mean, rstd, c, columns, first, min(rows, first + chunk_rows), dweight, dbias);
            parts[2LL * chunk * columns + c] = dweight;
            parts[(2LL * chunk + 1) * columns + c] = dbias;
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    right_total(const float* __restrict__ parts, Storage* __restrict__ dweight, Storage* __restrict__ dbias, int chunks,
                int columns) {
    for (int c = blockIdx.x * BLOCK + threadIdx.x; c < columns; c += gridDim.x * BLOCK) {
        float weight = 0, bias = 0;
        for (long long chunk = 0; chunk < chunks; ++chunk) {
            weight += parts[2 * chunk * columns + c];
            bias += parts[(2 * chunk + 1) * columns + c];
        }
        store(dweight + c, weight);
        store(dbias + c, bias);
    }
}

// The blocks add to one place as each comes: by plain additions, or by atomic ones in no order.
extern "C" __global__ void __launch_bounds__(BLOCK)
    added_by_all_blocks(const Storage* __restrict__ g, const Storage* __restrict__ x, const float* __restrict__ mean,
                        const float* __restrict__ rstd, float* __restrict__ dweight, float* __restrict__ dbias,
                        int rows, int columns, int chunk_rows, int atomic) {
    for (int first = blockIdx.x * chunk_rows; first < rows; first += gridDim.x * chunk_rows) {
        for (int c = threadIdx.x; c < columns; c += BLOCK) {
            float weight = 0, bias = 0;
            column_sums(g, x, mean, rstd, c, columns, first, min(rows, first + chunk_rows), weight, bias);
            if (atomic) {
                atomicAdd(dweight + c, weight);
                atomicAdd(dbias + c, bias);
            } else {
                dweight[c] += weight;
                dbias[c] += bias;
            }
        }
    }
}

// A butterfly for warps of 64 lanes, written for another maker's GPUs: here lane 32 + i of it is no lane of the warp.
extern "C" __global__ void __launch_bounds__(BLOCK)
    parts_of_64_lanes(const Storage* __restrict__ g, const Storage* __restrict__ x, const float* __restrict__ mean,
                      const float* __restrict__ rstd, float* __restrict__ parts, int rows, int columns,
                      int chunk_rows) {
    const int chunks = (rows + chunk_rows - 1) / chunk_rows;
    const int lane = threadIdx.x % AMD_WARP, warps = BLOCK / AMD_WARP;
    for (int chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        const int first = chunk * chunk_rows, last = min(rows, first + chunk_rows);
        for (int c = threadIdx.x / AMD_WARP; c < columns; c += warps) {
            float dweight = 0, dbias = 0;
            for (int row = first + lane; row < last; row += AMD_WARP) {
                column_sums(g, x, mean, rstd, c, columns, row, row + 1, dweight, dbias);
            }
            dweight = warp_sum(dweight);
            dbias = warp_sum(dbias);
            if (lane == 0) {
                parts[2LL * chunk * columns + c] = dweight;
                parts[(2LL * chunk + 1) * columns + c] = dbias;
            }
        }
    }
}
