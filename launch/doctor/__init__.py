"""`accrete doctor` and `accrete fetch`: what a run needs, looked at before it begins.

`checks` and `table` say what was found; `team` starts one `probe` for each process of a launch;
`exchange` and `folders` are what the probes try together; `machine` what each node says of itself;
`judge`, `judge_folders`, `network` and `versions` make checks of it; `offline` looks into the
caches, and `fetch` fills them.
"""
