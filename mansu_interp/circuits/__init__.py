"""Edge scores -> a circuit -> how the attribution graphs of two models differ.

Public, from `mansu_interp`: AttributionConfig, CircuitConfig, Attribution, ScoredEdge,
edge_changes, attribute, patch_edges, Ablation, Ablated, circuit_metric, faithfulness_curve, Curve,
Stability, ExplainedHead, ExplainedHeads, explain_head, explain_heads, Circuit, read_circuit,
write_circuit, discover, classify, Changes, GraphComparison, compare. The rest is implementation.
"""
