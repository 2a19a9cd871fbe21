"""Recurrent layers (Mamba-2, GDN, KDA) on torch's CPU operators: the reference of their
triton kernels.

SGLang's own model code, pools and tracking are used. A request's state is one *slot* of each
layer's buffers: the last inputs of a convolution, and the matrix of the recurrence.
"""
