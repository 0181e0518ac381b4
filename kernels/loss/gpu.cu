// Losses against targets that are numbers, with their gradients: one block each.
//
// Predictions of a batch are a few thousand numbers: the time is that of a launch and of a few trips to memory, whatever
// the arithmetic. One block adds the losses in a fixed order and writes the gradients, which need the count. What is not
// ignored is counted on the device: a captured graph is replayed on other targets.
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

// The mean of element(i), the loss of element i, which writes its gradients.
template <class Element>
__device__ __forceinline__ void mean_of(float* __restrict__ loss, long long elements, float count, Element element) {
    __shared__ float scratch[THREADS / WARP];
    float total = 0;
    for (long long i = threadIdx.x; i < elements; i += THREADS) total += element(i);
    total = block_sum(total, scratch);
    if (threadIdx.x == 0) *loss = total / count;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    binary_cross_entropy(const Storage* __restrict__ logits, const float* __restrict__ targets,
                         float* __restrict__ loss, Storage* __restrict__ dlogits, Storage* __restrict__ dtargets,
                         long long elements, float ignored) {
    const float count = count_kept(targets, elements, ignored);
    mean_of(loss, elements, count, [&](long long i) {
        const float z = load(logits + i), t = targets[i];
        const bool kept = t != ignored;
        const float e = expf(-fabsf(z));
        const float p = (z >= 0 ? 1.0f : e) / (1 + e);
        store(dlogits + i, kept ? (p - t) / count : 0.0f);
        store(dtargets + i, kept ? -z / count : 0.0f);
        return kept ? fmaxf(z, 0.0f) - z * t + log1pf(e) : 0.0f;
    });
}

extern "C" __global__ void __launch_bounds__(THREADS)
    mse_loss(const Storage* __restrict__ predictions, const float* __restrict__ targets, float* __restrict__ loss,
             Storage* __restrict__ dpredictions, long long elements) {
    const float count = elements > 0 ? static_cast<float>(elements) : 1.0f;
    mean_of(loss, elements, count, [&](long long i) {
        const float apart = load(predictions + i) - targets[i];
        store(dpredictions + i, 2 * apart / count);
        return apart * apart;
    });
}
