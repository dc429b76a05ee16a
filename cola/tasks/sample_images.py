"""The images of `data_dir=builtin`: scikit-learn's digits in the shape of a published set.

To try a command or to rehearse a table without a download; a score on them says nothing about the
set whose place they take.
"""

import numpy as np
from numpy.typing import NDArray

from cola.tasks.sources import ImageArrays

NUM_TRAIN = 120
NUM_TEST = 40
DIGIT_PIXELS = 8  # on every side
DIGIT_WHITE = 16  # brightest value

# As the sets' own files hold them: (height, width) or (height, width, channels).
_SHAPES: dict[str, tuple[int, ...]] = {"mnist": (28, 28), "cifar10": (32, 32, 3)}


def sample_arrays(name: str) -> ImageArrays:
    """Digits enlarged and centred, the first for training and those after them for testing.

    Args:
        name: mnist or cifar10.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    num = NUM_TRAIN + NUM_TEST
    images, labels = _reshaped(source.images[:num], _SHAPES[name]), source.target[:num]
    return ImageArrays(
        x_train=images[:NUM_TRAIN],
        y_train=labels[:NUM_TRAIN],
        x_test=images[NUM_TRAIN:],
        y_test=labels[NUM_TRAIN:],
    )


def _reshaped(digits: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Digits (N, 8, 8) as bytes (N, *shape), every pixel a square, on black."""
    height, width, *channels = shape
    times = min(height, width) // DIGIT_PIXELS
    large = np.kron(digits * 255 / DIGIT_WHITE, np.ones((times, times)))  # (N, 8 times, 8 times)
    margins = [(size - DIGIT_PIXELS * times) // 2 for size in (height, width)]
    centred = np.pad(large, [(0, 0), *((margin, margin) for margin in margins)])
    if channels:
        centred = np.repeat(centred[..., None], channels[0], axis=-1)
    return centred.astype(np.uint8)
