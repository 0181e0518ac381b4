// Elements of a strided array, one by one, to another of the same shape: how views become contiguous, and arrays parts.
//
// copy_N: a thread for each N bytes: an element, or up to 16 bytes of elements that are neighbours in both arrays. Bound
// by memory; rows and columns that are swapped (a transpose) read 32 bytes for each element. Nothing in a training step
// needs that often: products take transposed operands as they are.

constexpr int THREADS = 256;
constexpr int DIMENSIONS = 6;

// As kernels/view/gpu.py packs it: sizes from the last axis on, and the elements from one index to the next.
struct Layout {
    long long count, axes;
    long long size[DIMENSIONS];
    long long from[DIMENSIONS];
    long long to[DIMENSIONS];
};

template <class Element>
__device__ __forceinline__ void copy_strided(const Element* from, Element* to, const Layout& layout) {
    long long stride = static_cast<long long>(gridDim.x) * THREADS;
    for (long long i = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x; i < layout.count; i += stride) {
        long long rest = i, source = 0, target = 0;
        for (int axis = 0; axis < layout.axes - 1; ++axis) {
            long long outer = rest / layout.size[axis];
            long long index = rest - outer * layout.size[axis];
            source += index * layout.from[axis];
            target += index * layout.to[axis];
            rest = outer;
        }
        source += rest * layout.from[layout.axes - 1];  // the outermost index, and of plain copies the only one
        target += rest * layout.to[layout.axes - 1];
        to[target] = from[source];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) copy_1(const unsigned char* from, unsigned char* to, Layout layout) {
    copy_strided(from, to, layout);
}

extern "C" __global__ void __launch_bounds__(THREADS) copy_2(const unsigned short* from, unsigned short* to,
                                                             Layout layout) {
    copy_strided(from, to, layout);
}

extern "C" __global__ void __launch_bounds__(THREADS) copy_4(const unsigned* from, unsigned* to, Layout layout) {
    copy_strided(from, to, layout);
}

extern "C" __global__ void __launch_bounds__(THREADS) copy_8(const unsigned long long* from, unsigned long long* to,
                                                             Layout layout) {
    copy_strided(from, to, layout);
}

// Pointers to multiples of 16 bytes; steps are counted in these.
extern "C" __global__ void __launch_bounds__(THREADS) copy_16(const unsigned long long* from, unsigned long long* to,
                                                              Layout layout) {
    copy_strided(reinterpret_cast<const uint4*>(from), reinterpret_cast<uint4*>(to), layout);
}
