// Rows to 8 bits, and products of whole numbers. Every operation on floats rounds by itself, as the formulas write them
// (no fused multiply-add): the same bits as theirs in float32.
//
// quantize_rows    a block for each row: read from memory for its extremes, from L1 for the rest. Bound by memory.
// linear_int8...   a block for each TILE x TILE of y, through shared memory in words of four bytes. Bound by __dp4a:
//                  OWN_ROWS x OWN_OUTS of them a thread for three reads of 16 bytes. It multiplies signed bytes: q - 128
//                  takes the place of q, and 128 times the sum of the weight's row is added again.
#include "activation/gpu_gelu.cuh"
#include "gpu_rows.cuh"

constexpr int ROW_THREADS = 128;
constexpr int TILE_THREADS = 128;
constexpr int TILE = 64;  // rows of q and of the weight
constexpr int CHUNKS = 4;  // of 16 bytes, of each row at a time
constexpr int DEPTH = 4 * CHUNKS;  // the same in words
constexpr int LOADS = TILE * CHUNKS / TILE_THREADS;  // chunks of either operand that a thread brings
constexpr int OWN_ROWS = 8, OWN_OUTS = 4;  // of the tile, that a thread sums
constexpr int TEAM = TILE / OWN_OUTS;  // threads side by side
constexpr int HALF = TILE / 2;  // a thread has four rows in either half

constexpr float LEVELS = 255.0f;
constexpr float SMALLEST = 0x1p-120f;
constexpr int MIDDLE = 128;  // of unsigned bytes
constexpr unsigned SIGN_BITS = 0x80808080u;  // flipped, they take 128 from each of four bytes
constexpr int ONES = 0x01010101;

// ------------------------------------------------------------------------------------------------------------- quantise

// Into the range of unsigned bytes; NaN gives 0.
__device__ __forceinline__ float clipped(float x) { return fminf(fmaxf(x, 0.0f), LEVELS); }

// PACK bytes, `left` of them in the row.
__device__ __forceinline__ void store_bytes(unsigned char* q, int left, bool aligned, const float (&values)[PACK]) {
    union { unsigned char byte[PACK]; unsigned four; unsigned long long eight; } pack;
#pragma unroll
    for (int i = 0; i < PACK; ++i) pack.byte[i] = static_cast<unsigned char>(values[i]);
    if (aligned) {
        if constexpr (PACK == 8) *reinterpret_cast<unsigned long long*>(q) = pack.eight;
        else *reinterpret_cast<unsigned*>(q) = pack.four;
    } else {
#pragma unroll
        for (int i = 0; i < PACK; ++i) {
            if (i < left) q[i] = pack.byte[i];
        }
    }
}

extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    quantize_rows(const Storage* __restrict__ x, unsigned char* __restrict__ q, float* __restrict__ scales,
                  int* __restrict__ zero_points, int rows, int columns) {
    __shared__ float scratch[ROW_THREADS / WARP];
    const bool aligned = in_packs(columns, x, q);
    const int first = threadIdx.x * PACK, stride = ROW_THREADS * PACK;
    for (long long row = blockIdx.x; row < rows; row += gridDim.x) {
        float values[PACK], above = 0, below = 0;
        float broken = 0;
        for (int column = first; column < columns; column += stride) {
            load_part(x + row * columns + column, columns - column, aligned, 0.0f, values);
#pragma unroll
            for (int i = 0; i < PACK; ++i) {
                above = fmaxf(above, values[i]);
                below = fmaxf(below, -values[i]);
                if (values[i] != values[i]) broken = 1;  // a NaN, which fmaxf drops
            }
        }
        above = block_max(above, scratch);
        below = block_max(below, scratch);
        float scale = fmaxf(__fdiv_rn(__fadd_rn(above, below), LEVELS), SMALLEST);
        if (block_max(broken, scratch) > 0) scale = __int_as_float(0x7fc00000);
        const float inverse = __frcp_rn(scale);
        const float zero_point = clipped(rintf(__fmul_rn(below, inverse)));
        if (threadIdx.x == 0) {
            scales[row] = scale;
            zero_points[row] = static_cast<int>(zero_point);
        }
        for (int column = first; column < columns; column += stride) {
            load_part(x + row * columns + column, columns - column, aligned, 0.0f, values);
#pragma unroll
            for (int i = 0; i < PACK; ++i) {
                values[i] = clipped(__fadd_rn(rintf(__fmul_rn(values[i], inverse)), zero_point));
            }
            store_bytes(q + row * columns + column, columns - column, aligned, values);
        }
    }
}

// -------------------------------------------------------------------------------------------------------------- product

