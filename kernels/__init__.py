"""The op set: what each op means, and the loops and CUDA written for it by hand."""

if __name__ != "minibert.kernels":
    raise ImportError("this folder is the package `minibert.kernels`: import it by that name")
