"""Post-training quantizers: their cells, their real round trip, and what survives them.

One file per library behind one interface (`Quantizer`). An edit survives when it changes the
code, and is free of collateral when no other code changes.

Public, from `mansu_interp`: NF4, Survival, quantize, survival, get_quantizer. The rest is
implementation.
"""
