"""A run again, differently, or held to its word: `replay`, `fork` and `verify`.

    files.py     every byte against the hash chain: no model, no torch
    stored.py    a run directory as a config and data that can be trained on again, also in another place
    again.py     trains steps of it again, from its checkpoints and its rollouts, without a sampler
    replay.py    one step: the same weights?
    fork.py      from a checkpoint on with other settings: the same prompts, the same draws
    grades.py    stored text graded again, and every figure that follows from the grades
    verify.py    all of it, for a run or the stages of a pipeline

Nothing that lies in a run directory is ever imported, unpickled or run. A reward, a task or a loss of a user's own is
code that a run only names; it is imported from the current directory, and only where `--own_code` allows it.
"""
