"""What a run will need, from shapes alone: time, memory, traffic, disk and price.

`shapes` builds the model without weights, `trace` runs one micro-batch of it without data, `memory`
adds what DeepSpeed holds, `methods` what a method holds and does, `speed` and `probe` turn
arithmetic into seconds; `run` puts it together, stage by stage.
"""
