"""Scores of several models, and the four properties.

Public, from `mansu_interp`: ModelVersion, Scores, evaluate, LeakTest, leak_test,
with_leak_prompts, TeachConfig, QARow, read_qa_rows, QAMetrics, qa_metrics, teach. The rest is
implementation.
"""
