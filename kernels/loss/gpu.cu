// Losses against targets that are numbers, with their gradients: one block each.
//
// Predictions of a batch are a few thousand numbers: the time is that of a launch and of a few trips to memory, whatever
// the arithmetic. One block counts what is not ignored, on the device (a captured graph is replayed on other targets),
// then adds the losses in a fixed order and writes the gradients, which need the count.
#include "gpu_common.cuh"

constexpr int THREADS = 1024;

__device__ __forceinline__ float count_kept(const float* __restrict__ targets, long long elements, float ignored) {
    int count = 0;
    for (long long first = 0; first < elements; first += THREADS) {  // every thread takes part in each vote
        const long long i = first + threadIdx.x;
        count += __syncthreads_count(i < elements && targets[i] != ignored);
    }
    return count > 0 ? static_cast<float>(count) : 1.0f;
}

// element(i, kept, count) is the loss of element i, 0 where it is ignored; it writes its gradients.
template <class Element>
__device__ __forceinline__ void mean_of(const float* __restrict__ targets, float* __restrict__ loss, long long elements,
                                        float ignored, Element element) {
    __shared__ float scratch[THREADS / WARP];
    const float count = count_kept(targets, elements, ignored);
    float total = 0;
    for (long long i = threadIdx.x; i < elements; i += THREADS) total += element(i, targets[i] != ignored, count);
    total = block_sum(total, scratch);
    if (threadIdx.x == 0) *loss = total / count;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    binary_cross_entropy(const Storage* __restrict__ logits, const float* __restrict__ targets,
                         float* __restrict__ loss, Storage* __restrict__ dlogits, Storage* __restrict__ dtargets,
                         long long elements, float ignored) {
    mean_of(targets, loss, elements, ignored, [&](long long i, bool kept, float count) {
        const float z = load(logits + i), t = targets[i];
        const float e = expf(-fabsf(z));
        const float p = (z >= 0 ? 1.0f : e) / (1 + e);
        store(dlogits + i, kept ? (p - t) / count : 0.0f);
        store(dtargets + i, kept ? -z / count : 0.0f);
        return kept ? fmaxf(z, 0.0f) - z * t + log1pf(e) : 0.0f;
    });
}

extern "C" __global__ void __launch_bounds__(THREADS)
    mse_loss(const Storage* __restrict__ predictions, const float* __restrict__ targets, float* __restrict__ loss,
             Storage* __restrict__ dpredictions, long long elements, float ignored) {
    mean_of(targets, loss, elements, ignored, [&](long long i, bool kept, float count) {
        const float apart = kept ? load(predictions + i) - targets[i] : 0.0f;
        store(dpredictions + i, 2 * apart / count);
        return apart * apart;
    });
}
