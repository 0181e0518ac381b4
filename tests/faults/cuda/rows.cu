// Rows of tables gathered and scattered, dropout, GELU and relu: `right...`, and kernels of which each has one mistake.
#include "gpu_common.cuh"

constexpr int BLOCK = 128;
constexpr int STAGED = 128;  // ids that a block keeps in shared memory at a time
constexpr int QUAD = 4;
constexpr float SQRT_2_OVER_PI = 0.7978845608028654f;
constexpr float CUBIC = 0.044715f;

// ------------------------------------------------------------------------------------------------------------- gather

extern "C" __global__ void __launch_bounds__(BLOCK)
    right_gather(const Storage* __restrict__ x, const int* __restrict__ index, Storage* __restrict__ y, int rows,
                 int columns, int skip) {
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const long long id = index[row];
        for (int c = threadIdx.x; c < columns; c += blockDim.x) {
            store(y + row * columns + c, id == skip ? 0.0f : load(x + id * columns + c));
        }
    }
}

// An id is kept in 16 bits, with a sign: of a table of more than 32768 rows the others are negative.
extern "C" __global__ void __launch_bounds__(BLOCK)
    ids_of_16_bits(const Storage* __restrict__ x, const int* __restrict__ index, Storage* __restrict__ y, int rows,
                   int columns, int skip) {
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const short id = static_cast<short>(index[row]);
        for (int c = threadIdx.x; c < columns; c += blockDim.x) {
            store(y + row * columns + c, id == skip ? 0.0f : load(x + static_cast<long long>(id) * columns + c));
        }
    }
}

// No loop over rows, which lie along y of the grid.
extern "C" __global__ void __launch_bounds__(BLOCK)
    rows_along_y(const Storage* __restrict__ x, const int* __restrict__ index, Storage* __restrict__ y, int rows,
                 int columns, int skip) {
    const long long row = blockIdx.y, id = index[row];
    for (int c = threadIdx.x; c < columns; c += blockDim.x) {
        store(y + row * columns + c, id == skip ? 0.0f : load(x + id * columns + c));
    }
}

// --------------------------------------------------------------------------------------------------------- embedding

extern "C" __global__ void __launch_bounds__(BLOCK)
    right_embedding(const Storage* __restrict__ word, const Storage* __restrict__ position,
                    const Storage* __restrict__ type, const int* __restrict__ words,
                    const int* __restrict__ positions, const int* __restrict__ types, Storage* __restrict__ y,
                    int rows, int columns, int most_positions) {
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        const long long first = words[row], second = min(positions[row], most_positions - 1), third = types[row];
        for (int c = threadIdx.x; c < columns; c += BLOCK) {
            store(y + row * columns + c, load(word + first * columns + c) + load(position + second * columns + c) +
                                             load(type + third * columns + c));
        }
    }
}

// ------------------------------------------------------------------------------------------------------------ scatter

// A thread for each element of y, which looks through all ids: slow, and right.
extern "C" __global__ void __launch_bounds__(BLOCK)
    right_scatter(const Storage* __restrict__ x, const int* __restrict__ index, Storage* __restrict__ y, int count,
                  int columns, long long size, int skip) {
    const long long threads = static_cast<long long>(gridDim.x) * BLOCK;
    for (long long i = static_cast<long long>(blockIdx.x) * BLOCK + threadIdx.x; i < size; i += threads) {
        const int row = static_cast<int>(i / columns);
        float total = 0;
        for (int k = 0; k < count; ++k) {
            if (index[k] == row && row != skip) total += load(x + static_cast<long long>(k) * columns + i % columns);
        }
        store(y + i, total);
    }
}

// The padding row gets a gradient like every other.
extern "C" __global__ void __launch_bounds__(BLOCK)
    scatter_to_padding(const Storage* __restrict__ x, const int* __restrict__ index, Storage* __restrict__ y,
                       int count, int columns, long long size, int skip) {
    const long long threads = static_cast<long long>(gridDim.x) * BLOCK;
    for (long long i = static_cast<long long>(blockIdx.x) * BLOCK + threadIdx.x; i < size; i += threads) {
        const int row = static_cast<int>(i / columns);
        float total = 0;
        for (int k = 0; k < count; ++k) {
            if (index[k] == row) total += load(x + static_cast<long long>(k) * columns + i % columns);
        }
        store(y + i, total);
    }
}