// 16 bytes at column `column` of a row; zeros where there is none.
__device__ __forceinline__ uint4 read_chunk(const unsigned char* matrix, long long row, int rows, int column,
                                            int columns, bool aligned) {
    uint4 words = make_uint4(0, 0, 0, 0);
    if (row >= rows || column >= columns) return words;
    const unsigned char* p = matrix + row * columns + column;
    if (aligned) return *reinterpret_cast<const uint4*>(p);
    unsigned word[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        if (i < columns - column) word[i / 4] |= static_cast<unsigned>(p[i]) << (8 * (i % 4));
    }
    return make_uint4(word[0], word[1], word[2], word[3]);
}

// Where row `row` of word `depth` lies in a tile that is stored depth by depth. The chunks that a warp writes at once
// differ by 8 rows, so that each of its words goes to a bank of its own; four rows from a multiple of 4 stay neighbours.
__device__ __forceinline__ int place(int depth, int row) { return depth * TILE + (row ^ (depth / 4 % 4 * 8)); }

__device__ __forceinline__ void place_chunk(unsigned* tile, int chunk, int row, const uint4& words) {
    const int depth = chunk * 4;
    tile[place(depth, row)] = words.x;
    tile[place(depth + 1, row)] = words.y;
    tile[place(depth + 2, row)] = words.z;
    tile[place(depth + 3, row)] = words.w;
}

__device__ __forceinline__ void read_four(const unsigned* tile, int depth, int row, int* four) {
    const uint4 words = *reinterpret_cast<const uint4*>(tile + place(depth, row));
    four[0] = static_cast<int>(words.x);
    four[1] = static_cast<int>(words.y);
    four[2] = static_cast<int>(words.z);
    four[3] = static_cast<int>(words.w);
}

// Neighbours of y, `left` of them in the row.
__device__ __forceinline__ void store_outs(Storage* y, int left, bool aligned, const float (&values)[OWN_OUTS]) {
    union { Storage element[OWN_OUTS]; uint2 eight; uint4 sixteen; } pack;
#pragma unroll
    for (int i = 0; i < OWN_OUTS; ++i) pack.element[i] = from_float<Storage>(values[i]);
    if (aligned) {
        if constexpr (sizeof(Storage) == 4) *reinterpret_cast<uint4*>(y) = pack.sixteen;
        else *reinterpret_cast<uint2*>(y) = pack.eight;
    } else {
#pragma unroll
        for (int i = 0; i < OWN_OUTS; ++i) {
            if (i < left) y[i] = pack.element[i];
        }
    }
}

