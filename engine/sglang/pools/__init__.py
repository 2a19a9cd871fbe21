"""Pools of SGLang's whose layers are not alike."""