// Ids go through shared memory in batches: the next batch comes while slower warps still read this one.
extern "C" __global__ void __launch_bounds__(BLOCK)
    batch_of_ids_overwritten(const Storage* __restrict__ x, const int* __restrict__ index, Storage* __restrict__ y,
                             int count, int columns, long long size, int skip) {
    __shared__ int ids[STAGED];
    for (long long first = static_cast<long long>(blockIdx.x) * BLOCK; first < size;
         first += static_cast<long long>(gridDim.x) * BLOCK) {
        const long long i = first + threadIdx.x;
        const int row = static_cast<int>(i / columns);
        float total = 0;
        for (int start = 0; start < count; start += STAGED) {
            if (start + threadIdx.x < count) ids[threadIdx.x] = index[start + threadIdx.x];
            __syncthreads();
            for (int k = 0; i < size && k < STAGED && start + k < count; ++k) {
                if (ids[k] != row || row == skip) continue;
                total += load(x + static_cast<long long>(start + k) * columns + i % columns);
            }
        }
        __syncthreads();
        if (i < size) store(y + i, total);
    }
}

// Rows add themselves where they go, as they come: by atomic additions in no order, or by plain ones.
extern "C" __global__ void __launch_bounds__(BLOCK)
    rows_add_themselves(const float* __restrict__ x, const int* __restrict__ index, float* __restrict__ y, int count,
                        int columns, int skip, int atomic) {
    for (long long k = blockIdx.x; k < count; k += gridDim.x) {
        const long long row = index[k];
        if (row == skip) continue;
        for (int c = threadIdx.x; c < columns; c += BLOCK) {
            float* to = y + row * columns + c;
            if (atomic) atomicAdd(to, x[k * columns + c]);
            else *to += x[k * columns + c];
        }
    }
}

// ------------------------------------------------------------------------------------------------------------ dropout

extern "C" __global__ void __launch_bounds__(BLOCK)
    right_dropout(const Storage* __restrict__ x, Storage* __restrict__ y, long long count, unsigned limit, float scale,
                  Stream stream) {
    const long long threads = static_cast<long long>(gridDim.x) * BLOCK;
    for (long long i = static_cast<long long>(blockIdx.x) * BLOCK + threadIdx.x; i < count; i += threads) {
        store(y + i, philox_word(stream, i) >= limit ? load(x + i) * scale : 0);
    }
}

// Four neighbours share a block of words; what is left over counts its words from 0 again.
extern "C" __global__ void __launch_bounds__(BLOCK)
    words_of_the_rest(const Storage* __restrict__ x, Storage* __restrict__ y, long long count, unsigned limit,
                      float scale, Stream stream) {
    const long long packed = count / QUAD * QUAD, threads = static_cast<long long>(gridDim.x) * BLOCK;
    for (long long i = static_cast<long long>(blockIdx.x) * BLOCK + threadIdx.x; i < count; i += threads) {
        const long long word = i < packed ? i : i - packed;
        store(y + i, philox_word(stream, word) >= limit ? load(x + i) * scale : 0);
    }
}

// The number of an element's word is kept in 16 bits, so that masks repeat.
extern "C" __global__ void __launch_bounds__(BLOCK)
    words_of_16_bits(const Storage* __restrict__ x, Storage* __restrict__ y, long long count, unsigned limit,
                     float scale, Stream stream) {
    const long long threads = static_cast<long long>(gridDim.x) * BLOCK;
    for (long long i = static_cast<long long>(blockIdx.x) * BLOCK + threadIdx.x; i < count; i += threads) {
        const unsigned short word = static_cast<unsigned short>(i);
        store(y + i, philox_word(stream, word) >= limit ? load(x + i) * scale : 0);
    }
}

// ------------------------------------------------------------------------------------------------------- elements

__device__ float tanh_form(float x) { return SQRT_2_OVER_PI * (x + CUBIC * x * x * x); }

