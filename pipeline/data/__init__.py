"""Data: where it comes from, which rows are in which split, how they are prepared, and in what order they arrive.

`sources` opens what the job names; `split` decides which rows train, validate and test; `targets` (which numbers and
names its labels have) and `preprocess` are fitted on the training rows and stored with a run; `sampler` says which rows
a step takes; `loader` brings them to the device, where `augment` changes them. `random` is where every draw comes from.
"""
