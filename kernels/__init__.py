"""Hand-written kernels, one to a file: kernel, launcher, what it accepts, the check against its meaning.

A bare `import kernels` is not refused, as it is for passes and backends: transformers looks for Hugging Face's package
of that name, and at the root of a checkout it finds this folder. It must find a module without a version.
"""
