"""DeepSeek-V4's compressed attention on torch's CPU operators: the reference of its CUDA kernels.

SGLang's own model code, pool, allocators and tables are used, and the bytes in the pool are those
of CUDA; what is replaced is what only a GPU runs.
"""