extern "C" __global__ void __launch_bounds__(BLOCK)
    right_gelu(const Storage* __restrict__ x, Storage* __restrict__ y, long long count, int by_tanh) {
    const long long threads = static_cast<long long>(gridDim.x) * BLOCK;
    for (long long i = static_cast<long long>(blockIdx.x) * BLOCK + threadIdx.x; i < count; i += threads) {
        const float value = load(x + i);
        store(y + i, 0.5f * value * (1 + (by_tanh ? tanhf(tanh_form(value)) : erff(value * 0.70710678f))));
    }
}

// tanh z = (e^2z - 1) / (e^2z + 1), which is infinity by infinity from z = 44.4 on.
extern "C" __global__ void __launch_bounds__(BLOCK)
    tanh_by_exponentials(const Storage* __restrict__ x, Storage* __restrict__ y, long long count, int by_tanh) {
    const long long threads = static_cast<long long>(gridDim.x) * BLOCK;
    for (long long i = static_cast<long long>(blockIdx.x) * BLOCK + threadIdx.x; i < count; i += threads) {
        const float value = load(x + i), e = expf(2 * tanh_form(value));
        store(y + i, 0.5f * value * (1 + (by_tanh ? (e - 1) / (e + 1) : erff(value * 0.70710678f))));
    }
}

// x times a logistic function, near GELU to 2 %.
extern "C" __global__ void __launch_bounds__(BLOCK)
    quick_gelu(const Storage* __restrict__ x, Storage* __restrict__ y, long long count, int by_tanh) {
    const long long threads = static_cast<long long>(gridDim.x) * BLOCK;
    for (long long i = static_cast<long long>(blockIdx.x) * BLOCK + threadIdx.x; i < count; i += threads) {
        const float value = load(x + i);
        store(y + i, value / (1 + expf(-1.702f * value)));
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    right_relu(const Storage* __restrict__ x, Storage* __restrict__ y, long long count) {
    const long long threads = static_cast<long long>(gridDim.x) * BLOCK;
    for (long long i = static_cast<long long>(blockIdx.x) * BLOCK + threadIdx.x; i < count; i += threads) {
        const float value = load(x + i);
        store(y + i, value <= 0 ? 0.0f : value);  // NaN is not below 0, and stays
    }
}

// fmaxf takes the number where the other is NaN.
extern "C" __global__ void __launch_bounds__(BLOCK)
    relu_by_fmaxf(const Storage* __restrict__ x, Storage* __restrict__ y, long long count) {
    const long long threads = static_cast<long long>(gridDim.x) * BLOCK;
    for (long long i = static_cast<long long>(blockIdx.x) * BLOCK + threadIdx.x; i < count; i += threads) {
        store(y + i, fmaxf(load(x + i), 0.0f));
    }
}

// A thread for each element, and no loop.
extern "C" __global__ void __launch_bounds__(BLOCK)
    element_for_each_thread(const Storage* __restrict__ x, Storage* __restrict__ y, long long count) {
    const long long i = static_cast<long long>(blockIdx.x) * BLOCK + threadIdx.x;
    if (i < count) {
        const float value = load(x + i);
        store(y + i, value <= 0 ? 0.0f : value);
    }
}

// Whole packs alone: what is left over at the end is not written.
extern "C" __global__ void __launch_bounds__(BLOCK)
    rest_not_written(const float* __restrict__ x, float* __restrict__ y, long long count) {
    const long long threads = static_cast<long long>(gridDim.x) * BLOCK;
    for (long long i = static_cast<long long>(blockIdx.x) * BLOCK + threadIdx.x; i < count / QUAD; i += threads) {
        float4 pack = reinterpret_cast<const float4*>(x)[i];
        pack.x = pack.x <= 0 ? 0.0f : pack.x;
        pack.y = pack.y <= 0 ? 0.0f : pack.y;
        pack.z = pack.z <= 0 ? 0.0f : pack.z;
        pack.w = pack.w <= 0 ? 0.0f : pack.w;
        reinterpret_cast<float4*>(y)[i] = pack;
    }
}

// One element too many.
extern "C" __global__ void __launch_bounds__(BLOCK)
    one_too_many(const Storage* __restrict__ x, Storage* __restrict__ y, long long count) {
    const long long threads = static_cast<long long>(gridDim.x) * BLOCK;
    for (long long i = static_cast<long long>(blockIdx.x) * BLOCK + threadIdx.x; i <= count; i += threads) {
        const float value = load(x + i);
        store(y + i, value <= 0 ? 0.0f : value);
    }
}