template <class Function>
__device__ __forceinline__ void linear_int8_tiles(const unsigned char* __restrict__ q, const float* __restrict__ scales,
                                                  const int* __restrict__ zero_points,
                                                  const signed char* __restrict__ weight,
                                                  const float* __restrict__ weight_scales,
                                                  const Storage* __restrict__ bias, Storage* __restrict__ y, int rows,
                                                  int outs, int inputs, Function finish) {
    __shared__ __align__(16) unsigned q_tile[DEPTH * TILE];
    __shared__ __align__(16) unsigned weight_tile[DEPTH * TILE];
    __shared__ int weight_sums[TILE];
    const unsigned char* weight_bytes = reinterpret_cast<const unsigned char*>(weight);
    const bool aligned = inputs % 16 == 0 && in_packs(0, q, weight);
    const bool outs_aligned = outs % OWN_OUTS == 0 && in_packs(0, y);
    const int chunk = threadIdx.x % CHUNKS, line = threadIdx.x / CHUNKS;  // the first chunk that this thread brings
    const int own_row = threadIdx.x / TEAM * 4, own_out = threadIdx.x % TEAM * OWN_OUTS;
    const int across = (outs + TILE - 1) / TILE;
    const long long tiles = static_cast<long long>((rows + TILE - 1) / TILE) * across;

    for (long long tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const long long first_row = tile / across * TILE;
        const int first_out = static_cast<int>(tile % across) * TILE;
        int sums[OWN_ROWS][OWN_OUTS] = {}, line_sums[LOADS] = {};
        uint4 q_next[LOADS], weight_next[LOADS];

        for (int begin = -4 * DEPTH; begin < inputs; begin += 4 * DEPTH) {
            // What comes next is on its way while this thread works on what lies in the tiles: nothing in the first turn.
            const int next = begin + 4 * DEPTH;
#pragma unroll
            for (int i = 0; i < LOADS; ++i) {
                const int lower = line + i * (TILE / LOADS), column = next + chunk * 16;
                q_next[i] = read_chunk(q, first_row + lower, rows, column, inputs, aligned);
                weight_next[i] = read_chunk(weight_bytes, first_out + lower, outs, column, inputs, aligned);
            }
            if (begin >= 0) {
#pragma unroll
                for (int depth = 0; depth < DEPTH; ++depth) {
                    int left[OWN_ROWS], right[OWN_OUTS];
                    read_four(q_tile, depth, own_row, left);
                    read_four(q_tile, depth, HALF + own_row, left + 4);
                    read_four(weight_tile, depth, own_out, right);
#pragma unroll
                    for (int r = 0; r < OWN_ROWS; ++r) {
#pragma unroll
                        for (int c = 0; c < OWN_OUTS; ++c) sums[r][c] = __dp4a(left[r], right[c], sums[r][c]);
                    }
                }
            }
            __syncthreads();  // the tiles have been read
#pragma unroll
            for (int i = 0; i < LOADS; ++i) {
                const int lower = line + i * (TILE / LOADS);
                uint4 words = q_next[i];
                words.x ^= SIGN_BITS;
                words.y ^= SIGN_BITS;
                words.z ^= SIGN_BITS;
                words.w ^= SIGN_BITS;
                place_chunk(q_tile, chunk, lower, words);
                place_chunk(weight_tile, chunk, lower, weight_next[i]);
                line_sums[i] = __dp4a(static_cast<int>(weight_next[i].x), ONES, line_sums[i]);
                line_sums[i] = __dp4a(static_cast<int>(weight_next[i].y), ONES, line_sums[i]);
                line_sums[i] = __dp4a(static_cast<int>(weight_next[i].z), ONES, line_sums[i]);
                line_sums[i] = __dp4a(static_cast<int>(weight_next[i].w), ONES, line_sums[i]);
            }
            __syncthreads();
        }

#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            int sum = line_sums[i];  // neighbouring lanes have the chunks of one row
            for (int offset = 1; offset < CHUNKS; offset *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, offset);
            if (chunk == 0) weight_sums[line + i * (TILE / LOADS)] = sum;
        }
        __syncthreads();

        const int out = first_out + own_out;
#pragma unroll
        for (int r = 0; r < OWN_ROWS; ++r) {
            const long long row = first_row + own_row + r % 4 + r / 4 * HALF;
            if (row >= rows || out >= outs) continue;
            const float scale = scales[row];
            const int middle = MIDDLE - zero_points[row];
            float values[OWN_OUTS];
#pragma unroll
            for (int c = 0; c < OWN_OUTS; ++c) {
                if (out + c >= outs) continue;
                const float sum = __int2float_rn(sums[r][c] + middle * weight_sums[own_out + c]);
                const float scaled = __fmul_rn(__fmul_rn(sum, scale), weight_scales[out + c]);
                values[c] = finish(__fadd_rn(scaled, load(bias + out + c)));
            }
            store_outs(y + row * outs + out, outs - out, outs_aligned, values);
        }
    }
}

extern "C" __global__ void __launch_bounds__(TILE_THREADS)
    linear_int8(const unsigned char* __restrict__ q, const float* __restrict__ scales,
                const int* __restrict__ zero_points, const signed char* __restrict__ weight,
                const float* __restrict__ weight_scales, const Storage* __restrict__ bias, Storage* __restrict__ y,
                int rows, int outs, int inputs) {
    linear_int8_tiles(q, scales, zero_points, weight, weight_scales, bias, y, rows, outs, inputs,
                      [](float v) { return v; });
}

extern "C" __global__ void __launch_bounds__(TILE_THREADS)
    linear_int8_gelu_erf(const unsigned char* __restrict__ q, const float* __restrict__ scales,
                         const int* __restrict__ zero_points, const signed char* __restrict__ weight,
                         const float* __restrict__ weight_scales, const Storage* __restrict__ bias,
                         Storage* __restrict__ y, int rows, int outs, int inputs) {
    linear_int8_tiles(q, scales, zero_points, weight, weight_scales, bias, y, rows, outs, inputs,
                      [](float v) { return gelu_by_erf(v); });
}

extern "C" __global__ void __launch_bounds__(TILE_THREADS)
    linear_int8_gelu_tanh(const unsigned char* __restrict__ q, const float* __restrict__ scales,
                          const int* __restrict__ zero_points, const signed char* __restrict__ weight,
                          const float* __restrict__ weight_scales, const Storage* __restrict__ bias,
                          Storage* __restrict__ y, int rows, int outs, int inputs) {
    linear_int8_tiles(q, scales, zero_points, weight, weight_scales, bias, y, rows, outs, inputs,
                      [](float v) { return gelu_by_tanh(v); });
}
