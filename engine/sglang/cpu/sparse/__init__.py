"""DeepSeek's sparse attention (V3.2) on torch's CPU operators: the reference of its CUDA kernels.

SGLang's own model code, pool and page tables are used; what is replaced is what only a GPU runs.
"""
