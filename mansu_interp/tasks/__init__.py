"""What to forget and what to retain -> tokenized clean/corrupt prompts.

Public, from `mansu_interp`: load_task, Pair, PairSet, Task, read_prompts, read_rows,
synthetic_pairs, RowOptions, task_from_rows. The rest is implementation.
"""
