"""Hand-written kernels, one to a file: kernel, launcher, what it accepts, the check against its meaning."""

if __name__ != "qcompiler.kernels":
    raise ImportError("import qcompiler.kernels, not kernels")
