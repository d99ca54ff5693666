"""SplitMix64 (Steele, Lea, Flood 2014): hashes of 64-bit numbers, and random numbers by seed and index."""

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(values: np.ndarray) -> np.ndarray:
    """A hash of each of `values`, uint64 like these: the first number of the stream with that seed."""
    x = values + _GAMMA
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_numbers(seeds: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The numbers at `index` (integers from 0) of the streams with these `seeds` (uint64); both broadcast."""
    return splitmix64(seeds + index.astype(np.uint64) * _GAMMA)
