// Packs of 16 bytes as they lie in memory, and y = f(x), y = f(a, b) by them, element by element.
#pragma once

#include "gpu_common.cuh"

constexpr int PACKS = 2;  // of each array, that a thread of an elementwise kernel has on their way at a time

// PACK neighbours, not yet converted: a read that nothing works on yet is one that nothing waits for.
union Pack {
    uint4 bits;
    Storage element[PACK];
};

__device__ __forceinline__ Pack read_pack(const Storage* p) {
    Pack pack;
    pack.bits = *reinterpret_cast<const uint4*>(p);
    return pack;
}

__device__ __forceinline__ void write_pack(Storage* p, const Pack& pack) {
    *reinterpret_cast<uint4*>(p) = pack.bits;
}

// A block takes PACKS * blockDim.x packs at a time, and reads all of them before it writes the first: in a plain loop
// over packs a thread would wait for each on its own, as no read is moved across the end of a turn.

// y[i] = f(x[i]): in packs where both arrays are aligned, what is left one by one.
template <class Function>
__device__ __forceinline__ void each(const Storage* __restrict__ x, Storage* __restrict__ y, long long count,
                                     Function f) {
    const long long packs = in_packs(0, x, y) ? count / PACK : 0;
    const int block = blockDim.x;
    const long long turn = static_cast<long long>(gridDim.x) * block * PACKS;
    for (long long first = static_cast<long long>(blockIdx.x) * block * PACKS + threadIdx.x; first < packs;
         first += turn) {
        Pack pack[PACKS];
#pragma unroll
        for (int p = 0; p < PACKS; ++p) {
            if (first + p * block < packs) pack[p] = read_pack(x + (first + p * block) * PACK);
        }
#pragma unroll
        for (int p = 0; p < PACKS; ++p) {
            if (first + p * block >= packs) break;
#pragma unroll
            for (int k = 0; k < PACK; ++k) store(&pack[p].element[k], f(load(&pack[p].element[k])));
            write_pack(y + (first + p * block) * PACK, pack[p]);
        }
    }
    const long long thread = static_cast<long long>(blockIdx.x) * block + threadIdx.x;
    const long long threads = static_cast<long long>(gridDim.x) * block;
    for (long long i = packs * PACK + thread; i < count; i += threads) store(y + i, f(load(x + i)));
}

// y[i] = f(a[i], b[i])
template <class Function>
__device__ __forceinline__ void each(const Storage* __restrict__ a, const Storage* __restrict__ b,
                                     Storage* __restrict__ y, long long count, Function f) {
    const long long packs = in_packs(0, a, b, y) ? count / PACK : 0;
    const int block = blockDim.x;
    const long long turn = static_cast<long long>(gridDim.x) * block * PACKS;
    for (long long first = static_cast<long long>(blockIdx.x) * block * PACKS + threadIdx.x; first < packs;
         first += turn) {
        Pack a_pack[PACKS], b_pack[PACKS];
#pragma unroll
        for (int p = 0; p < PACKS; ++p) {
            if (first + p * block >= packs) break;
            a_pack[p] = read_pack(a + (first + p * block) * PACK);
            b_pack[p] = read_pack(b + (first + p * block) * PACK);
        }
#pragma unroll
        for (int p = 0; p < PACKS; ++p) {
            if (first + p * block >= packs) break;
#pragma unroll
            for (int k = 0; k < PACK; ++k) {
                store(&a_pack[p].element[k], f(load(&a_pack[p].element[k]), load(&b_pack[p].element[k])));
            }
            write_pack(y + (first + p * block) * PACK, a_pack[p]);
        }
    }
    const long long thread = static_cast<long long>(blockIdx.x) * block + threadIdx.x;
    const long long threads = static_cast<long long>(gridDim.x) * block;
    for (long long i = packs * PACK + thread; i < count; i += threads) store(y + i, f(load(a + i), load(b + i)));
}
