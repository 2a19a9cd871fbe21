"""What runs inside SGLang's engines. All that touches SGLang itself is in :mod:`engine.sglang`."""
