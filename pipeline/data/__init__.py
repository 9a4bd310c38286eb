"""Datasets: where samples come from, which split each is in, how they are transformed, and in which order they come.

`sources` opens the dataset that the job names; `cache` keeps decoded data on disk. `splits` decides which samples
train, validate and test. `targets` and `transforms` are fitted on the training split and stored with a run, together,
by `fitted_transforms`. `sampler` computes which samples each step takes; `loader` brings them to the device, where
`augment` changes them. `rng` is the source of all random numbers.
"""
