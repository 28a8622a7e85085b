"""MANSU: sparse, discrete edits inside a circuit that survive quantization by construction."""
