"""The measures of continual learning, from one accuracy matrix.

``matrix[i][j]`` is the measure of task j after training on i tasks (row 0: untrained), on the scale
where chance is 0 and perfect is 1; see ``RetentionTask.normalised``. N tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

Matrix = Sequence[Sequence[float]]


def average_accuracy(matrix: Matrix) -> float:
    """Mean over all tasks at the end. Lopez-Paz and Ranzato 2017, equation 2."""
    return fmean(matrix[-1])


def backward_transfer(matrix: Matrix) -> float:
    """BWT: mean change of the earlier tasks since each was learned; negative is forgetting.

    Lopez-Paz and Ranzato 2017, "Gradient episodic memory", equation 3.
    """
    n = len(matrix) - 1
    return fmean(matrix[-1][j] - matrix[j + 1][j] for j in range(n - 1))


def forward_transfer(matrix: Matrix) -> float:
    """FWT: mean of the later tasks just before each is trained, minus untrained.

    Lopez-Paz and Ranzato 2017, equation 4.
    """
    n = len(matrix) - 1
    return fmean(matrix[j][j] - matrix[0][j] for j in range(1, n))


def forgetting(matrix: Matrix) -> float:
    """Mean over the earlier tasks of the best ever measured minus the last.

    Chaudhry et al. 2018, "Riemannian walk for incremental learning", equation 3.
    """
    n = len(matrix) - 1
    lost = []
    for j in range(n - 1):
        history = [matrix[i][j] for i in range(1, n)]
        lost.append(max(history) - matrix[-1][j])
    return fmean(lost)


def intransigence(matrix: Matrix, joint: Matrix) -> float:
    """Mean over the later tasks of what joint training reaches minus what was reached.

    Each is measured right after it was trained. Chaudhry et al. 2018, equation 5.
    """
    n = len(matrix) - 1
    return fmean(joint[j + 1][j] - matrix[j + 1][j] for j in range(1, n))
