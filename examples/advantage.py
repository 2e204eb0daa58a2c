"""An advantage of one's own: by rank within the group, so that no reward can outweigh the others.

    grpo-gsm8k grpo --preset quick --data artifacts/data --advantage examples.advantage:by_rank

The function gets the grades of one prompt's group and returns a number for each. What matters is the order of the
rewards and not their size, as with a judge whose scores have no scale.
"""


def by_rank(grades):
    """-1 for the worst to 1 for the best; equal rewards share a rank, and a group of equals gets 0."""
    rewards = [grade.reward for grade in grades]
    most = max(len(rewards) - 1, 1)
    return [
        (sum(other < reward for other in rewards) - sum(other > reward for other in rewards)) / most
        for reward in rewards
    ]
