"""A package for ``SGLANG_EXTERNAL_MODEL_PACKAGE``: it has the class of the served model alone.

SGLang takes the ``EntryClass`` of each module in here, and imports its own 250 model files
only for an architecture that is not among them (``sglang/srt/models/registry.py``).
"""
