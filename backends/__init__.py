"""Where ops run: NumPy, Numba on the CPU's cores."""

if __name__ != "minibert.backends":
    raise ImportError("this folder is the package `minibert.backends`: import it by that name")
