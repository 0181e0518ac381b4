"""Cross entropy on a GPU, right and with one mistake each: the kernels of loss.cu, and how they are launched."""

from collections.abc import Callable

from minibert.kernels.gpu.launch import Array, CudaFile, CudaKernel, Raw, blocks_for, contiguous, int32

cuda = CudaFile(__file__, "loss.cu")
right_rows = cuda.kernel("right", block=64)
right_mean = cuda.kernel("right_mean", block=1024)


def loss_by(
    rows_kernel: str = "right", mean_kernel: str = "right_mean", block: int = 1024, labels_as_stored: bool = False
) -> Callable[[Array, Array], tuple[Array, Array]]:
    """Cross entropy by these kernels, of the rows and of their mean."""
    each, mean = cuda.kernel(rows_kernel, block=64), cuda.kernel(mean_kernel, block=block)

    def cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
        numbers = Raw(labels.contiguous().address) if labels_as_stored else int32(labels)
        dlogits = logits.device.empty(logits.shape, logits.dtype)
        return _loss(each, mean, contiguous(logits), numbers, dlogits), dlogits

    return cross_entropy


def _loss(each: CudaKernel, mean: CudaKernel, logits: Array, labels: Array | Raw, dlogits: Array) -> Array:
    """The loss; the gradient goes to `dlogits`, which may be the logits themselves."""
    device, (rows, columns) = dlogits.device, dlogits.shape
    losses, loss = device.empty((rows,), "float32"), device.zeros((), "float32")
    each(logits, labels, dlogits, losses, rows, columns, grid=blocks_for(rows, 1, device))
    many = mean.block < right_mean.block
    mean(losses, labels, loss, rows, grid=blocks_for(rows, mean.block, device) if many else 1)
    return loss


right_cross_entropy = loss_by()
minus_log_of_probability = loss_by("minus_log_of_probability")
classes_that_fit = loss_by("classes_that_fit")
labels_of_16_bits = loss_by("labels_of_16_bits")
logit_of_ignored_label = loss_by("logit_of_ignored_label")
labels_of_half_their_width = loss_by(labels_as_stored=True)

mean_of_all = loss_by(mean_kernel="mean_of_all")
mean_of_first_rows = loss_by(mean_kernel="mean_of_first_rows")
mean_by_atomic_additions = loss_by(mean_kernel="mean_by_atomic_additions", block=64)


def fused(mean_kernel: str) -> Callable[..., tuple[Array, Array]]:
    """linear_cross_entropy: the library's product, then the same kernels on it."""
    mean = cuda.kernel(mean_kernel, block=1024)

    def linear_cross_entropy(x: Array, weight: Array, bias: Array, labels: Array) -> tuple[Array, Array]:
        logits = x.device.gemm(x, weight.swapaxes(0, 1), bias=contiguous(bias), epilogue="bias")
        dlogits = x.device.empty(logits.shape, logits.dtype)
        return _loss(right_rows, mean, logits, int32(labels), dlogits), dlogits

    return linear_cross_entropy


right_linear_cross_entropy = fused("right_mean")
fused_mean_of_none = fused("mean_of_none")
