"""Data: where it comes from, which rows are in which split, how they are prepared, and in what order they arrive.

`sources` opens what the job names; `targets` maps its labels to what the task learns; `split` decides which rows train,
validate and test; `preprocess` is fitted on the training rows; `sampler` says which rows a step takes; `loader` brings
them to the device, where `augment` changes them. `random` is where every draw comes from.
"""
